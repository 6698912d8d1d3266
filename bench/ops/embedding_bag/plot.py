"""The chart of embedding bags: rates over row size, and the share of the limit that every case reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.core import plots
from bench.core.results import LIMIT_SHARE, Result


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


def draw(results: Sequence[Result], cpu: str, folder: Path) -> None:
    """Writes roofline.png."""
    limited = [result for result in results if result.limit]
    size = (14, 2.5 + 0.3 * max(10, len(limited)))
    with plots.figure(folder / "roofline.png", 1, 2, size) as (figure, ((roof, bars),)):
        near = [result for result in limited if result.case.near_limit]
        _roofline(roof, sorted(near, key=lambda result: (result.case.row_bytes, result.case.dtype)))
        theirs = [100 * r.rate(r.best) / r.limit.rate for r in limited if r.limit]
        plots.bars(bars, limited, [100 * (r.share or 0) for r in limited], theirs)
        bars.axvline(100 * LIMIT_SHARE, color="k", linestyle=":", label=f"{LIMIT_SHARE:.0%} of the limit")
        bars.set(xlabel="Share of the probed limit for the same rows (%)", title="Every forward case")
        bars.legend(fontsize="small")
        figure.suptitle(cpu)
