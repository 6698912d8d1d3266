"""The report of the benchmarks: it renders what was measured, keeps the families' names, and says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_support import FLOAT, LINEAR, MLP, QUANTIZED, SPARSE

from bench import report
from bench.core import machine, probe, results
from bench.core.cases import BEST_OTHER, Target
from bench.core.processes import run_cases
from bench.core.render import markdown
from bench.core.results import Pair, Result, Run
from bench.core.sides import OURS, Side
from bench.ops.embedding_bag import peers
from bench.ops.embedding_bag.cases import TORCH, EmbeddingBagCase, EmbeddingBagWorkload
from bench.ops.linear.int8 import peers as int8_peers
from bench.ops.linear.int8.cases import FP32, Int8LinearCase, Int8LinearWorkload
from bench.ops.linear.sparse import peers as sparse_peers
from bench.ops.linear.sparse import plot as sparse_plot
from bench.ops.linear.sparse.cases import DENSE


def _limit(rate: float) -> probe.ReadLimit:
    return probe.ReadLimit(gather=rate, sequential=rate, prefetch="T1", huge_pages=1.0)


def test_crossover_is_where_the_last_point_below_one_ends() -> None:
    points = [(0.1, 0.5), (0.3, 0.8), (0.5, 1.25), (0.9, 8.0)]
    assert sparse_plot.crossover(points) == pytest.approx(0.4)
    assert sparse_plot.crossover(points[2:]) is None
    assert sparse_plot.crossover(points[:2]) is None
    assert sparse_plot.crossover([(0.1, 1.5), *points[1:]]) == pytest.approx(0.4)


def test_a_target_needs_its_ratio_the_limit_and_no_faster_peer() -> None:
    case = EmbeddingBagCase("fp32", 64, 1000, 10, targets=(Target(2.0),), near_limit=True)  # 2.56 MB a call
    fast, slow = (Pair(name, 1e-3, ratio * 1e-3, ratio, ratio, ratio, 11) for name, ratio in (("x", 2.1), ("y", 3.0)))
    result = Result(case, [slow, fast], _limit(2.8e9))
    assert result.best is fast
    assert result.rate() == pytest.approx(2.56e9)
    assert result.rate(slow) == pytest.approx(2.56e9 / 3)
    assert result.reached
    assert not replace(result, limit=_limit(3.2e9)).reached
    assert not replace(result, pairs=[slow, replace(fast, ratio=1.9)]).reached
    named = replace(result, case=replace(case, targets=(Target(2.9, "y"),)))
    assert named.reached
    assert not replace(named, pairs=[slow, replace(fast, ratio=0.9)]).reached
    assert not replace(named, pairs=[fast]).reached


def test_every_target_has_to_be_reached() -> None:
    case = Int8LinearCase(512, (100, 100), targets=(Target(1.3), Target(4.0, FP32)))
    slow, fast = Pair(FP32, 1e-3, 4.2e-3, 4.2, 4.0, 4.5, 11), Pair("x", 1e-3, 1.4e-3, 1.4, 1.3, 1.5, 11)
    result = Result(case, [slow, fast], probe.ProductLimit(2e10, "vpdpbusd"))
    assert result.rate() == pytest.approx(1.024e10)
    assert result.share == pytest.approx(0.512)
    assert result.reached
    assert not replace(result, pairs=[replace(slow, ratio=3.9), fast]).reached
    assert not replace(result, pairs=[slow, replace(fast, ratio=1.2)]).reached
    assert not replace(result, pairs=[fast]).reached


def test_ratios_against_the_dense_layer_and_the_best_sparse_peer() -> None:
    dense, csr, scipy = (
        Pair(name, 1e-5, ratio * 1e-5, ratio, ratio, ratio, 11)
        for name, ratio in ((DENSE, 1.2), (sparse_peers.CSR, 2.0), (sparse_peers.SCIPY, 1.6))
    )
    case = replace(SPARSE, targets=(Target(1.1, DENSE), Target(1.5, BEST_OTHER)))
    result = Result(case, [dense, csr, scipy], probe.ProductLimit(1e11, "vfmadd231ps"))
    assert (result.best, result.baseline, result.best_other) == (dense, dense, scipy)
    assert result.reached
    assert not replace(result, case=replace(case, targets=(Target(1.7, BEST_OTHER),))).reached
    assert not replace(result, pairs=[dense]).reached
    run = Run("0", 1 << 25, [result, replace(result, case=replace(case, targets=()))], {}, {}, {})
    text = markdown({}, [run])
    assert "| Of torch dense | Best other peer | Ratio |" in text
    assert f"| 1.20 [1.20-1.20] | {sparse_peers.SCIPY} 16.0 us | 1.60 [1.60-1.60] |" in text
    assert text.count("| yes |") == 1
    assert text.count("| - | - |") == 1


def test_report_shows_and_saves_what_was_measured(tmp_path: Path) -> None:
    run = run_cases([FLOAT, QUANTIZED, MLP, SPARSE], quick=True)
    assert not run.wrong
    assert len(run.results) == 4
    facts = machine.facts([])
    text = markdown(facts, [run])
    for result in run.results:
        assert any(pair.name in (TORCH, FP32, DENSE) for pair in result.pairs)
        assert f"| {result.case.name} | " in text
        assert f"{result.best.ratio:.2f} [" in text
    results.save(tmp_path / "results.json", facts, [run])
    assert results.load(tmp_path / "results.json") == (facts, [run])
    saved = json.loads((tmp_path / "results.json").read_text())["runs"][0]["results"]
    assert [one["family"] for one in saved] == ["embedding_bag", "embedding_bag", "linear/int8", "linear/sparse"]
    assert report.main(["--json", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == text
    for chart in ("roofline.png", "int8_linear.png", "sparse_linear.png"):
        assert (tmp_path / "out" / chart).read_bytes().startswith(b"\x89PNG")


def test_report_names_wrong_results_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: EmbeddingBagWorkload) -> Side:
        return Side(OURS, lambda _: torch.zeros(work.case.batch, work.case.dim))

    monkeypatch.setattr(peers, "ours", wrong)
    run = run_cases([FLOAT], quick=True)
    assert run.results == []
    assert f"recsys_kernels is wrong on {FLOAT.name}" in markdown({}, [run])


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: Int8LinearWorkload) -> Side:
        return Side(FP32, lambda batch: work.net(batch) * 2)

    monkeypatch.setitem(int8_peers.PEERS, FP32, wrong)
    run = run_cases([LINEAR], quick=True)
    assert not run.wrong
    assert FP32 not in {pair.name for pair in run.results[0].pairs}
    assert f"- {FP32}: not timed: {FP32} is wrong on {LINEAR.name}" in markdown({}, [run])


def test_report_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for arguments in (["--json", str(tmp_path / "bad.json")], ["--case", "no such case"]):
        with pytest.raises(SystemExit) as stop:
            report.main(arguments)
        assert stop.value.code == 2
    assert "not a saved comparison" in capsys.readouterr().err
