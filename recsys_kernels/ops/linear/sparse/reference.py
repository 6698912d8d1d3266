"""What the sparse linear operators compute, in plain PyTorch: the fallback anywhere and what kernels are tested with.

Each function takes the fields of the operand table of the operator of the same name (see ``spec.py``). A few output
rows at a time become dense and are multiplied as such, so that memory stays bounded; integer products are taken in
float64, where sums of up to 2^53 are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..activation import (
    STATIC,
    WEIGHT_ONLY,
    activate,
    quantize_rows,
)
from ..operands import (
    FLOATS,
    GROUPS,
    MAX_IN_FEATURES,
    check,
    check_floats,
    check_input_qparams,
    check_options,
    check_width,
)
from .spec import SparseLayer, block_shape

_INT32_MAX = 2**31 - 1
_MAX_FEATURES = _INT32_MAX - 64
# Elements of what is dense at a time.
_CHUNK = 1 << 21

_MAGIC, _VERSION = 0x5053_4352, 1  # "RCSP"
_HEADER = 15  # int64
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class CheckedLayer(NamedTuple):
    """A sparse layer whose parts have been checked.

    Attributes:
        values: [nnz], [blocks, rows, columns] or, of 2:4, [N, ceil(K / 4) * 2]; float32, float16, bfloat16 or int8.
        crow_indices: where each row of blocks begins, int32 or int64; of 2:4 empty.
        col_indices: the column of each block; of 2:4 uint8 [N, ceil(K / 8)], 4 bits for four columns.
        out_features, in_features: N and K.
        weight_scale: float32 [N], or [N, groups], of int8 values; else None.
        bias: float32 [N] or None.
        input_qparams: scale and zero point of the activations (scheme static) or None.
        scheme: DYNAMIC, STATIC or WEIGHT_ONLY.
        activation: NONE, RELU, GELU, SIGMOID or SILU.
    """

    values: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    out_features: int
    in_features: int
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    input_qparams: tuple[float, float] | None
    scheme: int
    activation: int


def scale_group(out_features: int, in_features: int, shape: Sequence[int]) -> int:
    """How many columns of a row share a scale, where weight_scale has this shape: 32, 64 or 128; 0: all of them.

    Raises:
        RuntimeError: it is no shape of scales.
    """
    counts = {-(-in_features // group): group for group in reversed(GROUPS)}
    given = tuple(shape)
    if given in ((out_features,), (out_features, 1)):
        return 0
    if len(given) == 2 and given[0] == out_features and given[1] in counts:
        return counts[given[1]]
    groups = [f"{out_features} x {count}" for count in sorted(counts, reverse=True) if count > 1]
    more = f", or {' or '.join(groups)} of groups of columns" if groups else ""
    raise RuntimeError(f"weight_scale must have {out_features} values{more}, but has shape {list(given)}")


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_structure(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
    block_rows: int,
    block_columns: int,
) -> None:
    """Raises what is wrong with the places of kept weights, with the position of the first that is.

    Raises:
        IndexError: a column that is out of range.
        RuntimeError: anything else.
    """
    for name, size in (("out_features", out_features), ("in_features", in_features)):
        check(1 <= size <= _MAX_FEATURES, f"{name} must be 1 to {_MAX_FEATURES}, but is {size}")
    if block_rows == 0:
        _check_two_of_four(crow_indices, col_indices, out_features, in_features)
        return
    check(block_rows > 0 and block_columns > 0, f"blocks must not be empty, but are {block_rows} x {block_columns}")
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        check(tensor.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, but is {tensor.dtype}")
        check(tensor.dim() == 1, f"{name} must have 1 dimension(s), but has {tensor.dim()}")
    rows, columns = -(-out_features // block_rows), -(-in_features // block_columns)
    count, found = col_indices.shape[0], crow_indices.shape[0]
    check(found == rows + 1, f"crow_indices must have {rows + 1} values, but has {found}")
    check(
        count * block_rows * block_columns <= _INT32_MAX,
        f"a layer can keep at most {_INT32_MAX} weights, but has {count} blocks of {block_rows} x {block_columns}",
    )
    if crow_indices.is_meta:
        return
    first = int(crow_indices[0])
    check(first == 0, f"crow_indices[0] must be 0, but is {first}")
    falls = crow_indices[1:] < crow_indices[:-1]
    if falls.any():
        at = int(falls.nonzero()[0]) + 1
        before = int(crow_indices[at - 1])
        check(
            False,
            f"crow_indices[{at}] is {int(crow_indices[at])}, but must not be below the {before} before it",
        )
    last = int(crow_indices[-1])
    check(last == count, f"crow_indices[{rows}] is {last}, but must be the number of col_indices, {count}")
    _check_columns(crow_indices, col_indices, columns)


def _check_columns(crow_indices: torch.Tensor, col_indices: torch.Tensor, columns: int) -> None:
    outside = (col_indices < 0) | (col_indices >= columns)
    # No row's first follows on what is before it.
    follows = torch.ones_like(outside)
    starts = crow_indices[:-1].long()
    follows[starts[starts < follows.shape[0]]] = False
    unsorted = torch.zeros_like(outside)
    unsorted[1:] = follows[1:] & (col_indices[1:] <= col_indices[:-1])
    wrong = outside | unsorted
    if not wrong.any():
        return
    at = int(wrong.nonzero()[0])
    row = int((crow_indices <= at).sum()) - 1
    said = f"col_indices[{at}] is {int(col_indices[at])} in row {row}"
    if outside[at]:
        raise IndexError(f"{said}, but must be 0 to {columns - 1}")
    before = int(col_indices[at - 1])
    check(before != int(col_indices[at]), f"{said} for the second time")
    check(False, f"{said}, but must be above the {before} before it")


def _check_two_of_four(
    crow_indices: torch.Tensor, col_indices: torch.Tensor, out_features: int, in_features: int
) -> None:
    empty = crow_indices.numel()
    check(empty == 0, f"crow_indices of a 2:4 layer must be empty, but has {empty} values")
    check(
        col_indices.dtype == torch.uint8 and col_indices.dim() == 2,
        f"col_indices of a 2:4 layer must be a uint8 matrix, but is {col_indices.dtype} with {col_indices.dim()} "
        "dimension(s)",
    )
    shape = [out_features, -(-in_features // 8)]
    given = list(col_indices.shape)
    check(given == shape, f"col_indices of a 2:4 layer must have shape {shape}, but has {given}")
    if col_indices.is_meta:
        return
    pairs = two_of_four_columns(col_indices, in_features).unflatten(1, (-1, 2))
    wrong = pairs[..., 0] >= pairs[..., 1]
    if wrong.any():
        row, four = wrong.nonzero()[0].tolist()
        low, high = (pairs[row, four] - 4 * four).tolist()
        check(
            False,
            f"col_indices of a 2:4 layer holds the positions {low} and {high} for the columns {4 * four} to "
            f"{4 * four + 3} of row {row}, but the first must be below the second",
        )


def check_layer(layer: SparseLayer) -> CheckedLayer:
    """The operands of a layer, checked; waits for a GPU that holds them.

    Raises:
        IndexError: a column that is out of range; names its position, row, value and range.
        RuntimeError: anything else that does not fit, named.
    """
    values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams, *numbers = layer
    scheme, activation = numbers
    check(values.dtype in _TYPES, f"values must be float32, float16, bfloat16 or int8, but is {values.dtype}")
    check(1 <= values.dim() <= 3, f"values must have 1, 2 or 3 dimensions, but has {values.dim()}")
    check_options(scheme, activation)
    tensors = {
        "crow_indices": crow_indices,
        "col_indices": col_indices,
        "weight_scale": weight_scale,
        "bias": bias,
        "input_qparams": input_qparams,
    }
    for name, tensor in tensors.items():
        same = tensor is None or tensor.device == values.device
        check(same, f"{name} must be on the device of values ({values.device})")
    rows, columns = block_shape(values)
    check(
        values.dim() < 3 or (rows > 0 and columns > 0), f"values must hold blocks, but has shape {tuple(values.shape)}"
    )
    check_structure(crow_indices, col_indices, out_features, in_features, rows, columns)
    if values.dim() == 2:
        shape, given = [out_features, -(-in_features // 4) * 2], list(values.shape)
        check(given == shape, f"values of a 2:4 layer must have shape {shape}, but has {given}")
    else:
        kind, count = "elements" if values.dim() == 1 else "blocks", col_indices.shape[0]
        given_count = values.shape[0]
        check(given_count == count, f"values must have as many {kind} as col_indices, {count}, but has {given_count}")
    quantized = values.dtype == torch.int8
    check(quantized == (weight_scale is not None), "weight_scale belongs to int8 values, and to no other")
    check(quantized or scheme == WEIGHT_ONLY, f"float values take scheme 2 (weight only), but scheme is {scheme}")
    check(
        scheme == WEIGHT_ONLY or in_features <= MAX_IN_FEATURES,
        f"int8 products take at most {MAX_IN_FEATURES} inputs (beyond, sums overflow int32), but in_features is "
        f"{in_features}",
    )
    if weight_scale is not None:
        check(weight_scale.dtype == torch.float32, f"weight_scale must be float32, but is {weight_scale.dtype}")
        if scale_group(out_features, in_features, weight_scale.shape) == 0:
            weight_scale = weight_scale.reshape(-1)
    if bias is not None:
        check(bias.dtype in FLOATS, f"bias must be float32, float16 or bfloat16, but is {bias.dtype}")
        bias = bias.float()
        given = list(bias.shape)
        check(given == [out_features], f"bias must have {out_features} values, but has shape {given}")
    qparams = check_input_qparams(input_qparams, scheme)
    return CheckedLayer(
        values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, qparams, scheme, activation
    )


# ---- places of weights ----------------------------------------------------------------------------------------------


def two_of_four_columns(col_indices: torch.Tensor, in_features: int) -> torch.Tensor:
    """The columns of the kept weights of a 2:4 layer, int64 [N, ceil(K / 4) * 2]; those past K carry no weight."""
    fours = -(-in_features // 4)
    halves = torch.stack([col_indices & 15, col_indices >> 4], 2).flatten(1)[:, :fours].long()
    starts = 4 * torch.arange(fours, device=col_indices.device)
    return torch.stack([starts + (halves & 3), starts + (halves >> 2)], 2).flatten(1)


def entries(layer: CheckedLayer, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept weights of block rows ``first`` to ``last``: their rows (the first is 0), columns and values."""
    values, device = layer.values, layer.values.device
    if values.dim() == 2:
        column = two_of_four_columns(layer.col_indices[first:last], layer.in_features)
        row = torch.arange(last - first, device=device).unsqueeze(1).expand_as(column)
        value = values[first:last]
    else:
        block_rows, block_columns = block_shape(values)
        bounds = layer.crow_indices[first : last + 1].long()
        begin, end = bounds[0], bounds[-1]
        block_row = torch.repeat_interleave(torch.arange(last - first, device=device), bounds.diff())
        value = values[begin:end].reshape(-1, block_rows, block_columns)
        column = layer.col_indices[begin:end].long().reshape(-1, 1, 1) * block_columns
        column = (column + torch.arange(block_columns, device=device)).expand_as(value)
        row = block_row.reshape(-1, 1, 1) * block_rows
        row = (row + torch.arange(block_rows, device=device).unsqueeze(1)).expand_as(value)
    block_rows = max(1, block_shape(values)[0])
    inside = (column < layer.in_features) & (row < layer.out_features - first * block_rows)
    return row[inside], column[inside], value[inside]


