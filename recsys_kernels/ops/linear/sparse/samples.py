"""Sample inputs of the sparse linear operators, and what ``sparse_linear`` should give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ....backends import selection
from ..activation import (
    DYNAMIC,
    EPILOGUES,
    NONE,
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
from .patterns import parse_pattern
from .spec import SparseLayer, block_shape


@dataclass(frozen=True)
class SparseSample:
    """One call of the sparse_linear operator, named; `weight` and `kept` are the same layer as matrices [N, K]."""

    name: str
    input: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor
    pattern: str
    weight_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    input_qparams: torch.Tensor | None = None
    scheme: int = WEIGHT_ONLY
    activation: int = 0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    @cached_property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """values, crow_indices and col_indices."""
        pattern, (n, k) = parse_pattern(self.pattern), self.weight.shape
        if pattern.of:
            return _two_of_four(self.weight, self.kept)
        r, c = pattern.rows, pattern.columns
        both = torch.stack([self.weight.double(), self.kept.double()])
        padded = torch.nn.functional.pad(both, (0, -k % c, 0, -n % r))
        blocks, members = padded.unflatten(2, (-1, c)).unflatten(1, (-1, r)).transpose(2, 3)
        found = members.amax((2, 3)) > 0
        crow = torch.tensor([0, *found.sum(1).cumsum(0).tolist()], dtype=torch.int32)
        values = blocks[found].to(self.weight.dtype)
        return values.reshape(-1) if r == c == 1 else values, crow, found.nonzero()[:, 1].int()

    @property
    def scales(self) -> torch.Tensor:
        """float64 [N, K]: of every weight its scale, 1 of floats."""
        n, k = self.weight.shape
        if self.weight_scale is None:
            return torch.ones(n, k, dtype=torch.float64)
        scale = self.weight_scale.double().reshape(n, -1)
        group = k if scale.shape[1] == 1 else next(g for g in GROUPS if num_groups(k, g) == scale.shape[1])
        return scale.repeat_interleave(group, 1)[:, :k]

    @property
    def layer(self) -> SparseLayer:
        """The layer, as sparse_pack takes it."""
        (values, crow_indices, col_indices), (n, k) = self.stored, self.weight.shape
        tensors = self.weight_scale, self.bias, self.input_qparams
        return SparseLayer(values, crow_indices, col_indices, n, k, *tensors, self.scheme, self.activation)

    @property
    def args(self) -> tuple[object, ...]:
        """The operator's arguments in order."""
        return (self.input, *self.layer, self.dtype)


