"""Modules of sparse layers, each in all its kinds, for the conformance tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....backends.registry import ModuleSample
from ..operands import SCHEMES
from .layer import SparseLinear
from .mlp import SparseMLP
from .samples import SPARSE_PATTERNS


def _rows(count: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(count, 40, generator=torch.Generator().manual_seed(count)),)


def _layer(pattern: str, in_features: int = 40, activation: str | None = None) -> SparseLinear:
    sparsity = 0.5 if pattern == "2:4" else 0.8
    layer = SparseLinear.from_dense(torch.nn.Linear(in_features, 9), sparsity, pattern, epilogue="gelu")
    if activation is None:
        return layer
    return layer.quantize(activation, input_range=(-4, 4.5) if activation == "static" else None)


def _mlp(activation: str | None = None) -> SparseMLP:
    return SparseMLP(_layer("unstructured", 40, activation), _layer("2:4", 9, activation))


def module_samples() -> Iterator[ModuleSample]:
    """Every module of the family, in each of its kinds."""
    for number, pattern in enumerate(SPARSE_PATTERNS):
        yield ModuleSample(f"SparseLinear {pattern}", partial(_layer, pattern), _rows)
        scheme = list(SCHEMES)[number % len(SCHEMES)]
        make = partial(_layer, pattern, activation=scheme)
        yield ModuleSample(f"SparseLinear {pattern} {scheme}", make, _rows)
    yield ModuleSample("SparseMLP", _mlp, _rows)
    yield ModuleSample("SparseMLP dynamic", lambda: _mlp("dynamic").requires_grad_(False), _rows)
