"""Which implementation of an operator runs, and the one place that reads environment variables.

Every operator is a torch operator (``torch.ops.recsys_kernels.*``). Its schema and reference are defined here, so that
it exists with the right answer on any machine; torch's dispatcher then picks the native CPU kernel or the CUDA one by
the device of the tensors. A backend that was asked for by name bypasses the dispatcher.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ._native import native

BACKENDS = ("reference", "cpu", "triton", "cuda")
_DEVICES = {"reference": None, "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

# Must live as long as the process: torch drops the operators when the object dies.
library = torch.library.Library("recsys_kernels", "DEF")

_forced: str | None = None
_references: dict[str, Callable[..., Any]] = {}
_dispatched: dict[str, Callable[..., Any]] = {}
_triton_modules: dict[str, str] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator with its reference (any device) and its shape function."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"recsys_kernels::{name}", fake, lib=library)
    _references[name] = reference
    _dispatched[name] = getattr(torch.ops.recsys_kernels, name).default


def register_triton(module: str, names: tuple[str, ...]) -> None:
    """Says that ``module`` holds a Triton implementation of the named operators, under the same names.

    The module is imported at the first call: importing Triton costs more than importing this package.
    """
    for name in names:
        _triton_modules[name] = module
        if _triton_reason() is None:
            library.impl(name, _lazy(module, name), "CUDA")


def _lazy(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return run


def _triton_reason() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def _triton_interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


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
    return "this build has no CUDA C++ kernels"


def implementation(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of an operator for tensors where ``tensor`` is: the dispatcher, or the backend asked for."""
    if _forced is None:
        return _dispatched[name]
    device = tensor.device
    if _forced == "reference":
        return _references[name]
    if _forced == "triton":
        if name not in _triton_modules:
            return _references[name]
        if device.type != "cuda" and not _triton_interprets():
            raise RuntimeError(f"backend 'triton' was asked for, but the tensors are on {device}")
        return getattr(importlib.import_module(_triton_modules[name]), name)
    if device.type != _DEVICES[_forced]:
        raise RuntimeError(f"backend {_forced!r} was asked for, but the tensors are on {device}")
    return _dispatched[name]


# torch's numbers of the types that operators return.
_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


def dtype_argument(dtype: torch.dtype) -> Any:
    """A type as an argument of an implementation: for the dispatcher its number, which it parses 0.9 us faster."""
    return dtype if _forced is not None or torch.compiler.is_compiling() else _SCALAR_TYPES.get(dtype, dtype)


def chosen(name: str, device_type: str) -> str:
    """The backend that will run an operator for tensors of a device type ("cpu", "cuda")."""
    if _forced is not None:
        return _forced if _forced != "triton" or name in _triton_modules else "reference"
    if device_type == "cpu":
        return "cpu" if native.reason is None else "reference"
    return "triton" if name in _triton_modules and _triton_reason() is None else "reference"


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}")
    reason = why_not(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every operator on one backend for the time of a ``with`` block.

    Holds for the whole process, like ``torch.set_num_threads``. The environment variable
    ``RECSYS_KERNELS_BACKEND`` does the same for the life of a process.

    Args:
        name: ``"reference"`` (pure PyTorch, any device), ``"cpu"`` (SIMD C++), ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run on this machine; the message says why.
    """
    global _forced
    _check(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def configure_from_environment() -> None:
    """Applies RECSYS_KERNELS_ISA and RECSYS_KERNELS_BACKEND; called once, after the library has loaded."""
    global _forced
    isa = os.environ.get("RECSYS_KERNELS_ISA")
    if isa:
        try:
            native.select_isa(isa)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"RECSYS_KERNELS_ISA: {error}") from None
    name = os.environ.get("RECSYS_KERNELS_BACKEND")
    if name:
        try:
            _check(name)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"RECSYS_KERNELS_BACKEND: {error}") from None
        _forced = name
