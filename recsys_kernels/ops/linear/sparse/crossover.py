"""From which share of kept weights on the CPU multiplies a layer faster as a dense one."""

from __future__ import annotations

import torch

from ....backends.registry import native
from ..activation import (
    WEIGHT_ONLY,
)
from ..operands import (
    MAX_IN_FEATURES,
)
from . import reference
from .spec import SparseLayer, block_shape

# Up to this many rows of input the layout for few rows (kind 0 of ``sparse_pack``) is the faster one.
FEW_ROWS = 8

# By instruction-set level; then by the type of the values, "int8" with an exact product and "int8 float" weight_only;
# then by the output rows that share their columns (4: blocks whose rows are a multiple of it): the density above
# which the dense layer is faster, for few rows of input (FEW_ROWS) and for many. The density counts weights; for
# "int8" it counts the fours of columns that are multiplied together. Measured with 1024 x 1024, 512 x 512 and 128 x
# 256 weights on one core of an AMD EPYC (Zen 4) at 1 to 256 rows, for 5 to 90 % zeros: where it differs between
# numbers of rows, between them. MKL does not heed a cap there and used AVX-512 against every level. Values of 16 bits
# were not measured: they read half the memory.
Limits = dict[int, tuple[float, float]]


def _level(floats: Limits, int8_floats: Limits, int8: Limits) -> dict[str, Limits]:
    return {"float32": floats, "16-bit": floats, "int8 float": int8_floats, "int8": int8}


_AVX512: Limits = {1: (1.0, 0.85), 4: (1.0, 1.0)}
_AVX2: Limits = {1: (0.20, 0.65), 4: (0.70, 0.95)}
CROSSOVER: dict[str, dict[str, Limits]] = {
    "generic": _level(
        {1: (0.10, 0.40), 4: (0.50, 0.40)}, {1: (0.06, 0.28), 4: (0.35, 0.28)}, {1: (1.0, 1.0), 4: (1.0, 1.0)}
    ),
    "avx2": _level(_AVX2, _AVX2, {1: (0.34, 0.60), 4: (0.40, 0.70)}),
    "avx512": _level(_AVX512, _AVX512, {1: (0.40, 0.55), 4: (0.45, 0.60)}),
    "avx512_vnni": _level(_AVX512, _AVX512, {1: (0.45, 0.60), 4: (0.50, 0.60)}),
}


def has_slabs(block_rows: int, out_features: int, in_features: int, kept: int) -> bool:
    """Whether few rows of input are faster with a layout of their own.

    Below AVX-512 a lane can't pick its activations from registers, and gathering them takes longer (80 us for 105,000
    weights and one row) than a panel of 16 columns of which one is used (60 us). With fewer weights than parts of 16
    rows and 32 columns the layout is mostly counts of none.
    """
    if kept < -(-out_features // 16) * -(-in_features // 32):
        return False
    return (block_rows > 0 and block_rows % 4 == 0) or native.isa() in ("avx512", "avx512_vnni")


def kind_of(dtype: torch.dtype, scheme: int) -> str:
    """The table's name for values of a type."""
    if dtype == torch.int8:
        return "int8 float" if scheme == WEIGHT_ONLY else "int8"
    return "float32" if dtype == torch.float32 else "16-bit"


def limits(dtype: torch.dtype, scheme: int, block_rows: int) -> tuple[float, float]:
    """The densities above which layers run dense at present, for few and for many rows of input."""
    level = native.isa()
    if level is None:
        return 1.0, 1.0
    return CROSSOVER[level][kind_of(dtype, scheme)][4 if block_rows and block_rows % 4 == 0 else 1]


def _is_grouped(layer: SparseLayer) -> bool:
    scale = layer[5]
    return scale is not None and reference.scale_group(layer[3], layer[4], scale.shape) > 0


def limits_of(layer: SparseLayer) -> tuple[float, float]:
    """The densities above which layers like this one run dense at present, for few and for many rows of input."""
    values, scheme = layer[0], layer[8]
    # Layers with scales of groups are packed as floats.
    dtype = torch.float32 if _is_grouped(layer) else values.dtype
    return limits(dtype, scheme, block_shape(values)[0])


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
    few, many = limits_of(layer)
    return share > few, share > many
