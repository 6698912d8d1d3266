"""Structured pruning: linear layers that lose whole neurons, so that what is left is a smaller dense model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...ops.linear.sparse.patterns import check_sparsity, lowest, parse_pattern
from ..converters.converter import LayerDecision
from ..converters.linear import LinearConverter
from ..rewrite.inspect.model_calls import ModelCall, model_calls
from ..rewrite.plan import RewritePlan
from .layers import Choice, aligned, chosen_modules, is_named
from .masks import check_finite

SCORES = ("magnitude", "first_order")

# These modules are functions of each value by itself: they do the same to the neurons that are left.
_ELEMENTWISE = frozenset(
    getattr(torch.nn, name)
    for name in (
        *("Identity", "Dropout", "AlphaDropout", "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU"),
        *("Mish", "Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Softsign", "Hardtanh", "Hardswish", "Hardsigmoid"),
        *("Threshold", "Hardshrink", "Softshrink", "Tanhshrink"),
    )
)
# These modules have values of their own for every neuron.
_PER_NEURON = frozenset((torch.nn.BatchNorm1d, torch.nn.PReLU))
_HOOKS = tuple(n for n in sorted(vars(torch.nn.Module())) if n.startswith(("_forward", "_backward")) and "hooks" in n)


@dataclass(frozen=True)
class PrunedNeurons:
    """The change of the neurons of one linear layer.

    Attributes:
        name: where it is in the model.
        before, after: neurons (out_features).
        following: name of the layer that takes their outputs, and lost the columns; empty if none was dropped.
        reason: why no neuron was dropped; empty if it lost some.
    """

    name: str
    before: int
    after: int
    following: str = ""
    reason: str = ""


@dataclass(frozen=True)
class NeuronReport:
    """The changes that :func:`prune_neurons` made: print it to read it.

    Attributes:
        layers: one entry a linear layer that was chosen, in the model's order.
        parameters_before, parameters_after: numbers in all parameters of the model.
    """

    layers: tuple[PrunedNeurons, ...]
    parameters_before: int
    parameters_after: int

    @property
    def pruned(self) -> tuple[PrunedNeurons, ...]:
        """The layers that lost neurons."""
        return tuple(layer for layer in self.layers if not layer.reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows = [("layer", "neurons", "")]
        for layer in self.layers:
            if layer.reason:
                rows.append((layer.name or "(the model)", f"{layer.before:,}", f"kept: {layer.reason}"))
            else:
                rows.append((layer.name, f"{layer.before:,} -> {layer.after:,}", f"columns of {layer.following!r}"))
        sizes = f"{self.parameters_before:,} -> {self.parameters_after:,}"
        return "\n".join([*aligned(rows), f"whole model: {sizes} parameters"])


@dataclass(eq=False)
class _Link:
    """A layer, the modules after it, and the layer that takes its neurons; or the reason why none can be dropped."""

    layer: LayerDecision
    between: list[torch.nn.Module] = field(default_factory=list)
    following: LayerDecision | None = None
    reason: str = "not in a torch.nn.Sequential before another linear layer"


class _Neurons(LinearConverter):
    """Finds the linear layers; a :class:`RewritePlan` tells which of their weights other code reads."""

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return "has hooks"
        weight = module.weight
        return None if tuple(weight.shape) == self.shape(module) else f"its weight is {tuple(weight.shape)}"


def prune_neurons(
    model: torch.nn.Module,
    fraction: float,
    *,
    scores: str | Mapping[str, torch.Tensor] = "magnitude",
    layers: Choice | Iterable[Choice] | None = None,
    sample_inputs: Any = None,
) -> tuple[torch.nn.Module, NeuronReport]:
    """A smaller dense copy of a model, whose linear layers have lost their least important neurons.

    Neurons can be dropped where linear layers follow each other in a ``nn.Sequential``, with nothing but activation
    functions of each value, Dropout, ``BatchNorm1d`` and ``PReLU`` in between: the first layer loses rows (and entries
    of its bias), what is in between the same channels, the following layer columns. The contribution of a dropped
    neuron to the following layer is gone, also a constant one. Outputs of a Sequential keep their size. ``LayerNorm``,
    ``Softmax`` and the like compute over all neurons, so that fewer would change the others: layers before them are
    left alone. The copy usually has to be trained on.

    For inputs [batch, positions, features] the channels of a ``BatchNorm1d`` are the positions, not the neurons.
    If a layer has as many neurons as positions, only a call shows that: give ``sample_inputs`` for such a model.

    Example:
        >>> small, report = rk.prune_neurons(model, 0.25, sample_inputs=x)         # doctest: +SKIP
        >>> print(report)                                                          # doctest: +SKIP

    Args:
        model: any model; it is not changed. Masked layers are left alone, see :func:`~recsys_kernels.remove_masks`.
        fraction: share of the neurons of each layer to drop, 0 <= fraction < 1; at least one is always kept.
        scores: the importance of a neuron. ``"magnitude"``: the length (L2) of its row of weights, as Li et al.,
            "Pruning Filters for Efficient ConvNets", 2017, times that of its column in the following layer, so that it
            is no matter which of the two is scaled; behind a BatchNorm1d, which undoes the scale of the row, its factor
            takes the row's place (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming",
            2017). ``"first_order"``: |sum of w * gradient| over its row and bias (Molchanov et al., "Importance
            Estimation for Neural Network Pruning", 2019), with the gradients in ``.grad``. Or a tensor [out_features]
            by the name of each layer: more is better.
        layers: which layers lose neurons; see :func:`~recsys_kernels.prune`.
        sample_inputs: arguments of a call, as a tuple (anything else is the only argument). Both models are run on them
            in eval mode, which shows what reads weights of the layers, and that the copy works.

    Returns:
        The copy, in the mode of the original, and the report.

    Raises:
        ValueError: ``fraction`` out of range; unknown scores; a layer named in ``layers`` that can't lose neurons (the
            reason is given), or none that can; NaN or infinity in a weight; no gradient where one is needed.
        TypeError: an argument of another type.
        RuntimeError: the copy fails on ``sample_inputs``, or its outputs have other shapes.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    share = check_sparsity(fraction, parse_pattern("unstructured"), "fraction")
    if not isinstance(scores, Mapping) and scores not in SCORES:
        known = ", ".join(map(repr, SCORES))
        raise ValueError(f"scores must be {known} or tensors by the names of layers, but is {scores!r}")
    chosen = chosen_modules(model, layers)
    plan = RewritePlan(model, [(_Neurons(), "fewer neurons")])
    plan.keep_tied()
    calls = model_calls(model, sample_inputs, None)
    expected = plan.keep_read(calls, other_methods=False)
    plan.keep_tied()
    links = [link for key, link in _links(plan).items() if chosen is None or key in chosen]
    for link in links:
        if link.following is None and is_named(model, layers, link.layer.module):
            raise ValueError(f"layers: {link.layer.names[0]!r} can't lose neurons: {link.reason}")
    if all(link.following is None for link in links):
        listed = "".join(f"; {link.layer.names[0] or '(the model)'}: {link.reason}" for link in links)
        raise ValueError(f"the model has no torch.nn.Linear that can lose neurons{listed}")
    kept = {id(link): _kept(link, share, scores) for link in links if link.following is not None}
    new = _smaller(plan, [link for link in links if id(link) in kept], kept)
    for call, outputs in zip(calls, expected, strict=True):
        _try(new, call, outputs)
    return new, _report(model, new, links, kept)


