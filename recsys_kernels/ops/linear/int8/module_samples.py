"""Modules of int8 layers, each in all its kinds, for the conformance tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ....backends.registry import ModuleSample
from .layer import Int8Linear
from .mlp import Int8MLP

_KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"epilogue": "gelu"},
    "static": {"activation": "static", "granularity": 32, "input_range": (-2, 3)},
    "weight_only": {"activation": "weight_only", "epilogue": "relu", "granularity": "tensor"},
}


def _layer(in_features: int, out_features: int, **options: Any) -> Int8Linear:
    return Int8Linear.from_float(torch.nn.Linear(in_features, out_features), **options)


def _mlp() -> Int8MLP:
    return Int8MLP(_layer(40, 9, epilogue="silu"), _layer(9, 9, epilogue="sigmoid"))


def _rows(count: int) -> tuple[torch.Tensor, ...]:
    """The input of a layer of 40 columns."""
    return (torch.randn(count, 40, generator=torch.Generator().manual_seed(count)),)


def module_samples() -> Iterator[ModuleSample]:
    """Every module of the family, in each of its kinds."""
    for name, options in _KINDS.items():
        yield ModuleSample(f"Int8Linear {name}", partial(_layer, 40, 9, **options), _rows)
    yield ModuleSample("Int8Linear frozen", lambda: _layer(40, 9).requires_grad_(False), _rows)
    yield ModuleSample("Int8MLP", _mlp, _rows)
    yield ModuleSample("Int8MLP frozen", lambda: _mlp().requires_grad_(False), _rows)
