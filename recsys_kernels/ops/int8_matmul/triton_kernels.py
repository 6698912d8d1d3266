"""The Triton kernels of int8_linear; ``triton.py`` launches them, and says how they are tiled.

``quantize_kernel`` quantizes each row once, ``int8_kernel`` multiplies. Quantized numbers are 0 to 255, but products
are of signed bytes: rows are stored less 128, and what that and the zero point take from a sum is given back through
the sum of the weights. That is a product with ones by the same instruction: sums over a tile's columns in registers
would need as many instructions as unpacking all of it.

The arithmetic of the quantization is that of ``reference.py``, bit for bit: the launches turn contraction to fused
multiply-adds off.
"""
# mypy: allow-untyped-defs
# (Triton gives the parameters of kernels their types at launch.)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .reference import GELU, MIN_SCALE, RELU, SIGMOID, SILU

_RELU = tl.constexpr(RELU)
_GELU = tl.constexpr(GELU)
_SIGMOID = tl.constexpr(SIGMOID)
_SILU = tl.constexpr(SILU)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_STEP = tl.constexpr(1.0 / 255.0)
# Adding it to a small number and taking it away rounds to the nearest integer, of two to the even one.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_INFINITY = tl.constexpr(float("inf"))
_ONES_ROWS = tl.constexpr(16)  # the fewest that a product takes
# Sizes change from call to call, and nothing is gained by compiling a kernel anew for one that is 1 or divisible by 16.
# Strides and K are what wide loads depend on.
_VALUES = {"num_rows", "num_columns", "scale_row_stride", "scale_group_stride"}


def _kernel(function: Any) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _VALUES])


# A parameter a line, as the formatter has them, would be longer than what they are for.
# fmt: off
@triton.jit
def _rounded(x):
    return (x + _ROUNDER) - _ROUNDER


@_kernel
def quantize_kernel(q, row_scale, row_zero, x, qparams, width, x_stride, q_stride, STATIC: tl.constexpr,
                    BLOCK: tl.constexpr):
    """One row: its scale (NaN if it holds NaN or infinity), its zero point, its numbers less 128."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    q += row * q_stride
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + k, mask=k < width, other=0).to(tl.float32)
        finite = tl.abs(value) < _INFINITY
        value = tl.where(finite, value, 0.0)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
        wrong = tl.where(finite, wrong, 1)
    right = tl.max(wrong, 0) == 0
    if STATIC:
        scale = tl.load(qparams)
        zero = tl.load(qparams + 1)
        valid = (scale > 0.0) & (scale < _INFINITY) & (zero >= 0.0) & (zero <= 255.0) & (_rounded(zero) == zero)
        scale = tl.where(valid, scale, 1.0)
        zero = tl.where(valid, zero, 0.0)
        right = right & valid
        inverse = tl.div_rn(1.0, scale)
    else:
        scale = tl.maximum(tl.max(high, 0) * _STEP - tl.min(low, 0) * _STEP, _MIN_SCALE)
        inverse = tl.div_rn(1.0, scale)
        zero = tl.minimum(tl.maximum(_rounded(-tl.min(low, 0) * inverse), 0.0), 255.0)
    tl.store(row_scale + row, tl.where(right, scale, float("nan")))
    tl.store(row_zero + row, zero.to(tl.int32))
    for start in range(0, q_stride, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + k, mask=k < width, other=0).to(tl.float32)
        value = tl.where(tl.abs(value) < _INFINITY, value, 0.0)
        steps = tl.minimum(tl.maximum(value * inverse, -zero), 255.0 - zero)
        tl.store(q + k, (_rounded(steps) + zero - 128.0).to(tl.int8), mask=k < q_stride)


@triton.jit
def _corner(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a program's tile starts. Programs that run together share weights: eight rows of tiles go side by side."""
    across = tl.cdiv(num_columns, BLOCK_N)
    down = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    band = program // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    inside = program % (8 * across)
    return (band * 8 + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    """NaN stays NaN in each of them."""
    if ACTIVATION == _RELU:
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == _SIGMOID:
        y = 1.0 / (1.0 + tl.exp(-y))
    elif ACTIVATION == _SILU:
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == _GELU:
        # x * Phi(x), with the tail 1 - Phi(|x|) from Abramowitz and Stegun 7.1.26 (error 1.5e-7 of erf).
        size = tl.abs(y)
        t = 1.0 / (size * (0.3275911 * 0.70710678) + 1.0)
        p = 1.061405429 * t - 1.453152027
        p = p * t + 1.421413741
        p = p * t - 0.284496736
        p = p * t + 0.254829592
        tail = p * t * tl.exp(-0.5 * y * y) * (0.5 * size)
        # An infinite number has no tail.
        y = tl.where(y < 0.0, 0.0, y) - tl.where(size < _INFINITY, tail, 0.0)
    return y


@triton.jit
def _finish(out, y, bias, first_row, r, column, num_rows, num_columns, ACTIVATION: tl.constexpr,
            HAS_BIAS: tl.constexpr):
    inside = column < num_columns
    if HAS_BIAS:
        y = y + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    y = _activated(y, ACTIVATION)
    out += first_row.to(tl.int64) * num_columns
    mask = (r < num_rows - first_row)[:, None] & inside[None, :]
    tl.store(out + (r[:, None] * num_columns + column[None, :]), y.to(out.dtype.element_ty), mask=mask)


@_kernel
def int8_kernel(out, q, row_scale, row_zero, weight, weight_scale, bias, num_rows, num_columns, width, q_stride,
                weight_stride, scale_row_stride, scale_group_stride, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
                HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the result from quantized rows. With groups BLOCK_K is their length."""
    first_row, first_column = _corner(num_rows, num_columns, BLOCK_M, BLOCK_N)
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
    _finish(out, y, bias, first_row, r, first_column + c, num_rows, num_columns, ACTIVATION, HAS_BIAS)


@_kernel
def weight_only_kernel(out, x, weight, weight_scale, bias, num_rows, num_columns, width, x_stride, weight_stride,
                       scale_row_stride, scale_group_stride, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
                       HAS_BIAS: tl.constexpr, FLOAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr):
    """A tile of the result from rows of floats. BLOCK_K divides groups."""
    first_row, first_column = _corner(num_rows, num_columns, BLOCK_M, BLOCK_N)
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
    _finish(out, y, bias, first_row, r, first_column + c, num_rows, num_columns, ACTIVATION, HAS_BIAS)
# fmt: on