def _parts(layer: CheckedLayer) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The layer by parts of which a dense copy is small: output rows, and what :func:`entries` gives for them."""
    block_rows = max(1, block_shape(layer.values)[0])
    count = -(-layer.out_features // block_rows)
    step = max(1, _CHUNK // (layer.in_features * block_rows))
    for first in range(0, count, step):
        last = min(first + step, count)
        rows = slice(first * block_rows, min(last * block_rows, layer.out_features))
        yield rows, *entries(layer, first, last)


def _dense_parts(layer: CheckedLayer, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows, row, column, value in _parts(layer):
        dense = value.new_zeros(rows.stop - rows.start, layer.in_features, dtype=dtype)
        dense[row, column] = value.to(dtype)
        yield rows, dense


def to_dense(layer: CheckedLayer) -> torch.Tensor:
    """The values as a matrix [N, K] of their type, with zeros for what is not kept."""
    return torch.cat([dense for _, dense in _dense_parts(layer, layer.values.dtype)])


def block_rows_of(crow_indices: torch.Tensor, count: int) -> torch.Tensor:
    """The row of each of ``count`` blocks, int32. Waits for no GPU; -1, or past the last, in a wrong structure."""
    numbers = torch.arange(count, dtype=crow_indices.dtype, device=crow_indices.device)
    return torch.searchsorted(crow_indices.contiguous(), numbers, right=True, out_int32=True) - 1


def places(
    values: torch.Tensor, crow_indices: torch.Tensor, col_indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of each stored value, int64, of shapes that broadcast to that of ``values``."""
    if values.dim() == 2:
        rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
        columns = two_of_four_columns(col_indices, 2 * values.shape[1])
    else:
        rows, columns = block_rows_of(crow_indices, values.shape[0]).long(), col_indices.long()
    if values.dim() == 3:
        inner = (torch.arange(size, device=values.device) for size in values.shape[1:])
        rows = rows.reshape(-1, 1, 1) * values.shape[1] + next(inner).unsqueeze(1)
        columns = columns.reshape(-1, 1, 1) * values.shape[2] + next(inner)
    return rows, columns


