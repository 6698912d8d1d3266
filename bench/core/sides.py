"""The sides of a comparison: what a `Side` is, the variants of our own side, and why a side may be absent."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import recsys_kernels as rk

OURS = "recsys_kernels"
REFERENCE = f"{OURS}, reference"
ONE_THREAD = f"{OURS}, 1 thread"


class AbsentError(RuntimeError):
    """A side cannot run here; the message says why."""


def fresh(batch: Any) -> Any:
    """A batch as a request brings it: the first tensor (ids or activations) was just written."""
    return batch.clone() if isinstance(batch, Tensor) else (batch[0].clone(), *batch[1:])


@dataclass(frozen=True)
class Side:
    """One side of a comparison: `run(prepare(batch))` is a call, and only `run` is timed.

    prepare: makes fresh inputs; for a backward case `prepare` runs the forward.
    threads, context: under which the call runs.
    result: makes a tensor of what `run` returned; the default takes tensors and numpy arrays.
    check: judges the outputs instead of the workload, where the side has weights of its own.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = fresh
    threads: int = 1
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    result: Callable[[Any], Tensor] = torch.as_tensor
    check: Callable[[list[Tensor]], None] | None = None


def is_own(name: str) -> bool:
    """Whether a side is a variant of recsys_kernels and hence no peer."""
    return name.startswith(OURS)


@contextmanager
def _reference() -> Iterator[None]:
    with torch.inference_mode(), rk.backend("reference"):
        yield


def variant(name: str, own: Side) -> Side | None:
    """Our side on one thread or on the reference backend; None for any other name."""
    if name == ONE_THREAD:
        return replace(own, name=name, threads=1)
    if name == REFERENCE:
        return replace(own, name=name, context=_reference)
    return None


def import_peer(*names: str) -> list[ModuleType]:
    """The modules of a peer. Raises AbsentError where one of them cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(name) for name in names]
    except (ImportError, OSError) as error:  # OSError: the library was built for another torch
        raise AbsentError(f"{names[0].split('.')[0]}: {error}") from error
