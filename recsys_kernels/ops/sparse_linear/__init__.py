"""Linear layers whose weights are pruned: only what is kept is stored, read and multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .linear import SparseLinear

__all__ = ["SparseLinear"]


def __getattr__(name: str) -> Any:
    # Imported at its first use: who only looks rows up pays nothing for it.
    if name != "SparseLinear":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .linear import SparseLinear

    return SparseLinear
