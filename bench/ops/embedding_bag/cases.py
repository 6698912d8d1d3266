"""Embedding bags: one case a line of the report, and the workload (tables, ids) of a case."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bench.core.cases import BenchCase, Target
from bench.core.machine import last_level_cache
from bench.core.sides import ONE_THREAD

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
TORCH = "torch"
SINGLE_TABLE_ROWS = 2_000_000
QUICK_ROWS = 20_000
MAX_POOL_IDS = 16_000_000  # 128 MB of int64
# fp16 outputs round to 11 bits, once or after every row; everything else is exact (see EmbeddingBagWorkload.table).
TOLERANCE = {"fp16": 4e-3}
DEFAULT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class EmbeddingBagCase(BenchCase):
    """`tables` tables of `rows` x `dim`, and `batch` bags of `length` ids in each table; bags are summed.

    kind: "forward", "dense backward" (gradient of the whole table) or "sparse backward" (gradient of the rows met).
    level: "function" (of a quantized table: the operator) or "module".
    """

    family: ClassVar[str] = "embedding_bag"
    dtype: str
    dim: int
    batch: int
    length: int
    rows: int = SINGLE_TABLE_ROWS
    tables: int = 1
    ids: str = "uniform"

    @property
    def name_parts(self) -> list[str]:
        parts = [] if self.kind == "forward" else [self.kind.replace(" ", "-")]
        parts += [self.level] if self.level != "function" else []
        parts += [f"{self.tables}tables"] if self.tables > 1 else []
        return [*parts, self.dtype, f"d{self.dim}", f"b{self.batch}", f"l{self.length}", self.ids]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, without its scale and bias."""
        return self.dim * BITS[self.dtype] // 8

    @property
    def amount(self) -> int:
        """Bytes of rows that one call reads."""
        return self.ids_per_call * self.row_bytes

    @property
    def size(self) -> int:
        """Bytes of all rows of all tables."""
        return self.tables * self.rows * self.row_bytes

    @property
    def ids_per_call(self) -> int:
        """Rows that one call reads."""
        return self.tables * self.batch * self.length

    def resized(self, rows: int | None, quick: bool) -> EmbeddingBagCase:
        """The same case with `rows` rows in a single table, and with small tables when `quick`."""
        if rows is not None and self.rows == SINGLE_TABLE_ROWS:
            return replace(self, rows=rows)
        return replace(self, rows=min(self.rows, QUICK_ROWS // self.tables)) if quick else self


# Ratios to reach against the best peer.
_UNIFORM = {
    ("fp32", 64): 2.0,
    ("fp32", 128): 2.0,
    ("int8", 64): 2.5,
    ("int8", 128): 3.0,
    ("int4", 64): 2.5,
    ("int4", 128): 2.5,
}
_ZIPF = {"fp32": 1.7, "int8": 2.1}


def _cases() -> Iterator[EmbeddingBagCase]:
    case, doubled = EmbeddingBagCase, (Target(1.8, ONE_THREAD),)
    for dtype in BITS:
        for dim in (64, 128):
            target = Target(_UNIFORM.get((dtype, dim), 1.0))
            yield case(dtype, dim, 4096, 20, targets=(target,), near_limit=True)
            yield case(dtype, dim, 4096, 20, ids="zipf", targets=(Target(_ZIPF.get(dtype, 1.0)),))
    for dtype in ("fp32", "int8"):
        yield case(dtype, 64, 64, 20, targets=(Target(1.7),))
        yield case(dtype, 64, 1, 50)
        yield case(dtype, 64, 1, 50, level="module")
    tables = case("fp32", 64, 512, 1, rows=300_000, tables=26, targets=(Target(2.5, TORCH),))
    yield tables
    yield replace(tables, length=10, targets=(Target(1.7, TORCH),))
    yield replace(tables, batch=1, targets=(Target(10.0, TORCH),))
    yield case("fp32", 64, 2048, 20, rows=100_000, kind="dense backward", targets=(Target(2.0),))
    yield case("fp32", 64, 2048, 20, rows=1_000_000, kind="sparse backward")
    for dtype in ("fp32", "int8"):
        for dim in (64, 128):
            yield case(dtype, dim, 4096, 20, threads=2, targets=doubled)
    yield replace(tables, length=10, threads=2, targets=doubled)


CASES = tuple(_cases())


class Batch(NamedTuple):
    """One call, feature-major. indices: int64 [tables * batch * length]; offsets: int64 [tables * batch + 1]."""

    indices: Tensor
    offsets: Tensor


class EmbeddingBagWorkload:
    """The tables and a pool of batches of one case, both from a fixed seed.

    The pool touches twice the last-level cache before it comes round again (or MAX_POOL_IDS ids), so that a batch
    never finds its own rows in the cache. `checked`: the number of batches that the gate runs.
    """

    checked = 2

    def __init__(self, case: EmbeddingBagCase, quick: bool = False) -> None:
        self.case, self.quick = case, quick
        self._generator = torch.Generator().manual_seed(17)
        count = -(-2 * last_level_cache() // (case.ids_per_call * case.row_bytes))
        count = 4 if quick else max(16, min(count, 4096, MAX_POOL_IDS // case.ids_per_call))
        shape = (count, case.ids_per_call)
        if case.ids == "zipf":  # log-uniform ranks are Zipf with exponent 1; the product scatters the hot rows
            rank = torch.rand(shape, generator=self._generator, dtype=torch.float64).mul_(math.log(case.rows)).exp_()
            self.indices = rank.long().sub_(1).clamp_(0, case.rows - 1).mul_(2_654_435_761).remainder_(case.rows)
        else:
            self.indices = torch.randint(case.rows, shape, generator=self._generator)
        self.offsets = torch.arange(0, case.ids_per_call + 1, case.length)

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, number: int) -> Batch:
        """Batch `number` modulo the size of the pool."""
        return Batch(self.indices[number % len(self)], self.offsets)

    @functools.cached_property
    def table(self) -> Tensor:
        """[tables, rows, dim], fp16 for the fp16 cases, else fp32.

        Every row is a grid of 2**bits values with a power-of-two step that is used from end to end, so any row-wise
        quantization and any order of summation is exact and the gate needs no allowance for rounding.
        """
        case, bits = self.case, min(8, BITS[self.case.dtype])
        dtype = torch.float16 if case.dtype == "fp16" else torch.float32
        table = torch.empty(case.tables, case.rows, case.dim, dtype=dtype)
        for chunk in table.view(-1, case.dim).split(1 << 16):
            steps = torch.randint(2**bits, chunk.shape, generator=self._generator, dtype=torch.uint8)
            steps[:, 0], steps[:, 1] = 0, 2**bits - 1
            exponent = torch.randint(-1 - bits, 2 - bits, (len(chunk), 1), generator=self._generator)
            chunk.copy_(torch.ldexp(steps.float() - 2 ** (bits - 1), exponent))
        return table

    @functools.cached_property
    def grad_output(self) -> Tensor:
        """[batch, dim] gradient for the backward cases, on a grid as the tables are."""
        shape = (self.case.batch, self.case.dim)
        return torch.randint(-64, 65, shape, generator=self._generator).float() / 64

    def probe_ids(self, limit: int = 2_000_000) -> Tensor:
        """Rows of the pool (at most `limit`), numbered through all tables: [n] int64."""
        case = self.case
        first = (torch.arange(case.tables) * case.rows).repeat_interleave(case.batch * case.length)
        return (self.indices[: max(1, limit // case.ids_per_call)] + first).flatten()

    def expected(self, batch: Batch) -> Tensor:
        """The right answer, in float64 and by other means than any side: [batch, tables * dim], or the gradient."""
        case = self.case
        bag = torch.arange(case.ids_per_call) // case.length
        if case.kind != "forward":
            gradient = torch.zeros(case.rows, case.dim, dtype=torch.float64)
            return gradient.index_add_(0, batch.indices, self.grad_output.double()[bag])
        rows = batch.indices + (bag // case.batch) * case.rows
        pooled = torch.zeros(case.tables * case.batch, case.dim, dtype=torch.float64)
        pooled.index_add_(0, bag, self.table.view(-1, case.dim)[rows].double())
        return pooled.view(case.tables, case.batch, case.dim).transpose(0, 1).reshape(case.batch, -1)

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Raises AssertionError unless `outputs`, in float64, are right for batches 0, 1, 2 and so on."""
        tolerance = TOLERANCE.get(self.case.dtype, DEFAULT_TOLERANCE)
        for number, output in enumerate(outputs):
            expected = self.expected(self.batch(number))
            torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