# ---- the following layers ------------------------------------------------------------------------------------------


def _links(plan: RewritePlan) -> dict[int, _Link]:
    """The layer that takes the outputs of each linear layer, by id."""
    links = {key: _Link(layer) for key, layer in plan.decisions.items()}
    for link in links.values():
        link.reason = link.layer.reason_to_keep or link.reason
    nested = {
        id(child)
        for module in plan.contents.modules.values()
        if _is_plain(module, plan)
        for child in module._modules.values()
        if child is not None and _is_plain(child, plan) and _is_only_here(child, plan)
    }
    for key, module in plan.contents.modules.items():
        if type(module) is torch.nn.Sequential and key in plan.taken_apart:
            for child in module.modules():
                if id(child) in links and links[id(child)].layer.reason_to_keep is None:
                    links[id(child)].reason = f"its Sequential is not only called: {plan.taken_apart[key]}"
        if _is_plain(module, plan) and key not in nested:
            _follow(_flat(module, nested), plan, links)
    return links


def _is_plain(module: torch.nn.Module, plan: RewritePlan) -> bool:
    """Whether a module is a Sequential that only calls its modules, one after the other."""
    free = type(module) is torch.nn.Sequential and id(module) not in plan.taken_apart and "forward" not in vars(module)
    return free and not any(getattr(module, hooks) for hooks in _HOOKS)


