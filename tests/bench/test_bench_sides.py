"""Sides of the benchmarks: every side that can run gives right results, and is held to the level of ours."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from bench_support import LINEAR, MLP, SPARSE, SPARSE_INT8, SPARSE_TRAINING

from bench.core import harness, levels, processes
from bench.core.render import THP
from bench.core.sides import ONE_THREAD, OURS, AbsentError, Side
from bench.ops.linear.int8 import peers as int8_peers
from bench.ops.linear.int8.cases import CASES as INT8_CASES
from bench.ops.linear.int8.cases import Int8LinearWorkload
from bench.ops.linear.sparse import peers as sparse_peers
from bench.ops.linear.sparse.cases import DENSE, SparseLinearCase, SparseLinearWorkload
from recsys_kernels.backends.registry import native


@pytest.mark.parametrize("level", ["function", "module"])
@pytest.mark.parametrize("case", [SPARSE, SPARSE_INT8, SPARSE_TRAINING, replace(SPARSE, batch=1)])
def test_sides_of_sparse_layers_give_right_results(case: SparseLinearCase, level: str) -> None:
    work = SparseLinearWorkload(replace(case, level=level), quick=True)
    own = sparse_peers.ours(work)
    harness.gate(own, work)
    names = sparse_peers.sides_of(work.case)
    assert DENSE in names
    absent = set()
    for name in names:
        try:
            side = harness.build_side(name, work, own)
        except AbsentError:
            absent.add(name)
            continue
        assert side.name == name
        harness.gate(side, work)
    assert absent <= {sparse_peers.BSR_SAME, sparse_peers.SCIPY, sparse_peers.QNNPACK}
    assert len(names) > len(absent) + 1


def test_a_side_with_weights_of_its_own_is_judged_by_them() -> None:
    work = SparseLinearWorkload(SPARSE)
    side = harness.build_side(sparse_peers.BSR, work, sparse_peers.ours(work))
    harness.gate(side, work)
    with pytest.raises(harness.GateError, match="signal-to-noise"):
        harness.gate(replace(side, check=None), work)
    with pytest.raises(harness.GateError, match="signal-to-noise"):
        harness.gate(replace(side, run=lambda batch: side.run(batch) * 1.001), work)


@pytest.mark.parametrize("name", int8_peers.sides_of(MLP))
@pytest.mark.parametrize("level", ["function", "module"])
def test_peers_of_layers_give_right_results(name: str, level: str) -> None:
    work = Int8LinearWorkload(replace(MLP, level=level), quick=True)
    try:
        side = harness.build_side(name, work, int8_peers.ours(work))
    except AbsentError as error:
        pytest.skip(str(error))
    before = torch.backends.quantized.engine
    harness.gate(side, work)
    assert side.name == name
    assert torch.backends.quantized.engine == before


def test_one_thread_is_compared_with_two() -> None:
    large = [case for case in INT8_CASES if case.batch >= 128]
    assert {case.threads for case in large} == {1, 2}
    for case in large:
        assert (ONE_THREAD in int8_peers.sides_of(case)) == (case.threads == 2)
    own = Side(OURS, lambda _: torch.empty(0), threads=2)
    assert harness.build_side(ONE_THREAD, Int8LinearWorkload(LINEAR), own).threads == 1


def test_peers_are_held_to_our_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_KERNELS_ISA", raising=False)
    assert levels.caps() == {}
    monkeypatch.setenv("RECSYS_KERNELS_ISA", "avx2")
    assert levels.caps()["ATEN_CPU_CAPABILITY"] == "avx2"
    # In the process that measures; this one has read the variables before.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.update(levels.caps())
    assert levels.of_sides()["FBGEMM and torch's engine fbgemm"] == "FBGEMM_ENABLE_INSTRUCTIONS=AVX2"
    with pytest.raises(AbsentError, match="no switch that holds it to avx2"):
        harness.build_side(int8_peers.ONNXRUNTIME, Int8LinearWorkload(LINEAR), Side(OURS, lambda _: torch.empty(0)))


def test_children_hold_all_sides_to_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.isa_supported() in (None, "generic"):
        pytest.skip(f"no AVX2 level: {native.isa_supported()}")
    monkeypatch.setenv("RECSYS_KERNELS_ISA", "avx2")
    for variable in (THP, *levels.caps()):
        monkeypatch.setenv(variable, "")  # so that the old value comes back afterwards
    many = replace(LINEAR, threads=10_000)
    run = processes.run_in_child([many, LINEAR], quick=True, thp="0")
    assert run.levels["recsys_kernels"] == "avx2"
    assert run.levels["torch"] == "AVX2, ATEN_CPU_CAPABILITY=avx2"
    assert [result.case for result in run.results] == [LINEAR]
    assert "10000 threads need as many CPUs" in run.left_out[many.name]
    assert any(name.startswith("onnxruntime") for name in run.results[0].absent)
