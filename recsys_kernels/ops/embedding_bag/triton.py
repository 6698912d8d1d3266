"""The embedding-bag operators on Triton kernels, for NVIDIA and AMD GPUs.

Wrong indices and offsets never touch memory that is not ours (see ``triton_kernels.py``). With bounds_check "raise" an
operator waits for its kernel, reads what it found and raises; with "clamp" and "ignore" it does not wait. While a CUDA
graph is captured nothing can be read, and "raise" then does what "ignore" does.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...backends import selection
from . import triton_kernels as kernels
from .faults import IndexOutOfRangeError, index_error, offsets_error
from .reference import MAX, MEAN
from .spec import BagOperands, CollectionBags, MaxBags, QuantizedTable, TableLists, UnweightedBags

# ---- launches ----------------------------------------------------------------------------------------------------

# Positions that one program of the backward sums. Each launch leaves two sums for that many positions.
_CHUNK = 64
_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)


def _accumulator(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    if min(grid) == 0:
        return
    if torch.version.hip is not None:
        constants.pop("maxnreg", None)  # an option of NVIDIA's assembler
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


# Elements of a tile a thread holds: 64 bytes of 4-byte and of 2-byte rows, 32 of int8, whose sums take most registers.
_PER_THREAD = {torch.float64: 8, torch.float32: 16, torch.float16: 32, torch.bfloat16: 32, torch.uint8: 32}
_MOST_COLUMNS = 128


def _blocks(width: int, per_thread: int) -> dict[str, int]:
    """The tile of a program, and the options by which Triton compiles the program.

    Programs are single warps. A multiprocessor holds 32 programs, and ptxas would rather wait for one load after the
    other than exceed the registers with which it fills one: 64 a thread for one warp, but 32 for two. Tiles with 32
    sums a thread are told that they may take 96: their loads are then in flight together (20-25 programs). 4-byte rows
    have 2 KiB in flight a program, 2-byte rows 2, int8 1: on a multiprocessor 64, 50 and 24 KiB, where 3.4 TB/s at 1 us
    over 132 of them need 26. More columns are programs of their own.
    """
    block_d = min(_MOST_COLUMNS, max(8, triton.next_power_of_2(width)))
    blocks = {"BLOCK_L": max(1, min(32, per_thread * 32 // block_d)), "BLOCK_D": block_d, "num_warps": 1}
    return blocks | {"maxnreg": 96} if per_thread > 16 else blocks


def _alignment(*tables: torch.Tensor) -> int:
    """Elements that the start, the length and the distance of rows are multiples of, at most 16 bytes of them."""
    unit = max(1, 16 // max(t.element_size() for t in tables))
    for t in tables:
        address = t.data_ptr() // t.element_size() if t.data_ptr() % t.element_size() == 0 else 1
        unit = math.gcd(unit, t.shape[1], address, t.stride(0) if t.shape[0] > 1 else 0)
        if t.stride(1) != 1 and t.shape[1] > 1:
            unit = 1
    return unit


def _near_columns(table: torch.Tensor) -> torch.Tensor:
    """The table, copied if its columns stand so far apart (a transposed one) that their distance exceeds 32 bits."""
    return table if table.stride(1) * table.shape[1] < 1 << 31 else table.contiguous()


class _Bags(NamedTuple):
    """Checked arguments. ``indices`` stands in for an absent tensor, which no kernel reads."""

    indices: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor
    flags: torch.Tensor
    num_bags: int
    num_offsets: int
    bag_length: int
    options: dict[str, bool]

    @property
    def shape(self) -> tuple[int, int, int]:
        """num_offsets, num_indices and bag_length, as all kernels take them."""
        return self.num_offsets, self.indices.numel(), self.bag_length


def _check_device(expected: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != expected:
            raise RuntimeError(f"{name} must be on {expected} like the other arguments, but is on {tensor.device}")


def _check_float(dtype: torch.dtype, name: str) -> None:
    if dtype not in _KINDS[:4]:
        raise RuntimeError(f"{name} must be a floating point tensor, but is {dtype}")


def _bags(
    device: torch.device,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    include_last_offset: bool,
) -> _Bags:
    """Checks types and shapes in the reference's words; the values are checked by the kernels."""
    _check_device(device, indices=indices, offsets=offsets, per_sample_weights=weights)
    for name, tensor, dim in (("indices", indices, 2 if offsets is None else 1), ("offsets", offsets, 1)):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"{name} must be int32 or int64, but is {tensor.dtype}")
        if tensor.dim() != dim:
            raise RuntimeError(f"{name} must have {dim} dimension(s), but has {tensor.dim()}")
    if weights is not None:
        _check_float(weights.dtype, "per_sample_weights")
        if weights.numel() != indices.numel():
            raise RuntimeError(
                f"per_sample_weights must have one value for each of the {indices.numel()} indices, "
                f"but has {weights.numel()}"
            )
    flat = indices.reshape(-1).contiguous()
    num_bags, length, num_offsets = indices.shape[0], 0, 0
    if offsets is None:
        length = indices.shape[1]
    else:
        num_offsets = offsets.numel()
        if include_last_offset and num_offsets == 0:
            raise RuntimeError("include_last_offset needs at least one offset, but offsets is empty")
        num_bags = num_offsets - include_last_offset
    return _Bags(
        flat,
        flat if offsets is None else offsets.contiguous(),
        flat if weights is None else weights.reshape(-1).contiguous(),
        torch.full((4,), kernels.NONE.value, dtype=torch.int64, device=device),
        num_bags,
        num_offsets,
        length,
        {"HAS_OFFSETS": offsets is not None, "HAS_WEIGHTS": weights is not None, "CLAMP": _clamp()},
    )


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _clamp() -> bool:
    return selection.bounds_mode() == "clamp"


