"""Memory for tables: on 2 MiB pages, with rows aligned to cache lines.

With 4 KiB pages nearly every random row misses the TLB, and the prefetches that make a lookup fast wait for page
walks; 2 MiB pages are worth 1.7-2.7x. Usual servers give them only to memory that asks (``madvise``).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import torch

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
_CACHE_LINE = 64
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def huge_pages_state() -> str:
    """The system's setting for transparent huge pages: "always", "madvise", "never" or "unsupported"."""
    try:
        words = _STATE.read_text().split()
    except OSError:
        return "unsupported"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unsupported")


def _advise(tensor: torch.Tensor, advice: int) -> bool:
    """madvise over the whole 2 MiB pages inside a tensor's storage."""
    libc = _libc()
    if libc is None or tensor.device.type != "cpu":
        return False
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (storage.data_ptr() + storage.nbytes()) // _HUGE_PAGE * _HUGE_PAGE
    if end <= begin:
        return False
    return libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice)) == 0


def use_huge_pages(tensor: torch.Tensor) -> bool:
    """Moves the memory of an existing CPU tensor to 2 MiB pages, in place.

    Asks the kernel to use huge pages for it (``MADV_HUGEPAGE``) and, on Linux 6.1 and newer, to move what is already
    there at once (``MADV_COLLAPSE``). Values, shape and address do not change.

    Args:
        tensor: any tensor; what counts is its whole storage.

    Returns:
        True when the memory is on huge pages now. False, without an error, when it is smaller than two huge pages or
        not on the CPU, or when the system refuses (see ``recsys_kernels.doctor()``): it then stays on 4 KiB pages.
    """
    return _advise(tensor, _MADV_HUGEPAGE) and _advise(tensor, _MADV_COLLAPSE)


def empty(*size: int, dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """``torch.empty`` on 2 MiB pages where the system grants them."""
    tensor = torch.empty(*size, dtype=dtype, device=device)
    _advise(tensor, _MADV_HUGEPAGE)
    return tensor


def empty_rows(num_rows: int, row_bytes: int, device: torch.device | str | None = None) -> torch.Tensor:
    """An uninitialized uint8 matrix on 2 MiB pages whose rows cross as few cache lines as they can.

    Rows are aligned to the largest power of two up to 64 bytes that costs at most an eighth more memory; the result
    is then a view of wider rows.

    Returns:
        uint8 tensor of shape [num_rows, row_bytes]; rows are contiguous, the matrix need not be.
    """
    alignment = _CACHE_LINE
    while -(-row_bytes // alignment) * alignment * 8 > row_bytes * 9:
        alignment //= 2
    width = -(-row_bytes // alignment) * alignment
    return empty(num_rows, width, dtype=torch.uint8, device=device)[:, :row_bytes]
