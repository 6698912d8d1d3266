"""What the operators of linear layers share, as ``csrc/linear/types.h`` does for their kernels.

Names and numbers of options, quantization of activations to 8 bits, functions that are applied to a result, and what
their modules have in common.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

DYNAMIC, STATIC, WEIGHT_ONLY = 0, 1, 2
SCHEMES = {"dynamic": DYNAMIC, "static": STATIC, "weight_only": WEIGHT_ONLY}
NONE, RELU, GELU, SIGMOID, SILU = 0, 1, 2, 3, 4
EPILOGUES: dict[str | None, int] = {None: NONE, "relu": RELU, "gelu": GELU, "sigmoid": SIGMOID, "silu": SILU}
MODULES: dict[str, type[torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "sigmoid": torch.nn.Sigmoid,
    "silu": torch.nn.SiLU,
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Columns of K that can share a scale.
GROUPS = (32, 64, 128)
# 255 * 128 * 65536 < 2^31: no sum of a row overflows int32.
MAX_IN_FEATURES = 1 << 16
# Below it the reciprocal of a scale, or a product of two scales, would leave float32's range.
MIN_SCALE = 2.0**-100


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


# ---- arithmetic -----------------------------------------------------------------------------------------------------


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


# ---- modules --------------------------------------------------------------------------------------------------------


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


def output_type(dtype: torch.dtype, layer: str = "an int8 layer") -> torch.dtype:
    """A type that layers give, checked."""
    if dtype not in FLOATS:
        raise ValueError(f"{layer} gives float32, float16 or bfloat16, but dtype is {dtype}")
    return dtype


class FixedTypes(torch.nn.Module):
    """A module whose tensors keep their types: casts choose that of its output, ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = output_type(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .half() and .to(dtype) choose the type of the output; the stored tensors have types of their own.
        dtype = output_type(fn(torch.empty(0, dtype=self.dtype)).dtype)

        def keep_type(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(keep_type, recurse)
        self.dtype = dtype
        return self
