"""Models with pruning masks, as ``optimize`` works on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.utils import parametrize

from .plan import Plan
from .pruning_layers import mask_of


def without_masks(model: torch.nn.Module) -> tuple[torch.nn.Module, dict[int, torch.nn.Module], list[str]]:
    """A model without masks on its linear layers that shares all tensors with the given one, but for those weights.

    Returns:
        The model (the given one if it has no mask), id of a layer in it that has none any more -> the masked one, and
        what else is different.
    """
    masked = [module for module in model.modules() if _is_only_masked(module)]
    if not masked:
        return model, {}, []
    plan = Plan(model, [])
    memo = plan.copy_memo()
    for module in model.modules():
        memo.update((id(t), t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    memo.update((id(value), value) for _, value in plan.held if isinstance(value, torch.Tensor))
    twins = [(_without_mask(module), module) for module in masked]
    memo.update((id(module), twin) for twin, module in twins)
    return copy.deepcopy(model, memo), {id(twin): module for twin, module in twins}, plan.notes


def _is_only_masked(module: torch.nn.Module) -> bool:
    if not isinstance(module, torch.nn.Linear) or mask_of(module) is None:
        return False
    steps: Any = module.parametrizations
    return list(steps) == ["weight"]


def _without_mask(module: Any) -> torch.nn.Module:
    """A layer of the class that it was before it got a mask; everything but the weight is the same object."""
    kind: Any = parametrize.type_before_parametrizations(module)
    twin = kind.__new__(kind)
    rest = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    with torch.no_grad():
        weight = torch.nn.Parameter(module.weight.detach(), module.parametrizations["weight"].original.requires_grad)
    parameters = {"weight": weight, **module._parameters}
    twin.__dict__.update({**vars(module), "_parameters": parameters, "_modules": rest})
    return twin
