"""What runs of linear layers share: the check that they fit together, and what is never copied or saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .layer import FixedTypes


def check_widths(layers: Sequence[Any], kind: type[torch.nn.Module]) -> None:
    """ValueError where a layer takes another number of features than the layer before it gives.

    Args:
        layers: modules; those that are not of the kind give and take what they like.
        kind: a class with ``in_features`` and ``out_features``.
    """
    for number in range(1, len(layers)):
        first, second = layers[number - 1], layers[number]
        if isinstance(first, kind) and isinstance(second, kind):
            given, taken = first.out_features, second.in_features
            if given != taken:
                raise ValueError(f"layer {number} takes {taken} features, but the one before it gives {given}")


class LinearSequence(torch.nn.Sequential):
    """Layers that are checked together, and run from packed copies of their own or of the layers."""

    def _forget(self) -> None:
        """Forgets what was made of the layers."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Forgets the packed copies, here and in the layers, so that the next call makes new ones.

        Needed after writes to single weights through a tensor's ``data`` or through numpy; see ``Int8Linear.refresh``.
        """
        self._forget()
        for layer in self._modules.values():
            if isinstance(layer, FixedTypes):
                layer.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        # torch.jit.trace comes here. A packed copy would become a constant of the graph.
        self.refresh()
        return super()._slow_forward(*input, **kwargs)
