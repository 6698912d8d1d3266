"""Finds and loads the native library; keeps the reason when it cannot."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

ISA_LEVELS = ("generic", "avx2", "avx512", "avx512_vnni")


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


class NativeLibrary:
    """The shared library with the CPU kernels, or the reason why there is none.

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
        here = Path(__file__).parent
        found = [path for path in (here / "_C.so", here / "_C.dylib") if path.exists()]
        if not found:
            self.reason = (
                "not built (no C++ compiler when recsys_kernels was installed, or a platform without native kernels)"
            )
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


native = NativeLibrary()
