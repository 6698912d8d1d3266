"""Latency and bytes of models that do the same work, taking turns in random order in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_kernels.data.errors import DataError
from recsys_kernels.data.examples import Batch, Dataset
from recsys_kernels.models.dlrm import DLRM, DLRMConfig
from recsys_kernels.models.plain import PlainDLRM, model_input

from .variants import BASELINE, PATTERN, VARIANTS, Material

BATCH_SIZES = (1, 64, 512)
# p99 of 600 rounds has 6 slower ones behind it; the whole measurement stays under 10 s on one core.
ROUNDS = 600
WARM_UP = 30
POOL = 64  # different batches, so that a call does not find its own rows in the cache
_TABLE_BYTES = {"float32": 4.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Latency:
    """Time of one forward call, microseconds; `speedup` is the median over rounds of baseline / this."""

    p50_us: float
    p99_us: float
    speedup: float


@dataclass(frozen=True)
class Cost:
    """Bytes held and time taken: latency by batch size."""

    table_bytes: int
    total_bytes: int
    latency: dict[int, Latency]


def model_bytes(model: DLRM | PlainDLRM) -> tuple[int, int]:
    """(bytes of the tables, bytes of all weights) of a model."""
    if isinstance(model, PlainDLRM):
        tables = sum(weight.nbytes for weight in model.bags.state_dict().values())
    else:
        tables = model.embeddings.nbytes
    return tables, tables + sum(weight.nbytes for weight in model.head.state_dict().values())


def measure(sides: Mapping[str, DLRM | PlainDLRM], pools: Mapping[int, Sequence[Batch]]) -> dict[str, Cost]:
    """Measures every side on the same batches, one call each a round, in an order drawn anew each round.

    Args:
        sides: name -> model in eval mode; `BASELINE` is a `PlainDLRM`, the one that others are compared with.
        pools: batch size -> batches to take in turn.

    Returns:
        The cost of each side. Bringing a batch into the form that a side reads is not part of the time.
    """
    times: dict[str, dict[int, np.ndarray]] = {name: {} for name in sides}
    with _no_collector(), torch.inference_mode():
        for size, batches in pools.items():
            inputs = {name: [model_input(model, batch) for batch in batches] for name, model in sides.items()}
            for name, nanoseconds in _alternate(sides, inputs, ROUNDS).items():
                times[name][size] = nanoseconds / 1e3
    costs = {}
    for name, model in sides.items():
        latency = {
            size: Latency(
                float(np.percentile(micros, 50)),
                float(np.percentile(micros, 99)),
                float(np.median(times[BASELINE][size] / micros)),
            )
            for size, micros in times[name].items()
        }
        costs[name] = Cost(*model_bytes(model), latency)
    return costs


def real_batches(data: Dataset, seed: int) -> dict[int, list[Batch]]:
    """Batches of the test part for every batch size."""
    random = np.random.default_rng(seed)
    rows = data.rows("test")
    return {size: [data.batch(random.choice(rows, size)) for _ in range(POOL)] for size in BATCH_SIZES}


def grown_batches(pools: Mapping[int, Sequence[Batch]], rows: int, seed: int) -> dict[int, list[Batch]]:
    """The same bags with ids of tables of `rows` rows, frequency proportional to 1 / rank (Zipf)."""
    random = np.random.default_rng(seed)
    stride = _coprime(rows)

    def ids(count: int) -> torch.Tensor:
        rank = np.exp(random.random(count) * np.log(rows)).astype(np.int64) % rows
        return torch.from_numpy(rank * stride % rows)  # popular rows must lie all over the table

    return {size: [b._replace(indices=ids(len(b.indices))) for b in pool] for size, pool in pools.items()}


def grown_models(
    config: DLRMConfig, rows: int, batches: Sequence[Batch], sparsity: float | None = None, pattern: str = PATTERN
) -> dict[str, DLRM | PlainDLRM]:
    """Every side with tables of `rows` rows of random weights.

    Args:
        config: the shape of the model.
        rows: of every table.
        batches: input for such tables, to find the ranges of static layers on.
        sparsity, pattern: of pruned MLPs, see `Material`.

    Raises:
        DataError: they do not fit into the memory that is free.
    """
    need = grown_bytes(config, rows)
    free = available_memory()
    if need > 0.9 * free:
        fits = int(rows * 0.9 * free / need)
        raise DataError(
            f"--rows {rows}: needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; "
            f"about {fits} rows would fit"
        )
    tables = tuple(replace(table, rows=rows) for table in config.tables)
    model = DLRM(replace(config, tables=tables)).eval()
    return all_sides(model, Material([batch[:3] for batch in batches], sparsity=sparsity, pattern=pattern))


def all_sides(model: DLRM, material: Material) -> dict[str, DLRM | PlainDLRM]:
    """The plain torch baseline and every variant of a trained model."""
    sides: dict[str, DLRM | PlainDLRM] = {BASELINE: PlainDLRM(model)}
    for variant in VARIANTS:
        sides[variant.name] = variant.make(model, material).eval()
    return sides


def grown_bytes(config: DLRMConfig, rows: int) -> int:
    """Bytes that all sides of `grown_models` hold together (the float32 tables twice).

    Sides do not share tables: one would find in the cache what another has read.
    """
    values = rows * config.dim * len(config.tables)
    scales = sum(4 for variant in VARIANTS if variant.tables != "float32") * rows * len(config.tables)
    return int(values * (_TABLE_BYTES["float32"] + sum(_TABLE_BYTES[v.tables] for v in VARIANTS))) + scales


def available_memory() -> int:
    """Bytes that can be allocated without swapping, also inside a container with a limit."""
    free = 1 << 62
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].strip().isdigit():
        # Cached file pages count as used, but give way to allocations.
        cached = (line.split()[1] for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file "))
        free = min(free, int(limit[0]) - int(used[0]) + int(next(cached, "0")))
    return free


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _coprime(rows: int) -> int:
    """A stride of about 0.6 rows that visits every row."""
    stride = max(1, int(rows * 0.618))
    while np.gcd(stride, rows) != 1:
        stride += 1
    return stride


def _alternate(
    sides: Mapping[str, Callable[..., Any]], inputs: Mapping[str, Sequence[tuple[Any, ...]]], rounds: int
) -> dict[str, np.ndarray]:
    """Nanoseconds of each call, int64 [rounds] a side.

    A fixed order, or one that only rotates, would time a side mostly behind the same other one, in the caches that
    this one leaves. The seed is fixed: runs differ in what is measured, not in how.
    """
    names = list(sides)
    random = np.random.default_rng(0)
    out = {name: np.zeros(rounds, np.int64) for name in names}
    for number in range(-WARM_UP, rounds):
        for place in random.permutation(len(names)):
            name = names[place]
            model, arguments = sides[name], inputs[name][number % POOL]
            start = time.perf_counter_ns()
            model(*arguments)
            if number >= 0:
                out[name][number] = time.perf_counter_ns() - start
    return out


@contextmanager
def _no_collector() -> Iterator[None]:
    """Stops garbage collection while calls are timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
