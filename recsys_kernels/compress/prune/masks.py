"""Pruning of linear layers: which weights are dropped, and masks that hold them at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from ...ops.linear.sparse.patterns import (
    Pattern,
    check_sparsity,
    expand_units,
    keep_mask,
    lowest,
    parse_pattern,
    unit_scores,
)
from .layers import Choice, PrunedLayer, PruneReport, Target, find_layers, mask_of, unmasked

SCOPES = ("layer", "global")
SCORES = ("magnitude", "movement", "first_order")


def prune(
    model: torch.nn.Module,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    scope: str = "layer",
    scores: str | Mapping[str, torch.Tensor] = "magnitude",
    layers: Choice | Iterable[Choice] | None = None,
    amounts: Mapping[str, float] | None = None,
) -> PruneReport:
    """Drops weights of a model's linear layers, in place: masks hold them at zero, also while it trains on.

    Each layer gets a :class:`~recsys_kernels.compress.prune.layers.PruningMask` on its weight
    (:mod:`torch.nn.utils.parametrize`): the parameter stays the same object, so optimizers made before go on working,
    and its name in the ``state_dict`` becomes ``parametrizations.weight.original``. Called again, new masks replace
    those there are; dropped weights may come back with the values that are still behind the mask. To drop the masks,
    see :func:`remove_masks`; to prune step by step while training, :class:`~recsys_kernels.Pruner`.

    Example:
        >>> print(rk.prune(model, 0.9, layers="top"))                              # doctest: +SKIP
        >>> rk.remove_masks(model)                                                 # doctest: +SKIP

    Args:
        model: any model with ``torch.nn.Linear`` layers (also subclasses). Tables and convolutions stay as they are.
        sparsity: share of the weights to drop, 0 <= sparsity < 1. With an n:m pattern None, or 1 - n/m. None with
            ``amounts``: only the layers that these name.
        pattern: ``"unstructured"``, ``"block4x1"`` (4 output rows of one column; rows and columns of 1, 4 or 16),
            ``"2:4"`` (2 of 4 neighbours in a row are kept; any n:m up to 32). A block's score is the mean of its
            members'.
        scope: ``"layer"``: the same share of every layer. ``"global"``: the lowest scores of all layers, which takes
            most from layers whose scores are small: look at the report. Not with n:m. Either way one block or weight of
            each layer is kept.
        scores: the importance of a weight w. ``"magnitude"``: |w| (Han et al., "Learning both Weights and
            Connections for Efficient Neural Networks", 2015). ``"movement"``: -w * gradient (Sanh et al., "Movement
            Pruning: Adaptive Sparsity by Fine-Tuning", 2020). ``"first_order"``: |w * gradient| (Molchanov et al.,
            "Importance Estimation for Neural Network Pruning", 2019). Gradients are those in ``.grad``, which
            ``backward`` has summed up over some batches. Or a tensor [out_features, in_features] by the name of each
            layer: more is better.
        layers: which layers: names (``"encoder.items"``), glob patterns (``"top.*"``), module classes, functions of a
            name and a linear layer that return bool; one or several. Layers inside a named module are chosen, too.
            Default: all.
        amounts: sparsity by the name of a layer, instead of ``sparsity``; 0 leaves it dense.

    Returns:
        Shape and sparsity of each layer, before and after, and the reason why a chosen layer was left alone.

    Raises:
        ValueError: no such pattern, sparsity, scope or scores; a name that no linear layer has; nothing to prune; NaN
            or infinity in weights or scores; no gradient where one is needed. The model is as it was then.
        TypeError: an argument of another type.
    """
    parsed = parse_pattern(pattern)
    check_scope(scope, parsed)
    targets = find_layers(model, layers)
    shares = shares_of(targets, sparsity, parsed, amounts)
    values = {target.name: scores_of(target, scores) for target in targets if target.name in shares}
    masks = choose_masks(values, shares, parsed, scope, set(amounts or ()))
    return apply_masks(targets, masks, parsed)


def remove_masks(model: torch.nn.Module, *, keep_zeros: bool = True) -> tuple[str, ...]:
    """Takes the masks off, so that a pruned model is a plain one again, with the parameters that it had.

    The zeros are not held any more: a further step of an optimizer moves them.

    Args:
        model: a model that was pruned. Pass a DistributedDataParallel itself, not the model inside it: it has
            to be told that there are no masks (buffers) to send any more, or to be made anew.
        keep_zeros: whether dropped weights become zeros for good; else they get back what is behind the mask.

    Returns:
        The names of the layers that had a mask.
    """
    found = {name: module for name, module in model.named_modules() if mask_of(module) is not None}
    for module in found.values():
        mask = mask_of(module)
        assert mask is not None
        if keep_zeros:
            # The write is in place, since an optimizer or another process may share the parameter's memory.
            with torch.no_grad():
                unmasked(module).masked_fill_(~mask.mask, 0.0)
        # Copies share the class that a parametrization made; torch would take the weight away from the copies as well.
        shared = type(module)
        members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and next(module.module.buffers(), None) is None:
            # Without this, DistributedDataParallel looks for the buffers and fails because they are gone.
            module.modules_buffers = []
    return tuple(found)


# ---- which weights -------------------------------------------------------------------------------------------------


def check_scope(scope: str, pattern: Pattern) -> None:
    """Raises ValueError if the scope does not exist or does not go with the pattern."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be {' or '.join(map(repr, SCOPES))}, but is {scope!r}")
    if scope == "global" and pattern.of:
        raise ValueError(f"scope must be 'layer' with the pattern {pattern.name!r}, which fixes every group's share")


