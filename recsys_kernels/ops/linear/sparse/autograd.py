"""The contract of the sparse linear operators: schemas, shapes, gradients.

``sparse_linear`` takes a layer's canonical operands. ``sparse_pack`` lays a layer out as one backend's kernels read it
(``kind`` 0: for few rows of input, 1: for many), and ``sparse_packed`` runs what it gave. ``sparse_weight_gradient``
gives the gradient of the kept weights only. ``sparse_layer`` is for compiled code: it takes the canonical operands and
keeps what the CPU reads instead of them from one call to the next.

In every operator: ``input`` float32, float16 or bfloat16; ``values`` of the kept weights, float32, float16, bfloat16 or
int8 (with ``weight_scale`` float32 [N], or [N, ceil(K / group)] where groups of 32, 64 or 128 columns of a row have
scales of their own), in the order of their rows and columns. Their dimensions say what they are:

- [nnz], unstructured: ``crow_indices`` [N + 1], where each row begins, and ``col_indices`` [nnz].
- [blocks, r, c], blocks of r rows and c columns: the same of blocks, [ceil(N / r) + 1] and [blocks]. What lies past N
  or K in the last blocks is no weight, and should be zero.
- [N, ceil(K / 4) * 2], 2:4: ``col_indices`` uint8 [N, ceil(K / 8)] holds 4 bits for every four columns, of the even
  fours in the lower half of a byte: the position of the first weight in the two lower bits, that of the second, which
  is above it, in the others. ``crow_indices`` is empty. A position past K is no weight, and its value should be zero.

``bias`` a float type [N]; ``input_qparams`` float32 [2], scale and zero point, for scheme 1. ``scheme``: 0 dynamic, 1
static, 2 weight_only, which float values take; ``activation``: 0 none, 1 relu, 2 gelu, 3 sigmoid, 4 silu; ``dtype``: of
the output. Sums are taken in float32 (schemes 0 and 1: exactly, in int32; where groups have scales, the rounded input
and the weights are multiplied as the floats that they stand for, and summed in float32). NaN and infinity of the input
reach what is computed from them, through kept weights (schemes 0 and 1: their row becomes NaN).

Structures are checked on the CPU at every call but ``sparse_packed``. On a GPU they are not, as nobody waits for one:
what :class:`~recsys_kernels.SparseLinear` makes or loads is checked before it gets there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ....backends import selection as _backends
from ..operands import EPILOGUES, GELU, NONE, RELU, SIGMOID, SILU, WEIGHT_ONLY, epilogue_number, scheme_number
from . import reference
from .reference import block_shape, two_of_four_columns

if TYPE_CHECKING:
    from .structure import Structure

_LAYER = (
    "Tensor values, Tensor crow_indices, Tensor col_indices, int out_features, int in_features, Tensor? weight_scale, "
    "Tensor? bias, Tensor? input_qparams, int scheme, int activation"
)

# The same in Python: from values to activation.
Operands = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    int,
    int,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
    int,
]

# Up to this many rows of input the pack of kind 0 is the faster one.
FEW_ROWS = 8


# Shape functions: they name only the arguments that decide the result. The schemas below name all of them.


def _fake_sparse_linear(
    input: torch.Tensor, values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, out_features: int, *rest: Any
) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], out_features, dtype=rest[-1])


def _fake_sparse_pack(values: torch.Tensor, *rest: Any) -> torch.Tensor:
    # How large a pack is depends on where the weights are.
    return values.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _fake_sparse_repack(places: torch.Tensor, *rest: Any) -> torch.Tensor:
    return places.new_empty(torch.library.get_ctx().new_dynamic_size())


def _fake_sparse_packed(
    input: torch.Tensor, packed: torch.Tensor, out_features: int, dtype: torch.dtype
) -> torch.Tensor:
    return input.new_empty(input.shape[0], out_features, dtype=dtype)


def _fake_sparse_weight_gradient(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if block_rows == 0:
        return input.new_empty(grad_output.shape[1], (input.shape[1] + 3) // 4 * 2, dtype=dtype)
    if block_rows == block_columns == 1:
        return input.new_empty(col.shape[0], dtype=dtype)
    return input.new_empty(col.shape[0], block_rows, block_columns, dtype=dtype)


_backends.define(
    f"sparse_linear(Tensor input, {_LAYER}, ScalarType dtype) -> Tensor", reference.sparse_linear, _fake_sparse_linear
)
_backends.define(f"sparse_pack({_LAYER}, int kind) -> Tensor", reference.sparse_pack, _fake_sparse_pack)
_backends.define(
    "sparse_repack(Tensor places, Tensor values, Tensor? bias) -> Tensor", reference.sparse_repack, _fake_sparse_repack
)
_backends.define(
    "sparse_packed(Tensor input, Tensor packed, int out_features, ScalarType dtype) -> Tensor",
    reference.sparse_packed,
    _fake_sparse_packed,
)
_backends.define(
    "sparse_weight_gradient(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, int block_rows, "
    "int block_columns, ScalarType dtype) -> Tensor",
    reference.sparse_weight_gradient,
    _fake_sparse_weight_gradient,
)
_backends.define(
    f"sparse_layer(Tensor input, {_LAYER}, ScalarType dtype) -> Tensor", reference.sparse_linear, _fake_sparse_linear
)
_backends.register_triton(f"{__package__}.triton", ("sparse_linear", "sparse_layer", "sparse_weight_gradient"))


class Transposed(NamedTuple):
    """The structure of a transposed layer.

    Attributes:
        crow_indices, col_indices: where its weights are; always blocks or unstructured.
        permutation: which block, or weight, of the layer each of its own is.
        out_features: K, of 2:4 rounded up to whole fours.
    """

    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    permutation: torch.Tensor
    out_features: int

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the transposed layer."""
        if values.dim() == 3:
            return values.transpose(1, 2)[self.permutation]
        return values.reshape(-1)[self.permutation]


