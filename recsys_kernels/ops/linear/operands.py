"""What the operands of linear layers share: limits and checks."""

from __future__ import annotations

import math

import torch

from .activation import EPILOGUES, MIN_SCALE, SCHEMES, STATIC

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Columns of K that can share a scale.
GROUPS = (32, 64, 128)
# 255 * 128 * 65536 < 2^31: no sum of a row overflows int32.
MAX_IN_FEATURES = 1 << 16


def num_groups(in_features: int, group: int) -> int:
    """Scales of an output channel, where ``group`` columns share a scale; 0: all columns do."""
    return 1 if group == 0 else -(-in_features // group)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check(good: bool, message: str) -> None:
    """RuntimeError with this message, unless all is good."""
    if not good:
        raise RuntimeError(message)


def check_qparams(scale: float, zero_point: float) -> tuple[float, float]:
    """The scale and zero point of static activations, if they are possible ones; else RuntimeError that names them."""
    # Below, the reciprocal leaves float32; dynamic scales are never smaller either.
    check(
        MIN_SCALE <= scale < math.inf,
        f"the scale of the activations (input_qparams[0]) must be finite and at least 2^-100, but is {scale}",
    )
    check(
        0 <= zero_point <= 255 and zero_point == int(zero_point),
        f"the zero point of the activations (input_qparams[1]) must be an integer from 0 to 255, but is {zero_point}",
    )
    return scale, zero_point


def check_options(scheme: int, activation: int) -> None:
    """RuntimeError where an operator's number for a scheme or an activation function is none of those above."""
    check(scheme in SCHEMES.values(), f"scheme must be 0 (dynamic), 1 (static) or 2 (weight_only), but is {scheme}")
    check(
        activation in EPILOGUES.values(),
        f"activation must be 0 (none), 1 (relu), 2 (gelu), 3 (sigmoid) or 4 (silu), but is {activation}",
    )


def check_input_qparams(input_qparams: torch.Tensor | None, scheme: int) -> tuple[float, float] | None:
    """Scale and zero point of a static layer."""
    check(
        (scheme == STATIC) == (input_qparams is not None),
        "input_qparams (scale and zero point) belong to scheme 1 (static), and to no other",
    )
    if input_qparams is None:
        return None
    check(input_qparams.dtype == torch.float32, f"input_qparams must be float32, but is {input_qparams.dtype}")
    check(input_qparams.shape == (2,), f"input_qparams must have shape (2,), but has {tuple(input_qparams.shape)}")
    return check_qparams(*input_qparams.tolist())


def check_floats(input: torch.Tensor, dtype: torch.dtype) -> None:
    """RuntimeError where the type of the input or of the result is none of FLOATS."""
    check(input.dtype in FLOATS, f"input must be float32, float16 or bfloat16, but is {input.dtype}")
    check(dtype in FLOATS, f"dtype must be float32, float16 or bfloat16, but is {dtype}")


def check_width(input: torch.Tensor, in_features: int, out_features: int) -> None:
    """RuntimeError where input [..., K] does not fit a weight [out_features, in_features]."""
    check(
        input.shape[-1] == in_features,
        f"input of shape {tuple(input.shape)} does not fit a weight of shape ({out_features}, {in_features}): "
        f"its last dimension must be {in_features}, but is {input.shape[-1]}",
    )
