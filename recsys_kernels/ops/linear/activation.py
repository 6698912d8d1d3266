"""How linear layers take their input and what they apply to their result: names, numbers and arithmetic.

The numbers are those of the kernels (``csrc/linear/types.h``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

DYNAMIC, STATIC, WEIGHT_ONLY = 0, 1, 2
SCHEMES = {"dynamic": DYNAMIC, "static": STATIC, "weight_only": WEIGHT_ONLY}
NONE, RELU, GELU, SIGMOID, SILU = 0, 1, 2, 3, 4
EPILOGUES: dict[str | None, int] = {None: NONE, "relu": RELU, "gelu": GELU, "sigmoid": SIGMOID, "silu": SILU}
# Below it the reciprocal of a scale, or a product of two scales, would leave float32's range.
MIN_SCALE = 2.0**-100


def scheme_number(activation: str) -> int:
    """The operators' number for a treatment of activations."""
    if activation not in SCHEMES:
        hint = f" (a function to apply is epilogue={activation!r})" if activation in EPILOGUES else ""
        raise ValueError(f"activation must be 'dynamic', 'static' or 'weight_only', but is {activation!r}{hint}")
    return SCHEMES[activation]


def epilogue_number(epilogue: str | None) -> int:
    """The operators' number for a function that is applied to the result."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be None, 'relu', 'gelu', 'sigmoid' or 'silu', but is {epilogue!r}")
    return EPILOGUES[epilogue]


def range_qparams(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that map [low, high], float32 and containing 0, to 0 ... 255."""
    step = 1.0 / 255.0
    scale = (high * step - low * step).clamp(min=MIN_SCALE)
    zero_point = torch.round(-low * scale.reciprocal()).clamp(0.0, 255.0)
    return scale, zero_point


def quantize_rows(
    x: torch.Tensor, qparams: tuple[float, float] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes finite float32 rows [M, K] to 0 ... 255, with ranges of their own or (static) with one for all.

    Returns:
        float32 [M, K] of integers, and their scales and zero points [M, 1].
    """
    if qparams is None:
        scale, zero_point = range_qparams(
            x.amin(1, keepdim=True).clamp(max=0.0), x.amax(1, keepdim=True).clamp(min=0.0)
        )
    else:
        scale, zero_point = (x.new_full((x.shape[0], 1), value) for value in qparams)
    q = torch.maximum(x * scale.reciprocal(), -zero_point)
    return torch.round(torch.minimum(q, 255.0 - zero_point)) + zero_point, scale, zero_point


def activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    """Applies a function to float32 values."""
    if activation == RELU:
        return F.relu(x)
    if activation == GELU:
        return x * 0.5 * torch.erfc(x * -math.sqrt(0.5))  # F.gelu is off by 1e-6 on the CPU
    if activation == SIGMOID:
        return torch.sigmoid(x)
    return F.silu(x) if activation == SILU else x


def input_qparams(low: float, high: float) -> torch.Tensor:
    """Scale and zero point of a range of activations, float32 [2].

    Raises:
        ValueError: not a range.
    """
    ends = torch.tensor([low, high], dtype=torch.float32)
    if not (low < high and bool(torch.isfinite(ends).all())):
        raise ValueError(f"input_range must be (low, high) with low < high, both finite, but is {(low, high)}")
    scale, zero_point = range_qparams(ends[0].clamp(max=0.0), ends[1].clamp(min=0.0))
    return torch.stack([scale, zero_point])
