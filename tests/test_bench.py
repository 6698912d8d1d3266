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

from bench import harness, levels, linear_peers, operators, peers, plots, probe, report, sparse_peers  # noqa: E402
from bench.cases import LOOP, Case, Workload  # noqa: E402
from bench.harness import Pair, Result  # noqa: E402
from bench.linear_cases import FP32, LinearCase, LinearWorkload  # noqa: E402
from bench.operators import CASES  # noqa: E402
from bench.sides import BEST_OTHER, ONE_THREAD, OURS, AbsentError, Side, Target  # noqa: E402
from bench.sparse_cases import DENSE, SparseCase, SparseWorkload  # noqa: E402
from recsys_kernels.backends.native import native  # noqa: E402

FLOAT, QUANTIZED = (Case(dtype, 64, 64, 20).resized(None, quick=True) for dtype in ("fp32", "int8"))
LINEAR, MLP = LinearCase(7, (45, 33)), LinearCase(5, (45, 33, 17, 1), level="module")
SPARSE = SparseCase(7, 64, 48, 0.8, "block4x1")
SPARSE_INT8, SPARSE_TRAINING = SparseCase(7, 64, 48, 0.8, "block4x4", "int8"), replace(SPARSE, kind="training")


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


@pytest.mark.parametrize("case", [LINEAR, MLP], ids=lambda case: case.name)
def test_linear_layers_expect_what_torch_computes(case: LinearCase) -> None:
    work = LinearWorkload(case)
    assert not torch.equal(work.batch(0), work.batch(1))
    for number in (0, 1):
        output = work.net(work.batch(number))
        torch.testing.assert_close(work.expected(work.batch(number)), output.double(), rtol=1e-4, atol=1e-4)
    assert float(output.std()) > 0.1  # or noise would be judged by nothing


def test_operations_are_counted() -> None:
    assert MLP.size == 45 * 33 + 33 * 17 + 17
    assert MLP.amount == 2 * 5 * MLP.size


@pytest.mark.parametrize("case", [SPARSE, SPARSE_INT8, SPARSE_TRAINING], ids=lambda case: case.name)
def test_sparse_layers_expect_what_torch_computes(case: SparseCase) -> None:
    work = SparseWorkload(case)
    assert int((work.weight != 0).sum()) == pytest.approx(case.kept, abs=16)
    assert case.amount == 2 * 7 * case.kept * (3 if case is SPARSE_TRAINING else 1)
    batch, linear = work.batch(1).requires_grad_(), work.linear(trained=True)
    output = linear(batch)
    if case is SPARSE_TRAINING:
        gradients = torch.autograd.grad(output, (batch, linear.weight, linear.bias), work.grad_output)
        output = work.gradients(*gradients)
    torch.testing.assert_close(work.expected(work.batch(1)), output.double(), rtol=1e-4, atol=1e-4)
    assert float(output.detach().std()) > 0.1


@pytest.mark.parametrize("level", ["function", "module"])
@pytest.mark.parametrize("case", [SPARSE, SPARSE_INT8, SPARSE_TRAINING, replace(SPARSE, batch=1)])
def test_sides_of_sparse_layers_give_right_results(case: SparseCase, level: str) -> None:
    work = SparseWorkload(replace(case, level=level), quick=True)
    own = sparse_peers.ours(work)
    harness.gate(own, work)
    names = sparse_peers.sides_of(work.case)
    assert DENSE in names
    absent = set()
    for name in names:
        try:
            side = sparse_peers.build(name, work, own)
        except AbsentError:
            absent.add(name)
            continue
        assert side.name == name
        harness.gate(side, work)
    assert absent <= {sparse_peers.BSR_SAME, sparse_peers.SCIPY, sparse_peers.QNNPACK}
    assert len(names) > len(absent) + 1


def test_a_side_with_weights_of_its_own_is_judged_by_them() -> None:
    work = SparseWorkload(SPARSE)
    side = sparse_peers.build(sparse_peers.BSR, work, sparse_peers.ours(work))
    harness.gate(side, work)
    with pytest.raises(harness.GateError, match="signal-to-noise"):
        harness.gate(replace(side, check=None), work)
    with pytest.raises(harness.GateError, match="signal-to-noise"):
        harness.gate(replace(side, run=lambda batch: side.run(batch) * 1.001), work)


