"""Embedding tables with int8 or int4 rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from ...ops.embedding_bag import EmbeddingBag, EmbeddingBagCollection, QuantizedEmbedding, QuantizedEmbeddingBag
from ...ops.embedding_bag.autograd import quantized_embedding_bag
from ...ops.embedding_bag.dequantizing import DequantizingEmbedding, DequantizingEmbeddingBag
from ...ops.embedding_bag.spec import BagSpec
from ..sizes import stored_bytes
from .converter import Check, Converter, LayerDecision, ObservedCall, Options, RewriteState, register
from .measure import median_microseconds, times_text

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
    serves_weight_reads: ClassVar[bool] = True

    def __init__(self, batch_size: int | None = None, timed: bool = False) -> None:
        self._batch_size, self._timed = batch_size, timed

    @classmethod
    def from_options(cls, options: Options) -> Converter:
        return cls(options.batch_size, options.sampled or options.batch_size is not None)

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
        first, *others = layers
        new: Any = _new_class(first).from_float(first.module, _bits(first.choice))
        return [new, *(_with_table_of(new, layer) for layer in others)]

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

    # ---- speed ----

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> ObservedCall | None:
        """The indices, offsets and weights of a lookup."""
        names = ("input", "offsets", "per_sample_weights")
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        lookup = {name: given[name].detach().clone() for name in names if isinstance(given.get(name), torch.Tensor)}
        count = lookup["input"].numel() if "input" in lookup else 0
        return ObservedCall(lookup, count) if count else None

    def checks(self) -> Sequence[Check]:
        return (self._note_times,) if self._timed else ()

    def _note_times(self, state: RewriteState) -> None:
        """Times a lookup in each new table and in the float one. A slower table stays new, as bytes are its purpose."""
        for layer in state.replaced_by(self):
            lookup = self._timed_lookup(state, layer)
            if lookup is None:
                continue
            float_us, new_us = _microseconds(layer.module.forward, layer.replacement.forward, lookup)
            layer.float_us, layer.replacement_us = float_us, new_us
            count = lookup["input"].numel()
            layer.notes.append(f"{times_text(float_us, new_us)} for {count:,} {'index' if count == 1 else 'indices'}")

    def _timed_lookup(self, state: RewriteState, layer: LayerDecision) -> dict[str, torch.Tensor] | None:
        """The arguments of a lookup for the number of examples; None if the model ran without one."""
        if state.observed_calls is None:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(layer.module.num_embeddings, (self._batch_size or 1, 1), generator=generator)
            return {"input": ids.to(layer.module.weight.device)}
        call = state.observed_calls.get(id(layer.module))
        if call is None:
            return None
        examples, lookup = state.sample_batch_size, call.input
        if self._batch_size in (None, examples) or not examples:
            return lookup
        return _resized(lookup, self._batch_size / examples)


def _bits(choice: str) -> int:
    return int(choice.removeprefix("int"))


def _new_class(layer: LayerDecision) -> Any:
    """The class of the new form of a layer."""
    if isinstance(layer.module, torch.nn.EmbeddingBag):
        return DequantizingEmbeddingBag if layer.reads_weight else QuantizedEmbeddingBag
    return DequantizingEmbedding if layer.reads_weight else QuantizedEmbedding


def _with_table_of(other: Any, layer: LayerDecision) -> Any:
    """The quantized form of a layer whose weight is already quantized in another."""
    module, kind = layer.module, _new_class(layer)
    sizes = (module.num_embeddings, module.embedding_dim, other.bits)
    rest = {"padding_idx": module.padding_idx, "dtype": module.weight.dtype, "device": "meta"}
    new: Any
    if isinstance(module, torch.nn.EmbeddingBag):
        new = kind(*sizes, module.mode, module.include_last_offset, **rest)
    else:
        new = kind(*sizes, **rest)
    new.weight, new.scale_bias, new.exponent = other.stored_rows, other.scale_bias, other.exponent
    new.host_exponent()  # compiled code takes it from the last look
    return new.train(module.training)


def _resized(lookup: Mapping[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """A lookup for more or fewer examples: the same indices again, or the first ones."""
    ids = lookup["input"]
    if "offsets" not in lookup or ids.dim() > 1:
        count = max(1, round(len(ids) * factor)) if ids.dim() else 1
        ids = ids if ids.dim() else ids.reshape(1)
        order = torch.arange(count, device=ids.device) % len(ids)
        return {name: value.reshape(ids.shape)[order] for name, value in lookup.items() if name != "offsets"}
    # Bags of one length: the average one.
    length = max(1, round(len(ids) / max(1, len(lookup["offsets"]))))
    bags = max(1, round(len(lookup["offsets"]) * factor))
    order = torch.arange(bags * length, device=ids.device) % len(ids)
    return {name: value[order].reshape(bags, length) for name, value in lookup.items() if name != "offsets"}


def _microseconds(
    first: Callable[..., Any], second: Callable[..., Any], lookup: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    return median_microseconds(partial(first, **lookup), partial(second, **lookup), on_gpu=lookup["input"].is_cuda)
