"""Equalization of consecutive linear layers: channels that stand out move into the weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ..converters.converter import LayerDecision
from ..rewrite.plan import RewritePlan, Skip
from .calibrate import plan_of, watch

# Larger exponents would move values towards the limits of float16.
_MOST = 8


def equalize(
    model: torch.nn.Module,
    batches: Iterable[Any],
    alpha: float = 0.5,
    *,
    skip: Skip | Iterable[Skip] = (),
    progress: bool | None = None,
) -> torch.nn.Module:
    """A float copy of a model that computes the same and quantizes better.

    Between two linear layers that follow each other in a ``nn.Sequential`` (with nothing but ReLU, Dropout and Identity
    in between), channel j is divided by a factor in the first layer and multiplied by it in the second one's weights:
    max|x_j|^alpha / max|w_j|^(1 - alpha), x_j being the channel's values on the batches and w_j its weights there
    (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023).
    Factors are rounded to powers of two, with which float arithmetic is exact: the outputs stay the same bit for bit
    (but for values so small that they have fewer digits).

    Example:
        >>> even = rk.equalize(model, batches)                                     # doctest: +SKIP
        >>> small, report = rk.optimize(even, linear="int8")                       # doctest: +SKIP

    Args:
        model: any float model; it is not changed.
        batches: arguments of one call each, as for :func:`~recsys_kernels.calibrate`.
        alpha: the share of the difficulty that goes into the weights, from 0 to 1.
        skip: layers to leave as they are, as for ``optimize``.
        progress: whether to show a progress bar; default: on a terminal.

    Returns:
        The copy, in the mode (train or eval) of the original.

    Raises:
        ValueError: ``alpha`` out of range; no two such layers (they must not share a weight with another one); no
            batches; an input with NaN or infinity.
        RuntimeError: layers that no batch reached.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be from 0 to 1, but is {alpha}")
    pairs = _pairs(plan_of(model, skip))
    if not pairs:
        raise ValueError(
            "the model has no two linear layers in a row (in a Sequential, with at most a ReLU in between)"
        )
    largest: dict[str, torch.Tensor] = {}

    def note(name: str, rows: torch.Tensor) -> None:
        new = rows.abs().amax(0)
        largest[name] = torch.maximum(largest[name], new) if name in largest else new

    layers = {second.names[0]: second.module for _, second in pairs}
    watch(model, layers, batches, {name: partial(note, name) for name in layers}, progress)
    memo: dict[int, Any] = {}
    new = copy.deepcopy(model, memo)
    for first, second in pairs:
        if second.names[0] not in largest:
            raise RuntimeError(f"no batch reached {second.names[0]!r}; name what is not used in skip")
        _move(memo[id(first.module)], memo[id(second.module)], largest[second.names[0]], alpha)
    return new


def _pairs(plan: RewritePlan) -> list[tuple[LayerDecision, LayerDecision]]:
    """Layers that follow each other, neither of which shares its weight with another."""
    owners = Counter(id(layer.module.weight) for layer in plan.replaced)
    return [
        (first, second)
        for sequence in plan.fused_sequences()
        for (first, epilogue), (second, _) in pairwise(sequence.steps)
        if epilogue in (None, "relu") and owners[id(first.module.weight)] == owners[id(second.module.weight)] == 1
    ]


@torch.no_grad()
def _move(first: Any, second: Any, largest: torch.Tensor, alpha: float) -> None:
    """Divides the outputs of the first layer and multiplies the weights of the second one by the same factors."""
    weights = second.weight.float().abs().amax(0)
    exponent = torch.round(alpha * largest.log2() - (1.0 - alpha) * weights.log2()).clamp(-_MOST, _MOST)
    used = (largest > 0) & (weights > 0)
    factor = torch.where(used, exponent, 0.0).exp2().to(first.weight.dtype)
    first.weight.div_(factor.unsqueeze(1))
    if first.bias is not None:
        first.bias.div_(factor)
    second.weight.mul_(factor)
