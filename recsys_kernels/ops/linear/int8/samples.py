"""Sample inputs of the int8 operators, and what ``int8_linear`` should give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ....backends import selection
from ..activation import (
    DYNAMIC,
    EPILOGUES,
    SCHEMES,
    STATIC,
    WEIGHT_ONLY,
)
from ..operands import (
    FLOATS,
    GROUPS,
    num_groups,
)
from ..samples import INT8_SHAPES, finished, quantized_by_numpy
from .spec import Int8Layer


@dataclass(frozen=True)
class Int8Sample:
    """One call of the int8_linear operator, named."""

    name: str
    input: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    group: int = 0
    bias: torch.Tensor | None = None
    input_qparams: torch.Tensor | None = None
    scheme: int = DYNAMIC
    activation: int = 0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    @property
    def layer(self) -> Int8Layer:
        """The layer, as int8_pack takes it."""
        numbers = self.scheme, self.activation
        return Int8Layer(self.weight, self.weight_scale, self.group, self.bias, self.input_qparams, *numbers)

    @property
    def args(self) -> tuple[object, ...]:
        """The operator's arguments in order."""
        return (self.input, *self.layer, self.dtype)


def int8_linear_samples(dtype: torch.dtype = torch.float32, small: bool = False) -> list[Int8Sample]:
    """Calls of ``int8_linear``: every scheme, granularity and function on three shapes, some of them on the others.

    Args:
        dtype: type of the input and of the output.
        small: leave out large products, for slow backends (interpreters).
    """
    rng = torch.Generator().manual_seed(50)
    kinds = [
        (scheme, granularity, activation)
        for scheme in SCHEMES.values()
        for granularity in ("channel", "tensor", *GROUPS)
        for activation in EPILOGUES.values()
    ]
    samples = []
    for number, (rows, width, channels) in enumerate(INT8_SHAPES):
        if small and rows * width * channels > 150_000:
            continue
        # Fifteen of the 75, not the same for each shape.
        for scheme, granularity, activation in kinds if number < 3 else kinds[number % 5 :: 5]:
            name = f"{rows}x{width}x{channels}-{scheme}-{granularity}-{activation}"
            x = torch.randn(rows, width, generator=rng, dtype=torch.float64) * 2 + 0.3
            samples.append(_int8_sample(name, x.to(dtype), channels, scheme, granularity, activation, rng))
    return [*samples, *_strided_int8_samples(dtype, rng)]


def _int8_sample(
    name: str,
    x: torch.Tensor,
    channels: int,
    scheme: int,
    granularity: str | int,
    activation: int,
    rng: torch.Generator,
) -> Int8Sample:
    width = x.shape[-1]
    group = granularity if isinstance(granularity, int) else 0
    weight = torch.randint(-127, 128, (channels, width), generator=rng, dtype=torch.int8)
    scales = (1, 1) if granularity == "tensor" else (channels, num_groups(width, group))
    scale = (torch.rand(scales, generator=rng) + 0.5) / (50.0 * width**0.5)
    return Int8Sample(
        name,
        x,
        weight,
        scale.expand(channels, scales[1]),
        group,
        None if channels % 4 == 0 else torch.randn(channels, generator=rng),
        torch.tensor([0.03, 117.0]) if scheme == STATIC else None,
        scheme,
        activation,
        x.dtype,
    )


def _strided_int8_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[Int8Sample]:
    """Inputs of one and of three dimensions, tensors with gaps, and types that differ."""
    x = torch.randn(6, 10, 40, generator=rng, dtype=torch.float64).to(dtype)
    inputs = {
        "1-d": x[0, 0],
        "3-d": x,
        "3-d-no-rows": x[:, :0],
        "3-d-transposed": x.transpose(0, 1),
        "strided-rows": x[0, ::2],
        "strided-columns": x[0, :, ::2],
        "transposed": x[0].t(),
        "expanded": x[0, :1].expand(5, 40),
        "not-aligned": x[0, :, 1:],
    }
    for scheme in SCHEMES.values():
        for name, part in inputs.items():
            yield _int8_sample(f"{name}-{scheme}", part, 19, scheme, "channel", 1, rng)
        base = _int8_sample(f"strided-weight-{scheme}", x[0, :, :20], 22, scheme, "channel", 0, rng)
        scale = base.weight_scale.repeat(2, 2)[::2, 1:]
        yield replace(base, weight=base.weight.repeat_interleave(2, 1)[:, ::2], weight_scale=scale)
        yield replace(base, name=f"transposed-weight-{scheme}", weight=base.weight.t().contiguous().t())
        for other in FLOATS:
            yield replace(base, name=f"to-{other}-{scheme}", dtype=other)


def expected_int8_linear(sample: Int8Sample) -> torch.Tensor:
    """The result of a call: rows quantized by numpy in float32, integers in int64, the rest in float64.

    Returns:
        float64 [..., N].
    """
    weight, channels = sample.weight.numpy().astype(np.int64), sample.weight.shape[0]
    scale = sample.weight_scale.double().numpy()
    x = sample.input.float().reshape(-1, weight.shape[1]).numpy()
    out = np.zeros((x.shape[0], channels))
    step = sample.group or weight.shape[1]
    for row, values in enumerate(x):
        if sample.scheme == WEIGHT_ONLY:
            q, input_scale = values.astype(np.float64), 1.0
        elif not np.isfinite(values).all():
            out[row] = np.nan
            continue
        else:
            q, input_scale = quantized_by_numpy(values, sample.input_qparams)
        for number, start in enumerate(range(0, weight.shape[1], step)):
            part = slice(start, start + step)
            out[row] += (weight[:, part] @ q[part]) * scale[:, number]
        out[row] *= input_scale
    result = finished(out, sample.bias, sample.activation)
    return result.reshape(*sample.input.shape[:-1], channels)


def operator_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of every operator of the family: names and flat arguments."""
    for sample in int8_linear_samples(torch.bfloat16, small=True)[::37]:
        yield "int8_linear", sample.args
        yield "int8_pack", sample.layer
        width = sample.weight.shape[1]
        rows = sample.input.reshape(sample.input.shape[:-1].numel(), width)
        packed = selection.implementation("int8_pack", sample.weight)(*sample.layer)
        yield "int8_chain", (rows, packed, sample.weight.shape[0], sample.dtype)
        weight, scale, group, bias, qparams, *kind = sample.layer
        yield "int8_layers", (sample.input, [weight], [scale], [bias], [qparams], [group, *kind], sample.dtype)
