"""The contract of the embedding-bag operators: schemas and shapes.

Offsets may be None in every single-table operator: ``indices`` is then a matrix and each of its rows is a bag.
``mode`` is 0 (sum), 1 (mean) or 2 (max); ``padding_idx`` is -1 for none. The backward operators (and embedding_bag_max
without ``zero_start``) take offsets that start anywhere: a collection hands them one feature's part of its offsets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...backends import selection as _backends
from . import reference

_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset"
)


def _num_bags(indices: torch.Tensor, offsets: torch.Tensor | None, include_last_offset: bool) -> int:
    if offsets is None:
        return indices.shape[0]
    return offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]


# Shape functions: they name only the arguments that decide the result. The schemas below name all of them.


def _fake_embedding_bag(
    weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    return weight.new_empty(_num_bags(indices, offsets, rest[-1]), weight.shape[1])


def _fake_embedding_bag_max(
    weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    _, include_last_offset, _ = rest
    shape = (_num_bags(indices, offsets, include_last_offset), weight.shape[1])
    return weight.new_empty(shape), weight.new_empty(shape, dtype=torch.int64)


def _fake_embedding_bag_backward(grad: torch.Tensor, *bags_and_rows: Any) -> torch.Tensor:
    return grad.new_empty(bags_and_rows[-1], grad.shape[1])


def _fake_weights_backward(grad: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty(indices.shape)


def _fake_quantized_embedding_bag(*args: Any) -> torch.Tensor:
    weight, _, _, embedding_dim, _, indices, offsets, *_, include_last_offset, dtype = args
    return weight.new_empty(_num_bags(indices, offsets, include_last_offset), embedding_dim, dtype=dtype)


def _fake_collection(*args: Any) -> torch.Tensor:
    _, _, plan, indices, offsets, _, total_dim, dtype = args
    return indices.new_empty((offsets.shape[0] - 1) // plan.shape[0], total_dim, dtype=dtype)


def _fake_quantize_rowwise(*args: Any) -> None:
    return None


def _check_devices(names: tuple[str, ...], args: tuple[Any, ...]) -> None:
    """Raises if tensors of a call are on several devices.

    torch lets the meta device decide such a call, and a shape function would then hand out memory that nobody filled.
    """
    first: tuple[str, torch.Tensor] | None = None
    for name, arg in zip(names, args, strict=True):
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if not isinstance(tensor, torch.Tensor):
                continue
            first = first or (name, tensor)
            if tensor.device == first[1].device:
                continue
            if tensor.is_meta or first[1].is_meta:
                meta, other = (name, first) if tensor.is_meta else (first[0], (name, tensor))
                raise RuntimeError(
                    f"{meta} is on the meta device, which holds no values, but {other[0]} is on {other[1].device}"
                )
            raise RuntimeError(
                f"{name} must be on {first[1].device} like the other arguments, but is on {tensor.device}"
            )


def _define(schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> None:
    names = tuple(part.split()[-1] for part in schema[schema.index("(") + 1 : schema.index(") ->")].split(","))

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            _check_devices(names, args)
            return function(*args)

        return call

    _backends.define(schema, checked(run), checked(shape))


_define(f"embedding_bag(Tensor weight, {_BAGS}) -> Tensor", reference.embedding_bag, _fake_embedding_bag)
_define(
    "embedding_bag_max(Tensor weight, Tensor indices, Tensor? offsets, int padding_idx, bool include_last_offset,"
    " bool zero_start) -> (Tensor, Tensor)",
    reference.embedding_bag_max,
    _fake_embedding_bag_max,
)
_define(
    f"embedding_bag_backward(Tensor grad, {_BAGS}, SymInt num_embeddings) -> Tensor",
    reference.embedding_bag_backward,
    _fake_embedding_bag_backward,
)
_define(
    "embedding_bag_weights_backward(Tensor grad, Tensor weight, Tensor indices, Tensor? offsets, int mode,"
    " int padding_idx, bool include_last_offset) -> Tensor",
    reference.embedding_bag_weights_backward,
    _fake_weights_backward,
)
_define(
    f"quantized_embedding_bag(Tensor weight, Tensor scale_bias, int exponent, int embedding_dim, int bits, {_BAGS},"
    " ScalarType dtype) -> Tensor",
    reference.quantized_embedding_bag,
    _fake_quantized_embedding_bag,
)
_define(
    "embedding_bag_collection(Tensor[] weights, Tensor[] scale_bias, Tensor plan, Tensor indices, Tensor offsets,"
    " Tensor? per_sample_weights, int total_dim, ScalarType dtype) -> Tensor",
    reference.embedding_bag_collection,
    _fake_collection,
)
_define(
    "quantize_rowwise(Tensor weight, int bits, int exponent, Tensor(a!) rows, Tensor(b!) scale_bias) -> ()",
    reference.quantize_rowwise,
    _fake_quantize_rowwise,
)
_backends.register_triton(
    f"{__package__}.triton",
    (
        "embedding_bag",
        "embedding_bag_max",
        "embedding_bag_backward",
        "embedding_bag_weights_backward",
        "quantized_embedding_bag",
        "embedding_bag_collection",
    ),
)


class BagSpec(NamedTuple):
    """The parts of a call that are not tensors."""

    mode: int
    padding_idx: int
    include_last_offset: bool


class QuantizedTable(NamedTuple):
    """A quantized table as the operators take it: rows, fp16 (scale, bias) a row, and the table's exponent."""

    weight: torch.Tensor
    scale_bias: torch.Tensor
    exponent: int
    embedding_dim: int
    bits: int


class FeaturePlan(NamedTuple):
    """One row of a collection's plan: which table a feature reads, and where its columns go."""

    table: int
    dim: int
    column: int
    mode: int
    bits: int
    exponent: int
