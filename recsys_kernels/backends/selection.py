"""Which implementation of an operator runs.

torch's dispatcher picks the native CPU kernel or the GPU's by the device of the tensors. For CUDA tensors that is the
CUDA C++ kernel if this build has one that can run here, else the Triton kernel, else the reference. A backend that was
asked for by name bypasses the dispatcher.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .registry import BOUNDS_CHECKS, Operator, dispatched, driver_release, library, native, operators, with_cpu_kernel

BACKENDS = ("reference", "cpu", "triton", "cuda")
_DEVICES = {"reference": None, "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

_forced: str | None = None
_bounds_check = "raise"
_fault_error: Callable[[tuple[int, ...]], Exception] | None = None
_cuda_operators: set[str] = set()  # names of the operators whose CUDA tensors the library's own kernels serve


def register_faults(error: Callable[[tuple[int, ...]], Exception]) -> None:
    """Says which exception a record of ``native.take_fault`` stands for: the family whose kernels write it knows."""
    global _fault_error
    _fault_error = error


def connect_gpu_kernels() -> None:
    """Leaves CUDA tensors to the library's kernels where they can run, else to Triton; called once it has loaded."""
    usable = _cuda_reason() is None
    for name in operators:
        if native.reason is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"recsys_kernels::{name}", "CPU"):
            with_cpu_kernel.add(name)
        built = native.has_cuda and torch._C._dispatch_has_kernel_for_dispatch_key(f"recsys_kernels::{name}", "CUDA")
        if built and usable:
            _cuda_operators.add(name)
        else:
            _serve_without_library(name, built)
    if _cuda_operators:
        # Which GPUs there are is known when torch wakes them, which importing a package should not.
        torch.cuda._lazy_call(_leave_unserved_gpus)


def _leave_unserved_gpus() -> None:
    """Takes CUDA tensors from the library's kernels where a GPU is too old for them: torch dispatches by kind only."""
    if _unserved_gpu_reason() is not None:
        for name in _cuda_operators:
            _serve_without_library(name, True)
        _cuda_operators.clear()


def _serve_without_library(name: str, built: bool) -> None:
    """Gives CUDA tensors Triton's kernel or the reference; with `built` it replaces a kernel that the library has."""
    operator = operators[name]
    if operator.has_triton and _triton_reason() is None:
        kernel = _when_called(operator)
    elif built:
        kernel = operator.reference
    else:
        return
    with warnings.catch_warnings():
        # torch warns that the registration replaces a kernel; replacing the kernel is the intention.
        warnings.simplefilter("ignore")
        library.impl(name, kernel, "CUDA")


def _when_called(operator: Operator) -> Callable[..., Any]:
    """The Triton implementation, imported at the first call."""

    def run(*args: Any) -> Any:
        return operator.triton(*args)

    return run


