"""The outputs of a model and of the new one on the same inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .inspect.sample_run import call_model
from .plan import RewritePlan


def compare(plan: RewritePlan, new: torch.nn.Module, sample_inputs: Any, expected: Any) -> float:
    """The largest absolute difference between the outputs of the model and of the new one.

    Args:
        plan: what was done.
        new: the new model, which stays as it is.
        sample_inputs: see ``optimize``.
        expected: the outputs of the model.

    Raises:
        RuntimeError: the new model fails, or its outputs have other shapes.
    """
    return _output_error(expected, _try(plan, new, sample_inputs))


def _try(plan: RewritePlan, new: torch.nn.Module, sample_inputs: Any) -> Any:
    """Outputs of a new model, which stays as it is."""
    buffers = {id(tensor): tensor for layer in plan.replaced for tensor in layer.replacement.buffers()}
    twin = copy.deepcopy(new, dict(buffers))
    try:
        return call_model(twin, sample_inputs)
    except Exception as error:
        raise RuntimeError(
            "the optimized model fails on sample_inputs, the given one does not; name the layer that it cannot do "
            f"without in skip ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _output_error(expected: Any, outputs: Any) -> float:
    """The largest absolute difference between floating-point outputs; infinity where only one of them is finite."""
    pairs = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (expected, outputs)
    ]
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in pairs]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"outputs of the optimized model have the shapes {shapes[1]} instead of {shapes[0]}")
    worst = 0.0
    for one, other in zip(*pairs, strict=True):
        if one.is_floating_point() and one.numel():
            same = (one == other) | (one.isnan() & other.isnan())
            difference = (one.double() - other.double()).abs().masked_fill(same, 0.0)
            worst = max(worst, difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item())
    return worst
