"""A model and the new one on the same calls: their outputs and their times."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..converters.measure import median_microseconds
from .inspect.model_calls import ModelCall
from .plan import RewritePlan
from .report import CallReport

# A call that takes longer is timed once.
_LONG_SECONDS = 0.5


def compare(
    plan: RewritePlan, new: torch.nn.Module, calls: Sequence[ModelCall], expected: Sequence[Any]
) -> tuple[CallReport, ...]:
    """The differences between a model and the new one, by call.

    Args:
        plan: the plan that was carried out.
        new: the new model, which stays as it is.
        calls: the calls.
        expected: the outputs of the model for each call.

    Raises:
        RuntimeError: the new model fails, or its outputs have other shapes.
    """
    buffers = {id(tensor): tensor for layer in plan.replaced for tensor in layer.replacement.buffers()}
    twin = copy.deepcopy(new, dict(buffers))
    outputs, seconds = [], []
    for call in calls:
        start = time.perf_counter()
        outputs.append(_try(twin, call))
        seconds.append(time.perf_counter() - start)
    errors = [_output_error(call.name, *pair) for call, *pair in zip(calls, expected, outputs, strict=True)]
    assert plan.sample_run is not None
    found = []
    for call, error, duration in zip(calls, errors, seconds, strict=True):
        times = _microseconds(call, plan.sample_run.twin, twin, duration) if plan.replaced else (None, None)
        found.append(CallReport(call.name, error, *times))
    return tuple(found)


def _try(twin: torch.nn.Module, call: ModelCall) -> Any:
    """The outputs of a new model."""
    try:
        return call.run(twin)
    except Exception as error:
        where = "sample_inputs" if call.name == "forward" else f"the call {call.name!r}"
        raise RuntimeError(
            f"the optimized model fails on {where}, the given one does not; name the layer that it cannot do "
            f"without in skip ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _output_error(name: str, expected: Any, outputs: Any) -> float:
    """The largest absolute difference between floating-point outputs; infinity where only one of them is finite."""
    pairs = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (expected, outputs)
    ]
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in pairs]
    if shapes[0] != shapes[1]:
        of = "" if name == "forward" else f" in the call {name!r}"
        raise RuntimeError(f"outputs of the optimized model{of} have the shapes {shapes[1]} instead of {shapes[0]}")
    worst = 0.0
    for one, other in zip(*pairs, strict=True):
        if one.is_floating_point() and one.numel():
            same = (one == other) | (one.isnan() & other.isnan())
            difference = (one.double() - other.double()).abs().masked_fill(same, 0.0)
            worst = max(worst, difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item())
    return worst


def _microseconds(call: ModelCall, model: torch.nn.Module, new: torch.nn.Module, seconds: float) -> tuple[float, float]:
    """The times of a call of both models, which took about so many seconds."""
    on_gpu = any(tensor.is_cuda for tensor in (*model.parameters(), *new.buffers()))
    runs = [partial(call.call, one.eval(), *call.fresh_arguments()) for one in (model, new)]
    warm_up, fewest = (0, 1) if seconds > _LONG_SECONDS else (2, 6)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return median_microseconds(*runs, on_gpu=on_gpu, warm_up=warm_up, fewest=fewest)