def shares_of(
    targets: Sequence[Target], sparsity: float | None, pattern: Pattern, amounts: Mapping[str, float] | None
) -> dict[str, float]:
    """The sparsity of each layer that is to be pruned, by its name."""
    prunable = {target.name: target for target in targets if target.reason is None}
    for name, amount in (amounts or {}).items():
        kept = next((target for target in targets if target.name == name and target.reason), None)
        if kept is not None:
            raise ValueError(f"amounts: {name!r} can't be pruned: {kept.reason}")
        if name not in prunable:
            raise ValueError(
                f"amounts: {name!r} names no linear layer that was chosen; there are {', '.join(prunable)}"
            )
        if amount != 0:
            check_sparsity(amount, pattern, f"amounts[{name!r}]")
    if amounts is not None and sparsity is None:
        if not amounts:
            raise ValueError("amounts is empty, and sparsity is None: there is nothing to prune")
        return {name: float(amounts[name]) for name in prunable if name in amounts}
    share = check_sparsity(sparsity, pattern)
    return {name: float((amounts or {}).get(name, share)) for name in prunable}


@torch.no_grad()
def scores_of(target: Target, scores: str | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scores of a layer's weights, float32 or float64 [out_features, in_features]."""
    weight = target.parameter.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    check_finite(weight, f"the weight of {target.name!r}")
    if isinstance(scores, Mapping):
        found = _given(target, scores).to(weight)
    elif scores == "magnitude":
        found = weight.abs()
    elif scores in SCORES:
        gradient = target.parameter.grad
        if gradient is None:
            raise ValueError(f"scores={scores!r} needs gradients, but {target.name!r} has none: call backward() first")
        found = gradient_scores(scores, weight, gradient)
    else:
        known = ", ".join(map(repr, SCORES))
        raise ValueError(f"scores must be {known} or tensors by the names of layers, but is {scores!r}")
    check_finite(found, f"the score of {target.name!r}")
    return found


def gradient_scores(kind: str, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The score that one step adds to the weights."""
    product = weight * gradient.to(weight.dtype)
    return -product if kind == "movement" else product.abs()


def _given(target: Target, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if target.name not in scores:
        raise ValueError(f"scores has no entry for the layer {target.name!r}")
    given = scores[target.name]
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"scores[{target.name!r}] must be a tensor, but is {type(given).__name__}")
    if given.shape != target.parameter.shape:
        wanted = tuple(target.parameter.shape)
        raise ValueError(f"scores[{target.name!r}] must have the shape {wanted}, but has {tuple(given.shape)}")
    return given.detach()


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raises ValueError with the first place that holds NaN or infinity."""
    if not torch.isfinite(values).all():
        row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(f"{what} is {values[row, column].item()} at [{row}, {column}], but must be finite")


def choose_masks(
    scores: Mapping[str, torch.Tensor],
    shares: Mapping[str, float],
    pattern: Pattern,
    scope: str,
    own: set[str] | frozenset[str] = frozenset(),
) -> dict[str, torch.Tensor]:
    """The mask of each layer.

    Args:
        scores: of the weights, by the name of a layer.
        shares: the share to drop, by the name.
        pattern: the pattern.
        scope: ``"layer"`` or ``"global"``.
        own: names of layers that are pruned by themselves, whatever the scope is.
    """
    if pattern.of:
        return {
            name: keep_mask(values, None, pattern) if shares[name] else torch.ones_like(values, dtype=torch.bool)
            for name, values in scores.items()
        }
    together = [name for name in scores if scope == "global" and name not in own]
    groups = [[name] for name in scores if name not in together] + ([together] if together else [])
    masks: dict[str, torch.Tensor] = {}
    for group in groups:
        masks.update(_masks_of_group({name: scores[name] for name in group}, shares[group[0]], pattern))
    return {name: masks[name] for name in scores}


def _masks_of_group(scores: Mapping[str, torch.Tensor], share: float, pattern: Pattern) -> dict[str, torch.Tensor]:
    """Drops a share of the units of all layers together, but never all units of one layer."""
    units = {name: unit_scores(values, pattern) for name, values in scores.items()}
    flat = [values.flatten() for values in units.values()]
    # The unit that is kept is exactly the one that would be dropped last; among equal scores it is the last unit.
    flat = [_with_infinity(values, len(values) - 1 - int(values.flip(0).argmax())) for values in flat]
    dtype = max((values.dtype for values in flat), key=lambda dtype: dtype.itemsize)
    pooled = torch.cat([values.to(flat[0].device, dtype) for values in flat])
    dropped = lowest(pooled, min(round(share * len(pooled)), len(pooled) - len(flat)))
    parts = dropped.split([len(values) for values in flat])
    return {
        name: expand_units(~part.reshape(values.shape).to(values.device), scores[name].shape, pattern)
        for part, (name, values) in zip(parts, units.items(), strict=True)
    }


def _with_infinity(values: torch.Tensor, at: int) -> torch.Tensor:
    values = values.clone()
    values[at] = float("inf")
    return values


def apply_masks(targets: Sequence[Target], masks: Mapping[str, torch.Tensor], pattern: Pattern) -> PruneReport:
    """Gives layers their masks and returns the report of all chosen layers."""
    lines = []
    for target in targets:
        before = target.zeros
        if target.name in masks:
            target.put_mask(masks[target.name])
        reason = target.reason or ("" if target.name in masks else "not in amounts")
        lines.append(PrunedLayer(target.name, shape_of(target), before, target.zeros, reason))
    return PruneReport(tuple(lines), pattern.name)


def shape_of(target: Target) -> tuple[int, int]:
    """The shape of a layer's weight."""
    return target.module.out_features, target.module.in_features
