"""The contract of the embedding-bag operators: schemas, shapes, gradients.

Offsets may be None in every single-table operator: ``indices`` is then a matrix and each of its rows is a bag.
``mode`` is 0 (sum), 1 (mean) or 2 (max); ``padding_idx`` is -1 for none. The backward operators (and embedding_bag_max
without ``zero_start``) take offsets that start anywhere: a collection hands them one feature's part of its offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ...backends import selection as _backends
from . import reference
from .reference import MAX, MEAN, SUM

_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset"
)


def _num_bags(indices: torch.Tensor, offsets: torch.Tensor | None, include_last_offset: bool) -> int:
    if offsets is None:
        return indices.shape[0]
    return offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]


# Shape functions: they name only the arguments that decide the result. The schemas below name all of them.


def _fake_embedding_bag(
    weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    return weight.new_empty(_num_bags(indices, offsets, rest[-1]), weight.shape[1])


def _fake_embedding_bag_max(
    weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    _, include_last_offset, _ = rest
    shape = (_num_bags(indices, offsets, include_last_offset), weight.shape[1])
    return weight.new_empty(shape), weight.new_empty(shape, dtype=torch.int64)


def _fake_embedding_bag_backward(grad: torch.Tensor, *bags_and_rows: Any) -> torch.Tensor:
    return grad.new_empty(bags_and_rows[-1], grad.shape[1])


def _fake_weights_backward(grad: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty(indices.shape)


def _fake_quantized_embedding_bag(*args: Any) -> torch.Tensor:
    weight, _, _, embedding_dim, _, indices, offsets, *_, include_last_offset, dtype = args
    return weight.new_empty(_num_bags(indices, offsets, include_last_offset), embedding_dim, dtype=dtype)


def _fake_collection(*args: Any) -> torch.Tensor:
    _, _, plan, indices, offsets, _, total_dim, dtype = args
    return indices.new_empty((offsets.shape[0] - 1) // plan.shape[0], total_dim, dtype=dtype)


def _fake_quantize_rowwise(*args: Any) -> None:
    return None


_backends.define(f"embedding_bag(Tensor weight, {_BAGS}) -> Tensor", reference.embedding_bag, _fake_embedding_bag)
_backends.define(
    "embedding_bag_max(Tensor weight, Tensor indices, Tensor? offsets, int padding_idx, bool include_last_offset,"
    " bool zero_start) -> (Tensor, Tensor)",
    reference.embedding_bag_max,
    _fake_embedding_bag_max,
)
_backends.define(
    f"embedding_bag_backward(Tensor grad, {_BAGS}, SymInt num_embeddings) -> Tensor",
    reference.embedding_bag_backward,
    _fake_embedding_bag_backward,
)
_backends.define(
    "embedding_bag_weights_backward(Tensor grad, Tensor weight, Tensor indices, Tensor? offsets, int mode,"
    " int padding_idx, bool include_last_offset) -> Tensor",
    reference.embedding_bag_weights_backward,
    _fake_weights_backward,
)
_backends.define(
    f"quantized_embedding_bag(Tensor weight, Tensor scale_bias, int exponent, int embedding_dim, int bits, {_BAGS},"
    " ScalarType dtype) -> Tensor",
    reference.quantized_embedding_bag,
    _fake_quantized_embedding_bag,
)
_backends.define(
    "embedding_bag_collection(Tensor[] weights, Tensor[] scale_bias, Tensor plan, Tensor indices, Tensor offsets,"
    " Tensor? per_sample_weights, int total_dim, ScalarType dtype) -> Tensor",
    reference.embedding_bag_collection,
    _fake_collection,
)
_backends.define(
    "quantize_rowwise(Tensor weight, int bits, int exponent, Tensor(a!) rows, Tensor(b!) scale_bias) -> ()",
    reference.quantize_rowwise,
    _fake_quantize_rowwise,
)
_backends.register_triton(
    f"{__package__}.triton",
    (
        "embedding_bag",
        "embedding_bag_max",
        "embedding_bag_backward",
        "embedding_bag_weights_backward",
        "quantized_embedding_bag",
        "embedding_bag_collection",
    ),
)


class BagSpec(NamedTuple):
    """The parts of a call that are not tensors."""

    mode: int
    padding_idx: int
    include_last_offset: bool


# ---- one table ---------------------------------------------------------------------------------------------------


class _EmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None,
        per_sample_weights: torch.Tensor | None,
        spec: BagSpec,
        sparse: bool,
    ) -> torch.Tensor:
        ctx.spec, ctx.sparse, ctx.num_embeddings = spec, sparse, weight.shape[0]
        argmax = None
        if spec.mode == MAX:
            run = _backends.implementation("embedding_bag_max", weight)
            out, argmax = run(weight, indices, offsets, *spec[1:], True)
        else:
            run = _backends.implementation("embedding_bag", weight)
            out = run(weight, indices, offsets, per_sample_weights, *spec)
        keep_weight = per_sample_weights is not None and per_sample_weights.requires_grad
        ctx.save_for_backward(weight if keep_weight else None, indices, offsets, per_sample_weights, argmax)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, indices, offsets, per_sample_weights, argmax = ctx.saved_tensors
        grad_weight = grad_samples = None
        if ctx.needs_input_grad[0]:
            if argmax is not None:
                grad_weight = _max_backward(grad, argmax, ctx.num_embeddings)
            elif ctx.sparse:
                grad_weight = _sparse_backward(grad, indices, offsets, per_sample_weights, ctx.spec, ctx.num_embeddings)
            else:
                run = _backends.implementation("embedding_bag_backward", grad)
                grad_weight = run(grad, indices, offsets, per_sample_weights, *ctx.spec, ctx.num_embeddings)
        if per_sample_weights is not None and ctx.needs_input_grad[3]:
            run = _backends.implementation("embedding_bag_weights_backward", grad)
            grad_samples = run(grad, weight, indices, offsets, *ctx.spec).reshape(per_sample_weights.shape)
        return grad_weight, None, None, grad_samples, None, None


# Fewer than 2^32 rows, and fewer indices by 64, is what the CUDA C++ operators count.
_MOST_ROWS = (1 << 32) - 64


def _max_backward(grad: torch.Tensor, argmax: torch.Tensor, num_embeddings: int) -> torch.Tensor:
    """Each column's gradient goes to the row its value came from; sums in float32 for 16-bit types.

    A GPU's scatter_add_ adds in no certain order. There every element of the table is a row of one column instead, for
    the operator whose order is certain; what came from no row goes to one more, which is dropped. Columns that are
    together too many rows come one part after the other.
    """
    dtype = grad.dtype if grad.dtype == torch.float64 else torch.float32
    dim = grad.shape[1]
    if num_embeddings * dim == 0:
        return grad.new_zeros(num_embeddings, dim)
    if grad.is_cuda or torch.are_deterministic_algorithms_enabled():
        most = max(1, (_MOST_ROWS - 2) // max(num_embeddings, grad.shape[0]))
        if most >= dim:
            return _max_backward_by_element(grad, argmax, num_embeddings, dtype)
        out = grad.new_empty(num_embeddings, dim)
        for first in range(0, dim, most):
            part = slice(first, first + most)
            out[:, part] = _max_backward_by_element(grad[:, part], argmax[:, part], num_embeddings, dtype)
        return out
    values = torch.where(argmax >= 0, grad.to(dtype), 0.0)
    out = torch.zeros(num_embeddings, dim, dtype=dtype, device=grad.device)
    return out.scatter_add_(0, argmax.clamp(min=0), values).to(grad.dtype)


def _max_backward_by_element(
    grad: torch.Tensor, argmax: torch.Tensor, num_embeddings: int, dtype: torch.dtype
) -> torch.Tensor:
    dim = grad.shape[1]
    size = num_embeddings * dim
    run = _backends.implementation("embedding_bag_backward", grad)
    element = torch.where(argmax >= 0, argmax * dim + torch.arange(dim, device=grad.device), size)
    out = run(grad.to(dtype).reshape(-1, 1), element.reshape(-1, 1), None, None, SUM, size, False, size + 1)[:-1]
    return out.reshape(num_embeddings, dim).to(grad.dtype)


def _sparse_backward(
    grad: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    spec: BagSpec,
    num_embeddings: int,
) -> torch.Tensor:
    """The gradient as a sparse tensor with one (not coalesced) row for each index, as torch gives it.

    On the CPU the indices passed the forward's checks, so this only gathers: the bag's gradient for each of its
    indices. On a GPU wrong ones may not have been told of yet, or be let pass.
    """
    rows = indices.reshape(-1)
    if offsets is None:
        lengths = torch.full((indices.shape[0],), indices.shape[1], device=indices.device)
    else:
        end = offsets[-1:] if spec.include_last_offset else offsets.new_full((1,), rows.shape[0])
        lengths = torch.diff(offsets, append=None if spec.include_last_offset else end)
        rows = rows[: int(end)] if spec.include_last_offset else rows
    bag = torch.repeat_interleave(lengths)
    keep = None
    if rows.is_cuda and _backends.bounds_mode() == "clamp":
        rows = rows.clamp(0, num_embeddings - 1)
    elif rows.is_cuda:
        keep = (rows >= 0) & (rows < num_embeddings)
    if spec.padding_idx >= 0:
        real = rows != spec.padding_idx
        keep = real if keep is None else keep & real
    if keep is not None:
        lengths = torch.zeros_like(lengths).index_add_(0, bag, keep.to(lengths.dtype))
        rows, bag = rows[keep], bag[keep]
    if spec.mode == MEAN:
        grad = grad / lengths.clamp(min=1).unsqueeze(1)
    values = grad.index_select(0, bag)
    if per_sample_weights is not None:
        factors = per_sample_weights.reshape(-1)[: indices.numel() if keep is None else keep.shape[0]]
        factors = factors[: rows.shape[0]] if keep is None else factors[keep]
        values *= factors.unsqueeze(1)
    shape = (num_embeddings, grad.shape[1])
    return torch.sparse_coo_tensor(rows.long().unsqueeze(0), values, shape, check_invariants=False)


def embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    spec: BagSpec,
    sparse: bool = False,
) -> torch.Tensor:
    """Differentiable lookup over one float table; arguments are checked by the caller."""
    if torch.is_grad_enabled() and (
        weight.requires_grad or (per_sample_weights is not None and per_sample_weights.requires_grad)
    ):
        return _EmbeddingBag.apply(weight, indices, offsets, per_sample_weights, spec, sparse)
    run = _backends.implementation("embedding_bag", weight)
    mode, padding_idx, include_last_offset = spec
    return run(weight, indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)


# ---- one quantized table ------------------------------------------------------------------------------------------


class QuantizedTable(NamedTuple):
    """A quantized table as the operators take it: rows, fp16 (scale, bias) a row, and the table's exponent."""

    weight: torch.Tensor
    scale_bias: torch.Tensor
    exponent: int
    embedding_dim: int
    bits: int


