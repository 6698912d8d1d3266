"""Compiles the CUDA kernels for the emulation, loads them, and lets this package's operators run on them.

Every ``.cu`` file of ``csrc`` goes into one library. Its operators are registered under
``recsys_kernels_simt`` with the schemas of ``recsys_kernels``, for CPU tensors.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_support import ROOT, build_script, require_toolkit

from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import BOUNDS_CHECKS, native, operators
from recsys_kernels.ops.embedding_bag.faults import Fault, fault_error

HERE = Path(__file__).parent
EMULATOR = HERE / "emulator"

_UNDEFINED = "alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero"

# Which of them a process uses: everything that the checked one sees is an exception; AddressSanitizer's runtime has to
# be there when the process starts, and ends it.
BUILDS = {
    "checked": {
        "define": "-DRK_SIMT_CHECKED",
        "kernels": f"-fsanitize=thread,{_UNDEFINED} -fno-sanitize-recover=undefined"
        " --param tsan-distinguish-volatile=1 --param tsan-instrument-func-entry-exit=0",
        "link": "",
    },
    "address": {
        "define": "-DRK_SIMT_ADDRESS",
        "kernels": f"-fsanitize=address,{_UNDEFINED} -fno-sanitize-recover=undefined",
        "link": "-fsanitize=address,undefined",
    },
}
BUILD = os.environ.get("RK_SIMT_BUILD", "checked")  # test_simt.py sets it for processes of its own

# One seed of each strategy: threads in turn, at random, some far ahead of others. What AddressSanitizer sees depends
# less on it, and takes longer.
SEEDS = (0, 1, 2) if BUILD == "checked" else (1,)

# The emulation walks up the stack. Kernels read memory through pointers of several types.
_FLAGS = (
    "-std=c++17 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror=return-type"
    " -fno-omit-frame-pointer -fno-optimize-sibling-calls -DRK_SIMT"
)
_KERNEL_FLAGS = (
    "-O1 -fno-strict-aliasing -ffp-contract=off -ftrivial-auto-var-init=pattern -fno-gnu-unique -Wno-unknown-pragmas"
    " -Daoti_torch_empty_strided=simt_empty_strided -Daoti_torch_get_data_ptr=simt_get_data_ptr"
    " -Dtorch_get_mutable_data_ptr=simt_get_mutable_data_ptr -Dtorch_get_const_data_ptr=simt_get_const_data_ptr"
    " -Daoti_torch_delete_tensor_object=simt_delete_tensor_object"
)


def compiler() -> str:
    """The C++ compiler."""
    return os.environ.get("CXX", "").strip() or "g++"


def _is_served() -> bool:
    return sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def why_not() -> str | None:
    """Why kernels cannot be emulated on this machine, or None."""
    if not _is_served():
        return "the emulation's context switch is written for x86-64 Linux"
    # The checks are made of its instrumentation, and of what it does with variables that start without a value.
    command = [*shlex.split(compiler()), "-dM", "-E", "-x", "c++", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
    macros = dict(line.split(" ", 2)[1:] for line in said.splitlines() if line.count(" ") >= 2)
    if int(macros.get("__GNUC__", 0)) < 12 or "__clang__" in macros:
        return f"kernels are emulated with g++ 12 or newer, and {compiler()} is none"
    return None


def require() -> None:
    """Skips a test where kernels cannot be emulated. In CI that is a failure, where it is for want of a compiler."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("CI") and _is_served():
            pytest.fail(reason)
        pytest.skip(reason)


def _ninja_file(build: str, kernels: list[Path], program: list[Path]) -> str:
    """Compiles the emulation, a library of kernels and a program of kernels, the latter two if there are sources."""
    script = build_script()
    quoted: Callable[[Path], str] = lambda path: script.ninja_argument(str(path))  # noqa: E731
    torch_dir = script.torch_root()
    toolkit = require_toolkit().nvcc.parent.parent / "include"
    includes = f"-I{quoted(EMULATOR)} -I{quoted(ROOT / 'csrc')} -isystem {quoted(toolkit)}"
    flags = f"{_FLAGS} {BUILDS[build]['define']} {' '.join(script.DEFINES)} {includes}"
    kernel_flags = f"{flags} -isystem {quoted(torch_dir / 'include')} {_KERNEL_FLAGS} {BUILDS[build]['kernels']}"
    cxx, link = compiler(), BUILDS[build]["link"]
    torch_libs = f"-L{quoted(torch_dir / 'lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu"
    lines = [
        "rule emulator",
        f"  command = {cxx} -MMD -MF $out.d {flags} -O2 -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule kernels",
        f"  command = {cxx} -x c++ -MMD -MF $out.d {kernel_flags} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule library",
        f"  command = {cxx} {link} -shared $in {torch_libs} -Wl,-z,defs -ldl -lpthread -o $out",
        "rule program",
        f"  command = {cxx} {link} $in -ldl -lpthread -o $out",
    ]

    def compile_all(rule: str, sources: list[Path]) -> list[str]:
        objects = []
        for source in sources:
            objects.append(f"{source.parent.name}_{source.stem}.o")
            lines.append(f"build {objects[-1]}: {rule} {script.ninja_path(source)}")
        return objects

    # First, so that of functions that both have (std::string's) the linker takes the emulation's: it must not watch
    # its own accesses to memory.
    emulator = compile_all("emulator", sorted(EMULATOR.glob("*.cpp")))
    if kernels:
        lines.append(f"build kernels.so: library {' '.join(emulator + compile_all('kernels', kernels))}")
    if program:
        lines.append(f"build program: program {' '.join(emulator + compile_all('kernels', program))}")
    return "\n".join([*lines, ""])


