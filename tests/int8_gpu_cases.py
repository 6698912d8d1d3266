"""Calls of int8_linear that every GPU backend is tested with, beside the operator's own samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from recsys_kernels.ops.linear.activation import DYNAMIC, STATIC
from recsys_kernels.ops.linear.operands import (
    num_groups,
)
from recsys_kernels.testing import Int8Sample


def layer(rows: int, width: int, columns: int, scheme: int = DYNAMIC, group: int = 0, **options: Any) -> Int8Sample:
    """Integers come out as they are: scales of weights are 1."""
    rng = torch.Generator().manual_seed(width + 3 * columns)
    return replace(
        Int8Sample(
            f"{rows}x{width}x{columns}-{scheme}-{group}",
            torch.randn(rows, width, generator=rng),
            torch.randint(-128, 128, (columns, width), generator=rng, dtype=torch.int8),
            torch.ones(columns, num_groups(width, group)),
            group,
            None,
            torch.tensor([0.03, 117.0]) if scheme == STATIC else None,
            scheme,
        ),
        **options,
    )


def odd_rows(scheme: int) -> Int8Sample:
    """Constant, tiny and huge rows, and the three of SPOILED_ROWS with NaN and infinity."""
    nan, inf = float("nan"), float("inf")
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    x[0], x[1], x[2] = 0.0, 3.0, -3.0
    x[3] *= 1e-42
    x[4] *= 1e-30
    x[5] *= 1e35
    x[6, 39], x[7, 0], x[8, 20] = nan, inf, -inf
    x[9, 0] = 1e30
    x[10] = torch.arange(40) * 0.5 - 10  # halves between two steps
    sample = layer(12, 40, 9, scheme, input=x)
    return replace(sample, input_qparams=torch.tensor([1.0, 100.0])) if scheme == STATIC else sample


SPOILED_ROWS = (6, 7, 8)


def longest_rows() -> Int8Sample:
    """Sums close to 2^31."""
    weight = torch.full((2, 65536), -128, dtype=torch.int8)
    return layer(2, 65536, 2, input=torch.ones(2, 65536), weight=weight)


# Scales and zero points for the scheme static that the reference refuses.
NOT_VALID = ((0.0, 3.0), (float("nan"), 3.0), (1.0, 0.5), (1.0, 256.0), (-1.0, 0.0))

# (name of the case, what is wrong, words of the error)
WRONG: list[tuple[str, Callable[[Int8Sample], Int8Sample], str]] = [
    ("input type", lambda s: replace(s, input=s.input.double()), "input must be float32"),
    ("input width", lambda s: replace(s, input=s.input[:, :7]), "8, but is 7|last dimension"),
    ("no dimension", lambda s: replace(s, input=torch.tensor(1.0)), "at least 1 dimension|last dimension"),
    ("weight type", lambda s: replace(s, weight=s.weight.int()), "weight must be int8"),
    ("scales", lambda s: replace(s, weight_scale=torch.ones(4, 1)), "weight_scale must have shape"),
    ("type of scales", lambda s: replace(s, weight_scale=torch.ones(5, 1).double()), "weight_scale must be float32"),
    ("group", lambda s: replace(s, group=16), "group must be 0"),
    ("bias", lambda s: replace(s, bias=torch.ones(4)), "bias must have"),
    ("no qparams", lambda s: replace(s, scheme=STATIC), "input_qparams"),
    ("qparams", lambda s: replace(s, input_qparams=torch.ones(2)), "input_qparams"),
    ("scheme", lambda s: replace(s, scheme=3), "scheme must be 0"),
    ("activation", lambda s: replace(s, activation=5), "activation must be 0"),
    ("output type", lambda s: replace(s, dtype=torch.float64), "dtype must be float32"),
]
