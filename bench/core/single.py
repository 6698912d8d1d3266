"""One side of one case under pytest-benchmark, for any family.

The times in pytest's table come one side after the other and are for orientation; the ratio in `extra_info` comes from
alternating the side with ours, after both have passed the gate.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.core.families import Family
from bench.core.harness import Comparison, quiet, sample
from bench.core.sides import OURS, AbsentError

ROUNDS, QUICK_ROUNDS = 50, 5


def pairs(family: Family) -> list[Any]:
    """Parameters for the fixture `comparison` (see conftest.py) and for `name`: every side of every case."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in family.cases
        for name in (OURS, *family.peers.sides_of(case))
    ]


def time_side(benchmark: BenchmarkFixture, comparison: Comparison, name: str) -> None:
    """Times side `name`; skips the test where that side cannot run."""
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
        rate = case.amount / benchmark.stats.stats.median
        benchmark.extra_info |= {"unit": comparison.family.unit, "rate": rate / 1e9}
        if limit:
            benchmark.extra_info |= {"limit": limit.rate / 1e9, "share_of_limit": rate / limit.rate}
