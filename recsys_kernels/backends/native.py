"""Finds and loads the native library; keeps the reason when it cannot."""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ISA_LEVELS = ("generic", "avx2", "avx512", "avx512_vnni")
LIBRARIES = ("_C.so", "_C.dylib")
BOUNDS_CHECKS = ("raise", "clamp", "ignore")


class Fault(NamedTuple):
    """A wrong index or offset that a CUDA kernel met.

    Attributes:
        kind: 1 for an index, 2 for an offset, 3 for a row of a collection's plan.
        feature: the feature of a collection, or -1 for a single table.
        position: where it stands in ``indices``, ``offsets`` or the plan.
        value: what stands there.
        bound: the table's rows, or the number of indices.
        table: the number of the table in a collection.
    """

    kind: int
    feature: int
    position: int
    value: int
    bound: int
    table: int


def _truncated(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers, which linkers put last.

    The loader maps such a file without complaint, and the process dies of SIGBUS where the pages are missing.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # not such a file: the loader says what is wrong with it
    (offset,) = struct.unpack_from("<q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return bool(offset + size * count > path.stat().st_size)


def _why_not_built(here: Path) -> str:
    """Why no library lies beside this copy of the package, and what to do about that.

    Args:
        here: the folder of this copy.
    """
    if not (here.parent / "setup.py").is_file():
        return "not built (no C++ compiler when recsys_kernels was installed, or a platform without native kernels)"
    reason = f"this is the source checkout {here.parent}, in which no library is built"
    for folder in map(Path, sys.path):
        other = (folder / here.name).resolve()
        if other != here.resolve() and any((other / name).exists() for name in LIBRARIES):
            return f"{reason}; the installed copy {other} has one: start Python in another folder to use it"
    return f"{reason}; `pip install -e .` there builds it"


def driver_release() -> tuple[int, int] | None:
    """The newest CUDA release that this machine's GPU driver serves, or None without a driver. Wakes no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


class NativeLibrary:
    """The shared library with the CPU kernels and, if they were built, the CUDA ones; or the reason why there is none.

    Attributes:
        path: where it lies, or None.
        reason: why it could not be loaded, or None when it was.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.reason: str | None = None
        self._functions: ctypes.CDLL | None = None

    def load(self) -> None:
        """Loads the library once; its kernels register with torch as it loads."""
        here = Path(__file__).parent.parent
        found = [here / name for name in LIBRARIES if (here / name).exists()]
        if not found:
            self.reason = _why_not_built(here)
            return
        try:
            if _truncated(found[0]):
                raise OSError("the file is truncated")
            torch.ops.load_library(str(found[0]))
            self._functions = ctypes.CDLL(str(found[0]))
        except (OSError, RuntimeError) as error:
            # torch's own message only names the file; what the loader said is the cause.
            self.reason = f"{found[0].name} does not load: {error.__cause__ or error}"
            return
        self.path = found[0]

    def isa_supported(self) -> str | None:
        """The highest instruction-set level of this machine and build, or None without a library."""
        return ISA_LEVELS[self._functions.rk_isa_supported()] if self._functions else None

    def isa(self) -> str | None:
        """The instruction-set level in use, or None without a library."""
        return ISA_LEVELS[self._functions.rk_isa_current()] if self._functions else None

    def select_isa(self, level: str) -> None:
        """Lowers (or restores) the instruction-set level.

        Raises:
            ValueError: the level does not exist.
            RuntimeError: the machine or the build does not have it.
        """
        if level not in ISA_LEVELS:
            raise ValueError(f"the ISA level must be one of {', '.join(ISA_LEVELS)}, but is {level!r}")
        if self._functions is None:
            raise RuntimeError(f"the ISA level {level!r} needs the native library: {self.reason}")
        if self._functions.rk_isa_select(ISA_LEVELS.index(level)):
            raise RuntimeError(f"this machine and build support {self.isa_supported()!r} at most, not {level!r}")

    @property
    def has_cuda(self) -> bool:
        """Whether the library holds CUDA kernels, which it does if nvcc was there when it was built."""
        return self._functions is not None and hasattr(self._functions, "rk_cuda_select_bounds_check")

    def cuda_release(self) -> tuple[int, int] | None:
        """The release of the CUDA toolkit that built the CUDA kernels, or None without them."""
        if self._functions is None or not self.has_cuda:
            return None
        return divmod(self._functions.rk_cuda_release(), 100)

    def cuda_architectures(self) -> tuple[int, ...]:
        """The GPU architectures that the library holds code for, ascending: 75, 80, ..."""
        if self._functions is None or not self.has_cuda:
            return ()
        self._functions.rk_cuda_architectures.restype = ctypes.c_char_p
        return tuple(map(int, self._functions.rk_cuda_architectures().decode().split("_")))

    def cuda_ptx(self) -> int:
        """The architecture of which the library holds PTX, or 0."""
        return int(self._functions.rk_cuda_ptx()) if self._functions is not None and self.has_cuda else 0

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run the library's CUDA kernels."""
        number = 10 * capability[0] + capability[1]
        # Machine code runs on GPUs of its generation that are not older; PTX is compiled for all that are not.
        own = any(built // 10 == capability[0] and built <= number for built in self.cuda_architectures())
        return own or 0 < self.cuda_ptx() <= number

    def select_bounds_check(self, mode: str) -> None:
        """Tells the CUDA kernels, if there are any, what to do about wrong indices: one of BOUNDS_CHECKS."""
        if self._functions is not None and self.has_cuda:
            self._functions.rk_cuda_select_bounds_check(BOUNDS_CHECKS.index(mode))

    def take_fault(self, device: int) -> Fault | None:
        """What the CUDA kernels of a device found since the last call; the caller has synchronized with them."""
        record = (ctypes.c_int64 * 6)()
        if self._functions is None or not self.has_cuda or not self._functions.rk_cuda_take_fault(device, record):
            return None
        return Fault(*record)


native = NativeLibrary()
