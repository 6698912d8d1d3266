"""What the charts of all families share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.core.families import registered
from bench.core.results import Result


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its [rows, columns] axes; the file is written at the end. size: inches, width and height."""
    made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield made, axes
        made.savefig(path, dpi=120)
    finally:
        plt.close(made)


def bars(axis: Any, results: Sequence[Result], ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Two horizontal bars a case, the first case on top."""
    place = [-number for number in range(len(results))]
    axis.barh([p + 0.2 for p in place], ours, 0.4, color="C0", label="recsys_kernels")
    axis.barh([p - 0.2 for p in place], theirs, 0.4, color="C1", label="best peer")
    axis.set_yticks(place, [result.case.name for result in results], fontsize="small")


def draw(results: Sequence[Result], cpu: str, folder: Path) -> None:
    """Has every family that has results and a plot draw its charts into `folder`."""
    for family in registered():
        mine = [result for result in results if result.case.family == family.name]
        if mine and family.plot:
            importlib.import_module(family.plot).draw(mine, cpu, folder)
