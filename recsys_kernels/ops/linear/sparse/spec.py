"""The contract of the sparse linear operators: operand tables and shapes.

``sparse_linear`` takes a layer's canonical operands. ``sparse_pack`` lays a layer out as one backend's kernels read it
(``kind`` 0: for few rows of input, 1: for many), and ``sparse_packed`` runs what ``sparse_pack`` gave.
``sparse_repack`` puts other values into the places of a packed layer. ``sparse_weight_gradient`` gives the gradient of
the kept weights only. ``sparse_layer`` is for compiled code: it takes the canonical operands and keeps, from one call
to the next, what the CPU reads instead of them.

Sums are taken in float32. With int8 values and schemes 0 and 1 they are exact, in int32; where groups of columns have
scales, the rounded input and the weights are multiplied as the floats that they stand for, and summed in float32. NaN
and infinity of the input reach what is computed from them through kept weights (schemes 0 and 1: their row is NaN).

Structures are checked on the CPU at every call but ``sparse_packed``. On a GPU they are not, as no call waits for a
GPU: what :class:`~recsys_kernels.SparseLinear` makes or loads is checked before it gets there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ....backends import registry

FAMILY = registry.register(
    registry.Family(
        "sparse",
        __package__,
        shown={"sparse_linear": ("sparse_linear", "sparse_weight_gradient")},
        modules=(".layer:SparseLinear", ".mlp:SparseMLP"),
        samples=".samples:operator_samples",
        module_samples=".module_samples:module_samples",
        facts=".facts:facts",
        converters=("recsys_kernels.compress.converters.sparse_linear",),
    )
)


# ---- operand tables -------------------------------------------------------------------------------------------------


class SparseLayer(NamedTuple):
    """A linear layer of which only the kept weights are stored, in the order of their rows and columns.

    The dimensions of ``values`` say what pattern the weights have:

    - [nnz], unstructured: ``crow_indices`` [N + 1], where each row begins, and ``col_indices`` [nnz].
    - [blocks, r, c], blocks of r rows and c columns: ``crow_indices`` [ceil(N / r) + 1], where each row of blocks
      begins, and ``col_indices`` [blocks]. What lies past N or K in the last blocks is no weight, and should be zero.
    - [N, ceil(K / 4) * 2], 2:4: ``col_indices`` uint8 [N, ceil(K / 8)] holds 4 bits for every four columns, for the
      even fours in the lower half of a byte. The two lower bits are the position of the first weight, the two upper
      ones the position of the second weight, which is above the first. ``crow_indices`` is empty. A position past K is
      no weight, and its value should be zero.

    Attributes:
        values: float32, float16, bfloat16 or int8.
        crow_indices, col_indices: int32 or int64 (2:4: see above).
        out_features, in_features: N and K.
        weight_scale: for int8 values float32 [N], or [N, ceil(K / group)] where groups of 32, 64 or 128 columns of a
            row have scales of their own; else None.
        bias: [N], float32, float16 or bfloat16, or None.
        input_qparams: float32 [2], scale and zero point of the input, for scheme static; else None.
        scheme: 0 dynamic, 1 static, 2 weight_only, which float values take.
        activation: 0 none, 1 relu, 2 gelu, 3 sigmoid, 4 silu.
    """

    values: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    out_features: int
    in_features: int
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    input_qparams: torch.Tensor | None
    scheme: int
    activation: int


class LinearOperands(NamedTuple):
    """Operands of ``sparse_linear`` and ``sparse_layer``.

    ``input`` [..., K] of float32, float16 or bfloat16. Gives [..., N] of type ``dtype``.
    """

    input: torch.Tensor
    layer: SparseLayer
    dtype: torch.dtype


class PackOperands(NamedTuple):
    """Operands of ``sparse_pack``.

    ``kind`` 0 for few rows of input, 1 for many. Gives uint8 [bytes].
    """

    layer: SparseLayer
    kind: int


class RepackOperands(NamedTuple):
    """Operands of ``sparse_repack``.

    ``places``, a packed layer whose float32 values are the bits of numbers from 1 on, and the ``values`` that these
    numbers name. Gives uint8 of the shape of ``places``.
    """

    places: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None


class PackedOperands(NamedTuple):
    """Operands of ``sparse_packed``.

    ``input`` [M, K], ``packed`` uint8 [bytes]. Gives [M, out_features] of type ``dtype``.
    """

    input: torch.Tensor
    packed: torch.Tensor
    out_features: int
    dtype: torch.dtype


class WeightGradientOperands(NamedTuple):
    """Operands of ``sparse_weight_gradient``.

    ``grad_output`` [M, N] and ``input`` [M, K]; ``block_rows`` and ``block_columns`` are 1 and 1 for unstructured
    weights, 0 and 0 for 2:4. Gives the shape of the layer's values, of type ``dtype``.
    """

    grad_output: torch.Tensor
    input: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    block_rows: int
    block_columns: int
    dtype: torch.dtype


def block_shape(values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the blocks that values form: 1 and 1 if unstructured, 0 and 0 if 2:4."""
    if values.dim() == 3:
        return values.shape[1], values.shape[2]
    return (1, 1) if values.dim() == 1 else (0, 0)


# ---- shapes and operators -------------------------------------------------------------------------------------------


def _linear(call: LinearOperands) -> torch.Tensor:
    return call.input.new_empty(*call.input.shape[:-1], call.layer.out_features, dtype=call.dtype)


def _pack(call: PackOperands) -> torch.Tensor:
    # The size of a pack depends on where the weights are.
    return call.layer.values.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _repack(call: RepackOperands) -> torch.Tensor:
    return call.places.new_empty(torch.library.get_ctx().new_dynamic_size())


def _packed(call: PackedOperands) -> torch.Tensor:
    return call.input.new_empty(call.input.shape[0], call.out_features, dtype=call.dtype)


def _weight_gradient(call: WeightGradientOperands) -> torch.Tensor:
    rows, columns, input = call.block_rows, call.block_columns, call.input
    if rows == 0:
        return input.new_empty(call.grad_output.shape[1], (input.shape[1] + 3) // 4 * 2, dtype=call.dtype)
    if rows == columns == 1:
        return input.new_empty(call.col_indices.shape[0], dtype=call.dtype)
    return input.new_empty(call.col_indices.shape[0], rows, columns, dtype=call.dtype)


FAMILY.define("sparse_linear", LinearOperands, _linear, triton=True)
FAMILY.define("sparse_pack", PackOperands, _pack)
FAMILY.define("sparse_repack", RepackOperands, _repack)
FAMILY.define("sparse_packed", PackedOperands, _packed)
FAMILY.define("sparse_weight_gradient", WeightGradientOperands, _weight_gradient, triton=True)
FAMILY.define("sparse_layer", LinearOperands, _linear, triton=True)
