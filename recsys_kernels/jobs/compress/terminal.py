"""The result of the main job as tables on a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from recsys_kernels.models.metrics import decimals

from .cost import Cost
from .run import PRUNED_TOLERANCE, JobResult
from .variants import BASELINE, share_of


def summary(result: JobResult) -> Group:
    """Quality, size and latency of every variant, and the same cost for grown tables if measured."""
    parts = [_quality(result), _latency(result, result.cost, f"{result.data.name}: time of one call")]
    if result.grown:
        size = next(iter(result.grown.values())).table_bytes / 1e9
        title = f"cost only: every table grown to {result.settings.rows:,} random rows ({size:.2f} GB in 32-bit)"
        parts.append(_latency(result, result.grown, title, sizes=True))
    return Group(*parts)


def _quality(result: JobResult) -> Table:
    """One line a variant, and one for gradient-boosted trees."""
    rows = result.data.rows("test")
    auc, loss = decimals(result.auc.deviation), decimals(result.log_loss_deviation)
    table = Table(
        title=f"{result.data.name}: quality on {len(rows):,} later examples, and size", caption=_caption(result)
    )
    for name in ("form of the model", "AUC", "change", "log loss", "tables, kB", "all, kB"):
        table.add_column(name, justify="left" if name == "form of the model" else "right")
    for name, measured in result.quality.items():
        cost = result.cost[name]
        table.add_row(
            result.title(name),
            f"{measured.auc:.{auc}f}",
            "" if name == BASELINE else str(result.change[name]).replace(" ± ", "±"),
            f"{measured.log_loss:.{loss}f}",
            f"{cost.table_bytes / 1e3:,.1f}",
            f"{cost.total_bytes / 1e3:,.1f}",
            style="bold" if name == result.chosen else None,
        )
    table.add_section()
    trees = result.boosted_quality
    behind = str(-result.lead).replace(" ± ", "±")
    table.add_row("gradient-boosted trees", f"{trees.auc:.{auc}f}", behind, f"{trees.log_loss:.{loss}f}", "", "")
    return table


def _caption(result: JobResult) -> str:
    auc = decimals(result.auc.deviation)
    lines = [
        f"AUC: higher is better, ± {result.auc.deviation:.{auc}f}; log loss: lower is better",
        "change: of the AUC against plain torch, ± its standard deviation;",
        "up to twice that may be chance",
        "MLP: 8-bit linear layers, activations quantized row by row (dynamic),",
        "by ranges of training examples (static), or so after more training (QAT);",
        "pruned: trained more while weights were dropped",
        _pruned(result),
        f"with every table zeroed the AUC is {result.without_tables.auc:.{auc}f}: what the tables are worth",
        "gradient-boosted trees read the same features:",
        "what a model worth compressing at least matches",
    ]
    if result.test_is_small:
        rows = len(result.data.rows("test"))
        lines.append(f"only {rows:,} test rows: a few thousand are needed to tell the forms' quality apart")
    return "\n".join(lines)


def _pruned(result: JobResult) -> str:
    """Which pruned form to take."""
    settings = result.settings
    what = f"{share_of(settings.sparsity, settings.pattern):.0%} ({settings.pattern})"
    if result.chosen_pruned is None:
        return f"no form pruned by {what} keeps the validation AUC within {PRUNED_TOLERANCE} beyond chance"
    change = result.change[result.chosen_pruned]
    return f"of those pruned by {what} take {result.chosen_pruned}: the smallest; AUC {change}"


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
