"""What the tests of optimize(embedding=...) share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import recsys_kernels as rk


def dequantize(module: Any) -> torch.Tensor:
    """The table from the documented format, in float64."""
    q = module.state_dict()["weight"].long()
    if module.bits == 4:
        q = torch.stack((q & 15, q >> 4), dim=2).flatten(1)[:, : module.embedding_dim]
    scale, bias = module.scale_bias.double().unbind(1)
    return (q * scale[:, None] + bias[:, None]) * 2.0 ** int(module.exponent)


def with_dequantized_tables(model: nn.Module, new: nn.Module) -> nn.Module:
    """The float model whose tables hold what the new model's hold."""
    twin = copy.deepcopy(model)
    for name, module in new.named_modules():
        if isinstance(module, (rk.QuantizedEmbedding, rk.QuantizedEmbeddingBag)):
            weight = twin.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight.data = dequantize(module).to(weight.dtype)
    return twin
