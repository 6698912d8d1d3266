"""2:4 layers on the unit that GPUs have for them, through torch: any shape, with bias and function.

torch has the unit's two libraries (cuSPARSELt, CUTLASS) behind one tensor class. They take weights of whole tiles only,
so the layer's are padded with zeros, as is the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..activation import (
    activate,
)
from . import formats
from .spec import SparseLayer

# The rows and columns of a weight must be multiples of this, for both libraries and both types.
_TILE = 64
# CUTLASS takes rows of input by eight.
_ROWS = 8


def serves(values: torch.Tensor) -> bool:
    """Whether torch runs a layer with these values on the unit for 2:4."""
    return (
        values.dim() == 2
        and values.dtype in (torch.float16, torch.bfloat16)
        and values.device.type == "cuda"
        and torch.version.cuda is not None
        and _tensor_class(values.device) is not None
    )


def _tensor_class(device: torch.device) -> Any:
    """torch's tensor for the unit of a GPU; None where it has none."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0) and torch.backends.cusparselt.is_available():
        return getattr(torch.sparse, "SparseSemiStructuredTensorCUSPARSELT", None)
    # torch's CUTLASS kernels serve sm_80 to sm_89.
    return getattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS", None) if capability[0] == 8 else None


class Product:
    """A 2:4 layer as the unit reads it."""

    runs_dense = (False, False)

    def __init__(self, layer: SparseLayer) -> None:
        values, crow, col, self.out_features, self.in_features, _, bias, _, _, self.activation = layer
        with torch.inference_mode(False), torch.no_grad():
            stored = formats.Stored(values.detach(), crow, col)
            dense = formats.to_dense(stored, self.out_features, self.in_features)
            padding = (0, -self.in_features % _TILE, 0, -self.out_features % _TILE)
            self.weight = compress(F.pad(dense, padding).contiguous())
            self.bias = None if bias is None else bias.detach().float().clone()

    def pack(self, many: bool, input: torch.Tensor) -> None:
        """None: the unit takes no packed layer of the CPU's kernels."""

    def __call__(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[..., K] to [..., N], without a gradient."""
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise RuntimeError(
                f"input of shape {tuple(input.shape)} does not fit a weight of shape "
                f"({self.out_features}, {self.in_features}): its last dimension must be {self.in_features}"
            )
        count = input.shape[:-1].numel()
        if count == 0:
            return input.new_empty(*input.shape[:-1], self.out_features, dtype=dtype)
        rows = input.reshape(count, self.in_features).to(self.weight.dtype)
        rows = F.pad(rows, (0, -self.in_features % _TILE, 0, -count % _ROWS)).contiguous()
        out = F.linear(rows, self.weight)[:count, : self.out_features].float()
        if self.bias is not None:
            out = out + self.bias
        return activate(out, self.activation).to(dtype).reshape(*input.shape[:-1], self.out_features)


def compress(weight: torch.Tensor) -> torch.Tensor:
    """A matrix of whole tiles with two zeros in every four columns, as torch's 2:4 tensor."""
    return _tensor_class(weight.device).from_dense(weight)
