"""What the tests of the CUDA build share: setup.py as a module, and the toolkit that it finds."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@functools.cache
def build_script() -> ModuleType:
    """setup.py, imported for its parts: nothing is built."""
    spec = importlib.util.spec_from_file_location("setup_of_recsys_kernels", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_toolkit() -> Any:
    """The CUDA toolkit that the build would take. Without one the test is skipped, but fails in CI."""
    found = build_script().cuda_toolkit()
    if found is None:
        complaint = 'no CUDA toolkit with nvcc was found; pip install "recsys_kernels[cuda-build]" brings one'
        if os.environ.get("CI"):
            pytest.fail(complaint)
        pytest.skip(complaint)
    return found
