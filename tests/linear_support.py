"""What the tests of optimize(linear=...) use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from recsys_kernels.compress.converters import linear as linear_module
from recsys_kernels.compress.rewrite.optimize import optimize
from recsys_kernels.compress.rewrite.report import LayerReport

WIDTH = 24


def rows(count: int = 9, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def mlp(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(WIDTH, 40),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(40, 20, bias=False),
        nn.Dropout(0.5),
        nn.GELU(),
        nn.Linear(20, 6),
    )


def by_name(report: Any) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in report.layers}


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def only_linear(model: nn.Module, choice: str = "int8", **options: Any) -> tuple[Any, Any]:
    return optimize(model, None, linear=choice, **options)


def without_timing(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """int8 is always twice as fast; the inputs that were timed."""
    seen: list[torch.Tensor] = []

    def microseconds(first: Any, second: Any, rows: torch.Tensor) -> tuple[float, float]:
        first(rows), second(rows)
        seen.append(rows)
        return 20.0, 10.0

    monkeypatch.setattr(linear_module, "_microseconds", microseconds)
    return seen
