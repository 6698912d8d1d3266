"""The result of the main job as tables on a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from .cost import Cost
from .plots import change
from .run import PRUNED_TOLERANCE, JobResult
from .variants import share_of


def summary(result: JobResult) -> Group:
    """Quality, size and latency of every variant, and the same cost for grown tables if measured."""
    rows = result.data.rows("test")
    quality = Table(
        title=f"{result.data.name}: quality on {len(rows):,} later examples, and size",
        caption="AUC: higher is better; log loss: lower is better\n"
        "MLP: 8-bit linear layers, activations quantized row by row (dynamic),\n"
        "by ranges of training examples (static), or so after more training (QAT);\n"
        "pruned: trained more while weights were dropped\n"
        f"{_pruned(result)}\n"
        f"with every table zeroed the AUC is {result.without_tables.auc:.4f}: what the tables are worth",
    )
    for name in ("form of the model", "AUC", "change", "log loss", "tables, kB", "all, kB"):
        quality.add_column(name, justify="left" if name == "form of the model" else "right")
    for name, measured in result.quality.items():
        cost = result.cost[name]
        quality.add_row(
            result.title(name),
            f"{measured.auc:.4f}",
            change(result.auc_change(name)),
            f"{measured.log_loss:.4f}",
            f"{cost.table_bytes / 1e3:,.1f}",
            f"{cost.total_bytes / 1e3:,.1f}",
            style="bold" if name == result.chosen else None,
        )
    parts = [quality, _latency(result, result.cost, f"{result.data.name}: time of one call")]
    if result.grown:
        size = next(iter(result.grown.values())).table_bytes / 1e9
        title = f"cost only: every table grown to {result.settings.rows:,} random rows ({size:.2f} GB in 32-bit)"
        parts.append(_latency(result, result.grown, title, sizes=True))
    return Group(*parts)


def _pruned(result: JobResult) -> str:
    """Which pruned form to take."""
    settings = result.settings
    what = f"{share_of(settings.sparsity, settings.pattern):.0%} ({settings.pattern})"
    if result.chosen_pruned is None:
        return f"no form pruned by {what} keeps the validation AUC within {PRUNED_TOLERANCE}"
    change_text = change(result.auc_change(result.chosen_pruned))
    return f"of those pruned by {what} take {result.chosen_pruned}: the smallest; AUC {change_text}"


def _latency(result: JobResult, costs: dict[str, Cost], title: str, sizes: bool = False) -> Table:
    """One line a batch size and variant: fits 80 columns, and reads without a legend."""
    table = Table(title=title, caption="speed: against plain torch, call by call")
    table.add_column("batch", justify="right")
    table.add_column("form of the model")
    for name in ["median, µs", "p99, µs", "speed", *(["tables, MB"] if sizes else [])]:
        table.add_column(name, justify="right")
    for size in next(iter(costs.values())).latency:
        table.add_section()
        for name, cost in costs.items():
            one = cost.latency[size]
            cells = [f"{one.p50_us:,.0f}", f"{one.p99_us:,.0f}", f"{one.speedup:.2f}x"]
            cells += [f"{cost.table_bytes / 1e6:,.1f}"] if sizes else []
            style = "bold" if name == result.chosen else None
            table.add_row(f"{size:,}", result.title(name), *cells, style=style)
    return table
