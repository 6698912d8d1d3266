"""The charts of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.cases import LIMIT_SHARE
from bench.harness import Result
from bench.operators import EMBEDDING_BAG, INT8_LINEAR


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


_CHARTS = ((EMBEDDING_BAG, "roofline.png", _embedding_bag), (INT8_LINEAR, "int8_linear.png", _int8_linear))


def draw(results: list[Result], cpu: str, folder: Path) -> None:
    """Draws a chart into `folder` for every operator that has results."""
    for operator, name, chart in _CHARTS:
        mine = [result for result in results if isinstance(result.case, operator.case)]
        if mine:
            chart(mine, cpu, folder / name)
