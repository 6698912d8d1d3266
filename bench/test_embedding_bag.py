"""`pytest bench`: every side of every case is one benchmark, grouped by case.

    pytest bench -k "int8 and zipf"     pytest bench --quick     pytest bench --benchmark-json=FILE

The times in the table come one side after the other and are for orientation; the ratio in `extra_info` comes from
alternating the side with ours, after both have passed the gate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES
from bench.harness import Comparison, quiet, sample
from bench.peers import OURS, AbsentError, sides_of

ROUNDS, QUICK_ROUNDS = 50, 5
PAIRS = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in (OURS, *sides_of(case))]


@pytest.fixture(scope="module")
def comparison(request: pytest.FixtureRequest) -> Iterator[Comparison]:
    """The case of this test: one at a time is in memory."""
    quick = request.config.getoption("--quick")
    try:
        yield Comparison(request.param.resized(request.config.getoption("--rows"), quick), quick)
    except AbsentError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("comparison", "name"), PAIRS, indirect=["comparison"])
def test_embedding_bag(benchmark: BenchmarkFixture, comparison: Comparison, name: str) -> None:
    work, case, limit = comparison.work, comparison.work.case, comparison.limit
    benchmark.group = case.name
    side = comparison.own
    if name != OURS:
        try:
            side, pair = comparison.against(name)
        except AbsentError as error:
            pytest.skip(str(error))
        benchmark.extra_info |= {"ratio": pair.ratio, "ratio_p10": pair.low, "ratio_p90": pair.high}
    numbers = itertools.count()
    rounds = QUICK_ROUNDS if comparison.quick else ROUNDS
    with quiet(case.threads), side.context():
        sample(side, work, 0, 1)  # warm up
        torch.set_num_threads(side.threads)
        benchmark.pedantic(
            side.run, setup=lambda: ((side.prepare(work.batch(next(numbers))),), {}), rounds=rounds, iterations=1
        )
    if benchmark.stats:  # None under --benchmark-disable
        rate = case.ids_per_call * case.row_bytes / benchmark.stats.stats.median
        benchmark.extra_info |= {"bytes_per_second": rate}
        if limit:
            benchmark.extra_info |= {"probe_bytes_per_second": limit.gather, "share_of_probe": rate / limit.gather}
