"""`pytest bench`: every side of every case of every family is one benchmark, grouped by case.

pytest bench -k "int8 and zipf"     pytest bench -k int8-linear-1x512x512     pytest bench -k "sparse-linear and s90"
pytest bench --quick                pytest bench --benchmark-json=FILE
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.core.families import registered
from bench.core.harness import Comparison
from bench.core.single import pairs, time_side
from bench.ops import load_families

load_families()


@pytest.mark.parametrize(
    ("comparison", "name"), [pair for family in registered() for pair in pairs(family)], indirect=["comparison"]
)
def test_side(benchmark: BenchmarkFixture, comparison: Comparison, name: str) -> None:
    time_side(benchmark, comparison, name)
