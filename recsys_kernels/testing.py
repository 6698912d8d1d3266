"""Sample inputs, tolerances and comparison, for this package's tests and for people who write kernels.

Every implementation of an operator sees the same samples, and they always hold the awkward cases: an empty batch,
empty bags, one row, one column, widths that no vector divides, repeated indices and offsets, both index types,
strided inputs, padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from .ops.embedding_bag.op import FeaturePlan
from .ops.embedding_bag.reference import MAX, MEAN, MODES, SUM
from .ops.int8_matmul.reference import DYNAMIC, EPILOGUES, GROUPS, SCHEMES, STATIC, WEIGHT_ONLY, num_groups

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Tolerance:
    """Allowed error, relative to the largest magnitude of the expected values; `measured` is the worst seen."""

    allowed: float
    measured: float


# Against float64 results rounded to the type, over all samples, ISA levels and backends.
TOLERANCES = {
    torch.float64: Tolerance(1e-14, 2.3e-15),
    # Lookups: 1.4e-6; the gradient of a row that occurs hundreds of times is the worst.
    torch.float32: Tolerance(6e-6, 3.9e-6),
    # Sums are taken in float32 and rounded once: half a unit in the last place, 2^-11 and 2^-8.
    torch.float16: Tolerance(1e-3, 4.9e-4),
    torch.bfloat16: Tolerance(8e-3, 5.0e-3),
}


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Asserts that a result has the expected shape and values, to the tolerance of its type.

    Args:
        actual: what a kernel gave.
        expected: what it should be, in any float type, best float64.
        dtype: the type whose tolerance counts; default: that of ``actual``.

    Raises:
        AssertionError: with the worst element, its position and the allowed error.
    """
    dtype = dtype or actual.dtype
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    allowed = TOLERANCES[dtype].allowed * max(1e-30, float(e.abs().nan_to_num(0.0).max()))
    error = (a - e).abs()
    error = torch.where(a.isnan() & e.isnan(), 0.0, error).nan_to_num(float("inf"))
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    assert error.flatten()[worst] <= allowed, (
        f"element {at} is {a.flatten()[worst]:.9g}, expected {e.flatten()[worst]:.9g}: off by "
        f"{error.flatten()[worst]:.3g}, allowed {allowed:.3g} ({dtype})"
    )


@dataclass(frozen=True)
class BagSample:
    """One call of the embedding_bag operator, named."""

    name: str
    weight: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor | None
    per_sample_weights: torch.Tensor | None = None
    mode: int = SUM
    padding_idx: int = -1
    include_last_offset: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def args(self) -> tuple[torch.Tensor | int | bool | None, ...]:
        """The operator's arguments in order."""
        return (
            self.weight,
            self.indices,
            self.offsets,
            self.per_sample_weights,
            self.mode,
            self.padding_idx,
            self.include_last_offset,
        )

    @property
    def bag_args(self) -> tuple[torch.Tensor | int | bool | None, ...]:
        """The same without the table."""
        return self.args[1:]

    @property
    def num_bags(self) -> int:
        """Bags in the call."""
        if self.offsets is None:
            return self.indices.shape[0]
        return self.offsets.numel() - self.include_last_offset


# One column, below and above one vector of every level, two to sixteen of them, and more than registers hold.
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 50, 64, 100, 127, 128, 200, 255, 256, 257, 300, 515)
_SMALL_WIDTHS = (1, 7, 16, 33)


