"""From which share of kept weights on the CPU multiplies a layer faster as a dense one."""

from __future__ import annotations

import torch

from ..._native import native
from ..linear_layers import WEIGHT_ONLY

# By instruction-set level; then by the type of the values, "int8" with an exact product and "int8 float" weight_only;
# then by the output rows that share their columns (4: blocks whose rows are a multiple of it): the density above which
# the dense layer is faster, for few rows of input (op.FEW_ROWS) and for many. Not measured yet: chosen so that no layer
# runs dense from which a gain is expected.
Limits = dict[int, tuple[float, float]]
_FLOATS: dict[str, Limits] = {
    "float32": {1: (0.70, 0.70), 4: (0.85, 0.85)},
    "16-bit": {1: (0.70, 0.70), 4: (0.85, 0.85)},
    "int8 float": {1: (0.70, 0.70), 4: (0.85, 0.85)},
}
CROSSOVER: dict[str, dict[str, Limits]] = {
    "generic": {**_FLOATS, "int8": {1: (0.50, 0.50), 4: (0.60, 0.60)}},
    "avx2": {**_FLOATS, "int8": {1: (0.40, 0.30), 4: (0.50, 0.40)}},
    "avx512": {**_FLOATS, "int8": {1: (0.40, 0.30), 4: (0.50, 0.40)}},
    "avx512_vnni": {**_FLOATS, "int8": {1: (0.30, 0.15), 4: (0.40, 0.30)}},
}


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
