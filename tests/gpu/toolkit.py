"""Where the programs of a CUDA toolkit are: on the PATH, or in the folder of the toolkit that the build takes.

Uses the standard library only, and of this package setup.py where setuptools is there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def roots() -> Iterator[Path]:
    """Folders of toolkits."""
    if os.environ.get("CUDA_HOME", "").strip():
        yield Path(os.environ["CUDA_HOME"].strip())
    spec = importlib.util.spec_from_file_location("setup_of_recsys_kernels", ROOT / "setup.py")
    if spec is not None and spec.loader is not None:
        script = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(script)
            found = script.cuda_toolkit()
        except (ImportError, SystemExit):  # no setuptools, or CUDA_HOME names no toolkit
            return
        if found is not None:
            yield found.nvcc.parent.parent


def program(name: str) -> str | None:
    """The path of a program, or None."""
    found = shutil.which(name)
    if found is None:
        folders = [str(root / folder) for root in roots() for folder in ("bin", "compute-sanitizer")]
        found = shutil.which(name, path=os.pathsep.join(folders)) if folders else None
    return found
