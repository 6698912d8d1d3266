"""Sparse linear layers: the cases, and the workload (pruned weights, activations) of a case."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

import recsys_kernels as rk
from bench.core.cases import BEST_OTHER, BenchCase, Target
from bench.core.sides import ONE_THREAD, OURS
from bench.ops.linear.layers import INT8_SNR, LayerWorkload
from recsys_kernels.ops.linear.sparse.patterns import keep_mask, parse_pattern

DENSE = "torch dense"
OWN_INT8_DENSE = f"{OURS}, int8 dense"
OWN_FP32_SPARSE = f"{OURS}, fp32 sparse"
UNSTRUCTURED, BLOCK = "unstructured", "block4x1"
SPARSITIES = (0.3, 0.5, 0.8, 0.9, 0.95)
# fp32 sums of 4096 products have some 120 dB; bf16 products would give 50.
FLOAT_SNR = 100.0
QUICK_FEATURES = 256
WEIGHT_BYTES = {"fp32": 4, "int8": 1}


@dataclass(frozen=True)
class SparseLinearCase(BenchCase):
    """A layer of `ins` to `outs` features, over `batch` rows; `pattern` prunes the share `sparsity` of the weights.

    values: "fp32", or "int8" with activations that are quantized as they come.
    kind: "forward", or "training", which adds the gradients of input, weights and bias.
    level: "function" (the operator on a packed layer) or "module". Training is of modules.
    """

    family: ClassVar[str] = "linear/sparse"
    batch: int
    ins: int
    outs: int
    sparsity: float
    pattern: str = UNSTRUCTURED
    values: str = "fp32"

    @property
    def name_parts(self) -> list[str]:
        parts = ["sparse-linear", *([] if self.values == "fp32" else [self.values])]
        parts += [] if self.kind == "forward" else [self.kind]
        parts += [self.level] if self.level != "function" and self.kind == "forward" else []
        return [*parts, self.pattern, f"s{100 * self.sparsity:g}", f"{self.batch}x{self.ins}x{self.outs}"]

    @property
    def kept(self) -> int:
        """The number of weights that are kept; smaller blocks at the edges are not considered."""
        return round((1 - self.sparsity) * self.ins * self.outs)

    @property
    def size(self) -> int:
        """Bytes of the kept weights, without their places."""
        return self.kept * WEIGHT_BYTES[self.values]

    @property
    def amount(self) -> int:
        """Operations of a call: a multiplication and an addition for each kept weight and row, and each gradient."""
        return 2 * self.batch * self.kept * (1 if self.kind == "forward" else 3)

    def resized(self, rows: int | None, quick: bool) -> SparseLinearCase:
        """The same case; a smaller layer when `quick`."""
        if not quick:
            return self
        return replace(self, ins=min(self.ins, QUICK_FEATURES), outs=min(self.outs, QUICK_FEATURES))


# Speeds to reach relative to the dense layer.
_DENSE_TARGETS: dict[tuple[str, float], float] = {
    (UNSTRUCTURED, 0.3): 1.0,
    (UNSTRUCTURED, 0.5): 1.8,
    (UNSTRUCTURED, 0.8): 4.2,
    (UNSTRUCTURED, 0.9): 7.5,
    (UNSTRUCTURED, 0.95): 13.0,
    (BLOCK, 0.9): 9.0,
}
_REQUEST_TARGETS = {(UNSTRUCTURED, 0.9): 3.5, (BLOCK, 0.9): 6.0}
_SPARSE_TARGET = Target(1.5, BEST_OTHER)


def _float(batch: int, ins: int, outs: int, sparsity: float, pattern: str) -> SparseLinearCase:
    table = _DENSE_TARGETS if batch >= 64 else _REQUEST_TARGETS
    targets = (Target(table.get((pattern, sparsity), 1.0), DENSE), _SPARSE_TARGET)
    return SparseLinearCase(batch, ins, outs, sparsity, pattern, targets=targets)


def _cases() -> Iterator[SparseLinearCase]:
    square = [
        _float(batch, 1024, 1024, sparsity, pattern)
        for batch in (1, 4, 64, 1024)
        for pattern in (UNSTRUCTURED, BLOCK)
        for sparsity in SPARSITIES
    ]
    for case in square:
        if case.sparsity == SPARSITIES[0]:
            # A layer that is faster dense, for the curve.
            yield replace(case, sparsity=0.1, targets=())
        yield case
    for case in square:
        yield replace(case, level="module")
    # The most rows that the kernel for few rows takes, and the fewest that fill a panel.
    yield from (_float(batch, 1024, 1024, sparsity, UNSTRUCTURED) for batch in (8, 16) for sparsity in (0.3, 0.9))
    for pattern in (UNSTRUCTURED, BLOCK):
        yield from (_float(512, 512, 512, sparsity, pattern) for sparsity in SPARSITIES)
        yield from (_float(100, 415, 333, sparsity, pattern) for sparsity in (0.5, 0.9))
    both = (Target(1.0, OWN_INT8_DENSE), Target(1.0, OWN_FP32_SPARSE))
    for batch in (1, 64, 1024):
        yield SparseLinearCase(batch, 1024, 1024, 0.8, "block4x4", "int8", targets=(Target(1.0), *both))
        yield SparseLinearCase(batch, 1024, 1024, 0.8, UNSTRUCTURED, "int8")
    for pattern in (UNSTRUCTURED, BLOCK):
        for batch in (64, 1024):
            for sparsity in (0.5, 0.9):
                yield SparseLinearCase(batch, 1024, 1024, sparsity, pattern, kind="training", level="module")
    doubled = (Target(1.8, ONE_THREAD),)
    yield from (replace(case, threads=2, targets=doubled) for case in square if case.batch >= 64)
    yield SparseLinearCase(1024, 1024, 1024, 0.8, "block4x4", "int8", threads=2, targets=doubled)
    yield SparseLinearCase(1024, 1024, 1024, 0.9, kind="training", level="module", threads=2, targets=doubled)


CASES = tuple(_cases())


class SparseLinearWorkload(LayerWorkload):
    """A pruned layer and a pool of batches of one case, both from a fixed seed.

    Weights are uniform and pruned by magnitude, so wide that an output has about the power of an input.
    """

    def __init__(self, case: SparseLinearCase, quick: bool = False) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(19)
        width = math.sqrt(3.0 / (case.ins * (1 - case.sparsity)))
        self._unpruned = torch.empty(case.outs, case.ins).uniform_(-width, width, generator=generator)
        self.bias = torch.empty(case.outs).uniform_(-0.2, 0.2, generator=generator)
        self.weight = self.pruned(case.pattern)
        super().__init__(case, quick, case.ins, case.outs, generator)
        self.grad_output = torch.randn(case.batch, case.outs, generator=generator)
        self.least_snr = INT8_SNR if case.values == "int8" else FLOAT_SNR

    def pruned(self, pattern: str) -> Tensor:
        """The weights pruned by another pattern, to the same sparsity: [outs, ins] with zeros in place."""
        return self._unpruned * keep_mask(self._unpruned.abs(), self.case.sparsity, parse_pattern(pattern))

    def linear(self, trained: bool = False) -> nn.Linear:
        """A dense layer with the zeros in place."""
        linear = nn.Linear(self.case.ins, self.case.outs, device="meta")
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=trained)
        linear.bias = nn.Parameter(self.bias.clone(), requires_grad=trained)
        return linear.train(trained)

    @functools.cached_property
    def layer(self) -> rk.SparseLinear:
        """The pruned layer, for inference; fp32."""
        pattern = parse_pattern(self.case.pattern).name
        return rk.SparseLinear.from_dense(self.linear(), None, pattern)

    def expected(self, batch: Tensor, weight: Tensor | None = None) -> Tensor:
        """The layer's output, or the tensor of `gradients`, in float64. `weight`: replaces the layer's weight."""
        weight = (self.weight if weight is None else weight).double()
        if self.case.kind == "forward":
            return batch.double() @ weight.T + self.bias.double()
        grad = self.grad_output.double()
        return self.gradients(grad @ weight, grad.T @ batch.double(), grad.sum(0))

    def gradients(self, of_input: Tensor, of_weight: Tensor, of_bias: Tensor) -> Tensor:
        """Gradients of input, weights and bias in one tensor. of_weight: dense; pruned weights do not count."""
        # The three get a similar power, or one gradient would drown the errors of another.
        scale = 1 / math.sqrt(self.case.batch)
        return torch.cat([of_input.flatten(), scale * of_weight[self.weight != 0], scale * of_bias])

    def check_pruned(self, weight: Tensor, outputs: Sequence[Tensor]) -> None:
        """`check` for a side that has another weight."""
        self.check_against(functools.partial(self.expected, weight=weight), outputs)
