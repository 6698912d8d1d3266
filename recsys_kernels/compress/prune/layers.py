"""Which linear layers of a model get pruned, the mask on a layer's weight, and what was done to each."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..pruning_mask import PruningMask, mask_of

Choice = str | type[torch.nn.Module] | Callable[[str, torch.nn.Module], bool]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PrunedLayer:
    """The change of one linear layer.

    Attributes:
        name: where it is in the model (the first place, if there are several).
        shape: of its weight, [out_features, in_features].
        before, after: sparsity: share of the weights in use that are zero.
        reason: why the layer was not pruned; empty if it was pruned.
    """

    name: str
    shape: tuple[int, ...]
    before: float
    after: float
    reason: str = ""


@dataclass(frozen=True)
class PruneReport:
    """The changes that pruning made to a model: print it to read it.

    Attributes:
        layers: one entry a linear layer that was chosen, in the model's order.
        pattern: name of the sparsity pattern.
    """

    layers: tuple[PrunedLayer, ...]
    pattern: str

    @property
    def pruned(self) -> tuple[PrunedLayer, ...]:
        """The layers that were pruned."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def sparsity(self) -> float:
        """The share of zeros in the weights of all pruned layers together."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.pruned]
        zeros = sum(layer.after * size for layer, size in zip(self.pruned, sizes, strict=True))
        return zeros / sum(sizes) if sizes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {"pattern": self.pattern, "sparsity": self.sparsity, "layers": layers}

    def __str__(self) -> str:
        rows = [("layer", "out x in", "sparsity", "")]
        for layer in self.layers:
            shape = " x ".join(f"{size:,}" for size in layer.shape)
            change = f"{layer.before:.1%}" if layer.reason else f"{layer.before:.1%} -> {layer.after:.1%}"
            rows.append((layer.name or "(the model)", shape, change, f"kept: {layer.reason}" if layer.reason else ""))
        return "\n".join([*aligned(rows), f"pattern {self.pattern}: {self.sparsity:.1%} of the pruned layers' weights"])


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table with a rule under its first row; all columns but the first and the last are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


@dataclass(frozen=True)
class Target:
    """A linear layer that was chosen.

    Attributes:
        name: where it is in the model.
        module: the layer.
        reason: why the layer can't be pruned; None if it can be pruned.
    """

    name: str
    module: torch.nn.Linear
    reason: str | None

    @property
    def parameter(self) -> torch.Tensor:
        """The weight as the optimizer has it, dropped values included."""
        return unmasked(self.module)

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask of the layer, or None."""
        found = mask_of(self.module)
        return None if found is None else found.mask

    @property
    def zeros(self) -> float:
        """The share of zeros in the weight that the layer uses."""
        if self.reason is not None and not _has_values(self.module):
            return 0.0
        weight = self.module.weight.detach()
        return 1.0 - torch.count_nonzero(weight).item() / weight.numel()

    def put_mask(self, mask: torch.Tensor) -> None:
        """Gives the layer a mask. An existing mask is overwritten in place, so that compiled code sees the change."""
        found = mask_of(self.module)
        if found is None:
            _register(self.module, PruningMask(mask))
        else:
            found.mask.copy_(mask)


def _register(module: Any, mask: PruningMask) -> None:
    """Parametrizes the weight of a layer with a mask.

    torch calls ``set_`` on the parameter. The parameter then gets a new node in autograd's graph, and a
    DistributedDataParallel around the model waits for the old node. So the parameter is taken out during the call.
    """
    parameter = module._parameters["weight"]
    module._parameters["weight"] = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
    try:
        parametrize.register_parametrization(module, "weight", mask)
    except BaseException:
        module._parameters["weight"] = parameter
        raise
    module.parametrizations["weight"]._parameters["original"] = parameter


def unmasked(module: Any) -> torch.Tensor:
    """The weight of a layer as the optimizer has it."""
    return module.weight if mask_of(module) is None else module.parametrizations["weight"].original