def test_crossover_is_where_the_last_point_below_one_ends() -> None:
    points = [(0.1, 0.5), (0.3, 0.8), (0.5, 1.25), (0.9, 8.0)]
    assert plots.crossover(points) == pytest.approx(0.4)
    assert plots.crossover(points[2:]) is None
    assert plots.crossover(points[:2]) is None
    assert plots.crossover([(0.1, 1.5), *points[1:]]) == pytest.approx(0.4)


@pytest.mark.parametrize("case", [FLOAT, QUANTIZED, LINEAR, MLP, SPARSE, SPARSE_INT8, SPARSE_TRAINING])
def test_gate_passes_a_right_side_and_catches_a_wrong_one(case: Case | LinearCase | SparseCase) -> None:
    operator = operators.of(case)
    work = operator.workload(case, True)
    side = operator.peers.ours(work)
    harness.gate(side, work)
    scale = 1.08 if case in (LINEAR, MLP, SPARSE_INT8) else 1.001
    with pytest.raises(harness.GateError, match=f"impostor is wrong on {case.name}"):
        harness.gate(replace(side, name="impostor", result=lambda output: side.result(output) * scale), work)


@pytest.mark.parametrize(("row", "value"), [(3, 1.0), (6, float("nan"))])
def test_gate_catches_one_wrong_output_of_a_layer(row: int, value: float) -> None:
    work = LinearWorkload(LINEAR)
    side = linear_peers.ours(work)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        output = side.run(inputs).clone()
        output[row, 32] += value * 5
        return output

    with pytest.raises(harness.GateError, match=r"off by|signal-to-noise"):
        harness.gate(replace(side, run=run), work)


@pytest.mark.parametrize("name", linear_peers.sides_of(MLP))
@pytest.mark.parametrize("level", ["function", "module"])
def test_peers_of_layers_give_right_results(name: str, level: str) -> None:
    work = LinearWorkload(replace(MLP, level=level), quick=True)
    try:
        side = linear_peers.build(name, work, linear_peers.ours(work))
    except AbsentError as error:
        pytest.skip(str(error))
    before = torch.backends.quantized.engine
    harness.gate(side, work)
    assert side.name == name
    assert torch.backends.quantized.engine == before


def test_one_thread_is_compared_with_two() -> None:
    large = [case for case in operators.INT8_LINEAR.cases if case.batch >= 128]
    assert {case.threads for case in large} == {1, 2}
    for case in large:
        assert (ONE_THREAD in linear_peers.sides_of(case)) == (case.threads == 2)
    own = Side(OURS, lambda _: torch.empty(0), threads=2)
    assert linear_peers.build(ONE_THREAD, LinearWorkload(LINEAR), own).threads == 1


def test_peers_are_held_to_our_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_KERNELS_ISA", raising=False)
    assert levels.caps() == {}
    monkeypatch.setenv("RECSYS_KERNELS_ISA", "avx2")
    assert levels.caps()["ATEN_CPU_CAPABILITY"] == "avx2"
    # In the process that measures; this one has read the variables before.
    monkeypatch.setattr(report.os, "environ", report.os.environ.copy())
    report.os.environ.update(levels.caps())
    assert levels.of_sides()["FBGEMM and torch's engine fbgemm"] == "FBGEMM_ENABLE_INSTRUCTIONS=AVX2"
    with pytest.raises(AbsentError, match="no switch that holds it to avx2"):
        linear_peers.build(linear_peers.ONNXRUNTIME, LinearWorkload(LINEAR), Side(OURS, lambda _: torch.empty(0)))


def test_alternate_measures_a_known_ratio() -> None:
    def sleeper(name: str, seconds: float) -> Side:
        def run(_: object) -> torch.Tensor:
            time.sleep(seconds)
            return torch.empty(0)

        return Side(name, run)

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


