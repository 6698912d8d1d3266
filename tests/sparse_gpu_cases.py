"""Calls of the sparse linear operators that every GPU backend is tested with, beside the operator's own samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import int8_gpu_cases
import torch

from recsys_kernels.ops.linear.activation import (
    DYNAMIC,
    STATIC,
    WEIGHT_ONLY,
)
from recsys_kernels.ops.linear.sparse.patterns import parse_pattern
from recsys_kernels.testing import SparseSample, assert_matches


def layer(
    rows: int,
    width: int,
    columns: int,
    pattern: str = "unstructured",
    scheme: int | None = None,
    group: int = 0,
    **options: Any,
) -> SparseSample:
    """A third of the blocks are kept. Without a scheme values are float32, else int8 and integers come out as they are:
    scales are 1. With a group so many columns share a scale, all of which are small."""
    rng, units = torch.Generator().manual_seed(width + 3 * columns), parse_pattern(pattern)
    if units.of:
        scores = torch.rand(columns, -(-width // 4) * 4, generator=rng)
        scores[:, width:] = -1.0  # two of what there is
        kept = scores.unflatten(1, (-1, 4)).argsort(2).argsort(2).flatten(1)[:, :width] >= 2
    else:
        kept = torch.rand(-(-columns // units.rows), -(-width // units.columns), generator=rng) < 0.35
        kept = kept.repeat_interleave(units.rows, 0).repeat_interleave(units.columns, 1)[:columns, :width]
    weight = torch.randint(-128, 128, (columns, width), generator=rng, dtype=torch.int8) * kept
    scale = torch.ones(columns)
    if group:
        scale = (torch.rand(columns, -(-width // group), generator=rng) + 0.5) / 128
    sample = SparseSample(
        f"{rows}x{width}x{columns}-{pattern}-{scheme}-{group}",
        torch.randn(rows, width, generator=rng),
        weight / 64.0 if scheme is None else weight,
        kept,
        pattern,
        None if scheme is None else scale,
        None,
        torch.tensor([0.03, 117.0]) if scheme == STATIC else None,
        WEIGHT_ONLY if scheme is None else scheme,
    )
    return replace(sample, **options)


def odd_rows(scheme: int, pattern: str, copies: int = 1, group: int = 0) -> SparseSample:
    """The rows of the int8 operator's, of which SPOILED_ROWS of each dozen hold NaN and infinity."""
    rows = int8_gpu_cases.odd_rows(scheme)
    options = {"input": rows.input.repeat(copies, 1), "input_qparams": rows.input_qparams}
    return layer(12 * copies, 40, 20, pattern, scheme, group, **options)