def _is_only_here(module: torch.nn.Module, plan: RewritePlan) -> bool:
    return len(plan.contents.parents[id(module)]) == 1 and id(module) not in plan.contents.held_twice


def _flat(sequential: torch.nn.Module, nested: set[int]) -> list[torch.nn.Module]:
    flat: list[torch.nn.Module] = []
    for child in sequential._modules.values():
        if child is not None:
            flat += _flat(child, nested) if id(child) in nested else [child]
    return flat


def _follow(flat: Sequence[torch.nn.Module], plan: RewritePlan, links: Mapping[int, _Link]) -> None:
    """Finds the following layer of each linear one in a list of modules that are called one after the other."""
    for number, module in enumerate(flat):
        link = links.get(id(module))
        if link is None or link.layer.reason_to_keep is not None:
            continue
        if not _is_only_here(module, plan):
            link.reason = "used in several places"
            continue
        link.reason = "its outputs are those of the Sequential"
        for other in flat[number + 1 :]:
            if id(other) in links:
                following = links[id(other)].layer
                if following.reason_to_keep is not None:
                    link.reason = f"{following.names[0]!r}, which follows, can't be changed: {following.reason_to_keep}"
                elif not _is_only_here(other, plan):
                    link.reason = f"{following.names[0]!r}, which follows, is used in several places"
                elif other.in_features != module.out_features:
                    link.reason = f"{following.names[0]!r}, which follows, takes {other.in_features} features"
                else:
                    link.following = following
                break
            if refusal := _refusal(other, link.layer.module.out_features, plan):
                link.reason = f"{plan.contents.names[id(other)][0]!r}, which follows, {refusal}"
                break
            link.between.append(other)


def _refusal(module: torch.nn.Module, neurons: int, plan: RewritePlan) -> str | None:
    """Why neurons can't be dropped in front of a module."""
    kind = type(module).__name__
    if type(module) not in _ELEMENTWISE | _PER_NEURON:
        return f"is a {kind}, which may compute over all neurons"
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
        return f"is a {kind} with hooks or another forward"
    if type(module) in _PER_NEURON:
        if not _is_only_here(module, plan):
            return f"is a {kind} that is used in several places"
        size = _channels(module)
        if size not in (1, neurons) or (size == 1 and isinstance(module, torch.nn.BatchNorm1d) and neurons != 1):
            return f"is a {kind} of {size} channels, not {neurons}"
        if {*module._parameters, *module._buffers} - _VALUES[type(module)] or module._modules:
            return f"is a {kind} with values that are not its own"
    return None


