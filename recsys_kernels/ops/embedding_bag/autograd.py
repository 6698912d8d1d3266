"""The derivatives of the embedding-bag operators, and the calls that modules make.

A sum or a mean of rows, weighed by the upstream gradient, is T = sum of ``w[i] * <weight[indices[i]], grad[bag(i)]>``
over positions i. T is linear in each of ``weight``, ``w`` and ``grad``, and the three operators are its derivatives:
``embedding_bag`` by ``grad``, ``embedding_bag_backward`` by ``weight``, ``embedding_bag_weights_backward`` by ``w``. So
the three give each other's gradients and tangents, of any order.

The functions that end in ``Dual`` add a ``jvp``, which ``torch.compile`` does not trace: they serve forward-mode
differentiation only. A max over rows is a gather, and its derivatives are plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from ...backends import selection
from . import reference
from .faults import index_out_of_range
from .reference import MAX, MEAN, SUM
from .spec import BagOperands, BagSpec, QuantizedTable, UnweightedBags

_NO_BAGS = BagSpec(SUM, -1, False)
_INDEX_TYPES = (torch.int32, torch.int64)
transforms_active = torch._C._are_functorch_transforms_active


def run_operator(name: str, at: torch.Tensor, *args: Any) -> Any:
    """Runs an operator where a tensor is, on its flat arguments.

    Raises:
        IndexOutOfRangeError: an index that is not a row, also where a native kernel found it.
    """
    try:
        return selection.implementation(name, at)(*args)
    except IndexError as error:
        raise index_out_of_range(error) from None


def _apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)``, without torch's look at the signature (10 us) where only functorch needs it."""
    if torch.compiler.is_compiling() or transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))


def _wants_graph(one: torch.Tensor, other: torch.Tensor | None = None) -> bool:
    """Whether a call on these tensors is differentiated. (``embedding_bag`` asks the same inline.)

    Under functorch's transforms a tensor does not tell: what ``vmap`` hands out in ``grad`` requires no gradient.
    """
    if forward_ad._current_level >= 0 or transforms_active():
        return True
    return torch.is_grad_enabled() and (one.requires_grad or (other is not None and other.requires_grad))


def _pick(function: Any, dual: Any) -> Any:
    return function if forward_ad._current_level < 0 else dual