def assert_odd_rows(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Each row by its own size; of those with NaN all is NaN, also where no weight is kept."""
    assert out.isnan().all(1).equal(expected.isnan().all(1))
    finite = ~expected.isnan().all(1)
    assert not out[finite].isnan().any()
    size = expected[finite].abs().amax(1, keepdim=True).clamp(min=2.0**-126)
    assert_matches(out[finite] / size, (expected[finite] / size).double())


def longest_rows(rows: int) -> SparseSample:
    """Sums close to 2^31."""
    weight = torch.full((1, 65536), -128, dtype=torch.int8)
    sample = layer(1, 65536, 1, scheme=DYNAMIC, input=torch.ones(rows, 65536))
    return replace(sample, weight=weight, kept=torch.ones_like(weight, dtype=torch.bool))


def spoiled(rows: int, pattern: str, dtype: torch.dtype) -> SparseSample:
    """Float rows, each but the first with one number that is not finite; and weights of zero that are kept."""
    sample = layer(rows, 44, 36, pattern)
    x = sample.input.to(dtype)
    for row in range(1, rows):
        x[row, 7 * row % 44] = (float("nan"), float("inf"), -float("inf"))[row % 3]
    weight = torch.where(sample.weight.abs() < 0.3, 0.0, sample.weight)
    return replace(sample, input=x, weight=weight.to(dtype), dtype=dtype)


def expected_spoiled(sample: SparseSample) -> torch.Tensor:
    """Each kept weight times its number, in float64: what is not kept does not exist."""
    products = sample.input.double().unsqueeze(1) * sample.weight.double()
    return torch.where(sample.kept, products, 0.0).sum(2)


@dataclass(frozen=True)
class GradientCase:
    """One call of sparse_weight_gradient, and the float64 result."""

    name: str
    args: tuple[Any, ...]
    expected: torch.Tensor

    def __str__(self) -> str:
        return self.name


def gradient_case(rows: int, width: int, columns: int, pattern: str, dtype: torch.dtype) -> GradientCase:
    """The gradient is [rows, columns] in float32, as it is in training; the input and the result are of `dtype`."""
    sample = layer(rows, width, columns, pattern)
    rng = torch.Generator().manual_seed(rows)
    grad, x = torch.randn(rows, columns, generator=rng), torch.randn(rows, width, generator=rng).to(dtype)
    values, crow, col = sample.stored
    shape = values.shape[1:] if values.dim() == 3 else (0, 0) if values.dim() == 2 else (1, 1)
    dense = torch.where(sample.kept, grad.double().t() @ x.double(), 0.0)
    # Taken out of the matrix as the weights were.
    expected = replace(sample, weight=dense).stored[0]
    return GradientCase(f"{sample.name}-{dtype}", (grad, x, crow, col, *shape, dtype), expected)


def raw(rows: int, width: int, columns: int, block: tuple[int, int], dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Arguments of sparse_linear with blocks of any shape, every other one kept, and the float64 result."""
    (r, c), rng = block, torch.Generator().manual_seed(columns)
    down, across = -(-columns // r), -(-width // c)
    kept = (torch.arange(down).unsqueeze(1) + torch.arange(across)) % 2 == 0
    crow = torch.tensor([0, *kept.sum(1).cumsum(0).tolist()])
    col = kept.nonzero()[:, 1]
    # What lies past the end is no weight, whatever it holds.
    values = torch.full((col.shape[0], r, c), float("nan"), dtype=dtype)
    dense, x = torch.zeros(columns, width), torch.randn(rows, width, generator=rng)
    for number, (i, j) in enumerate(kept.nonzero().tolist()):
        part = dense[i * r : i * r + r, j * c : j * c + c]
        part.copy_(torch.randint(-9, 10, part.shape, generator=rng))
        values[number, : part.shape[0], : part.shape[1]] = part
    args = (x.to(dtype), values, crow, col, columns, width, None, None, None, WEIGHT_ONLY, 0, torch.float32)
    return args, x.to(dtype).double() @ dense.double().t()


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# Structures of 3 rows and 8 columns with 6 weights that checks refuse, and a GPU, where nobody looks, must survive.
WRONG_STRUCTURES: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "columns past the end": (int32(0, 2, 4, 6), int32(0, 8, 1, 2_000_000_000, 2, 9)),
    "negative columns": (int32(0, 2, 4, 6), int32(-1, 7, -2_000_000_000, 2, -8, 3)),
    "rows past the end": (int32(0, 2, 9, 2_000_000_000), int32(0, 1, 2, 3, 4, 5)),
    "negative rows": (int32(-5, 2, -2_000_000_000, 6), int32(0, 1, 2, 3, 4, 5)),
    "falling rows": (int32(6, 4, 2, 0), int32(0, 1, 2, 3, 4, 5)),
    "large numbers": (torch.tensor([0, 1 << 40, -(1 << 40), 6]), torch.tensor([0, 1 << 40, -(1 << 40), 3, 4, 1 << 33])),
}

# (name of the case, what is wrong with the arguments of a dynamic unstructured layer of 5 x 8, words of the error)
_AT = {"input": 0, "values": 1, "crow": 2, "col": 3, "n": 4, "k": 5, "scale": 6, "bias": 7, "qparams": 8, "scheme": 9,
       "activation": 10, "dtype": 11}  # fmt: skip


def _with(**changes: Callable[[Any], Any]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    def change(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(changes[name](args[at]) if name in changes else args[at] for name, at in _AT.items())

    return change


WRONG: list[tuple[str, Callable[[tuple[Any, ...]], tuple[Any, ...]], str]] = [
    ("input type", _with(input=lambda x: x.double()), "input must be float32"),
    ("input width", _with(input=lambda x: x[:, :7]), "8, but is 7|last dimension"),
    ("no dimension", _with(input=lambda x: torch.tensor(1.0)), "at least 1 dimension"),
    ("values type", _with(values=lambda v: v.int()), "values must be float32"),
    ("values dimensions", _with(values=lambda v: v.reshape(1, 1, 1, -1)), "values must have 1, 2 or 3 dimensions"),
    ("number of values", _with(values=lambda v: v[1:]), "values must have as many elements"),
    ("number of rows", _with(crow=lambda c: c[1:]), "crow_indices must have 6 values, but has 5"),
    ("rows type", _with(crow=lambda c: c.float()), "crow_indices must be int32 or int64"),
    ("columns type", _with(col=lambda c: c.short()), "col_indices must be int32 or int64"),
    ("no rows", _with(n=lambda n: 0), "out_features must be 1 to"),
    ("too many columns", _with(k=lambda k: 65537), "at most 65536 inputs"),
    ("no scales", _with(scale=lambda s: None), "weight_scale belongs to int8 values"),
    ("scales", _with(scale=lambda s: torch.ones(4)), "weight_scale must have 5"),
    ("groups of scales", _with(scale=lambda s: torch.ones(5, 2)), "weight_scale must have 5 values, but has shape"),
    ("type of scales", _with(scale=lambda s: s.double()), "weight_scale must be float32"),
    ("bias", _with(bias=lambda b: torch.ones(4)), "bias must have 5"),
    ("type of bias", _with(bias=lambda b: torch.ones(5, dtype=torch.int32)), "bias must be float32"),
    ("no qparams", _with(scheme=lambda s: STATIC), "input_qparams"),
    ("qparams", _with(qparams=lambda q: torch.ones(2)), "input_qparams"),
    ("scheme", _with(scheme=lambda s: 3), "scheme must be 0"),
    ("activation", _with(activation=lambda a: 5), "activation must be 0"),
    ("output type", _with(dtype=lambda d: torch.float64), "dtype must be float32"),
    ("scheme of floats", _with(values=lambda v: v.float(), scale=lambda s: None), "float values take scheme 2"),
]
