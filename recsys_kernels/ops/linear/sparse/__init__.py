"""Linear layers whose weights are pruned: only what is kept is stored, read and multiplied."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layer import SparseLinear
    from .mlp import SparseMLP

__all__ = ["SparseLinear", "SparseMLP"]

# Imported at their first use: a program that only looks rows up pays nothing for these modules.
_LATER = {"SparseLinear": "layer", "SparseMLP": "mlp"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
