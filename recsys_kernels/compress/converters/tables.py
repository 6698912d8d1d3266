"""How a kind of layer gets smaller: what a converter is, and the one of embedding tables (linear layers: linear.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy

from ...ops.embedding_bag import EmbeddingBag, QuantizedEmbedding, QuantizedEmbeddingBag
from ...ops.embedding_bag.op import BagSpec, quantized_embedding_bag

# Values compared at a time: blocks stay in the cache, and no second float table is made.
_BLOCK_VALUES = 1 << 20


class Converter(Protocol):
    """One kind of layer, whose values are in a parameter ``weight``.

    Attributes:
        option: the argument of ``optimize`` that chooses the new form.
        choices: values of that argument, beside None.
        swaps: the classes that can be swapped.
        handles: classes that are of this kind, swapped or not: the report has a line for each.
        parameters: names of the parameters of a layer that can be swapped.
    """

    option: str
    choices: tuple[str, ...]
    swaps: tuple[type[torch.nn.Module], ...]
    handles: tuple[type[torch.nn.Module], ...]
    parameters: frozenset[str]

    def shape(self, module: Any) -> tuple[int, int]:
        """Rows and columns."""

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        """Why a layer of a class in ``swaps`` cannot be swapped or would gain nothing; None if it can.

        ``parents`` are the modules that it is in.
        """

    def convert(self, modules: Sequence[Any], choice: str) -> list[Any]:
        """The new forms of layers that share one weight; they share the new one. ValueError: its values forbid it."""

    def max_error(self, module: Any, new: Any) -> float:
        """The largest absolute error of a value of the weight."""


class TableConverter:
    """Embedding tables with int8 or int4 rows."""

    option = "embedding"
    choices: tuple[str, ...] = ("int8", "int4")
    swaps: tuple[type[torch.nn.Module], ...] = (torch.nn.Embedding, torch.nn.EmbeddingBag, EmbeddingBag)
    handles: tuple[type[torch.nn.Module], ...] = (*swaps, QuantizedEmbedding, QuantizedEmbeddingBag)
    parameters = frozenset({"weight"})

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

    def convert(self, modules: Sequence[Any], choice: str) -> list[Any]:
        first, *others = modules
        bits = _bits(choice)
        kind = QuantizedEmbeddingBag if isinstance(first, torch.nn.EmbeddingBag) else QuantizedEmbedding
        new: Any = kind.from_float(first, bits)
        return [new, *(_with_table_of(new, module) for module in others)]

    def max_error(self, module: Any, new: Any) -> float:
        weight = module.weight.detach()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        block = max(1, _BLOCK_VALUES // weight.shape[1])
        worst = torch.zeros((), dtype=dtype, device=weight.device)
        for start in range(0, weight.shape[0], block):
            rows = weight[start : start + block]
            ids = torch.arange(start, start + len(rows), device=weight.device).unsqueeze(1)
            back = quantized_embedding_bag(new.table, ids, None, None, BagSpec(0, -1, False), dtype)
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


def stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of the memory of all parameters and buffers; what is shared counts once."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t) and t.layout == torch.strided]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())
