"""Linear layers with pruned weights: what ``optimize`` swaps them for, and where dense ones are better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ops.linear.int8 import Int8Linear
from ...ops.linear.operands import MAX_IN_FEATURES
from ...ops.linear.sparse import SparseLinear
from ...ops.linear.sparse.autograd import FEW_ROWS
from ...ops.linear.sparse.patterns import Pattern, check_sparsity, parse_pattern
from ...ops.linear.sparse.prepared import runs_dense, runs_packed
from ..rewrite.plan import Layer, Plan
from .int8 import MIN_SQNR, LinearConverter, Range, row_count
from .tables import stored_bytes

# Values of the option, and what ``activation`` of a SparseLinear they are.
SCHEMES = {"sparse": None, "int8+sparse": "dynamic", "int8-static+sparse": "static"}


class SparseConverter(LinearConverter):
    """``torch.nn.Linear`` as :class:`~recsys_kernels.SparseLinear`.

    Args:
        sparsity: share of the weights to drop; None keeps what is not zero.
        pattern: see :func:`~recsys_kernels.prune`.
        ranges: see :class:`LinearConverter`.

    Raises:
        ValueError, TypeError: no such pattern, or no sparsity that it can have.
    """

    choices: tuple[str, ...] = tuple(SCHEMES)
    handles: tuple[type[torch.nn.Module], ...] = (torch.nn.Linear, Int8Linear, SparseLinear)

    def __init__(
        self, sparsity: float | None, pattern: str = "unstructured", ranges: Mapping[int, Range] | None = None
    ) -> None:
        super().__init__(ranges)
        self.pattern: Pattern = parse_pattern(pattern)
        self.sparsity = None if sparsity is None else check_sparsity(sparsity, self.pattern)

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        if reason := self.reason_by_kind(module, parents):
            return reason
        if SCHEMES[choice] is not None and module.in_features > MAX_IN_FEATURES:
            return f"in_features must be from 1 to {MAX_IN_FEATURES}, but is {module.in_features}"
        if self.sparsity is None and bool(module.weight.detach().all()):
            return "none of its weights is zero; give a sparsity to prune it"
        return self.reason_by_range(module)

    def convert(self, modules: Sequence[Any], choice: str) -> list[Any]:
        new: list[Any] = []
        for module in modules:
            layer = self._pruned(module)
            if (scheme := SCHEMES[choice]) is not None:
                layer = layer.quantize(scheme, input_range=self.range_of(module))
            if new:
                first = new[0]
                layer.values, layer.weight_scale = first.values, first.weight_scale
                layer.crow_indices, layer.col_indices = first.crow_indices, first.col_indices
            new.append(layer)
        return new

    def _pruned(self, module: torch.nn.Linear) -> SparseLinear:
        weight = module.weight.detach()
        bad = ~torch.isfinite(weight).all(1)
        if bad.any():
            raise ValueError(f"row {int(bad.nonzero()[0])} of weight holds NaN or infinity")
        sparsity = self.sparsity
        if sparsity is not None and not self.pattern.of:
            # Of a layer that is sparser already, zeros would be kept.
            layer = SparseLinear.from_dense(module, None, self.pattern.name)
            if layer.sparsity >= sparsity:
                return layer
        return SparseLinear.from_dense(module, sparsity, self.pattern.name)

    def convert_dense(self, module: torch.nn.Linear, choice: str) -> Int8Linear | None:
        """The layer without its zeros left out: in int8 if the choice has int8 values."""
        scheme = SCHEMES[choice]
        if scheme is None:
            return None
        return Int8Linear.from_float(module, scheme, input_range=self.range_of(module))

    def least_sqnr(self, new: Any) -> float:
        """Noise of weights that the user wants dropped is no reason to keep them."""
        return MIN_SQNR if self.sparsity is None or not isinstance(new, SparseLinear) else float("-inf")


def leave_dense(plan: Plan, batch_size: int | None, timed: bool) -> None:
    """Keeps layers dense that are known to be faster so, and those that would only get larger.

    What is known is in the table that ships with the kernels (``ops/linear/sparse/crossover.py``). Layers with int8
    values become dense int8 ones, if those are smaller than the float ones. To be called after :meth:`Plan.convert`.

    Args:
        plan: the plan.
        batch_size: for how many examples; that of the sample inputs if None.
        timed: whether the layers will be timed (:func:`~.linear.leave_slow`).
    """
    for layer in plan.swapped:
        new = layer.new
        if not isinstance(new, SparseLinear):
            continue
        assert isinstance(layer.converter, SparseConverter)
        count = row_count(plan, layer, batch_size) if timed else None
        share = f"{new.sparsity:.1%} of its weights dropped"
        if _is_faster_dense(new, count):
            _make_dense(layer, f"faster dense: {share}")
            continue
        layer.notes.insert(0, f"{share}, {layer.converter.pattern.name}")
        if (after := stored_bytes(new)) >= (before := stored_bytes(layer.module)):
            if count is None:
                reason = f"{after:,} bytes with {share}; batch_size or sample_inputs would tell if it is faster"
                layer.leave(reason, unmasks=True)
            else:
                layer.notes.append(f"larger than {before:,} bytes")


def _is_faster_dense(new: SparseLinear, count: int | None) -> bool:
    if not runs_packed(new.values):
        return False
    few, many = runs_dense(new.operands())
    if count is None:
        return few and many
    return many if count > FEW_ROWS else few


def _make_dense(layer: Layer, reason: str) -> None:
    assert isinstance(layer.converter, SparseConverter)
    dense = layer.converter.convert_dense(layer.module, layer.choice)
    if dense is None or stored_bytes(dense) >= stored_bytes(layer.module):
        layer.leave(reason, unmasks=True)
        return
    layer.new, layer.choice = dense, layer.choice.removesuffix("+sparse")
    layer.notes.append(f"{reason}; of the model's own weights")
