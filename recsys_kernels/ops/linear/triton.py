"""What the Triton kernels of linear layers share: rows quantized to 8 bits, tiles, the end of a layer, launches.

Rows are quantized as ``activation.py`` does it, bit for bit: the launches turn contraction to fused multiply-adds off.
"""
# mypy: allow-untyped-defs
# (Triton gives the parameters of kernels their types at launch.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .activation import (
    GELU,
    MIN_SCALE,
    RELU,
    SIGMOID,
    SILU,
    STATIC,
)
from .operands import (
    check,
)

_RELU = tl.constexpr(RELU)
_GELU = tl.constexpr(GELU)
_SIGMOID = tl.constexpr(SIGMOID)
_SILU = tl.constexpr(SILU)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_STEP = tl.constexpr(1.0 / 255.0)
# Adding it to a small number and taking it away rounds to the nearest integer, of two to the even one.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_INFINITY = tl.constexpr(float("inf"))
_LONGEST_ROW_BLOCK = 4096


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def check_qparams_on_gpu(input_qparams: torch.Tensor | None, scheme: int, device: torch.device) -> None:
    """The checks of scale and zero point of a static layer, but for their values: the kernel looks at those."""
    check(
        (scheme == STATIC) == (input_qparams is not None),
        "input_qparams (scale and zero point) belong to scheme 1 (static), and to no other",
    )
    if input_qparams is not None:
        check(input_qparams.dtype == torch.float32, f"input_qparams must be float32, but is {input_qparams.dtype}")
        check(input_qparams.shape == (2,), f"input_qparams must have shape (2,), but has {tuple(input_qparams.shape)}")
        check(input_qparams.device == device, f"input_qparams must be on the device of the weights ({device})")


def quantized(x: torch.Tensor, qparams: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows less 128, padded to 16 bytes; their scales and zero points."""
    rows, width = x.shape
    q = torch.empty(rows, -(-width // 16) * 16, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    zero = torch.empty(rows, dtype=torch.int32, device=x.device)
    block = min(_LONGEST_ROW_BLOCK, max(128, triton.next_power_of_2(width)))
    launch(
        quantize_kernel, (rows,), x.device, q, scale, zero, x, scale if qparams is None else qparams, width,
        x.stride(0), q.stride(0), STATIC=qparams is not None, BLOCK=block, num_warps=8 if block > 2048 else 4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale, zero


# A parameter a line, as the formatter has them, would be longer than what they are for.
# fmt: off
@triton.jit
def _rounded(x):
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
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
def corner(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a program's tile starts. Programs that run together share weights: eight rows of tiles go side by side."""
    across = tl.cdiv(num_columns, BLOCK_N)
    down = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    band = program // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    inside = program % (8 * across)
    return (band * 8 + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
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
def finish(out, y, bias, first_row, r, column, num_rows, num_columns, ACTIVATION: tl.constexpr,
            HAS_BIAS: tl.constexpr):
    """Stores a tile [rows r, columns] of float32 sums y after bias and activation function, in the type of out."""
    inside = column < num_columns
    if HAS_BIAS:
        y = y + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    y = activated(y, ACTIVATION)
    out += first_row.to(tl.int64) * num_columns
    mask = (r < num_rows - first_row)[:, None] & inside[None, :]
    tl.store(out + (r[:, None] * num_columns + column[None, :]), y.to(out.dtype.element_ty), mask=mask)
# fmt: on
