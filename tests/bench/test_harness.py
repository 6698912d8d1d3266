"""The benchmark harness: it refuses wrong sides and measures known ratios."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from bench_support import FLOAT, LINEAR, MLP, QUANTIZED, SPARSE, SPARSE_INT8, SPARSE_TRAINING, ready

from bench.core import harness
from bench.core.cases import BenchCase
from bench.core.sides import Side
from bench.ops.embedding_bag.cases import EmbeddingBagWorkload
from bench.ops.linear.int8 import peers as int8_peers
from bench.ops.linear.int8.cases import Int8LinearWorkload


@pytest.mark.parametrize("case", [FLOAT, QUANTIZED, LINEAR, MLP, SPARSE, SPARSE_INT8, SPARSE_TRAINING])
def test_gate_passes_a_right_side_and_catches_a_wrong_one(case: BenchCase) -> None:
    work, side = ready(case)
    harness.gate(side, work)
    scale = 1.08 if case in (LINEAR, MLP, SPARSE_INT8) else 1.001
    with pytest.raises(harness.GateError, match=f"impostor is wrong on {case.name}"):
        harness.gate(replace(side, name="impostor", result=lambda output: side.result(output) * scale), work)


@pytest.mark.parametrize(("row", "value"), [(3, 1.0), (6, float("nan"))])
def test_gate_catches_one_wrong_output_of_a_layer(row: int, value: float) -> None:
    work = Int8LinearWorkload(LINEAR)
    side = int8_peers.ours(work)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        output = side.run(inputs).clone()
        output[row, 32] += value * 5
        return output

    with pytest.raises(harness.GateError, match=r"off by|signal-to-noise"):
        harness.gate(replace(side, run=run), work)


def test_alternate_measures_a_known_ratio() -> None:
    def sleeper(name: str, seconds: float) -> Side:
        def run(_: object) -> torch.Tensor:
            time.sleep(seconds)
            return torch.empty(0)

        return Side(name, run)

    pair = harness.alternate(sleeper("a", 0.004), sleeper("b", 0.012), EmbeddingBagWorkload(FLOAT, quick=True), 0.0, 5)
    assert pair.rounds == 5
    assert pair.theirs > pair.ours >= 0.004
    assert 2.0 < pair.ratio < 3.5
    assert pair.low <= pair.ratio <= pair.high
