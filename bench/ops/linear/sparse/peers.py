"""Sparse linear layers: the sides of a comparison, recsys_kernels and what a user might run instead.

All sides have the same weights but BSR 16x16, which gets weights that are pruned by blocks of that size to the same
sparsity: with weights that are pruned in any other way hardly one block would be empty. The sparse products of torch
and scipy take transposed activations and give a transposed output; they are handed views and leave views, and no copy
is charged to them. Every side adds the bias.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_kernels as rk
from bench.core import probe
from bench.core.levels import cap
from bench.core.sides import ONE_THREAD, OURS, AbsentError, Side, import_peer
from bench.ops.linear.layers import numpy_copy, product_limit, quantized_engine
from bench.ops.linear.sparse.cases import (
    DENSE,
    OWN_FP32_SPARSE,
    OWN_INT8_DENSE,
    SparseLinearCase,
    SparseLinearWorkload,
)
from recsys_kernels.backends import selection
from recsys_kernels.ops.linear.sparse import formats
from recsys_kernels.ops.linear.sparse.crossover import FEW_ROWS
from recsys_kernels.ops.linear.sparse.patterns import parse_pattern

CSR = "torch CSR"
CSR_LINEAR = "F.linear with a CSR weight"
BSR = "torch BSR 16x16, its own blocks"
BSR_SAME = "torch BSR, the same blocks"
SCIPY = "scipy CSR"
QNNPACK = "torch sparse int8, qnnpack"
BLOCK = 16


def _packed(work: SparseLinearWorkload, layer: rk.SparseLinear, name: str) -> Side:
    """The operator on a packed layer."""
    case, operands = work.case, layer.operands()
    with torch.no_grad():
        packed = selection.implementation("sparse_pack", operands[0])(*operands, int(case.batch > FEW_ROWS))
    run, dtype = selection.implementation("sparse_packed", packed), selection.dtype_argument(torch.float32)
    return Side(name, lambda batch: run(batch, packed, case.outs, dtype), threads=case.threads)


def _training(
    work: SparseLinearWorkload,
    name: str,
    call: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor,
    dense: Callable[[Tensor], Tensor],
) -> Side:
    """A forward and a backward pass; `dense` gives the gradient of `weight` as a matrix."""

    def run(batch: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(batch), (batch, weight, bias), work.grad_output)

    def result(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return work.gradients(gradients[0], dense(gradients[1]), gradients[2])

    def prepare(batch: Tensor) -> Tensor:
        return batch.clone().requires_grad_()

    return Side(name, run, prepare, work.case.threads, torch.enable_grad, result)


def ours(work: SparseLinearWorkload) -> Side:
    """The operator on a packed layer, or the module that a user would take."""
    case = work.case
    if case.kind == "training":
        layer = rk.SparseLinear.from_dense(work.linear(trained=True), None, case.pattern)

        def dense(of_values: Tensor) -> Tensor:
            stored = formats.Stored(of_values, layer.crow_indices, layer.col_indices)
            return formats.to_dense(stored, case.outs, case.ins)

        assert layer.bias is not None
        return _training(work, OURS, layer, layer.values, layer.bias, dense)
    layer = work.layer if case.values == "fp32" else work.layer.quantize("dynamic")
    if case.level == "module":
        return Side(OURS, layer, threads=case.threads)
    return _packed(work, layer, OURS)


def _own_fp32(work: SparseLinearWorkload) -> Side:
    return _packed(work, work.layer, OWN_FP32_SPARSE)


def _own_int8_dense(work: SparseLinearWorkload) -> Side:
    packed = rk.Int8Linear.from_float(work.linear()).pack()
    chain, dtype = selection.implementation("int8_chain", packed), selection.dtype_argument(torch.float32)
    return Side(OWN_INT8_DENSE, lambda batch: chain(batch, packed, work.case.outs, dtype), threads=work.case.threads)


def _dense(work: SparseLinearWorkload) -> Side:
    if work.case.kind == "training":
        linear = work.linear(trained=True)
        return _training(work, DENSE, linear, linear.weight, linear.bias, lambda of_weight: of_weight)
    if work.case.level == "module":
        return Side(DENSE, work.linear(), threads=work.case.threads)
    return Side(DENSE, lambda batch: F.linear(batch, work.weight, work.bias), threads=work.case.threads)


def _product(work: SparseLinearWorkload, name: str, weight: Tensor) -> Side:
    """A sparse matrix of torch times activations."""
    bias = work.bias
    if work.case.batch == 1 and weight.layout == torch.sparse_csr:
        # Twice as fast as a product with a matrix of one column.
        return Side(name, lambda batch: torch.addmv(bias, weight, batch[0])[None], threads=work.case.threads)
    column = bias[:, None]
    return Side(name, lambda batch: torch.addmm(column, weight, batch.t()).t(), threads=work.case.threads)


def _sparse_csr(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout beta
        return dense.to_sparse_csr()


def _csr(work: SparseLinearWorkload) -> Side:
    weight = _sparse_csr(work.weight)
    if work.case.kind == "forward":
        return _product(work, CSR, weight)
    weight, bias = weight.requires_grad_(), work.bias.clone().requires_grad_()

    def call(batch: Tensor) -> Tensor:
        # Not addmm, whose gradient of the weights is dense.
        return torch.sparse.mm(weight, batch.t()).t() + bias

    return _training(work, CSR, call, weight, bias, lambda of_weight: of_weight.to_dense())


def _csr_linear(work: SparseLinearWorkload) -> Side:
    """F.linear with such a weight has no kernel for inference mode."""
    weight, threads = _sparse_csr(work.weight), work.case.threads
    if work.case.level == "module":
        linear = work.linear()
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return Side(CSR_LINEAR, linear, threads=threads, context=torch.no_grad)
    return Side(CSR_LINEAR, lambda batch: F.linear(batch, weight, work.bias), threads=threads, context=torch.no_grad)


def _bsr_product(work: SparseLinearWorkload, name: str, dense: Tensor, rows: int, columns: int) -> Side:
    if dense.shape[0] % rows or dense.shape[1] % columns:
        raise AbsentError(f"torch has no BSR matrix of {list(dense.shape)} in blocks of {rows}x{columns}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        side = _product(work, name, dense.to_sparse_bsr((rows, columns)))
    try:
        with side.context():
            side.run(work.batch(0))
    except RuntimeError as error:
        raise AbsentError(f"blocks of {rows}x{columns}: {error}") from error
    return side


def _bsr(work: SparseLinearWorkload) -> Side:
    dense = work.pruned(f"block{BLOCK}x{BLOCK}")
    return replace(_bsr_product(work, BSR, dense, BLOCK, BLOCK), check=partial(work.check_pruned, dense))


def _bsr_same(work: SparseLinearWorkload) -> Side:
    pattern = parse_pattern(work.case.pattern)
    return _bsr_product(work, BSR_SAME, work.weight, pattern.rows, pattern.columns)


def _scipy(work: SparseLinearWorkload) -> Side:
    (sparse,) = import_peer("scipy.sparse")
    if work.case.threads > 1:
        raise AbsentError("scipy's product runs on one thread")
    weight, bias = sparse.csr_matrix(work.weight.numpy()), work.bias.numpy()
    if work.case.batch == 1:
        return Side(SCIPY, lambda batch: (weight @ batch[0] + bias)[None], numpy_copy)
    column = bias[:, None]
    return Side(SCIPY, lambda batch: (weight @ batch.T + column).T, numpy_copy)


def _qnnpack(work: SparseLinearWorkload) -> Side:
    """torch's sparse int8 layers, in blocks of 1x4, which torch.ao.nn.sparse.quantized.dynamic runs."""
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        raise AbsentError("this torch has no engine qnnpack")
    if cap():
        raise AbsentError(f"qnnpack has no switch that holds it to {cap()}")
    scale = (work.weight.abs().amax(1) / 127).clamp(min=1e-12).double()
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        quantized = torch.quantize_per_channel(work.weight, scale, zeros, 0, torch.qint8)
    engine = partial(quantized_engine, "qnnpack")
    with engine():
        packed = torch.ops.sparse.qlinear_prepack(quantized, work.bias, 1, 4)
    run = torch.ops.sparse.qlinear_dynamic.default
    return Side(QNNPACK, lambda batch: run(batch, packed), threads=work.case.threads, context=engine)


