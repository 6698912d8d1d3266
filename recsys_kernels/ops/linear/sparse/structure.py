"""What follows from where a layer's weights are, which training does not change."""

from __future__ import annotations

import torch

from ....backends import selection
from ..operands import NONE, WEIGHT_ONLY
from . import autograd as op
from . import crossover
from .prepared import runs_packed
from .spec import SparseLayer, block_shape


class Structure:
    """The structure of one layer: its transpose, and on the CPU the places of its weights in packed layers.

    Packing a layer takes longer than a product with it; putting new values into their places a fifth of that.

    Args:
        layer: its operands, which have been checked.
    """

    def __init__(self, layer: SparseLayer) -> None:
        values, self._crow, self._col, self._out_features, self._in_features, *_, self._scheme, self._activation = layer
        self._shape, self._block = values.shape, block_shape(values)
        self._transposed: op.Transposed | None = None
        self._places: dict[tuple[bool, int], torch.Tensor] = {}

    def transposed(self) -> op.Transposed:
        """The transposed structure."""
        if self._transposed is None:
            sizes = self._out_features, self._in_features
            self._transposed = op.transpose_structure(self._crow, self._col, *self._block, *sizes)
        return self._transposed

    def packs(self, values: torch.Tensor) -> bool:
        """Whether the CPU runs layers with such values from packed ones by their places."""
        return values.dtype == torch.float32 and runs_packed(values)

    def run(self, input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
        """The layer with its present values and bias over [..., K] on the CPU, without a gradient."""
        kind = self._kind(input.numel() > crossover.FEW_ROWS * self._in_features, self._block[0])
        pack = self._pack(False, kind, layer[0], layer[6])
        return op.packed(input, pack, self._out_features, dtype)

    def input_gradient(self, grad: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """float32 [M, N] on the CPU to [M, K], through the transposed weights."""
        kind = self._kind(grad.shape[0] > crossover.FEW_ROWS, self._block[1])
        pack = self._pack(True, kind, values, None)
        return op.packed(grad, pack, self.transposed().out_features, torch.float32)[:, : self._in_features]

    def _kind(self, many: bool, block_rows: int) -> int:
        sizes = self._out_features, self._in_features, self._shape.numel()
        return 0 if not many and crossover.has_slabs(block_rows, *sizes) else 1

    def _pack(self, transposed: bool, kind: int, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            places = self._places.get((transposed, kind))
            if places is None:
                self._places[transposed, kind] = places = self._find_places(transposed, kind)
            return selection.implementation("sparse_repack", values)(places, values.detach(), bias)

    def _find_places(self, transposed: bool, kind: int) -> torch.Tensor:
        # A layer whose values are the bits of their numbers, from 1 on: 0 is where no value belongs.
        numbers = torch.arange(1, self._shape.numel() + 1, dtype=torch.int32).view(torch.float32).reshape(self._shape)
        layer = numbers, self._crow, self._col, self._out_features, self._in_features
        numbered = (*layer, None, None, None, self._scheme, self._activation)
        if transposed:
            other = self.transposed()
            layer = other.values(numbers), other.crow_indices, other.col_indices, other.out_features, self._out_features
            numbered = (*layer, None, None, None, WEIGHT_ONLY, NONE)
        return selection.implementation("sparse_pack", numbers)(*numbered, kind)
