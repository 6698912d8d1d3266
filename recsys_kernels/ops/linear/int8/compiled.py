"""Int8 layers of compiled code on the CPU: packed once, and again when one of their tensors was written to.

A module compares its tensors with those that it packed. Compiled code can't: what it reads of a tensor is fixed when it
is traced, but for the tensor's values. So the comparison is part of an operator, which gets the tensors at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ....backends import selection
from . import autograd as op
from . import reference
from .spec import FAMILY, LayerLists


class _Kept(NamedTuple):
    """Packed layers, and what they were packed from: tensors with their versions, and numbers."""

    tensors: tuple[TensorWeakRef | None, ...]
    versions: tuple[int, ...]
    values: tuple[torch.Tensor | None, ...]  # of those that are trained: fused optimizers write without counting it
    numbers: tuple[int, ...]
    packed: torch.Tensor


# By the first layer's weight, with which the packed layers go.
_kept = WeakTensorKeyDictionary()


def _is_current(kept: _Kept, tensors: Sequence[torch.Tensor | None], numbers: Sequence[int]) -> bool:
    if len(tensors) != len(kept.tensors) or tuple(numbers) != kept.numbers:
        return False
    for tensor, known, version, values in zip(tensors, kept.tensors, kept.versions, kept.values, strict=True):
        if tensor is None or known is None:
            if tensor is not known:
                return False
            continue
        if known() is not tensor or tensor._version != version:
            return False
        if tensor.requires_grad and (values is None or not torch.equal(tensor, values)):
            return False
    return True


def _packed(lists: LayerLists) -> torch.Tensor:
    weights, numbers = lists.weights, lists.numbers
    tensors = (*weights, *lists.weight_scales, *lists.biases, *lists.input_qparams)
    # An inference tensor does not count what is written to it.
    counts = not any(tensor is not None and tensor.is_inference() for tensor in tensors)
    kept = _kept.get(weights[0]) if counts and weights else None
    if kept is not None and _is_current(kept, tensors, numbers):
        return kept.packed
    layers = reference.split_layers(lists)
    with torch.inference_mode(False), torch.no_grad():
        run = selection.implementation("int8_pack", weights[0])
        packed = torch.cat([run(*layer) for layer in layers])
    if counts:
        known = tuple(None if tensor is None else TensorWeakRef(tensor) for tensor in tensors)
        versions = tuple(0 if tensor is None else tensor._version for tensor in tensors)
        values = tuple(t.detach().clone() if t is not None and t.requires_grad else None for t in tensors)
        _kept[weights[0]] = _Kept(known, versions, values, tuple(numbers), packed)
    return packed


def int8_layers(input: torch.Tensor, layers: LayerLists, dtype: torch.dtype) -> torch.Tensor:
    """The operator ``int8_layers`` for CPU tensors."""
    if selection.chosen("int8_chain", "cpu") != "cpu":
        return reference.int8_layers(input, layers, dtype)
    return op.chain(input, _packed(layers), layers.weights[-1].shape[0], dtype)


FAMILY.operators["int8_layers"].implement("CPU", int8_layers)
