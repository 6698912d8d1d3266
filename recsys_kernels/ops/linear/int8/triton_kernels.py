"""The Triton kernels of int8_linear; ``triton.py`` launches them, and says how they are tiled.

Rows are quantized once (see ``../triton.py``), and ``int8_kernel`` multiplies. Quantized numbers are 0 to 255, but
products are of signed bytes: rows are stored less 128, and what that and the zero point take from a sum is given back
through the sum of the weights. That is a product with ones by the same instruction: sums over a tile's columns in
registers would need as many instructions as unpacking all of it.
"""
# mypy: allow-untyped-defs
# (Triton gives the parameters of kernels their types at launch.)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..triton import corner, finish

_ONES_ROWS = tl.constexpr(16)  # the fewest that a product takes
# Sizes change from call to call, and nothing is gained by compiling a kernel anew for one that is 1 or divisible by 16.
# Strides and K are what wide loads depend on.
_VALUES = {"num_rows", "num_columns", "scale_row_stride", "scale_group_stride"}


def _kernel(function: Any) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _VALUES])


# A parameter a line, as the formatter has them, would be longer than what they are for.
# fmt: off
@_kernel
def int8_kernel(out, q, row_scale, row_zero, weight, weight_scale, bias, num_rows, num_columns, width, q_stride,
                weight_stride, scale_row_stride, scale_group_stride, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
                HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the result from quantized rows. With groups BLOCK_K is their length."""
    first_row, first_column = corner(num_rows, num_columns, BLOCK_M, BLOCK_N)
    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Beyond the last row and column the tile's first ones are read, and what comes of it is not stored.
    near_row = tl.where(r < num_rows - first_row, r, 0)
    near_column = tl.where(c < num_columns - first_column, c, 0)
    a = q + first_row.to(tl.int64) * q_stride + (near_row[:, None] * q_stride + k[None, :])
    b = weight + first_column.to(tl.int64) * weight_stride + (near_column[None, :] * weight_stride + k[:, None])
    scales = weight_scale + (first_column + near_column).to(tl.int64) * scale_row_stride
    shift = 128 - tl.load(row_zero + first_row + near_row)
    scale = tl.load(row_scale + first_row + near_row)
    ones = tl.full([_ONES_ROWS, BLOCK_K], 1, tl.int8)
    if GROUP == 0:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        sums = tl.zeros([_ONES_ROWS, BLOCK_N], tl.int32)
        for start in range(0, width, BLOCK_K):
            left = tl.load(a, mask=(k < q_stride - start)[None, :], other=0)
            right = tl.load(b, mask=(k < width - start)[:, None], other=0)
            total = tl.dot(left, right, total, out_dtype=tl.int32)
            sums = tl.dot(ones, right, sums, out_dtype=tl.int32)
            a += BLOCK_K
            b += BLOCK_K
        total += shift[:, None] * tl.max(sums, 0)[None, :]
        y = total.to(tl.float32) * (scale[:, None] * tl.load(scales)[None, :])
    else:
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_K):
            left = tl.load(a, mask=(k < q_stride - start)[None, :], other=0)
            right = tl.load(b, mask=(k < width - start)[:, None], other=0)
            total = tl.dot(left, right, out_dtype=tl.int32)
            total += shift[:, None] * tl.max(tl.dot(ones, right, out_dtype=tl.int32), 0)[None, :]
            y += total.to(tl.float32) * tl.load(scales)[None, :]
            a += BLOCK_K
            b += BLOCK_K
            scales += scale_group_stride
        y = y * scale[:, None]
    finish(out, y, bias, first_row, r, first_column + c, num_rows, num_columns, ACTIVATION, HAS_BIAS)


@_kernel
def weight_only_kernel(out, x, weight, weight_scale, bias, num_rows, num_columns, width, x_stride, weight_stride,
                       scale_row_stride, scale_group_stride, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
                       HAS_BIAS: tl.constexpr, FLOAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr):
    """A tile of the result from rows of floats. BLOCK_K divides groups."""
    first_row, first_column = corner(num_rows, num_columns, BLOCK_M, BLOCK_N)
    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    near_row = tl.where(r < num_rows - first_row, r, 0)
    near_column = tl.where(c < num_columns - first_column, c, 0)
    a = x + first_row.to(tl.int64) * x_stride + (near_row[:, None] * x_stride + k[None, :])
    b = weight + first_column.to(tl.int64) * weight_stride + (near_column[None, :] * weight_stride + k[:, None])
    scales = weight_scale + (first_column + near_column).to(tl.int64) * scale_row_stride
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        inside = k < width - start
        # Every int8 is a number of each of the types.
        left = tl.load(a, mask=inside[None, :], other=0).to(FLOAT)
        right = tl.load(b, mask=inside[:, None], other=0).to(FLOAT)
        if GROUP == 0:
            y = tl.dot(left, right, y, input_precision="ieee")
        else:
            scale = tl.load(scales + start // GROUP * scale_group_stride)
            y += tl.dot(left, right, input_precision="ieee") * scale[None, :]
        a += BLOCK_K
        b += BLOCK_K
    if GROUP == 0:
        y = y * tl.load(scales)[None, :]
    finish(out, y, bias, first_row, r, first_column + c, num_rows, num_columns, ACTIVATION, HAS_BIAS)
# fmt: on