class _QuantizedEmbeddingBag(torch.autograd.Function):
    """Only per_sample_weights have a gradient: the rows are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        table: QuantizedTable,
        indices: torch.Tensor,
        offsets: torch.Tensor | None,
        per_sample_weights: torch.Tensor,
        spec: BagSpec,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.table, ctx.spec = table, spec
        ctx.save_for_backward(indices, offsets)
        run = _backends.implementation("quantized_embedding_bag", indices)
        return run(*table, indices, offsets, per_sample_weights, *spec, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, offsets = ctx.saved_tensors
        grad_samples = _quantized_weights_backward(grad, ctx.table, indices, offsets, ctx.spec)
        return None, None, None, grad_samples, None, None


def _quantized_weights_backward(
    grad: torch.Tensor, table: QuantizedTable, indices: torch.Tensor, offsets: torch.Tensor | None, spec: BagSpec
) -> torch.Tensor:
    """Gradient of per_sample_weights over quantized rows: the rows in use become a small float table of their own."""
    run = _backends.implementation("quantized_embedding_bag", indices)
    rows = run(*table, indices.reshape(-1, 1), None, None, 0, -1, False, torch.float32)
    position = torch.arange(indices.numel(), device=indices.device).reshape(indices.shape)
    run = _backends.implementation("embedding_bag_weights_backward", indices)
    out = run(grad.float(), rows, position, offsets, 0, -1, spec.include_last_offset).reshape(-1)
    padding_idx, num_rows = spec.padding_idx, table.weight.shape[0]
    if indices.is_cuda and _backends.bounds_mode() != "raise":
        indices, padding_idx, num_rows = _as_counted(indices, padding_idx, num_rows)
    bags = reference.split_bags(indices, offsets, padding_idx, spec.include_last_offset, num_rows)
    values = out[bags.position]
    if spec.mode == MEAN:
        values = values / bags.counts.clamp(min=1)[bags.bag]
    result = torch.zeros_like(out)
    result[bags.position] = values
    return result.to(grad.dtype).reshape(indices.shape)


def _as_counted(indices: torch.Tensor, padding_idx: int, num_rows: int) -> tuple[torch.Tensor, int, int]:
    """Indices that are right and count as wrong ones do on a GPU; their padding index, and how many rows they need."""
    if _backends.bounds_mode() == "clamp":
        return indices.clamp(0, num_rows - 1), padding_idx, num_rows
    absent = (indices < 0) | (indices >= num_rows)
    if padding_idx >= 0:
        absent |= indices == padding_idx
    return torch.where(absent, num_rows, indices), num_rows, num_rows + 1


def quantized_embedding_bag(
    table: QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    spec: BagSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Lookup over one quantized table, differentiable in per_sample_weights."""
    if per_sample_weights is not None and per_sample_weights.requires_grad and torch.is_grad_enabled():
        return _QuantizedEmbeddingBag.apply(table, indices, offsets, per_sample_weights, spec, dtype)
    run = _backends.implementation("quantized_embedding_bag", indices)
    # Unpacked by hand: a request spends as long on Python as on its rows.
    weight, scale_bias, exponent, dim, bits = table
    mode, padding_idx, last = spec
    number = _backends.dtype_argument(dtype)
    return run(
        weight, scale_bias, exponent, dim, bits, indices, offsets, per_sample_weights, mode, padding_idx, last, number
    )


