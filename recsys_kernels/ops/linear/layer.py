"""What the modules of linear layers share."""

from __future__ import annotations

from typing import Any

import torch

from .operands import FLOATS

MODULES: dict[str, type[torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "sigmoid": torch.nn.Sigmoid,
    "silu": torch.nn.SiLU,
}


def output_type(dtype: torch.dtype, layer: str = "an int8 layer") -> torch.dtype:
    """A type that layers give, checked."""
    if dtype not in FLOATS:
        raise ValueError(f"{layer} gives float32, float16 or bfloat16, but dtype is {dtype}")
    return dtype


class FixedTypes(torch.nn.Module):
    """A module whose tensors keep their types: a cast chooses ``dtype``, the type of its output."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = output_type(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .half() and .to(dtype) choose the type of the output; the stored tensors have types of their own.
        dtype = output_type(fn(torch.empty(0, dtype=self.dtype)).dtype)

        def keep_type(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(keep_type, recurse)
        self.dtype = dtype
        return self

    def refresh(self) -> None:
        """Forgets what was made of the tensors; a module that keeps nothing has nothing to forget."""

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        # torch.jit.trace comes here. A packed copy would become a constant of the graph.
        self.refresh()
        return super()._slow_forward(*input, **kwargs)
