"""``optimize``: a copy of any model with its layers swapped for smaller ones, and a report of what was done."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ..ops.embedding_bag import EmbeddingBagCollection
from .converters import CONVERTERS, Converter, stored_bytes
from .swaps import LayerSwap, OptimizeReport
from .weight_reads import WeightReads, source_reads

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


def optimize(
    model: torch.nn.Module,
    embedding: str | None = "int8",
    skip: Skip | Iterable[Skip] = (),
    *,
    sample_inputs: Any = None,
) -> tuple[torch.nn.Module, OptimizeReport]:
    """A copy of a model, for inference, with smaller layers; the model itself is not changed.

    Works on any module: layers may sit anywhere in it, be used at several places (they stay one layer), share their
    weight among each other (they share the new one), or be the model itself. Float tables that are swapped are not
    copied on the way; everything else is a deep copy, in the mode (train or eval) of the original. A layer whose new
    form could not do the same stays as it is, and the report says why: ``max_norm``, a weight that something else
    uses as well (tied to a ``Linear``), pruned and parametrized weights, subclasses with a ``forward`` of their own,
    values that are not finite, tables so narrow that scales and biases would cost more than they save.

    A layer's weight may also be read directly by the model's code (``user @ self.items.weight.T``), which no swapped
    layer can serve. Such layers stay as they are. They are found in the source of the model's methods, constructors
    aside, through attributes, containers and local names. With ``sample_inputs`` a trial run decides instead: it
    sees every read on the way that those inputs take, however it is made, and compares the outputs; what only other
    code reads (a training loss, a branch not taken) is swapped, with a note in the report. Give them whenever you
    can; name in ``skip`` what still is not to be swapped.

    Args:
        model: any module, on any device. Optimizers that it holds in attributes become None in the copy. Weights of
            swapped layers that it also holds in plain attributes (say, in a list for a penalty) become NaN there, of
            the same shape but a single number in memory: no float table is kept alive, and no use goes unnoticed.
        embedding: rows of ``nn.Embedding``, ``nn.EmbeddingBag``, ``rk.EmbeddingBag`` and the tables of
            ``rk.EmbeddingBagCollection``: ``"int8"``, ``"int4"``, or None to leave them.
        skip: layers to leave: names (``"encoder.items"``), glob patterns (``"linear.*"``), module classes. What is
            inside a named module is left, too.
        sample_inputs: arguments of a call, as a tuple (anything else is the only argument). The model and the new
            one are run on them in eval mode, without gradients and from the same random state.

    Returns:
        The new model, and the report: print it, or see :class:`~recsys_kernels.compress.swaps.OptimizeReport`.

    Raises:
        ValueError: a choice that does not exist; an entry of ``skip`` that names no module of the model.
        TypeError: ``model`` is not a module, or an entry of ``skip`` is neither a name nor a module class.
        RuntimeError: the new model fails on ``sample_inputs`` where the given one does not, or its outputs have
            other shapes.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    plan = _Plan(model, {"embedding": embedding})
    plan.leave_skipped(skip)
    plan.leave_tied()
    expected = plan.leave_read(sample_inputs)
    plan.leave_tied()  # once more: a read of one layer's weight is one of all that share it
    new = plan.build()
    error = None if sample_inputs is None else _output_error(expected, _try(plan, new, sample_inputs))
    return new, plan.report(new, error)


@dataclass(eq=False)
class _Layer:
    """One layer on its way through :func:`optimize`: swapped unless there is a reason to keep it."""

    module: Any
    names: list[str]
    converter: Converter
    choice: str
    keep: str | None
    notes: list[str] = field(default_factory=list)
    new: Any = None


class _User(NamedTuple):
    """A parameter or buffer of a module."""

    owner: torch.nn.Module
    name: str
    tensor: torch.Tensor


