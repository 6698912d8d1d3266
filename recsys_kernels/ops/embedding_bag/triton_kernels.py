"""The Triton kernels of the embedding-bag operators; ``triton.py`` launches them.

A program pools one bag, or a block of its columns, as tiles of [rows, columns]: every element of a tile is an
independent load, so a tile is what a program has in flight, and only the finished bag is reduced over rows.

Bad input never touches memory that is not ours: an index or offset out of range contributes nothing (with CLAMP it is
taken for the nearest one that is right) and leaves its position in ``flags``, the smallest one winning: ``flags[0]``
offsets, ``flags[1]`` indices, ``flags[2]`` rows of a collection's plan.
"""
# mypy: allow-untyped-defs
# (Triton gives the parameters of kernels their types at launch.)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .reference import MAX, MEAN

NONE = tl.constexpr((1 << 63) - 1)  # in flags: nothing wrong
_UNSET = tl.constexpr((1 << 31) - 1)  # in a bag: no row yet
_MEAN = tl.constexpr(MEAN)
_MAX = tl.constexpr(MAX)
# Sizes and strides change from call to call, and an alignment that matters is a constant (ALIGN): compiling a kernel
# anew for a batch that happens to be divisible by 16, or to be 1, would gain nothing.
_VALUES = {
    *("num_rows", "num_bags", "num_offsets", "num_indices", "num_tables", "bag_length", "batch", "total_dim", "count"),
    *("row_units", "width_units", "dim_units", "grad_units", "grad_stride", "scale_stride"),
    *("exponent", "padding_idx", "sentinel"),
}


def _kernel(function: Any) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _VALUES])


# With one parameter a line, as the formatter has it, the signatures would be longer than the kernels.
# fmt: off
@triton.jit
def _bounds(bag, offsets, num_offsets, num_indices, bag_length, flags, HAS_OFFSETS, ZERO_START, CLAMP):
    """Where a bag begins and ends; an empty or (CLAMP) the nearest range and a mark in flags[0] if that is wrong."""
    if HAS_OFFSETS:
        total = num_indices.to(tl.int64)
        start = tl.load(offsets + bag).to(tl.int64)
        more = bag + 1 < num_offsets
        end = tl.where(more, tl.load(offsets + bag + 1, mask=more, other=0).to(tl.int64), total)
        bad_start = (start < 0) | (start > total)
        bad_first = bad_start
        if ZERO_START:
            bad_first = start != 0
        bad_first = bad_first & (bag == 0)
        bad_end = (end < start) | (end > total)
        tl.atomic_min(flags, tl.where(bad_first, 0, bag + 1), mask=bad_first | bad_end, sem="relaxed")
        if CLAMP:
            start = tl.minimum(tl.maximum(start, 0), total)
            end = tl.minimum(tl.maximum(end, start), total)
        else:
            end = tl.where(bad_start | bad_end, start, end)
    else:
        start = bag * bag_length
        end = start + bag_length
    return start, end


@triton.jit
def _clamped(row, num_rows):
    """The nearest row; a table without rows has none, and then the result is negative."""
    return tl.minimum(tl.maximum(row, 0), num_rows.to(tl.int64) - 1)


@triton.jit
def _rows(indices, position, end, num_rows, padding_idx, HAS_PADDING, CLAMP):
    """The rows at some positions of a bag, which of them count, and which indices are wrong."""
    inside = position < end
    row = tl.load(indices + position, mask=inside, other=0).to(tl.int64)
    if CLAMP:
        row = _clamped(row, num_rows)
    valid = inside & (row >= 0) & (row < num_rows)
    wrong = inside & (valid == 0)
    if HAS_PADDING:
        valid = valid & (row != padding_idx)
    return row, valid, wrong


@triton.jit
def _tile(table, row, valid, row_stride, col_stride, column, width, ALIGN):
    """[rows, columns] of a table; ALIGN elements are a load that every row's start and end are multiples of."""
    pointers = table + row[:, None] * row_stride + (column * col_stride)[None, :]
    size: tl.constexpr = table.dtype.element_ty.primitive_bitwidth // 8
    pointers = tl.multiple_of(pointers, (1, ALIGN * size))
    return tl.load(pointers, mask=valid[:, None] & (column < width)[None, :], other=0)


