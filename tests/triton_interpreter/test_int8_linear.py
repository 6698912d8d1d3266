"""The Triton kernels of int8_linear against numpy's integers, and against the reference bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_bad_input import guarded

import recsys_kernels as rk
from recsys_kernels.ops.int8_matmul import reference
from recsys_kernels.ops.int8_matmul import triton as kernels
from recsys_kernels.ops.int8_matmul.reference import DYNAMIC, RELU, STATIC, WEIGHT_ONLY
from recsys_kernels.testing import FLOAT_DTYPES, Int8Sample, assert_matches, expected_int8_linear, int8_linear_samples

# All kinds on few shapes, and of the rest, which are the same code, some.
SAMPLES = [
    sample
    for step, dtype in zip((19, 43, 43), FLOAT_DTYPES[:3], strict=True)
    for number, sample in enumerate(int8_linear_samples(dtype, small=True))
    if number % step == 0 or (step == 19 and sample.name.endswith(("-1", "-2")) and not sample.name[0].isdigit())
]


def layer(rows: int, width: int, columns: int, scheme: int = DYNAMIC, group: int = 0, **options: Any) -> Int8Sample:
    """Integers come out as they are: scales of weights are 1."""
    rng = torch.Generator().manual_seed(width + 3 * columns)
    return replace(
        Int8Sample(
            f"{rows}x{width}x{columns}-{scheme}-{group}",
            torch.randn(rows, width, generator=rng),
            torch.randint(-128, 128, (columns, width), generator=rng, dtype=torch.int8),
            torch.ones(columns, reference.num_groups(width, group)),
            group,
            None,
            torch.tensor([0.03, 117.0]) if scheme == STATIC else None,
            scheme,
        ),
        **options,
    )


def assert_same_bits(sample: Int8Sample) -> None:
    ours, theirs = kernels.int8_linear(*sample.args).cpu(), reference.int8_linear(*sample.args)
    assert ours.isnan().equal(theirs.isnan())
    assert ours.nan_to_num(0.5).equal(theirs.nan_to_num(0.5))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s}-{str(s.input.dtype)[6:]}")
def test_forward(sample: Int8Sample) -> None:
    out = kernels.int8_linear(*sample.args)
    assert out.dtype == sample.dtype
    assert_matches(out, expected_int8_linear(sample))


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_same_integers_as_the_reference(scheme: int, group: int) -> None:
    for rows, width, columns in ((1, 1, 1), (5, 130, 33), (17, 513, 20)):
        assert_same_bits(layer(rows, width, columns, scheme, group))


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
def test_odd_rows(scheme: int) -> None:
    """Constant, tiny and huge rows; NaN and infinity spoil their own row only."""
    nan, inf = float("nan"), float("inf")
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
    x[0], x[1], x[2] = 0.0, 3.0, -3.0
    x[3] *= 1e-42
    x[4] *= 1e-30
    x[5] *= 1e37
    x[6, 39], x[7, 0], x[8, 20] = nan, inf, -inf
    x[9, 0] = 1e30
    x[10] = torch.arange(40) * 0.5 - 10  # halves between two steps
    sample = layer(1, 40, 9, scheme)
    if scheme == STATIC:
        sample = replace(sample, input_qparams=torch.tensor([1.0, 100.0]))
    assert_same_bits(replace(sample, input=x))
    out = kernels.int8_linear(*replace(sample, input=x, activation=RELU).args).cpu()
    assert out.isnan().all(1).tolist() == [row in (6, 7, 8) for row in range(12)]
    assert not out[[0, 5, 9]].isnan().any()


def test_longest_rows() -> None:
    """Sums close to 2^31, and more than one block of a row."""
    sample = layer(2, 65536, 2)
    sample = replace(sample, input=torch.ones(2, 65536), weight=torch.full((2, 65536), -128, dtype=torch.int8))
    assert_same_bits(sample)


@pytest.mark.parametrize(("scale", "zero"), [(0.0, 3.0), (float("nan"), 3.0), (1.0, 0.5), (1.0, 256.0), (-1.0, 0.0)])
def test_static_numbers_that_are_not_valid(scale: float, zero: float) -> None:
    """The reference raises; a GPU's kernel, for which nobody waits, gives NaN."""
    sample = replace(layer(3, 20, 5, STATIC), input_qparams=torch.tensor([scale, zero]))
    with pytest.raises(RuntimeError, match="input_qparams"):
        reference.int8_linear(*sample.args)
    assert kernels.int8_linear(*sample.args).isnan().all()


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


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arguments(change: Callable[[Int8Sample], Int8Sample], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        kernels.int8_linear(*change(layer(3, 8, 5)).args)


@pytest.mark.parametrize("before", [False, True])
def test_reads_nothing_outside(before: bool) -> None:
    for scheme in (DYNAMIC, STATIC, WEIGHT_ONLY):
        for width, group in ((33, 0), (70, 64)):
            s = layer(3, width, 5, scheme, group)
            arguments = [guarded(t, before) if isinstance(t, torch.Tensor) else t for t in s.args]
            assert_matches(kernels.int8_linear(*arguments), expected_int8_linear(s))


def test_tune() -> None:
    """Each tile gives the right result, and the one that is measured as the fastest is used from then on."""
    for scheme, group in ((DYNAMIC, 0), (DYNAMIC, 32), (WEIGHT_ONLY, 128)):
        sample, seen = layer(17, 140, 40, scheme, group), []

        def measure(run: Callable[[], torch.Tensor], sample: Int8Sample = sample, seen: list[int] = seen) -> float:
            assert_matches(run(), expected_int8_linear(sample))
            seen.append(1)
            return 1.0 if len(seen) == 2 else 2.0

        usable = kernels.tiles(scheme, group, torch.float32)
        try:
            assert kernels.tune(*sample.args, measure=measure) == usable[1]
            assert len(seen) == len(usable) > 2
            assert kernels._tile(18, sample.weight, scheme, group, torch.float32) == usable[1]
            assert kernels._tile(300, sample.weight, scheme, group, torch.float32) == usable[0]
        finally:
            kernels._tuned.clear()


@pytest.mark.parametrize("activation", ["dynamic", "static", "weight_only"])
def test_modules(activation: str) -> None:
    """Layers and chains go layer by layer, and their gradients through the same operator."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.GELU(), torch.nn.Linear(30, 3))
    ranges = [(-4.0, 4.0), (-1.0, 4.0)] if activation == "static" else None
    mlp = rk.Int8MLP.from_float(plain, activation=activation, input_ranges=ranges)
    x = torch.randn(5, 40, requires_grad=True)
    results = []
    for backend in ("reference", "triton"):
        with rk.backend(backend):
            out = mlp(x)
            results.append([mlp(x.detach()), out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert_matches(ours, theirs)