class _Plan:
    """What happens to each layer of a model, and the copy made from that."""

    def __init__(self, model: torch.nn.Module, choices: Mapping[str, str | None]) -> None:
        self.model = model
        self.notes: list[str] = []
        self.modules: dict[int, torch.nn.Module] = {}
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.modules[id(module)] = module
            self.names.setdefault(id(module), []).append(name)
            if isinstance(module, torch.jit.ScriptModule) and not self.notes:
                self.notes.append(f"{name or '(the model)'}: scripted, left as it is; optimize before torch.jit.script")
        self.held = list(_held(self.modules, self.names))
        # Modules that the model uses without having registered them.
        self.unregistered = {
            id(module): (f"{path}.{name}".rstrip("."), module)
            for path, value in self.held
            if isinstance(value, torch.nn.Module)
            for name, module in value.named_modules()
            if id(module) not in self.modules
        }
        self.layers: dict[int, _Layer] = {}
        for converter in CONVERTERS:
            choice = choices[converter.option]
            if choice is None:
                continue
            if choice not in converter.choices:
                known = ", ".join(map(repr, converter.choices))
                raise ValueError(f"{converter.option} must be {known} or None, but is {choice!r}")
            self._add(converter, choice)

    def _add(self, converter: Converter, choice: str) -> None:
        for key, module in self.modules.items():
            if isinstance(module, converter.handles):
                reason = _reason_to_keep(module, converter) or converter.reason_to_keep(module, choice)
                self.layers[key] = _Layer(module, self.names[key], converter, choice, reason)
        for key, (path, module) in self.unregistered.items():
            if isinstance(module, converter.handles):
                reason = "not a registered submodule: .to() and state_dict() do not reach it either"
                self.layers[key] = _Layer(module, [path], converter, choice, reason)

    @property
    def swapped(self) -> list[_Layer]:
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
        reads = source_reads(readers, [layer.module for layer in layers])
        decisive = reads.places
        if sample_inputs is not None:
            outputs, decisive = self._trial(sample_inputs)
        elif layers and reads.unknown:
            methods = ", ".join(sorted(reads.unknown))
            self.notes.append(f"no source of {methods}: give sample_inputs to see whether it reads weights directly")
        for layer in layers:
            key = id(layer.module)
            if key in decisive:
                layer.keep = f"its weight is read by {decisive[key]}"
            elif key in reads.places:
                layer.notes.append(f"{reads.places[key]} reads its weight, which is not float any more")
        return outputs

    def _trial(self, sample_inputs: Any) -> tuple[Any, dict[int, str]]:
        """Runs the model; returns its outputs, and where weights of layers were read from outside of them."""
        layers = self.swapped
        memo = self._memo()
        memo.update((id(layer.module.weight), layer.module.weight) for layer in layers)
        # A run may change the model's state, so it runs a twin; the tables are the same ones.
        twin = copy.deepcopy(self.model, memo)
        readers = [module for module in twin.modules() if isinstance(module, _READERS)]
        with WeightReads([memo[id(layer.module)] for layer in layers], readers) as reads:
            outputs = _run(twin, sample_inputs)
        places = {id(layer.module): reads.found.get(id(layer.module.weight)) for layer in layers}
        return outputs, {key: place for key, place in places.items() if place is not None}

    def leave_tied(self) -> None:
        """Keeps layers whose weight is also used by something that is not swapped along with them."""
        users: dict[int, list[_User]] = {}
        modules = [(self.names[key][0], module) for key, module in self.modules.items()]
        for user in _users([*modules, *self.unregistered.values()]):
            users.setdefault(user.tensor.untyped_storage()._cdata, []).append(user)
        changed = True
        while changed:  # keeping one may keep another
            changed = sum(self._keep_tied(layer, users) for layer in self.swapped) > 0

    def _keep_tied(self, layer: _Layer, users: Mapping[int, list[_User]]) -> bool:
        own = layer.module.weight
        for user in users[own.untyped_storage()._cdata]:
            if user.owner is layer.module or not _overlap(user.tensor, own):
                continue
            other = self.layers.get(id(user.owner))
            along = other is not None and other.keep is None and other.converter is layer.converter
            if not (along and user.tensor is own):
                layer.keep, layer.notes = f"its weight is shared with {user.name!r}", []
                return True
        return False

    def build(self) -> torch.nn.Module:
        """The new model. Layers whose values cannot be converted are kept, with the reason."""
        self._convert()
        memo = self._memo()
        for layer in self.swapped:
            weight = layer.module.weight
            memo[id(layer.module)] = layer.new
            # Not a meta tensor: torch's matmul of a CPU and a meta tensor gives random numbers, without an error.
            memo[id(weight)] = weight.new_full((), float("nan")).expand_as(weight)
            layer.notes += [f"{path} is NaN now" for path, value in self.held if value is weight]
        for layer in self.swapped:
            _carry_over(layer, memo)
        new = copy.deepcopy(self.model, memo)
        for module in new.modules():
            if isinstance(module, _READERS):
                module._refresh_plan()
        return new

    def _convert(self) -> None:
        groups: dict[int, list[_Layer]] = {}
        for layer in self.swapped:
            groups.setdefault(id(layer.module.weight), []).append(layer)
        for group in groups.values():
            try:
                new = group[0].converter.convert([layer.module for layer in group], group[0].choice)
            except ValueError as refusal:
                for layer in group:
                    layer.keep, layer.notes = str(refusal), []
                continue
            for layer, module in zip(group, new, strict=True):
                layer.new = module
                layer.notes += [f"one table with {other.names[0]!r}" for other in group if other is not layer]

    def _memo(self) -> dict[int, Any]:
        """What a copy of the model takes instead of copying, beside layers and weights."""
        memo: dict[int, Any] = {}
        for path, value in self.held:
            if isinstance(value, torch.optim.Optimizer):
                memo[id(value)] = None
                self.notes.append(f"{path}: the optimizer is not copied")
            elif isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses results of a computation
        return memo

    def report(self, new: torch.nn.Module, output_error: float | None) -> OptimizeReport:
        """What was done; to be called after :meth:`build`."""
        return OptimizeReport(
            layers=tuple(_describe(layer) for layer in self.layers.values()),
            bytes_before=stored_bytes(self.model),
            bytes_after=stored_bytes(new),
            output_error=output_error,
            notes=tuple(dict.fromkeys(self.notes)),
        )


