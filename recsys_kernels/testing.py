"""Sample inputs, tolerances and comparison, for this package's tests and for people who write kernels.

Every implementation of an operator sees the same samples, and they always hold the awkward cases: an empty batch,
empty bags, one row, one column, widths that no vector divides, repeated indices and offsets, both index types,
strided inputs, padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .ops.embedding_bag.samples import (  # noqa: F401  (part of this module's surface)
    WIDTHS,
    BagSample,
    CollectionSample,
    collection_samples,
    embedding_bag_samples,
    expected_embedding_bag,
)
from .ops.linear.int8.samples import (  # noqa: F401
    Int8Sample,
    expected_int8_linear,
    int8_linear_samples,
)
from .ops.linear.operands import (
    FLOATS,
)
from .ops.linear.samples import INT8_SHAPES  # noqa: F401
from .ops.linear.sparse.samples import (  # noqa: F401
    SPARSE_PATTERNS,
    SparseSample,
    expected_sparse_linear,
    sparse_linear_samples,
)

FLOAT_DTYPES = (*FLOATS, torch.float64)


@dataclass(frozen=True)
class Tolerance:
    """Allowed error, relative to the largest magnitude of the expected values; `measured` is the worst seen."""

    allowed: float
    measured: float


# Against float64 results rounded to the type, over all samples, ISA levels and backends.
TOLERANCES = {
    torch.float64: Tolerance(1e-14, 2.3e-15),
    # Lookups: 1.4e-6; the gradient of a row that occurs hundreds of times is the worst.
    torch.float32: Tolerance(6e-6, 3.9e-6),
    # Sums are taken in float32 and rounded once: half a unit in the last place, 2^-11 and 2^-8.
    torch.float16: Tolerance(1e-3, 4.9e-4),
    torch.bfloat16: Tolerance(8e-3, 5.0e-3),
}


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Asserts that a result has the expected shape and values, to the tolerance of its type.

    Args:
        actual: what a kernel gave.
        expected: what it should be, in any float type, best float64.
        dtype: the type whose tolerance counts; default: that of ``actual``.

    Raises:
        AssertionError: with the worst element, its position and the allowed error.
    """
    dtype = dtype or actual.dtype
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    allowed = TOLERANCES[dtype].allowed * max(1e-30, float(e.abs().nan_to_num(0.0).max()))
    error = (a - e).abs()
    error = torch.where(a.isnan() & e.isnan(), 0.0, error).nan_to_num(float("inf"))
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    assert error.flatten()[worst] <= allowed, (
        f"element {at} is {a.flatten()[worst]:.9g}, expected {e.flatten()[worst]:.9g}: off by "
        f"{error.flatten()[worst]:.3g}, allowed {allowed:.3g} ({dtype})"
    )