def transpose_structure(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_rows: int,
    block_columns: int,
    out_features: int,
    in_features: int,
) -> Transposed:
    """The structure of a layer's transposed weights [K, N]: blocks r x c become c x r, 2:4 becomes unstructured.

    Waits for no GPU: sizes follow from those of the arguments.

    Args:
        crow_indices, col_indices: see the module; a structure that has been checked.
        block_rows, block_columns: of the blocks: 1 and 1 unstructured, 0 and 0 of 2:4.
    """
    device = col_indices.device
    if block_rows == 0:
        columns = two_of_four_columns(col_indices, in_features)
        rows = torch.arange(out_features, device=device).unsqueeze(1).expand_as(columns).reshape(-1)
        columns, count, transposed = columns.reshape(-1), -(-in_features // 4) * 4, -(-in_features // 4) * 4
    else:
        columns, count, transposed = col_indices.long(), -(-in_features // block_columns), in_features
        block_row_numbers = torch.arange(crow_indices.shape[0] - 1, device=device)
        lengths = crow_indices.long().diff()
        rows = torch.repeat_interleave(block_row_numbers, lengths, output_size=columns.shape[0])
    # Stable, so that the rows of a column stay in order.
    permutation = torch.argsort(columns, stable=True)
    ends = torch.zeros(count + 1, dtype=torch.int64, device=device)
    ends.index_add_(0, columns + 1, torch.ones_like(columns))
    return Transposed(ends.cumsum(0).int(), rows[permutation].int(), permutation, transposed)


def packed(input: torch.Tensor, layer: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """A packed layer over an input of any shape [..., K]; no gradient."""
    run = _backends.implementation("sparse_packed", input)
    number = _backends.dtype_argument(dtype)
    if input.dim() == 2:
        return run(input, layer, out_features, number)
    if input.dim() == 0:
        raise RuntimeError("input must have at least 1 dimension, but has 0")
    # Not -1, which an empty input leaves open.
    out = run(input.flatten(0, -2) if input.dim() > 2 else input.unsqueeze(0), layer, out_features, number)
    return out.reshape(*input.shape[:-1], out_features)


def _input_gradient(grad: torch.Tensor, layer: Operands, structure: Structure | None) -> torch.Tensor:
    """float32 [M, N] to [M, K], through the transposed weights."""
    values, crow, col, out_features, in_features, weight_scale, *_ = layer
    if structure is None:
        transposed = transpose_structure(crow, col, *block_shape(values), out_features, in_features)
    elif structure.packs(values):
        return structure.input_gradient(grad, values)
    else:
        transposed = structure.transposed()
    scale = None
    if weight_scale is not None and reference.scale_group(out_features, in_features, weight_scale.shape):
        # There a group is of rows.
        values = reference.dequantized(values, crow, col, out_features, in_features, weight_scale)
    elif weight_scale is not None:
        # Of what are columns there.
        grad = grad * weight_scale.reshape(-1)
        scale = weight_scale.new_ones(transposed.out_features)
    run = _backends.implementation("sparse_linear", grad)
    sizes = (transposed.out_features, out_features)
    weights = (transposed.values(values), transposed.crow_indices, transposed.col_indices, *sizes)
    result = run(grad, *weights, scale, None, None, WEIGHT_ONLY, NONE, torch.float32)
    return result[:, :in_features]


class _SparseLinear(torch.autograd.Function):
    """Gradients of input, float values and bias. Of int8 layers as if neither input nor weights had been rounded.

    (The straight-through estimator of Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons
    for Conditional Computation", 2013.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        values: torch.Tensor,
        crow_indices: torch.Tensor,
        col_indices: torch.Tensor,
        out_features: int,
        in_features: int,
        weight_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        input_qparams: torch.Tensor | None,
        scheme: int,
        activation: int,
        dtype: torch.dtype,
        prepared: Callable[[torch.Tensor], torch.Tensor] | None,
        structure: Structure | None,
    ) -> torch.Tensor:
        ctx.sizes, ctx.scheme, ctx.activation = (out_features, in_features), scheme, activation
        ctx.dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        ctx.structure = structure
        if prepared is None:
            run = _backends.implementation("sparse_linear", input)
            layer = (values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams)
            out = run(input, *layer, scheme, activation, dtype)
        else:
            out = prepared(input)
        # Those of relu and sigmoid follow from the output. Those of gelu and silu need what went into the function:
        # computed again from the input, which costs one product and no memory.
        again = activation in (GELU, SILU)
        ctx.save_for_backward(
            input if again or ctx.needs_input_grad[1] else None,
            values,
            crow_indices,
            col_indices,
            weight_scale,
            bias if again else None,
            input_qparams if again else None,
            out if activation in (RELU, SIGMOID) else None,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, values, crow, col, weight_scale, bias, input_qparams, out = ctx.saved_tensors
        out_features, in_features = ctx.sizes
        layer = (values, crow, col, out_features, in_features, weight_scale, bias, input_qparams)
        grad = grad.float()
        if ctx.activation == RELU:
            grad = torch.ops.aten.threshold_backward(grad, out.float(), 0)
        elif ctx.activation == SIGMOID:
            grad = torch.ops.aten.sigmoid_backward(grad, out.float())
        elif ctx.activation != NONE:
            run = _backends.implementation("sparse_linear", input)
            backward = torch.ops.aten.gelu_backward if ctx.activation == GELU else torch.ops.aten.silu_backward
            grad = backward(grad, run(input, *layer, ctx.scheme, NONE, torch.float32))
        shape = grad.shape[:-1]
        # Not -1, which an empty batch leaves open.
        rows = grad.reshape(shape.numel(), out_features)
        grad_input = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _input_gradient(rows, (*layer, ctx.scheme, NONE), ctx.structure)
            grad_input = grad_input.to(ctx.dtype).reshape(*shape, in_features)
        if ctx.needs_input_grad[1]:
            run = _backends.implementation("sparse_weight_gradient", rows)
            flat = input.reshape(shape.numel(), in_features)
            grad_values = run(rows, flat, crow, col, *block_shape(values), values.dtype).reshape(values.shape)
        if ctx.needs_input_grad[7]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_input, grad_values, None, None, None, None, None, grad_bias, None, None, None, None, None, None


def run_layer(
    input: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int,
    in_features: int,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_qparams: torch.Tensor | None,
    scheme: int,
    activation: int,
    dtype: torch.dtype,
    prepared: Callable[[torch.Tensor], torch.Tensor] | None = None,
    structure: Structure | None = None,
) -> torch.Tensor:
    """One layer, differentiable in input, float values and bias.

    Args:
        prepared: gives the result from what was made of the layer before; None: the operator.
        structure: of the layer, where it is kept from one call to the next; else None.
    """
    layer = (values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams)
    trained = input.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _SparseLinear.apply(input, *layer, scheme, activation, dtype, prepared, structure)
    if prepared is not None:
        return prepared(input)
    run = _backends.implementation("sparse_linear", input)
    return run(input, *layer, scheme, activation, _backends.dtype_argument(dtype))


def _of_values(
    values: torch.Tensor, activation: str | None, weight_scale: torch.Tensor | None, out_features: int
) -> tuple[str, torch.Tensor | None]:
    """How the input is taken, and scales as the operators take them."""
    if weight_scale is not None and weight_scale.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("sparse_linear: weight_scale has no gradient; detach() it")
    if activation is None:
        activation = "dynamic" if values.dtype == torch.int8 else "weight_only"
    elif values.dtype != torch.int8 and (activation != "weight_only" or weight_scale is not None):
        hint = f" (a function to apply is epilogue={activation!r})" if activation in EPILOGUES else ""
        raise ValueError(f"activation={activation!r} is for int8 values, but values are {values.dtype}{hint}")
    if weight_scale is not None:
        if weight_scale.numel() == 1:
            weight_scale = weight_scale.reshape(1).expand(out_features)
        elif weight_scale.shape[1:] == (1,):
            weight_scale = weight_scale.reshape(-1)
    return activation, weight_scale


def sparse_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    out_features: int | None = None,
    bias: torch.Tensor | None = None,
    *,
    in_features: int | None = None,
    weight_scale: torch.Tensor | None = None,
    activation: str | None = None,
    input_qparams: torch.Tensor | None = None,
    epilogue: str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.linear`` with weights of which only those that are kept are stored and multiplied.

    Args:
        input: [..., K], float32, float16 or bfloat16. Has a gradient.
        values: the kept weights, in the order of rows and columns: [nnz] (unstructured), [blocks, r, c] (blocks of r
            output rows and c columns) or [N, ceil(K / 4) * 2] (2:4). A float type, which has a gradient, or int8.
        crow_indices: int32 or int64, where every row, or row of blocks, begins: [N + 1] or [ceil(N / r) + 1]; of 2:4
            empty.
        col_indices: int32 or int64, the column of every weight, or block, ascending in each row: [nnz] or [blocks]. Of
            2:4 uint8 [N, ceil(K / 8)]: 4 bits for every four columns, of the even fours in the lower half of a byte;
            the position of the first weight in the two lower bits, of the second in the upper ones.
        out_features: N; default: what the others say, with whole blocks.
        bias: [N], a float type. Has a gradient.
        in_features: K; default: that of ``input``.
        weight_scale: float32 of int8 values: [N], [N, 1], one number for all, or [N, ceil(K / group)] where groups of
            32, 64 or 128 columns share one. Which of these follows from its shape; sums are then taken in float32, of
            what the quantized numbers stand for.
        activation: how int8 layers take the input: ``"dynamic"`` (the default; quantized to 8 bits by the range of each
            row), ``"static"`` (by ``input_qparams``) or ``"weight_only"`` (in float). None with float values.
        input_qparams: float32 [2], scale and zero point (an integer from 0 to 255), for ``"static"``.
        epilogue: None, ``"relu"``, ``"gelu"``, ``"sigmoid"`` or ``"silu"``: applied to the result.
        dtype: of the result; default: that of ``input``.

    Returns:
        [..., N]. NaN and infinity of the input reach what is computed from them through kept weights; int8 products
        give a row of NaN for a row that holds one.

    Raises:
        ValueError: an unknown name.
        IndexError: a column that is out of range; names its position.
        RuntimeError: shapes, types or a structure that do not fit together, named, with the position (on a GPU, which
            nobody waits for, structures and scales are not looked into).
    """
    if in_features is None:
        if input.dim() == 0:
            raise RuntimeError("input must have at least 1 dimension, but has 0")
        in_features = input.shape[-1]
    if out_features is None:
        rows = block_shape(values)[0]
        out_features = values.shape[0] if rows == 0 else max(0, crow_indices.shape[0] - 1) * rows
    activation, weight_scale = _of_values(values, activation, weight_scale, out_features)
    layer = (values, crow_indices, col_indices, out_features, in_features, weight_scale, bias, input_qparams)
    numbers = scheme_number(activation), epilogue_number(epilogue)
    return run_layer(input, *layer, *numbers, input.dtype if dtype is None else dtype)