def _two_of_four(weight: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (n, k), fours = weight.shape, -(-weight.shape[1] // 4)
    values = [[0.0] * (2 * fours) for _ in range(n)]
    codes = [[0] * (-(-k // 8)) for _ in range(n)]
    weights, keeps = weight.tolist(), kept.tolist()
    for row in range(n):
        for four in range(fours):
            found = [c for c in range(4) if 4 * four + c < k and keeps[row][4 * four + c]]
            places = sorted((found + [c for c in range(4) if c not in found])[:2])
            codes[row][four // 2] += (places[0] + 4 * places[1]) << (four % 2 * 4)
            for number, place in enumerate(places):
                if place in found:
                    values[row][2 * four + number] = weights[row][4 * four + place]
    empty = torch.zeros(0, dtype=torch.int32)
    return torch.tensor(values).to(weight.dtype), empty, torch.tensor(codes, dtype=torch.uint8)


SPARSE_PATTERNS = ("unstructured", "block4x1", "block16x1", "block1x16", "block4x4", "block16x4", "block1x4", "2:4")


def sparse_linear_samples(dtype: torch.dtype = torch.float32, small: bool = False) -> list[SparseSample]:
    """Calls of ``sparse_linear``: every pattern, type of values, scheme and function; empty to full, odd shapes.

    Args:
        dtype: type of the input, of float values and of the output.
        small: leave out large products, for slow backends (interpreters).
    """
    rng, samples = torch.Generator().manual_seed(71), []
    for number, (rows, width, channels) in enumerate(INT8_SHAPES):
        if small and rows * width * channels > 150_000:
            continue
        # Float values, and int8 with each scheme. Eight of the 32, not the same for each shape.
        kinds = [(pattern, scheme) for pattern in SPARSE_PATTERNS for scheme in (None, *SCHEMES.values())]
        for at, (pattern, scheme) in enumerate(kinds if number < 3 else kinds[number % 5 :: 4]):
            x = (torch.randn(rows, width, generator=rng, dtype=torch.float64) * 2 + 0.3).to(dtype)
            options = (
                pattern,
                scheme,
                (0.3, 0.05, 1.0, 0.0, 0.6)[(at + number) % 5],
                (at * 3 + number) % len(EPILOGUES),
            )
            samples.append(_sparse_sample(x, channels, *options, rng))
    x = torch.randn(6, 10, 40, generator=rng, dtype=torch.float64).to(dtype)
    inputs = (x[0, 0], x, x[:, :0], x.transpose(0, 1), x[0, ::2], x[0, :, ::2], x[0].t(), x[0, :1].expand(5, 40))
    for number, part in enumerate((*inputs, x[0, :, 1:])):
        for pattern, scheme in (("unstructured", None), ("block4x1", DYNAMIC), ("2:4", WEIGHT_ONLY)):
            samples.append(_sparse_sample(part, 19, pattern, scheme, 0.4, 1, rng, f"strided-{number}-"))
    base = samples[-2]
    # Scales by groups of columns, some of them not whole, with few rows of input and many.
    for number, pattern in enumerate(SPARSE_PATTERNS):
        for at, scheme in enumerate(SCHEMES.values()):
            width, group = ((65, 32), (130, 64), (300, 128))[(number + at) % 3]
            x = (torch.randn((3, 19)[number % 2], width, generator=rng, dtype=torch.float64) * 2 + 0.3).to(dtype)
            density, name = (0.3, 0.05, 1.0)[at], f"groups-of-{group}-"
            samples.append(_sparse_sample(x, 22 - number % 2, pattern, scheme, density, number % 5, rng, name, group))
    return [*samples, *(replace(base, name=f"to-{other}", dtype=other) for other in FLOATS)]


def _sparse_sample(
    x: torch.Tensor,
    channels: int,
    pattern: str,
    scheme: int | None,
    density: float,
    activation: int,
    rng: torch.Generator,
    name: str = "",
    group: int = 0,
) -> SparseSample:
    width, shape, units = x.shape[-1], (channels, x.shape[-1]), parse_pattern(pattern)
    kept = torch.rand(-(-channels // units.rows), -(-width // units.columns), generator=rng) < density
    kept = kept.repeat_interleave(units.rows, 0).repeat_interleave(units.columns, 1)[:channels, :width]
    if units.of:
        scores = torch.nn.functional.pad(torch.rand(shape, generator=rng), (0, -width % 4)).unflatten(1, (-1, 4))
        kept = (scores.argsort(2).argsort(2) >= 2).flatten(1)[:, :width]
    weight = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8) * kept
    if scheme is None:
        weight = (weight.double() / (50.0 * width**0.5)).to(x.dtype)
    scales = (channels, num_groups(width, group)) if group else (channels,)
    return SparseSample(
        f"{name}{'x'.join(map(str, x.shape))}x{channels}-{pattern}-{scheme}-{density}-{activation}",
        x,
        weight,
        kept,
        pattern,
        None if scheme is None else (torch.rand(scales, generator=rng) + 0.5) / (50.0 * width**0.5),
        None if channels % 4 == 0 else torch.randn(channels, generator=rng),
        torch.tensor([0.03, 117.0]) if scheme == STATIC else None,
        WEIGHT_ONLY if scheme is None else scheme,
        activation,
        x.dtype,
    )


def expected_sparse_linear(sample: SparseSample) -> torch.Tensor:
    """The result of a call on finite rows: the dense matrix, rows quantized by numpy in float32, the rest in float64.

    Returns:
        float64 [..., N].
    """
    weight = (sample.weight.double() * sample.scales).numpy()
    x = sample.input.float().reshape(-1, weight.shape[1]).numpy()
    out = np.zeros((x.shape[0], weight.shape[0]))
    for row, values in enumerate(x):
        integers = sample.scheme != WEIGHT_ONLY
        q, step = quantized_by_numpy(values, sample.input_qparams) if integers else (values.astype(np.float64), 1.0)
        out[row] = weight @ q * step
    result = finished(out, sample.bias, sample.activation)
    return result.reshape(*sample.input.shape[:-1], out.shape[1])


def operator_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of every operator of the family: names and flat arguments."""
    for sample in sparse_linear_samples(torch.bfloat16, small=True)[::23]:
        layer = sample.layer
        rows = sample.input.reshape(sample.input.shape[:-1].numel(), layer.in_features)
        yield "sparse_linear", sample.args
        yield "sparse_layer", sample.args
        yield "sparse_pack", (*layer, 0)
        pack = selection.implementation("sparse_pack", layer.values)
        yield "sparse_packed", (rows, pack(*layer, 1), layer.out_features, sample.dtype)
        values = torch.zeros_like(layer.values, dtype=torch.float32)
        floats = SparseLayer(values, *layer[1:5], None, None, None, WEIGHT_ONLY, NONE)
        yield "sparse_repack", (pack(*floats, 1), values, None)
        grad = torch.randn(rows.shape[0], layer.out_features)
        structure = layer.crow_indices, layer.col_indices, *block_shape(layer.values)
        yield "sparse_weight_gradient", (grad, rows, *structure, torch.float32)
