"""Plots of a report, from its JSON: figures that stay readable 360 pixels wide."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recsys_kernels.models.metrics import Estimate

from .variants import BASELINE

_WIDTH = 4.3  # inches; with 11-point text a phone of 390 pixels shows about 11 pixels
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "svg.hashsalt": "recsys_kernels",
}
_GREY, _BLUE, _RED = "#9aa0a6", "#1f6feb", "#c0392b"

Report = dict[str, Any]


def latency(report: Report, key: str | None = None) -> Figure:
    """Median and 99th percentile of a forward call by batch size.

    Args:
        report: see `run.to_json`.
        key: "grown" for the cost with grown tables, None for the trained model.
    """
    variants = [variant if key is None else variant[key] for variant in report["variants"]]
    titles = [variant["title"] for variant in report["variants"]]
    sizes = list(variants[0]["latency"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, (0.75 + 0.25 * len(variants)) * len(sizes)), layout="constrained")
        for axes, size in zip(figure.subplots(len(sizes), squeeze=False)[:, 0], sizes, strict=True):
            median = [variant["latency"][size]["p50_us"] for variant in variants]
            tail = [variant["latency"][size]["p99_us"] for variant in variants]
            # A busy machine's tail can be 40 times the median: it must not shrink the bars to nothing.
            most = min(max(tail), 2 * max(median))
            _bars(axes, titles, median, _colors(report), [""] * len(median), tail, most)
            for row, value in enumerate(tail):
                if value <= most:
                    axes.plot([value, value], [row - 0.32, row + 0.32], color=_RED, linewidth=2)
                else:
                    axes.plot(1.08 * most, row, marker=">", color=_RED, markersize=5)
            # The numbers stand in columns of their own: beside a bar that of the median would seem that of the mark.
            _column(axes, 42, "median", [_micros(value) for value in median], _BLUE)
            _column(axes, 82, "p99", [_micros(value) for value in tail], _RED)
            axes.set_title(f"{int(size)} example{'s' if int(size) > 1 else ''} a call", pad=16)
        axes.set_xlabel("time of one call, µs")
    return figure


def _column(axes: Axes, place: float, head: str, texts: Sequence[str], color: str) -> None:
    """Numbers right of the axes, one a row, whose right edge is `place` points away."""
    for row, text in ((-0.95, head), *enumerate(texts)):
        axes.annotate(
            text,
            (1, row),
            (place, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            annotation_clip=False,
            va="center",
            ha="right",
            color=color,
            fontsize=10,
        )


def table_size(report: Report) -> Figure:
    """Bytes of the embedding tables, and of the other weights."""
    variants = report["variants"]
    unit, scale, digits = ("MB", 1e6, 1) if variants[0]["total_bytes"] >= 2e6 else ("kB", 1e3, 0)
    tables = [variant["table_bytes"] / scale for variant in variants]
    others = [(variant["total_bytes"] - variant["table_bytes"]) / scale for variant in variants]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.33 * len(variants)), layout="constrained")
        axes = figure.subplots()
        totals = [a + b for a, b in zip(tables, others, strict=True)]
        _bars(axes, [v["title"] for v in variants], tables, _colors(report), [""] * len(tables), totals, max(totals))
        rows = list(range(len(variants)))
        axes.barh(rows, others, left=tables, color="#b8c1c9", height=0.6)
        for row, total in enumerate(totals):
            axes.text(total, row, f" {total:,.{digits}f}", va="center")
        axes.set_xlabel(f"size, {unit}")
    return figure


def auc_change(report: Report) -> Figure:
    """Change of the test AUC against the uncompressed model, with its deviation and the tolerance."""
    variants = [variant for variant in report["variants"] if variant["name"] != BASELINE]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.33 * len(variants)), layout="constrained")
        axes = figure.subplots()
        _changes(axes, variants, [_BLUE] * len(variants), report["auc_tolerance"])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_yticks(range(len(variants)), [variant["title"] for variant in variants])
        axes.set_xlabel("change of AUC (no unit)")
    return figure


def _changes(axes: Axes, variants: Sequence[dict[str, Any]], colors: Sequence[str], tolerance: float) -> None:
    """A point a variant at its change of AUC, with a line two deviations long to each side."""
    rows = list(range(len(variants)))
    changes = [variant["auc_change"] for variant in variants]
    spreads = [2 * variant["auc_change_deviation"] for variant in variants]
    axes.axvspan(-tolerance, tolerance, color="#d0e6d0")
    axes.axvline(0, color="#444", linewidth=1)
    axes.hlines(rows, *zip(*((c - s, c + s) for c, s in zip(changes, spreads, strict=True)), strict=True), color=colors)
    axes.scatter(changes, rows, color=colors, s=40, zorder=3)
    reach = 1.15 * max(1.2 * tolerance, *(abs(c) + s for c, s in zip(changes, spreads, strict=True)))
    axes.set_xlim(-reach, reach)
    axes.set_xticks([-tolerance, 0, tolerance] if reach < 4 * tolerance else [0])
    if reach >= 4 * tolerance:
        axes.locator_params(axis="x", nbins=3)


def training(report: Report) -> Figure:
    """Validation AUC and the two log losses by epoch."""
    history = report["training"]["history"]
    epochs = list(range(1, len(history) + 1))
    best = max(range(len(history)), key=lambda number: history[number]["auc"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        upper.plot(epochs, [epoch["auc"] for epoch in history], "o-", color=_BLUE)
        upper.plot(epochs[best], history[best]["auc"], "o", color=_BLUE, markersize=13, fillstyle="none")
        upper.margins(y=0.25)  # room for the circle
        upper.set_ylabel("AUC")
        upper.set_title("validation AUC (circle: kept)")
        lower.plot(epochs, [epoch["loss"] for epoch in history], "s--", color=_GREY, label="training")
        lower.plot(epochs, [epoch["log_loss"] for epoch in history], "o-", color=_BLUE, label="validation")
        lower.set_ylabel("log loss, nats")
        lower.set_xlabel("epoch (one pass over the training rows)")
        lower.set_xticks(epochs if len(epochs) <= 12 else epochs[:: len(epochs) // 8])
        lower.legend(frameon=False)
    return figure


def overview(report: Report) -> Figure:
    """One picture of the result: size, latency and AUC of every variant."""
    variants = report["variants"]
    cost = [variant["grown"] or variant for variant in variants]
    titles = [variant["title"] for variant in variants]
    size = list(cost[0]["latency"])[len(cost[0]["latency"]) // 2]
    sizes = [one["total_bytes"] / 1e6 for one in cost]
    median = [one["latency"][size]["p50_us"] for one in cost]
    digits = 0 if max(sizes) >= 100 else 2
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 1.1 + 0.3 * len(variants)), layout="constrained")
        first, second, third = figure.subplots(1, 3, sharey=True)
        _bars(first, titles, sizes, _colors(report), [f"{value:,.{digits}f}" for value in sizes], sizes, max(sizes))
        first.set_xlabel("model size, MB")
        _bars(second, titles, median, _colors(report), [_micros(value) for value in median], median, max(median))
        second.set_xlabel(f"time for {int(size)} examples, µs")
        _changes(third, variants, _colors(report), report["auc_tolerance"])
        third.set_xlabel("AUC change, ± 2 deviations")
        grown = report["grown_rows"]
        where = f"tables of {grown:,} rows" if grown else report["data"]["name"]
        figure.suptitle(f"One ranking model, {where}; AUC on {report['data']['name']}", fontsize=11)
    return figure


def change(variant: dict[str, Any]) -> Estimate:
    """A variant's change of the test AUC."""
    return Estimate(variant["auc_change"], variant["auc_change_deviation"])


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for an HTML page, with a text for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    body = buffer.getvalue()
    return body[body.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _bars(
    axes: Axes,
    titles: Sequence[str],
    values: Sequence[float],
    colors: Sequence[str],
    texts: Sequence[str],
    ends: Sequence[float],
    most: float,
) -> None:
    """Horizontal bars with a text each, beside what ends at `ends`; the axis shows values up to `most`."""
    rows = list(range(len(titles)))
    axes.barh(rows, values, color=colors, height=0.6)
    for row, (value, text, end) in enumerate(zip(values, texts, ends, strict=True)):
        if not text:
            continue
        if value > 0.25 * most:
            axes.text(value, row, f"{text} ", va="center", ha="right", color="white")
        else:
            beside = end if end < value + 0.2 * most else value
            axes.text(beside, row, f" {text}", va="center")
    axes.set_yticks(rows, titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_xlim(0, most * 1.12)


def _colors(report: Report) -> list[str]:
    return [_GREY if variant["name"] == BASELINE else _BLUE for variant in report["variants"]]


def _micros(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
