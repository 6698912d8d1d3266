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
_NEAR_CACHE = 64 << 20
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
        True when the memory is on huge pages now. False, without an error, when it is smaller than two huge pages, not
        on the CPU or sparse, or when the system refuses (``recsys_kernels.doctor()`` tells): it stays on 4 KiB pages.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"use_huge_pages takes a torch.Tensor, but got {type(tensor).__name__}")
    if tensor.layout != torch.strided:  # a sparse tensor has no storage of its own
        return False
    return _advise(tensor, _MADV_HUGEPAGE) and _advise(tensor, _MADV_COLLAPSE)


def empty(*size: int, dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """``torch.empty`` on 2 MiB pages where the system grants them."""
    tensor = torch.empty(*size, dtype=dtype, device=device)
    _advise(tensor, _MADV_HUGEPAGE)
    return tensor


@lru_cache(maxsize=1)
def _last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 when the system does not say."""
    sizes = [0]
    try:
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = path.read_text().strip()  # "32768K"
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    except (OSError, ValueError):
        return 0
    return max(sizes)


def keeps_scales_apart(num_rows: int, row_bytes: int) -> bool:
    """Whether the (scale, bias) pairs of a table get an array of their own on this machine; else they follow their row.

    They do for rows of two full cache lines, which the pair would make touch a third one, where the last-level cache
    is small and near (up to 64 MiB: Zen, client CPUs) and a quarter of it holds the array, which then stays there: 9.4
    instead of 10.4 ns a row (Zen 4, 2 million rows of 128 columns). All others were faster with the pair behind the
    row, by a quarter (32 columns) to a tenth (64, 192 and 256 columns). A large cache on a mesh answers little faster
    than memory, and the array takes as many miss slots as the rows: on a Xeon with 504 MiB pairs behind their rows
    were faster by 7 to 17 %, with 20 million rows by a quarter.
    """
    if row_bytes != 2 * _CACHE_LINE:
        return False
    cache = _last_level_cache()
    return 0 < cache <= _NEAR_CACHE and 4 * num_rows * _SCALE_BIAS_BYTES <= cache


def empty_quantized(
    num_rows: int, row_bytes: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized quantized rows and their scales and biases, on 2 MiB pages, laid out for this machine.

    With an array of their own for the scales (see :func:`keeps_scales_apart`; also on a GPU, whose kernels read rows
    in 16-byte pieces) the rows are aligned so that they cross as few cache lines as they can: to the largest power of
    two up to 64 bytes that costs at most an eighth more memory. Else each pair stands behind its row, on the same or
    the next line.

    Returns:
        uint8 [num_rows, row_bytes] and float16 [num_rows, 2]; both can be views with gaps between rows.
    """
    device = torch.empty(0, device=device).device  # None can mean any default
    if device.type != "cpu" or keeps_scales_apart(num_rows, row_bytes):
        alignment = _CACHE_LINE
        while -(-row_bytes // alignment) * alignment * 8 > row_bytes * 9:
            alignment //= 2
        width = -(-row_bytes // alignment) * alignment
        rows = empty(num_rows, width, dtype=torch.uint8, device=device)
        return rows[:, :row_bytes], empty(num_rows, 2, dtype=torch.float16, device=device)
    behind = row_bytes + row_bytes % 2  # float16 stands on even addresses
    rows = empty(num_rows, behind + _SCALE_BIAS_BYTES, dtype=torch.uint8, device=device)
    return rows[:, :row_bytes], rows[:, behind:].view(torch.float16)