def _base_samples(dtype: torch.dtype, rng: torch.Generator) -> Iterator[BagSample]:
    def table(rows: int, dim: int) -> torch.Tensor:
        return torch.randn(rows, dim, generator=rng, dtype=torch.float64).to(dtype)

    def ids(rows: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, rows, shape, generator=rng)

    offsets = torch.tensor([0, 0, 3, 3, 4, 17, 40])  # empty bags first and inside, repeated offsets
    for dim in WIDTHS:
        yield BagSample(f"width-{dim}", table(37, dim), ids(37, 40), offsets)
    yield BagSample("last-offset", table(9, 20), ids(9, 40), offsets, include_last_offset=True)
    yield BagSample("last-offset-before-end", table(9, 20), ids(9, 50), offsets, include_last_offset=True)
    yield BagSample("int32", table(23, 24), ids(23, 40).int(), offsets.int())
    yield BagSample("int32-int64", table(23, 24), ids(23, 40).int(), offsets)
    yield BagSample("matrix", table(11, 12), ids(11, 5, 7), None)
    yield BagSample("matrix-no-columns", table(11, 12), ids(11, 5, 0), None)
    yield BagSample("matrix-no-rows", table(11, 12), ids(11, 0, 7), None)
    yield BagSample("no-bags", table(11, 12), ids(11, 0), torch.zeros(0, dtype=torch.int64))
    yield BagSample("only-empty-bags", table(11, 12), ids(11, 0), torch.zeros(4, dtype=torch.int64))
    yield BagSample("one-row", table(1, 10), ids(1, 6), torch.tensor([0, 2]))
    yield BagSample("one-index", table(5, 10), ids(5, 1), torch.tensor([0]))
    yield BagSample("same-index", table(5, 10), torch.full((200,), 3), torch.tensor([0, 100]))
    yield BagSample("long-bag", table(300, 36), ids(300, 1000), torch.tensor([0, 1, 999]))
    yield BagSample("many-bags", table(300, 8), ids(300, 999), torch.arange(0, 999, 3))
    yield BagSample("strided-table", table(30, 40)[::2, 3:33], ids(15, 40), offsets)
    yield BagSample("no-columns", table(16, 32)[:, :0], ids(16, 40), offsets)
    yield BagSample("transposed-table", table(20, 15).t(), ids(15, 40), offsets)
    yield BagSample("strided-indices", table(30, 20), ids(30, 80)[::2], offsets.repeat_interleave(2)[::2])
    yield BagSample("transposed-matrix", table(30, 20), ids(30, 7, 5).t(), None)
    for padding in (0, 6):
        name = f"padding-{padding}"
        yield BagSample(name, table(7, 20), ids(7, 40), offsets, padding_idx=padding)
    yield BagSample("all-padding", table(7, 20), torch.full((40,), 2), offsets, padding_idx=2)


def embedding_bag_samples(
    dtype: torch.dtype = torch.float32, modes: tuple[str, ...] = ("sum", "mean", "max"), small: bool = False
) -> list[BagSample]:
    """Calls of ``embedding_bag`` for one type of table: every mode, sum and mean also with per-sample weights.

    Args:
        dtype: type of the table and the weights.
        modes: which poolings.
        small: leave out most widths and the long inputs, for slow backends (interpreters).
    """
    rng = torch.Generator().manual_seed(20)
    samples = []
    for base in _base_samples(dtype, rng):
        skip = base.name.startswith("width") and base.weight.shape[1] not in _SMALL_WIDTHS
        if small and (skip or base.indices.numel() > 250):
            continue
        for mode in modes:
            samples.append(replace(base, name=f"{base.name}-{mode}", mode=MODES[mode]))
            if MODES[mode] in (SUM, MEAN):
                weights = torch.randn(base.indices.shape, generator=rng, dtype=torch.float64).to(dtype)
                if base.name.startswith("strided"):
                    weights = weights.repeat_interleave(2, dim=0)[::2]
                samples.append(
                    replace(base, name=f"{base.name}-{mode}-weighted", mode=MODES[mode], per_sample_weights=weights)
                )
    return samples


def expected_embedding_bag(sample: BagSample) -> torch.Tensor:
    """The result of a call in float64, bag by bag in plain loops: what every implementation is held against.

    Returns:
        float64 [num_bags, D].
    """
    weight = sample.weight.double()
    flat = sample.indices.reshape(-1).tolist()
    weights = None if sample.per_sample_weights is None else sample.per_sample_weights.reshape(-1).double()
    if sample.offsets is None:
        length = sample.indices.shape[1]
        bounds = [bag * length for bag in range(sample.num_bags + 1)]
    else:
        bounds = sample.offsets.tolist() + ([] if sample.include_last_offset else [len(flat)])
    out = torch.zeros(sample.num_bags, weight.shape[1], dtype=torch.float64)
    for bag in range(sample.num_bags):
        positions = [p for p in range(bounds[bag], bounds[bag + 1]) if flat[p] != sample.padding_idx]
        if not positions:
            continue
        rows = weight[[flat[p] for p in positions]]
        if sample.mode == MAX:
            out[bag] = rows.amax(0)
            continue
        if weights is not None:
            rows = rows * weights[positions].unsqueeze(1)
        out[bag] = rows.mean(0) if sample.mode == MEAN else rows.sum(0)
    return out