def _triton_reason() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def _triton_interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _release(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _cuda_reason() -> str | None:
    """Why the CUDA C++ kernels serve no tensor of this torch, or None. Asks the driver for its version only."""
    built = native.cuda_release()
    if native.reason is not None:
        return f"the native library is missing: {native.reason}"
    if built is None:
        return "not built: no CUDA toolkit (nvcc) was found when recsys_kernels was installed"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if int(torch.version.cuda.split(".")[0]) < built[0]:
        # A driver serves every release with its own first number or a lower one. Where torch runs, that holds for the
        # releases with the first number of torch's own.
        served = driver_release()
        if served is not None and served[0] < built[0]:
            return f"the GPU's driver serves CUDA {_release(served)}, and the kernels are built with {_release(built)}"
    return None


def _unserved_gpu_reason() -> str | None:
    """Which of the GPUs that torch sees cannot run the CUDA C++ kernels, or None."""
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not native.serves(capability):
            return (
                f"the kernels are built for sm_{min(native.cuda_architectures())} and newer, and GPU {device} "
                f"({torch.cuda.get_device_name(device)}) is sm_{capability[0]}{capability[1]}; CUDA_VISIBLE_DEVICES "
                "can leave it out"
            )
    return None


def why_not(backend: str) -> str | None:
    """Why a backend cannot run on this machine, or None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return native.reason
    if backend == "triton":
        reason = _triton_reason()
        if reason is None and not torch.cuda.is_available() and not _triton_interprets():
            return "torch sees no GPU (and Triton's interpreter is off)"
        return reason
    reason = _cuda_reason()
    if reason is None and not torch.cuda.is_available():
        return "torch sees no GPU"
    return reason or _unserved_gpu_reason()


def implementation(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of an operator for the device of ``tensor``: the dispatcher, or the chosen backend."""
    if _forced is None:
        return dispatched[name]
    device = tensor.device
    if _forced == "reference" or not _has_own(name, _forced):
        return operators[name].reference
    if _forced == "triton":
        if device.type != "cuda" and not _triton_interprets():
            raise RuntimeError(f"backend 'triton' was asked for, but the tensors are on {device}")
        return operators[name].triton
    if device.type != _DEVICES[_forced]:
        raise RuntimeError(f"backend {_forced!r} was asked for, but the tensors are on {device}")
    return dispatched[name]


def _has_own(name: str, backend: str) -> bool:
    """Whether a backend that can run has an implementation of its own of an operator; else the reference serves it."""
    if backend == "triton":
        return operators[name].has_triton
    if backend == "cuda":
        return name in _cuda_operators
    return name in with_cpu_kernel


def without_wrapper(operator: Any) -> Callable[..., Any]:
    """The function that an operator of the dispatcher calls. torch's Python wrapper would add 0.25 us a call."""
    return getattr(operator, "_op", operator)


# torch's numbers of the types that operators return.
_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


def dtype_argument(dtype: torch.dtype) -> Any:
    """A type as an argument of an implementation: for the dispatcher its number, which it parses 0.9 us faster."""
    return dtype if _forced is not None or torch.compiler.is_compiling() else _SCALAR_TYPES.get(dtype, dtype)


def chosen(name: str, device_type: str) -> str:
    """The backend that will run an operator for tensors of a device type ("cpu", "cuda")."""
    if _forced is not None:
        return _forced if _has_own(name, _forced) else "reference"
    if device_type == "cpu":
        return "cpu" if native.reason is None and name in with_cpu_kernel else "reference"
    if name in _cuda_operators:
        return "cuda"
    return "triton" if operators[name].has_triton and _triton_reason() is None else "reference"


def check(backend: str) -> None:
    """Raises ValueError for a backend that does not exist, and RuntimeError for a backend that cannot run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}")
    reason = why_not(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")


def force(name: str | None) -> None:
    """Runs every operator on one backend from here on; None: on the one that fits the tensors.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine; the message says why.
    """
    global _forced
    if name is not None:
        check(name)
    _forced = name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every operator on one backend for the time of a ``with`` block.

    The choice holds for the whole process, like ``torch.set_num_threads``. The environment variable
    ``RECSYS_KERNELS_BACKEND`` does the same for the life of a process.

    Args:
        name: ``"reference"`` (pure PyTorch, any device), ``"cpu"`` (SIMD C++), ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run on this machine; the message says why.
    """
    global _forced
    check(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def bounds_mode() -> str:
    """The present treatment of wrong indices by GPU kernels: one of BOUNDS_CHECKS."""
    return _bounds_check


@contextmanager
def bounds_check(mode: str) -> Iterator[None]:
    """Chooses what operators on a GPU do about wrong indices and offsets, for the time of a ``with`` block.

    No mode reads or writes memory that is not an argument's. It holds for the whole process, and for the gradient's
    operators if they, too, run within the block. On the CPU a wrong index always raises.

    Args:
        mode: ``"raise"`` (the default): a wrong index is an error. Triton's operators wait for their kernel and raise
            it. The CUDA C++ operators do not wait: a later call on the device raises it when the kernel has run, and
            :func:`check_bounds` waits for it; until then the index counts as absent, and a bag with wrong offsets is
            empty. While a CUDA graph is captured no error can be raised.
            ``"ignore"``: the same without an error. ``"clamp"``: the nearest row, or the nearest range, is taken.
            Neither waits.

    Raises:
        ValueError: no such mode.
    """
    global _bounds_check
    if mode not in BOUNDS_CHECKS:
        raise ValueError(f"bounds_check must be one of {', '.join(BOUNDS_CHECKS)}, but is {mode!r}")
    previous, _bounds_check = _bounds_check, mode
    native.select_bounds_check(mode)
    try:
        yield
    finally:
        _bounds_check = previous
        native.select_bounds_check(previous)


def check_bounds(device: torch.device | str | int | None = None) -> None:
    """Waits for a GPU and raises what the CUDA C++ operators found wrong there and no later call has raised yet.

    Args:
        device: a CUDA device; default: the current one. On the CPU, and without a GPU, nothing can be left over.

    Raises:
        IndexError: an index out of range; names its position, value and range. The class is a RuntimeError, too.
        RuntimeError: an offset that is negative, decreases or exceeds the number of indices.
    """
    if device is None and not torch.cuda.is_available():
        return
    chosen_device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    if chosen_device.type != "cuda":
        return
    index = torch.cuda.current_device() if chosen_device.index is None else chosen_device.index
    torch.cuda.synchronize(index)
    fault = native.take_fault(index)
    if fault is not None:
        assert _fault_error is not None
        raise _fault_error(fault)
