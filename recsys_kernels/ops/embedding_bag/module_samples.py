"""Modules of embedding bags, each in all its kinds, for the conformance tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...backends.registry import ModuleSample
from .bag import EmbeddingBag
from .collection import EmbeddingBagCollection, EmbeddingBagConfig
from .quantized import QuantizedEmbedding, QuantizedEmbeddingBag


def _bags(count: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(count) % 20, torch.tensor([0, 3, 3, 7])


def _features(count: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(count) % 20, torch.tensor([0, 2, 4, 4, 6, 7, count])


def _ids(count: int) -> tuple[torch.Tensor, ...]:
    return (torch.arange(count * 2).reshape(count, 2) % 20,)


def _collection() -> EmbeddingBagCollection:
    first = EmbeddingBagConfig("a", 20, 8, ["x", "y"])
    return EmbeddingBagCollection([first, EmbeddingBagConfig("b", 30, 5, pooling="max")])


def module_samples() -> Iterator[ModuleSample]:
    """Every module of the family, in each of its kinds."""
    yield ModuleSample("EmbeddingBag", lambda: EmbeddingBag(20, 8, mode="sum"), _bags)
    yield ModuleSample("EmbeddingBag max", lambda: EmbeddingBag(20, 8, mode="max", padding_idx=1), _bags)
    yield ModuleSample("EmbeddingBag of torch", lambda: EmbeddingBag(20, 8, scale_grad_by_freq=True), _bags)
    for bits in (8, 4):
        name = f"QuantizedEmbeddingBag {bits}"
        yield ModuleSample(name, partial(_quantized_bag, bits), _bags)
    yield ModuleSample("QuantizedEmbedding", lambda: QuantizedEmbedding.from_float(torch.nn.Embedding(20, 9)), _ids)
    yield ModuleSample("EmbeddingBagCollection", _collection, _features)
    yield ModuleSample("EmbeddingBagCollection int8", lambda: _collection().quantize(), _features)
    yield ModuleSample("EmbeddingBagCollection mixed", lambda: _collection().quantize({"a": 4}), _features)


def _quantized_bag(bits: int) -> QuantizedEmbeddingBag:
    return QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag(20, 9), bits)
