"""What ``optimize`` will do to each layer of a model, and the copy made from that."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ...ops.embedding_bag import EmbeddingBagCollection
from ...ops.linear.sparse.torch_masks import masking_hooks
from ..converters.tables import Converter
from .sequences import Run, find_runs
from .trial_run import Trial
from .weight_reads import source_reads

Skip = str | type[torch.nn.Module]

# Attributes that every module has: not the user's.
_MODULE_STATE = frozenset(vars(torch.nn.Module()))
_FORWARD_HOOKS = tuple(n for n in sorted(_MODULE_STATE) if n.startswith("_forward_") and "hooks" in n)
_STATE_HOOKS = tuple(n for n in sorted(_MODULE_STATE) if "state_dict" in n and "hooks" in n)
# What a subclass may define and still do the same as its base when it is called.
_HARMLESS_MEMBERS = frozenset(
    (
        *("__init__", "reset_parameters", "extra_repr", "__repr__", "__module__", "__doc__", "__constants__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("__firstlineno__", "__static_attributes__"),
    )
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CODE = (type, FunctionType, MethodType, ModuleType)
# Modules that read the weights of their layers themselves and know the quantized ones.
_READERS = (EmbeddingBagCollection,)


@dataclass(eq=False)
class Layer:
    """One layer on its way through ``optimize``: swapped unless there is a reason to keep it."""

    module: Any
    names: list[str]
    converter: Converter
    choice: str
    keep: str | None
    notes: list[str] = field(default_factory=list)
    new: Any = None
    sqnr: float | None = None
    float_us: float | None = None
    new_us: float | None = None
    unmasks: bool = False

    def leave(self, reason: str, unmasks: bool = False) -> None:
        """Keeps the layer; unmasks: as a plain one with zeros in place, if it has a pruning mask."""
        self.keep, self.notes, self.new, self.unmasks = reason, [], None, unmasks


class User(NamedTuple):
    """A parameter or buffer of a module."""

    owner: torch.nn.Module
    name: str
    tensor: torch.Tensor


class Plan:
    """What happens to each layer of a model, and the copy made from that.

    Args:
        model: the model, which is not changed.
        converters: the kinds of layers to swap, and the new form of each.
        masked: id of a layer -> what it is where it is kept, if that is another one: with a pruning mask.

    Attributes:
        layers: id of a layer of these kinds -> what happens to it.
        modules, names, parents: of every module, by id.
        aliased: ids of modules that plain attributes hold, too.
        taken: id of a Sequential -> what takes modules out of it instead of calling it.
        trial: what a run on sample inputs showed, if there was one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        converters: Sequence[tuple[Converter, str]],
        masked: Mapping[int, torch.nn.Module] | None = None,
    ) -> None:
        self.model, self.masked = model, masked or {}
        self.notes: list[str] = []
        self.modules: dict[int, torch.nn.Module] = {}
        self.names: dict[int, list[str]] = {}
        self.taken: dict[int, str] = {}
        self.trial: Trial | None = None
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
        held = list(_held(self.modules, self.names))
        self.aliased = {id(value) for _, value in held if id(value) in self.modules}
        self.held = [(path, value) for path, value in held if id(value) not in self.modules]
        # Modules that the model uses without having registered them.
        self.unregistered = {
            id(module): (f"{path}.{name}".rstrip("."), module)
            for path, value in self.held
            if isinstance(value, torch.nn.Module)
            for name, module in value.named_modules()
            if id(module) not in self.modules
        }
        self.layers: dict[int, Layer] = {}
        for converter, choice in converters:
            self._add(converter, choice)

    def _add(self, converter: Converter, choice: str) -> None:
        for key, module in self.modules.items():
            if isinstance(module, converter.handles):
                reason = _reason_to_keep(module, converter) or converter.reason_to_keep(
                    module, choice, self.parents.get(key, ())
                )
                self.layers[key] = Layer(module, self.names[key], converter, choice, reason)
        for key, (path, module) in self.unregistered.items():
            if isinstance(module, converter.handles):
                reason = "not a registered submodule: .to() and state_dict() do not reach it either"
                self.layers[key] = Layer(module, [path], converter, choice, reason)

    @property
    def swapped(self) -> list[Layer]:
        return [layer for layer in self.layers.values() if layer.keep is None]

    def leave_skipped(self, skip: Skip | Iterable[Skip]) -> None:
        """Keeps what the user names."""
        for entry in [skip] if isinstance(skip, (str, type)) else list(skip):
            text = repr(entry) if isinstance(entry, str) else getattr(entry, "__name__", repr(entry))
            roots = self._matches(entry)
            if not roots:
                raise ValueError(f"skip: {text} names no module of the model")
            for module in (module for root in roots for module in root.modules()):
                if id(module) in self.layers:
                    self.layers[id(module)].keep = f"skip={text}"

    def _matches(self, entry: Any) -> list[torch.nn.Module]:
        if isinstance(entry, str):
            matches = [key for key, names in self.names.items() if any(fnmatch.fnmatchcase(n, entry) for n in names)]
            return [self.modules[key] for key in matches]
        if isinstance(entry, type) and issubclass(entry, torch.nn.Module):
            return [module for module in self.modules.values() if isinstance(module, entry)]
        raise TypeError(f"skip takes names, patterns and module classes, not {entry!r}")

    def leave_read(self, sample_inputs: Any) -> Any:
        """Keeps layers whose weight other code reads; returns the model's outputs if there are inputs."""
        layers = self.swapped
        outputs = None
        readers = [module for module in self.modules.values() if not isinstance(module, _READERS)]
        sequentials = [module for module in self.modules.values() if type(module) is torch.nn.Sequential]
        reads = source_reads(readers, [layer.module for layer in layers], sequentials)
        decisive = reads.places
        self.taken.update(reads.taken)
        if sample_inputs is not None:
            self.trial = Trial(self.model, [layer.module for layer in layers], sequentials, self.parents, _READERS)
            outputs = self.trial.run(sample_inputs, self.copy_memo())
            decisive = self.trial.reads
            self.taken.update(self.trial.taken)
        elif layers and reads.unknown:
            methods = ", ".join(sorted(reads.unknown))
            self.notes.append(f"no source of {methods}: give sample_inputs to see whether it reads weights directly")
            self.taken.update({id(module): methods for module in sequentials})  # it may
        for layer in layers:
            key = id(layer.module)
            if key in decisive:
                layer.leave(f"its weight is read by {decisive[key]}")
            elif sample_inputs is None and key in reads.maybe:
                layer.leave(f"its weight may be read by {reads.maybe[key]}; sample_inputs would tell")
            elif key in reads.places:
                layer.notes.append(f"{reads.places[key]} reads its weight, which is not float any more")
        return outputs

    def leave_tied(self) -> None:
        """Keeps layers whose weight is also used by something that is not swapped along with them."""
        users: dict[int, list[User]] = {}
        modules = [(self.names[key][0], module) for key, module in self.modules.items()]
        for user in _users([*modules, *self.unregistered.values()]):
            users.setdefault(user.tensor.untyped_storage()._cdata, []).append(user)
        changed = True
        while changed:  # keeping one may keep another
            changed = sum(self._keep_tied(layer, users) for layer in self.swapped) > 0

    def _keep_tied(self, layer: Layer, users: Mapping[int, list[User]]) -> bool:
        for name in sorted(layer.converter.parameters, reverse=True):  # the weight first
            own = getattr(layer.module, name)
            for user in () if own is None else users[own.untyped_storage()._cdata]:
                if user.owner is layer.module or not _overlap(user.tensor, own):
                    continue
                other = self.layers.get(id(user.owner))
                along = other is not None and other.keep is None and other.converter is layer.converter
                if not (along and user.tensor is own and name == "weight"):
                    layer.leave(f"its {name} is shared with {user.name!r}")
                    return True
        return False

    def runs(self) -> list[Run]:
        """Linear layers and functions of a Sequential that become one call each."""
        return find_runs(self)

    def build(self) -> torch.nn.Module:
        """The new model; to be called after :meth:`convert`."""
        memo = self.copy_memo()
        runs = self.runs()
        for run in runs:
            run.fold()
        self._note_single(runs)
        for layer in self.swapped:
            weight = layer.module.weight
            memo[id(layer.module)] = layer.new
            # Not a meta tensor: torch's matmul of a CPU and a meta tensor gives random numbers, without an error.
            memo[id(weight)] = weight.new_full((), float("nan")).expand_as(weight)
            layer.notes += [f"{path} is NaN now" for path, value in self.held if value is weight]
        for layer in self.swapped:
            carry_over(layer.module, layer.new, memo)
        for key, module in self.masked.items():
            if key not in memo and not (key in self.layers and self.layers[key].unmasks):
                computed = [v for v in vars(module).values() if isinstance(v, torch.Tensor) and v.grad_fn is not None]
                memo.update((id(value), value.detach().clone()) for value in computed)  # deepcopy refuses these
                memo[key] = copy.deepcopy(module, memo)
        # Inner ones first: outer ones take them as they are.
        for sequential in reversed([m for m in self.modules.values() if any(m is run.sequential for run in runs)]):
            _rebuild(sequential, [run for run in runs if run.sequential is sequential], memo)
        new = copy.deepcopy(self.model, memo)
        for module in new.modules():
            if isinstance(module, _READERS):
                module._refresh_plan()
        return new

    def _note_single(self, runs: Sequence[Run]) -> None:
        """Says why linear layers of a Sequential are in no run, where that is the code's doing."""
        inside = {id(layer) for run in runs for layer, _ in run.steps}
        for layer in self.swapped:
            for parent in self.parents.get(id(layer.module), ()) if id(layer) not in inside else ():
                if id(parent) in self.taken:
                    layer.notes.append(f"by itself, as its Sequential is not only called: {self.taken[id(parent)]}")

    def convert(self) -> None:
        """Makes the new form of every layer that is swapped. Those whose values forbid it are kept, with the reason."""
        groups: dict[int, list[Layer]] = {}
        for layer in self.swapped:
            groups.setdefault(id(layer.module.weight), []).append(layer)
        for group in groups.values():
            try:
                new = group[0].converter.convert([layer.module for layer in group], group[0].choice)
            except ValueError as refusal:
                for layer in group:
                    layer.leave(str(refusal))
                continue
            for layer, module in zip(group, new, strict=True):
                layer.new = module
                layer.notes += [f"one table with {other.names[0]!r}" for other in group if other is not layer]

    def copy_memo(self) -> dict[int, Any]:
        """What a copy of the model takes instead of copying, beside layers and weights."""
        memo: dict[int, Any] = {}
        for path, value in self.held:
            if isinstance(value, torch.optim.Optimizer):
                memo[id(value)] = None
                self.notes.append(f"{path}: the optimizer is not copied")
            elif isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses results of a computation
        return memo


