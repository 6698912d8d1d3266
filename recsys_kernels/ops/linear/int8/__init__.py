"""Linear layers with int8 weights: quantization, product and activation function in one pass."""

from . import compiled as compiled  # registers int8_layers for the CPU
from .layer import Int8Linear
from .mlp import Int8MLP

__all__ = ["Int8Linear", "Int8MLP"]
