"""Shapes of sample inputs of the linear operators, and the parts of their expected results that all of them share."""

from __future__ import annotations

import numpy as np
import torch

# Rows, in_features and out_features: single ones, sizes that no register tile or cache line divides, several tiles.
INT8_SHAPES = (
    (7, 415, 333),
    (3, 17, 5),
    (16, 200, 40),
    (1, 1, 1),
    (1, 7, 1),
    (2, 1, 17),
    (5, 1, 1),
    (1, 512, 96),
    (33, 130, 48),
    (0, 20, 6),
    (64, 4, 100),
    (5, 300, 15),
    (130, 67, 33),
)


def finished(sums: np.ndarray, bias: torch.Tensor | None, activation: int) -> torch.Tensor:
    """Bias and function of a linear layer, in float64 [M, N]."""
    y = torch.from_numpy(sums)
    if bias is not None:
        y += bias.double()
    functions = (
        lambda y: y,
        torch.relu,
        lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
        lambda y: 1 / (1 + torch.exp(-y)),
        lambda y: y / (1 + torch.exp(-y)),
    )
    return functions[activation](y)


def quantized_by_numpy(values: np.ndarray, qparams: torch.Tensor | None) -> tuple[np.ndarray, float]:
    """One row as integers without their zero point, int64, and the scale."""
    if qparams is None:
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        step = np.float32(1 / 255)
        scale = max(high * step - low * step, np.float32(2.0**-100))
        zero_point = min(max(np.rint(-low * (np.float32(1) / scale)), np.float32(0)), np.float32(255))
    else:
        scale, zero_point = qparams.numpy()
    steps = values * (np.float32(1) / scale)
    return np.rint(np.clip(steps, -zero_point, 255 - zero_point)).astype(np.int64), float(scale)