def compiled(build: str, folder: Path, kernels: list[Path], program: list[Path] | None = None) -> Path:
    """The folder, with ``kernels.so`` (and ``program``) in it, built from what is new since the last time."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _ninja_file(build, kernels, program or [])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at the same
        (folder / "build.ninja").write_text(text)
        jobs = str(len(os.sched_getaffinity(0)))
        command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    if done.returncode:
        raise RuntimeError(f"the kernels could not be compiled for the emulation:\n{done.stdout}{done.stderr}")
    return folder


def cache_folder(build: str, name: str) -> Path:
    """Where what was compiled is kept from one run to the next."""
    return ROOT / "build" / "simt" / build / name


def kernel_sources() -> list[Path]:
    """Every operator's and the common files of CUDA C++ that there are."""
    return sorted((ROOT / "csrc").rglob("*.cu"))


class Emulation:
    """A library of emulated kernels that has been loaded.

    Args:
        path: the library.
        namespace: the torch library that its operators are registered in.

    Attributes:
        operators: the names of this package's operators that it holds.
    """

    def __init__(self, path: Path, namespace: str = "recsys_kernels_simt") -> None:
        self.namespace = namespace
        self._library = torch.library.Library(namespace, "DEF")  # torch drops the operators when it dies
        for name in operators:
            schema = str(getattr(torch.ops.recsys_kernels, name).default._schema)
            self._library.define(schema.split("::", 1)[1])
        torch.ops.load_library(str(path))
        self._functions = ctypes.CDLL(str(path))
        self._functions.simt_seed.argtypes = [ctypes.c_uint64]
        self._functions.simt_launches.restype = ctypes.c_int64
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        self.operators = frozenset(n for n in operators if has_kernel(f"{namespace}::{n}", "CPU"))
        self._calls = 0

    def seed(self, seed: int) -> None:
        """From here on the order of blocks and threads is a function of this number."""
        self._functions.simt_seed(seed)

    def launches(self) -> int:
        """How many kernels have been launched."""
        return int(self._functions.simt_launches())

    def host_error(self) -> str | None:
        """What an operator's host code did wrong since the last launch: the next one would raise it."""
        text = ctypes.create_string_buffer(2000)
        return text.value.decode() if self._functions.simt_take_host_error(text, ctypes.c_size_t(2000)) else None

    def operator(self, name: str) -> Any:
        """An emulated operator."""
        return getattr(getattr(torch.ops, self.namespace), name).default

    @contextmanager
    def active(self) -> Iterator[None]:
        """Lets this package's modules and functions use the emulated operators for CPU tensors.

        Within it ``rk.bounds_check`` chooses the mode of the emulated kernels.

        Raises:
            AssertionError: nothing did, so that nothing was tested.
        """
        original = selection.implementation
        before = self._calls

        def implementation(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
            if tensor.device.type != "cpu" or name not in self.operators:
                return original(name, tensor)
            self._calls += 1
            return self.operator(name)  # type: ignore[no-any-return]

        with (
            mock.patch.object(selection, "implementation", implementation),
            mock.patch.object(native, "select_bounds_check", self._select_bounds_check),
            mock.patch.object(native, "take_fault", self.take_fault),
        ):
            yield
        assert self._calls > before, "no emulated operator has been called"

    def _select_bounds_check(self, mode: str) -> None:
        assert self._functions.rk_cuda_select_bounds_check(BOUNDS_CHECKS.index(mode)) == 0

    def take_fault(self, device: int = 0) -> Fault | None:
        """What a kernel has found wrong with indices or offsets since the last time, if anything."""
        record = (ctypes.c_int64 * 6)()
        return Fault(*record) if self._functions.rk_cuda_take_fault(device, record) else None

    def check_bounds(self) -> None:
        """Raises what ``rk.check_bounds`` would raise on a GPU."""
        fault = self.take_fault()
        if fault is not None:
            raise fault_error(fault)


@functools.cache
def emulation() -> Emulation | None:
    """The emulated kernels of this package, or None when there are no kernels yet."""
    require()
    sources = kernel_sources()
    if not any(source.name == "op_cuda.cu" for source in sources):
        return None
    return Emulation(compiled(BUILD, cache_folder(BUILD, "kernels"), sources) / "kernels.so")


def sanitizer_environment() -> dict[str, str]:
    """For a Python process that loads the build for AddressSanitizer: fresh memory is NaN, with red zones after it."""
    cxx = compiler()
    # libstdc++ as well, or the sanitizer finds no __cxa_throw to wrap.
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.check_output([cxx, f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_KERNELS_")}
    return environment | {
        "LD_PRELOAD": " ".join(found),
        "RK_SIMT_BUILD": "address",
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
