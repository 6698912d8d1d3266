"""Int8 layers of compiled code on the CPU: packed once, and again when one of their tensors was written to."""

from __future__ import annotations

import torch

from ....backends import selection
from ..prepared import PreparedByTensor
from . import reference
from .autograd import chain
from .spec import FAMILY, LayerLists

PACKS: PreparedByTensor[torch.Tensor] = PreparedByTensor()


def _pack(lists: LayerLists) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        layers = reference.split_layers(lists)
        run = selection.implementation("int8_pack", lists.weights[0])
        return torch.cat([run(*layer) for layer in layers])


def int8_layers(input: torch.Tensor, layers: LayerLists, dtype: torch.dtype) -> torch.Tensor:
    """The operator ``int8_layers`` for CPU tensors."""
    if selection.chosen("int8_chain", "cpu") != "cpu" or not layers.weights:
        return reference.int8_layers(input, layers, dtype)
    tensors = (*layers.weights, *layers.weight_scales, *layers.biases, *layers.input_qparams)
    packed = PACKS.get(tensors, tuple(layers.numbers), lambda: _pack(layers))
    return chain(input, packed, layers.weights[-1].shape[0], dtype)


FAMILY.operators["int8_layers"].implement("CPU", int8_layers)
