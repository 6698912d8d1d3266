"""The chart of sparse linear layers: speed relative to the dense layer over sparsity, one panel a shape."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.core import plots
from bench.core.results import Result


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """From which sparsity on the ratio stays above 1; None where the ratio does so for all points, or for none.

    points: (sparsity, ratio), ascending; between two of them the logarithm of the ratio is taken as straight.
    """
    for (before, low), (after, high) in reversed(list(itertools.pairwise(points))):
        if low < 1.0 <= high:
            return before + (after - before) * math.log(low) / (math.log(low) - math.log(high))
    return None


def _from_where(points: Sequence[tuple[float, float]]) -> str:
    """The crossover in words."""
    at = crossover(points)
    if at is not None:
        return f"faster from {at:.0%} on"
    if points[-1][1] < 1.0:
        return f"slower up to {points[-1][0]:.0%}"
    return f"faster from {points[0][0]:.0%} or less on"


def _curves(results: Sequence[Result]) -> dict[tuple[int, int, int], dict[str, list[Result]]]:
    """By rows, features in and out, then by pattern: results over sparsity of forward cases on one thread."""
    panels: dict[tuple[int, int, int], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda result: result.case.sparsity):
        case = result.case
        plain = (case.values, case.kind, case.level, case.threads) == ("fp32", "forward", "function", 1)
        if plain and result.baseline:
            panels[case.batch, case.ins, case.outs][case.pattern].append(result)
    return panels


def _curve(axis: Any, pattern: str, mine: list[Result], color: str) -> None:
    """A pattern's speed and its fastest sparse peer's, relative to the dense layer, and where the curves cross 1."""
    ours = [(r.case.sparsity, r.baseline.ratio) for r in mine if r.baseline]
    theirs = [(r.case.sparsity, r.baseline.ratio / r.best_other.ratio) for r in mine if r.baseline and r.best_other]
    for points, style, name in ((ours, "o-", pattern), (theirs, "x:", f"{pattern}, best sparse peer")):
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), f"{color}{style}", label=f"{name}: {_from_where(points)}")
        at = crossover(points)
        if at is not None:
            axis.plot([at], [1.0], f"{color}D", fillstyle="none", markersize=10)


def _decorate(axis: Any, shape: tuple[int, int, int]) -> None:
    axis.axhline(1.0, color="k", linewidth=1)
    title = " x ".join(map(str, shape))
    axis.set(title=title, xlabel="Sparsity", ylabel="Speed relative to the dense layer")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def draw(results: Sequence[Result], cpu: str, folder: Path) -> None:
    """Writes sparse_linear.png, where there are results with the dense layer."""
    panels = _curves(results)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plots.figure(folder / "sparse_linear.png", rows, columns, (6 * columns, 4.5 * rows)) as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (shape, patterns) in zip(axes.flat, sorted(panels.items()), strict=False):
            for number, (pattern, mine) in enumerate(patterns.items()):
                _curve(axis, pattern, mine, f"C{number}")
            _decorate(axis, shape)
        title = "Pruned layers, fp32, one thread (diamond: where a curve crosses the dense layer)"
        figure.suptitle(f"{title}\n{cpu}")