def _added(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


class _Looped(torch.autograd.Function):
    """A function that ``vmap`` runs once for each entry, on the backend that was asked for."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        found = []
        for entry in range(info.batch_size):
            own = [a if dim is None else a.select(dim, entry) for a, dim in zip(args, in_dims, strict=True)]
            found.append(_apply(cls, *own))
        if isinstance(found[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])
        return torch.stack(found), 0


# ---- one table: the three operators and their derivatives ---------------------------------------------------------


class Pool(_Looped):
    """``embedding_bag`` for sum and mean; its operands, and whether the table's gradient is sparse."""

    @staticmethod
    def forward(*operands: Any) -> torch.Tensor:
        return run_operator("embedding_bag", operands[0], *operands[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, indices, offsets, per_sample_weights, *spec, ctx.sparse = inputs
        ctx.spec, ctx.num_embeddings = BagSpec(*spec), weight.shape[0]
        # Only what the backward reads: a table that it does not read may change before, as in torch.
        keep_weight = per_sample_weights is not None and per_sample_weights.requires_grad
        ctx.save_for_backward(weight if keep_weight else None, indices, offsets, per_sample_weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, indices, offsets, per_sample_weights = ctx.saved_tensors
        grads = pool_backward(
            ctx, grad, _sparse_backward, weight, BagOperands(indices, offsets, per_sample_weights, ctx.spec)
        )
        return *grads, None, None, None, None


def pool_backward(
    ctx: Any,
    grad: torch.Tensor,
    sparse_gradient: Callable[[torch.Tensor, BagOperands, int], torch.Tensor],
    weight: torch.Tensor | None,
    bags: BagOperands,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the four tensors of a call."""
    indices, offsets, per_sample_weights, spec = bags
    grad_weight = grad_samples = None
    if ctx.needs_input_grad[0]:
        gradient = sparse_gradient if ctx.sparse else table_gradient
        grad_weight = gradient(grad, bags, ctx.num_embeddings)
    if per_sample_weights is not None and ctx.needs_input_grad[3]:
        assert weight is not None
        unweighted = UnweightedBags(indices, offsets, spec)
        grad_samples = weights_gradient(grad, weight, unweighted).reshape(per_sample_weights.shape)
    return grad_weight, None, None, grad_samples


class _PoolDual(Pool):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        Pool.setup_context(ctx, inputs, output)
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(ctx: Any, weight_t: Any, _i: Any, _o: Any, samples_t: Any, *_: Any) -> torch.Tensor | None:
        weight, indices, offsets, per_sample_weights = ctx.saved_tensors
        bags = BagOperands(indices, offsets, per_sample_weights, ctx.spec)
        by_weight = by_samples = None
        if weight_t is not None:
            by_weight = _pool(weight_t, bags)
        if samples_t is not None:
            by_samples = _pool(weight, bags._replace(per_sample_weights=samples_t))
        return _added(by_weight, by_samples)


def _pool(weight: torch.Tensor, bags: BagOperands, sparse: bool = False) -> torch.Tensor:
    args = weight, *bags[:3], *bags.spec
    if _wants_graph(weight, bags.per_sample_weights):
        return _apply(_pick(Pool, _PoolDual), *args, sparse)
    return run_operator("embedding_bag", weight, *args)


class _TableGradient(_Looped):
    """``embedding_bag_backward``."""

    @staticmethod
    def forward(*operands: Any) -> torch.Tensor:
        return run_operator("embedding_bag_backward", operands[0], *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.spec, ctx.num_embeddings = BagSpec(*inputs[4:7]), inputs[7]
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, indices, offsets, per_sample_weights = ctx.saved_tensors
        by_grad = by_samples = None
        if ctx.needs_input_grad[0]:
            by_grad = _pool(upstream, BagOperands(indices, offsets, per_sample_weights, ctx.spec))
        if per_sample_weights is not None and ctx.needs_input_grad[3]:
            found = weights_gradient(grad, upstream, UnweightedBags(indices, offsets, ctx.spec))
            by_samples = found.reshape(per_sample_weights.shape).to(per_sample_weights.dtype)
        return by_grad, None, None, by_samples, None, None, None, None


class _TableGradientDual(_TableGradient):
    @staticmethod
    def jvp(ctx: Any, grad_t: Any, _i: Any, _o: Any, samples_t: Any, *_: Any) -> torch.Tensor | None:
        grad, indices, offsets, per_sample_weights = ctx.saved_tensors
        bags = BagOperands(indices, offsets, per_sample_weights, ctx.spec)
        by_grad = by_samples = None
        if grad_t is not None:
            by_grad = table_gradient(grad_t, bags, ctx.num_embeddings)
        if samples_t is not None:
            by_samples = table_gradient(grad, bags._replace(per_sample_weights=samples_t), ctx.num_embeddings)
        return _added(by_grad, by_samples)


def table_gradient(grad: torch.Tensor, bags: BagOperands, num_embeddings: int) -> torch.Tensor:
    """The table's gradient of a sum or a mean, [num_embeddings, D], for ``grad`` [B, D]."""
    args = grad, *bags[:3], *bags.spec, num_embeddings
    if _wants_graph(grad, bags.per_sample_weights):
        return _apply(_pick(_TableGradient, _TableGradientDual), *args)
    return run_operator("embedding_bag_backward", grad, *args)


class _WeightsGradient(_Looped):
    """``embedding_bag_weights_backward``."""

    @staticmethod
    def forward(*operands: Any) -> torch.Tensor:
        return run_operator("embedding_bag_weights_backward", operands[0], *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.spec = BagSpec(*inputs[4:])
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, weight, indices, offsets = ctx.saved_tensors
        bags = BagOperands(indices, offsets, upstream, ctx.spec)
        by_grad = by_weight = None
        if ctx.needs_input_grad[0]:
            by_grad = _pool(weight, bags)
        if ctx.needs_input_grad[1]:
            by_weight = table_gradient(grad, bags, weight.shape[0])
        return by_grad, by_weight, None, None, None, None, None


class _WeightsGradientDual(_WeightsGradient):
    @staticmethod
    def jvp(ctx: Any, grad_t: Any, weight_t: Any, *_: Any) -> torch.Tensor | None:
        grad, weight, indices, offsets = ctx.saved_tensors
        bags = UnweightedBags(indices, offsets, ctx.spec)
        by_grad = by_weight = None
        if grad_t is not None:
            by_grad = weights_gradient(grad_t, weight, bags)
        if weight_t is not None:
            by_weight = weights_gradient(grad, weight_t, bags)
        return _added(by_grad, by_weight)


def weights_gradient(grad: torch.Tensor, weight: torch.Tensor, bags: UnweightedBags) -> torch.Tensor:
    """The gradient of ``per_sample_weights``, of the shape of the indices, for ``grad`` [B, D]."""
    args = grad, weight, *bags[:2], *bags.spec
    if _wants_graph(grad, weight):
        return _apply(_pick(_WeightsGradient, _WeightsGradientDual), *args)
    return run_operator("embedding_bag_weights_backward", grad, *args)


# ---- one table: max ------------------------------------------------------------------------------------------------


class _Max(_Looped):
    """``embedding_bag_max``: the values, and the row that each of them came from."""

    @staticmethod
    def forward(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return run_operator("embedding_bag_max", operands[0], *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.num_embeddings = inputs[0].shape[0]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        (argmax,) = ctx.saved_tensors
        found = None if grad is None else max_backward(grad, argmax, ctx.num_embeddings)
        return found, None, None, None, None, None


class _MaxDual(_Max):
    @staticmethod
    def jvp(ctx: Any, weight_t: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        (argmax,) = ctx.saved_tensors
        if weight_t.shape[0] == 0:
            return weight_t.new_zeros(argmax.shape), None
        return torch.where(argmax >= 0, weight_t.gather(0, argmax.clamp(min=0)), 0.0), None


# Fewer than 2^32 rows, and fewer indices by 64, is what the CUDA C++ operators count.
_MOST_ROWS = (1 << 32) - 64


def max_backward(grad: torch.Tensor, argmax: torch.Tensor, num_embeddings: int) -> torch.Tensor:
    """The table's gradient of a max: each column's gradient goes to the row that its value came from.

    Sums are in float32 for 16-bit types. A GPU's scatter_add_ adds in no certain order. On a GPU every element of the
    table is therefore a row of one column, for the operator whose order is certain. A gradient that belongs to no row
    goes to one additional row, which is dropped. Columns that are together too many rows come one part after the other.
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
    out = values.new_zeros(num_embeddings, dim)
    return out.scatter_add_(0, argmax.clamp(min=0), values).to(grad.dtype)


def _max_backward_by_element(
    grad: torch.Tensor, argmax: torch.Tensor, num_embeddings: int, dtype: torch.dtype
) -> torch.Tensor:
    dim = grad.shape[1]
    size = num_embeddings * dim
    element = torch.where(argmax >= 0, argmax * dim + torch.arange(dim, device=grad.device), size)
    bags = BagOperands(element.reshape(-1, 1), None, None, BagSpec(SUM, size, False))
    out = table_gradient(grad.to(dtype).reshape(-1, 1), bags, size + 1)[:-1]
    return out.reshape(num_embeddings, dim).to(grad.dtype)


def _sparse_backward(grad: torch.Tensor, bags: BagOperands, num_embeddings: int) -> torch.Tensor:
    """The gradient as a sparse tensor with one (not coalesced) row for each index, as torch gives it.

    On the CPU the indices passed the forward's checks, so this only gathers: the bag's gradient for each of its
    indices. On a GPU wrong ones may not have been told of yet, or be let pass.
    """
    indices, offsets, per_sample_weights, spec = bags
    rows = indices.reshape(-1)
    if offsets is None:
        lengths = torch.full((indices.shape[0],), indices.shape[1], device=indices.device)
    else:
        end = offsets[-1:] if spec.include_last_offset else offsets.new_full((1,), rows.shape[0])
        lengths = torch.diff(offsets, append=None if spec.include_last_offset else end)
        rows = rows[: int(end)] if spec.include_last_offset else rows
    bag = torch.repeat_interleave(lengths)
    keep = None
    if rows.is_cuda and selection.bounds_mode() == "clamp":
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


class _PlainBag(torch.autograd.Function):
    """``Pool`` and ``_Max`` where no transform sees the call, which spares it 2 us."""

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
            run = selection.implementation("embedding_bag_max", weight)
            out, argmax = run(weight, indices, offsets, *spec[1:], True)
        else:
            run = selection.implementation("embedding_bag", weight)
            out = run(weight, indices, offsets, per_sample_weights, *spec)
        # Only what the backward reads: a table that it does not read may change before, as in torch.
        keep_weight = per_sample_weights is not None and per_sample_weights.requires_grad
        ctx.save_for_backward(weight if keep_weight else None, indices, offsets, per_sample_weights, argmax)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, indices, offsets, per_sample_weights, argmax = ctx.saved_tensors
        if argmax is not None:
            return max_backward(grad, argmax, ctx.num_embeddings), None, None, None, None, None
        grads = pool_backward(
            ctx, grad, _sparse_backward, weight, BagOperands(indices, offsets, per_sample_weights, ctx.spec)
        )
        return *grads, None, None


def embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    spec: BagSpec,
    sparse: bool = False,
) -> torch.Tensor:
    """Differentiable lookup over one float table; arguments are checked by the caller."""
    try:
        if forward_ad._current_level >= 0 or transforms_active():
            if spec.mode == MAX:
                return _apply(_pick(_Max, _MaxDual), weight, indices, offsets, *spec[1:], True)[0]
            return _pool(weight, BagOperands(indices, offsets, per_sample_weights, spec), sparse)
        if torch.is_grad_enabled() and (
            weight.requires_grad or (per_sample_weights is not None and per_sample_weights.requires_grad)
        ):
            if sparse and torch.compiler.is_compiling():
                # torch.compile's tracer, which that module imports, is as much as the rest of torch.
                from .traced_sparse import pool

                return pool(weight, indices, offsets, per_sample_weights, *spec)
            return _PlainBag.apply(weight, indices, offsets, per_sample_weights, spec, sparse)
        run = selection.implementation("embedding_bag", weight)
        mode, padding_idx, include_last_offset = spec
        return run(weight, indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset)
    except IndexError as error:
        raise index_out_of_range(error) from None
    except RuntimeError:
        # Rare types are found here, and not before, as most calls take longer to check than to run.
        if not _has_narrow(indices, offsets):
            raise
    return embedding_bag(weight, *as_index_types(indices, offsets), per_sample_weights, spec, sparse)


def _has_narrow(indices: torch.Tensor, offsets: torch.Tensor | None) -> bool:
    """Whether indices or offsets have a small integer type that torch takes beside one that it knows."""
    if offsets is None or (indices.dtype in _INDEX_TYPES) == (offsets.dtype in _INDEX_TYPES):
        return False
    other = offsets.dtype if indices.dtype in _INDEX_TYPES else indices.dtype
    return other in (torch.int8, torch.uint8, torch.int16, torch.bool)


def as_index_types(indices: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices and offsets as the operators take them.

    As in torch, int8, uint8, int16 or bool of the one becomes the type of the other, which must be int32 or int64.
    """
    if offsets is None or not _has_narrow(indices, offsets):
        return indices, offsets
    wide = offsets.dtype if offsets.dtype in _INDEX_TYPES else indices.dtype
    return indices.to(wide), offsets.to(wide)


# ---- one quantized table ------------------------------------------------------------------------------------------


class _QuantizedPool(_Looped):
    """``quantized_embedding_bag``. Only per_sample_weights have a gradient: the rows are constants."""

    @staticmethod
    def forward(*operands: Any) -> torch.Tensor:
        return run_operator("quantized_embedding_bag", operands[5], *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.constants, ctx.spec, ctx.dtype = inputs[2:5], BagSpec(*inputs[8:11]), inputs[11]
        tensors = *inputs[:2], *inputs[5:7]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale_bias, indices, offsets = ctx.saved_tensors
        table = QuantizedTable(weight, scale_bias, *ctx.constants)
        grad_samples = quantized_weights_backward(grad, table, UnweightedBags(indices, offsets, ctx.spec))
        return *(None,) * 7, grad_samples, *(None,) * 4


class _QuantizedPoolDual(_QuantizedPool):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        weight, scale_bias, indices, offsets = ctx.saved_tensors
        table = QuantizedTable(weight, scale_bias, *ctx.constants)
        return quantized_embedding_bag(table, indices, offsets, tangents[7], ctx.spec, ctx.dtype)


def quantized_weights_backward(grad: torch.Tensor, table: QuantizedTable, bags: UnweightedBags) -> torch.Tensor:
    """Gradient of per_sample_weights over quantized rows: the rows in use become a small float table of their own."""
    indices, offsets, spec = bags
    flat = indices.reshape(-1, 1)
    rows = run_operator("quantized_embedding_bag", indices, *table, flat, None, None, *_NO_BAGS, torch.float32)
    position = torch.arange(indices.numel(), device=indices.device).reshape(indices.shape)
    whole = UnweightedBags(position, offsets, BagSpec(SUM, -1, spec.include_last_offset))
    out = weights_gradient(grad.float(), rows, whole).reshape(-1)
    padding_idx, num_rows = spec.padding_idx, table.weight.shape[0]
    if indices.is_cuda and selection.bounds_mode() != "raise":
        indices, padding_idx, num_rows = _as_counted(indices, padding_idx, num_rows)
    split = reference.split_bags(indices, offsets, padding_idx, spec.include_last_offset, num_rows)
    values = out[split.position]
    if spec.mode == MEAN:
        values = values / split.counts.clamp(min=1)[split.bag]
    result = torch.zeros_like(out)
    result[split.position] = values
    return result.to(grad.dtype).reshape(indices.shape)


def _as_counted(indices: torch.Tensor, padding_idx: int, num_rows: int) -> tuple[torch.Tensor, int, int]:
    """Indices that are right and count as wrong ones do on a GPU; their padding index, and how many rows they need."""
    if selection.bounds_mode() == "clamp":
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
    try:
        if per_sample_weights is not None and _wants_graph(per_sample_weights):
            function = _pick(_QuantizedPool, _QuantizedPoolDual)
            return _apply(function, *table, indices, offsets, per_sample_weights, *spec, dtype)
        run = selection.implementation("quantized_embedding_bag", indices)
        # Unpacked by hand: a request spends as long on Python as on its rows.
        weight, scale_bias, exponent, dim, bits = table
        mode, padding_idx, last = spec
        number = selection.dtype_argument(dtype)
        bags = indices, offsets, per_sample_weights, mode, padding_idx, last
        return run(weight, scale_bias, exponent, dim, bits, *bags, number)
    except IndexError as error:
        raise index_out_of_range(error) from None
    except RuntimeError:
        if not _has_narrow(indices, offsets):
            raise
    return quantized_embedding_bag(table, *as_index_types(indices, offsets), per_sample_weights, spec, dtype)
