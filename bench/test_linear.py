"""`pytest bench`: every side of every case of int8 linear layers and MLPs is one benchmark, grouped by case.

pytest bench -k "int8-linear-1x512x512"
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import Comparison
from bench.operators import INT8_LINEAR
from bench.single import pairs, time_side


@pytest.mark.parametrize(("comparison", "name"), pairs(INT8_LINEAR), indirect=["comparison"])
def test_linear(benchmark: BenchmarkFixture, comparison: Comparison, name: str) -> None:
    time_side(benchmark, comparison, name)
