"""Fused recommender kernels for PyTorch."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _importing

with _importing.explained():
    from . import functional
    from .backends import environment, selection
    from .backends.registry import native
    from .backends.selection import backend, bounds_check, check_bounds
    from .ops.embedding_bag import (
        EmbeddingBag,
        EmbeddingBagCollection,
        EmbeddingBagConfig,
        QuantizedEmbedding,
        QuantizedEmbeddingBag,
    )
    from .ops.embedding_bag.memory import use_huge_pages
    from .ops.linear.int8 import Int8Linear, Int8MLP

    # The operators are defined by now, so the library finds their schemas when its kernels register.
    native.load()

if TYPE_CHECKING:
    from .backends.diagnosis import doctor
    from .compress.prune.masks import prune, remove_masks
    from .compress.prune.neurons import prune_neurons
    from .compress.prune.pruner import CubicSchedule, OneShot, Pruner
    from .compress.prune.sensitivity import sensitivity
    from .compress.quantize.calibrate import calibrate
    from .compress.quantize.equalize import equalize
    from .compress.rewrite.optimize import optimize
    from .models import load_model
    from .ops.linear.sparse.layer import SparseLinear
    from .ops.linear.sparse.mlp import SparseMLP

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

if native.reason is not None:
    # pip hides what a build says, so that this is the first place where a person can see it.
    warnings.warn(
        f"recsys_kernels runs on its PyTorch references, which are slower; native kernels: {native.reason}",
        RuntimeWarning,
        stacklevel=2,
    )
selection.connect_gpu_kernels()
try:
    environment.configure()
except (ValueError, RuntimeError) as error:
    _importing.print_in_one_line(error, str(error), _importing.WRONG_ENVIRONMENT)
    raise

# Imported at first use: a program that only looks rows up pays nothing for them.
_LATER = {
    "CubicSchedule": ".compress.prune.pruner",
    "OneShot": ".compress.prune.pruner",
    "Pruner": ".compress.prune.pruner",
    "SparseLinear": ".ops.linear.sparse.layer",
    "SparseMLP": ".ops.linear.sparse.mlp",
    "calibrate": ".compress.quantize.calibrate",
    "doctor": ".backends.diagnosis",
    "equalize": ".compress.quantize.equalize",
    "load_model": ".models",
    "optimize": ".compress.rewrite.optimize",
    "prune": ".compress.prune.masks",
    "prune_neurons": ".compress.prune.neurons",
    "remove_masks": ".compress.prune.masks",
    "sensitivity": ".compress.prune.sensitivity",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LATER[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
