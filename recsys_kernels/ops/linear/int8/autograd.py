"""The contract of the int8 matmul operators: schemas, shapes, gradients.

``int8_linear`` takes a layer's canonical operands. ``int8_pack`` lays a layer out as the CPU kernels read it, and
``int8_chain`` runs one or more of such layers, one after the other; packs of several layers are put together by
``torch.cat``. ``int8_layers`` is for compiled code: it takes the operands of several layers (scales also [1, 1];
``numbers``: group, scheme and activation of each), packs them at its first call and again when one was written to.

In every operator: ``input`` float32, float16 or bfloat16; ``weight`` int8 [N, K]; ``weight_scale`` float32 [N, G] with
one scale for each ``group`` of 32, 64 or 128 columns (``group`` 0: one for all, G = 1); ``bias`` float32 [N];
``input_qparams`` float32 [2], scale and zero point, for scheme 1. ``scheme``: 0 dynamic, 1 static, 2 weight_only;
``activation``: 0 none, 1 relu, 2 gelu, 3 sigmoid, 4 silu; ``dtype``: of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ....backends import selection as _backends
from ..operands import epilogue_number, scheme_number
from . import reference
from .reference import GELU, NONE, RELU, SIGMOID, SILU

_LAYER = (
    "Tensor weight, Tensor weight_scale, int group, Tensor? bias, Tensor? input_qparams, int scheme, int activation"
)

# The same in Python: from weight to activation.
Operands = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None, torch.Tensor | None, int, int]


# Shape functions: they name only the arguments that decide the result. The schemas below name all of them.


def _fake_int8_linear(input: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0], dtype=rest[-1])


def _fake_int8_pack(weight: torch.Tensor, weight_scale: torch.Tensor, group: int, *rest: Any) -> torch.Tensor:
    return weight.new_empty(reference.packed_bytes(weight.shape[0], weight.shape[1], group), dtype=torch.uint8)


def _fake_int8_chain(input: torch.Tensor, packed: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    return input.new_empty(input.shape[0], out_features, dtype=dtype)


def _fake_int8_layers(input: torch.Tensor, weights: list[torch.Tensor], *rest: Any) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], weights[-1].shape[0], dtype=rest[-1])


_backends.define(
    f"int8_linear(Tensor input, {_LAYER}, ScalarType dtype) -> Tensor", reference.int8_linear, _fake_int8_linear
)
_backends.define(f"int8_pack({_LAYER}) -> Tensor", reference.int8_pack, _fake_int8_pack)
_backends.define(
    "int8_chain(Tensor input, Tensor packed, int out_features, ScalarType dtype) -> Tensor",
    reference.int8_chain,
    _fake_int8_chain,
)
_backends.define(
    "int8_layers(Tensor input, Tensor[] weights, Tensor[] weight_scales, Tensor?[] biases, Tensor?[] input_qparams,"
    " int[] numbers, ScalarType dtype) -> Tensor",
    reference.int8_layers,
    _fake_int8_layers,
)
_backends.register_triton(f"{__package__}.triton", ("int8_linear",))


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
    run = _backends.implementation("int8_chain", input)
    number = _backends.dtype_argument(dtype)
    if input.dim() == 2:
        return run(input, packed, out_features, number)
    if input.dim() == 0:
        raise RuntimeError("input must have at least 1 dimension, but has 0")
    out = run(input.reshape(-1, input.shape[-1]), packed, out_features, number)
    return out.reshape(*input.shape[:-1], out_features)


class _Int8Linear(torch.autograd.Function):
    """Gradients of input and bias through the dequantized weights, as if the input had not been rounded; of scheme
    weight_only, whose input is not, also that of the weights' scale.

    (The straight-through estimator of Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons
    for Conditional Computation", 2013.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        group: int,
        bias: torch.Tensor | None,
        input_qparams: torch.Tensor | None,
        scheme: int,
        activation: int,
        dtype: torch.dtype,
        packed: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.group, ctx.scheme, ctx.activation = group, scheme, activation
        ctx.dtype = input.dtype
        if packed is None:
            run = _backends.implementation("int8_linear", input)
            out = run(input, weight, weight_scale, group, bias, input_qparams, scheme, activation, dtype)
        else:
            out = chain(input, packed, weight.shape[0], dtype)
        # Those of relu and sigmoid follow from the output. Those of gelu and silu need what went into the function:
        # computed again from the input, which is held anyway, it costs one product and no memory.
        again = activation in (GELU, SILU)
        ctx.save_for_backward(
            input if again or ctx.needs_input_grad[2] else None,
            weight,
            weight_scale,
            bias if again else None,
            input_qparams if again else None,
            out if activation in (RELU, SIGMOID) else None,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, weight_scale, bias, input_qparams, out = ctx.saved_tensors
        grad = grad.float()
        if ctx.activation == RELU:
            grad = torch.ops.aten.threshold_backward(grad, out.float(), 0)
        elif ctx.activation == SIGMOID:
            grad = torch.ops.aten.sigmoid_backward(grad, out.float())
        elif ctx.activation != NONE:
            run = _backends.implementation("int8_linear", input)
            layer = (weight, weight_scale, ctx.group, bias, input_qparams, ctx.scheme, NONE)
            backward = torch.ops.aten.gelu_backward if ctx.activation == GELU else torch.ops.aten.silu_backward
            grad = backward(grad, run(input, *layer, torch.float32))
        grad_input = grad_scale = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad @ dequantize(weight, weight_scale, ctx.group)).to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[2]:
            products = (rows.t() @ input.float().reshape(-1, input.shape[-1])) * weight
            grad_scale = sum_groups(products, ctx.group)
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(0)
        return grad_input, None, grad_scale, None, grad_bias, None, None, None, None, None


def run_layer(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group: int,
    bias: torch.Tensor | None,
    input_qparams: torch.Tensor | None,
    scheme: int,
    activation: int,
    dtype: torch.dtype,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer, differentiable in input and bias, and with scheme weight_only in weight_scale.

    Args:
        packed: the same layer from ``int8_pack``, where its kernels run; else None.
    """
    trained = input.requires_grad or weight_scale.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _Int8Linear.apply(
            input, weight, weight_scale, group, bias, input_qparams, scheme, activation, dtype, packed
        )
    if packed is not None:
        return chain(input, packed, weight.shape[0], dtype)
    run = _backends.implementation("int8_linear", input)
    number = _backends.dtype_argument(dtype)
    return run(input, weight, weight_scale, group, bias, input_qparams, scheme, activation, number)


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
        dtype: of the result; default: that of ``input``.

    Returns:
        [..., N]. A row of ``input`` with NaN or infinity gives a row of NaN, and touches no other
        (``"weight_only"``: as in float).

    Raises:
        ValueError: an unknown name.
        RuntimeError: shapes or types that do not fit together, named; a scale of the input that is not positive (on a
            GPU, which nobody waits for, such a scale or zero point gives NaN).
    """
    if weight_scale.requires_grad and torch.is_grad_enabled() and activation != "weight_only":
        raise RuntimeError("int8_linear: weight_scale has no gradient but with activation='weight_only'; detach() it")
    if weight.dim() == 2:
        if weight_scale.numel() == 1 and not group:
            weight_scale = weight_scale.reshape(1, 1).expand(weight.shape[0], 1)
        elif weight_scale.dim() == 1:
            weight_scale = weight_scale.unsqueeze(1)
    if bias is not None:
        bias = bias.float()
    layer = (weight, weight_scale, group, bias, input_qparams, scheme_number(activation), epilogue_number(epilogue))
    return run_layer(input, *layer, input.dtype if dtype is None else dtype)
