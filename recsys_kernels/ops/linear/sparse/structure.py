"""What follows from where a layer's weights are, which training does not change."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ....backends import selection
from ..activation import (
    NONE,
    WEIGHT_ONLY,
)
from . import crossover
from .packs import packed, runs_packed
from .reference import two_of_four_columns
from .spec import SparseLayer, block_shape


class Transposed(NamedTuple):
    """The structure of a transposed layer.

    Attributes:
        crow_indices, col_indices: where its weights are; always blocks or unstructured.
        permutation: which block, or weight, of the layer each of its own is.
        out_features: K, of 2:4 rounded up to whole fours.
    """

    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    permutation: torch.Tensor
    out_features: int

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the transposed layer."""
        if values.dim() == 3:
            return values.transpose(1, 2)[self.permutation]
        return values.reshape(-1)[self.permutation]


def transpose_structure(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_rows: int,
    block_columns: int,
    out_features: int,
    in_features: int,
) -> Transposed:
    """The structure of a layer's transposed weights [K, N]: blocks r x c become c x r, 2:4 becomes unstructured.

    Waits for no GPU: all sizes follow from the sizes of the arguments.

    Args:
        crow_indices, col_indices: see the module; a structure that has been checked.
        block_rows, block_columns: of the blocks: 1 and 1 unstructured, 0 and 0 of 2:4.
    """
    device = col_indices.device
    if block_rows == 0:
        columns = two_of_four_columns(col_indices, in_features)
        rows = torch.arange(out_features, device=device).unsqueeze(1).expand_as(columns).reshape(-1)
        columns, count, transposed = columns.reshape(-1), -(-in_features // 4) * 4, -(-in_features // 4) * 4
    else:
        columns, count, transposed = col_indices.long(), -(-in_features // block_columns), in_features
        block_row_numbers = torch.arange(crow_indices.shape[0] - 1, device=device)
        lengths = crow_indices.long().diff()
        rows = torch.repeat_interleave(block_row_numbers, lengths, output_size=columns.shape[0])
    # Stable, so that the rows of a column stay in order.
    permutation = torch.argsort(columns, stable=True)
    ends = torch.zeros(count + 1, dtype=torch.int64, device=device)
    ends.index_add_(0, columns + 1, torch.ones_like(columns))
    return Transposed(ends.cumsum(0).int(), rows[permutation].int(), permutation, transposed)


class Structure:
    """The structure of one layer: its transpose, and on the CPU the places of its weights in packed layers.

    Packing a layer takes longer than a product with it; putting new values into their places a fifth of that.

    Args:
        layer: its operands, which have been checked.
    """

    def __init__(self, layer: SparseLayer) -> None:
        values, crow, col, self._out_features, self._in_features, *_, self._scheme, self._activation = layer
        # Copies: a backward reads them, whatever was written to the layer's own tensors since its forward.
        # A backward saves them, which torch refuses of tensors that are made in inference mode.
        with torch.inference_mode(False):
            self.crow_indices, self.col_indices = crow.detach().clone(), col.detach().clone()
        self.shape, self._block = values.shape, block_shape(values)
        self._transposed: Transposed | None = None
        self._places: dict[tuple[bool, int], torch.Tensor] = {}

    def transposed(self) -> Transposed:
        """The transposed structure."""
        if self._transposed is None:
            sizes = self._out_features, self._in_features
            self._transposed = transpose_structure(self.crow_indices, self.col_indices, *self._block, *sizes)
        return self._transposed

    def packs(self, values: torch.Tensor) -> bool:
        """Whether the CPU runs layers with such values from packed ones by their places."""
        return values.dtype == torch.float32 and runs_packed(values)

    def run(self, input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
        """The layer with its present values and bias over [..., K] on the CPU, without a gradient."""
        kind = self._kind(input.numel() > crossover.FEW_ROWS * self._in_features, self._block[0])
        pack = self._pack(False, kind, layer[0], layer[6])
        return packed(input, pack, self._out_features, dtype)

    def input_gradient(self, grad: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """float32 [M, N] on the CPU to [M, K], through the transposed weights."""
        kind = self._kind(grad.shape[0] > crossover.FEW_ROWS, self._block[1])
        pack = self._pack(True, kind, values, None)
        return packed(grad, pack, self.transposed().out_features, torch.float32)[:, : self._in_features]

    def _kind(self, many: bool, block_rows: int) -> int:
        sizes = self._out_features, self._in_features, self.shape.numel()
        return 0 if not many and crossover.has_slabs(block_rows, *sizes) else 1

    def _pack(self, transposed: bool, kind: int, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            places = self._places.get((transposed, kind))
            if places is None:
                self._places[transposed, kind] = places = self._find_places(transposed, kind)
            return selection.implementation("sparse_repack", values)(places, values.detach(), bias)

    def _find_places(self, transposed: bool, kind: int) -> torch.Tensor:
        # The values of this layer are the bits of the numbers from 1 on. 0 stands where no value belongs.
        numbers = torch.arange(1, self.shape.numel() + 1, dtype=torch.int32).view(torch.float32).reshape(self.shape)
        layer = numbers, self.crow_indices, self.col_indices, self._out_features, self._in_features
        numbered = (*layer, None, None, None, self._scheme, self._activation)
        if transposed:
            other = self.transposed()
            layer = other.values(numbers), other.crow_indices, other.col_indices, other.out_features, self._out_features
            numbered = (*layer, None, None, None, WEIGHT_ONLY, NONE)
        return selection.implementation("sparse_pack", numbers)(*numbered, kind)
