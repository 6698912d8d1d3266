"""Linear layers with int8 weights: quantization, product and activation function in one pass."""

from . import kept  # noqa: F401  (registers)
from .linear import Int8Linear
from .mlp import Int8MLP

__all__ = ["Int8Linear", "Int8MLP"]
