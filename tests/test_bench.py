"""The benchmark harness: it must refuse wrong sides, measure known ratios, and render what it measured."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # bench is not part of the installed package

from bench import harness, peers, probe, report  # noqa: E402
from bench.cases import CASES, LOOP, Case, Workload  # noqa: E402
from bench.harness import Pair, Result  # noqa: E402

FLOAT, QUANTIZED = (Case(dtype, 64, 64, 20).resized(None, quick=True) for dtype in ("fp32", "int8"))


def _limit(rate: float) -> probe.Limit:
    return probe.Limit(gather=rate, sequential=rate, prefetch="T1", huge_pages=1.0)


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_expected_is_what_torch_computes(dtype: str) -> None:
    work = Workload(Case(dtype, 8, 5, 3, rows=50, tables=2, ids="zipf"), quick=True)
    batch = work.batch(1)
    pooled = [
        torch.nn.functional.embedding_bag(ids.view(5, 3), table.double(), mode="sum")
        for ids, table in zip(batch.indices.chunk(2), work.table, strict=True)
    ]
    torch.testing.assert_close(work.expected(batch), torch.cat(pooled, 1))


def test_batches_change_from_call_to_call() -> None:
    work = Workload(FLOAT, quick=True)
    assert not torch.equal(work.batch(0).indices, work.batch(1).indices)
    assert torch.equal(work.batch(0).indices, work.batch(len(work)).indices)


@pytest.mark.parametrize("case", [FLOAT, QUANTIZED], ids=lambda case: case.name)
def test_gate_passes_a_right_side_and_catches_a_wrong_one(case: Case) -> None:
    work = Workload(case, quick=True)
    side = peers.ours(work)
    harness.gate(side, work)
    with pytest.raises(harness.GateError, match=f"impostor is wrong on {case.name}"):
        harness.gate(replace(side, name="impostor", run=lambda inputs: side.run(inputs) * 1.001), work)


def test_alternate_measures_a_known_ratio() -> None:
    def sleeper(name: str, seconds: float) -> peers.Side:
        def run(_: object) -> torch.Tensor:
            time.sleep(seconds)
            return torch.empty(0)

        return peers.Side(name, run)

    pair = harness.alternate(sleeper("a", 0.004), sleeper("b", 0.012), Workload(FLOAT, quick=True), 0.0, 5)
    assert pair.rounds == 5
    assert pair.theirs > pair.ours >= 0.004
    assert 2.0 < pair.ratio < 3.5
    assert pair.low <= pair.ratio <= pair.high


def test_probe_reads_every_row_it_is_given() -> None:
    ids = np.arange(4096, dtype=np.int64)[::-1] % 1000
    try:
        for row_bytes in (32, 96, 256):
            for threads in (1, 2):
                limit = probe.probe(ids, 1000, row_bytes, threads)  # raises when its checksum is off
                assert limit.gather > 0 < limit.sequential
    except probe.ProbeUnavailableError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="multiple of 32"):
        probe.probe(ids, 1000, 33)


def test_a_target_needs_its_ratio_the_limit_and_no_faster_peer() -> None:
    case = Case("fp32", 64, 1000, 10, target=2.0, near_limit=True)  # 2.56 MB a call
    fast, slow = (Pair(name, 1e-3, ratio * 1e-3, ratio, ratio, ratio, 11) for name, ratio in (("x", 2.1), ("y", 3.0)))
    result = Result(case, [slow, fast], _limit(2.8e9))
    assert result.best is fast
    assert result.rate() == pytest.approx(2.56e9)
    assert result.rate(slow) == pytest.approx(2.56e9 / 3)
    assert result.reached
    assert not replace(result, limit=_limit(3.2e9)).reached
    assert not replace(result, pairs=[slow, replace(fast, ratio=1.9)]).reached
    named = replace(result, case=replace(case, against="y", target=2.9))
    assert named.reached
    assert not replace(named, pairs=[slow, replace(fast, ratio=0.9)]).reached
    assert not replace(named, pairs=[fast]).reached


def test_report_shows_and_saves_what_was_measured(tmp_path: Path) -> None:
    run = report.run_cases([FLOAT, QUANTIZED], quick=True)
    assert not run.wrong
    facts = report.machine()
    text = report.markdown(facts, [run])
    for result in run.results:
        assert any(pair.name == LOOP for pair in result.pairs)
        assert f"| {result.case.name} | " in text
        assert f"{result.best.ratio:.2f} [" in text
    report.save(tmp_path / "results.json", facts, [run])
    assert report.load(tmp_path / "results.json") == (facts, [run])
    assert report.main(["--json", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == text
    assert (tmp_path / "out" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_report_names_wrong_results_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: Workload) -> peers.Side:
        return peers.Side(peers.OURS, lambda _: torch.zeros(work.case.batch, work.case.dim))

    monkeypatch.setattr(peers, "ours", wrong)
    run = report.run_cases([FLOAT], quick=True)
    assert run.results == []
    assert f"recsys_kernels is wrong on {FLOAT.name}" in report.markdown({}, [run])


def test_report_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for arguments in (["--json", str(tmp_path / "bad.json")], ["--case", "no such case"]):
        with pytest.raises(SystemExit) as stop:
            report.main(arguments)
        assert stop.value.code == 2
    assert "not a saved comparison" in capsys.readouterr().err