@triton.jit
def _add(total, x, valid, weight, mode, HAS_WEIGHTS):
    if mode == _MAX:
        total = tl.where(valid[:, None] & (x > total), x, total)  # not maximum, whose NaNs differ between versions
    else:
        if HAS_WEIGHTS:
            x = x * weight[:, None]
        total = total + x
    return total


@triton.jit
def _starts_with_nan(table, indices, first, num_rows, row_stride, col_stride, column, width, CLAMP):
    """Where a bag's first value is NaN: as in torch, this NaN stays the maximum, and a later NaN is passed over."""
    exists = first != NONE
    row = tl.load(indices + first, mask=exists, other=0).to(tl.int64)
    if CLAMP:
        row = _clamped(row, num_rows)
    x = tl.load(table + row * row_stride + column * col_stride, mask=exists & (column < width), other=0)
    return x != x


@triton.jit
def _finish(total, count, mode):
    if mode == _MAX:
        result = tl.where(count > 0, tl.max(total, 0), 0.0)
    else:
        result = tl.sum(total, 0)
        if mode == _MEAN:
            result = result / tl.maximum(count, 1).to(result.dtype)
    return result


@triton.jit
def _pool(
    table, scale_bias, scale_stride, exponent, num_rows, row_stride, col_stride, column, width, indices, weights,
    start, end, padding_idx, mode, flags, BITS, HAS_WEIGHTS, HAS_PADDING, ACC, ALIGN, BLOCK_L, CLAMP,
):
    """One bag over a block of stored columns: as many elements, or twice that for int4."""
    slot = tl.arange(0, BLOCK_L).to(tl.int64)
    fill = tl.where(mode == _MAX, -float("inf"), 0.0).to(ACC)
    total = tl.zeros([BLOCK_L, column.shape[0]], ACC) + fill
    odd = total
    used = tl.zeros([BLOCK_L], tl.int32)
    first_wrong = tl.full([BLOCK_L], NONE, tl.int64)
    first_valid = first_wrong
    weight = tl.zeros([BLOCK_L], ACC)
    scale = weight
    bias = weight
    for at in range(start, end, BLOCK_L):
        position = at + slot
        row, valid, wrong = _rows(indices, position, end, num_rows, padding_idx, HAS_PADDING, CLAMP)
        first_wrong = tl.minimum(first_wrong, tl.where(wrong, position, NONE))
        first_valid = tl.minimum(first_valid, tl.where(valid, position, NONE))
        used += valid.to(tl.int32)
        if HAS_WEIGHTS:
            weight = tl.load(weights + position, mask=valid, other=0).to(ACC)
        x = _tile(table, row, valid, row_stride, col_stride, column, width, ALIGN)
        if BITS == 0:
            total = _add(total, x.to(ACC), valid, weight, mode, HAS_WEIGHTS)
        else:
            scale = tl.load(scale_bias + row * scale_stride, mask=valid, other=0).to(ACC)
            bias = tl.load(scale_bias + row * scale_stride + 1, mask=valid, other=0).to(ACC)
            if BITS == 8:
                x = x.to(tl.float32).to(ACC) * scale[:, None] + bias[:, None]
                total = _add(total, x, valid, weight, mode, HAS_WEIGHTS)
            else:
                low = (x & 15).to(tl.float32).to(ACC) * scale[:, None] + bias[:, None]
                high = (x >> 4).to(tl.float32).to(ACC) * scale[:, None] + bias[:, None]
                total = _add(total, low, valid, weight, mode, HAS_WEIGHTS)
                odd = _add(odd, high, valid, weight, mode, HAS_WEIGHTS)
    tl.atomic_min(flags + 1 + slot * 0, first_wrong, mask=first_wrong != NONE, sem="relaxed")
    count = (end - start).to(tl.int32)
    if HAS_PADDING:
        count = tl.sum(used, 0)
    result = _finish(total, count, mode)
    if (mode == _MAX) & (BITS == 0):  # quantized rows are finite
        first = tl.min(first_valid, 0)
        is_nan = _starts_with_nan(table, indices, first, num_rows, row_stride, col_stride, column, width, CLAMP)
        result = tl.where(is_nan, float("nan"), result)
    if BITS == 4:
        result = tl.interleave(result, _finish(odd, count, mode))
    if BITS != 0:
        # 2^exponent from its bits, once a bag: exact, and powers of two commute with sums and maxima.
        result = result * ((exponent + 127).to(tl.int32) << 23).to(tl.float32, bitcast=True).to(ACC)
    return result