# ---- many tables --------------------------------------------------------------------------------------------------


class FeaturePlan(NamedTuple):
    """One row of a collection's plan: which table a feature reads, and where its columns go."""

    table: int
    dim: int
    column: int
    mode: int
    bits: int
    exponent: int


class _Collection(torch.autograd.Function):
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
        run = _backends.implementation("embedding_bag_collection", indices)
        return run(list(weights), scale_bias, plan, indices, offsets, per_sample_weights, total_dim, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, offsets, per_sample_weights, *weights = ctx.saved_tensors
        batch = grad.shape[0]
        grads: list[torch.Tensor | None] = [None] * len(weights)
        starts = _feature_starts(offsets, batch, len(ctx.features))
        for f, (table, dim, column, mode, *_) in enumerate(ctx.features):
            if not ctx.needs_input_grad[8 + table]:
                continue
            num_rows, dtype = ctx.tables[table]
            part = grad[:, column : column + dim].to(dtype)
            bounds = offsets[f * batch : (f + 1) * batch + 1]
            own, samples = indices, per_sample_weights
            if starts is not None:  # every feature would read all indices, were they not cut
                bounds, cut = bounds - starts[f], slice(starts[f], starts[f + 1])
                own, samples = own[cut], None if samples is None else samples[cut]
            if mode == MAX:
                run = _backends.implementation("embedding_bag_max", grad)
                _, argmax = run(weights[table], own, bounds, -1, True, False)
                one = _max_backward(part, argmax, num_rows)
            else:
                run = _backends.implementation("embedding_bag_backward", grad)
                one = run(part, own, bounds, samples, mode, -1, True, num_rows)
            so_far = grads[table]
            grads[table] = one if so_far is None else so_far.add_(one)
        grad_samples = None
        if per_sample_weights is not None and ctx.needs_input_grad[7]:
            grad_samples = _collection_weights_backward(
                grad, ctx.features, ctx.scale_bias, indices, offsets, per_sample_weights, weights
            )
        return None, None, None, None, None, None, None, grad_samples, *grads


def _feature_starts(offsets: torch.Tensor, batch: int, num_features: int) -> list[int] | None:
    """Where each feature's indices begin, and the last one's end.

    None while a graph is traced, which has no values, or captured, which nobody can wait for.
    """
    if torch.compiler.is_compiling() or isinstance(offsets, torch._subclasses.FakeTensor):
        return None
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return offsets[::batch].tolist() if batch else [0] * (num_features + 1)


def _collection_weights_backward(
    grad: torch.Tensor,
    features: Sequence[FeaturePlan],
    scale_bias: list[torch.Tensor],
    indices: torch.Tensor,
    offsets: torch.Tensor,
    per_sample_weights: torch.Tensor,
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    out = torch.zeros_like(per_sample_weights)
    batch = grad.shape[0]
    starts = _feature_starts(offsets, batch, len(features))
    if starts is None:
        raise NotImplementedError("gradients of a collection's per_sample_weights can't be compiled or captured yet")
    for f, (table, dim, column, mode, bits, exponent) in enumerate(features):
        if mode == MAX:  # takes no weights
            continue
        part = grad[:, column : column + dim]
        bounds = offsets[f * batch : (f + 1) * batch + 1] - starts[f]
        own = indices[starts[f] : starts[f + 1]]
        spec = BagSpec(mode, -1, True)
        if bits:
            quantized = QuantizedTable(weights[table], scale_bias[table], exponent, dim, bits)
            one = _quantized_weights_backward(part, quantized, own, bounds, spec)
        else:
            weight = weights[table]
            if weight.dtype != part.dtype:  # the weights' gradient must not be rounded to a 16-bit table's type
                weight, own = weight[own.long()].to(part.dtype), torch.arange(own.numel(), device=own.device)
            run = _backends.implementation("embedding_bag_weights_backward", grad)
            one = run(part, weight, own, bounds, *spec)
        out[starts[f] : starts[f + 1]] = one.to(out.dtype)
    return out


def embedding_bag_collection(
    weights: list[torch.Tensor],
    scale_bias: list[torch.Tensor],
    plan: torch.Tensor,
    features: Sequence[FeaturePlan],
    indices: torch.Tensor,
    offsets: torch.Tensor,
    per_sample_weights: torch.Tensor | None,
    total_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Differentiable lookup over many tables.

    ``plan`` is ``features`` as an int64 tensor on the tables' device; ``scale_bias`` has an entry for each table (any
    tensor for a float one), or none at all when every table is float.
    """
    if torch.is_grad_enabled() and (
        any(w.requires_grad for w in weights) or (per_sample_weights is not None and per_sample_weights.requires_grad)
    ):
        return _Collection.apply(
            plan, features, total_dim, dtype, scale_bias, indices, offsets, per_sample_weights, *weights
        )
    run = _backends.implementation("embedding_bag_collection", indices)
    return run(
        weights, scale_bias, plan, indices, offsets, per_sample_weights, total_dim, _backends.dtype_argument(dtype)
    )
