"""What can be wrong with the state of a sparse layer that is to be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..activation import (
    MIN_SCALE,
)
from ..operands import (
    FLOATS,
)
from . import formats, reference
from .spec import block_shape


def wrong_state(
    found: Mapping[str, torch.Tensor],
    owns: Mapping[str, torch.Tensor | None],
    out_features: int,
    in_features: int,
    pattern: str,
) -> list[str]:
    """What is wrong with tensors that are to take the place of a layer's own."""
    pairs = ((name, given, own) for name, given in found.items() if (own := owns[name]) is not None)
    reasons = (wrong_tensor(name, given, own, in_features) for name, given, own in pairs)
    if wrong := [reason for reason in reasons if reason]:
        return wrong
    names = formats.Stored._fields
    if not any(name in found for name in names):
        return []
    stored = formats.Stored(*(found.get(name, owns[name]) for name in names))  # type: ignore[arg-type]
    return wrong_structure(stored, out_features, in_features, pattern)


def wrong_tensor(name: str, given: torch.Tensor, own: torch.Tensor, in_features: int) -> str | None:
    """What is wrong with a tensor, taken alone, or None. Most shapes are checked by torch."""
    if own.is_floating_point() and name in ("values", "bias"):
        return None if given.dtype in FLOATS else f"{name} must be float32, float16 or bfloat16, but is {given.dtype}"
    if given.dtype != own.dtype:  # torch would cast floats to meaningless integers
        return f"{name} must be {own.dtype}, but is {given.dtype}"
    if name == "weight_scale":  # of any granularity
        try:
            reference.scale_group(own.shape[0], in_features, given.shape)
        except RuntimeError as error:
            return str(error)
    if given.is_meta or name not in ("weight_scale", "input_qparams"):
        return None
    if not torch.isfinite(given).all():
        return f"{name} holds NaN or infinity"
    if name == "weight_scale":
        return None if (given > 0).all() else f"{name} must be positive"
    scale, zero_point = given.tolist() if given.shape == own.shape else (0.0, 0.0)
    # A layer without a range has the scale 0. Kernels refuse other scales below the least one.
    good = (scale == 0 or scale >= MIN_SCALE) and 0 <= zero_point <= 255 and zero_point == math.floor(zero_point)
    wanted = f"{name} must be a scale of at least {MIN_SCALE:g} and an integer from 0 to 255"
    return None if good else f"{wanted}, but is {(scale, zero_point)}"


def wrong_structure(stored: formats.Stored, out_features: int, in_features: int, pattern: str) -> list[str]:
    """What is wrong with the tensors of a layer that belong together."""
    values, crow, col = stored
    found = formats.pattern_name(values)
    if found != pattern:
        return [f"values are of the pattern {found!r}, but the layer's is {pattern!r},"]
    try:
        reference.check_structure(crow, col, out_features, in_features, *block_shape(values))
    except (IndexError, RuntimeError) as error:
        return [str(error)]
    shape = list(values.shape) if values.dim() == 2 else [values.shape[0]]
    wanted = [out_features, -(-in_features // 4) * 2] if values.dim() == 2 else [col.shape[0]]
    return [] if shape == wanted else [f"values must be of {wanted} weights or blocks, but are of {shape}"]