PEERS: dict[str, Callable[[SparseLinearWorkload], Side]] = {
    DENSE: _dense,
    CSR: _csr,
    CSR_LINEAR: _csr_linear,
    BSR: _bsr,
    BSR_SAME: _bsr_same,
    SCIPY: _scipy,
    QNNPACK: _qnnpack,
    OWN_INT8_DENSE: _own_int8_dense,
    OWN_FP32_SPARSE: _own_fp32,
}


def sides_of(case: SparseLinearCase) -> list[str]:
    """The names of the sides that a case is compared with.

    A module is compared with what a user could put into a model instead, training with what has gradients.
    """
    if case.kind == "training":
        names = [DENSE, CSR]
    elif case.level == "module":
        names = [DENSE, CSR_LINEAR]
    elif case.values == "int8":
        names = [DENSE, CSR, QNNPACK, OWN_INT8_DENSE, OWN_FP32_SPARSE]
    else:
        same = [BSR_SAME] if case.pattern.startswith("block") else []
        names = [DENSE, CSR, CSR_LINEAR, BSR, *same, SCIPY]
    return [*names, *([ONE_THREAD] if case.threads > 1 else [])]


def limit(work: SparseLinearWorkload) -> probe.ProductLimit:
    """What the CPU's instructions for such products could do. Raises ProbeUnavailableError where there are none."""
    run = probe.probe_int8 if work.case.values == "int8" else probe.probe_float
    return product_limit(run, work.case.threads)
