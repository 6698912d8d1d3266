"""What the tests of sparse layers use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import recsys_kernels as rk
from recsys_kernels import testing
from recsys_kernels.backends import selection

DTYPES = testing.FLOAT_DTYPES[:3]
PATTERNS = testing.SPARSE_PATTERNS
SCHEMES = ("dynamic", "static", "weight_only")
RANGE = (-4.0, 4.5)
FUNCTIONS: dict[str | None, Any] = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def pack(*args: Any) -> torch.Tensor:
    return selection.implementation("sparse_pack", args[0])(*args)


def run_packed(*args: Any) -> torch.Tensor:
    return selection.implementation("sparse_packed", args[0])(*args)


def float_layer(in_features: int = 41, out_features: int = 22, bias: bool = True, **options: Any) -> torch.nn.Linear:
    torch.manual_seed(in_features)
    return torch.nn.Linear(in_features, out_features, bias, **options)


def sparse(
    pattern: str = "unstructured", linear: torch.nn.Linear | None = None, sparsity: float = 0.8, **options: Any
) -> rk.SparseLinear:
    share = None if pattern == "2:4" else sparsity
    linear = linear or float_layer()
    if share is None:
        return rk.SparseLinear.from_dense(linear, 0.5, pattern, **options)
    return rk.SparseLinear.from_dense(linear, share, pattern, **options)


def quantized(pattern: str = "unstructured", activation: str = "dynamic", **options: Any) -> rk.SparseLinear:
    return sparse(pattern, **options).quantize(activation, input_range=RANGE if activation == "static" else None)


def rows(count: int = 7, width: int = 41) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def dense_of(module: rk.SparseLinear) -> torch.Tensor:
    """The weights in float64 by the documented format, from the saved state, one stored weight after the other."""
    state, (n, k) = module.state_dict(), (module.out_features, module.in_features)
    dense = torch.zeros(n, k, dtype=torch.float64)
    values, crow, col = (state[name].tolist() for name in ("values", "crow_indices", "col_indices"))
    scale = state["weight_scale"].double().reshape(n, -1).tolist() if "weight_scale" in state else [[1.0]] * n
    count = len(scale[0])
    group = k if count == 1 else next(size for size in (32, 64, 128) if -(-k // size) == count)
    if state["values"].dim() == 2:
        for row in range(n):
            for number, value in enumerate(values[row]):
                four, second = divmod(number, 2)
                column = 4 * four + (col[row][four // 2] >> (four % 2 * 4 + 2 * second) & 3)
                if column < k:
                    dense[row, column] = value * scale[row][column // group]
        return dense
    for block_row in range(len(crow) - 1):
        for at in range(crow[block_row], crow[block_row + 1]):
            block = values[at] if state["values"].dim() == 3 else [[values[at]]]
            for i, line in enumerate(block):
                for j, value in enumerate(line):
                    row, column = block_row * len(block) + i, col[at] * len(line) + j
                    if row < n and column < k:
                        dense[row, column] = value * scale[row][column // group]
    return dense
