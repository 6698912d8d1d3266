"""The derivatives of ``embedding_bag_collection``: those of the single tables, feature by feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ...backends import selection
from .autograd import (
    embedding_bag,
    max_backward,
    quantized_embedding_bag,
    quantized_weights_backward,
    run_operator,
    table_gradient,
    transforms_active,
    weights_gradient,
)
from .faults import index_out_of_range
from .reference import MAX
from .spec import BagOperands, BagSpec, CollectionBags, FeaturePlan, QuantizedTable, TableLists, UnweightedBags


class _Collection(torch.autograd.Function):
    """``embedding_bag_collection``. The float tables come last, as any number of arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: torch.Tensor,
        features: Sequence[FeaturePlan],
        total_dim: int,
        dtype: torch.dtype,
        scale_bias: list[torch.Tensor],
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.features, ctx.scale_bias = features, scale_bias
        ctx.tables = [(w.shape[0], w.dtype) for w in weights]
        # Only what the backward reads: a table that it does not read may change before, as in torch.
        all_read = per_sample_weights is not None and per_sample_weights.requires_grad
        read = {f.table for f in features if all_read or f.mode == MAX}
        kept = [w if number in read else None for number, w in enumerate(weights)]
        ctx.save_for_backward(indices, offsets, per_sample_weights, *kept)
        bags = indices, offsets, per_sample_weights
        return run_operator(
            "embedding_bag_collection", indices, list(weights), scale_bias, plan, *bags, total_dim, dtype
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, offsets, per_sample_weights, *weights = ctx.saved_tensors
        bags = CollectionBags(indices, offsets, per_sample_weights)
        grads: list[torch.Tensor | None] = [None] * len(weights)
        starts = _feature_starts(offsets, grad.shape[0], len(ctx.features))
        for f, (table, dim, column, mode, *_) in enumerate(ctx.features):
            if not ctx.needs_input_grad[8 + table]:
                continue
            num_rows, dtype = ctx.tables[table]
            part = grad[:, column : column + dim].to(dtype)
            # Every feature would read all indices, were they not cut.
            own = _uncut(bags, f, grad.shape[0], mode) if starts is None else _cut(bags, f, grad.shape[0], starts, mode)
            if mode == MAX:
                found = own.indices, own.offsets, -1, True, False
                _, argmax = run_operator("embedding_bag_max", grad, weights[table].detach(), *found)
                one = max_backward(part, argmax, num_rows)
            else:
                one = table_gradient(part, own, num_rows)
            so_far = grads[table]
            grads[table] = one if so_far is None else so_far.add_(one)
        grad_samples = None
        if per_sample_weights is not None and ctx.needs_input_grad[7]:
            rows = weights, ctx.scale_bias
            grad_samples = _weights_backward(grad, ctx.features, rows, bags)
        return None, None, None, None, None, None, None, grad_samples, *grads


def _feature_starts(offsets: torch.Tensor, batch: int, num_features: int) -> list[int] | None:
    """Where the indices of each feature begin, and where those of the last one end.

    None while a graph is traced, as a graph has no values, and while one is captured, as nobody can wait for values.
    """
    if torch.compiler.is_compiling() or isinstance(offsets, torch._subclasses.FakeTensor):
        return None
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return offsets[::batch].tolist() if batch else [0] * (num_features + 1)


def _uncut(bags: CollectionBags, feature: int, batch: int, mode: int) -> BagOperands:
    """One feature's bags over the indices of all features; their offsets start anywhere."""
    bounds = bags.offsets[feature * batch : (feature + 1) * batch + 1]
    return BagOperands(bags.indices, bounds, bags.per_sample_weights, BagSpec(mode, -1, True))


def _cut(bags: CollectionBags, feature: int, batch: int, starts: list[int], mode: int) -> BagOperands:
    """One feature's bags over its own indices."""
    begin, end = starts[feature], starts[feature + 1]
    bounds = bags.offsets[feature * batch : (feature + 1) * batch + 1] - begin
    samples = None if bags.per_sample_weights is None else bags.per_sample_weights[begin:end]
    return BagOperands(bags.indices[begin:end], bounds, samples, BagSpec(mode, -1, True))


def _weights_backward(
    grad: torch.Tensor,
    features: Sequence[FeaturePlan],
    tables: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    bags: CollectionBags,
) -> torch.Tensor:
    """The gradient of ``per_sample_weights``, of their shape. ``tables``: the rows, and the scales and biases."""
    assert bags.per_sample_weights is not None
    weights, scale_bias = tables
    out = torch.zeros_like(bags.per_sample_weights)
    starts = _feature_starts(bags.offsets, grad.shape[0], len(features))
    if starts is None:
        raise NotImplementedError("gradients of a collection's per_sample_weights can't be compiled or captured yet")
    for f, (table, dim, column, mode, bits, exponent) in enumerate(features):
        if mode == MAX:  # Max pooling takes no weights.
            continue
        part = grad[:, column : column + dim]
        own, bounds, _, spec = _cut(bags, f, grad.shape[0], starts, mode)
        if bits:
            rows = QuantizedTable(weights[table], scale_bias[table], exponent, dim, bits)
            one = quantized_weights_backward(part, rows, UnweightedBags(own, bounds, spec))
        else:
            weight = weights[table]
            if weight.dtype != part.dtype:  # The weights' gradient must not be rounded to a 16-bit table's type.
                weight, own = weight[own.long()].to(part.dtype), torch.arange(own.numel(), device=own.device)
            one = weights_gradient(part, weight, UnweightedBags(own, bounds, spec))
        out[starts[f] : starts[f + 1]] = one.to(out.dtype)
    return out


def _by_feature(
    tables: TableLists, features: Sequence[FeaturePlan], bags: CollectionBags, dtype: torch.dtype
) -> torch.Tensor:
    """A collection's lookup as one call a feature: forward-mode derivatives and functorch know such calls."""
    batch = (bags.offsets.shape[0] - 1) // len(features)
    starts = _feature_starts(bags.offsets, batch, len(features))
    if starts is None:
        raise NotImplementedError("a collection's tangents can't be compiled or captured")
    parts = []
    for f, (table, dim, _, mode, bits, exponent) in enumerate(features):
        own, bounds, samples, spec = _cut(bags, f, batch, starts, mode)
        samples = None if mode == MAX else samples
        if bits:
            rows = QuantizedTable(tables.weights[table], tables.scale_bias[table], exponent, dim, bits)
            parts.append(quantized_embedding_bag(rows, own, bounds, samples, spec, dtype))
        else:
            parts.append(embedding_bag(tables.weights[table], own, bounds, samples, spec).to(dtype))
    return torch.cat(parts, 1)


def embedding_bag_collection(
    tables: TableLists,
    features: Sequence[FeaturePlan],
    bags: CollectionBags,
    total_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Differentiable lookup over many tables; returns [B, total_dim].

    ``tables.plan`` is ``features`` as an int64 tensor on the tables' device. ``tables.scale_bias`` has an entry for
    each table (any tensor for a float one), or none at all when every table is float.

    Raises:
        IndexOutOfRangeError: an index that is not a row of its table (not in a compiled graph, see ``faults.py``).
        RuntimeError: offsets, types or a plan that do not fit.
    """
    weights, scale_bias, plan = tables
    indices, offsets, per_sample_weights = bags
    if forward_ad._current_level >= 0 or transforms_active():
        return _by_feature(tables, features, bags, dtype)
    if torch.is_grad_enabled() and (
        any(w.requires_grad for w in weights) or (per_sample_weights is not None and per_sample_weights.requires_grad)
    ):
        return _Collection.apply(plan, features, total_dim, dtype, scale_bias, *bags, *weights)
    run = selection.implementation("embedding_bag_collection", indices)
    number = selection.dtype_argument(dtype)
    try:
        return run(weights, scale_bias, plan, indices, offsets, per_sample_weights, total_dim, number)
    except IndexError as error:
        raise index_out_of_range(error) from None
