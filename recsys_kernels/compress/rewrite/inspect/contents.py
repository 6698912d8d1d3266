"""The contents of a model: modules and their names, values of plain attributes, tensors that share memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

# Attributes that every module has: they are not the user's.
MODULE_STATE = frozenset(vars(torch.nn.Module()))
_CODE = (type, FunctionType, MethodType, ModuleType)


class TensorUser(NamedTuple):
    """A parameter or buffer of a module."""

    owner: torch.nn.Module
    name: str
    tensor: torch.Tensor


class ModelContents:
    """The modules of a model, and the values that its plain attributes hold.

    Args:
        model: the model, which is not changed.

    Attributes:
        modules, names, parents: every module, all its names, and the modules that hold it; by id of the module.
        held_twice: ids of modules of the model that plain attributes hold, too.
        held: tensors, optimizers and foreign modules in plain attributes, with their paths.
        unregistered: id -> (path, module) of modules that the model uses without having registered them.
        notes: remarks about modules that cannot be changed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.notes: list[str] = []
        self.modules: dict[int, torch.nn.Module] = {}
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.modules[id(module)] = module
            self.names.setdefault(id(module), []).append(name)
            if isinstance(module, torch.jit.ScriptModule) and not self.notes:
                self.notes.append(f"{name or '(the model)'}: scripted, left as it is; optimize before torch.jit.script")
        self.parents: dict[int, list[torch.nn.Module]] = {}
        for module in self.modules.values():
            for _, child in module._modules.items():  # a scripted module has no true dict
                if child is not None:
                    self.parents.setdefault(id(child), []).append(module)
        held = list(_held_in_attributes(self.modules, self.names))
        self.held_twice = {id(value) for _, value in held if id(value) in self.modules}
        self.held = [(path, value) for path, value in held if id(value) not in self.modules]
        self.unregistered = {
            id(module): (f"{path}.{name}".rstrip("."), module)
            for path, value in self.held
            if isinstance(value, torch.nn.Module)
            for name, module in value.named_modules()
            if id(module) not in self.modules
        }

    def tensor_users(self) -> dict[int, list[TensorUser]]:
        """Every parameter and buffer, unregistered modules' included, by its storage."""
        users: dict[int, list[TensorUser]] = {}
        modules = [(self.names[key][0], module) for key, module in self.modules.items()]
        for user in _tensor_users([*modules, *self.unregistered.values()]):
            users.setdefault(user.tensor.untyped_storage()._cdata, []).append(user)
        return users

    def copy_memo(self) -> tuple[dict[int, Any], list[str]]:
        """The memo of a deep copy of the model, with what is not copied, and notes about that."""
        memo: dict[int, Any] = {}
        notes = []
        for path, value in self.held:
            if isinstance(value, torch.optim.Optimizer):
                memo[id(value)] = None
                notes.append(f"{path}: the optimizer is not copied")
            elif isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses results of a computation
        return memo, notes


def _held_in_attributes(
    modules: Mapping[int, torch.nn.Module], names: Mapping[int, list[str]]
) -> Iterator[tuple[str, Any]]:
    """Tensors, optimizers and modules in plain attributes, with their paths.

    Looks into containers and attributes of objects, as ``copy.deepcopy`` does.
    """
    seen = set(modules)
    for key, module in modules.items():
        prefix = f"{names[key][0]}." if names[key][0] else ""
        queue = [(prefix + name, value) for name, value in vars(module).items() if name not in MODULE_STATE]
        while queue:
            path, value = queue.pop()
            if isinstance(value, (torch.Tensor, torch.optim.Optimizer, torch.nn.Module)):
                yield path, value
                continue
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Mapping):
                queue += [(f"{path}[{name!r}]", item) for name, item in value.items()]
            elif isinstance(value, (list, tuple, set, frozenset)):
                queue += [(f"{path}[{number}]", item) for number, item in enumerate(value)]
            elif hasattr(value, "__dict__") and not isinstance(value, _CODE):
                queue += [(f"{path}.{name}", item) for name, item in vars(value).items()]


def _tensor_users(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[TensorUser]:
    for path, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not is_lazy(tensor) and tensor.layout == torch.strided:
                yield TensorUser(module, f"{path}.{name}".lstrip("."), tensor)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage have memory in common, by the range that each spans."""
    (first_a, last_a), (first_b, last_b) = _span(a), _span(b)
    return a is b or (first_a < last_b and first_b < last_a)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte (exclusive) in the storage."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()
