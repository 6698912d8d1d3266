"""What the CPU reads instead of a sparse layer's canonical operands, and layers of compiled code that keep it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ....backends import selection
from ..activation import (
    activate,
)
from ..operands import (
    FLOATS,
)
from ..prepared import PreparedByTensor
from . import crossover, formats, reference
from .spec import FAMILY, SparseLayer, block_shape


def packed(input: torch.Tensor, layer: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """A packed layer over an input of any shape [..., K]; no gradient."""
    run = selection.implementation("sparse_packed", input)
    number = selection.dtype_argument(dtype)
    if input.dim() == 2:
        return run(input, layer, out_features, number)
    if input.dim() == 0:
        raise RuntimeError("input must have at least 1 dimension, but has 0")
    # Not -1, which an empty input leaves open.
    out = run(input.flatten(0, -2) if input.dim() > 2 else input.unsqueeze(0), layer, out_features, number)
    return out.reshape(*input.shape[:-1], out_features)


class Packs:
    """A layer as the CPU reads it; every part is made when it is first needed, and none is the layer itself.

    Attributes:
        packs: for few and for many rows of input, where those have been made.
        runs_dense: whether the layer is faster as a dense one, for few and for many rows.
    """

    __slots__ = ("_dense", "_few_kind", "_in_features", "packs", "runs_dense")

    def __init__(self, layer: SparseLayer) -> None:
        values, _, _, out_features, in_features, *_ = layer
        if values.dtype == torch.int8:  # how dense its fours of columns are follows from its structure
            _check(layer)
        self.packs: list[torch.Tensor | None] = [None, None]
        self._dense: torch.Tensor | None = None
        self._in_features = in_features
        self.runs_dense = crossover.runs_dense(layer)
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
        return packed(input, pack, out_features, dtype)

    def _run_dense(self, input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
        _, _, _, out_features, in_features, scale, bias, _, _, activation = layer
        dense = self._dense
        if dense is None:
            with torch.inference_mode(False), torch.no_grad():
                self._dense = dense = _dense_form(layer)
        if scale is None:
            floats, float_bias = input.float(), None if bias is None else bias.float()
            if torch.is_autocast_enabled("cpu"):
                # As sparse layers, dense ones compute in float32 and give the type of autocast.
                dtype = torch.get_autocast_dtype("cpu")
                with torch.autocast("cpu", enabled=False):
                    return activate(F.linear(floats, dense, float_bias), activation).to(dtype)
            return activate(F.linear(floats, dense, float_bias), activation).to(dtype)
        count = input.shape[:-1].numel()
        rows = input.reshape(-1, in_features) if input.numel() else input.new_empty(count, in_features)
        out = selection.implementation("int8_chain", rows)(rows, dense, out_features, dtype)
        return out.reshape(*input.shape[:-1], out_features)


def _check(layer: SparseLayer) -> None:
    """Raises what is wrong with a layer, unless its tensors hold no values (fake ones)."""
    if type(layer.crow_indices) is torch.Tensor:
        reference.check_layer(layer)


def _dense_form(layer: SparseLayer) -> torch.Tensor:
    """A layer as a dense one: a float32 matrix [N, K], or the pack of a dense int8 layer.

    Raises:
        IndexError, RuntimeError: the structure is wrong; a dense matrix would hide that.
    """
    _check(layer)
    values, crow, col, out_features, in_features, scale, bias, qparams, scheme, activation = layer
    dense = formats.to_dense(formats.Stored(values.detach(), crow, col), out_features, in_features)
    if scale is None:
        return dense.float()
    group = reference.scale_group(out_features, in_features, scale.shape)
    scales = scale.reshape(out_features, -1)
    parts = (dense, scales, group, None if bias is None else bias.float(), qparams, scheme, activation)
    return selection.implementation("int8_pack", dense)(*parts)


def runs_packed(values: torch.Tensor) -> bool:
    """Whether layers with such values run from their packed copy at present."""
    return values.device.type == "cpu" and selection.chosen("sparse_packed", "cpu") == "cpu"


PACKS: PreparedByTensor[Packs] = PreparedByTensor()


def sparse_layer(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
    """The operator ``sparse_layer`` for CPU tensors."""
    if selection.chosen("sparse_packed", "cpu") != "cpu":
        return reference.sparse_linear(input, layer, dtype)
    tensors, numbers = (*layer[:3], *layer[5:8]), (*layer[3:5], *layer[8:])
    return PACKS.get(tensors, numbers, lambda: Packs(layer)).run(input, layer, dtype)


FAMILY.operators["sparse_layer"].implement("CPU", sparse_layer)
