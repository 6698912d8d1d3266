"""An MLP that trains the weights that int8 layers will have."""

from __future__ import annotations

import torch

from ..int8.mlp import Int8MLP
from .layer import QATLinear


class QATMLP(torch.nn.Sequential):
    """An MLP in training that computes what the :class:`Int8MLP` will compute that it is converted to.

    :class:`QATLinear` layers, and the Dropout between them. See :meth:`Int8MLP.qat`, which makes one.
    """

    def layers(self) -> list[QATLinear]:
        """The linear layers."""
        return [module for module in self if isinstance(module, QATLinear)]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features of the first layer] to [..., out_features of the last]; float32 between the layers."""
        last = self.layers()[-1]
        for module in self:
            if isinstance(module, QATLinear):
                input = module.run(input, module.dtype if module is last else torch.float32)
            else:
                input = module(input)
        return input

    def convert(self) -> Int8MLP:
        """The deployed :class:`Int8MLP`, whose output is that of this one in eval mode, bit for bit.

        Raises:
            RuntimeError: a static layer has seen no input yet.
            ValueError: weights have become NaN or infinite.
        """
        return Int8MLP(*[layer.convert() for layer in self.layers()]).train(self.training)
