"""The chart of int8 linear layers: the rate of every case beside the best peer's and the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.core import plots
from bench.core.results import Result


def draw(results: Sequence[Result], cpu: str, folder: Path) -> None:
    """Writes int8_linear.png."""
    size = (9, 1.5 + 0.35 * max(4, len(results)))
    with plots.figure(folder / "int8_linear.png", 1, 1, size) as (figure, ((bars,),)):
        plots.bars(bars, results, [r.rate() / 1e9 for r in results], [r.rate(r.best) / 1e9 for r in results])
        limits = {r.case.threads: r.limit.rate for r in results if r.limit}
        for (threads, rate), style in zip(sorted(limits.items()), (":", "--"), strict=False):
            label = f"limit: int8 multiply-add, probed, {threads} thread{'s' * (threads > 1)}"
            bars.axvline(rate / 1e9, color="k", linestyle=style, label=label)
        bars.set(xlabel="GOP/s (two for each weight and row)", title=f"int8 linear layers and MLPs\n{cpu}")
        figure.legend(fontsize="small", loc="outside lower center", ncols=2)
