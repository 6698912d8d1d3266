"""The sparse linear operators on Triton kernels, for NVIDIA and AMD GPUs.

Nothing waits for the GPU, so that calls can be captured in a CUDA graph. Structures are not looked into (see
``spec.py``): a wrong one gives wrong results, and reads nothing outside of the arguments. A static scale or zero point
that is not valid gives NaN.

A layer over few rows reads them as they are. More rows are first transposed (schemes 0 and 1: once they are
quantized), so that the numbers of a column lie side by side: a kept weight then is one wide load for many rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import triton as linear_triton
from ..activation import (
    DYNAMIC,
    STATIC,
    WEIGHT_ONLY,
)
from ..operands import (
    FLOATS,
    check,
    check_floats,
    check_width,
)
from . import reference
from . import triton_kernels as kernels
from .spec import SparseLayer, block_shape

# Places of rows and columns are counted in 32 bits; within a tile of two_of_four_kernel, places of its 128 rows.
_MOST_FEATURES = 1 << 28
_MOST_COLUMNS = 1 << 24
# Up to this many rows of input are gathered as they are.
_FEW_ROWS = 8
# Products of a program at a time: 32 a thread.
_PRODUCTS = 1024
# With this many rows of a block, tensor cores are worth it.
_DOT_ROWS = 16
_GRADIENT_ENTRIES = 16
_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tile(NamedTuple):
    """Rows of a block, entries and rows of input that a program takes at once, and how it is compiled."""

    block_rows: int
    entries: int
    rows: int
    dot: bool
    warps: int


def default_tile(rows: int, block_rows: int, entries: int, product: torch.dtype) -> Tile:
    """The tile of a layer.

    Args:
        rows: of input.
        block_rows: of blocks; 1: unstructured or 2:4.
        entries: that a row of blocks has on average.
        product: what is multiplied: int8 of quantized input, else a float type.
    """
    height = min(16, triton.next_power_of_2(block_rows))
    if rows > _FEW_ROWS and height >= _DOT_ROWS and product != torch.float32:
        return Tile(height, 64 if product == torch.int8 else 32, 64 if rows <= 64 else 128, True, 4)
    if rows <= _FEW_ROWS:
        width = triton.next_power_of_2(max(1, rows))
    else:
        width = min(triton.next_power_of_2(max(rows, 32)), 128 if height == 1 else 64)
    # Long rows of few inputs: more of their numbers are on their way, in as many warps.
    most = 4 * _PRODUCTS if rows <= _FEW_ROWS or height > 4 else _PRODUCTS
    depth = max(2, most // (height * width))
    if rows <= _FEW_ROWS:
        depth = min(depth, max(32, triton.next_power_of_2(max(1, entries))))
    return Tile(height, depth, width, False, max(1, min(4, height * depth * width // _PRODUCTS)))


# ---- arguments ---------------------------------------------------------------------------------------------------


def _check_sizes(out_features: int, in_features: int) -> None:
    for name, size in (("out_features", out_features), ("in_features", in_features)):
        check(size <= _MOST_FEATURES, f"{name} must be at most {_MOST_FEATURES} on a GPU, but is {size}")


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that holds nothing."""
    return torch.empty_like(tensor, device="meta")


