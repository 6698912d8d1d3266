"""Matrices, and the three tensors by which sparse layers store a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..activation import (
    MIN_SCALE,
)
from . import reference
from .patterns import Pattern, keep_mask
from .reference import CheckedLayer
from .spec import block_shape


class Stored(NamedTuple):
    """The kept weights of a matrix and their places; see ``spec.py``."""

    values: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor


def stored_pattern(pattern: Pattern) -> Pattern:
    """The pattern that a pruned layer is stored by: among n:m patterns only 2:4 has a format of its own."""
    if pattern.of and (pattern.kept, pattern.of) != (2, 4):
        return Pattern("unstructured", 1, 1, 0, 0)
    return pattern


def pattern_name(values: torch.Tensor) -> str:
    """The pattern that values are stored by."""
    rows, columns = block_shape(values)
    return {1: "unstructured", 2: "2:4"}.get(values.dim(), f"block{rows}x{columns}")


def store(weight: torch.Tensor, kept: torch.Tensor, pattern: Pattern) -> Stored:
    """Takes the kept weights out of a matrix.

    Args:
        weight: [N, K].
        kept: bool [N, K]: whole blocks; of 2:4 at most two of every four columns.
        pattern: one that :func:`stored_pattern` gives.
    """
    weight = torch.where(kept, weight, 0)
    if pattern.of:
        return _store_two_of_four(weight, kept)
    rows, columns = pattern.rows, pattern.columns
    n, k = weight.shape
    if rows == columns == 1:
        found, values = kept, weight[kept]
    else:
        padding = (0, -k % columns, 0, -n % rows)
        blocks, members = (
            F.pad(part, padding).unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
            for part in (weight, kept)
        )
        found = members.flatten(2).any(2)
        values = blocks[found]
    crow = torch.zeros(found.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow[1:] = found.sum(1).cumsum(0)
    return Stored(values.contiguous(), crow, found.nonzero()[:, 1].int())


def _store_two_of_four(weight: torch.Tensor, kept: torch.Tensor) -> Stored:
    k = weight.shape[1]
    groups, members = (F.pad(part, (0, -k % 4)).unflatten(1, (-1, 4)) for part in (weight, kept))
    # The kept ones first, else in order: a group that keeps fewer than two also has places with a zero.
    places = members.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[..., :2].sort(2).values
    codes = places[..., 0] + 4 * places[..., 1]
    pairs = F.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
    empty = torch.zeros(0, dtype=torch.int32, device=weight.device)
    return Stored(groups.gather(2, places).flatten(1), empty, (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8))


def empty(out_features: int, in_features: int, pattern: Pattern, dtype: torch.dtype) -> Stored:
    """A matrix of which nothing is kept; of 2:4, which always keeps two of four, zeros are."""
    if pattern.of:
        columns = -(-in_features // 8)
        codes = torch.full((out_features, columns), 0x44, dtype=torch.uint8)  # places 0 and 1 of both fours
        values = torch.zeros(out_features, -(-in_features // 4) * 2, dtype=dtype)
        return Stored(values, torch.zeros(0, dtype=torch.int32), codes)
    shape = (0,) if pattern.rows == pattern.columns == 1 else (0, pattern.rows, pattern.columns)
    crow = torch.zeros(-(-out_features // pattern.rows) + 1, dtype=torch.int32)
    return Stored(torch.zeros(shape, dtype=dtype), crow, torch.zeros(0, dtype=torch.int32))


def to_dense(stored: Stored, out_features: int, in_features: int) -> torch.Tensor:
    """The values as a matrix [N, K] of their type, with zeros for what is not kept."""
    return reference.to_dense(CheckedLayer(*stored, out_features, in_features, None, None, None, 0, 0))


def quantize(
    stored: Stored, out_features: int, in_features: int, granularity: str | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 values in [-127, 127] and their float32 scales: max|w| / 127.

    Args:
        granularity: ``"channel"``, ``"tensor"`` or how many columns share a scale.

    Returns:
        int8 like the values, and [N], or [N, groups] where a row has more than one group of columns.

    Raises:
        ValueError: a row holds NaN or infinity (named).
    """
    rows, columns = reference.places(*stored)
    # What a block holds past the end of the matrix is no weight, and may be anything.
    inside = (rows < out_features) & (columns < in_features)
    values = torch.where(inside, stored.values.detach().float(), 0.0)
    rows, columns = rows.clamp(0, out_features - 1), columns.clamp(0, in_features - 1)
    bad = ~torch.isfinite(values)
    if bad.any():
        row = int(rows.expand_as(values)[bad].min())
        raise ValueError(f"row {row} of values holds NaN or infinity and can't be quantized")
    groups, at = 1, rows
    if isinstance(granularity, int) and in_features > granularity:
        groups = -(-in_features // granularity)
        at = rows * groups + columns // granularity
    at = at.expand_as(values)
    largest = values.new_zeros(out_features * groups)
    largest.scatter_reduce_(0, at.reshape(-1), values.abs().reshape(-1), "amax")
    if granularity == "tensor":
        largest = largest.amax().expand(out_features)
    scale = (largest / 127.0).clamp(min=MIN_SCALE)
    q = torch.round(values / scale[at]).clamp(-127.0, 127.0).to(torch.int8)
    return q, scale.reshape(out_features, groups) if groups > 1 else scale


def kept_weights(weight: torch.Tensor, sparsity: float | str | None, pattern: Pattern) -> torch.Tensor:
    """Which weights a layer keeps, bool [N, K]; with None those that are not zero, with ``"default"`` a tenth, or as
    many as an n:m pattern keeps.

    Raises:
        ValueError: what :func:`~.patterns.keep_mask` refuses; None, and more weights than an n:m pattern keeps.
    """
    if sparsity == "default":
        sparsity = 0.9 if pattern.sparsity is None else pattern.sparsity
    if sparsity is not None:
        return keep_mask(weight.abs(), sparsity, pattern)  # type: ignore[arg-type]
    found = weight != 0
    if pattern.of:
        counts = (
            torch.nn.functional.pad(found, (0, -weight.shape[1] % pattern.of)).unflatten(1, (-1, pattern.of)).sum(2)
        )
        if (counts > pattern.kept).any():
            row, group = (counts > pattern.kept).nonzero()[0].tolist()
            first = group * pattern.of
            raise ValueError(
                f"row {row} of weight has {int(counts[row, group])} weights in the columns {first} to "
                f"{first + pattern.of - 1}, of which {pattern.name!r} keeps {pattern.kept}; give a sparsity to prune it"
            )
    return found
