"""What a comparison is made of, whatever the operator: the names of sides, a `Side`, and why one may be absent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BEST = "the best peer"
BEST_OTHER = "the best sparse peer"  # without the operator's baseline, which is dense
OURS = "recsys_kernels"
REFERENCE = "recsys_kernels, reference"
ONE_THREAD = "recsys_kernels, 1 thread"
OWN_INT8_DENSE = "recsys_kernels, int8 dense"
OWN_FP32_SPARSE = "recsys_kernels, fp32 sparse"
OWN = (ONE_THREAD, REFERENCE, OWN_INT8_DENSE, OWN_FP32_SPARSE)  # sides that are no peers


class AbsentError(RuntimeError):
    """This side cannot run here; the message says why."""


class Target(NamedTuple):
    """The ratio to reach against side `against`."""

    ratio: float
    against: str = BEST


def fresh(batch: Any) -> Any:
    """A batch as a request brings it: its first tensor (ids or activations) was just written."""
    return batch.clone() if isinstance(batch, Tensor) else (batch[0].clone(), *batch[1:])


@dataclass(frozen=True)
class Side:
    """One side: `run(prepare(batch))` is a call of which only `run` is timed, under `context()` and `threads` threads.

    `prepare` gives fresh inputs; for a backward case it runs the forward. `run` gives a tensor or a numpy array, or
    what `result` makes a tensor of. `check`: judges that instead of the workload, where the side's weights are its own.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = fresh
    threads: int = 1
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    result: Callable[[Any], Tensor] = torch.as_tensor
    check: Callable[[list[Tensor]], None] | None = None
