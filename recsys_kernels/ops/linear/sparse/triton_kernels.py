"""The Triton kernels of sparse linear layers; ``triton.py`` launches them, and says how they are tiled.

An entry is a column of a row of blocks (unstructured and 2:4: a kept weight). ``entries_kernel`` gives some rows of
such blocks and some rows of input their sums: it takes some entries at a time, reads the input's numbers in their
columns, and adds up products for each of them apart, so that nothing is summed over threads before the end.
``two_of_four_kernel`` makes dense tiles of 2:4 weights, for products of bytes, which have no NaN that a zero could
spread. The two others take the gradients of kept weights.

Whatever a structure holds, nothing outside of the arguments is read: rows end where the entries do, and a column that
is out of range has no weight.
"""
# mypy: allow-untyped-defs
# (Triton gives the parameters of kernels their types at launch.)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..triton import activated, corner, finish

_ONES_ROWS = tl.constexpr(16)  # the fewest that a product takes
# Sizes change from call to call, and nothing is gained by compiling a kernel anew for one that is 1 or divisible by 16.
_VALUES = {"num_rows", "num_columns", "width", "count", "scale_stride", "row_stride", "num_entries"}


def _kernel(function: Any) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _VALUES])


# A parameter a line, as the formatter has them, would be longer than what they are for.
# fmt: off
@triton.jit
def _columns(col, t, entries, width, COLUMNS: tl.constexpr):
    """The columns of entries of a row, and which of them there are."""
    inside = t < entries
    if COLUMNS == 0:
        code = tl.load(col + t // 4, mask=inside, other=0).to(tl.int32)
        column = t // 2 * 4 + (code >> t % 4 * 2 & 3)
    elif COLUMNS == 1:
        column = tl.load(col + t, mask=inside, other=0).to(tl.int32)
    else:
        column = tl.load(col + t // COLUMNS, mask=inside, other=0).to(tl.int32) * COLUMNS + t % COLUMNS
    return column, inside & (column >= 0) & (column < width)


@_kernel
def entries_kernel(out, x, row_scale, row_zero, values, crow, col, weight_scale, bias, num_rows, num_columns, width,
                   count, column_stride, row_stride, scale_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   INTEGERS: tl.constexpr, FLOAT: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
                   HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Some rows of a row of blocks, with ROWS x COLUMNS a block (2:4: 1 x 0), for BLOCK_M rows of input.

    TRANSPOSED: the input is [K, M], with whole tiles of M. DOT: blocks have rows enough for tensor cores, which take
    numbers of type FLOAT. INTEGERS: the input is quantized, less 128.
    """
    TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    across = tl.cdiv(num_columns, ROWS) * TILES
    strip = tl.program_id(0) % across
    block_row = strip // TILES
    i = strip % TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    n = block_row * ROWS + i
    stored = (i < ROWS) & (n < num_columns)
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if TRANSPOSED:
        x += m
    else:
        x += tl.where(m < num_rows, m, 0) * row_stride
    if COLUMNS == 0:
        entries = (width + 3) // 4 * 2
        values += block_row.to(tl.int64) * entries
        col += block_row.to(tl.int64) * ((width + 7) // 8)
    else:
        begin = tl.minimum(tl.maximum(tl.load(crow + block_row), 0), count)
        end = tl.minimum(tl.maximum(tl.load(crow + block_row + 1), begin), count)
        entries = ((end - begin) * COLUMNS).to(tl.int32)
        col += begin
        values += begin.to(tl.int64) * (ROWS * COLUMNS)
    SUM: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    weights = tl.zeros([BLOCK_R, BLOCK_E], tl.int32)
    if DOT:
        sums = tl.zeros([BLOCK_R, BLOCK_M], SUM)
    elif BLOCK_R == 1:
        sums = tl.zeros([BLOCK_E, BLOCK_M], SUM)
    else:
        sums = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_M], SUM)
    for start in range(0, entries, BLOCK_E):
        t = start + tl.arange(0, BLOCK_E)
        column, inside = _columns(col, t, entries, width, COLUMNS)
        right = tl.load(x[None, :] + (column.to(tl.int64) * column_stride)[:, None], mask=inside[:, None], other=0)
        place = t * ROWS if COLUMNS <= 1 else t // COLUMNS * (ROWS * COLUMNS) + t % COLUMNS
        if BLOCK_R == 1 and not DOT:
            left = tl.load(values + place, mask=inside, other=0).to(SUM)
            sums += left[:, None] * right.to(SUM)
            if INTEGERS:
                weights += left[None, :]
        else:
            STEP: tl.constexpr = COLUMNS if COLUMNS > 1 else 1
            mask = stored[:, None] & inside[None, :]
            left = tl.load(values + (place[None, :] + i[:, None] * STEP), mask=mask, other=0)
            if INTEGERS:
                weights += left.to(tl.int32)
            if DOT:
                if INTEGERS:
                    sums = tl.dot(left, right, sums, out_dtype=tl.int32)
                else:
                    sums = tl.dot(left.to(FLOAT), right.to(FLOAT), sums, input_precision="ieee")
            else:
                sums += left.to(SUM)[:, :, None] * right.to(SUM)[None, :, :]
    if DOT:
        total = sums
    elif BLOCK_R == 1:
        total = tl.sum(sums, 0)[None, :]
    else:
        total = tl.sum(sums, 1)
    inside_m = m < num_rows
    if INTEGERS:
        shift = 128 - tl.load(row_zero + m, mask=inside_m, other=0)
        total += tl.sum(weights, 1)[:, None] * shift[None, :]
        scale = tl.load(row_scale + m, mask=inside_m, other=0.0)
        channel = tl.load(weight_scale + n * scale_stride, mask=stored, other=0.0)
        y = total.to(tl.float32) * (scale[None, :] * channel[:, None])
    else:
        y = total
        if HAS_SCALE:
            y = y * tl.load(weight_scale + n * scale_stride, mask=stored, other=0.0)[:, None]
    if HAS_BIAS:
        y = y + tl.load(bias + n, mask=stored, other=0.0)[:, None]
    y = activated(y, ACTIVATION)
    tl.store(out + ((m * num_columns)[None, :] + n[:, None]), y.to(out.dtype.element_ty),
             mask=stored[:, None] & inside_m[None, :])


@triton.jit
def _spread(values, codes, four_columns, bytes_of_codes, start, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of rows of 2:4 weights, with zeros between them; pointers are to the rows' first ones."""
    v = start // 2 + tl.arange(0, BLOCK_K // 2)
    pairs = tl.load(values[:, None] + v[None, :], mask=(v < four_columns)[None, :], other=0)
    first, second = tl.split(tl.reshape(pairs, [BLOCK_N, BLOCK_K // 4, 2]))
    c = start // 8 + tl.arange(0, BLOCK_K // 8)
    code = tl.load(codes[:, None] + c[None, :], mask=(c < bytes_of_codes)[None, :], other=0)
    code = tl.reshape(tl.join(code & 15, code >> 4), [BLOCK_N, BLOCK_K // 4])
    low = code & 3
    high = code >> 2
    # The four columns of each code; joined so that they come out in order.
    even = tl.join(_at(0, low, high, first, second), _at(2, low, high, first, second))
    odd = tl.join(_at(1, low, high, first, second), _at(3, low, high, first, second))
    return tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_K])


@triton.jit
def _at(place: tl.constexpr, low, high, first, second):
    nothing = tl.zeros_like(first)
    return tl.where(low == place, first, nothing) + tl.where(high == place, second, nothing)


@_kernel
def two_of_four_kernel(out, q, row_scale, row_zero, values, col, weight_scale, bias, num_rows, num_columns, width,
                       q_stride, values_stride, codes_stride, scale_stride, ACTIVATION: tl.constexpr,
                       HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the result from quantized rows and 2:4 weights, of which zeros are put in their places."""
    first_row, first_column = corner(num_rows, num_columns, BLOCK_M, BLOCK_N)
    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Beyond the last row and column the tile's first ones are read, and what comes of it is not stored.
    near_row = tl.where(r < num_rows - first_row, r, 0)
    near_column = first_column + tl.where(c < num_columns - first_column, c, 0)
    a = q + first_row.to(tl.int64) * q_stride + (near_row[:, None] * q_stride + k[None, :])
    values += near_column.to(tl.int64) * values_stride
    col += near_column.to(tl.int64) * codes_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    sums = tl.zeros([_ONES_ROWS, BLOCK_N], tl.int32)
    for start in range(0, width, BLOCK_K):
        left = tl.load(a + start, mask=(k < q_stride - start)[None, :], other=0)
        right = tl.trans(_spread(values, col, values_stride, codes_stride, start, BLOCK_N, BLOCK_K))
        # A place past the last column is no weight.
        inside = (k < width - start).to(tl.int8)
        right = right * inside[:, None]
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        sums = tl.dot(tl.full([_ONES_ROWS, BLOCK_K], 1, tl.int8), right, sums, out_dtype=tl.int32)
    shift = 128 - tl.load(row_zero + first_row + near_row)
    total += shift[:, None] * tl.max(sums, 0)[None, :]
    scale = tl.load(row_scale + first_row + near_row)
    y = total.to(tl.float32) * (scale[:, None] * tl.load(weight_scale + near_column * scale_stride)[None, :])
    finish(out, y, bias, first_row, r, first_column + c, num_rows, num_columns, ACTIVATION, HAS_BIAS)


@_kernel
def gradient_kernel(out, grad, x, rows, col, num_entries, num_columns, width, depth, TWO_OF_FOUR: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The gradients of some kept weights. `grad` and `x` are [N, depth] and [K, depth], `depth` whole tiles."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = p < num_entries
    if TWO_OF_FOUR:
        entries = (width + 3) // 4 * 2
        row = (p // entries).to(tl.int32)
        t = (p % entries).to(tl.int32)
        code = tl.load(col + (row.to(tl.int64) * ((width + 7) // 8) + t // 4), mask=inside, other=0).to(tl.int32)
        column = t // 2 * 4 + (code >> t % 4 * 2 & 3)
    else:
        row = tl.load(rows + p, mask=inside, other=0)
        column = tl.load(col + p, mask=inside, other=0).to(tl.int32)
    kept = inside & (row >= 0) & (row < num_columns) & (column >= 0) & (column < width)
    m = tl.arange(0, BLOCK_M)
    left = grad + ((row.to(tl.int64) * depth)[:, None] + m[None, :])
    right = x + ((column.to(tl.int64) * depth)[:, None] + m[None, :])
    sums = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    for _ in range(0, depth, BLOCK_M):
        a = tl.load(left, mask=kept[:, None], other=0).to(tl.float32)
        b = tl.load(right, mask=kept[:, None], other=0).to(tl.float32)
        sums += a * b
        left += BLOCK_M
        right += BLOCK_M
    tl.store(out + p, tl.sum(sums, 1).to(out.dtype.element_ty), mask=inside)


@_kernel
def block_gradient_kernel(out, grad, x, rows, col, num_columns, width, depth, ROWS: tl.constexpr,
                          COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                          BLOCK_M: tl.constexpr):
    """The gradients of a tile of one block; see above."""
    DOWN: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    ACROSS: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // (DOWN * ACROSS)
    tile = tl.program_id(0) % (DOWN * ACROSS)
    i = tile // ACROSS * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tile % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(rows + block) * ROWS + i
    column = tl.load(col + block).to(tl.int32) * COLUMNS + j
    kept_row = (i < ROWS) & (row >= 0) & (row < num_columns)
    kept_column = (j < COLUMNS) & (column >= 0) & (column < width)
    m = tl.arange(0, BLOCK_M)
    left = grad + ((row.to(tl.int64) * depth)[:, None] + m[None, :])
    right = x + ((column.to(tl.int64) * depth)[:, None] + m[None, :])
    sums = tl.zeros([BLOCK_R, BLOCK_C, BLOCK_M], tl.float32)
    for _ in range(0, depth, BLOCK_M):
        a = tl.load(left, mask=kept_row[:, None], other=0).to(tl.float32)
        b = tl.load(right, mask=kept_column[:, None], other=0).to(tl.float32)
        sums += a[:, None, :] * b[None, :, :]
        left += BLOCK_M
        right += BLOCK_M
    # Past N and K there is no weight, and no gradient, whatever the others hold.
    kept = kept_row[:, None] & kept_column[None, :]
    result = tl.where(kept, tl.sum(sums, 2), 0.0)
    place = out + block.to(tl.int64) * (ROWS * COLUMNS) + (i[:, None] * COLUMNS + j[None, :])
    tl.store(place, result.to(out.dtype.element_ty), mask=(i < ROWS)[:, None] & (j < COLUMNS)[None, :])
# fmt: on