# ---- what may be swapped -------------------------------------------------------------------------------------------


def _reason_to_keep(module: Any, converter: Converter) -> str | None:
    """Why a layer is none that any converter could swap."""
    if parametrize.is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"
    base = next((c for c in type(module).__mro__ if c in converter.swaps), None)
    if base is None:
        return f"{_a(type(module).__name__)} already"
    if members := _members(type(module), base):
        return f"its class has its own {', '.join(members)}"
    if "forward" in vars(module):
        return "its forward was replaced"
    if hooks := masking_hooks(module):
        calls = ", ".join(f"torch.nn.utils.prune.remove(layer, {name!r})" for name in sorted(hooks))
        return f"has masks of torch.nn.utils.prune: {calls} leaves a plain layer"
    if (own := {*module._parameters, *module._buffers, *module._modules}) != converter.parameters:
        return f"has {', '.join(sorted(own)) or 'nothing'} instead of {', '.join(sorted(converter.parameters))}"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "has hooks on its state_dict"
    weight = module.weight
    if type(weight) is not torch.nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__} ({weight.layout})"
    if weight.device.type == "meta":
        return "on the meta device: there are no values yet"
    if weight.numel() == 0:
        return "empty"
    return None if weight.dtype in _FLOATS else f"its weight is {dtype_name(weight)}"


