"""Sparse linear layers: the cases and the `SparseWorkload` (pruned weights, activations) that belongs to each."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

import recsys_kernels as rk
from bench.linear_cases import CHECKED_OUTPUTS, LAYER_SNR, POOL_BYTES, judge
from bench.sides import BEST_OTHER, ONE_THREAD, OWN_FP32_SPARSE, OWN_INT8_DENSE, Target
from recsys_kernels.ops.linear.sparse.patterns import keep_mask, parse_pattern

DENSE = "torch dense"
UNSTRUCTURED, BLOCK = "unstructured", "block4x1"
SPARSITIES = (0.3, 0.5, 0.8, 0.9, 0.95)
# Of fp32 sums of 4096 products some 120 dB are seen; bf16 products would give 50.
FLOAT_SNR = 100.0
QUICK_FEATURES = 256
WEIGHT_BYTES = {"fp32": 4, "int8": 1}


@dataclass(frozen=True)
class SparseCase:
    """A layer of `ins` to `outs` features of which `sparsity` is pruned by `pattern`, over `batch` rows.

    values: "fp32", or "int8" with activations that are quantized as they come; kind: "forward", or "training", which
    adds the gradients of input, weights and bias.
    level: "function" (the operator on a pack) or "module", which adds what the module does in Python. Training is of
    modules.
    targets: to be reached besides being no slower than every peer; none at all: the case is there to be seen.
    """

    batch: int
    ins: int
    outs: int
    sparsity: float
    pattern: str = UNSTRUCTURED
    values: str = "fp32"
    kind: str = "forward"
    level: str = "function"
    threads: int = 1
    targets: tuple[Target, ...] = (Target(1.0),)
    near_limit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # As read from JSON, which has neither tuples nor classes.
        object.__setattr__(self, "targets", tuple(Target(*target) for target in self.targets))

    @property
    def name(self) -> str:
        """Unique among the cases of all operators, with no blanks: what `--case` is matched against."""
        parts = ["sparse-linear", *([] if self.values == "fp32" else [self.values])]
        parts += [] if self.kind == "forward" else [self.kind]
        parts += [self.level] if self.level != "function" and self.kind == "forward" else []
        parts += [self.pattern, f"s{100 * self.sparsity:g}", f"{self.batch}x{self.ins}x{self.outs}"]
        return "-".join(parts) + (f"-{self.threads}threads" if self.threads > 1 else "")

    @property
    def kept(self) -> int:
        """Weights that are kept, but for the smaller blocks at the edges."""
        return round((1 - self.sparsity) * self.ins * self.outs)

    @property
    def size(self) -> int:
        """Bytes of the kept weights, without their places."""
        return self.kept * WEIGHT_BYTES[self.values]

    @property
    def amount(self) -> int:
        """Operations of a call: a multiplication and an addition for each kept weight and row, and each gradient."""
        return 2 * self.batch * self.kept * (1 if self.kind == "forward" else 3)

    def resized(self, rows: int | None, quick: bool) -> SparseCase:
        """The same case; a smaller layer when `quick`."""
        if not quick:
            return self
        return replace(self, ins=min(self.ins, QUICK_FEATURES), outs=min(self.outs, QUICK_FEATURES))


# Speeds to reach relative to dense MKL.
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


def _float(batch: int, ins: int, outs: int, sparsity: float, pattern: str) -> SparseCase:
    table = _DENSE_TARGETS if batch >= 64 else _REQUEST_TARGETS
    targets = (Target(table.get((pattern, sparsity), 1.0), DENSE), _SPARSE_TARGET)
    return SparseCase(batch, ins, outs, sparsity, pattern, targets=targets)


def _cases() -> Iterator[SparseCase]:
    square = [
        _float(batch, 1024, 1024, sparsity, pattern)
        for batch in (1, 4, 64, 1024)
        for pattern in (UNSTRUCTURED, BLOCK)
        for sparsity in SPARSITIES
    ]
    for case in square:
        if case.sparsity == SPARSITIES[0]:
            # What is faster as a dense layer, for the curve.
            yield replace(case, sparsity=0.1, targets=())
        yield case
    for case in square:
        yield replace(case, level="module")
    # The last rows that go the way of few, and the first ones of a whole panel.
    yield from (_float(batch, 1024, 1024, sparsity, UNSTRUCTURED) for batch in (8, 16) for sparsity in (0.3, 0.9))
    for pattern in (UNSTRUCTURED, BLOCK):
        yield from (_float(512, 512, 512, sparsity, pattern) for sparsity in SPARSITIES)
        yield from (_float(100, 415, 333, sparsity, pattern) for sparsity in (0.5, 0.9))
    both = (Target(1.0, OWN_INT8_DENSE), Target(1.0, OWN_FP32_SPARSE))
    for batch in (1, 64, 1024):
        yield SparseCase(batch, 1024, 1024, 0.8, "block4x4", "int8", targets=(Target(1.0), *both))
        yield SparseCase(batch, 1024, 1024, 0.8, UNSTRUCTURED, "int8")
    for pattern in (UNSTRUCTURED, BLOCK):
        for batch in (64, 1024):
            for sparsity in (0.5, 0.9):
                yield SparseCase(batch, 1024, 1024, sparsity, pattern, kind="training", level="module")
    doubled = (Target(1.8, ONE_THREAD),)
    yield from (replace(case, threads=2, targets=doubled) for case in square if case.batch >= 64)
    yield SparseCase(1024, 1024, 1024, 0.8, "block4x4", "int8", threads=2, targets=doubled)
    yield SparseCase(1024, 1024, 1024, 0.9, kind="training", level="module", threads=2, targets=doubled)


CASES = tuple(_cases())


class SparseWorkload:
    """A pruned layer and a pool of batches of one case, both from a fixed seed.

    Weights are uniform and pruned by magnitude, so wide that an output has about the power of an input. Inputs change
    from call to call; weights stay where a server's are, in the cache if they fit. `checked`: the number of batches
    that the gate runs.
    """

    def __init__(self, case: SparseCase, quick: bool = False) -> None:
        self.case, self.quick = case, quick
        generator = torch.Generator().manual_seed(19)
        width = math.sqrt(3.0 / (case.ins * (1 - case.sparsity)))
        unpruned = torch.empty(case.outs, case.ins).uniform_(-width, width, generator=generator)
        self.bias = torch.empty(case.outs).uniform_(-0.2, 0.2, generator=generator)
        self._unpruned = unpruned
        self.weight = self.pruned(case.pattern)
        count = max(8, min(64, POOL_BYTES // (4 * case.batch * case.ins)))
        self.inputs = torch.randn(count, case.batch, case.ins, generator=generator)
        self.grad_output = torch.randn(case.batch, case.outs, generator=generator)
        self.checked = min(count, max(2, -(-CHECKED_OUTPUTS // (case.batch * case.outs))))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, number: int) -> Tensor:
        """[batch, features], fp32."""
        return self.inputs[number % len(self)]

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
        """The layer's output, or the gradients as `gradients` has them, in float64; `weight` instead of its own."""
        weight = (self.weight if weight is None else weight).double()
        if self.case.kind == "forward":
            return batch.double() @ weight.T + self.bias.double()
        grad = self.grad_output.double()
        return self.gradients(grad @ weight, grad.T @ batch.double(), grad.sum(0))

    def gradients(self, of_input: Tensor, of_weight: Tensor, of_bias: Tensor) -> Tensor:
        """Gradients of input, weights (dense; those of pruned ones do not count) and bias in one tensor."""
        # Of similar power, or one would drown the errors of another.
        scale = 1 / math.sqrt(self.case.batch)
        return torch.cat([of_input.flatten(), scale * of_weight[self.weight != 0], scale * of_bias])

    @property
    def least_snr(self) -> float:
        """Signal to noise that the gate asks for, in dB."""
        return LAYER_SNR if self.case.values == "int8" else FLOAT_SNR

    def check(self, outputs: Sequence[Tensor], weight: Tensor | None = None) -> None:
        """Raises AssertionError unless `outputs`, in float64, are right for batches 0, 1, 2 and so on."""
        expected = [self.expected(self.batch(number), weight) for number in range(len(outputs))]
        judge(outputs, expected, self.least_snr)
