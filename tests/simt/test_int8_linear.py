"""The CUDA C++ int8_linear, emulated, against numpy's integers, and against the reference bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from int8_gpu_cases import NOT_VALID, SPOILED_ROWS, WRONG, layer, longest_rows, odd_rows
from support import named

import recsys_kernels as rk
from recsys_kernels.backends.registry import operators
from recsys_kernels.ops.linear.activation import DYNAMIC, NONE, RELU, STATIC, WEIGHT_ONLY
from recsys_kernels.testing import FLOAT_DTYPES, Int8Sample, assert_matches, expected_int8_linear, int8_linear_samples

from .support import BUILD, SEEDS, Emulation


def assert_same_bits(kernels: Emulation, sample: Int8Sample) -> None:
    ours, theirs = kernels.operator("int8_linear")(*sample.args), operators["int8_linear"].reference(*sample.args)
    assert ours.isnan().equal(theirs.isnan())
    assert ours.nan_to_num(0.5).equal(theirs.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:3], ids=str)
def test_samples(kernels: Emulation, dtype: torch.dtype) -> None:
    """All of them; the other types, and AddressSanitizer's slower build, are the same code, and take a part."""
    step = (1 if dtype == torch.float32 else 7) * (1 if BUILD == "checked" else 7)
    run = kernels.operator("int8_linear")
    for number, sample in enumerate(int8_linear_samples(dtype)[::step]):
        kernels.seed(SEEDS[number % len(SEEDS)])
        with named(sample):
            out = run(*sample.args)
            assert out.dtype == sample.dtype
            assert_matches(out, expected_int8_linear(sample))
            if sample.scheme != WEIGHT_ONLY and sample.activation == NONE and sample.bias is None:
                assert torch.equal(out, operators["int8_linear"].reference(*sample.args))


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
def test_same_integers_as_the_reference(kernels: Emulation, seed: int, scheme: int) -> None:
    """Each of the kernels, with and without 16-byte loads, and with rows that end within a piece."""
    kernels.seed(seed)
    for group in (0, 32, 64, 128):
        for rows, width, columns in ((1, 1, 1), (3, 544, 40), (18, 513, 33), (35, 192, 33), (70, 161, 130)):
            with named((group, rows, width, columns)):
                assert_same_bits(kernels, layer(rows, width, columns, scheme, group))


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
def test_odd_rows(kernels: Emulation, seed: int, scheme: int) -> None:
    kernels.seed(seed)
    sample = odd_rows(scheme)
    assert_same_bits(kernels, sample)
    # Of 36 rows the kernel for many.
    many = replace(sample, input=sample.input.repeat(3, 1), activation=RELU)
    out = kernels.operator("int8_linear")(*many.args)
    assert out.isnan().all(1).tolist() == [row in SPOILED_ROWS for row in range(12)] * 3
    assert not out[[0, 5, 9]].isnan().any()


def test_longest_rows(kernels: Emulation) -> None:
    assert_same_bits(kernels, longest_rows())


def test_static_numbers_that_are_not_valid(kernels: Emulation) -> None:
    for numbers in NOT_VALID:
        sample = replace(layer(3, 20, 5, STATIC), input_qparams=torch.tensor(numbers))
        assert kernels.operator("int8_linear")(*sample.args).isnan().all()


def test_wrong_arguments(kernels: Emulation) -> None:
    for name, change, words in WRONG:
        with named(name), pytest.raises(RuntimeError, match=words):
            kernels.operator("int8_linear")(*change(layer(3, 8, 5)).args)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:3], ids=str)
def test_alignments(kernels: Emulation, dtype: torch.dtype) -> None:
    """Inputs and weights that begin at any element, with rows any number of elements apart."""
    rng = torch.Generator().manual_seed(4)
    memory = torch.randn(2000, generator=rng).to(dtype)
    bytes_of_weights = torch.randint(-128, 128, (9000,), generator=rng, dtype=torch.int8)
    for scheme in (DYNAMIC, WEIGHT_ONLY):
        for start, stride in ((0, 80), (0, 84), (1, 72), (4, 96), (16, 73)):
            x = memory.as_strided((5, 72), (stride, 1), start)
            weight = bytes_of_weights.as_strided((20, 72), (stride, 1), start)
            sample = layer(5, 72, 20, scheme, input=x, weight=weight, dtype=dtype)
            with named((scheme, start, stride)):
                assert_matches(kernels.operator("int8_linear")(*sample.args), expected_int8_linear(sample))


@pytest.mark.parametrize("activation", ["dynamic", "weight_only"])
def test_modules(kernels: Emulation, activation: str) -> None:
    """Chains go layer by layer, and their gradients through the same operator."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.SiLU(), torch.nn.Linear(30, 3))
    mlp = rk.Int8MLP.from_float(plain, activation=activation)
    x = torch.randn(5, 40, requires_grad=True)

    def results() -> list[torch.Tensor]:
        out = mlp(x)
        return [mlp(x.detach()), out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])]

    # Not on packed layers, which only the CPU has: as on a GPU.
    with rk.backend("reference"):
        theirs = results()
        with kernels.active():
            ours = results()
    for a, b in zip(ours, theirs, strict=True):
        assert_matches(a, b)
