"""`pytest bench`: every side of every embedding-bag case is one benchmark, grouped by case.

pytest bench -k "int8 and zipf"     pytest bench --quick     pytest bench --benchmark-json=FILE
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import Comparison
from bench.operators import EMBEDDING_BAG
from bench.single import pairs, time_side


@pytest.mark.parametrize(("comparison", "name"), pairs(EMBEDDING_BAG), indirect=["comparison"])
def test_embedding_bag(benchmark: BenchmarkFixture, comparison: Comparison, name: str) -> None:
    time_side(benchmark, comparison, name)
