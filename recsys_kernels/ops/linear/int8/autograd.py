"""Int8 layers as differentiable functions.

The gradients are those of the straight-through estimator (Bengio et al., "Estimating or Propagating Gradients Through
Stochastic Neurons for Conditional Computation", 2013): they go through the dequantized weights, as if the input had not
been rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from ....backends import selection
from ..activation import (
    NONE,
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
from .spec import Int8Layer

register_rows("int8_linear")
register_rows("int8_chain")
register_autocast("int8_chain")


def dequantize(weight: torch.Tensor, weight_scale: torch.Tensor, group: int) -> torch.Tensor:
    """The weights as float32 [N, K]."""
    scale = weight_scale
    if group:
        scale = scale.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    return weight * scale


def sum_groups(values: torch.Tensor, group: int) -> torch.Tensor:
    """Sums of the values of every scale: [N, K] to [N, G]."""
    if group:
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % group))
        return values.unflatten(1, (-1, group)).sum(2)
    return values.sum(1, keepdim=True)


def chain(input: torch.Tensor, packed: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed layers over an input of any shape [..., K]; no gradient."""
    run = selection.implementation("int8_chain", input)
    number = selection.dtype_argument(dtype)
    if input.dim() == 2:
        return run(input, packed, out_features, number)
    if input.dim() == 0:
        raise RuntimeError("input must have at least 1 dimension, but has 0")
    out = run(input.reshape(-1, input.shape[-1]), packed, out_features, number)
    return out.reshape(*input.shape[:-1], out_features)


class _Int8Linear(torch.autograd.Function):
    """The gradients of input and bias. Scheme weight_only, which rounds no input, also has that of the scales."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, dtype: torch.dtype, packed: torch.Tensor | None, *operands: Any
    ) -> torch.Tensor:
        layer = Int8Layer(*operands)
        ctx.group, ctx.scheme, ctx.activation = layer.group, layer.scheme, layer.activation
        ctx.dtype = input.dtype
        if packed is None:
            out = selection.implementation("int8_linear", input)(input, *layer, dtype)
        else:
            out = chain(input, packed, layer.weight.shape[0], dtype)
        again = needs_again(layer.activation)
        ctx.save_for_backward(
            input if again or ctx.needs_input_grad[4] else None,
            layer.weight,
            layer.weight_scale,
            layer.bias if again else None,
            layer.input_qparams if again else None,
            out if needs_output(layer.activation) else None,
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, weight_scale, bias, input_qparams, out = ctx.saved_tensors

        def again() -> torch.Tensor:
            layer = Int8Layer(weight, weight_scale, ctx.group, bias, input_qparams, ctx.scheme, NONE)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # for a second derivative
                return transformed(input, layer, torch.float32)
            return selection.implementation("int8_linear", input)(input, *layer, torch.float32)

        grad = before_activation(grad, ctx.activation, out, again)
        grad_input = grad_scale = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad @ dequantize(weight, weight_scale, ctx.group)).to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[4]:
            products = (rows.t() @ input.float().reshape(-1, input.shape[-1])) * weight
            grad_scale = sum_groups(products, ctx.group)
        if ctx.needs_input_grad[6]:
            grad_bias = rows.sum(0)
        return grad_input, None, None, None, grad_scale, None, grad_bias, None, None, None


def transformed(input: torch.Tensor, layer: Int8Layer, dtype: torch.dtype) -> torch.Tensor:
    """:func:`run_layer` with derivatives of every kind and order, slower."""
    plain = layer._replace(
        weight_scale=layer.weight_scale.detach(),
        bias=None if layer.bias is None else layer.bias.detach(),
        activation=NONE,
    )

    def exact(rows: torch.Tensor) -> torch.Tensor:
        return selection.implementation("int8_linear", rows)(rows, *plain, torch.float32)

    weight = dequantize(layer.weight, layer.weight_scale, layer.group)
    return straight_through(input, weight, layer.bias, layer.activation, dtype, exact)


def run_layer(
    input: torch.Tensor, layer: Int8Layer, dtype: torch.dtype, packed: torch.Tensor | None = None
) -> torch.Tensor:
    """One layer, differentiable in input and bias, and with scheme weight_only in weight_scale.

    Args:
        packed: the same layer from ``int8_pack``, where its kernels run; else None.
    """
    if not torch.compiler.is_compiling() and is_transformed():
        return transformed(input, layer, dtype)
    bias = layer.bias
    trained = input.requires_grad or layer.weight_scale.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _Int8Linear.apply(input, dtype, packed, *layer)
    if packed is not None:
        return chain(input, packed, layer.weight.shape[0], dtype)
    run = selection.implementation("int8_linear", input)
    return run(input, *layer, selection.dtype_argument(dtype))


def int8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "dynamic",
    input_qparams: torch.Tensor | None = None,
    epilogue: str | None = None,
    group: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.linear`` with int8 weights and, but for ``"weight_only"``, an int8 product.

    Args:
        input: [..., K], float32, float16 or bfloat16. Has a gradient (through the dequantized weights).
        weight: int8 [N, K], with 1 <= K <= 65536.
        weight_scale: float32: [N, ceil(K / group)], or without groups [N], [N, 1] or one number for all. Has a gradient
            with ``"weight_only"``.
        bias: [N], a float type. Has a gradient.
        activation: how the input is taken: ``"dynamic"`` (quantized to 8 bits by the range of each row), ``"static"``
            (by ``input_qparams``) or ``"weight_only"`` (in float).
        input_qparams: float32 [2], scale and zero point (an integer from 0 to 255), for ``"static"``.
        epilogue: None, ``"relu"``, ``"gelu"``, ``"sigmoid"`` or ``"silu"``: applied to the result.
        group: 32, 64 or 128 columns that share a scale, or 0 for all of them.
        dtype: of the result; default: that of autocast where it is on, else that of ``input``.

    Returns:
        [..., N]. A row of ``input`` with NaN or infinity gives a row of NaN, and touches no other
        (``"weight_only"``: as in float).

    Raises:
        ValueError: an unknown name.
        RuntimeError: shapes or types that do not fit together, named; a scale of the input that is not positive (on a
            GPU, which nobody waits for, such a scale or zero point gives NaN).
    """
    check_tensor(input)
    if weight_scale.requires_grad and torch.is_grad_enabled() and activation != "weight_only":
        raise RuntimeError("int8_linear: weight_scale has no gradient but with activation='weight_only'; detach() it")
    if weight.dim() == 2:
        if weight_scale.numel() == 1 and not group:
            weight_scale = weight_scale.reshape(1, 1).expand(weight.shape[0], 1)
        elif weight_scale.dim() == 1:
            weight_scale = weight_scale.unsqueeze(1)
    if bias is not None:
        bias = bias.float()
    numbers = scheme_number(activation), epilogue_number(epilogue)
    layer = Int8Layer(weight, weight_scale, group, bias, input_qparams, *numbers)
    return run_layer(input, layer, autocast_type(input, input.dtype) if dtype is None else dtype)
