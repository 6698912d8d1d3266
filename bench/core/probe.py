"""The limits of this machine, probed in the run that reports them.

`probe_reads()` reads the very rows that a case will read (same ids, same row size, own memory on 2 MiB pages) with
nothing but prefetches and loads whose result is used. No lookup can be faster; the report gives the share that a lookup
reaches. `probe_int8()` and `probe_float()` multiply and add int8 or float32 in registers; no layer can be faster.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from recsys_kernels.backends.registry import ISA_LEVELS

SOURCE = Path(__file__).with_name("gather_probe.c")
INT8_SOURCE = Path(__file__).with_name("int8_probe.c")
FLOAT_SOURCE = Path(__file__).with_name("float_probe.c")
# Which hint and which order is the limit depends on the CPU and on the row: on Zen 4 it is T1, by 2x, and for rows of
# four lines and more the order line by line, by 1.7x.
LEVELS = {"T1": 1, "T0": 0}
ORDERS = {"row by row": 0, "16 rows line by line": 1, "16 rows line by line, then into L1": 2}
DISTANCES = (32, 64)
PASSES = 3
WORD = 0x0101010101010101  # the probed memory is filled with ones, so every checksum is known


class ProbeUnavailableError(RuntimeError):
    """The probe cannot run here; the message says why."""


@dataclass(frozen=True)
class ReadLimit:
    """Probed limits, in bytes/s. `huge_pages`: share of the probed memory that really was on 2 MiB pages."""

    gather: float
    sequential: float
    prefetch: str
    huge_pages: float

    @property
    def rate(self) -> float:
        """The limit of a lookup."""
        return self.gather

    @property
    def how(self) -> str:
        """By what means the limit was reached."""
        pages = "" if self.huge_pages > 0.9 else f", {self.huge_pages:.0%} on huge pages"
        return self.prefetch + pages


@dataclass(frozen=True)
class ProductLimit:
    """Probed limit, in operations/s (two for each product), and by which instructions."""

    rate: float
    how: str


def _compiled(source: Path, *options: str) -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise ProbeUnavailableError("no C compiler (cc, gcc or clang) on PATH")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{source.stem}.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", *options, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProbeUnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        return ctypes.CDLL(str(target))  # stays mapped when the file goes


@functools.cache
def _library() -> ctypes.CDLL:
    library = _compiled(SOURCE)
    library.gather_rows.restype = library.read_sequentially.restype = ctypes.c_uint64
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.gather_rows.argtypes = [pointer, pointer, size, size, ctypes.c_int, ctypes.c_int, size]
    library.read_sequentially.argtypes = [pointer, size]
    return library


@functools.cache
def _product_library(source: Path, level: str) -> ctypes.CDLL:
    library = _compiled(source, f"-DMAX_LEVEL={ISA_LEVELS.index(level)}")
    library.instruction.restype = ctypes.c_char_p
    library.products_per_round.restype = ctypes.c_int64
    # Of int8 the sum wraps.
    library.multiply_add.restype = ctypes.c_uint32 if source == INT8_SOURCE else ctypes.c_int64
    library.multiply_add.argtypes = [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
    return library


def _on_huge_pages() -> int:
    """Bytes of this process on transparent huge pages (0 where the system does not tell)."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


def _seconds(work: Callable[[int], int], parts: int, expected: int, bits: int = 64) -> float:
    """Best wall time of `work(part)` over all parts, one thread each; the sum of the results is checked."""
    best = float("inf")
    with ThreadPoolExecutor(parts) as pool:
        for _ in range(PASSES):
            begin = time.perf_counter()
            total = sum(pool.map(work, range(parts)) if parts > 1 else map(work, range(parts)))
            best = min(best, time.perf_counter() - begin)
            if total % 2**bits != expected % 2**bits:
                raise AssertionError("the checksum is wrong: the probe did not read or multiply what it was given")
    return best


def probe_reads(ids: npt.NDArray[np.int64], rows: int, row_bytes: int, threads: int = 1) -> ReadLimit:
    """Reads rows `ids` (1-D, each in [0, rows)) of a table of `rows` x `row_bytes` bytes.

    Raises ProbeUnavailableError where there is no compiler, ValueError where `row_bytes` is no multiple of 32.
    """
    if row_bytes % 32:
        raise ValueError(f"row_bytes must be a multiple of 32, got {row_bytes}")
    library = _library()
    ids = np.ascontiguousarray(ids)
    parts = np.array_split(ids, threads)
    size = -(-rows * row_bytes // (128 * threads)) * 128 * threads
    before = _on_huge_pages()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        table = np.frombuffer(memory, dtype=np.uint8)
        table.fill(1)
        base = table.ctypes.data
        huge = min(1.0, max(0, _on_huge_pages() - before) / size)

        def gather(part: int, level: int, order: int, ahead: int) -> int:
            mine = parts[part]
            return int(library.gather_rows(base, mine.ctypes.data, mine.size, row_bytes, level, order, ahead))

        def sequential(part: int) -> int:
            return int(library.read_sequentially(base + part * (size // threads), size // threads))

        seconds, name = min(
            (
                _seconds(
                    functools.partial(gather, level=level, order=number, ahead=ahead),
                    threads,
                    WORD * ids.size * row_bytes // 8,
                ),
                f"{hint} {ahead} rows ahead, {order}",
            )
            for hint, level in LEVELS.items()
            for order, number in ORDERS.items()
            for ahead in DISTANCES
        )
        straight = _seconds(sequential, threads, WORD * size // 8)
        del table  # the mapping cannot be closed while an array looks at it
    return ReadLimit(ids.size * row_bytes / seconds, size / straight, name, huge)


def probe_int8(level: str, threads: int = 1, rounds: int = 2_000_000) -> ProductLimit:
    """Multiplies and adds int8 with the best instructions of an instruction-set level (see ISA_LEVELS).

    Raises ProbeUnavailableError where there is no compiler, or no such instruction.
    """
    return _probe_products(INT8_SOURCE, "int8", level, threads, rounds, (101, -77), 32)


def probe_float(level: str, threads: int = 1, rounds: int = 2_000_000) -> ProductLimit:
    """The same with float32; at most 2^24 / 6 rounds, up to which the sums are exact."""
    return _probe_products(FLOAT_SOURCE, "float32", level, threads, rounds, (3, 2), 64)


def _probe_products(
    source: Path, kind: str, level: str, threads: int, rounds: int, factors: tuple[int, int], bits: int
) -> ProductLimit:
    library, (a, b) = _product_library(source, level), factors
    products = int(library.products_per_round())
    if not products or level == ISA_LEVELS[0]:
        raise ProbeUnavailableError(f"no {kind} probe at the level {level}")

    def work(part: int) -> int:
        return int(library.multiply_add(rounds, a, b))

    seconds = _seconds(work, threads, threads * rounds * products * a * b, bits)
    return ProductLimit(2 * threads * rounds * products / seconds, library.instruction().decode())