@dataclass(frozen=True)
class CollectionSample:
    """One call of the embedding_bag_collection operator over float tables, named."""

    name: str
    weights: list[torch.Tensor]
    features: list[FeaturePlan]
    indices: torch.Tensor
    offsets: torch.Tensor
    per_sample_weights: torch.Tensor | None
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.name

    @property
    def total_dim(self) -> int:
        """Columns of the output."""
        return sum(f.dim for f in self.features)

    @property
    def args(self) -> tuple[object, ...]:
        """The operator's arguments in order."""
        scales = [torch.empty(0, dtype=torch.float16)] * len(self.weights)
        plan = torch.tensor([list(f) for f in self.features])
        return (
            self.weights,
            scales,
            plan,
            self.indices,
            self.offsets,
            self.per_sample_weights,
            self.total_dim,
            self.dtype,
        )

    def feature_samples(self) -> list[BagSample]:
        """The same lookups as one call a feature."""
        batch = (self.offsets.numel() - 1) // len(self.features)
        samples = []
        for number, f in enumerate(self.features):
            bounds = self.offsets[number * batch : (number + 1) * batch + 1]
            begin, end = int(bounds[0]), int(bounds[-1])
            weights = self.per_sample_weights
            part = None if weights is None or f.mode == MAX else weights[begin:end].to(self.weights[f.table].dtype)
            samples.append(
                BagSample(
                    f"{self.name}-{number}",
                    self.weights[f.table],
                    self.indices[begin:end],
                    bounds - begin,
                    part,
                    f.mode,
                    include_last_offset=True,
                )
            )
        return samples


def collection_samples(dtype: torch.dtype = torch.float32) -> list[CollectionSample]:
    """Calls of ``embedding_bag_collection``: tables of several sizes, a shared table, all poolings, empty batches.

    Args:
        dtype: type of the tables and the output; float32 adds a sample whose tables differ in type.
    """
    rng = torch.Generator().manual_seed(21)
    sizes = [(40, 16), (7, 5), (1, 64), (100, 33)]
    tables = [torch.randn(rows, dim, generator=rng, dtype=torch.float64).to(dtype) for rows, dim in sizes]
    reads = [(0, SUM), (0, SUM), (1, MAX), (2, MEAN), (3, MEAN)]  # two features share the first table
    features, column = [], 0
    for table, mode in reads:
        features.append(FeaturePlan(table, sizes[table][1], column, mode, 0, 0))
        column += sizes[table][1]

    def make(name: str, batch: int, longest: int, weighted: bool, index: torch.dtype) -> CollectionSample:
        lengths = torch.randint(0, longest + 1, (len(reads) * batch,), generator=rng)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        parts = []
        for f, (table, _) in enumerate(reads):
            count = int(offsets[(f + 1) * batch] - offsets[f * batch])
            parts.append(torch.randint(0, sizes[table][0], (count,), generator=rng))
        indices = torch.cat(parts)
        weights = torch.randn(indices.numel(), generator=rng, dtype=torch.float64).to(dtype) if weighted else None
        return CollectionSample(name, tables, features, indices.to(index), offsets.to(index), weights, dtype)

    samples = [
        make("batch-6", 6, 5, False, torch.int64),
        make("batch-6-weighted", 6, 5, True, torch.int64),
        make("int32", 3, 4, True, torch.int32),
        make("batch-1", 1, 1, False, torch.int64),
        make("all-empty", 4, 0, False, torch.int64),
        make("no-batch", 0, 3, False, torch.int64),
    ]
    if dtype == torch.float32:
        mixed = [
            t.to(d) for t, d in zip(tables, (torch.float16, torch.bfloat16, torch.float32, torch.float16), strict=True)
        ]
        samples.append(replace(samples[1], name="mixed-types", weights=mixed))
    return samples


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
        for other in FLOAT_DTYPES[:3]:
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
    y = torch.from_numpy(out)
    if sample.bias is not None:
        y += sample.bias.double()
    functions = (
        lambda y: y,
        torch.relu,
        lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
        lambda y: 1 / (1 + torch.exp(-y)),
        lambda y: y / (1 + torch.exp(-y)),
    )
    return functions[sample.activation](y).reshape(*sample.input.shape[:-1], channels)


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
