"""Models with pruning masks: ``optimize`` works on a twin without the masks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch.nn.utils import parametrize

from ...ops.linear.sparse.torch_masks import as_called, masking_hooks
from ..pruning_mask import mask_of
from .inspect.contents import ModelContents


def without_masks(model: torch.nn.Module) -> tuple[torch.nn.Module, dict[int, torch.nn.Module], list[str]]:
    """A model without masks on its linear layers that shares all tensors with the given one, but for those weights.

    Masks are those of :func:`~recsys_kernels.prune` and those of :mod:`torch.nn.utils.prune`.

    Returns:
        The model (the given one if it has no mask), id of a layer in it that has none any more -> the masked one, and
        notes about the differences.
    """
    twins = [(twin, module) for module in model.modules() if (twin := _without_mask(module)) is not None]
    if not twins:
        return model, {}, []
    contents = ModelContents(model)
    memo, notes = contents.copy_memo()
    for module in model.modules():
        memo.update((id(t), t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    memo.update((id(value), value) for _, value in contents.held if isinstance(value, torch.Tensor))
    memo.update((id(module), twin) for twin, module in twins)
    return copy.deepcopy(model, memo), {id(twin): module for twin, module in twins}, [*contents.notes, *notes]


def _without_mask(module: Any) -> torch.nn.Module | None:
    """A layer as it was before it got a mask, if that is all it got; everything masked is new, the rest the same."""
    if not isinstance(module, torch.nn.Linear):
        return None
    if parametrize.is_parametrized(module):
        only_mask = mask_of(module) is not None and list(module.parametrizations) == ["weight"]  # type: ignore[arg-type]
        return _without_parametrization(module) if only_mask else None
    return _without_hooks(module) if {"weight"} <= masking_hooks(module).keys() <= {"weight", "bias"} else None


def _without_parametrization(module: Any) -> torch.nn.Module:
    rest = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    with torch.no_grad():
        weight = torch.nn.Parameter(module.weight.detach(), module.parametrizations["weight"].original.requires_grad)
    parameters = {"weight": weight, **module._parameters}
    kind: Any = parametrize.type_before_parametrizations(module)
    return _twin(module, kind, {**vars(module), "_parameters": parameters, "_modules": rest})


def _without_hooks(module: Any) -> torch.nn.Module:
    hooks = masking_hooks(module)
    values = {name: as_called(module, name) for name in hooks}
    new = {name: torch.nn.Parameter(value, value.requires_grad) for name, value in values.items() if value is not None}
    gone = {*hooks, *(f"{name}_orig" for name in hooks), *(f"{name}_mask" for name in hooks)}
    state = {name: value for name, value in vars(module).items() if name not in hooks}
    rest = {name: parameter for name, parameter in module._parameters.items() if name not in gone}
    pre_hooks = ((key, hook) for key, hook in module._forward_pre_hooks.items() if hook not in hooks.values())
    state["_parameters"] = {**new, **rest}
    state["_buffers"] = {name: buffer for name, buffer in module._buffers.items() if name not in gone}
    state["_forward_pre_hooks"] = OrderedDict(pre_hooks)
    return _twin(module, type(module), state)


def _twin(module: torch.nn.Module, kind: Any, state: dict[str, Any]) -> torch.nn.Module:
    twin: torch.nn.Module = kind.__new__(kind)
    twin.__dict__.update(state)
    return twin
