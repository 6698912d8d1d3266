"""Options of `pytest bench`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--quick", action="store_true", help="small tables and few rounds: shows that it runs, not how fast"
    )
    group.addoption("--rows", type=int, help="rows of the single-table cases (default: 2,000,000)")
