"""The charts of a report."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.cases import LIMIT_SHARE
from bench.harness import Result
from bench.operators import EMBEDDING_BAG, INT8_LINEAR, SPARSE_LINEAR


def _bars(axis: Any, results: list[Result], ours: list[float], theirs: list[float]) -> None:
    """Two bars a case, the first case on top."""
    place = [-number for number in range(len(results))]
    axis.barh([p + 0.2 for p in place], ours, 0.4, color="C0", label="recsys_kernels")
    axis.barh([p - 0.2 for p in place], theirs, 0.4, color="C1", label="best peer")
    axis.set_yticks(place, [result.case.name for result in results], fontsize="small")


def _roofline(axis: Any, large: list[Any]) -> None:
    """Rate over row size, with the probed roofs."""
    by_size = {r.case.row_bytes: r.limit for r in large}
    random, straight = ([getattr(limit, name) / 1e9 for limit in by_size.values()] for name in ("gather", "sequential"))
    axis.plot(list(by_size), random, "k-", label="limit: random rows, probed")
    axis.plot(list(by_size), straight, "k--", label="limit: sequential read, probed")
    for dtype, marker in {"fp32": "o", "fp16": "s", "int8": "^", "int4": "D"}.items():
        mine = [r for r in large if r.case.dtype == dtype]
        if not mine:
            continue
        sizes, theirs = [r.case.row_bytes for r in mine], [r.rate(r.best) / 1e9 for r in mine]
        axis.plot(sizes, [r.rate() / 1e9 for r in mine], f"C0{marker}", label=f"{dtype}, recsys_kernels")
        axis.plot(sizes, theirs, f"C1{marker}", label=f"{dtype}, best peer", fillstyle="none")
    axis.set(
        xlabel="Row size (bytes)", ylabel="Rows read (GB/s)", title="Roofline: uniform ids, B=4096, L=20, one thread"
    )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _embedding_bag(results: list[Result], cpu: str, path: Path) -> None:
    limited = [result for result in results if result.limit]
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(14, 2.5 + 0.3 * max(10, len(limited))), layout="constrained")
    _roofline(roof, sorted((r for r in limited if r.case.near_limit), key=lambda r: (r.case.row_bytes, r.case.dtype)))
    theirs = [100 * r.rate(r.best) / r.limit.rate for r in limited if r.limit]
    _bars(bars, limited, [100 * (r.share or 0) for r in limited], theirs)
    bars.axvline(100 * LIMIT_SHARE, color="k", linestyle=":", label=f"{LIMIT_SHARE:.0%} of the limit")
    bars.set(xlabel="Share of the probed limit for the same rows (%)", title="Every forward case")
    bars.legend(fontsize="small")
    figure.suptitle(cpu)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _int8_linear(results: list[Result], cpu: str, path: Path) -> None:
    figure, bars = plt.subplots(figsize=(9, 1.5 + 0.35 * max(4, len(results))), layout="constrained")
    _bars(bars, results, [r.rate() / 1e9 for r in results], [r.rate(r.best) / 1e9 for r in results])
    limits = {r.case.threads: r.limit.rate for r in results if r.limit}
    for (threads, rate), style in zip(sorted(limits.items()), (":", "--"), strict=False):
        label = f"limit: int8 multiply-add, probed, {threads} thread{'s' * (threads > 1)}"
        bars.axvline(rate / 1e9, color="k", linestyle=style, label=label)
    bars.set(xlabel="GOP/s (two for each weight and row)", title=f"int8 linear layers and MLPs\n{cpu}")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """From which sparsity on the ratio stays above 1; None where it does for all, or for none.

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


def _curves(results: list[Result]) -> dict[tuple[int, int, int], dict[str, list[Result]]]:
    """By rows, features in and out, then by pattern: results over sparsity of forward cases on one thread."""
    panels: dict[tuple[int, int, int], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda result: result.case.sparsity):
        case = result.case
        plain = (case.values, case.kind, case.level, case.threads) == ("fp32", "forward", "function", 1)
        if plain and result.baseline:
            panels[case.batch, case.ins, case.outs][case.pattern].append(result)
    return panels


def _curve(axis: Any, pattern: str, mine: list[Result], color: str) -> None:
    """One pattern's speed and that of its fastest sparse peer relative to the dense layer, and where they cross it."""
    ours = [(r.case.sparsity, r.baseline.ratio) for r in mine if r.baseline]
    theirs = [(r.case.sparsity, r.baseline.ratio / r.best_other.ratio) for r in mine if r.baseline and r.best_other]
    for points, style, name in ((ours, "o-", pattern), (theirs, "x:", f"{pattern}, best sparse peer")):
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), f"{color}{style}", label=f"{name}: {_from_where(points)}")
        at = crossover(points)
        if at is not None:
            axis.plot([at], [1.0], f"{color}D", fillstyle="none", markersize=10)


def _sparse_linear(results: list[Result], cpu: str, path: Path) -> None:
    panels = _curves(results)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4.5 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((batch, ins, outs), patterns) in zip(axes.flat, sorted(panels.items()), strict=False):
        for number, (pattern, mine) in enumerate(patterns.items()):
            _curve(axis, pattern, mine, f"C{number}")
        axis.axhline(1.0, color="k", linewidth=1)
        axis.set(title=f"{batch} x {ins} x {outs}", xlabel="Sparsity", ylabel="Speed relative to the dense layer")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}x")
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"Pruned layers, fp32, one thread (diamond: where a curve crosses the dense layer)\n{cpu}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


_CHARTS = (
    (EMBEDDING_BAG, "roofline.png", _embedding_bag),
    (INT8_LINEAR, "int8_linear.png", _int8_linear),
    (SPARSE_LINEAR, "sparse_linear.png", _sparse_linear),
)


def draw(results: list[Result], cpu: str, folder: Path) -> None:
    """Draws a chart into `folder` for every operator that has results."""
    for operator, name, chart in _CHARTS:
        mine = [result for result in results if isinstance(result.case, operator.case)]
        if mine:
            chart(mine, cpu, folder / name)
