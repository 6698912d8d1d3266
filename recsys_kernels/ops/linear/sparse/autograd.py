"""Sparse layers as differentiable functions: gradients of input, float values and bias.

The gradient of int8 layers is that of the straight-through estimator (Bengio et al., "Estimating or Propagating
Gradients Through Stochastic Neurons for Conditional Computation", 2013): as if neither input nor weights had been
rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....backends import selection
from ..activation import (
    EPILOGUES,
    NONE,
    WEIGHT_ONLY,
    epilogue_number,
    scheme_number,
)
from ..gradients import (
    autocast_type,
    before_activation,
    check_tensor,
    is_transformed,
    needs_again,
    needs_output,
    register_autocast,
    register_rows,
    straight_through,
)
from . import reference
from .spec import SparseLayer, block_shape
from .structure import Structure, transpose_structure

register_rows("sparse_linear")
register_rows("sparse_packed")
register_autocast("sparse_packed")


def _input_gradient(grad: torch.Tensor, layer: SparseLayer, structure: Structure | None) -> torch.Tensor:
    """float32 [M, N] to [M, K], through the transposed weights."""
    values, crow, col, out_features, in_features, weight_scale, *_ = layer
    if structure is None:
        transposed = transpose_structure(crow, col, *block_shape(values), out_features, in_features)
    elif structure.packs(values):
        return structure.input_gradient(grad, values)
    else:
        transposed = structure.transposed()
    scale = None
    if weight_scale is not None and reference.scale_group(out_features, in_features, weight_scale.shape):
        # A group of columns is a group of rows of the transposed weights, and rows share no scale.
        values = reference.dequantized(values, crow, col, out_features, in_features, weight_scale)
    elif weight_scale is not None:
        # The scales of rows are scales of columns of the transposed weights: the gradient is multiplied instead.
        grad = grad * weight_scale.reshape(-1)
        scale = weight_scale.new_ones(transposed.out_features)
    run = selection.implementation("sparse_linear", grad)
    weights = (transposed.values(values), transposed.crow_indices, transposed.col_indices)
    flipped = SparseLayer(*weights, transposed.out_features, out_features, scale, None, None, WEIGHT_ONLY, NONE)
    result = run(grad, *flipped, torch.float32)
    return result[:, :in_features]


class _SparseLinear(torch.autograd.Function):
    """The gradients of input, float values and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        dtype: torch.dtype,
        prepared: Callable[[torch.Tensor], torch.Tensor] | None,
        structure: Structure | None,
        *operands: Any,
    ) -> torch.Tensor:
        layer = SparseLayer(*operands)
        ctx.sizes, ctx.scheme, ctx.activation = layer[3:5], layer.scheme, layer.activation
        ctx.dtype, ctx.bias_dtype = input.dtype, None if layer.bias is None else layer.bias.dtype
        ctx.structure = structure
        if prepared is None:
            out = selection.implementation("sparse_linear", input)(input, *layer, dtype)
        else:
            out = prepared(input)
        again = needs_again(layer.activation)
        ctx.save_for_backward(
            input if again or ctx.needs_input_grad[4] else None,
            layer.values,
            layer.crow_indices if structure is None else structure.crow_indices,
            layer.col_indices if structure is None else structure.col_indices,
            layer.weight_scale,
            layer.bias if again else None,
            layer.input_qparams if again else None,
            out if needs_output(layer.activation) else None,
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, values, crow, col, weight_scale, bias, input_qparams, out = ctx.saved_tensors
        out_features, in_features = ctx.sizes
        structure = (values, crow, col, out_features, in_features)
        layer = SparseLayer(*structure, weight_scale, bias, input_qparams, ctx.scheme, NONE)

        # For a second derivative.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()

        def again() -> torch.Tensor:
            if twice:
                return transformed(input, layer, torch.float32)
            return selection.implementation("sparse_linear", input)(input, *layer, torch.float32)

        grad = before_activation(grad, ctx.activation, out, again)
        shape = grad.shape[:-1]
        # Not -1, which an empty batch leaves open.
        rows = grad.reshape(shape.numel(), out_features)
        grad_input = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = rows @ dense_weight(layer) if twice else _input_gradient(rows, layer, ctx.structure)
            grad_input = grad_input.to(ctx.dtype).reshape(*shape, in_features)
        if ctx.needs_input_grad[4] and twice:
            at, inside = _places(layer)
            everywhere = rows.t() @ input.float().reshape(shape.numel(), in_features)
            grad_values = torch.where(inside, everywhere.reshape(-1)[at], 0.0).to(values.dtype)
        elif ctx.needs_input_grad[4]:
            run = selection.implementation("sparse_weight_gradient", rows)
            flat = input.reshape(shape.numel(), in_features)
            grad_values = run(rows, flat, crow, col, *block_shape(values), values.dtype).reshape(values.shape)
        if ctx.needs_input_grad[10]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return (grad_input, None, None, None, grad_values, *[None] * 5, grad_bias, *[None] * 3)


def _places(layer: SparseLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every value its place in a flat [N * K], and whether it is a weight: blocks may reach over the end."""
    n, k = layer.out_features, layer.in_features
    rows, columns = reference.places(layer.values.detach(), layer.crow_indices, layer.col_indices)
    inside = ((rows < n) & (columns < k)).expand(layer.values.shape)
    return (rows.clamp(0, n - 1) * k + columns.clamp(0, k - 1)).expand(layer.values.shape), inside


def dense_weight(layer: SparseLayer) -> torch.Tensor:
    """What the weights stand for, float32 [N, K], differentiable in the values."""
    n, k, scale = layer.out_features, layer.in_features, layer.weight_scale
    at, inside = _places(layer)
    values = torch.where(inside, layer.values.float(), 0.0).reshape(-1)
    dense = values.new_zeros(n * k).index_add(0, at.reshape(-1), values).reshape(n, k)
    if scale is None:
        return dense
    group = reference.scale_group(n, k, scale.shape)
    scales = scale.repeat_interleave(group, 1)[:, :k] if group else scale.reshape(n, 1)
    return dense * scales


def transformed(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
    """:func:`run_layer` with derivatives of every kind and order, through dense weights: slower."""
    plain = layer._replace(bias=None if layer.bias is None else layer.bias.detach(), activation=NONE)

    def exact(rows: torch.Tensor) -> torch.Tensor:
        return selection.implementation("sparse_linear", rows)(rows, *plain, torch.float32)

    rounds = None if layer.weight_scale is None else exact
    return straight_through(input, dense_weight(layer), layer.bias, layer.activation, dtype, rounds)


def run_layer(
    input: torch.Tensor,
    layer: SparseLayer,
    dtype: torch.dtype,
    prepared: Callable[[torch.Tensor], torch.Tensor] | None = None,
    structure: Structure | None = None,
) -> torch.Tensor:
    """One layer, differentiable in input, float values and bias.

    Args:
        prepared: gives the result from what was made of the layer before; None: the operator.
        structure: of the layer, where it is kept from one call to the next; else None.
    """
    if not torch.compiler.is_compiling() and is_transformed():
        return transformed(input, layer, dtype)
    bias = layer.bias
    trained = input.requires_grad or layer.values.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _SparseLinear.apply(input, dtype, prepared, structure, *layer)
    if prepared is not None:
        return prepared(input)
    run = selection.implementation("sparse_linear", input)
    return run(input, *layer, selection.dtype_argument(dtype))


def _of_values(
    values: torch.Tensor, activation: str | None, weight_scale: torch.Tensor | None, out_features: int
) -> tuple[str, torch.Tensor | None]:
    """How the input is taken, and scales as the operators take them."""
    if weight_scale is not None and weight_scale.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("sparse_linear: weight_scale has no gradient; detach() it")
    if activation is None:
        activation = "dynamic" if values.dtype == torch.int8 else "weight_only"
    elif values.dtype != torch.int8 and (activation != "weight_only" or weight_scale is not None):
        hint = f" (a function to apply is epilogue={activation!r})" if activation in EPILOGUES else ""
        raise ValueError(f"activation={activation!r} is for int8 values, but values are {values.dtype}{hint}")
    if weight_scale is not None:
        if weight_scale.numel() == 1:
            weight_scale = weight_scale.reshape(1).expand(out_features)
        elif weight_scale.shape[1:] == (1,):
            weight_scale = weight_scale.reshape(-1)
    return activation, weight_scale


def sparse_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int | None = None,
    bias: torch.Tensor | None = None,
    *,
    in_features: int | None = None,
    weight_scale: torch.Tensor | None = None,
    activation: str | None = None,
    input_qparams: torch.Tensor | None = None,
    epilogue: str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.linear`` with weights of which only those that are kept are stored and multiplied.

    Args:
        input: [..., K], float32, float16 or bfloat16. Has a gradient.
        values: the kept weights, in the order of rows and columns: [nnz] (unstructured), [blocks, r, c] (blocks of r
            output rows and c columns) or [N, ceil(K / 4) * 2] (2:4). A float type, which has a gradient, or int8.
        crow_indices: int32 or int64, where every row, or row of blocks, begins: [N + 1] or [ceil(N / r) + 1]; of 2:4
            empty.
        col_indices: int32 or int64, the column of every weight, or block, ascending in each row: [nnz] or [blocks]. Of
            2:4 uint8 [N, ceil(K / 8)]: 4 bits for every four columns, of the even fours in the lower half of a byte;
            the position of the first weight in the two lower bits, of the second in the upper ones.
        out_features: N; default: what the others say, with whole blocks.
        bias: [N], a float type. Has a gradient.
        in_features: K; default: that of ``input``.
        weight_scale: float32 of int8 values: [N], [N, 1], one number for all, or [N, ceil(K / group)] where groups of
            32, 64 or 128 columns share one. Which of these follows from its shape; sums are then taken in float32, of
            what the quantized numbers stand for.
        activation: how int8 layers take the input: ``"dynamic"`` (the default; quantized to 8 bits by the range of each
            row), ``"static"`` (by ``input_qparams``) or ``"weight_only"`` (in float). None with float values.
        input_qparams: float32 [2], scale and zero point (an integer from 0 to 255), for ``"static"``.
        epilogue: None, ``"relu"``, ``"gelu"``, ``"sigmoid"`` or ``"silu"``: applied to the result.
        dtype: of the result; default: that of autocast where it is on, else that of ``input``.

    Returns:
        [..., N]. NaN and infinity of the input reach what is computed from them through kept weights; int8 products
        give a row of NaN for a row that holds one.

    Raises:
        ValueError: an unknown name.
        IndexError: a column that is out of range; names its position.
        RuntimeError: shapes, types or a structure that do not fit together, named, with the position (on a GPU, which
            nobody waits for, structures and scales are not looked into).
    """
    check_tensor(input)
    if in_features is None:
        if input.dim() == 0:
            raise RuntimeError("input must have at least 1 dimension, but has 0")
        in_features = input.shape[-1]
    if out_features is None:
        rows = block_shape(values)[0]
        out_features = values.shape[0] if rows == 0 else max(0, crow_indices.shape[0] - 1) * rows
    activation, weight_scale = _of_values(values, activation, weight_scale, out_features)
    numbers = scheme_number(activation), epilogue_number(epilogue)
    structure = (values, crow_indices, col_indices, out_features, in_features)
    layer = SparseLayer(*structure, weight_scale, bias, input_qparams, *numbers)
    return run_layer(input, layer, autocast_type(input, input.dtype) if dtype is None else dtype)
