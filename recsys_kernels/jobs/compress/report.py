"""The report of the main job: a self-contained HTML page, a picture and the JSON behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from recsys_kernels.models.files import CONFIG, VOCABULARIES, WEIGHTS, new_folder, save_model
from recsys_kernels.models.metrics import Estimate, decimals

from . import plots
from .run import JobResult, to_json
from .variants import BASELINE

PAGE, NUMBERS, PICTURE = "report.html", "report.json", "overview.png"
FILES = frozenset({PAGE, NUMBERS, PICTURE, WEIGHTS, CONFIG, VOCABULARIES})


def write_report(result: JobResult, folder: Path, saved: str) -> None:
    """Writes the report and one model to `folder`, which appears whole or not at all.

    Args:
        result: a finished job.
        folder: what to create; may exist if it holds nothing but an earlier report.
        saved: name of the variant to save.

    Raises:
        OSError: the folder cannot be written, the disk is full, or it holds other files.
    """
    report = {**to_json(result), "saved": saved}
    with new_folder(folder, FILES) as target:
        save_model(result.models[saved], result.data.schema, target)
        (target / NUMBERS).write_text(json.dumps(report, indent=1), encoding="utf-8")
        # The page reads the JSON's form of the numbers: keys are strings there.
        page = render(json.loads(json.dumps(report)), folder, _example(result))
        (target / PAGE).write_text(page, encoding="utf-8")
        plots.overview(report).savefig(target / PICTURE, dpi=130)


def render(report: dict[str, Any], folder: Path, example: str) -> str:
    """The HTML page.

    Args:
        report: see `to_json`, with "saved", the variant that was saved.
        folder: where the model is, for the text.
        example: a Python literal of one example.
    """
    template = (Path(__file__).parent / PAGE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    variants = {variant["name"]: variant for variant in report["variants"]}
    saved = variants[report["saved"]]
    first = report["variants"][0]
    unit, scale = ("MB", 1e6) if first["total_bytes"] >= 2e6 else ("kB", 1e3)
    return environment.from_string(template).render(
        r=report,
        headline=_headline(first, saved),
        subject="user will rate an item 4 or higher" if "user_mean" in report["data"]["dense"] else "click will happen",
        facts=_facts(first, saved),
        unit=unit,
        size=lambda count: f"{count / scale:,.{0 if unit == 'kB' else 1}f}",
        micros=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
        worth=report["variants"][0]["auc"] - report["without_tables"]["auc"],
        auc=lambda value: f"{value:.{decimals(report['auc_deviation'])}f}",
        loss=lambda value: f"{value:.{decimals(report['log_loss_deviation'])}f}",
        change=lambda variant: "" if variant["name"] == BASELINE else str(plots.change(variant)),
        lead=Estimate(report["boosted"]["lead"], report["boosted"]["lead_deviation"]),
        online="user_mean" in report["data"]["dense"],
        saved=report["saved"],
        saved_title=saved["title"],
        pruned=variants.get(report["chosen_pruned"]),
        plots={
            "size": Markup(plots.svg(plots.table_size(report), "size of every form")),
            "auc": Markup(plots.svg(plots.auc_change(report), "change of AUC of every form")),
            "training": Markup(plots.svg(plots.training(report), "validation AUC and log loss by epoch")),
        },
        costs=_costs(report),
        folder=str(folder),
        example=example,
        setup=_setup(report),
    )


def _headline(first: dict[str, Any], saved: dict[str, Any]) -> str:
    ratio = first["total_bytes"] / saved["total_bytes"]
    return f"{saved['title']}: {ratio:.1f} times smaller, AUC {plots.change(saved)}"


def _facts(first: dict[str, Any], saved: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (f"{first['total_bytes'] / saved['total_bytes']:.1f}x", "smaller model"),
        (f"{first['table_bytes'] / saved['table_bytes']:.1f}x", "smaller embedding tables"),
        (str(plots.change(saved)), "change of test AUC"),
    ]
    cost, where = (saved["grown"], ", grown tables") if saved["grown"] else (saved, "")
    for size, latency in cost["latency"].items():
        many = "1 example" if size == "1" else f"{size} examples"
        facts.append((f"{latency['speedup']:.2f}x", f"the speed of plain torch, {many} a call{where}"))
    return facts


def _costs(report: dict[str, Any]) -> list[dict[str, Any]]:
    def section(title: str, note: str, key: str | None) -> dict[str, Any]:
        lines = [(v["title"], v["name"], v if key is None else v[key]) for v in report["variants"]]
        groups = [
            (int(size), [(title, name, cost["latency"][size]) for title, name, cost in lines])
            for size in lines[0][2]["latency"]
        ]
        plot = Markup(plots.svg(plots.latency(report, key), title))
        return {"title": title, "note": note, "plot": plot, "groups": groups}

    costs = [section("Latency", "The trained model on test examples.", None)]
    if rows := report["grown_rows"]:
        size = report["variants"][0]["grown"]["table_bytes"] / 1e9
        note = (
            f"Cost only: the same model with every table grown to {rows:,} rows of random weights ({size:.2f} GB in "
            "32-bit) and Zipf-distributed ids. It says nothing about quality."
        )
        costs.append(section("Latency with grown tables", note, "grown"))
    return costs


def _setup(report: dict[str, Any]) -> list[tuple[str, str]]:
    parts, model, machine = report["data"]["parts"], report["model"], report["machine"]
    calibration, pruning = report["calibration"], report["pruning"]
    tables = ", ".join(f"{table['name']} {table['rows']:,}" for table in model["tables"])
    counts = [f"{parts[part]['rows']:,} {part}" for part in ("train", "validation", "test")]
    return [
        ("Split", "by time: " + ", ".join(counts)),
        ("Positives", f"{parts['test']['positive_share']:.0%} of the test labels"),
        ("Tables", f"{tables} rows of {model['dim']} numbers"),
        ("Dense features", ", ".join(report["data"]["dense"])),
        ("Training", f"epochs: {report['training']['epochs']}, seed: {report['training']['seed']}"),
        ("Static MLPs", f"ranges by {calibration['method']} on {calibration['rows']:,} training examples"),
        ("QAT", f"epochs: {report['tuning']['epochs']}, labels: {report['tuning']['labels']}"),
        (
            "Pruned MLPs",
            f"{pruning['sparsity']:.0%} of the weights, pattern: {pruning['pattern']}, epochs: {pruning['epochs']}, "
            f"labels: {pruning['labels']}",
        ),
        (
            "Trees",
            f"scikit-learn's gradient boosting, {report['boosted']['rounds']} trees by validation AUC, "
            f"{report['boosted']['rows']:,} training rows; ids as the mean label of other training rows",
        ),
        ("Timing", f"one process, forms in turn on the same batches, threads: {report['threads']}"),
        ("Machine", f"{machine['cpu']}, {machine['system']}, torch {machine['torch']}"),
        ("Kernels", f"recsys_kernels {machine['recsys_kernels']}, {machine['backend']}, ISA level {machine['isa']}"),
        ("Whole run", f"{report['seconds']['total']:.0f} s"),
    ]


def _example(result: JobResult) -> str:
    """Categorical fields of the first test example as a Python literal, one a line."""
    data = result.data
    rows = data.rows("test")[:1]
    fields: dict[str, Any] = {}
    for name, table in data.schema.features:
        values, _ = data.bags[name].take(rows)
        tokens = [data.schema.vocabularies[table].tokens[value - 1] for value in values[:3] if value]
        if tokens and len(fields) < 6:
            fields[name] = tokens if data.bags[name].starts is not None else tokens[0]
    lines = ",\n".join(f"  {name!r}: {value!r}" for name, value in fields.items())
    return "{\n" + lines + "}"
