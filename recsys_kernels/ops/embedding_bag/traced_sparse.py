"""Sparse gradients of an embedding bag within ``torch.compile``. Importing this module imports the tracer."""

from __future__ import annotations

from typing import Any

import torch

from .autograd import Pool, pool_backward
from .reference import MEAN
from .spec import BagOperands


def _sparse_backward(grad: torch.Tensor, bags: BagOperands, num_embeddings: int) -> torch.Tensor:
    """The gradient with one row for each index, as a graph has no values.

    An index that counts for nothing (padding) adds zeros to a row that counts.
    """
    indices, offsets, per_sample_weights, spec = bags
    rows = indices.reshape(-1).long()
    position = torch.arange(rows.shape[0], device=rows.device)
    counts = rows != spec.padding_idx
    if offsets is None:
        bag = position // max(indices.shape[1], 1)
    else:
        bag = torch.searchsorted(offsets.long(), position, right=True) - 1
        if spec.include_last_offset:
            counts = counts & (position < offsets[-1])
            bag = bag.clamp(max=grad.shape[0] - 1)
    factors = counts.to(grad.dtype)
    if spec.mode == MEAN:
        sizes = torch.zeros(grad.shape[0], dtype=torch.float32, device=grad.device)
        sizes = sizes.index_add(0, bag, counts.float()).clamp(min=1)
        grad = grad / sizes.unsqueeze(1).to(grad.dtype)
    if per_sample_weights is not None:
        factors = factors * per_sample_weights.reshape(-1)
    if rows.shape[0]:
        rows = torch.where(counts, rows, rows.index_select(0, counts.to(torch.uint8).argmax(0, keepdim=True)))
    values = grad.index_select(0, bag) * factors.unsqueeze(1)
    shape = [num_embeddings, grad.shape[1]]
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, check_invariants=False)


class _SparsePool(Pool):
    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, indices, offsets, per_sample_weights = ctx.saved_tensors
        grads = pool_backward(
            ctx, grad, _sparse_backward, weight, BagOperands(indices, offsets, per_sample_weights, ctx.spec)
        )
        return *grads, None, None, None, None


@torch.compiler.allow_in_graph
def pool(*operands: Any) -> torch.Tensor:
    """A call with a sparse gradient, which only the part of torch.compile behind its Python tracer knows."""
    return _SparsePool.apply(*operands, True)
