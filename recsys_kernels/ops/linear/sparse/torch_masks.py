"""Masks of :mod:`torch.nn.utils.prune`: a hook writes the product of ``weight_orig`` and mask at every call."""

from __future__ import annotations

import torch
from torch.nn.utils.prune import BasePruningMethod


def masking_hooks(module: torch.nn.Module) -> dict[str, BasePruningMethod]:
    """Names of a module's masked tensors, and the hook of each."""
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod))
    return {hook._tensor_name: hook for hook in hooks}


def as_called(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A tensor as the next call of a module will take it: what the attribute holds is as old as the last call."""
    hook = masking_hooks(module).get(name)
    if hook is None:
        return getattr(module, name)
    with torch.inference_mode(False), torch.no_grad():
        masked: torch.Tensor = hook.apply_mask(module)
    return masked.requires_grad_(getattr(module, f"{name}_orig").requires_grad)
