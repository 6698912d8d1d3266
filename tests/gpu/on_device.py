"""The operators on a GPU as functions of CPU tensors, so that tests written for the CPU run there."""

from __future__ import annotations

from typing import Any

import torch

import recsys_kernels as rk
from recsys_kernels.backends import selection


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on another device with the strides that it has here; the gaps between its elements go along."""
    if isinstance(value, list | tuple):
        return type(value)(moved(one, device) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


class OnDevice:
    """``OnDevice(device).embedding_bag(*args)`` runs there, on the backend in use; a wrong index raises at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        def run(*args: Any) -> Any:
            implementation = selection.implementation(name, torch.empty(0, device=self.device))
            out = implementation(*moved(args, self.device))
            rk.check_bounds(self.device)
            if isinstance(out, tuple):
                return tuple(one.cpu() for one in out)
            return out.cpu()

        return run