_VALUES = {
    torch.nn.BatchNorm1d: {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    torch.nn.PReLU: {"weight"},
}


def _channels(module: Any) -> int:
    return module.num_features if isinstance(module, torch.nn.BatchNorm1d) else module.num_parameters


# ---- which neurons -------------------------------------------------------------------------------------------------


def _kept(link: _Link, share: float, scores: str | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The numbers of the neurons that are kept, ascending."""
    found = _scores(link, scores)
    if not torch.isfinite(found).all():
        neuron = int((~torch.isfinite(found)).nonzero()[0])
        raise ValueError(
            f"the score of neuron {neuron} of {link.layer.names[0]!r} is {found[neuron].item()}, but must be finite"
        )
    count = min(round(share * len(found)), len(found) - 1)
    return (~lowest(found, count)).nonzero().squeeze(1)


@torch.no_grad()
def _scores(link: _Link, scores: str | Mapping[str, torch.Tensor]) -> torch.Tensor:
    name, module = link.layer.names[0], link.layer.module
    assert link.following is not None
    for layer in (link.layer, link.following):
        check_finite(layer.module.weight.detach(), f"the weight of {layer.names[0]!r}")
    if isinstance(scores, Mapping):
        given = scores.get(name)
        if not isinstance(given, torch.Tensor) or given.shape != (module.out_features,):
            shape = tuple(given.shape) if isinstance(given, torch.Tensor) else given
            raise ValueError(f"scores[{name!r}] must be a tensor of shape ({module.out_features},), but is {shape}")
        return given.detach().to(module.weight.device, torch.float64)
    if scores == "first_order":
        if module.weight.grad is None:
            raise ValueError(f"scores={scores!r} needs gradients, but {name!r} has none: call backward() first")
        found = (module.weight.double() * module.weight.grad.double()).sum(1)
        if module.bias is not None and module.bias.grad is not None:
            found += module.bias.double() * module.bias.grad.double()
        return found.abs()
    size = module.weight.double().norm(dim=1)
    for norm in link.between:
        if isinstance(norm, torch.nn.BatchNorm1d):
            size = torch.ones_like(size) if norm.weight is None else norm.weight.double().abs()
    return size * link.following.module.weight.double().norm(dim=0)


# ---- the smaller model ---------------------------------------------------------------------------------------------


def _smaller(plan: RewritePlan, links: Sequence[_Link], kept: Mapping[int, torch.Tensor]) -> torch.nn.Module:
    rows: dict[int, torch.Tensor] = {}
    columns: dict[int, torch.Tensor] = {}
    between: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for link in links:
        assert link.following is not None
        rows[id(link.layer.module)] = columns[id(link.following.module)] = kept[id(link)]
        between[id(link)] = [m for m in link.between if type(m) in _PER_NEURON and _channels(m) > 1]
    memo = plan.copy_memo()
    new = copy.deepcopy(plan.model, memo)
    for key in dict.fromkeys([*rows, *columns]):
        _shrink_linear(memo[key], rows.get(key), columns.get(key))
    for link in links:
        for module in between[id(link)]:
            _shrink_channels(memo[id(module)], kept[id(link)])
    for module in new.modules():
        # A model that writes its widths down, as DLRM does in its config, corrects them.
        correct = getattr(module, "neurons_pruned", None)
        if callable(correct):
            correct()
    return new


def _shrink_linear(linear: Any, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    if rows is not None:
        _select(linear, "weight", rows, 0)
        _select(linear, "bias", rows, 0)
        linear.out_features = len(rows)
    if columns is not None:
        _select(linear, "weight", columns, 1)
        linear.in_features = len(columns)


def _shrink_channels(module: Any, kept: torch.Tensor) -> None:
    for name in _VALUES[type(module)] - {"num_batches_tracked"}:
        _select(module, name, kept, 0)
    if isinstance(module, torch.nn.BatchNorm1d):
        module.num_features = len(kept)
    else:
        module.num_parameters = len(kept)


def _select(module: torch.nn.Module, name: str, kept: torch.Tensor, dim: int) -> None:
    """Keeps some entries of a parameter or buffer."""
    old = getattr(module, name)
    if old is None:
        return
    values = old.detach().index_select(dim, kept.to(old.device))
    if isinstance(old, torch.nn.Parameter):
        setattr(module, name, torch.nn.Parameter(values, requires_grad=old.requires_grad))
    else:
        setattr(module, name, values)


def _try(new: torch.nn.Module, call: ModelCall, expected: Any) -> None:
    try:
        outputs = call.run(copy.deepcopy(new))
    except Exception as error:
        raise RuntimeError(
            "the smaller model fails on sample_inputs, the given one does not; choose others with layers "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    shapes = [[tuple(leaf.shape) for leaf in _tensors(tree)] for tree in (expected, outputs)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"outputs of the smaller model have the shapes {shapes[1]} instead of {shapes[0]}")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _report(
    model: torch.nn.Module, new: torch.nn.Module, links: Sequence[_Link], kept: Mapping[int, torch.Tensor]
) -> NeuronReport:
    lines = []
    for link in links:
        name, before = link.layer.names[0], link.layer.module.out_features
        if link.following is None:
            lines.append(PrunedNeurons(name, before, before, reason=link.reason))
        else:
            lines.append(PrunedNeurons(name, before, len(kept[id(link)]), link.following.names[0]))
    sizes = [sum(p.numel() for p in m.parameters() if not torch.nn.parameter.is_lazy(p)) for m in (model, new)]
    return NeuronReport(tuple(lines), *sizes)
