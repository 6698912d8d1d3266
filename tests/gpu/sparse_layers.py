"""Sparse linear layers as cases of benchmark.py: beside dense ones, and torch's products of sparse matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import recsys_kernels as rk

# Layers that are called in turn, as in layers.py.
COPIES = 16


@dataclass(frozen=True)
class SparseCase:
    """A pruned layer; its values and rows are float32, half precision, or (int8) quantized with rows in float32."""

    rows: int
    width: int
    columns: int
    pattern: str = "unstructured"
    sparsity: float = 0.9
    kind: str = "fp32"

    @property
    def name(self) -> str:
        shape = f"{self.rows} x {self.width} x {self.columns}"
        return f"sparse layer {shape}, {self.sparsity:.0%} {self.pattern}, {self.kind}"


def sparse_cases() -> Iterator[SparseCase]:
    """Requests and batches, of sizes that the CPU's benchmarks have."""
    yield SparseCase(1, 1024, 1024)
    yield SparseCase(512, 1024, 1024)
    yield SparseCase(512, 1024, 1024, "block16x4", kind="fp16")
    yield SparseCase(512, 1024, 1024, "block4x1", kind="int8")
    yield SparseCase(512, 1024, 1024, "2:4", 0.5, kind="fp16")
    yield SparseCase(1, 1024, 1024, "block4x1", kind="int8")


class SparseWorkload:
    """Layers, rows and ways to multiply them, all on the device. ``indices`` are the numbers of its calls."""

    indices = range(COPIES)

    def __init__(self, case: SparseCase, device: torch.device) -> None:
        self.case = case
        torch.manual_seed(17)
        self.dtype = torch.float16 if case.kind == "fp16" else torch.float32
        self.input = torch.randn(COPIES, case.rows, case.width, dtype=self.dtype, device=device)
        dense = [torch.nn.Linear(case.width, case.columns) for _ in self.indices]
        pruned = [rk.SparseLinear.from_dense(one, case.sparsity, case.pattern) for one in dense]
        self.dense = [one.to_dense().to(device, self.dtype).requires_grad_(False) for one in pruned]
        pruned = [one.quantize("dynamic") for one in pruned] if case.kind == "int8" else pruned
        self.layers = [one.to(device, self.dtype).requires_grad_(False) for one in pruned]

    @property
    def bytes_per_call(self) -> int:
        """Stored weights and their places, scales, bias and rows read, and the output written."""
        layer, case = self.layers[0], self.case
        parts = [*layer.parameters(), *layer.buffers()]
        return sum(part.nbytes for part in parts) + self.dtype.itemsize * case.rows * (case.width + case.columns)

    def ours(self, number: int) -> torch.Tensor:
        out: torch.Tensor = self.layers[number](self.input[number])
        return out

    def peers(self) -> tuple[dict[str, Callable[[int], Any]], dict[str, str]]:
        """Torch's ways to do the same; and those that cannot, with the reason."""
        rows, dense, case = self.input, self.dense, self.case
        found: dict[str, Callable[[int], Any]] = {
            "torch, dense": lambda n: F.linear(rows[n], dense[n].weight, dense[n].bias)
        }
        name = "torch, CSR"
        if case.kind != "fp32" or case.pattern != "unstructured":
            return found, {name: "measured with float32 values and without blocks"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that such tensors are not finished
            sparse = [one.weight.to_sparse_csr() for one in dense]
        found[name] = lambda n: torch.addmm(dense[n].bias.unsqueeze(1), sparse[n], rows[n].t()).t()
        return found, {}
