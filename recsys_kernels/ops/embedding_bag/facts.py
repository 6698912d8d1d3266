"""What ``doctor`` tells about embedding bags: the pages of tables, and what torch's own operator does."""

from __future__ import annotations

import torch

from ...backends.registry import Facts
from . import memory

_THROUGH_TORCH = "max_norm, scale_grad_by_freq"


def _huge_pages() -> str:
    """Whether tables can be on 2 MiB pages: tried, not only read from the system's setting."""
    state = memory.huge_pages_state()
    granted = memory.use_huge_pages(torch.zeros(6 << 20, dtype=torch.uint8))
    collapse = "existing tables can be moved" if granted else "existing tables stay on 4 KiB pages"
    if state in ("always", "madvise"):
        return f"{state}: new tables are on 2 MiB pages, {collapse}"
    return f"{state}: tables stay on 4 KiB pages, lookups in large ones are slower"


def facts() -> Facts:
    """``huge_pages``, and ``through_torch``: options that no kernel serves."""
    pages = _huge_pages()
    return Facts(
        {"huge_pages": pages, "through_torch": _THROUGH_TORCH},
        (("huge pages", pages),),
        (f"{'':<26}{_THROUGH_TORCH}: always torch's own operator",),
    )
