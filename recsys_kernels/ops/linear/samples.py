"""Sample inputs of the linear operators, and what they should give; a part of ``testing``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from .int8.reference import GROUPS, num_groups
from .operands import DYNAMIC, EPILOGUES, FLOATS, SCHEMES, STATIC, WEIGHT_ONLY
from .sparse.patterns import parse_pattern


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
    def layer(self) -> tuple[object, ...]:
        """The arguments that int8_pack takes, in order."""
        return (
            self.weight,
            self.weight_scale,
            self.group,
            self.bias,
            self.input_qparams,
            self.scheme,
            self.activation,
        )

    @property
    def args(self) -> tuple[object, ...]:
        """The operator's arguments in order."""
        return (self.input, *self.layer, self.dtype)


# Rows, in_features and out_features: single ones, sizes that no register tile or cache line divides, several tiles.
INT8_SHAPES = (
    (7, 415, 333),
    (3, 17, 5),
    (16, 200, 40),
    (1, 1, 1),
    (1, 7, 1),
    (2, 1, 17),
    (5, 1, 1),
    (1, 512, 96),
    (33, 130, 48),
    (0, 20, 6),
    (64, 4, 100),
    (5, 300, 15),
    (130, 67, 33),
)


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
            q, input_scale = _quantized_by_numpy(values, sample.input_qparams)
        for number, start in enumerate(range(0, weight.shape[1], step)):
            part = slice(start, start + step)
            out[row] += (weight[:, part] @ q[part]) * scale[:, number]
        out[row] *= input_scale
    return _finished(out, sample)


def _finished(sums: np.ndarray, sample: Int8Sample | SparseSample) -> torch.Tensor:
    """Bias and function of a linear layer, in float64."""
    y = torch.from_numpy(sums)
    if sample.bias is not None:
        y += sample.bias.double()
    functions = (
        lambda y: y,
        torch.relu,
        lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
        lambda y: 1 / (1 + torch.exp(-y)),
        lambda y: y / (1 + torch.exp(-y)),
    )
    return functions[sample.activation](y).reshape(*sample.input.shape[:-1], sums.shape[1])


def _quantized_by_numpy(values: np.ndarray, qparams: torch.Tensor | None) -> tuple[np.ndarray, float]:
    """One row as integers without their zero point, int64, and the scale."""
    if qparams is None:
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        step = np.float32(1 / 255)
        scale = max(high * step - low * step, np.float32(2.0**-100))
        zero_point = min(max(np.rint(-low * (np.float32(1) / scale)), np.float32(0)), np.float32(255))
    else:
        scale, zero_point = qparams.numpy()
    steps = values * (np.float32(1) / scale)
    return np.rint(np.clip(steps, -zero_point, 255 - zero_point)).astype(np.int64), float(scale)


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
    def layer(self) -> tuple[object, ...]:
        """The arguments that sparse_pack takes before `kind`, in order."""
        options = (self.weight_scale, self.bias, self.input_qparams, self.scheme, self.activation)
        return (*self.stored, *self.weight.shape, *options)

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
        q, step = _quantized_by_numpy(values, sample.input_qparams) if integers else (values.astype(np.float64), 1.0)
        out[row] = weight @ q * step
    return _finished(out, sample)
