"""The mask on the weight of a pruned layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import parametrize


class PruningMask(torch.nn.Module):
    """A parametrization that holds dropped weights at zero, see :mod:`torch.nn.utils.parametrize`.

    Dropped weights get no gradient. Changes that the optimizer makes to the values behind them (momentum, weight decay)
    have no effect: the weight that the layer uses is exactly 0.0 there.

    A :class:`torch.optim.swa_utils.AveragedModel` has the masks of the model that it was last updated with. With
    ``use_buffers=True`` it would average them as well, which makes no sense of bool buffers (its mean fails, its moving
    average keeps every weight that was ever kept): leave that out, and give layers such as BatchNorm their statistics
    with :func:`torch.optim.swa_utils.update_bn`.

    Args:
        mask: bool, of the shape of the weight, True where it is kept. A buffer: part of the ``state_dict``.
    """

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # A product would give -0.0, and NaN where a dropped value is not finite.
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The values behind the mask when a weight is assigned: the whole weight."""
        return weight

    def extra_repr(self) -> str:
        share = "" if self.mask.is_meta else f", sparsity={1.0 - self.mask.float().mean().item():.4f}"
        return f"shape={tuple(self.mask.shape)}{share}"


def mask_of(module: Any) -> PruningMask | None:
    """The mask on a layer's weight, if that is all there is on it."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    steps = list(module.parametrizations["weight"])
    return steps[0] if len(steps) == 1 and isinstance(steps[0], PruningMask) else None
