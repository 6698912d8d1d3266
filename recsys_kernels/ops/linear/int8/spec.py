"""The contract of the int8 operators: operand tables and shapes.

``int8_linear`` takes a layer's canonical operands. ``int8_pack`` lays a layer out as the CPU kernels read it, and
``int8_chain`` runs one or more of such layers, one after the other; packs of several layers are put together by
``torch.cat``. ``int8_layers`` is for compiled code: it takes the operands of several layers, packs them at its first
call and again when one of their tensors was written to.

Sums are exact: products of 8-bit numbers are added in int32. A row of the input with NaN or infinity gives a row of NaN
and touches no other row (scheme weight_only: as in float).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ....backends import registry
from ..operands import (
    num_groups,
)

FAMILY = registry.register(
    registry.Family(
        "int8",
        __package__,
        shown={"int8_linear": ("int8_linear",)},
        modules=(".layer:Int8Linear", ".mlp:Int8MLP"),
        samples=".samples:operator_samples",
        module_samples=".module_samples:module_samples",
        converters=("recsys_kernels.compress.converters.int8_linear",),
    )
)


# ---- operand tables -------------------------------------------------------------------------------------------------


class Int8Layer(NamedTuple):
    """A linear layer with int8 weights.

    Attributes:
        weight: int8 [N, K].
        weight_scale: float32 [N, G], one scale for each group of columns.
        group: 32, 64 or 128 columns that share a scale; 0: all of them, G = 1.
        bias: float32 [N] or None.
        input_qparams: float32 [2], scale and zero point of the input, for scheme static; else None.
        scheme: 0 dynamic, 1 static, 2 weight_only.
        activation: 0 none, 1 relu, 2 gelu, 3 sigmoid, 4 silu.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    group: int
    bias: torch.Tensor | None
    input_qparams: torch.Tensor | None
    scheme: int
    activation: int


class LinearOperands(NamedTuple):
    """Operands of ``int8_linear``.

    ``input`` [..., K] of float32, float16 or bfloat16. Gives [..., N] of type ``dtype``.
    """

    input: torch.Tensor
    layer: Int8Layer
    dtype: torch.dtype


class PackOperands(NamedTuple):
    """Operands of ``int8_pack``. Gives uint8 [:func:`packed_bytes`]."""

    layer: Int8Layer


class ChainOperands(NamedTuple):
    """Operands of ``int8_chain``.

    ``input`` [M, K], ``packed`` uint8 [bytes]. Gives [M, out_features] of type ``dtype``.
    """

    input: torch.Tensor
    packed: torch.Tensor
    out_features: int
    dtype: torch.dtype


class LayerLists(NamedTuple):
    """Layers that run one after the other; of each its tensors (a scale may be [1, 1]), and in ``numbers`` its group,
    scheme and activation."""

    weights: list[torch.Tensor]
    weight_scales: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    input_qparams: list[torch.Tensor | None]
    numbers: list[int]


class LayersOperands(NamedTuple):
    """Operands of ``int8_layers``.

    ``input`` [..., K]. Gives [..., N of the last layer] of type ``dtype``.
    """

    input: torch.Tensor
    layers: LayerLists
    dtype: torch.dtype


# ---- the packed layout ----------------------------------------------------------------------------------------------

# Output channels that lie side by side, and bytes of a layer's header.
LANES, HEADER_BYTES = 16, 64


def padded(size: int, multiple: int) -> int:
    """The size, rounded up to whole multiples."""
    return -(-size // multiple) * multiple


def packed_bytes(out_features: int, in_features: int, group: int) -> int:
    """The size of a packed layer: header, scales, bias, sums, weights."""
    channels = padded(out_features, LANES)
    return HEADER_BYTES + 4 * channels * (2 * num_groups(in_features, group) + 1) + channels * padded(in_features, 4)


# ---- shapes and operators -------------------------------------------------------------------------------------------


def _linear(call: LinearOperands) -> torch.Tensor:
    return call.input.new_empty(*call.input.shape[:-1], call.layer.weight.shape[0], dtype=call.dtype)


def _pack(call: PackOperands) -> torch.Tensor:
    weight = call.layer.weight
    size = packed_bytes(weight.shape[0], weight.shape[1], call.layer.group)
    return weight.new_empty(size, dtype=torch.uint8)


def _chain(call: ChainOperands) -> torch.Tensor:
    return call.input.new_empty(call.input.shape[0], call.out_features, dtype=call.dtype)


def _layers(call: LayersOperands) -> torch.Tensor:
    return call.input.new_empty(*call.input.shape[:-1], call.layers.weights[-1].shape[0], dtype=call.dtype)


FAMILY.define("int8_linear", LinearOperands, _linear, triton=True)
FAMILY.define("int8_pack", PackOperands, _pack)
FAMILY.define("int8_chain", ChainOperands, _chain)
FAMILY.define("int8_layers", LayersOperands, _layers)
