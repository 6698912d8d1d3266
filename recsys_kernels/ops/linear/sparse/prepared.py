"""What the CPU reads instead of a layer's canonical operands, and layers of compiled code that keep it.

A module compares its tensors with those from which something was made. Compiled code can't: what it reads of a tensor
is fixed when it is traced, but for the tensor's values. So the comparison is part of an operator, which gets the
tensors at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ....backends import selection
from ..operands import FLOATS, MAX_IN_FEATURES, WEIGHT_ONLY, activate
from . import autograd as op
from . import crossover, formats, reference
from .spec import FAMILY, SparseLayer, block_shape


class Prepared:
    """A layer as the CPU reads it; every part is made when it is first needed, and none is the layer itself.

    Attributes:
        packs: for few and for many rows of input, where those have been made.
        runs_dense: whether the layer is faster as a dense one, for few and for many rows.
    """

    __slots__ = ("_dense", "_few_kind", "_in_features", "packs", "runs_dense")

    def __init__(self, layer: SparseLayer) -> None:
        values, _, _, out_features, in_features, *_ = layer
        self.packs: list[torch.Tensor | None] = [None, None]
        self._dense: torch.Tensor | None = None
        self._in_features = in_features
        self.runs_dense = runs_dense(layer)
        slabs = crossover.has_slabs(block_shape(values)[0], out_features, in_features, values.numel())
        self._few_kind = 0 if slabs else 1

    def pack(self, many: bool, input: torch.Tensor) -> torch.Tensor | None:
        """What the kernels of a layer read for this 2-D input, if it has been made: of int8 layers that run dense, the
        dense layer. None for a dense layer of floats, and where the input is wrong for one of int8."""
        if not self.runs_dense[many]:
            return self.packs[many]
        dense = self._dense
        if dense is None or dense.dtype != torch.uint8:
            return None
        return dense if input.shape[1] == self._in_features and input.dtype in FLOATS else None

    def run(self, input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
        """[..., K] to [..., N], without a gradient; the layer that this was made for."""
        out_features, in_features = layer[3:5]
        many = input.numel() > crossover.FEW_ROWS * in_features
        # Wrong inputs are for the operator to refuse.
        right = input.dim() >= 1 and input.shape[-1] == in_features and input.dtype in FLOATS
        if self.runs_dense[many] and right:
            return self._run_dense(input, layer, dtype)
        pack = self.packs[many]
        if pack is None:
            kind = 1 if many else self._few_kind
            with torch.inference_mode(False), torch.no_grad():
                pack = selection.implementation("sparse_pack", layer[0])(*layer, kind)
            if type(pack) is torch.Tensor:  # not a fake one
                self.packs[many] = pack
                if self._few_kind == 1:
                    self.packs = [pack, pack]
        return op.packed(input, pack, out_features, dtype)

    def _run_dense(self, input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
        values, crow, col, out_features, in_features, scale, bias, qparams, scheme, activation = layer
        dense = self._dense
        if dense is None:
            with torch.inference_mode(False), torch.no_grad():
                dense = formats.to_dense(formats.Stored(values.detach(), crow, col), out_features, in_features)
                if scale is None:
                    dense = dense.float()
                else:
                    group = reference.scale_group(out_features, in_features, scale.shape)
                    scales = scale.reshape(out_features, -1)
                    parts = (dense, scales, group, None if bias is None else bias.float(), qparams)
                    dense = selection.implementation("int8_pack", dense)(*parts, scheme, activation)
            self._dense = dense
        if scale is None:
            floats, of_bias = input.float(), None if bias is None else bias.float()
            if torch.is_autocast_enabled("cpu"):
                # As sparse ones, dense layers take the types that they get.
                with torch.autocast("cpu", enabled=False):
                    return activate(F.linear(floats, dense, of_bias), activation).to(dtype)
            return activate(F.linear(floats, dense, of_bias), activation).to(dtype)
        rows = (
            input.reshape(-1, in_features) if input.numel() else input.new_empty(input.shape[:-1].numel(), in_features)
        )
        out = selection.implementation("int8_chain", rows)(rows, dense, out_features, dtype)
        return out.reshape(*input.shape[:-1], out_features)


def _is_grouped(layer: SparseLayer) -> bool:
    scale = layer[5]
    return scale is not None and reference.scale_group(layer[3], layer[4], scale.shape) > 0


def limits(layer: SparseLayer) -> tuple[float, float]:
    """The densities above which such layers run dense at present, for few and for many rows of input."""
    values, scheme = layer[0], layer[8]
    # Those with scales of groups are packed as floats.
    dtype = torch.float32 if _is_grouped(layer) else values.dtype
    return crossover.limits(dtype, scheme, block_shape(values)[0])


def density(layer: SparseLayer) -> float:
    """The share of what a dense layer would multiply: of the weights, of int8 products of the fours of columns that
    are multiplied together."""
    values, crow, col, out_features, in_features, *_, scheme, _ = layer
    rows, columns = block_shape(values)
    share = values.numel() / (out_features * in_features)
    if values.dtype != torch.int8 or scheme == WEIGHT_ONLY or _is_grouped(layer) or columns % 4 == 0 < columns:
        return min(share, 1.0)
    if rows == 0:
        return 1.0
    block_rows, fours = crow.numel() - 1, -(-in_features // 4)
    of_row = torch.repeat_interleave(torch.arange(block_rows, device=crow.device), crow.long().diff())
    kept_fours = torch.unique_consecutive(of_row * fours + col.long() * columns // 4)
    return min(1.0, kept_fours.numel() * -(-columns // 4) / (block_rows * fours))


def runs_dense(layer: SparseLayer) -> tuple[bool, bool]:
    """Whether a layer is faster as a dense one on this machine, for few and for many rows of input."""
    if layer[0].dtype == torch.int8 and layer[4] > MAX_IN_FEATURES:
        return False, False
    share = density(layer)
    few, many = limits(layer)
    return share > few, share > many


def runs_packed(values: torch.Tensor) -> bool:
    """Whether layers with such values run from their packed copy at present."""
    return values.device.type == "cpu" and selection.chosen("sparse_packed", "cpu") == "cpu"


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors of floats hold the same, NaN included."""
    integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    return x.dtype == y.dtype and torch.equal(x.detach().view(integers), y.detach().view(integers))


