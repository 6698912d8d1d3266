"""The one place that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Callable

from . import selection
from .registry import native


def _apply(variable: str, setting: Callable[[str], None]) -> None:
    value = os.environ.get(variable)
    if value:
        try:
            setting(value)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{variable}: {error}") from None


def configure() -> None:
    """Applies RECSYS_KERNELS_ISA and RECSYS_KERNELS_BACKEND; called once, after the native library has loaded.

    Raises:
        ValueError: a value that does not exist; names the variable.
        RuntimeError: a level or backend that cannot run on this machine; names the variable.
    """
    _apply("RECSYS_KERNELS_ISA", native.select_isa)
    _apply("RECSYS_KERNELS_BACKEND", selection.force)
