"""The embedding bag with the signature and the errors of ``torch.nn.functional.embedding_bag``."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd
from .reference import MAX, MODES
from .spec import BagSpec

# torch's own, also where a program has put this module's function in its place.
_torch_embedding_bag = F.embedding_bag


NO_WEIGHTED_MAX = "embedding_bag: per_sample_weights are only supported for mode='sum' and mode='mean', not for 'max'"


class PaddingIndexError(RuntimeError, ValueError):
    """A padding_idx that is no row of the table: torch raises ``RuntimeError`` for it."""


def check_tensors(**tensors: Any) -> None:
    """Raises ``TypeError`` for a value that is no tensor. Called after a failure only, as tensors are the rule."""
    for name, value in tensors.items():
        if value is None or isinstance(value, torch.Tensor):
            continue
        hint = (
            f": torch.as_tensor({name}) makes one"
            if isinstance(value, (list, tuple)) or hasattr(value, "shape")
            else ""
        )
        raise TypeError(f"embedding_bag: {name} must be a tensor, but is of type {type(value).__name__}{hint}")


def check_bags(input: torch.Tensor, offsets: torch.Tensor | None, per_sample_weights: torch.Tensor | None) -> None:
    """Raises the shape errors of ``torch.nn.functional.embedding_bag``."""
    if per_sample_weights is not None and input.shape != per_sample_weights.shape:
        raise ValueError(
            f"embedding_bag: per_sample_weights must have the same shape as the input ({tuple(input.shape)}), "
            f"but has shape {tuple(per_sample_weights.shape)}"
        )
    dim = input.dim()
    if dim == 1:
        if offsets is None:
            raise ValueError(
                "embedding_bag: offsets has to be a 1D Tensor when input is 1D, but got None: offsets say where each "
                "bag starts; without them input has to be 2D, and each of its rows is a bag"
            )
        if offsets.dim() != 1:
            raise ValueError(f"embedding_bag: offsets has to be a 1D Tensor, but has {offsets.dim()} dimensions")
    elif dim != 2:
        raise ValueError(f"embedding_bag: input has to be 1D or 2D Tensor, but has {dim} dimensions")
    elif offsets is not None:
        raise ValueError("embedding_bag: offsets must be None when input is 2D, as each row is a bag")


def _bag_spec(mode: str, padding_idx: int | None, include_last_offset: bool, num_embeddings: int) -> BagSpec:
    if mode not in MODES:
        raise ValueError(f"embedding_bag: mode must be 'sum', 'mean' or 'max', but is {mode!r}")
    if padding_idx is None:
        return BagSpec(MODES[mode], -1, include_last_offset)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise PaddingIndexError(
            f"embedding_bag: padding_idx must be within the number of embeddings ({num_embeddings}), "
            f"but is {padding_idx}"
        )
    return BagSpec(MODES[mode], padding_idx % num_embeddings, include_last_offset)


# One lookup of a request takes little longer than these checks.
cached_bag_spec = lru_cache(maxsize=256)(_bag_spec)


def bag_spec(mode: str, padding_idx: int | None, include_last_offset: bool, num_embeddings: int) -> BagSpec:
    """Checks the arguments that are not tensors.

    Raises:
        ValueError: an unknown mode.
        PaddingIndexError: a padding_idx outside of [-num_embeddings, num_embeddings).
    """
    run = _bag_spec if torch.compiler.is_compiling() else cached_bag_spec
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
            As in torch, smaller integers are taken beside offsets of one of these types, and the other way round.
        weight: [num_embeddings, embedding_dim], float64, float32, float16 or bfloat16. 16-bit rows are summed in
            float32.
        offsets: int32 or int64 [B] (with ``include_last_offset`` [B + 1]): where each bag starts in a 1-D input.
        max_norm, norm_type, scale_grad_by_freq: no kernel serves them; such calls run through torch's own operator.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        sparse: the gradient of ``weight`` is a sparse tensor (not for ``"max"``).
        per_sample_weights: one factor an index, of the type of ``weight``, for ``"sum"`` and, beyond torch, for
            ``"mean"`` (the weighted sum over the bag's size, as in FBGEMM and TorchRec). Has a gradient.
        include_last_offset: ``offsets`` has one more entry, the end of the last bag, which is the number of indices.
            If it is less, the indices behind it belong to no bag. (torch then depends on its options: its last bag may
            end there or take the rest.)
        padding_idx: rows with this index count for nothing and get no gradient; may be negative.

    Returns:
        [B, embedding_dim] of the type of ``weight``. Empty bags are zero.

    Raises:
        ValueError: shapes or options that do not fit together.
        RuntimeError: wrong types, tensors on several devices, a padding_idx that is not a row of ``weight``, or offsets
            that do not start at 0, decrease or exceed the number of indices.
        IndexError: an index that is not a row of ``weight``; names its position and value. The class is a
            ``RuntimeError``, too, as torch raises one. (In a compiled graph a native kernel raises a plain
            ``IndexError``.)
        TypeError: lists or arrays in the place of tensors.
    """
    try:
        if has_torch_function_variadic(input, weight, offsets, per_sample_weights):
            tensors = (input, weight, offsets, per_sample_weights)
            rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
            return handle_torch_function(embedding_bag, tensors, input, weight, *rest, include_last_offset, padding_idx)
        if max_norm is not None or scale_grad_by_freq:
            if input.is_meta != weight.is_meta:  # torch gives memory that nobody filled
                names = ("input", "weight") if input.is_meta else ("weight", "input")
                raise RuntimeError(f"{names[0]} is on the meta device, which holds no values, but {names[1]} is not")
            rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
            return _torch_embedding_bag(input, weight, *rest, include_last_offset, padding_idx)
        ids, bounds, samples = input, offsets, per_sample_weights
        if input.is_nested:
            if offsets is not None:
                raise ValueError("embedding_bag: offsets must be None when input is a nested tensor")
            ids, bounds, include_last_offset = input.values(), cast(Any, input).offsets(), True
            if samples is not None and samples.is_nested:
                samples = samples.values()
        check_bags(ids, bounds, samples)
        if weight.dim() != 2:
            raise ValueError(f"embedding_bag: weight has to be a 2D Tensor, but has {weight.dim()} dimensions")
        compiling = torch.compiler.is_compiling()
        spec = (_bag_spec if compiling else cached_bag_spec)(mode, padding_idx, include_last_offset, weight.shape[0])
        if sparse or samples is not None:
            _check_options(spec, sparse, weight, samples)
        if compiling:
            ids, bounds = autograd.as_index_types(ids, bounds)  # a graph cannot find out at run time
        return autograd.embedding_bag(weight, ids, bounds, samples, spec, sparse)
    except AttributeError:
        check_tensors(input=input, weight=weight, offsets=offsets, per_sample_weights=per_sample_weights)
        raise
    except (ValueError, RuntimeError):
        if weight.dtype != torch.int64 or not input.is_floating_point():
            raise
    # The call that failed has the order of torch 0.3, which torch still takes.
    warnings.warn(
        "embedding_bag takes (input, weight, ...): the order (weight, input, ...) is deprecated, as in torch",
        stacklevel=2,
    )
    rest = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
    return embedding_bag(weight, input, *rest, include_last_offset, padding_idx)


def _check_options(spec: BagSpec, sparse: bool, weight: torch.Tensor, per_sample_weights: torch.Tensor | None) -> None:
    if spec.mode == MAX and sparse:
        raise ValueError("embedding_bag: mode 'max' does not support sparse gradients")
    if per_sample_weights is None:
        return
    if spec.mode == MAX:
        raise NotImplementedError(NO_WEIGHTED_MAX)
    if per_sample_weights.dtype != weight.dtype:
        raise RuntimeError(
            f"embedding_bag: per_sample_weights must have the same type as weight ({weight.dtype}), "
            f"but is {per_sample_weights.dtype}"
        )
