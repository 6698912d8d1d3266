"""The embedding bag with the signature and the errors of ``torch.nn.functional.embedding_bag``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import op
from .op import BagSpec
from .reference import MAX, MODES


def check_bags(input: torch.Tensor, offsets: torch.Tensor | None, per_sample_weights: torch.Tensor | None) -> None:
    """Raises the shape errors of ``torch.nn.functional.embedding_bag``."""
    if per_sample_weights is not None and input.shape != per_sample_weights.shape:
        raise ValueError(
            f"embedding_bag: per_sample_weights must have the shape of input ({tuple(input.shape)}), "
            f"but has shape {tuple(per_sample_weights.shape)}"
        )
    dim = input.dim()
    if dim == 1:
        if offsets is None:
            raise ValueError("embedding_bag: offsets must be a 1-D tensor when input is 1-D, but is None")
        if offsets.dim() != 1:
            raise ValueError(f"embedding_bag: offsets must be 1-D, but has {offsets.dim()} dimensions")
    elif dim != 2:
        raise ValueError(f"embedding_bag: input must be 1-D or 2-D, but has {dim} dimensions")
    elif offsets is not None:
        raise ValueError("embedding_bag: offsets must be None when input is 2-D, as each row is a bag")


def _bag_spec(mode: str, padding_idx: int | None, include_last_offset: bool, num_embeddings: int) -> BagSpec:
    if mode not in MODES:
        raise ValueError(f"embedding_bag: mode must be 'sum', 'mean' or 'max', but is {mode!r}")
    if padding_idx is None:
        return BagSpec(MODES[mode], -1, include_last_offset)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"embedding_bag: padding_idx must be within num_embeddings ({num_embeddings}), but is {padding_idx}"
        )
    return BagSpec(MODES[mode], padding_idx % num_embeddings, include_last_offset)


# One lookup of a request takes little longer than these checks.
_cached_bag_spec = lru_cache(maxsize=256)(_bag_spec)


def bag_spec(mode: str, padding_idx: int | None, include_last_offset: bool, num_embeddings: int) -> BagSpec:
    """Checks the arguments that are not tensors.

    Raises:
        ValueError: an unknown mode, or a padding_idx outside of [-num_embeddings, num_embeddings).
    """
    run = _bag_spec if torch.compiler.is_compiling() else _cached_bag_spec
    return run(mode, padding_idx, include_last_offset, num_embeddings)


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Sums, averages or takes the maximum of bags of embeddings, as ``torch.nn.functional.embedding_bag`` does.

    Args:
        input: int32 or int64 indices: [B, L], each row a bag, or [N] with ``offsets``, or a jagged nested tensor.
        weight: [num_embeddings, embedding_dim], float64, float32, float16 or bfloat16. 16-bit rows are summed in
            float32.
        offsets: int32 or int64 [B] (with ``include_last_offset`` [B + 1]): where each bag starts in a 1-D input.
        max_norm, norm_type, scale_grad_by_freq: no kernel serves them; such calls run through torch's own operator.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        sparse: the gradient of ``weight`` is a sparse tensor (not for ``"max"``).
        per_sample_weights: one factor an index, of the type of ``weight``, for ``"sum"`` and, beyond torch, for
            ``"mean"`` (the weighted sum over the bag's size, as in FBGEMM and TorchRec). Has a gradient.
        include_last_offset: ``offsets`` ends with the number of indices.
        padding_idx: rows with this index count for nothing and get no gradient; may be negative.

    Returns:
        [B, embedding_dim] of the type of ``weight``. Empty bags are zero.

    Raises:
        ValueError: shapes or options that do not fit together.
        RuntimeError: wrong types, or offsets that do not start at 0, decrease or exceed the number of indices.
        IndexError: an index that is not a row of ``weight``; names its position and value.
    """
    if has_torch_function_variadic(input, weight, offsets, per_sample_weights):
        tensors = (input, weight, offsets, per_sample_weights)
        rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return handle_torch_function(embedding_bag, tensors, input, weight, *rest, include_last_offset, padding_idx)
    if max_norm is not None or scale_grad_by_freq:
        rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return F.embedding_bag(input, weight, *rest, include_last_offset, padding_idx)
    if input.is_nested:
        if offsets is not None:
            raise ValueError("embedding_bag: offsets must be None when input is a nested tensor")
        input, offsets, include_last_offset = input.values(), cast(Any, input).offsets(), True
        if per_sample_weights is not None and per_sample_weights.is_nested:
            per_sample_weights = per_sample_weights.values()
    check_bags(input, offsets, per_sample_weights)
    if weight.dim() != 2:
        raise ValueError(f"embedding_bag: weight must be 2-D, but has {weight.dim()} dimensions")
    spec = bag_spec(mode, padding_idx, include_last_offset, weight.shape[0])
    if spec.mode == MAX and sparse:
        raise ValueError("embedding_bag: mode 'max' does not support sparse gradients")
    if per_sample_weights is not None:
        if spec.mode == MAX:
            raise NotImplementedError("embedding_bag: per_sample_weights need mode 'sum' or 'mean', not 'max'")
        if per_sample_weights.dtype != weight.dtype:
            raise RuntimeError(
                f"embedding_bag: per_sample_weights must have the type of weight ({weight.dtype}), "
                f"but is {per_sample_weights.dtype}"
            )
    return op.embedding_bag(weight, input, offsets, per_sample_weights, spec, sparse)