def dequantized(
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """int8 values times their scales, float32. Waits for no GPU."""
    rows, columns = places(values, crow_indices, col_indices)
    # On a GPU the structure has not been checked.
    rows, columns = rows.clamp(0, out_features - 1), columns.clamp(0, in_features - 1)
    group = scale_group(out_features, in_features, weight_scale.shape)
    scale = weight_scale[rows, columns // group] if group else weight_scale.reshape(-1)[rows]
    return values.float() * scale


# ---- one layer ------------------------------------------------------------------------------------------------------


def _floats(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    finite = torch.isfinite(x).all(1)
    out = x.new_empty(x.shape[0], layer.out_features)
    clean = torch.where(finite.unsqueeze(1), x, 0.0)
    for rows, dense in _dense_parts(layer, torch.float32):
        out[:, rows] = F.linear(clean, dense)
    if not finite.all():
        # A dense product would make NaN of infinity times the zero of a weight that does not exist.
        bad = (~finite).nonzero().squeeze(1)
        out[bad] = _by_entry(x[bad], layer)
    return out if layer.weight_scale is None else out * layer.weight_scale


def _by_entry(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    """The same of every kept weight on its own."""
    out = x.new_zeros(x.shape[0], layer.out_features)
    for rows, row, column, value in _parts(layer):
        step = max(1, _CHUNK // max(1, value.numel()))
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            out[part, rows].index_add_(1, row, x[part][:, column] * value.float())
    return out


def _integers(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    finite = torch.isfinite(x).all(1, keepdim=True)
    q, scale, zero_point = quantize_rows(torch.where(finite, x, 0.0), layer.input_qparams)
    q, zero_point = q.double(), zero_point.double()
    out = x.new_empty(x.shape[0], layer.out_features)
    for rows, dense in _dense_parts(layer, torch.float64):
        out[:, rows] = (q @ dense.t() - zero_point * dense.sum(1)).float()
    assert layer.weight_scale is not None
    return torch.where(finite, out * (scale * layer.weight_scale), torch.nan)


def _grouped(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    """Where groups of columns have scales of their own: weights, and quantized rows, are taken as floats again."""
    structure = (layer.crow_indices, layer.col_indices, layer.out_features, layer.in_features)
    assert layer.weight_scale is not None
    floats = layer._replace(values=dequantized(layer.values, *structure, layer.weight_scale), weight_scale=None)
    if layer.scheme == WEIGHT_ONLY:
        return _floats(x, floats)
    finite = torch.isfinite(x).all(1, keepdim=True)
    q, scale, zero_point = quantize_rows(torch.where(finite, x, 0.0), layer.input_qparams)
    return torch.where(finite, _floats((q - zero_point) * scale, floats), torch.nan)


def _run(x: torch.Tensor, layer: CheckedLayer) -> torch.Tensor:
    """One layer on float32 rows [M, K]."""
    if layer.weight_scale is not None and layer.weight_scale.dim() == 2:
        out = _grouped(x, layer)
    else:
        out = (_floats if layer.scheme == WEIGHT_ONLY else _integers)(x, layer)
    if layer.bias is not None:
        out = out + layer.bias
    return activate(out, layer.activation)


def sparse_linear(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
    """One layer over [..., K]: product with the kept weights, scales, bias, activation."""
    check_floats(input, dtype)
    checked = check_layer(layer)
    check(input.dim() >= 1, "input must have at least 1 dimension, but has 0")
    device = layer.values.device
    check(input.device == device, f"input is on {input.device}, but values on {device}")
    check_width(input, layer.in_features, layer.out_features)
    rows = input.float().reshape(-1, layer.in_features)
    return _run(rows, checked).to(dtype).reshape(*input.shape[:-1], layer.out_features)


def sparse_layer(input: torch.Tensor, layer: SparseLayer, dtype: torch.dtype) -> torch.Tensor:
    """The same as :func:`sparse_linear`: the reference keeps nothing from one call to the next."""
    return sparse_linear(input, layer, dtype)


# ---- the gradient of kept weights -----------------------------------------------------------------------------------


def sparse_weight_gradient(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[M, N] and [M, K] to the products that belong to kept weights, in the shape of values; some weights at a time."""
    for name, tensor in (("grad_output", grad_output), ("input", input)):
        check(tensor.dtype in FLOATS, f"{name} must be float32, float16 or bfloat16, but is {tensor.dtype}")
        check(tensor.dim() == 2, f"{name} must have 2 dimension(s), but has {tensor.dim()}")
        check(tensor.device == col_indices.device, f"{name} is on {tensor.device}, but col_indices elsewhere")
    check(dtype in FLOATS, f"dtype must be float32, float16 or bfloat16, but is {dtype}")
    m, n, k = input.shape[0], grad_output.shape[1], input.shape[1]
    given = grad_output.shape[0]
    check(given == m, f"grad_output must have as many rows as input, {m}, but has {given}")
    check_structure(crow_indices, col_indices, n, k, block_rows, block_columns)
    if block_rows == 0:
        column = two_of_four_columns(col_indices, k)
        shape: tuple[int, ...] = tuple(column.shape)
        row = torch.arange(n, device=column.device).unsqueeze(1).expand_as(column).reshape(-1)
        column, rows, columns, padded = column.reshape(-1), 1, 1, -k % 4
    else:
        rows, columns, column = block_rows, block_columns, col_indices.long()
        count = crow_indices.shape[0] - 1
        row = torch.repeat_interleave(torch.arange(count, device=column.device), crow_indices.long().diff())
        shape = (column.shape[0],) if rows == columns == 1 else (column.shape[0], rows, columns)
        padded = -k % columns
    # What lies past N and K is no weight and has no gradient, whatever the input holds.
    grads = F.pad(grad_output.t().float(), (0, 0, 0, -n % rows)).reshape(-(-n // rows), rows, m)
    inputs = F.pad(input.t().float(), (0, 0, 0, padded)).reshape((k + padded) // columns, columns, m)
    row_ends, column_ends = n - row * rows, k - column * columns
    out = grads.new_empty(column.shape[0], rows, columns)
    step = max(1, _CHUNK // max(1, m * (rows + columns)))
    for first in range(0, column.shape[0], step):
        part = slice(first, first + step)
        product = grads[row[part]] @ inputs[column[part]].transpose(1, 2)
        inside = (torch.arange(rows, device=row.device) < row_ends[part].unsqueeze(1)).unsqueeze(2)
        inside = inside & (torch.arange(columns, device=row.device) < column_ends[part].unsqueeze(1)).unsqueeze(1)
        out[part] = torch.where(inside, product, 0.0)
    return out.reshape(shape).to(dtype)


# ---- packed layers --------------------------------------------------------------------------------------------------


def sparse_pack(layer: SparseLayer, kind: int) -> torch.Tensor:
    """A layer in one tensor, which only this backend reads: a header, and the canonical parts one after the other."""
    check(kind in (0, 1), f"kind must be 0 (few rows of input) or 1 (many), but is {kind}")
    checked = check_layer(layer)
    values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams, *numbers = layer
    scheme, activation = numbers
    block_rows, block_columns = block_shape(values)
    header = [_MAGIC, _VERSION, kind, out_features, in_features, scheme, activation, _TYPES.index(values.dtype)]
    header += [block_rows, block_columns, crow_indices.numel(), col_indices.numel()]
    groups = 0 if weight_scale is None else weight_scale.numel() // out_features
    header += [groups, bias is not None, input_qparams is not None]
    indices = col_indices if col_indices.dtype == torch.uint8 else col_indices.long()
    parts = [torch.tensor(header, dtype=torch.int64, device=values.device), crow_indices.long(), indices]
    parts += [part for part in (checked.weight_scale, checked.bias, input_qparams) if part is not None]
    parts.append(values)
    return torch.cat([part.detach().contiguous().reshape(-1).view(torch.uint8) for part in parts])


def sparse_repack(places: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What :func:`sparse_pack` gave for a layer whose values are numbers, with the values that they name, from 1 on."""
    check(values.dtype == torch.float32, f"values must be float32, but is {values.dtype}")
    named = _unpack(places)
    check(named.values.dtype == torch.float32, "places must be packed from float32 values")
    numbers = named.values.contiguous().view(torch.int32).long()
    wrong = numbers[(numbers < 0) | (numbers > values.numel())]
    check(wrong.numel() == 0, f"places name value {wrong[:1].tolist()}, but there are {values.numel()}")
    # A number of 0 stands where no value belongs.
    given = torch.cat([values.new_zeros(1), values.detach().reshape(-1)])[numbers]
    return sparse_pack(SparseLayer(given, *named[1:5], None, bias, None, named.scheme, named.activation), 0)


def _unpack(packed: torch.Tensor) -> CheckedLayer:
    check(
        packed.dtype == torch.uint8 and packed.dim() == 1,
        f"packed must be a uint8 vector, but is {packed.dtype} with {packed.dim()} dimension(s)",
    )
    check(packed.shape[0] >= 8 * _HEADER, "packed holds no layer")
    at = 0

    def take(count: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal at
        end = at + count * dtype.itemsize
        check(end <= packed.shape[0], f"packed is truncated: {packed.shape[0]} of at least {end} bytes")
        # Copied, as a view of other types needs an aligned start.
        part, at = packed[at:end].clone().view(dtype), end
        return part

    magic, version, *rest = take(_HEADER, torch.int64).tolist()
    check(magic == _MAGIC and version == _VERSION, "packed holds no layer of this version")
    _, n, k, scheme, activation, kind, rows, columns, crow_count, col_count, groups, has_bias, has_qparams = rest
    crow = take(crow_count, torch.int64)
    col = take(col_count, torch.int64 if rows else torch.uint8)
    scale = take(n * groups, torch.float32).reshape((n, groups) if groups > 1 else (n,)) if groups else None
    bias = take(n, torch.float32) if has_bias else None
    qparams = take(2, torch.float32).tolist() if has_qparams else None
    if rows == 0:
        values = take(n * (-(-k // 4) * 2), _TYPES[kind]).reshape(n, -1)
        col = col.reshape(n, -1)
    else:
        values = take(col_count * rows * columns, _TYPES[kind]).reshape(-1, rows, columns)
    check(at == packed.shape[0], f"packed has {packed.shape[0]} bytes, but its layer {at}")
    pair = None if qparams is None else (qparams[0], qparams[1])
    return CheckedLayer(values, crow, col, n, k, scale, bias, pair if scheme == STATIC else None, scheme, activation)


def sparse_packed(input: torch.Tensor, packed: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """A packed layer over [M, K]."""
    check_floats(input, dtype)
    check(input.dim() == 2, f"input must have 2 dimension(s), but has {input.dim()}")
    check(input.device == packed.device, f"input is on {input.device}, but packed on {packed.device}")
    layer = _unpack(packed)
    check_width(input, layer.in_features, layer.out_features)
    check(layer.out_features == out_features, f"the layer has {layer.out_features} outputs, not {out_features}")
    return _run(input.float(), layer).to(dtype)
