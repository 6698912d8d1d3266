"""The embedding-bag operators in plain PyTorch: the fallback on any machine, and the measure of every kernel.

Each operator is a function of the fields of its operand table (see ``spec.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .faults import index_error, offsets_error
from .spec import BagOperands, CollectionBags, MaxBags, QuantizedTable, TableLists, UnweightedBags

SUM, MEAN, MAX = 0, 1, 2
MODES = {"sum": SUM, "mean": MEAN, "max": MAX}

# Rows quantized at a time: enough to keep torch busy, far less than a second copy of the table.
_QUANTIZE_ROWS = 1 << 16


@dataclass(frozen=True)
class Bags:
    """Checked indices and, for each of them, the bag it belongs to.

    Attributes:
        rows: int64 [N'], the indices that belong to a bag and are not padding.
        bag: int64 [N'], the bag of each of them.
        position: int64 [N'], where each stands in the flat ``indices``.
        num_bags: number of bags.
    """

    rows: torch.Tensor
    bag: torch.Tensor
    position: torch.Tensor
    num_bags: int

    @property
    def counts(self) -> torch.Tensor:
        """int64 [num_bags], indices in each bag."""
        return torch.zeros(self.num_bags, dtype=torch.int64, device=self.bag.device).index_add_(
            0, self.bag, torch.ones_like(self.bag)
        )


def _check_offsets(offsets: torch.Tensor, num_indices: int, zero_start: bool) -> None:
    previous = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    bad = (offsets < previous) | (offsets > num_indices)
    if zero_start:
        bad[:1] |= offsets[:1] != 0
    if bad.any():
        at = int(bad.nonzero()[0])
        raise offsets_error(at, int(offsets[at]), num_indices)


def split_bags(
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    padding_idx: int,
    include_last_offset: bool,
    num_rows: int,
    table: str = "a table",
    zero_start: bool = False,
) -> Bags:
    """Checks indices and offsets and says which index belongs to which bag.

    Raises:
        IndexOutOfRangeError: an index is not in [0, num_rows).
        RuntimeError: a wrong type or number of dimensions, or offsets that decrease or point past the indices.
    """
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"{name} must be int32 or int64, but is {tensor.dtype}")
    expected = 2 if offsets is None else 1
    if indices.dim() != expected:
        raise RuntimeError(f"indices must have {expected} dimension(s), but has {indices.dim()}")
    flat = indices.reshape(-1).long()
    if offsets is None:
        num_bags, length = indices.shape
        bounds = torch.arange(num_bags + 1, device=indices.device) * length
    else:
        if offsets.dim() != 1:
            raise RuntimeError(f"offsets must have 1 dimension(s), but has {offsets.dim()}")
        if include_last_offset and offsets.numel() == 0:
            raise RuntimeError("include_last_offset needs at least one offset, but offsets is empty")
        bounds = offsets.long()
        if not include_last_offset:
            bounds = torch.cat([bounds, bounds.new_full((1,), flat.numel())])
        _check_offsets(bounds if bounds.numel() > 1 else bounds[:0], flat.numel(), zero_start)
    num_bags = bounds.numel() - 1
    bag = torch.repeat_interleave(torch.arange(num_bags, device=flat.device), bounds[1:] - bounds[:-1])
    start = bounds[0] if num_bags else 0
    position = torch.arange(bag.numel(), device=flat.device) + start
    rows = flat[position]
    bad = (rows < 0) | (rows >= num_rows)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise index_error(int(rows[at]), int(position[at]), table, num_rows)
    if padding_idx >= 0:
        keep = rows != padding_idx
        rows, bag, position = rows[keep], bag[keep], position[keep]
    return Bags(rows, bag, position, num_bags)


def _split(bags: BagOperands | UnweightedBags, num_rows: int, zero_start: bool = False) -> Bags:
    _, padding_idx, include_last_offset = bags.spec
    return split_bags(bags.indices, bags.offsets, padding_idx, include_last_offset, num_rows, zero_start=zero_start)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _first_is_nan(values: torch.Tensor, bags: Bags) -> torch.Tensor:
    """Where the first value of a bag's column is NaN, bool [num_bags, D].

    A maximum starts with the first value and takes later ones where they are greater, as in torch: a NaN stays when it
    is the first and is passed over when it is not.
    """
    first = torch.ones_like(bags.bag, dtype=torch.bool)
    first[1:] = bags.bag[1:] != bags.bag[:-1]
    out = torch.zeros(bags.num_bags, values.shape[1], dtype=torch.bool, device=values.device)
    out[bags.bag[first]] = values[first].isnan()
    return out


def _pool(values: torch.Tensor, bags: Bags, weights: torch.Tensor | None, mode: int) -> torch.Tensor:
    """Pools the looked-up rows, [N', D] of the accumulator type, to [num_bags, D]."""
    if weights is not None and mode != MAX:
        values = values * weights.reshape(-1)[bags.position].to(values.dtype).unsqueeze(1)
    out = values.new_zeros(bags.num_bags, values.shape[1])
    if mode == MAX:
        index = bags.bag.unsqueeze(1).expand_as(values)
        stays_nan = _first_is_nan(values, bags)
        out.scatter_reduce_(0, index, torch.where(values.isnan(), -torch.inf, values), "amax", include_self=False)
        return torch.where(stays_nan, torch.nan, out)
    out.index_add_(0, bags.bag, values)
    if mode == MEAN:
        out /= bags.counts.clamp(min=1).unsqueeze(1)
    return out


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_float(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None and tensor.dtype not in _FLOATS:
        raise RuntimeError(f"{name} must be a floating point tensor, but is {tensor.dtype}")


def _check_weights(bags: BagOperands | CollectionBags) -> None:
    indices, weights = bags.indices, bags.per_sample_weights
    _check_float("per_sample_weights", weights)
    if weights is not None and weights.numel() != indices.numel():
        raise RuntimeError(
            f"per_sample_weights must have one value for each of the {indices.numel()} indices, "
            f"but has {weights.numel()}"
        )


def embedding_bag(weight: torch.Tensor, bags: BagOperands) -> torch.Tensor:
    """Lookup and pooling over one float table; sums in float32 (float64 tables: float64)."""
    _check_float("weight", weight)
    _check_weights(bags)
    split = _split(bags, weight.shape[0], zero_start=True)
    values = weight[split.rows].to(_accumulator(weight.dtype))
    return _pool(values, split, bags.per_sample_weights, bags.spec.mode).to(weight.dtype)


def embedding_bag_max(weight: torch.Tensor, bags: MaxBags, zero_start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Max pooling and the row that each column came from (the first of equals; -1 for an empty bag)."""
    _check_float("weight", weight)
    split = split_bags(*bags, weight.shape[0], zero_start=zero_start)
    values = weight[split.rows]
    out = _pool(values.to(_accumulator(weight.dtype)), split, None, MAX).to(weight.dtype)
    last = split.rows.numel()
    order = torch.arange(last, device=weight.device).unsqueeze(1).expand_as(values)
    chosen = out[split.bag]
    order = torch.where((values == chosen) | (values.isnan() & chosen.isnan()), order, last)
    first = torch.full(out.shape, last, device=weight.device)
    first.scatter_reduce_(0, split.bag.unsqueeze(1).expand_as(values), order, "amin")
    rows = torch.cat([split.rows, split.rows.new_full((1,), -1)])
    return out, rows[first]


def _check_not_max(mode: int) -> None:
    if mode == MAX:
        raise RuntimeError("the gradient of max pooling is not a weighted sum: use embedding_bag_max")


def embedding_bag_backward(grad: torch.Tensor, bags: BagOperands, num_embeddings: int) -> torch.Tensor:
    """Dense gradient of the table, [num_embeddings, D], for sum and mean."""
    _check_float("grad", grad)
    _check_not_max(bags.spec.mode)
    _check_weights(bags)
    split = _split(bags, num_embeddings)
    rows, values = row_gradients(grad, split, bags.per_sample_weights, bags.spec.mode)
    out = values.new_zeros(num_embeddings, grad.shape[1])
    return out.index_add_(0, rows, values).to(grad.dtype)


def row_gradients(
    grad: torch.Tensor, bags: Bags, per_sample_weights: torch.Tensor | None, mode: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each index its row and what it adds to that row's gradient, [N', D] of the accumulator type."""
    factor = torch.ones_like(bags.bag, dtype=_accumulator(grad.dtype))
    if mode == MEAN:
        factor = factor / bags.counts.clamp(min=1)[bags.bag]
    if per_sample_weights is not None:
        factor = factor * per_sample_weights.reshape(-1)[bags.position]
    return bags.rows, grad[bags.bag].to(factor.dtype) * factor.unsqueeze(1)


def embedding_bag_weights_backward(grad: torch.Tensor, weight: torch.Tensor, bags: UnweightedBags) -> torch.Tensor:
    """Gradient of per_sample_weights, of the shape of ``indices``; zero for padding."""
    _check_not_max(bags.spec.mode)
    _check_float("weight", weight)
    split = _split(bags, weight.shape[0])
    dtype = _accumulator(weight.dtype)
    values = (weight[split.rows].to(dtype) * grad[split.bag].to(dtype)).sum(1)
    if bags.spec.mode == MEAN:
        values = values / split.counts.clamp(min=1)[split.bag]
    out = grad.new_zeros(bags.indices.numel(), dtype=dtype)
    out[split.position] = values
    return out.to(grad.dtype).reshape(bags.indices.shape)


def dequantize_rows(table: QuantizedTable) -> torch.Tensor:
    """Quantized rows [N, bytes] with their scale and bias [N, 2] as float32 [N, embedding_dim]."""
    weight, scale_bias, exponent, embedding_dim, bits = table
    if bits == 4:
        weight = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)[:, :embedding_dim]
    scale, bias = scale_bias.float().unbind(1)
    return torch.ldexp(
        weight.float() * scale.unsqueeze(1) + bias.unsqueeze(1), torch.tensor(exponent, device=weight.device)
    )


def quantized_embedding_bag(table: QuantizedTable, bags: BagOperands, dtype: torch.dtype) -> torch.Tensor:
    """Lookup and pooling over one table of int8 or int4 rows."""
    _check_weights(bags)
    split = _split(bags, table.weight.shape[0], zero_start=True)
    return _pool(_dequantized(table, split), split, bags.per_sample_weights, bags.spec.mode).to(dtype)


def _dequantized(table: QuantizedTable, split: Bags) -> torch.Tensor:
    """The rows that are looked up, as float32."""
    rows, scale_bias = table.weight[split.rows], table.scale_bias[split.rows]
    return dequantize_rows(table._replace(weight=rows, scale_bias=scale_bias))


def embedding_bag_collection(
    tables: TableLists, bags: CollectionBags, total_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """Many tables in one call; ``tables.plan`` has a row for each feature, see ``FeaturePlan``."""
    weights, scale_bias, plan = tables
    indices, offsets, per_sample_weights = bags
    _check_weights(bags)
    num_features = plan.shape[0]
    if (offsets.numel() - 1) % num_features:
        raise RuntimeError(
            f"offsets must have F*B+1 entries for F = {num_features} features, but has {offsets.numel()}"
        )
    batch = (offsets.numel() - 1) // num_features
    if batch:
        _check_offsets(offsets.long(), indices.numel(), zero_start=True)
    out = torch.empty(batch, total_dim, dtype=dtype, device=indices.device)
    for f, (table, dim, column, mode, bits, exponent) in enumerate(plan.tolist()):
        bounds = offsets[f * batch : (f + 1) * batch + 1]
        weight = weights[table]
        split = split_bags(indices, bounds, -1, True, weight.shape[0], f"the table of feature #{f}")
        if bits:
            values = _dequantized(QuantizedTable(weight, scale_bias[table], exponent, dim, bits), split)
        else:
            _check_float("weights", weight)
            values = weight[split.rows].to(_accumulator(weight.dtype))
        if (values.dtype == torch.float64) != (dtype == torch.float64):
            raise RuntimeError("float64 tables need a float64 output and can't be mixed with others")
        out[:, column : column + dim] = _pool(values, split, per_sample_weights, mode).to(dtype)
    return out


def _round_half(x: torch.Tensor, up: bool) -> torch.Tensor:
    """float32 to the nearest float16 that is not below (``up``) or not above x."""
    half = x.half()
    wrong = (half.float() < x) if up else (half.float() > x)
    bits = half.view(torch.int16)
    zero = torch.tensor(0x0001 if up else -0x7FFF, dtype=torch.int16, device=x.device)
    away = (bits >= 0) == up
    moved = torch.where(bits & 0x7FFF == 0, zero, bits + torch.where(away, 1, -1).to(torch.int16))
    return torch.where(wrong, moved, bits).view(torch.float16)


def quantize_rowwise(
    weight: torch.Tensor, bits: int, exponent: int, rows: torch.Tensor, scale_bias: torch.Tensor
) -> None:
    """Writes the quantized rows and their scale and bias into ``rows`` and ``scale_bias``.

    Row-wise asymmetric quantization: bias = minimum, scale = range / (2^bits - 1), both as float16 in units of
    2^exponent and rounded outwards, so that no element is clipped and the error is at most half a step.
    """
    levels = 255.0 if bits == 8 else 15.0
    for start in range(0, weight.shape[0], _QUANTIZE_ROWS):
        block = slice(start, start + _QUANTIZE_ROWS)
        x = weight[block].float()
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            row = start + int(bad.nonzero()[0])
            raise ValueError(f"row {row} of weight holds NaN or infinity and can't be quantized")
        x = torch.ldexp(x, torch.tensor(-exponent, device=x.device))
        low, high = (bound + 0.0 for bound in x.aminmax(dim=1))  # no zero with a sign
        bias = _round_half(low, up=False)
        scale = _round_half((high - bias.float()) / levels, up=True)
        inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
        q = ((x - bias.float().unsqueeze(1)) * inverse.unsqueeze(1)).clamp(max=levels).round().to(torch.uint8)
        if bits == 4:
            q = torch.nn.functional.pad(q, (0, q.shape[1] % 2))
            q = q[:, 0::2] | q[:, 1::2] << 4
        rows[block] = q
        scale_bias[block] = torch.stack([scale, bias], dim=1)