def _check_arguments(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> None:
    """The reference's checks but for what is in tensors, which are on the GPU."""
    check_floats(input, dtype)
    values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams, *numbers = layer
    scheme, activation = numbers
    tensors = {
        "crow_indices": crow_indices, "col_indices": col_indices, "weight_scale": weight_scale, "bias": bias,
    }  # fmt: skip
    for name, tensor in tensors.items():
        same = tensor is None or tensor.device == values.device
        check(same, f"{name} must be on the device of values ({values.device})")
    linear_triton.check_qparams_on_gpu(input_qparams, scheme, values.device)
    scale, added = (None if one is None else _shape(one) for one in (weight_scale, bias))
    structure = (_shape(crow_indices), _shape(col_indices), out_features, in_features)
    rest = DYNAMIC if scheme == STATIC else scheme
    reference.check_layer(SparseLayer(_shape(values), *structure, scale, added, None, rest, activation))
    check(input.dim() >= 1, "input must have at least 1 dimension, but has 0")
    check(input.device == values.device, f"input is on {input.device}, but values on {values.device}")
    check_width(input, in_features, out_features)
    _check_sizes(out_features, in_features)


def _columns_first(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    """[M, K] as [K, M], with zeros up to a multiple of rows."""
    rows, columns = matrix.shape
    whole = -(-rows // multiple) * multiple
    out = matrix.new_empty(columns, whole)
    out[:, :rows].copy_(matrix.t())
    out[:, rows:].zero_()
    return out


def _product_type(values: torch.dtype, input: torch.dtype, scheme: int) -> torch.dtype:
    """What is multiplied: half precision only where no number is rounded by that. Every int8 is a number of each."""
    if scheme != WEIGHT_ONLY:
        return torch.int8
    return input if values in (input, torch.int8) else torch.float32


# ---- one layer ---------------------------------------------------------------------------------------------------


def sparse_linear(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
    """One layer over [..., K]: quantization of the input, product with the kept weights, scales, bias, activation."""
    _check_arguments(input, layer, dtype)
    values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams, *numbers = layer
    scheme, activation = numbers
    out = input.new_empty(*input.shape[:-1], out_features, dtype=dtype)
    if out.numel() == 0:
        return out
    x = input.reshape(-1, in_features)
    rows = x.shape[0]
    if weight_scale is not None and reference.scale_group(out_features, in_features, weight_scale.shape):
        return _grouped(out, x, layer)
    if weight_scale is not None and weight_scale.stride(0) != 0:
        weight_scale = weight_scale.contiguous()
    bias = out if bias is None else bias.float().contiguous()
    has_bias = bias is not out
    values, col_indices = values.contiguous(), col_indices.contiguous()
    integers = scheme != WEIGHT_ONLY
    # The kernel reads nothing through the pointers that are in the place of what is not there.
    row_scale = row_zero = out
    if integers:
        qparams = None if input_qparams is None else input_qparams.contiguous()
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        x, row_scale, row_zero = linear_triton.quantized(x, qparams)
    block_rows, block_columns = block_shape(values)
    if block_rows == 0 and integers and rows > _FEW_ROWS and out_features < _MOST_COLUMNS:
        _two_of_four(out, x, row_scale, row_zero, values, col_indices, weight_scale, bias, in_features, activation,
                     has_bias)  # fmt: skip
        return out
    height = max(1, block_rows)
    strips = triton.cdiv(out_features, height)
    product = _product_type(values.dtype, x.dtype, scheme)
    tile = default_tile(rows, height, values.numel() // (strips * height), product)
    transposed = rows > _FEW_ROWS
    if transposed:
        x = _columns_first(x[:, :in_features], tile.rows)
    # The interpreter multiplies the bits of bfloat16.
    number = _TRITON_TYPES.get(product, tl.float32)
    number = tl.float32 if triton.knobs.runtime.interpret else number
    grid = (strips * triton.cdiv(height, tile.block_rows) * triton.cdiv(rows, tile.rows),)
    linear_triton.launch(
        kernels.entries_kernel, grid, x.device, out, x, row_scale, row_zero, values, crow_indices.contiguous(),
        col_indices, out if weight_scale is None else weight_scale, bias, rows, out_features, in_features,
        col_indices.shape[0], *(x.stride() if transposed else x.stride()[::-1]),
        0 if weight_scale is None else weight_scale.stride(0), ROWS=height, COLUMNS=block_columns, INTEGERS=integers,
        FLOAT=number, TRANSPOSED=transposed, ACTIVATION=activation, HAS_SCALE=weight_scale is not None,
        HAS_BIAS=has_bias, DOT=tile.dot, BLOCK_R=tile.block_rows, BLOCK_E=tile.entries, BLOCK_M=tile.rows,
        num_warps=tile.warps, num_stages=3 if tile.dot and torch.version.hip is None else 2,
        enable_fp_fusion=not integers,
    )  # fmt: skip
    return out


# What a GPU reads is the canonical operands: nothing is kept between calls.
sparse_layer = sparse_linear


def _grouped(out: torch.Tensor, x: torch.Tensor, layer: SparseLayer) -> torch.Tensor:
    """Where groups of columns have scales of their own: a layer of the floats that its numbers stand for."""
    values, crow, col, n, k, weight_scale, bias, qparams, scheme, activation = layer
    assert weight_scale is not None
    row_scale = None
    if scheme != WEIGHT_ONLY:
        x = x if x.stride(1) == 1 or k == 1 else x.contiguous()
        q, row_scale, zero = linear_triton.quantized(x, None if qparams is None else qparams.contiguous())
        x = (q[:, :k].float() + (128 - zero).unsqueeze(1)) * row_scale.unsqueeze(1)
    floats = reference.dequantized(values, crow, col, n, k, weight_scale)
    of_floats = SparseLayer(floats, crow, col, n, k, None, bias, None, WEIGHT_ONLY, activation)
    result = sparse_linear(x, of_floats, out.dtype)
    if row_scale is not None:
        # Also where nothing is kept that could spread it.
        result.masked_fill_(row_scale.isnan().unsqueeze(1), float("nan"))
    return result.reshape(out.shape)


def _two_of_four(
    out: torch.Tensor,
    q: torch.Tensor,
    row_scale: torch.Tensor,
    row_zero: torch.Tensor,
    values: torch.Tensor,
    col_indices: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor,
    in_features: int,
    activation: int,
    has_bias: bool,
) -> None:
    assert weight_scale is not None
    rows, columns = q.shape[0], values.shape[0]
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, 64),)
    linear_triton.launch(
        kernels.two_of_four_kernel, grid, q.device, out, q, row_scale, row_zero, values, col_indices, weight_scale,
        bias, rows, columns, in_features, q.stride(0), values.shape[1], col_indices.shape[1], weight_scale.stride(0),
        ACTIVATION=activation, HAS_BIAS=has_bias, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2,
        enable_fp_fusion=False,
    )  # fmt: skip


# ---- the gradient of kept weights --------------------------------------------------------------------------------


def _check_gradient(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
) -> None:
    """The reference's checks but for what is in tensors."""
    for name, tensor in (("grad_output", grad_output), ("input", input)):
        check(tensor.dtype in FLOATS, f"{name} must be float32, float16 or bfloat16, but is {tensor.dtype}")
        check(tensor.dim() == 2, f"{name} must have 2 dimension(s), but has {tensor.dim()}")
    for name, tensor in (("grad_output", grad_output), ("input", input), ("crow_indices", crow_indices)):
        check(tensor.device == col_indices.device, f"{name} is on {tensor.device}, but col_indices elsewhere")
    check(dtype in FLOATS, f"dtype must be float32, float16 or bfloat16, but is {dtype}")
    given, rows = grad_output.shape[0], input.shape[0]
    check(given == rows, f"grad_output must have as many rows as input, {rows}, but has {given}")
    sizes = grad_output.shape[1], input.shape[1]
    reference.check_structure(_shape(crow_indices), _shape(col_indices), *sizes, block_rows, block_columns)
    _check_sizes(*sizes)


def sparse_weight_gradient(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[M, N] and [M, K] to the products that belong to kept weights, in the shape of values."""
    _check_gradient(grad_output, input, crow_indices, col_indices, block_rows, block_columns, dtype)
    columns, width = grad_output.shape[1], input.shape[1]
    col_indices, count = col_indices.contiguous(), col_indices.shape[0]
    shape: tuple[int, ...] = (count, block_rows, block_columns)
    if block_rows == 0:
        shape = (columns, -(-width // 4) * 2)
    elif block_rows == block_columns == 1:
        shape = (count,)
    out = input.new_empty(shape, dtype=dtype)
    if out.numel() == 0:
        return out
    depth = min(128, max(16, triton.next_power_of_2(max(1, input.shape[0]))))
    grad, x = _columns_first(grad_output, depth), _columns_first(input, depth)
    sizes = (columns, width, x.shape[1])
    rows = col_indices if block_rows == 0 else reference.block_rows_of(crow_indices, count)
    if len(shape) < 3:
        grid = (triton.cdiv(out.numel(), _GRADIENT_ENTRIES),)
        linear_triton.launch(
            kernels.gradient_kernel, grid, x.device, out, grad, x, rows, col_indices, out.numel(), *sizes,
            TWO_OF_FOUR=block_rows == 0, BLOCK_E=_GRADIENT_ENTRIES, BLOCK_M=depth, num_warps=4,
        )  # fmt: skip
        return out
    tile_rows, tile_columns = (min(16, triton.next_power_of_2(size)) for size in shape[1:])
    # Sums of a program, which one warp has 32 of a thread for.
    depth = min(depth, max(16, 4096 // (tile_rows * tile_columns)))
    warps = max(1, min(4, tile_rows * tile_columns * depth // _PRODUCTS))
    grid = (count * triton.cdiv(block_rows, tile_rows) * triton.cdiv(block_columns, tile_columns),)
    linear_triton.launch(
        kernels.block_gradient_kernel, grid, x.device, out, grad, x, rows, col_indices, *sizes, ROWS=block_rows,
        COLUMNS=block_columns, BLOCK_R=tile_rows, BLOCK_C=tile_columns, BLOCK_M=depth, num_warps=warps,
    )  # fmt: skip
    return out
