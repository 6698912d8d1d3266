"""The benchmarks of every family: each package has cases, peers and perhaps a plot, and registers itself."""

from __future__ import annotations

import importlib
import pkgutil


def load_families() -> None:
    """Imports every package of this folder, so that each registers its family; nothing happens the second time."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg:
            importlib.import_module(module.name)