# ---- what may be swapped -------------------------------------------------------------------------------------------


def _reason_to_keep(module: Any, converter: Converter) -> str | None:
    """Why a layer is none that any converter could swap."""
    if parametrize.is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"
    base = next((c for c in type(module).__mro__ if c in converter.swaps), None)
    if base is None:
        return f"a {type(module).__name__} already"
    if members := _members(type(module), base):
        return f"its class has its own {', '.join(members)}"
    if "forward" in vars(module):
        return "its forward was replaced"
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
    return None if weight.dtype in _FLOATS else f"its weight is {_dtype(weight)}"


def _members(cls: type, base: type) -> list[str]:
    """What a subclass and those between define that may change what a call does, or that the model may use."""
    classes = cls.__mro__[: cls.__mro__.index(base)]
    return sorted({name for c in classes for name in vars(c)} - _HARMLESS_MEMBERS)


def _held(modules: Mapping[int, torch.nn.Module], names: Mapping[int, list[str]]) -> Iterator[tuple[str, Any]]:
    """Tensors, optimizers and unregistered modules in plain attributes, with their paths.

    Looks into containers and attributes of objects, as ``copy.deepcopy`` does.
    """
    seen = set(modules)
    for key, module in modules.items():
        prefix = f"{names[key][0]}." if names[key][0] else ""
        queue = [(prefix + name, value) for name, value in vars(module).items() if name not in _MODULE_STATE]
        while queue:
            path, value = queue.pop()
            if isinstance(value, (torch.Tensor, torch.optim.Optimizer, torch.nn.Module)):
                if id(value) not in modules:
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


def _users(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[_User]:
    for path, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.layout == torch.strided:
                yield _User(module, f"{path}.{name}".lstrip("."), tensor)


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


# ---- the copy ------------------------------------------------------------------------------------------------------


def _carry_over(layer: _Layer, memo: dict[int, Any]) -> None:
    """Gives the new layer the hooks around ``forward`` and the attributes that the user put on the old one."""
    for name in _FORWARD_HOOKS:
        setattr(layer.new, name, copy.deepcopy(getattr(layer.module, name), memo))
    known = {*_MODULE_STATE, *vars(layer.new), *layer.module.__constants__}
    for name, value in vars(layer.module).items():
        if name not in known:
            setattr(layer.new, name, copy.deepcopy(value, memo))


def _describe(layer: _Layer) -> LayerSwap:
    module = layer.module
    tensors = [*module.parameters(), *module.buffers()]
    before = sum(tensor.nbytes for tensor in tensors)
    error = relative = None
    if layer.new is not None:
        error = layer.converter.max_error(module, layer.new)
        largest = max(abs(value.item()) for value in module.weight.detach().aminmax())
        relative = error / largest if largest else 0.0
    return LayerSwap(
        names=tuple(layer.names),
        kind=type(module).__name__,
        action="kept" if layer.new is None else layer.choice,
        reason=layer.keep or "; ".join(layer.notes),
        shape=layer.converter.shape(module),
        dtype=_dtype(tensors[0]) if tensors else "",
        bytes_before=before,
        bytes_after=before if layer.new is None else stored_bytes(layer.new),
        max_error=error,
        relative_error=relative,
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---- trial runs ----------------------------------------------------------------------------------------------------


def _run(model: torch.nn.Module, sample_inputs: Any) -> Any:
    """Outputs in eval mode. The random state and the inputs stay as they are; the model may change."""
    arguments = sample_inputs if isinstance(sample_inputs, tuple) else (sample_inputs,)
    arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), arguments)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        return model.eval()(*arguments)


def _try(plan: _Plan, new: torch.nn.Module, sample_inputs: Any) -> Any:
    """Outputs of a new model, which stays as it is."""
    buffers = {id(tensor): tensor for layer in plan.swapped for tensor in layer.new.buffers()}
    twin = copy.deepcopy(new, dict(buffers))
    try:
        return _run(twin, sample_inputs)
    except Exception as error:
        raise RuntimeError(
            "the optimized model fails on sample_inputs, the given one does not; name the layer that it cannot do "
            f"without in skip ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _output_error(expected: Any, outputs: Any) -> float:
    """The largest absolute difference between floating-point outputs; infinity where only one of them is finite."""
    pairs = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (expected, outputs)
    ]
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in pairs]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"outputs of the optimized model have the shapes {shapes[1]} instead of {shapes[0]}")
    worst = 0.0
    for one, other in zip(*pairs, strict=True):
        if one.is_floating_point() and one.numel():
            same = (one == other) | (one.isnan() & other.isnan())
            difference = (one.double() - other.double()).abs().masked_fill(same, 0.0)
            worst = max(worst, difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item())
    return worst
