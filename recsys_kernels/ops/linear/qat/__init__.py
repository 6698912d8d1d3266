"""Quantization-aware training: modules that compute what int8 layers will, and train float weights."""

from .layer import QATLinear
from .mlp import QATMLP

__all__ = ["QATMLP", "QATLinear"]
