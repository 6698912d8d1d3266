"""Embedding tables with int8 or int4 rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ...ops.embedding_bag import EmbeddingBag, EmbeddingBagCollection, QuantizedEmbedding, QuantizedEmbeddingBag
from ...ops.embedding_bag.op import BagSpec, quantized_embedding_bag
from ..sizes import stored_bytes
from .converter import Converter, LayerDecision, Options, register

# Values compared at a time: blocks stay in the cache, and no second float table is made.
_BLOCK_VALUES = 1 << 20


@register
class EmbeddingTableConverter(Converter):
    """Embedding tables with int8 or int4 rows."""

    option: ClassVar[str] = "embedding"
    choices: ClassVar[tuple[str, ...]] = ("int8", "int4")
    replaceable: ClassVar[tuple[type[torch.nn.Module], ...]] = (
        torch.nn.Embedding,
        torch.nn.EmbeddingBag,
        EmbeddingBag,
    )
    covered: ClassVar[tuple[type[torch.nn.Module], ...]] = (*replaceable, QuantizedEmbedding, QuantizedEmbeddingBag)
    parameters: ClassVar[frozenset[str]] = frozenset({"weight"})
    informed_readers: ClassVar[tuple[type[torch.nn.Module], ...]] = (EmbeddingBagCollection,)

    @classmethod
    def from_options(cls, options: Options) -> Converter:
        return cls()

    def shape(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        if module.max_norm is not None:
            return "max_norm changes its rows at every lookup"
        weight = module.weight
        if tuple(weight.shape) != self.shape(module):
            return f"its weight is {tuple(weight.shape)}, not num_embeddings x embedding_dim"
        sized = QuantizedEmbedding(*self.shape(module), bits=_bits(choice), device="meta")
        if (nbytes := stored_bytes(sized)) >= weight.nbytes:
            return f"too narrow: {choice} would take {nbytes:,} bytes, scales and biases included"
        return None

    def convert(self, layers: Sequence[LayerDecision]) -> list[Any]:
        first, *others = (layer.module for layer in layers)
        bits = _bits(layers[0].choice)
        kind = QuantizedEmbeddingBag if isinstance(first, torch.nn.EmbeddingBag) else QuantizedEmbedding
        new: Any = kind.from_float(first, bits)
        return [new, *(_with_table_of(new, module) for module in others)]

    def refresh_reader(self, reader: torch.nn.Module) -> None:
        assert isinstance(reader, EmbeddingBagCollection)
        reader._refresh_plan()

    def max_error(self, module: Any, replacement: Any) -> float:
        weight = module.weight.detach()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        block = max(1, _BLOCK_VALUES // weight.shape[1])
        worst = torch.zeros((), dtype=dtype, device=weight.device)
        for start in range(0, weight.shape[0], block):
            rows = weight[start : start + block]
            ids = torch.arange(start, start + len(rows), device=weight.device).unsqueeze(1)
            back = quantized_embedding_bag(replacement.table, ids, None, None, BagSpec(0, -1, False), dtype)
            worst = torch.maximum(worst, (back - rows).abs().max())
        return worst.item()


def _bits(choice: str) -> int:
    return int(choice.removeprefix("int"))


def _with_table_of(other: Any, module: Any) -> Any:
    """The quantized form of a layer whose weight is already quantized in another."""
    sizes = (module.num_embeddings, module.embedding_dim, other.bits)
    rest = {"padding_idx": module.padding_idx, "dtype": module.weight.dtype, "device": "meta"}
    new: Any
    if isinstance(module, torch.nn.EmbeddingBag):
        new = QuantizedEmbeddingBag(*sizes, module.mode, module.include_last_offset, **rest)
    else:
        new = QuantizedEmbedding(*sizes, **rest)
    new.weight, new.scale_bias, new.exponent = other.weight, other.scale_bias, other.exponent
    new.host_exponent()  # compiled code takes it from the last look
    return new.train(module.training)
