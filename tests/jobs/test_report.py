"""The report of the main job: the page's structure, its figures, and what is recommended."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Annotation
from rich.console import Console
from small_data import World

from recsys_kernels.jobs.compress import cost, plots, report, terminal
from recsys_kernels.jobs.compress import run as job
from recsys_kernels.jobs.compress.run import JobResult, JobSettings
from recsys_kernels.jobs.compress.variants import BASELINE, VARIANTS
from recsys_kernels.models.metrics import Estimate
from recsys_kernels.models.train import TrainSettings


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobResult]:
    folder = World().write_100k(tmp_path_factory.mktemp("ml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "ROUNDS", 8)
        patch.setattr(cost, "WARM_UP", 1)
        yield job.run(JobSettings(data=folder, rows=300, dim=8, training=TrainSettings(epochs=1)))


@pytest.fixture(scope="module")
def numbers(result: JobResult) -> dict[str, Any]:
    return json.loads(json.dumps({**job.to_json(result), "saved": "int8"}))


class _Page(HTMLParser):
    """The elements of a page with what they stand in."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.found: list[tuple[str, dict[str, str | None], list[tuple[str, dict[str, str | None]]]]] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.wrong += [tag for tag, _ in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), list(self.open)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), list(self.open)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)


def test_the_page_reads_on_a_phone_by_ear_and_in_the_dark(numbers: dict[str, Any], tmp_path: Path) -> None:
    text = report.render(numbers, tmp_path, "{'user': '1'}")
    page = _Page(text)
    assert not page.wrong  # every element is closed, in order
    tables = [outside for tag, _, outside in page.found if tag == "table"]
    assert len(tables) == 3  # quality, time, time with grown tables
    for outside in tables:  # a wide table scrolls in its card, and can be reached by keyboard
        assert outside[-1][1]["class"] == "scroll"
        assert outside[-1][1]["tabindex"] == "0"
    for name in ("caption", "thead"):
        assert sum(tag == name and outside[-1][0] == "table" for tag, _, outside in page.found) == 3
    heads = [attributes for tag, attributes, _ in page.found if tag == "th"]
    assert {head.get("scope") for head in heads} == {"col", "row", "rowgroup"}
    rows = sum(head["scope"] == "row" for head in heads)
    assert rows == len(numbers["variants"]) * 7 + 1  # quality, three batch sizes twice, and the trees
    assert "overflow-x: auto" in text
    assert "prefers-color-scheme: dark" in text
    assert "color-scheme: light dark" in text
    assert all(attributes.get("aria-label") for tag, attributes, _ in page.found if tag == "svg")


def test_figures_carry_deviations(numbers: dict[str, Any], result: JobResult, tmp_path: Path) -> None:
    for variant in numbers["variants"]:
        assert variant["auc_change_deviation"] >= 0
        assert variant["auc_change"] == pytest.approx(variant["auc"] - numbers["variants"][0]["auc"])
    assert numbers["auc_deviation"] > 0.01  # of 40 rows
    assert 0 < numbers["boosted"]["auc"] < 1
    lead = numbers["variants"][0]["auc"] - numbers["boosted"]["auc"]
    assert numbers["boosted"]["lead"] == pytest.approx(lead)
    page = " ".join(report.render(numbers, tmp_path, "{}").split())
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal.summary(result))
    table = console.export_text()
    for text in (page, table):
        assert "gradient-boosted trees" in text
        assert "±" in text
    assert max(len(line) for line in table.splitlines()) <= 80
    changed = numbers["variants"][-1]
    assert str(plots.change(changed)) in page.replace("&lt;", "<")
    assert str(plots.change(changed)).replace(" ± ", "±") in table


def test_a_small_test_says_that_it_is_small(
    numbers: dict[str, Any], result: JobResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts() -> tuple[str, str]:
        console = Console(width=100, file=io.StringIO(), record=True)
        console.print(terminal.summary(result))
        fresh = json.loads(json.dumps({**job.to_json(result), "saved": "int8"}))
        return report.render(fresh, tmp_path, "{}"), console.export_text()

    rows = len(result.data.rows("test"))
    page, table = texts()
    assert f"The test has only {rows} rows" in page
    assert f"only {rows} test rows" in table
    monkeypatch.setattr(job, "SMALL_TEST", rows)
    page, table = texts()
    assert "The test has only" not in page
    assert "test rows: a few thousand" not in table


def test_only_what_is_no_noise_is_recommended(result: JobResult) -> None:
    names = [variant.name for variant in VARIANTS]
    change = {name: Estimate(0.0, 0.0) for name in names}
    smallest = min(names, key=lambda name: result.cost[name].total_bytes)
    assert job._choose(change, result.cost, 0.001) == smallest
    # It may have lost nothing, and may have lost ten times the tolerance: that is no reason to take it.
    change[smallest] = Estimate(0.0, 0.005)
    assert job._choose(change, result.cost, 0.001) not in (smallest, None)
    change = {name: Estimate(0.0005, 0.01) for name in names}
    assert job._choose(change, result.cost, 0.001) is None
    assert job._choose(change, result.cost, 0.002, pruned=True) is None


def test_the_median_stands_in_a_column_of_its_own(numbers: dict[str, Any]) -> None:
    figure = plots.latency(numbers)
    for axes in figure.axes:
        texts = [text for text in axes.texts if isinstance(text, Annotation)]
        columns = {place: [t.get_text() for t in texts if t.xyann[0] == place] for place in {t.xyann[0] for t in texts}}
        assert sorted(column[0] for column in columns.values()) == ["median", "p99"]
        assert all(len(column) == len(numbers["variants"]) + 1 for column in columns.values())
        assert len(texts) == len(axes.texts)  # no number beside a bar, where it could belong to the mark


def test_the_picture_shows_every_form(numbers: dict[str, Any]) -> None:
    figure = plots.overview(numbers)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [variant["title"] for variant in numbers["variants"]]
    assert len(labels) == len(VARIANTS) + 1
    assert numbers["variants"][0]["name"] == BASELINE
    for axes in figure.axes[:2]:
        assert len(axes.patches) == len(labels)