def find_layers(model: torch.nn.Module, layers: Choice | Iterable[Choice] | None) -> list[Target]:
    """The linear layers that were chosen, with at least one that can be pruned.

    Raises:
        TypeError: ``model`` is not a module, or an entry of ``layers`` nothing that chooses.
        ValueError: an entry chooses no linear layer, or names one that can't be pruned; no layer can be pruned.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    chosen = chosen_modules(model, layers)
    found = [
        Target(names[id(module)], module, _reason(module, owners))
        for module in linears
        if chosen is None or id(module) in chosen
    ]
    for target in found:
        if target.reason is not None and is_named(model, layers, target.module):
            raise ValueError(f"layers: {target.name!r} can't be pruned: {target.reason}")
    if all(target.reason is not None for target in found):
        listed = "".join(f"; {target.name or '(the model)'}: {target.reason}" for target in found)
        raise ValueError(f"the model has no torch.nn.Linear that can be pruned{listed}")
    return found


def _entries(layers: Choice | Iterable[Choice]) -> list[Any]:
    return [layers] if isinstance(layers, str) or callable(layers) else list(layers)


def chosen_modules(model: torch.nn.Module, layers: Choice | Iterable[Choice] | None) -> set[int] | None:
    """The ids of the chosen modules and of all modules inside them; None stands for all modules."""
    if layers is None:
        return None
    if not (isinstance(layers, (str, Iterable)) or callable(layers)):
        raise TypeError(f"layers takes names, patterns, module classes and functions, not {layers!r}")
    chosen: set[int] = set()
    for entry in _entries(layers):
        text = repr(entry) if isinstance(entry, str) else getattr(entry, "__name__", repr(entry))
        inside = {id(module): module for root in _matches(model, entry) for module in root.modules()}
        if not inside:
            raise ValueError(f"layers: {text} names no module of the model")
        if not any(isinstance(module, torch.nn.Linear) for module in inside.values()):
            raise ValueError(f"layers: {text} names no torch.nn.Linear, and nothing that has one inside")
        chosen |= inside.keys()
    return chosen


def _matches(model: torch.nn.Module, entry: Any) -> list[torch.nn.Module]:
    modules = list(model.named_modules(remove_duplicate=False))
    if isinstance(entry, str):
        return [module for name, module in modules if fnmatch.fnmatchcase(name, entry)]
    if isinstance(entry, type) and issubclass(entry, torch.nn.Module):
        return [module for _, module in modules if isinstance(module, entry)]
    if callable(entry) and not isinstance(entry, type):
        # Only linear layers are asked about: a function of the name alone would also choose the modules around them.
        return [module for name, module in modules if isinstance(module, torch.nn.Linear) and entry(name, module)]
    raise TypeError(f"layers takes names, patterns, module classes and functions, not {entry!r}")


def is_named(model: torch.nn.Module, layers: Choice | Iterable[Choice] | None, module: torch.nn.Module) -> bool:
    """Whether the layer was chosen by its own name."""
    exact = [] if layers is None else [entry for entry in _entries(layers) if isinstance(entry, str)]
    return any(name in exact and one is module for name, one in model.named_modules(remove_duplicate=False))


def _has_values(module: torch.nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not is_lazy(weight) and weight.device.type != "meta" and weight.numel() > 0


def _reason(module: Any, owners: Counter[int]) -> str | None:
    """Why a layer can't be pruned."""
    if parametrize.is_parametrized(module, "weight") and mask_of(module) is None:
        steps = ", ".join(type(step).__name__ for step in module.parametrizations["weight"])
        return f"its weight is parametrized: {steps}"
    weight = unmasked(module)
    if not isinstance(weight, torch.nn.Parameter):
        return "its weight is not a parameter"
    if is_lazy(weight):
        return "its weight has no shape yet: call the model once"
    if weight.device.type == "meta":
        return "on the meta device: there are no values yet"
    if weight.dtype not in _FLOATS or weight.layout != torch.strided:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} ({weight.layout})"
    if tuple(weight.shape) != (module.out_features, module.in_features):
        return f"its weight is {tuple(weight.shape)}, not out_features x in_features"
    if weight.numel() == 0:
        return "empty"
    return "its weight is shared with another module" if owners[id(weight)] > 1 else None