@_kernel
def bag_kernel(
    out, table, scale_bias, scale_stride, indices, offsets, weights, flags, num_rows, row_units, col_stride,
    width_units, dim_units, exponent, num_offsets, num_indices, bag_length, padding_idx, MODE: tl.constexpr,
    BITS: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """One table: a program for each bag and block of columns."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = _bounds(bag, offsets, num_offsets, num_indices, bag_length, flags, HAS_OFFSETS, True, CLAMP)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    result = _pool(
        table, scale_bias, scale_stride, exponent, num_rows, row_units.to(tl.int64) * ALIGN, col_stride, column,
        width_units * ALIGN, indices, weights, start, end, padding_idx, MODE, flags, BITS, HAS_WEIGHTS, HAS_PADDING,
        ACC, ALIGN, BLOCK_L, CLAMP,
    )
    OUT_D: tl.constexpr = BLOCK_D * 2 if BITS == 4 else BLOCK_D
    column = tl.program_id(1) * OUT_D + tl.arange(0, OUT_D)
    dim = dim_units * OUT_ALIGN
    tl.store(out + bag * dim + column, result, mask=column < dim)


@_kernel
def argmax_kernel(
    out, argmax, table, indices, offsets, flags, num_rows, row_units, col_stride, width_units, num_offsets,
    num_indices, bag_length, padding_idx, HAS_OFFSETS: tl.constexpr, HAS_PADDING: tl.constexpr,
    ZERO_START: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Max pooling and the row of each maximum, of equals the first."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = _bounds(bag, offsets, num_offsets, num_indices, bag_length, flags, HAS_OFFSETS, ZERO_START, CLAMP)
    slot = tl.arange(0, BLOCK_L).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_stride = row_units.to(tl.int64) * ALIGN
    width = width_units * ALIGN
    best = tl.full([BLOCK_L, BLOCK_D], -float("inf"), ACC)
    place = tl.full([BLOCK_L, BLOCK_D], _UNSET, tl.int32)  # since the bag's start
    first_wrong = tl.full([BLOCK_L], NONE, tl.int64)
    first_valid = first_wrong
    for at in range(start, end, BLOCK_L):
        position = at + slot
        row, valid, wrong = _rows(indices, position, end, num_rows, padding_idx, HAS_PADDING, CLAMP)
        first_wrong = tl.minimum(first_wrong, tl.where(wrong, position, NONE))
        first_valid = tl.minimum(first_valid, tl.where(valid, position, NONE))
        x = _tile(table, row, valid, row_stride, col_stride, column, width, ALIGN).to(ACC)
        better = valid[:, None] & ((x > best) | (place == _UNSET))
        best = tl.where(better, tl.where(x == x, x, -float("inf")), best)
        place = tl.where(better, (position - start).to(tl.int32)[:, None], place)
    tl.atomic_min(flags + 1 + slot * 0, first_wrong, mask=first_wrong != NONE, sem="relaxed")
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top[None, :], place, _UNSET), 0).to(tl.int64)
    first = tl.min(first_valid, 0)
    is_nan = _starts_with_nan(table, indices, first, num_rows, row_stride, col_stride, column, width, CLAMP)
    top = tl.where(is_nan, float("nan"), top)
    chosen = tl.where(is_nan, first - start, chosen)
    inside = column < width
    found = inside & (first != NONE)
    tl.store(out + bag * width + column, tl.where(found, top, 0.0), mask=inside)
    row = tl.load(indices + start + chosen, mask=found, other=-1).to(tl.int64)
    if CLAMP:
        row = tl.where(found, _clamped(row, num_rows), -1)
    tl.store(argmax + bag * width + column, row, mask=inside)


@_kernel
def collection_kernel(
    out, tables, plan, indices, offsets, weights, flags, num_tables, batch, total_dim, num_offsets, num_indices,
    VARIANTS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, SKIPS: tl.constexpr, ACC: tl.constexpr, CLAMP: tl.constexpr,
):
    """All tables: a program for each bag of each feature. VARIANTS are the (kind, ALIGN, BLOCK_L, BLOCK_D) in use."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = _bounds(bag, offsets, num_offsets, num_indices, 0, flags, True, True, CLAMP)
    feature = bag // batch
    plan += feature * 6
    number = tl.load(plan)
    dim = tl.load(plan + 1)
    to = tl.load(plan + 2)
    mode = tl.load(plan + 3)
    bits = tl.load(plan + 4)
    exponent = tl.load(plan + 5)
    exists = (number >= 0) & (number < num_tables)
    tables += tl.where(exists, number, 0) * 7
    variant = tl.load(tables)
    width = tl.load(tables + 5)
    fits = exists & (dim >= 0) & (to >= 0) & (to + dim <= total_dim) & (mode >= 0) & (mode <= 2)
    fits &= (bits == 0) | (bits == 4) | (bits == 8)
    fits &= width == tl.where(bits == 4, (dim + 1) // 2, dim)
    quantized = variant >= 0x10000
    fits &= quantized == (bits != 0)
    tl.atomic_min(flags + 2, feature, mask=fits == 0, sem="relaxed")
    variant = tl.where(fits, variant & 0xFFFF, -1)
    room = (bag % batch) * total_dim + to
    for v in tl.static_range(len(VARIANTS)):
        if (variant == v) & (tl.program_id(1) * VARIANTS[v][3] < width):
            if VARIANTS[v][0] != 4:
                _pool_feature(
                    out + room, tables, indices, weights, flags, start, end, mode, exponent, dim, room, VARIANTS[v][0],
                    VARIANTS[v][1], VARIANTS[v][2], VARIANTS[v][3], 0, HAS_WEIGHTS, SKIPS, ACC, CLAMP,
                )
            elif bits == 8:
                _pool_feature(
                    out + room, tables, indices, weights, flags, start, end, mode, exponent, dim, room, VARIANTS[v][0],
                    VARIANTS[v][1], VARIANTS[v][2], VARIANTS[v][3], 8, HAS_WEIGHTS, SKIPS, ACC, CLAMP,
                )
            else:  # int4 has twice the sums, so it takes half the rows
                _pool_feature(
                    out + room, tables, indices, weights, flags, start, end, mode, exponent, dim, room, VARIANTS[v][0],
                    VARIANTS[v][1], (VARIANTS[v][2] + 1) // 2, VARIANTS[v][3], 4, HAS_WEIGHTS, SKIPS, ACC, CLAMP,
                )


@triton.jit
def _table_at(address, KIND):
    if KIND == 0:
        table = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        table = address.to(tl.pointer_type(tl.float16))
    elif KIND == 2:
        table = address.to(tl.pointer_type(tl.bfloat16))
    elif KIND == 3:
        table = address.to(tl.pointer_type(tl.float64))
    else:
        table = address.to(tl.pointer_type(tl.uint8))
    return table


@triton.jit
def _pool_feature(
    out, tables, indices, weights, flags, start, end, mode, exponent, dim, room, KIND: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    SKIPS: tl.constexpr, ACC: tl.constexpr, CLAMP: tl.constexpr,
):
    """One bag of a collection; ``out`` is its place in the output, ``room`` elements from the output's start."""
    table = _table_at(tl.load(tables + 1), KIND)
    scale_bias = tl.load(tables + 2).to(tl.pointer_type(tl.float16))
    num_rows = tl.load(tables + 3)
    # Dividing and multiplying again tells the compiler of an alignment that the host has checked.
    row_stride = tl.load(tables + 4) // ALIGN * ALIGN
    width = tl.load(tables + 5) // ALIGN * ALIGN
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    result = _pool(
        table, scale_bias, tl.load(tables + 6), exponent, num_rows, row_stride, 1, column, width, indices, weights,
        start, end, -1, mode, flags, BITS, HAS_WEIGHTS, SKIPS, ACC, ALIGN, BLOCK_L, CLAMP,
    )
    if BITS == 4:
        column = tl.program_id(1) * 2 * BLOCK_D + tl.arange(0, 2 * BLOCK_D)
    wide: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    # Wide stores where the feature's place allows them, which the features before it decide.
    if ((room % wide) == 0) & ((dim % wide) == 0):
        tl.store(tl.multiple_of(out + column, (16,)), result, mask=column < dim // wide * wide)
    else:
        tl.store(out + column, result, mask=column < dim)


@triton.jit
def _count(indices, start, end, num_rows, padding_idx, BLOCK_L, CLAMP):
    """Indices of a bag that are not padding."""
    slot = tl.arange(0, BLOCK_L).to(tl.int64)
    used = tl.zeros([BLOCK_L], tl.int32)
    for at in range(start, end, BLOCK_L):
        _, valid, _ = _rows(indices, at + slot, end, num_rows, padding_idx, True, CLAMP)
        used += valid.to(tl.int32)
    return tl.sum(used, 0)


@_kernel
def keys_kernel(
    keys, bags, factors, indices, offsets, weights, flags, num_rows, num_bags, num_offsets, num_indices, bag_length,
    padding_idx, MODE: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    BLOCK_L: tl.constexpr, CLAMP: tl.constexpr,
):
    """For each position its row (num_rows: none), bag, and factor of the bag's gradient; flags[2:4]: the range."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = _bounds(bag, offsets, num_offsets, num_indices, bag_length, flags, HAS_OFFSETS, False, CLAMP)
    tl.store(flags + 2, start, mask=bag == 0)
    tl.store(flags + 3, end, mask=bag == num_bags - 1)
    slot = tl.arange(0, BLOCK_L).to(tl.int64)
    first_wrong = tl.full([BLOCK_L], NONE, tl.int64)
    one = 1.0
    if MODE == _MEAN:
        count = (end - start).to(tl.int32)
        if HAS_PADDING:
            count = _count(indices, start, end, num_rows, padding_idx, BLOCK_L, CLAMP)
        one = 1.0 / tl.maximum(count, 1).to(factors.dtype.element_ty)
    for at in range(start, end, BLOCK_L):
        position = at + slot
        row, valid, wrong = _rows(indices, position, end, num_rows, padding_idx, HAS_PADDING, CLAMP)
        first_wrong = tl.minimum(first_wrong, tl.where(wrong, position, NONE))
        inside = position < end
        tl.store(keys + position, tl.where(valid, row, num_rows), mask=inside)
        tl.store(bags + position, (bag + slot * 0).to(tl.int32), mask=inside)
        if HAS_WEIGHTS:
            weight = tl.load(weights + position, mask=inside, other=0).to(factors.dtype.element_ty)
            tl.store(factors + position, weight * one, mask=inside)
        elif MODE == _MEAN:
            tl.store(factors + position, one + tl.zeros([BLOCK_L], factors.dtype.element_ty), mask=inside)
    tl.atomic_min(flags + 1 + slot * 0, first_wrong, mask=first_wrong != NONE, sem="relaxed")


@triton.jit
def _real(key):
    """A negative key is an entry that holds nothing and only keeps the order: the complement of its neighbour's."""
    return tl.where(key < 0, -1 - key, key)


@_kernel
def segments_kernel(
    out, next_keys, partial, keys, order, bags, factors, source, grad_units, col_stride, width_units, count, sentinel,
    FIRST: tl.constexpr, HAS_FACTOR: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Sums runs of equal sorted keys.

    A program owns the run that begins at its position, no further than the end of a chunk. A run that lies within one
    chunk is a finished row. The others leave partial sums, at most two a chunk (one that came in, one that goes on),
    which the next launch adds up in the same way: a row repeated a million times costs four launches, not a million
    additions in a row.
    """
    at = tl.program_id(0).to(tl.int64)
    key = _real(tl.load(keys + at))
    begins_chunk = at % CHUNK == 0
    came_in = (at > 0) & (_real(tl.load(keys + at - 1, mask=at > 0, other=0)) == key)
    if begins_chunk | (came_in == 0):
        chunk = at // CHUNK
        chunk_end = tl.minimum((chunk + 1) * CHUNK, count.to(tl.int64))
        ahead = at + tl.arange(0, CHUNK).to(tl.int64)
        raw = tl.load(keys + ahead, mask=ahead < chunk_end, other=0)
        same = (ahead < chunk_end) & (_real(raw) == key)
        end = at + tl.sum(same.to(tl.int32), 0)
        holds = (tl.max((same & (raw >= 0)).to(tl.int32), 0) != 0) & (key < sentinel)
        goes_on = (end == chunk_end) & (end < count)
        goes_on = goes_on & (_real(tl.load(keys + end, mask=goes_on, other=0)) == key)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        width = width_units * ALIGN
        total = tl.zeros([BLOCK_L, BLOCK_D], ACC)
        stop = tl.where(holds, end, at)
        for p in range(at, stop, BLOCK_L):
            position = p + tl.arange(0, BLOCK_L).to(tl.int64)
            valid = position < stop
            if FIRST:
                entry = tl.load(order + position, mask=valid, other=0)
                row = tl.load(bags + entry, mask=valid, other=0).to(tl.int64)
            else:
                row = position
                valid = valid & (tl.load(keys + position, mask=valid, other=-1) >= 0)
            x = _tile(source, row, valid, grad_units.to(tl.int64) * ALIGN, col_stride, column, width, ALIGN).to(ACC)
            if HAS_FACTOR:
                x = x * tl.load(factors + entry, mask=valid, other=0)[:, None]
            total += x
        result = tl.sum(total, 0)
        mine = column < width
        finished = holds & (came_in == 0) & (goes_on == 0)
        tl.store(out + key.to(tl.int64) * width + column, result, mask=mine & finished)
        came_in = came_in & holds
        left = goes_on & holds & (came_in == 0)
        slot = chunk * 2 + tl.where(came_in, 0, 1)
        tl.store(partial + slot * width + column, result, mask=mine & (came_in | left))
        first_block = tl.program_id(1) == 0
        nothing = -1 - key
        tl.store(next_keys + chunk * 2, tl.where(came_in, key, nothing), mask=first_block & begins_chunk)
        tl.store(next_keys + chunk * 2 + 1, tl.where(left, key, nothing), mask=first_block & (end == chunk_end))


@_kernel
def weights_grad_kernel(
    out, grad, table, indices, offsets, flags, num_rows, row_units, col_stride, width_units, grad_stride,
    grad_col_stride, num_offsets, num_indices, bag_length, padding_idx, MODE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_PADDING: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Each looked-up row times its bag's gradient."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = _bounds(bag, offsets, num_offsets, num_indices, bag_length, flags, HAS_OFFSETS, False, CLAMP)
    slot = tl.arange(0, BLOCK_L).to(tl.int64)
    width = width_units * ALIGN
    first_wrong = tl.full([BLOCK_L], NONE, tl.int64)
    one = 1.0
    if MODE == _MEAN:
        count = (end - start).to(tl.int32)
        if HAS_PADDING:
            count = _count(indices, start, end, num_rows, padding_idx, BLOCK_L, CLAMP)
        one = 1.0 / tl.maximum(count, 1).to(ACC)
    for at in range(start, end, BLOCK_L):
        position = at + slot
        row, valid, wrong = _rows(indices, position, end, num_rows, padding_idx, HAS_PADDING, CLAMP)
        first_wrong = tl.minimum(first_wrong, tl.where(wrong, position, NONE))
        total = tl.zeros([BLOCK_L, BLOCK_D], ACC)
        for d in range(0, width, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            x = _tile(table, row, valid, row_units.to(tl.int64) * ALIGN, col_stride, column, width, ALIGN).to(ACC)
            g = tl.load(grad + bag * grad_stride + column * grad_col_stride, mask=column < width, other=0).to(ACC)
            # A row that does not count is zero, but zero times infinity is not.
            total += tl.where(valid[:, None], x * g[None, :], 0.0)
        tl.store(out + position, tl.sum(total, 1) * one, mask=position < end)
    tl.atomic_min(flags + 1 + slot * 0, first_wrong, mask=first_wrong != NONE, sem="relaxed")
