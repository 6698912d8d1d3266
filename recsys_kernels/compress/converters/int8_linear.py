"""Linear layers with int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ...ops.linear.int8 import Int8Linear
from ..sizes import stored_bytes
from .converter import Converter, LayerDecision, Options, register
from .linear import LinearConverter

# Values of the option, and the ``activation`` of an Int8Linear for each.
ACTIVATIONS = {"int8": "dynamic", "int8-static": "static", "int8-weight-only": "weight_only"}


@register
class Int8LinearConverter(LinearConverter):
    """``torch.nn.Linear`` as :class:`~recsys_kernels.Int8Linear`."""

    choices: ClassVar[tuple[str, ...]] = tuple(ACTIVATIONS)

    @classmethod
    def from_options(cls, options: Options) -> Converter:
        return cls(**cls.common_arguments(options))

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        if reason := self.reason_by_kind(module, parents):
            return reason
        bias, dtype = module.bias is not None, module.weight.dtype
        try:
            sized = Int8Linear(
                module.in_features, module.out_features, bias, ACTIVATIONS[choice], dtype=dtype, device="meta"
            )
        except ValueError as refusal:
            return str(refusal)
        if (nbytes := stored_bytes(sized)) >= stored_bytes(module):
            return f"too small: {choice} would take {nbytes:,} bytes, scales included"
        return self.reason_by_range(module)

    def convert(self, layers: Sequence[LayerDecision]) -> list[Any]:
        new: list[Any] = []
        for layer in layers:
            input_range = self.range_of(layer.module)
            replacement = Int8Linear.from_float(layer.module, ACTIVATIONS[layer.choice], input_range=input_range)
            if new:
                replacement.weight, replacement.weight_scale = new[0].weight, new[0].weight_scale
            new.append(replacement)
        return new
