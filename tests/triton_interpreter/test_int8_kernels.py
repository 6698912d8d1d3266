"""The Triton kernels of int8_linear against numpy's integers, and against the reference bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from int8_gpu_cases import NOT_VALID, SPOILED_ROWS, WRONG, layer, longest_rows, odd_rows
from support import REFERENCE, TRITON
from test_bad_input import guarded

import recsys_kernels as rk
from recsys_kernels.ops.linear.activation import DYNAMIC, RELU, STATIC, WEIGHT_ONLY
from recsys_kernels.ops.linear.int8 import triton as kernels
from recsys_kernels.testing import FLOAT_DTYPES, Int8Sample, assert_matches, expected_int8_linear, int8_linear_samples

# All kinds on few shapes, and of the rest, which are the same code, some.
SAMPLES = [
    sample
    for step, dtype in zip((19, 43, 43), FLOAT_DTYPES[:3], strict=True)
    for number, sample in enumerate(int8_linear_samples(dtype, small=True))
    if number % step == 0 or (step == 19 and sample.name.endswith(("-1", "-2")) and not sample.name[0].isdigit())
]


def assert_same_bits(sample: Int8Sample) -> None:
    ours, theirs = TRITON.int8_linear(*sample.args), REFERENCE.int8_linear(*sample.args)
    assert ours.isnan().equal(theirs.isnan())
    assert ours.nan_to_num(0.5).equal(theirs.nan_to_num(0.5))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s}-{str(s.input.dtype)[6:]}")
def test_forward(sample: Int8Sample) -> None:
    out = TRITON.int8_linear(*sample.args)
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
    sample = odd_rows(scheme)
    assert_same_bits(sample)
    out = TRITON.int8_linear(*replace(sample, activation=RELU).args)
    assert out.isnan().all(1).tolist() == [row in SPOILED_ROWS for row in range(12)]
    assert not out[[0, 5, 9]].isnan().any()


def test_longest_rows() -> None:
    assert_same_bits(longest_rows())


@pytest.mark.parametrize(("scale", "zero"), NOT_VALID)
def test_static_numbers_that_are_not_valid(scale: float, zero: float) -> None:
    """The reference raises; a GPU's kernel, for which nobody waits, gives NaN."""
    sample = replace(layer(3, 20, 5, STATIC), input_qparams=torch.tensor([scale, zero]))
    with pytest.raises(RuntimeError, match="input_qparams"):
        REFERENCE.int8_linear(*sample.args)
    assert TRITON.int8_linear(*sample.args).isnan().all()


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arguments(change: Callable[[Int8Sample], Int8Sample], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        TRITON.int8_linear(*change(layer(3, 8, 5)).args)


@pytest.mark.parametrize("before", [False, True])
def test_reads_nothing_outside(before: bool) -> None:
    for scheme in (DYNAMIC, STATIC, WEIGHT_ONLY):
        for width, group in ((33, 0), (70, 64)):
            s = layer(3, width, 5, scheme, group)
            arguments = [guarded(t, before) if isinstance(t, torch.Tensor) else t for t in s.args]
            assert_matches(TRITON.int8_linear(*arguments), expected_int8_linear(s))


def test_default_tiles() -> None:
    """Wide where that fills a GPU, and no more rows than twice those that there are."""

    def chosen(rows: int, columns: int) -> tuple[int, int]:
        return kernels.default_tile(rows, columns, DYNAMIC, 0, torch.float32)[:2]

    assert [chosen(1, columns) for columns in (512, 8192)] == [(16, 32), (16, 64)]
    assert [chosen(rows, 8192) for rows in (16, 17, 33, 65)] == [(16, 64), (32, 64), (64, 64), (128, 64)]
    assert [chosen(4096, columns) for columns in (64, 1024)] == [(32, 64), (128, 64)]


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
            assert kernels.tune(sample.input, sample.layer, sample.dtype, measure=measure) == usable[1]
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
