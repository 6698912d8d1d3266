"""Options of `pytest bench`, and the case that a test is about."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bench.core import levels

os.environ.update(levels.caps())  # before torch and the peers are there to read them

from bench.core.harness import Comparison
from bench.core.sides import AbsentError


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--quick", action="store_true", help="small tables and few rounds: shows that it runs, not how fast"
    )
    group.addoption("--rows", type=int, help="rows of the single-table cases (default: 2,000,000)")


@pytest.fixture(scope="module")
def comparison(request: pytest.FixtureRequest) -> Iterator[Comparison]:
    """The case of a test; a single case is in memory at a time."""
    quick = request.config.getoption("--quick")
    try:
        yield Comparison(request.param.resized(request.config.getoption("--rows"), quick), quick)
    except AbsentError as error:
        pytest.skip(str(error))