def _skips(padding_idx: int, device: torch.device) -> bool:
    """Whether the indices that count have to be counted: some may be padding, or wrong and nobody is told."""
    return padding_idx >= 0 or selection.bounds_mode() != "raise" or _is_capturing(device)


def _read(bags: _Bags) -> list[int] | None:
    """The flags (waits for the kernel); None if nobody wants to know, or while a CUDA graph is captured."""
    if selection.bounds_mode() != "raise" or _is_capturing(bags.flags.device):
        return None
    return bags.flags.tolist()


def _check(bags: _Bags, num_rows: int) -> list[int] | None:
    flags = _read(bags)
    if flags is not None:
        _check_offsets(bags, flags[0])
        if flags[1] != kernels.NONE.value:
            raise _index_error(bags, flags[1], "a table", num_rows)
    return flags


def _index_error(bags: _Bags, position: int, table: str, num_rows: int) -> IndexOutOfRangeError:
    return index_error(int(bags.indices[position]), position, table, num_rows)


def _check_offsets(bags: _Bags, position: int) -> None:
    if position != kernels.NONE.value:
        raise offsets_error(position, int(bags.offsets[position]), bags.indices.numel())


# ---- operators ---------------------------------------------------------------------------------------------------


def _pool_table(
    out: torch.Tensor,
    table: torch.Tensor,
    quantized: tuple[torch.Tensor, int, int] | None,
    bags: _Bags,
    mode: int,
    padding_idx: int,
) -> torch.Tensor:
    scale_bias, exponent, bits = quantized or (table, 0, 0)
    dtype = _accumulator(table.dtype, out.dtype)
    unit, out_unit = _alignment(table), _alignment(out)
    per_thread = min(_PER_THREAD[dtype] * 2, _PER_THREAD[table.dtype])
    blocks = _blocks(table.shape[1], per_thread)
    if bits == 4:  # two sums for a byte
        blocks["BLOCK_L"] = max(1, blocks["BLOCK_L"] // 2)
    grid = (bags.num_bags, triton.cdiv(table.shape[1], blocks["BLOCK_D"]))
    _launch(
        kernels.bag_kernel, grid, out.device, out, table, scale_bias, scale_bias.stride(0), bags.indices, bags.offsets,
        bags.weights, bags.flags, table.shape[0], table.stride(0) // unit, table.stride(1), table.shape[1] // unit,
        out.shape[1] // out_unit, exponent, *bags.shape, padding_idx, MODE=mode, BITS=bits,
        HAS_PADDING=_skips(padding_idx, out.device), ACC=_TRITON_TYPES[dtype], ALIGN=unit, OUT_ALIGN=out_unit,
        **blocks, **bags.options,
    )  # fmt: skip
    _check(bags, table.shape[0])
    return out


def embedding_bag(weight: torch.Tensor, bags: BagOperands) -> torch.Tensor:
    """Lookup and pooling over one float table; sums in float32 (float64 tables: float64)."""
    _check_float(weight.dtype, "weight")
    weight = _near_columns(weight)
    checked = _bags(weight.device, *bags[:3], bags.spec.include_last_offset)
    out = weight.new_empty(checked.num_bags, weight.shape[1])
    return _pool_table(out, weight, None, checked, bags.spec.mode, bags.spec.padding_idx)


def quantized_embedding_bag(table: QuantizedTable, bags: BagOperands, dtype: torch.dtype) -> torch.Tensor:
    """Lookup and pooling over one table of int8 or int4 rows; sums in float32 (float64 output: float64)."""
    weight, scale_bias, exponent, embedding_dim, bits = table
    _check_quantized(weight, scale_bias, weight.device)
    _check_float(dtype, "dtype")
    if bits not in (8, 4):
        raise RuntimeError(f"bits must be 8 or 4, but is {bits}")
    columns = embedding_dim if bits == 8 else (embedding_dim + 1) // 2
    if weight.shape[1] != columns:
        raise RuntimeError(
            f"a quantized weight of {embedding_dim} elements and {bits} bits must have {columns} columns, "
            f"but has {weight.shape[1]}"
        )
    checked = _bags(weight.device, *bags[:3], bags.spec.include_last_offset)
    out = weight.new_empty(checked.num_bags, embedding_dim, dtype=dtype)
    return _pool_table(out, weight, (scale_bias, exponent, bits), checked, bags.spec.mode, bags.spec.padding_idx)


def _check_quantized(weight: torch.Tensor, scale_bias: torch.Tensor, device: torch.device) -> None:
    _check_device(device, weight=weight, scale_bias=scale_bias)
    if weight.dtype != torch.uint8:
        raise RuntimeError(f"a quantized weight must be uint8, but is {weight.dtype}")
    shape = (weight.shape[0], 2)
    if scale_bias.dtype != torch.float16 or scale_bias.shape != shape or scale_bias.stride(1) != 1:
        raise RuntimeError(f"scale_bias must be a float16 tensor of shape {list(shape)} with contiguous rows")


def embedding_bag_max(weight: torch.Tensor, bags: MaxBags, zero_start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Max pooling and the row that each column came from (the first of equals; -1 for an empty bag)."""
    _check_float(weight.dtype, "weight")
    weight = _near_columns(weight)
    indices, offsets, padding_idx, include_last_offset = bags
    checked = _bags(weight.device, indices, offsets, None, include_last_offset)
    out = weight.new_empty(checked.num_bags, weight.shape[1])
    argmax = torch.empty_like(out, dtype=torch.int64)
    unit, dtype = _alignment(weight), _accumulator(weight.dtype)
    blocks = _blocks(weight.shape[1], _PER_THREAD[dtype])
    _launch(
        kernels.argmax_kernel, (checked.num_bags, triton.cdiv(weight.shape[1], blocks["BLOCK_D"])), weight.device, out,
        argmax, weight, checked.indices, checked.offsets, checked.flags, weight.shape[0], weight.stride(0) // unit,
        weight.stride(1), weight.shape[1] // unit, *checked.shape, padding_idx, HAS_OFFSETS=offsets is not None,
        HAS_PADDING=padding_idx >= 0, ZERO_START=zero_start, ACC=_TRITON_TYPES[dtype], ALIGN=unit, CLAMP=_clamp(),
        **blocks,
    )  # fmt: skip
    _check(checked, weight.shape[0])
    return out, argmax


def embedding_bag_backward(grad: torch.Tensor, bags: BagOperands, num_embeddings: int) -> torch.Tensor:
    """Dense gradient of the table, [num_embeddings, D], for sum and mean. The same bits at every run.

    Positions are sorted by row and runs of equal rows summed, so that no row is written twice and none by two programs.
    """
    mode, padding_idx, include_last_offset = bags.spec
    _check_float(grad.dtype, "grad")
    _check_not_max(mode)
    checked = _bags(grad.device, *bags[:3], include_last_offset)
    _check_grad(grad, checked.num_bags, grad.shape[1])
    out = grad.new_zeros(num_embeddings, grad.shape[1])
    total = checked.indices.numel()
    small = num_embeddings < 1 << 31
    keys = torch.full((total,), num_embeddings, dtype=torch.int32 if small else torch.int64, device=grad.device)
    bag_of = torch.empty(total, dtype=torch.int32, device=grad.device)
    dtype = _accumulator(grad.dtype)
    has_factor = mode == MEAN or bags.per_sample_weights is not None
    factors = torch.empty(total if has_factor else 0, dtype=dtype, device=grad.device)
    _launch(
        kernels.keys_kernel, (checked.num_bags,), grad.device, keys, bag_of, factors, checked.indices, checked.offsets,
        checked.weights, checked.flags, num_embeddings, checked.num_bags, *checked.shape, padding_idx, MODE=mode,
        HAS_PADDING=_skips(padding_idx, grad.device), BLOCK_L=64, num_warps=1, **checked.options,
    )  # fmt: skip
    flags = _check(checked, num_embeddings)
    if flags is not None:  # A collection passes one feature's part of its offsets. The other indices are left out.
        used = slice(*flags[2:]) if checked.num_bags else slice(0)
        keys, bag_of, factors = keys[used], bag_of[used], factors[used]
    if keys.numel() and grad.shape[1]:
        _sum_by_row(out, grad, *torch.sort(keys, stable=True), bag_of, factors if has_factor else None)
    return out


def _check_not_max(mode: int) -> None:
    if mode == MAX:
        raise RuntimeError("the gradient of max pooling is not a weighted sum: use embedding_bag_max")


def _check_grad(grad: torch.Tensor, *shape: int) -> None:
    if grad.shape != shape:
        raise RuntimeError(f"grad must have shape {list(shape)}, but has {list(grad.shape)}")


def _sum_by_row(
    out: torch.Tensor,
    grad: torch.Tensor,
    keys: torch.Tensor,
    order: torch.Tensor,
    bags: torch.Tensor,
    factors: torch.Tensor | None,
) -> None:
    """Adds up what belongs to one row, by chunks, then the sums of the rows that chunks have in common."""
    source, dim, first = grad, grad.shape[1], True
    dtype = _accumulator(grad.dtype)
    while True:
        count = keys.numel()
        chunks = triton.cdiv(count, _CHUNK)
        next_keys = torch.empty(2 * chunks, dtype=keys.dtype, device=keys.device)
        partial = torch.empty(2 * chunks if chunks > 1 else 0, dim, dtype=dtype, device=grad.device)
        unit = _alignment(source)
        blocks = _blocks(dim, _PER_THREAD[source.dtype])
        _launch(
            kernels.segments_kernel, (count, triton.cdiv(dim, blocks["BLOCK_D"])), grad.device, out, next_keys, partial,
            keys, order, bags, keys if factors is None else factors, source, source.stride(0) // unit,
            source.stride(1), dim // unit, count, out.shape[0], FIRST=first, HAS_FACTOR=first and factors is not None,
            ACC=_TRITON_TYPES[dtype], CHUNK=_CHUNK, ALIGN=unit, **blocks,
        )  # fmt: skip
        if chunks == 1:
            return
        keys, source, first = next_keys, partial, False


def embedding_bag_weights_backward(grad: torch.Tensor, weight: torch.Tensor, bags: UnweightedBags) -> torch.Tensor:
    """Gradient of per_sample_weights, of the shape of ``indices``; zero for padding."""
    indices, offsets, (mode, padding_idx, include_last_offset) = bags
    _check_not_max(mode)
    _check_float(weight.dtype, "weight")
    weight = _near_columns(weight)
    _check_float(grad.dtype, "grad")
    _check_device(weight.device, grad=grad)
    checked = _bags(weight.device, indices, offsets, None, include_last_offset)
    _check_grad(grad, checked.num_bags, weight.shape[1])
    out = grad.new_zeros(indices.shape)
    unit, dtype = _alignment(weight), _accumulator(weight.dtype)
    blocks = _blocks(weight.shape[1], _PER_THREAD[dtype])
    _launch(
        kernels.weights_grad_kernel, (checked.num_bags,), weight.device, out, grad, weight, checked.indices,
        checked.offsets, checked.flags, weight.shape[0], weight.stride(0) // unit, weight.stride(1),
        weight.shape[1] // unit, grad.stride(0), grad.stride(1), *checked.shape, padding_idx, MODE=mode,
        HAS_OFFSETS=offsets is not None,
        HAS_PADDING=_skips(padding_idx, grad.device), ACC=_TRITON_TYPES[dtype], ALIGN=unit, CLAMP=_clamp(), **blocks,
    )  # fmt: skip
    _check(checked, weight.shape[0])
    return out


class _Tables(NamedTuple):
    """The collection's kernel reads this about the tables: int64 [tables, 7] on the device."""

    values: torch.Tensor
    variants: tuple[tuple[int, int, int, int], ...]
    blocks: int


# Tables mostly stay where they are from call to call. An entry depends on nothing but its key, so an entry never goes
# stale. The entries that a captured CUDA graph reads must live as long as the graph, whose end nobody tells.
_described: OrderedDict[tuple[object, ...], _Tables] = OrderedDict()
_captured: list[_Tables] = []
_MOST_DESCRIBED = 256


def _describe(weights: Sequence[torch.Tensor], scale_bias: Sequence[torch.Tensor], device: torch.device) -> _Tables:
    pairs = zip(weights, scale_bias, strict=True)
    key = (device, *((w.data_ptr(), s.data_ptr(), w.shape, w.stride(0), s.stride(0), w.dtype) for w, s in pairs))
    found = _described.get(key)
    if found is None:
        found = _described[key] = _describe_anew(weights, scale_bias, device)
        if len(_described) > _MOST_DESCRIBED:
            _described.popitem(last=False)
    if _is_capturing(device):
        _captured.append(found)
    return found


def _describe_anew(
    weights: Sequence[torch.Tensor], scale_bias: Sequence[torch.Tensor], device: torch.device
) -> _Tables:
    widths = {_blocks(w.shape[1], 1)["BLOCK_D"] for w in weights}
    # Each width is a copy of the pooling in the kernel: with many of them, some share one.
    classes = sorted(widths) if len(widths) <= 3 else [32, _MOST_COLUMNS]
    rows, variants, blocks = [], [], 0
    for weight, scale in zip(weights, scale_bias, strict=True):
        size = weight.element_size()
        unit = _alignment(weight) * size
        unit = next(u for u in (16, 4, size) if unit >= u or u == size) // size
        block_d = next(c for c in classes if c >= min(_MOST_COLUMNS, weight.shape[1]))
        tile = _blocks(block_d, min(16, _PER_THREAD[weight.dtype]))
        variant = (_KINDS.index(weight.dtype), max(1, unit), tile["BLOCK_L"], block_d)
        if variant not in variants:
            variants.append(variant)
        blocks = max(blocks, triton.cdiv(weight.shape[1], block_d))
        code = variants.index(variant) + (0x10000 if weight.dtype == torch.uint8 else 0)
        address = [weight.data_ptr(), scale.data_ptr(), weight.shape[0], weight.stride(0), weight.shape[1]]
        rows.append([code, *address, scale.stride(0)])
    values = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 7)
    return _Tables(values, tuple(variants), blocks)


def embedding_bag_collection(
    tables: TableLists, bags: CollectionBags, total_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """Many tables of any types in one launch; ``tables.plan`` has a row for each feature, see ``FeaturePlan``.

    The kernel finds the tables by their addresses; what the plan says of them is checked there, without waiting.
    """
    weights, scale_bias, plan = tables
    indices, offsets, per_sample_weights = bags
    device = indices.device
    _check_device(device, plan=plan)
    _check_float(dtype, "dtype")
    if plan.dtype != torch.int64 or plan.dim() != 2 or plan.shape[1] != 6 or not plan.is_contiguous():
        raise RuntimeError("plan must be a contiguous int64 tensor of shape [F, 6]")
    scale_bias = scale_bias or [weight.new_empty(0) for weight in weights]
    if len(weights) != len(scale_bias):
        raise RuntimeError("scale_bias must be empty or have one entry for each table")
    for weight, scale in zip(weights, scale_bias, strict=True):
        if weight.dtype == torch.uint8:
            _check_quantized(weight, scale, device)
        else:
            _check_float(weight.dtype, "weights")
            _check_device(device, weights=weight)
        if (weight.dtype == torch.float64) != (dtype == torch.float64):
            raise RuntimeError("float64 tables need a float64 output and can't be mixed with others")
    weights = [w if w.stride(1) == 1 or w.shape[1] <= 1 else w.contiguous() for w in weights]
    checked = _bags(device, indices, offsets, per_sample_weights, True)
    features = plan.shape[0]
    if features == 0 or checked.num_bags % features:
        raise RuntimeError(f"offsets must have F*B+1 entries for F = {features} features, but has {offsets.numel()}")
    out = torch.empty(checked.num_bags // features, total_dim, dtype=dtype, device=device)
    described = _describe(weights, scale_bias, device)
    _launch(
        kernels.collection_kernel, (checked.num_bags, described.blocks), device, out, described.values, plan,
        checked.indices, checked.offsets, checked.weights, checked.flags, len(weights), out.shape[0], total_dim,
        checked.num_offsets, checked.indices.numel(), VARIANTS=described.variants,
        HAS_WEIGHTS=per_sample_weights is not None,
        SKIPS=_skips(-1, device), ACC=_TRITON_TYPES[_accumulator(dtype)], CLAMP=_clamp(), num_warps=1,
    )  # fmt: skip
    _check_collection(checked, weights, plan, out.shape[0])
    return out


def _check_collection(bags: _Bags, weights: Sequence[torch.Tensor], plan: torch.Tensor, batch: int) -> None:
    flags = _read(bags)
    if flags is None:
        return
    if flags[2] != kernels.NONE.value:
        raise RuntimeError(f"plan row {flags[2]} does not fit the tables or total_dim")
    _check_offsets(bags, flags[0])
    if flags[1] != kernels.NONE.value:
        ends = bags.offsets[batch::batch].contiguous()
        feature = int(torch.searchsorted(ends, flags[1], right=True))
        rows = weights[int(plan[feature, 0])].shape[0]
        raise _index_error(bags, flags[1], f"the table of feature #{feature}", rows)