class _Kept(NamedTuple):
    """What was made of a layer, and of what: tensors with their versions and addresses, and numbers."""

    tensors: tuple[TensorWeakRef | None, ...]
    versions: tuple[tuple[int, int], ...]
    values: tuple[torch.Tensor | None, ...]  # of those that are trained: fused optimizers write without counting it
    numbers: tuple[int, ...]
    prepared: Prepared


# By the layer's values, with which it goes. Layers can share these: what was made of the last few is kept.
_kept = WeakTensorKeyDictionary()
_MOST_KEPT = 4


def _is_current(kept: _Kept, tensors: Sequence[torch.Tensor | None], numbers: tuple[int, ...]) -> bool:
    if numbers != kept.numbers:
        return False
    for tensor, known, version, values in zip(tensors, kept.tensors, kept.versions, kept.values, strict=True):
        if tensor is None or known is None:
            if tensor is not known:
                return False
            continue
        if known() is not tensor or (tensor._version, tensor.data_ptr()) != version:
            return False
        if tensor.requires_grad and (values is None or not same_bits(tensor, values)):
            return False
    return True


def _prepared(layer: SparseLayer) -> Prepared:
    tensors = (*layer[:3], *layer[5:8])
    numbers = (*layer[3:5], *layer[8:])
    # An inference tensor does not count what is written to it.
    if any(tensor is not None and tensor.is_inference() for tensor in tensors):
        return Prepared(layer)
    of_values: list[_Kept] = _kept.setdefault(layer[0], [])
    for kept in of_values:
        if _is_current(kept, tensors, numbers):
            return kept.prepared
    prepared = Prepared(layer)
    known = tuple(None if tensor is None else TensorWeakRef(tensor) for tensor in tensors)
    versions = tuple((0, 0) if tensor is None else (tensor._version, tensor.data_ptr()) for tensor in tensors)
    values = tuple(t.detach().clone() if t is not None and t.requires_grad else None for t in tensors)
    of_values[:] = [_Kept(known, versions, values, numbers, prepared), *of_values[: _MOST_KEPT - 1]]
    return prepared


def sparse_layer(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
    """The operator ``sparse_layer`` for CPU tensors."""
    if selection.chosen("sparse_packed", "cpu") != "cpu":
        return reference.sparse_linear(input, layer, dtype)
    return _prepared(layer).run(input, layer, dtype)


FAMILY.operators["sparse_layer"].implement("CPU", sparse_layer)
