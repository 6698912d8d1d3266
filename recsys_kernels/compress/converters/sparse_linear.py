"""Linear layers whose weights are pruned, and where dense ones are better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ...ops.linear.int8 import Int8Linear
from ...ops.linear.operands import (
    MAX_IN_FEATURES,
)
from ...ops.linear.sparse import SparseLinear
from ...ops.linear.sparse.crossover import FEW_ROWS, runs_dense
from ...ops.linear.sparse.packs import runs_packed
from ...ops.linear.sparse.patterns import Pattern, check_sparsity, parse_pattern
from ..sizes import stored_bytes
from .converter import Check, Converter, LayerDecision, Options, RewriteState, register
from .linear import MIN_SQNR, LinearConverter

# Values of the option, and the ``activation`` of a SparseLinear for each.
ACTIVATIONS = {"sparse": None, "int8+sparse": "dynamic", "int8-static+sparse": "static"}


@register
class SparseLinearConverter(LinearConverter):
    """``torch.nn.Linear`` as :class:`~recsys_kernels.SparseLinear`.

    Args:
        sparsity: the share of the weights to drop; None keeps what is not zero.
        pattern: see :func:`~recsys_kernels.prune`.
        common: the arguments of :class:`LinearConverter`.

    Raises:
        ValueError, TypeError: no such pattern, or no sparsity that the pattern can have.
    """

    choices: ClassVar[tuple[str, ...]] = tuple(ACTIVATIONS)
    covered: ClassVar[tuple[type[torch.nn.Module], ...]] = (torch.nn.Linear, Int8Linear, SparseLinear)
    takes_off_masks: ClassVar[bool] = True

    def __init__(self, sparsity: float | None, pattern: str = "unstructured", **common: Any) -> None:
        super().__init__(**common)
        self.pattern: Pattern = parse_pattern(pattern)
        self.sparsity = None if sparsity is None else check_sparsity(sparsity, self.pattern)

    @classmethod
    def check_options(cls, options: Options) -> None:
        super().check_options(options)
        linear = options.choices.get(cls.option)
        for name, value in (("sparsity", options.sparsity), ("pattern", options.pattern)):
            if value is not None and linear not in cls.choices:
                known = ", ".join(map(repr, cls.choices))
                raise ValueError(f"{name} is for linear={known}, but linear is {linear!r}")

    @classmethod
    def from_options(cls, options: Options) -> Converter:
        pattern = "unstructured" if options.pattern is None else options.pattern
        return cls(options.sparsity, pattern, **cls.common_arguments(options))

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        if reason := self.reason_by_kind(module, parents):
            return reason
        if ACTIVATIONS[choice] is not None and module.in_features > MAX_IN_FEATURES:
            return f"in_features must be from 1 to {MAX_IN_FEATURES}, but is {module.in_features}"
        if self.sparsity is None and bool(module.weight.detach().all()):
            return "none of its weights is zero; give a sparsity to prune it"
        return self.reason_by_range(module)

    def convert(self, layers: Sequence[LayerDecision]) -> list[Any]:
        new: list[Any] = []
        for layer in layers:
            replacement = self._pruned(layer.module)
            if (activation := ACTIVATIONS[layer.choice]) is not None:
                replacement = replacement.quantize(activation, input_range=self.range_of(layer.module))
            if new:
                first = new[0]
                replacement.values, replacement.weight_scale = first.values, first.weight_scale
                replacement.crow_indices, replacement.col_indices = first.crow_indices, first.col_indices
            new.append(replacement)
        return new

    def _pruned(self, module: torch.nn.Linear) -> SparseLinear:
        weight = module.weight.detach()
        bad = ~torch.isfinite(weight).all(1)
        if bad.any():
            raise ValueError(f"row {int(bad.nonzero()[0])} of weight holds NaN or infinity")
        sparsity = self.sparsity
        if sparsity is not None and not self.pattern.of:
            # A layer that is sparser already would otherwise keep some of its zeros.
            layer = SparseLinear.from_dense(module, None, self.pattern.name)
            if layer.sparsity >= sparsity:
                return layer
        return SparseLinear.from_dense(module, sparsity, self.pattern.name)

    def default_min_sqnr(self, replacement: Any) -> float:
        """A user who wants weights dropped has accepted the noise of that."""
        return MIN_SQNR if self.sparsity is None or not isinstance(replacement, SparseLinear) else float("-inf")

    def report_fields(self, layer: LayerDecision) -> dict[str, Any]:
        if not isinstance(layer.replacement, SparseLinear):
            return {}
        return {"sparsity": layer.replacement.sparsity, "pattern": self.pattern.name}

    # ---- where dense layers are better ----

    def checks(self) -> Sequence[Check]:
        return self._keep_dense, *super().checks()

    def _keep_dense(self, state: RewriteState) -> None:
        """Keeps layers dense that are known to be faster so, and layers that would only get larger.

        The table that ships with the kernels (``ops/linear/sparse/crossover.py``) says what is known. Layers with int8
        values become dense int8 layers, if those are smaller than the float ones.
        """
        for layer in state.replaced_by(self):
            new = layer.replacement
            if not isinstance(new, SparseLinear):
                continue
            count = self.row_count(state, layer) if self.timed else None
            share = f"{new.sparsity:.1%} of its weights dropped"
            if _is_faster_dense(new, count):
                self._make_dense(layer, f"faster dense: {share}")
                continue
            layer.notes.insert(0, f"{share}, {self.pattern.name}")
            if (after := stored_bytes(new)) >= (before := stored_bytes(layer.module)):
                if count is None:
                    reason = f"{after:,} bytes with {share}; batch_size or sample_inputs would tell if it is faster"
                    layer.keep(reason, drops_mask=True)
                else:
                    layer.notes.append(f"larger than {before:,} bytes")

    def _make_dense(self, layer: LayerDecision, reason: str) -> None:
        """Replaces a layer by a dense int8 one, or keeps it where that would not be smaller."""
        activation, module = ACTIVATIONS[layer.choice], layer.module
        if activation is not None:
            dense = Int8Linear.from_float(module, activation, input_range=self.range_of(module))
            if stored_bytes(dense) < stored_bytes(module):
                layer.replacement, layer.choice = dense, layer.choice.removesuffix("+sparse")
                layer.notes.append(f"{reason}; of the model's own weights")
                return
        layer.keep(reason, drops_mask=True)


def _is_faster_dense(new: SparseLinear, count: int | None) -> bool:
    if not runs_packed(new.values):
        return False
    few, many = runs_dense(new.operands())
    if count is None:
        return few and many
    return many if count > FEW_ROWS else few
