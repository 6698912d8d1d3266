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
_CACHED_BYTES = 16 << 20  # half of the last-level cache that a Zen 4 core sees
_SCALE_BIAS_BYTES = 4
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


def empty_quantized(
    num_rows: int, row_bytes: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized quantized rows and their scales and biases, on 2 MiB pages.

    The (scale, bias) pairs have an array of their own while it is small enough to stay in a last-level cache. The rows
    are then aligned so that they cross as few cache lines as they can: to the largest power of two up to 64 bytes that
    costs at most an eighth more memory. Of larger tables each pair stands behind its row, on the same or the next
    line, since an array of their own would miss the cache as often as the rows do (20 million rows on a Xeon core: 61
    against 49 million rows a second at 64 bytes a row, 76 against 57 at 32; at 2 million rows there is no difference).

    Returns:
        uint8 [num_rows, row_bytes] and float16 [num_rows, 2]; both can be views with gaps between rows.
    """
    if num_rows * _SCALE_BIAS_BYTES <= _CACHED_BYTES:
        alignment = _CACHE_LINE
        while -(-row_bytes // alignment) * alignment * 8 > row_bytes * 9:
            alignment //= 2
        width = -(-row_bytes // alignment) * alignment
        rows = empty(num_rows, width, dtype=torch.uint8, device=device)
        return rows[:, :row_bytes], empty(num_rows, 2, dtype=torch.float16, device=device)
    behind = row_bytes + row_bytes % 2  # float16 stands on even addresses
    rows = empty(num_rows, behind + _SCALE_BIAS_BYTES, dtype=torch.uint8, device=device)
    return rows[:, :row_bytes], rows[:, behind:].view(torch.float16)
