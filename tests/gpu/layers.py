"""int8 linear layers as cases of benchmark.py: beside half-precision layers and torch's own product of integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import recsys_kernels as rk

# Layers that are called in turn: together they are more than a cache holds, as those of a model are.
COPIES = 16


@dataclass(frozen=True)
class LayerCase:
    """A layer with rows in half precision, quantized by their own ranges, or (weights_only) as they are."""

    rows: int
    width: int
    columns: int
    weights_only: bool = False

    @property
    def name(self) -> str:
        kind = "weights only" if self.weights_only else "dynamic"
        return f"int8 layer {self.rows} x {self.width} x {self.columns}, {kind}"


def layer_cases() -> Iterator[LayerCase]:
    """Requests and batches, of the sizes that the CPU's benchmarks have."""
    yield LayerCase(1, 4096, 4096)
    yield LayerCase(512, 1024, 1024)
    yield LayerCase(16, 512, 512)
    yield LayerCase(4096, 1024, 1024)
    yield LayerCase(1, 4096, 4096, weights_only=True)
    yield LayerCase(7, 415, 333)


class LayerWorkload:
    """Layers, rows and ways to multiply them, all on the device. ``indices`` are the numbers of its calls."""

    indices = range(COPIES)

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        self.case = case
        torch.manual_seed(17)
        self.input = torch.randn(COPIES, case.rows, case.width, dtype=torch.float16, device=device)
        floats = [torch.nn.Linear(case.width, case.columns) for _ in self.indices]
        scheme = "weight_only" if case.weights_only else "dynamic"
        quantized = (rk.Int8Linear.from_float(one, scheme).half() for one in floats)
        self.layers = [one.to(device).requires_grad_(False) for one in quantized]
        self.halves = [one.half().to(device).requires_grad_(False) for one in floats]

    @property
    def bytes_per_call(self) -> int:
        """Weights with their scales and rows read, and the output written."""
        case = self.case
        return case.columns * (case.width + 8) + 2 * case.rows * (case.width + case.columns)

    def ours(self, number: int) -> torch.Tensor:
        out: torch.Tensor = self.layers[number](self.input[number])
        return out

    def peers(self) -> tuple[dict[str, Callable[[int], Any]], dict[str, str]]:
        """Torch's ways to do the same; and those that cannot, with the reason."""
        halves, rows = self.halves, self.input
        found: dict[str, Callable[[int], Any]] = {
            "torch, fp16": lambda n: F.linear(rows[n], halves[n].weight, halves[n].bias)
        }
        name, case = "torch._int_mm, the product alone", self.case
        if case.weights_only:
            return found, {name: "rows are not quantized"}
        if case.rows <= 16 or case.width % 8 or case.columns % 8:
            return found, {name: "takes more than 16 rows, and multiples of 8 columns"}
        integers = torch.randint(-128, 128, rows.shape, dtype=torch.int8, device=rows.device)
        found[name] = lambda n: torch._int_mm(integers[n], self.layers[n].weight.t())
        return found, {}