def _members(cls: type, base: type) -> list[str]:
    """What a subclass and those between define that may change what a call does, or that the model may use."""
    classes = cls.__mro__[: cls.__mro__.index(base)]
    return sorted({name for c in classes for name in vars(c)} - _HARMLESS_MEMBERS)


def _held(modules: Mapping[int, torch.nn.Module], names: Mapping[int, list[str]]) -> Iterator[tuple[str, Any]]:
    """Tensors, optimizers and modules in plain attributes, with their paths.

    Looks into containers and attributes of objects, as ``copy.deepcopy`` does.
    """
    seen = set(modules)
    for key, module in modules.items():
        prefix = f"{names[key][0]}." if names[key][0] else ""
        queue = [(prefix + name, value) for name, value in vars(module).items() if name not in _MODULE_STATE]
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


def _users(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[User]:
    for path, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not is_lazy(tensor) and tensor.layout == torch.strided:
                yield User(module, f"{path}.{name}".lstrip("."), tensor)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
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


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def dtype_name(tensor: torch.Tensor) -> str:
    """The type of a tensor without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")


# ---- the copy ------------------------------------------------------------------------------------------------------


def carry_over(old: torch.nn.Module, new: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Gives a new module the hooks around ``forward`` and the attributes that the user put on the old one."""
    for name in _FORWARD_HOOKS:
        setattr(new, name, copy.deepcopy(getattr(old, name), memo))
    known = {*_MODULE_STATE, *vars(new), *getattr(old, "__constants__", ())}
    for name, value in vars(old).items():
        if name not in known:
            setattr(new, name, copy.deepcopy(value, memo))


def _rebuild(sequential: torch.nn.Module, runs: Sequence[Run], memo: dict[int, Any]) -> None:
    """Puts the new form of a Sequential into the memo of a copy: one call for each run in it."""
    places = {key: module for run in runs for key, module in run.places().items()}
    inside = {key for run in runs for key in run.keys}
    if len(runs) == 1 and inside == sequential._modules.keys():
        new: torch.nn.Module = runs[0].module()
        memo[id(sequential)] = new
    else:
        memo[id(sequential)] = new = torch.nn.Sequential()
        for key, child in sequential._modules.items():
            if key in places:
                new.add_module(key, places[key])
            elif key not in inside:
                new.add_module(key, copy.deepcopy(child, memo))
    new.training = sequential.training
    carry_over(sequential, new, memo)
