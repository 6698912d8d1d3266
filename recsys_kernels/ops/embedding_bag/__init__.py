"""Fused embedding-bag lookup: float and quantized, one table and many."""

from .bag import EmbeddingBag
from .collection import EmbeddingBagCollection, EmbeddingBagConfig
from .quantized import QuantizedEmbedding, QuantizedEmbeddingBag

__all__ = [
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
]
