"""Fused recommender kernels for PyTorch."""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _start  # isort: skip - before torch, whose import takes seconds
from . import _backends, functional
from ._backends import backend, bounds_check, check_bounds
from ._native import native as _native_library
from .memory import use_huge_pages
from .ops.embedding_bag import (
    EmbeddingBag,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
)
from .ops.int8_matmul import Int8Linear, Int8MLP

if TYPE_CHECKING:
    from ._doctor import doctor
    from .compress.calibrate import calibrate
    from .compress.equalize import equalize
    from .compress.neurons import prune_neurons
    from .compress.optimize import optimize
    from .compress.pruner import CubicSchedule, OneShot, Pruner
    from .compress.pruning import prune, remove_masks
    from .compress.sensitivity import sensitivity
    from .models import load_model
    from .ops.sparse_linear.linear import SparseLinear
    from .ops.sparse_linear.mlp import SparseMLP

__version__ = "0.1.0"

__all__ = [
    "CubicSchedule",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "Int8Linear",
    "Int8MLP",
    "OneShot",
    "Pruner",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "SparseLinear",
    "SparseMLP",
    "backend",
    "bounds_check",
    "calibrate",
    "check_bounds",
    "doctor",
    "equalize",
    "functional",
    "load_model",
    "optimize",
    "prune",
    "prune_neurons",
    "remove_masks",
    "sensitivity",
    "use_huge_pages",
]

# The operators are defined by now, so the library finds their schemas when its kernels register.
_native_library.load()
if _native_library.reason is not None:
    # pip hides what a build says, so that this is the first place where a person can see it.
    warnings.warn(
        f"recsys_kernels runs on its PyTorch references, which are slower; native kernels: {_native_library.reason}",
        RuntimeWarning,
        stacklevel=2,
    )
_backends.connect_gpu_kernels()
try:
    _backends.configure_from_environment()
except (ValueError, RuntimeError) as error:
    # The command line starts with this import, too, and has no use for a traceback.
    if not _start.IS_COMMAND_LINE:
        raise
    print(f"recsys-kernels: {error}", file=sys.stderr)
    sys.exit(2)

# Imported at first use: a program that only looks rows up pays nothing for them.
_LATER = {
    "CubicSchedule": ".compress.pruner",
    "OneShot": ".compress.pruner",
    "Pruner": ".compress.pruner",
    "SparseLinear": ".ops.sparse_linear.linear",
    "SparseMLP": ".ops.sparse_linear.mlp",
    "calibrate": ".compress.calibrate",
    "doctor": "._doctor",
    "equalize": ".compress.equalize",
    "load_model": ".models",
    "optimize": ".compress.optimize",
    "prune": ".compress.pruning",
    "prune_neurons": ".compress.neurons",
    "remove_masks": ".compress.pruning",
    "sensitivity": ".compress.sensitivity",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LATER[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
