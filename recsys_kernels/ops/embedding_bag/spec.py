"""The contract of the embedding-bag operators: schemas and shapes.

Offsets may be None in every single-table operator: ``indices`` is then a matrix and each of its rows is a bag.
``mode`` is 0 (sum), 1 (mean) or 2 (max); ``padding_idx`` is -1 for none. The backward operators (and embedding_bag_max
without ``zero_start``) take offsets that start anywhere: a collection hands them one feature's part of its offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...backends import registry
from ...backends.registry import SymInt, Written

FAMILY = registry.register(
    registry.Family(
        "embedding_bag",
        __package__,
        shown={
            "embedding_bag": ("embedding_bag", "embedding_bag_backward"),
            "quantized_embedding_bag": ("quantized_embedding_bag",),
            "embedding_bag_collection": ("embedding_bag_collection",),
            "quantize_rowwise": ("quantize_rowwise",),
        },
        modules=(
            ".bag:EmbeddingBag",
            ".quantized:QuantizedEmbeddingBag",
            ".quantized:QuantizedEmbedding",
            ".collection:EmbeddingBagCollection",
        ),
        samples=".samples:operator_samples",
        module_samples=".module_samples:module_samples",
        facts=".facts:facts",
        converters=("recsys_kernels.compress.converters.embedding_tables",),
    )
)


# ---- operand tables -------------------------------------------------------------------------------------------------


class BagSpec(NamedTuple):
    """The parts of a call that are not tensors."""

    mode: int
    padding_idx: int
    include_last_offset: bool


class BagOperands(NamedTuple):
    """What a call looks up. ``offsets``: where bags begin in ``indices``, or None: each row of a matrix is a bag."""

    indices: torch.Tensor
    offsets: torch.Tensor | None
    per_sample_weights: torch.Tensor | None
    spec: BagSpec


class UnweightedBags(NamedTuple):
    """What a call without ``per_sample_weights`` looks up."""

    indices: torch.Tensor
    offsets: torch.Tensor | None
    spec: BagSpec


class MaxBags(NamedTuple):
    """What a call of max pooling looks up."""

    indices: torch.Tensor
    offsets: torch.Tensor | None
    padding_idx: int
    include_last_offset: bool


class CollectionBags(NamedTuple):
    """What a call over many tables looks up. ``offsets``: [F * B + 1], feature-major as ``indices`` are."""

    indices: torch.Tensor
    offsets: torch.Tensor
    per_sample_weights: torch.Tensor | None


class QuantizedTable(NamedTuple):
    """A quantized table as the operators take it: rows, fp16 (scale, bias) a row, and the table's exponent."""

    weight: torch.Tensor
    scale_bias: torch.Tensor
    exponent: int
    embedding_dim: int
    bits: int


class TableLists(NamedTuple):
    """The tables of a collection. ``plan``: int64 [F, 6], a :class:`FeaturePlan` a row."""

    weights: list[torch.Tensor]
    scale_bias: list[torch.Tensor]
    plan: torch.Tensor


class EmbeddingBagOperands(NamedTuple):
    """Operands of ``embedding_bag``: ``weight`` [num_embeddings, D]. The operator gives [B, D]."""

    weight: torch.Tensor
    bags: BagOperands


class MaxOperands(NamedTuple):
    """Operands of ``embedding_bag_max``. It gives [B, D] and int64 [B, D], the row that each column came from."""

    weight: torch.Tensor
    bags: MaxBags
    zero_start: bool


class BackwardOperands(NamedTuple):
    """Operands of ``embedding_bag_backward``: ``grad`` [B, D]. The operator gives [num_embeddings, D]."""

    grad: torch.Tensor
    bags: BagOperands
    num_embeddings: SymInt


class WeightsBackwardOperands(NamedTuple):
    """Operands of ``embedding_bag_weights_backward``: ``grad`` [B, D]. It gives the shape of ``indices``."""

    grad: torch.Tensor
    weight: torch.Tensor
    bags: UnweightedBags


class QuantizedOperands(NamedTuple):
    """Operands of ``quantized_embedding_bag``. The operator gives [B, embedding_dim] of type ``dtype``."""

    table: QuantizedTable
    bags: BagOperands
    dtype: torch.dtype


class CollectionOperands(NamedTuple):
    """Operands of ``embedding_bag_collection``. The operator gives [B, total_dim]."""

    tables: TableLists
    bags: CollectionBags
    total_dim: int
    dtype: torch.dtype


class QuantizeOperands(NamedTuple):
    """Operands of ``quantize_rowwise``, which writes to ``rows`` and ``scale_bias``."""

    weight: torch.Tensor
    bits: int
    exponent: int
    rows: Written
    scale_bias: Written


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _num_bags(bags: BagOperands) -> int:
    return _count(bags.indices, bags.offsets, bags.spec.include_last_offset)


def _count(indices: torch.Tensor, offsets: torch.Tensor | None, include_last_offset: bool) -> int:
    if offsets is None:
        return indices.shape[0]
    return offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]


def _pooled(call: EmbeddingBagOperands) -> torch.Tensor:
    return call.weight.new_empty(_num_bags(call.bags), call.weight.shape[1])


def _largest(call: MaxOperands) -> tuple[torch.Tensor, torch.Tensor]:
    bags = call.bags
    shape = (_count(bags.indices, bags.offsets, bags.include_last_offset), call.weight.shape[1])
    return call.weight.new_empty(shape), call.weight.new_empty(shape, dtype=torch.int64)


def _table_gradient(call: BackwardOperands) -> torch.Tensor:
    return call.grad.new_empty(call.num_embeddings, call.grad.shape[1])


def _weights_gradient(call: WeightsBackwardOperands) -> torch.Tensor:
    return call.grad.new_empty(call.bags.indices.shape)


def _quantized(call: QuantizedOperands) -> torch.Tensor:
    return call.table.weight.new_empty(_num_bags(call.bags), call.table.embedding_dim, dtype=call.dtype)


def _collection(call: CollectionOperands) -> torch.Tensor:
    indices, offsets, _ = call.bags
    batch = (offsets.shape[0] - 1) // call.tables.plan.shape[0]
    return indices.new_empty(batch, call.total_dim, dtype=call.dtype)


def _nothing(call: QuantizeOperands) -> None:
    return None


# ---- operators ------------------------------------------------------------------------------------------------------

FAMILY.define("embedding_bag", EmbeddingBagOperands, _pooled, triton=True)
FAMILY.define("embedding_bag_max", MaxOperands, _largest, returns="(Tensor, Tensor)", triton=True)
FAMILY.define("embedding_bag_backward", BackwardOperands, _table_gradient, triton=True)
FAMILY.define("embedding_bag_weights_backward", WeightsBackwardOperands, _weights_gradient, triton=True)
FAMILY.define("quantized_embedding_bag", QuantizedOperands, _quantized, triton=True)
FAMILY.define("embedding_bag_collection", CollectionOperands, _collection, triton=True)
FAMILY.define("quantize_rowwise", QuantizeOperands, _nothing, returns="()")


class FeaturePlan(NamedTuple):
    """One row of a collection's plan: which table a feature reads, and where its columns go."""

    table: int
    dim: int
    column: int
    mode: int
    bits: int
    exponent: int