@pytest.mark.parametrize(("kind", "instruction"), [("int8", "vp"), ("float", "vfmadd")])
def test_probes_multiply_what_they_are_given(kind: str, instruction: str) -> None:
    run = getattr(probe, f"probe_{kind}")
    best = native.isa_supported()
    if best in (None, "generic"):
        pytest.skip(f"no instructions to probe: {best}")
    try:
        for threads in (1, 2):
            limit = run(best, threads, rounds=10_000)  # raises when its sum is off
            assert limit.rate > 0
            assert instruction in limit.how
        assert "256 bits" in run("avx2", rounds=10_000).how
    except probe.ProbeUnavailableError as error:
        pytest.skip(str(error))
    with pytest.raises(probe.ProbeUnavailableError, match=f"no {kind}.* probe at the level generic"):
        run("generic")


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


def test_every_target_has_to_be_reached() -> None:
    case = LinearCase(512, (100, 100), targets=(Target(1.3), Target(4.0, FP32)))
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
    run = report.Run("0", 1 << 25, [result, replace(result, case=replace(case, targets=()))], {}, {}, {})
    text = report.markdown({}, [run])
    assert "| Of torch dense | Best sparse peer | Ratio |" in text
    assert f"| 1.20 [1.20-1.20] | {sparse_peers.SCIPY} 16.0 us | 1.60 [1.60-1.60] |" in text
    assert text.count("| yes |") == 1
    assert text.count("| - | - |") == 1


def test_report_shows_and_saves_what_was_measured(tmp_path: Path) -> None:
    run = report.run_cases([FLOAT, QUANTIZED, MLP, SPARSE], quick=True)
    assert not run.wrong
    assert len(run.results) == 4
    facts = report.machine()
    text = report.markdown(facts, [run])
    for result in run.results:
        assert any(pair.name in (LOOP, FP32, DENSE) for pair in result.pairs)
        assert f"| {result.case.name} | " in text
        assert f"{result.best.ratio:.2f} [" in text
    report.save(tmp_path / "results.json", facts, [run])
    assert report.load(tmp_path / "results.json") == (facts, [run])
    assert report.main(["--json", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == text
    for chart in ("roofline.png", "int8_linear.png", "sparse_linear.png"):
        assert (tmp_path / "out" / chart).read_bytes().startswith(b"\x89PNG")


def test_report_names_wrong_results_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: Workload) -> Side:
        return Side(OURS, lambda _: torch.zeros(work.case.batch, work.case.dim))

    monkeypatch.setattr(peers, "ours", wrong)
    run = report.run_cases([FLOAT], quick=True)
    assert run.results == []
    assert f"recsys_kernels is wrong on {FLOAT.name}" in report.markdown({}, [run])


def test_children_hold_all_sides_to_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.isa_supported() in (None, "generic"):
        pytest.skip(f"no AVX2 level: {native.isa_supported()}")
    monkeypatch.setenv("RECSYS_KERNELS_ISA", "avx2")
    for variable in (report.THP, *levels.caps()):
        monkeypatch.setenv(variable, "")  # so that the old value comes back afterwards
    many = replace(LINEAR, threads=10_000)
    run = report.run_in_child([many, LINEAR], quick=True, thp="0")
    assert run.levels["recsys_kernels"] == "avx2"
    assert run.levels["torch"] == "AVX2, ATEN_CPU_CAPABILITY=avx2"
    assert [result.case for result in run.results] == [LINEAR]
    assert "10000 threads need as many CPUs" in run.left_out[many.name]
    assert any(name.startswith("onnxruntime") for name in run.results[0].absent)


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: LinearWorkload) -> Side:
        return Side(FP32, lambda batch: work.net(batch) * 2)

    monkeypatch.setitem(linear_peers._PEERS, FP32, wrong)
    run = report.run_cases([LINEAR], quick=True)
    assert not run.wrong
    assert FP32 not in {pair.name for pair in run.results[0].pairs}
    assert f"- {FP32}: not timed: {FP32} is wrong on {LINEAR.name}" in report.markdown({}, [run])


def test_report_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for arguments in (["--json", str(tmp_path / "bad.json")], ["--case", "no such case"]):
        with pytest.raises(SystemExit) as stop:
            report.main(arguments)
        assert stop.value.code == 2
    assert "not a saved comparison" in capsys.readouterr().err
