"""Linear layers whose weights are pruned: only what is kept is stored, read and multiplied."""

from . import kept  # noqa: F401  (registers)
from .linear import SparseLinear

__all__ = ["SparseLinear"]
