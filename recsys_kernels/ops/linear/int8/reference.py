"""What the int8 matmul operators compute, in plain PyTorch: the fallback anywhere and what kernels are tested with.

Each function takes the fields of the operand table of the operator of the same name (see ``spec.py``). Integer products
are taken in float64, where sums of up to 2^53 are exact and which every device multiplies fast.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..activation import STATIC, WEIGHT_ONLY, activate, quantize_rows
from ..operands import (
    GROUPS,
    MAX_IN_FEATURES,
    check,
    check_floats,
    check_input_qparams,
    check_options,
    check_qparams,
    check_width,
    num_groups,
)
from .spec import HEADER_BYTES, LANES, Int8Layer, LayerLists, packed_bytes, padded

# How a packed layer starts: "RCK8" and the version of the layout.
_MAGIC, _VERSION = 0x384B4352, 1


class CheckedLayer(NamedTuple):
    """A quantized layer whose parts have been checked.

    Attributes:
        weight: int8 [N, K].
        weight_scale: float32 [N, G], one column a group.
        group: length of a group along K; 0 for a single one.
        bias: float32 [N] or None.
        input_qparams: scale and zero point of the activations (scheme static) or None.
        scheme: DYNAMIC, STATIC or WEIGHT_ONLY.
        activation: NONE, RELU, GELU, SIGMOID or SILU.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    group: int
    bias: torch.Tensor | None
    input_qparams: tuple[float, float] | None
    scheme: int
    activation: int


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_input(input: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises RuntimeError unless input [..., K] fits weight [N, K] and is on its device."""
    check(input.dim() >= 1, "input must have at least 1 dimension, but has 0")
    check(input.device == weight.device, f"input is on {input.device}, but weight on {weight.device}")
    check_width(input, weight.shape[1], weight.shape[0])


def _check_numbers(in_features: int, out_features: int, group: int, scheme: int, activation: int) -> None:
    check(
        1 <= in_features <= MAX_IN_FEATURES and out_features >= 1,
        f"weight must have at least one row and 1 to {MAX_IN_FEATURES} columns (beyond, sums overflow int32), "
        f"but has shape ({out_features}, {in_features})",
    )
    check(group in (0, *GROUPS), f"group must be 0 (none), 32, 64 or 128, but is {group}")
    check_options(scheme, activation)


def checked_layer(layer: Int8Layer) -> CheckedLayer:
    """The operands of a layer, checked.

    Raises:
        RuntimeError: names the operand, what it is and what it must be.
    """
    weight, weight_scale, group, bias, input_qparams, scheme, activation = layer
    check(weight.dtype == torch.int8, f"weight must be int8, but is {weight.dtype}")
    check(weight.dim() == 2, f"weight must have 2 dimension(s), but has {weight.dim()}")
    out_features, in_features = weight.shape
    _check_numbers(in_features, out_features, group, scheme, activation)
    check(weight_scale.dtype == torch.float32, f"weight_scale must be float32, but is {weight_scale.dtype}")
    shape = (out_features, num_groups(in_features, group))
    check(
        weight_scale.shape == shape,
        f"weight_scale must have shape {shape} for a weight of shape {tuple(weight.shape)} and group {group}, "
        f"but has {tuple(weight_scale.shape)}",
    )
    if bias is not None:
        check(bias.dtype == torch.float32, f"bias must be float32, but is {bias.dtype}")
        check(
            bias.shape == (out_features,),
            f"bias must have shape {(out_features,)} for a weight of shape {tuple(weight.shape)}, "
            f"but has {tuple(bias.shape)}",
        )
    for name, tensor in (("weight_scale", weight_scale), ("bias", bias), ("input_qparams", input_qparams)):
        same = tensor is None or tensor.device == weight.device
        check(same, f"{name} must be on the device of weight ({weight.device})")
    qparams = check_input_qparams(input_qparams, scheme)
    return CheckedLayer(weight, weight_scale, group, bias, qparams, scheme, activation)


# ---- one layer ------------------------------------------------------------------------------------------------------


def _groups(in_features: int, group: int) -> list[slice]:
    step = group or in_features
    return [slice(start, min(start + step, in_features)) for start in range(0, in_features, step)]


def _weight_only(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], layer.weight.shape[0])
    for number, part in enumerate(_groups(x.shape[1], layer.group)):
        out += F.linear(x[:, part], layer.weight[:, part].float()) * layer.weight_scale[:, number]
    return out


def _integers(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    finite = torch.isfinite(x).all(1, keepdim=True)
    q, scale, zero_point = quantize_rows(torch.where(finite, x, 0.0), layer.input_qparams)
    q, zero_point = q.double(), zero_point.double()
    sums = []
    for part in _groups(x.shape[1], layer.group):
        weight = layer.weight[:, part].double()
        sums.append((q[:, part] @ weight.t() - zero_point * weight.sum(1)).float())
    if len(sums) == 1:
        out = sums[0] * (scale * layer.weight_scale[:, 0])
    else:
        out = torch.zeros_like(sums[0])
        for number, values in enumerate(sums):
            out += values * layer.weight_scale[:, number]
        out *= scale
    return torch.where(finite, out, torch.nan)


def _run(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    """One layer on float32 rows [M, K]."""
    out = (_weight_only if layer.scheme == WEIGHT_ONLY else _integers)(x, layer)
    if layer.bias is not None:
        out = out + layer.bias
    return activate(out, layer.activation)


def int8_linear(input: torch.Tensor, layer: Int8Layer, dtype: torch.dtype) -> torch.Tensor:
    """One layer over [..., K]: quantization of the input, integer product, scales, bias, activation."""
    check_floats(input, dtype)
    checked = checked_layer(layer)
    check_input(input, layer.weight)
    out_features, in_features = layer.weight.shape
    rows = input.float().reshape(-1, in_features)
    return _run(rows, checked).to(dtype).reshape(*input.shape[:-1], out_features)


def split_layers(lists: LayerLists) -> list[Int8Layer]:
    """Lists of operands as one layer after the other."""
    weights, numbers = lists.weights, lists.numbers
    others = lists.weight_scales, lists.biases, lists.input_qparams
    count = len(weights)
    check(
        count > 0 and all(len(part) == count for part in others) and len(numbers) == 3 * count,
        "int8_layers needs at least one layer, and of each a weight, a scale, a bias, qparams and three numbers",
    )
    layers = []
    for number, (weight, scale, bias, qparams) in enumerate(zip(weights, *others, strict=True)):
        group, scheme, activation = numbers[3 * number : 3 * number + 3]
        if scale.shape == (1, 1) and weight.dim() == 2:
            scale = scale.expand(weight.shape[0], 1)
        layers.append(Int8Layer(weight, scale, group, bias, qparams, scheme, activation))
    return layers


def int8_layers(input: torch.Tensor, layers: LayerLists, dtype: torch.dtype) -> torch.Tensor:
    """Layers one after the other over [..., K], from their canonical operands; float32 between them."""
    *first, last = split_layers(layers)
    for layer in first:
        input = int8_linear(input, layer, torch.float32)
    return int8_linear(input, last, dtype)


# ---- packed layers --------------------------------------------------------------------------------------------------


def int8_pack(layer: Int8Layer) -> torch.Tensor:
    """A layer as the CPU kernels read it: four bytes of each of 16 channels, then the next four; little endian."""
    weight, weight_scale, group, bias, _, scheme, activation = layer
    qparams = checked_layer(layer).input_qparams
    out_features, in_features = weight.shape
    channels, depth = padded(out_features, LANES), padded(in_features, 4)
    missing = channels - out_features
    scale, zero_point = qparams or (1.0, 0.0)
    (scale_bits,) = struct.unpack("<i", struct.pack("<f", scale))
    numbers = [_MAGIC, _VERSION, in_features, out_features, group, scheme, activation, int(bias is not None)]
    header = torch.tensor([*numbers, scale_bits, int(zero_point), *[0] * 6], dtype=torch.int32, device=weight.device)
    sums = [weight[:, part].sum(1, dtype=torch.int32) for part in _groups(in_features, group)]
    blocks = F.pad(weight, (0, depth - in_features, 0, missing)).reshape(channels // LANES, LANES, depth // 4, 4)
    parts = (
        header,
        F.pad(weight_scale.t(), (0, missing)),
        F.pad(weight_scale.new_zeros(out_features) if bias is None else bias, (0, missing)),
        F.pad(torch.stack(sums), (0, missing)),
        blocks.permute(0, 2, 1, 3),
    )
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


def _unpack(packed: torch.Tensor) -> Iterator[CheckedLayer]:
    """The layers of a chain, each checked before any of it is read."""
    check(packed.dtype == torch.uint8, f"packed must be uint8, but is {packed.dtype}")
    check(packed.dim() == 1, f"packed must have 1 dimension(s), but has {packed.dim()}")
    size = packed.shape[0]
    check(size > 0, "packed holds no layer")
    start = 0
    while start < size:
        at = f"packed: the layer at byte {start}"
        check(size - start >= HEADER_BYTES, f"{at} is truncated: {size - start} of {HEADER_BYTES} bytes of a header")
        # Copied, as a view of other types needs an aligned start.
        header = packed[start : start + HEADER_BYTES].clone().view(torch.int32).tolist()
        magic, version, in_features, out_features, group, scheme, activation, _, scale_bits, zero_point, *_ = header
        check(magic == _MAGIC, f"{at} does not start with the mark of a packed layer")
        check(version == _VERSION, f"{at} has version {version}, but this release reads version {_VERSION}")
        try:
            _check_numbers(in_features, out_features, group, scheme, activation)
            qparams = None
            if scheme == STATIC:
                (scale,) = struct.unpack("<f", struct.pack("<i", scale_bits))
                qparams = check_qparams(scale, zero_point)
        except RuntimeError as error:
            raise RuntimeError(f"{at}: {error}") from None
        length = packed_bytes(out_features, in_features, group)
        check(size - start >= length, f"{at} is truncated: {size - start} of its {length} bytes")
        yield _unpack_layer(
            packed[start + HEADER_BYTES : start + length],
            in_features,
            out_features,
            group,
            qparams,
            scheme,
            activation,
        )
        start += length


def _unpack_layer(
    body: torch.Tensor,
    in_features: int,
    out_features: int,
    group: int,
    qparams: tuple[float, float] | None,
    scheme: int,
    activation: int,
) -> CheckedLayer:
    groups, channels = num_groups(in_features, group), padded(out_features, LANES)
    scales, bias, _, blocks = body.split(
        [4 * channels * groups, 4 * channels, 4 * channels * groups, channels * padded(in_features, 4)]
    )
    weight = blocks.view(torch.int8).reshape(channels // LANES, -1, LANES, 4).permute(0, 2, 1, 3)
    return CheckedLayer(
        weight.reshape(channels, -1)[:out_features, :in_features],
        scales.clone().view(torch.float32).reshape(groups, channels)[:, :out_features].t(),
        group,
        bias.clone().view(torch.float32)[:out_features],
        qparams,
        scheme,
        activation,
    )


def int8_chain(input: torch.Tensor, packed: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """All layers of ``packed`` one after the other over [M, K]; float32 between them."""
    check_floats(input, dtype)
    check(input.dim() == 2, f"input must have 2 dimension(s), but has {input.dim()}")
    check(input.device == packed.device, f"input is on {input.device}, but packed on {packed.device}")
    layers = list(_unpack(packed))
    width = layers[0].weight.shape[1]
    check_width(input, width, layers[0].weight.shape[0])
    for number, layer in enumerate(layers):
        check(
            layer.weight.shape[1] == width,
            f"packed: layer {number} takes {layer.weight.shape[1]} features, but the one before it gives {width}",
        )
        width = layer.weight.shape[0]
    check(width == out_features, f"packed gives {width} features, but out_features is {out_features}")
    x = input.float()
    for layer in layers:
        x = _run(x, layer)
    return x.to(dtype).contiguous()
