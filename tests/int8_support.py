"""What the tests of int8 layers use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import recsys_kernels as rk
from recsys_kernels import testing

DTYPES = testing.FLOAT_DTYPES[:3]
SCHEMES = ("dynamic", "static", "weight_only")
GRANULARITIES = ("channel", "tensor", 32, 64, 128)
EPILOGUES: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
RANGE = (-4.0, 4.5)


def float_layer(in_features: int = 40, out_features: int = 21, bias: bool = True, **options: Any) -> torch.nn.Linear:
    torch.manual_seed(in_features)
    return torch.nn.Linear(in_features, out_features, bias, **options)


def quantize(linear: torch.nn.Linear, activation: str = "dynamic", **options: Any) -> rk.Int8Linear:
    if activation == "static":
        options.setdefault("input_range", RANGE)
    return rk.Int8Linear.from_float(linear, activation, **options)


def rows(count: int = 7, width: int = 40) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"activation": "static", "epilogue": "relu"},
    "weight_only": {"activation": "weight_only", "granularity": "tensor"},
    "groups": {"granularity": 32, "epilogue": "silu"},
}


def weights_of(module: rk.Int8Linear) -> torch.Tensor:
    """The weights in float64 by the documented formula, from the saved state."""
    state = module.state_dict()
    q, scale = state["weight"].double(), state["weight_scale"].double()
    if isinstance(module.granularity, int) and scale.shape[1] > 1:
        scale = scale[:, torch.arange(q.shape[1]) // module.granularity]
    return q * scale
