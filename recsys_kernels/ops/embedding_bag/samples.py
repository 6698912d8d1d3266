"""Sample inputs of the embedding-bag operators, and the expected results of ``embedding_bag``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .quantized import QuantizedEmbeddingBag
from .reference import MAX, MEAN, MODES, SUM
from .spec import FeaturePlan


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
    """The result of a call in float64, bag by bag in plain loops. Every implementation is held against it.

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


# Each kind of input once: an opcheck takes 20 ms.
_DIFFERENT = (
    "width-33",
    "int32",
    "matrix",
    "no-bags",
    "matrix-no-rows",
    "strided-table",
    "strided-indices",
    "padding-6",
)


def operator_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of every operator of the family: names and flat arguments."""
    names = {f"{name}-{mode}" for name in _DIFFERENT for mode in MODES}
    for sample in embedding_bag_samples(torch.float32):
        if any(sample.name.startswith(name) for name in names):
            yield from _calls(sample)
    for collection in collection_samples():
        yield "embedding_bag_collection", collection.args
    for bits in (8, 4):
        rows = torch.zeros(6, 9 if bits == 8 else 5, dtype=torch.uint8)
        yield "quantize_rowwise", (torch.randn(6, 9), bits, -3, rows, torch.zeros(6, 2, dtype=torch.float16))


def _calls(sample: BagSample) -> Iterator[tuple[str, tuple[Any, ...]]]:
    grad = torch.randn(sample.num_bags, sample.weight.shape[1])
    yield "embedding_bag", sample.args
    if sample.mode == MAX:
        bags = (sample.indices, sample.offsets, sample.padding_idx, sample.include_last_offset)
        yield "embedding_bag_max", (sample.weight, *bags, True)
        return
    yield "embedding_bag_backward", (grad, *sample.bag_args, sample.weight.shape[0])
    if sample.per_sample_weights is not None:
        spec = (sample.mode, sample.padding_idx, sample.include_last_offset)
        yield "embedding_bag_weights_backward", (grad, sample.weight, sample.indices, sample.offsets, *spec)
        bag = torch.nn.EmbeddingBag.from_pretrained(sample.weight)
        table = QuantizedEmbeddingBag.from_float(bag, 8 if sample.mode else 4).table
        yield "quantized_embedding_bag", (*table, *sample.bag_args, torch.bfloat16)
