"""`pytest bench`: every side of every case of sparse linear layers is one benchmark, grouped by case.

pytest bench -k "sparse-linear-block4x1-s90 and 64x1024"
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import Comparison
from bench.operators import SPARSE_LINEAR
from bench.single import pairs, time_side


@pytest.mark.parametrize(("comparison", "name"), pairs(SPARSE_LINEAR), indirect=["comparison"])
def test_sparse(benchmark: BenchmarkFixture, comparison: Comparison, name: str) -> None:
    time_side(benchmark, comparison, name)
