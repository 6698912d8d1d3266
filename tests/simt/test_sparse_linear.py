"""The CUDA C++ sparse linear operators, emulated, against numpy, and against the reference's integers bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from int8_gpu_cases import NOT_VALID, SPOILED_ROWS
from sparse_gpu_cases import (
    WRONG,
    WRONG_STRUCTURES,
    assert_odd_rows,
    expected_spoiled,
    gradient_case,
    int32,
    layer,
    longest_rows,
    odd_rows,
    raw,
    spoiled,
)
from support import named

import recsys_kernels as rk
from recsys_kernels.backends.registry import operators
from recsys_kernels.ops.linear.activation import (
    DYNAMIC,
    RELU,
    STATIC,
    WEIGHT_ONLY,
)
from recsys_kernels.testing import (
    FLOAT_DTYPES,
    SPARSE_PATTERNS,
    SparseSample,
    assert_matches,
    expected_sparse_linear,
    sparse_linear_samples,
)

from .support import BUILD, SEEDS, Emulation

F32, F16, BF16 = FLOAT_DTYPES[:3]
# Up to 16 rows there is one kernel, for more another, whose lanes are 8, 16 or 32 a group. Single columns have more
# units than a group of lanes at once.
SHAPES = ((1, 1, 1), (3, 300, 21), (17, 41, 22), (40, 20, 37), (133, 19, 5))


def assert_same_bits(kernels: Emulation, sample: SparseSample) -> None:
    ours, theirs = kernels.operator("sparse_linear")(*sample.args), operators["sparse_linear"].reference(*sample.args)
    assert ours.isnan().equal(theirs.isnan())
    assert ours.nan_to_num(0.5).equal(theirs.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:3], ids=str)
def test_samples(kernels: Emulation, dtype: torch.dtype) -> None:
    """All of them; the other types, and AddressSanitizer's slower build, are the same code, and take a part."""
    samples = sparse_linear_samples(dtype)
    step = (1 if dtype == F32 else 5) * (1 if BUILD == "checked" else 3)
    for number, sample in enumerate(samples):
        if number % step and not sample.name.startswith("to-"):
            continue
        kernels.seed(SEEDS[number % len(SEEDS)])
        with named(sample):
            out = kernels.operator("sparse_linear")(*sample.args)
            assert out.dtype == sample.dtype
            assert_matches(out, expected_sparse_linear(sample))


@pytest.mark.parametrize("pattern", SPARSE_PATTERNS)
def test_every_kernel(kernels: Emulation, seed: int, pattern: str) -> None:
    kernels.seed(seed)
    for number, (rows, width, columns) in enumerate(SHAPES):
        with named((rows, width, columns)):
            assert_same_bits(kernels, layer(rows, width, columns, pattern, (DYNAMIC, STATIC)[number % 2]))
            for scheme in (None, WEIGHT_ONLY)[number % 2 :]:
                sample = layer(rows, width, columns, pattern, scheme)
                assert_matches(kernels.operator("sparse_linear")(*sample.args), expected_sparse_linear(sample))


@pytest.mark.parametrize("scheme", [None, STATIC])
def test_rows_in_parts(kernels: Emulation, scheme: int | None) -> None:
    """Of rows as long as these 128 are transposed at a time; here three are left, which are few."""
    sample = layer(131, 32800, 3, "unstructured", scheme)
    few = (torch.arange(32800) % 1000 == 7) & sample.kept
    sample = replace(sample, weight=sample.weight * few, kept=few)
    out = kernels.operator("sparse_linear")(*sample.args)
    assert_matches(out, expected_sparse_linear(sample))


def test_types_that_differ(kernels: Emulation) -> None:
    """Of input, values, bias and result; none is rounded to a narrower one."""
    for number, of_values in enumerate(FLOAT_DTYPES[:3]):
        of_input, of_bias = FLOAT_DTYPES[(number + 1) % 3], FLOAT_DTYPES[(number + 2) % 3]
        for rows, pattern in ((3, "unstructured"), (3, "block4x1"), (18, "block4x4"), (18, "2:4")):
            sample = layer(rows, 45, 20, pattern, bias=torch.linspace(-1, 1, 20).to(of_bias))
            sample = replace(sample, weight=sample.weight.to(of_values), input=sample.input.to(of_input))
            with named((of_values, rows, pattern)):
                assert_matches(kernels.operator("sparse_linear")(*sample.args), expected_sparse_linear(sample))


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "block16x4", "2:4"])
def test_nan_and_infinity_go_through_kept_weights_only(kernels: Emulation, pattern: str) -> None:
    for rows, dtype in ((7, F16), (23, F32)):
        sample = spoiled(rows, pattern, dtype)
        expected = expected_spoiled(sample)
        out = kernels.operator("sparse_linear")(*sample.args).double()
        finite = expected.isfinite()
        assert 0 < finite[1:].sum() < finite[1:].numel()
        assert torch.where(finite, 0.0, out).allclose(torch.where(finite, 0.0, expected), equal_nan=True)
        assert_matches(out.where(finite, 0.0), expected.where(finite, 0.0), dtype)


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
def test_odd_rows(kernels: Emulation, seed: int, scheme: int) -> None:
    kernels.seed(seed)
    for pattern in ("unstructured", "block4x4", "2:4"):
        for copies in (1, 2):
            sample = odd_rows(scheme, pattern, copies)
            assert_same_bits(kernels, sample)
            out = kernels.operator("sparse_linear")(*replace(sample, activation=RELU).args)
            assert out.isnan().all(1).tolist() == [row in SPOILED_ROWS for row in range(12)] * copies
            assert not out[[0, 5, 9]].isnan().any()


@pytest.mark.parametrize("pattern", SPARSE_PATTERNS)
def test_groups(kernels: Emulation, seed: int, pattern: str) -> None:
    """Scales by groups of columns, of which the last is not whole, and blocks lie in two; and rows with NaN."""
    kernels.seed(seed)
    run = kernels.operator("sparse_linear")
    for number, (rows, width, columns) in enumerate(((3, 72, 21), (18, 150, 5), (2, 257, 5))):
        for scheme in (DYNAMIC, STATIC, WEIGHT_ONLY):
            sample = layer(rows, width, columns, pattern, scheme, (32, 64, 128)[number], bias=torch.ones(columns))
            with named(sample):
                assert_matches(run(*sample.args), expected_sparse_linear(sample))
    for scheme in (DYNAMIC, STATIC):
        for copies in (1, 2):
            sample = odd_rows(scheme, pattern, copies, 32)
            sparser = torch.arange(20).unsqueeze(1) % 16 < 9  # some rows of weights keep nothing
            sample = replace(sample, weight=sample.weight * sparser, kept=sample.kept & sparser)
            assert_odd_rows(run(*sample.args), operators["sparse_linear"].reference(*sample.args))


@pytest.mark.parametrize("rows", [1, 17])
def test_longest_rows(kernels: Emulation, rows: int) -> None:
    if rows == 1 or BUILD == "checked":
        assert_same_bits(kernels, longest_rows(rows))


@pytest.mark.parametrize(("block", "dtype"), [((3, 5), F32), ((20, 1), F16), ((33, 2), F32), ((1, 7), BF16)], ids=str)
def test_blocks_of_any_shape(kernels: Emulation, block: tuple[int, int], dtype: torch.dtype) -> None:
    """With int64 structures; what blocks hold past the last row and column is no weight."""
    for rows in (2, 19):
        args, expected = raw(rows, 13, 37, block, dtype)
        assert_matches(kernels.operator("sparse_linear")(*args), expected)


@pytest.mark.parametrize("rows", [5, 19])
def test_bytes_past_the_last_column_are_no_weights(kernels: Emulation, rows: int) -> None:
    for pattern in ("block4x4", "block1x16", "2:4"):
        sample = layer(rows, 21, 62, pattern, DYNAMIC)
        x, values, crow, col, *rest = sample.args
        values = values.clone()
        if pattern == "2:4":
            # The last four has one column: the second of its two, and the first where that is no column either.
            last = col[:, 20 // 8] >> 4 * (20 // 4 % 2)
            values[:, -1] = torch.where((last >> 2 & 3) > 0, 77, values[:, -1])
            values[:, -2] = torch.where((last & 3) > 0, 77, values[:, -2])
        else:
            c = values.shape[2]
            past = col.reshape(-1, 1, 1) * c + torch.arange(c) >= 21
            values = torch.where(past.expand_as(values), 77, values)
        assert not values.equal(sample.args[1])
        out = kernels.operator("sparse_linear")(x, values, crow, col, *rest)
        assert out.equal(operators["sparse_linear"].reference(*sample.args))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:3], ids=str)
def test_alignments(kernels: Emulation, dtype: torch.dtype) -> None:
    """Inputs and values that begin at any element, with rows any number of elements apart."""
    memory = torch.randn(4000, generator=torch.Generator().manual_seed(4)).to(dtype)
    for start, stride in ((0, 80), (0, 84), (1, 72), (4, 96), (16, 73)):
        for rows, pattern, scheme in ((5, "block4x4", DYNAMIC), (5, "block4x1", None), (19, "2:4", None)):
            x = memory.as_strided((rows, 72), (stride, 1), start)
            sample = layer(rows, 72, 20, pattern, scheme, input=x, dtype=dtype)
            if scheme is None:
                sample = replace(sample, weight=sample.weight.to(dtype))
            _, values, *rest = sample.args
            moved = torch.cat([values.new_zeros(start), values.reshape(-1)])[start:].reshape(values.shape)
            with named((start, stride, pattern)):
                assert_matches(kernels.operator("sparse_linear")(x, moved, *rest), expected_sparse_linear(sample))


def test_static_numbers_that_are_not_valid(kernels: Emulation) -> None:
    for numbers in NOT_VALID:
        sample = replace(layer(3, 20, 5, scheme=STATIC), input_qparams=torch.tensor(numbers))
        grouped = replace(layer(3, 40, 5, scheme=STATIC, group=32), input_qparams=torch.tensor(numbers))
        assert kernels.operator("sparse_linear")(*grouped.args).isnan().all()
        assert kernels.operator("sparse_linear")(*sample.args).isnan().all()


def test_wrong_arguments(kernels: Emulation) -> None:
    for name, change, words in WRONG:
        with named(name), pytest.raises(RuntimeError, match=words):
            kernels.operator("sparse_linear")(*change(layer(3, 8, 5, scheme=DYNAMIC).args))
    two_of_four = layer(3, 8, 5, "2:4").args
    for at, value, words in (
        (1, two_of_four[1][:, 1:], r"values of a 2:4 layer must have shape \[5, 4\]"),
        (2, int32(0), "crow_indices of a 2:4 layer must be empty"),
        (3, two_of_four[3][1:], r"col_indices of a 2:4 layer must have shape \[5, 1\]"),
        (3, two_of_four[3].int(), "col_indices of a 2:4 layer must be a uint8 matrix"),
    ):
        with named(words), pytest.raises(RuntimeError, match=words):
            kernels.operator("sparse_linear")(*two_of_four[:at], value, *two_of_four[at + 1 :])


@pytest.mark.parametrize("name", WRONG_STRUCTURES)
def test_wrong_structures_read_nothing_outside(kernels: Emulation, name: str) -> None:
    crow, col = WRONG_STRUCTURES[name]
    run, gradient = kernels.operator("sparse_linear"), kernels.operator("sparse_weight_gradient")
    for rows in (2, 19):
        x, options = torch.ones(rows, 8), (None, None, None, WEIGHT_ONLY, 0, F32)
        out = run(x, torch.ones(6), crow, col, 3, 8, *options)
        assert ((out >= 0) & (out <= 6)).all()
        out = run(x, torch.ones(6, 4, 4), crow, col, 12, 8, *options)
        assert ((out >= 0) & (out <= 24)).all()
        of_bytes = torch.ones(6, 4, 4, dtype=torch.int8)
        out = run(x, of_bytes, crow, col, 12, 8, torch.ones(12), None, None, DYNAMIC, 0, F32)
        assert ((out >= 0) & (out <= 25)).all()
        if BUILD == "checked" and "columns" not in name:
            continue  # rows that overlap are written twice, and that would be reported
        x = torch.ones(rows, 40)
        out = run(x, of_bytes, crow, col, 12, 40, torch.ones(12, 2), None, None, DYNAMIC, 0, F32)
        assert ((out >= 0) & (out <= 25)).all()
        gradient(torch.ones(rows, 3), x, crow, col, 1, 1, F32)
        gradient(torch.ones(rows, 12), x, crow, col, 4, 4, F32)


# ---- the gradient of kept weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", SPARSE_PATTERNS)
def test_weight_gradient(kernels: Emulation, seed: int, pattern: str) -> None:
    kernels.seed(seed)
    for rows, width, columns, dtype in ((19, 35, 21, F32), (140, 9, 5, F16), (0, 9, 5, F32), (3, 1, 1, BF16)):
        case = gradient_case(rows, width, columns, pattern, dtype)
        with named(case):
            out = kernels.operator("sparse_weight_gradient")(*case.args)
            assert out.dtype == dtype
            assert_matches(out, case.expected)


def test_weight_gradient_past_the_end(kernels: Emulation) -> None:
    """Is 0, whatever the input holds, and NaN stays where it is."""
    run = kernels.operator("sparse_weight_gradient")
    grad, x = torch.ones(2, 3), torch.ones(2, 5)
    x[1, 4] = float("nan")
    out = run(grad, x, int32(0, 2), int32(0, 1), 4, 4, F32)
    inside = torch.zeros(2, 4, 4)
    inside[0, :3], inside[1, :3, 0] = 2.0, float("nan")
    assert out.allclose(inside, rtol=0.0, atol=0.0, equal_nan=True)
    codes = torch.tensor([[0x44, 0x08], [0x44, 0x04], [0x44, 0x0E]], dtype=torch.uint8)
    out = run(grad, torch.ones(2, 10), int32(), codes, 0, 0, F32)
    assert out.tolist() == [[2.0] * 4 + [2.0, 0.0], [2.0] * 6, [2.0] * 4 + [0.0, 0.0]]


def test_wrong_arguments_of_gradients(kernels: Emulation) -> None:
    grad, x, crow, col, *rest = gradient_case(4, 9, 5, "unstructured", F32).args
    for args, words in (
        ((grad.double(), x, crow, col, *rest), "grad_output must be float32"),
        ((grad, x.long(), crow, col, *rest), "input must be float32"),
        ((grad, x[0], crow, col, *rest), "input must have 2 dimension"),
        ((grad[1:], x, crow, col, *rest), "as many rows as input, 4, but has 3"),
        ((grad, x, crow[1:], col, *rest), "crow_indices must have 6 values, but has 5"),
        ((grad, x, crow, col.float(), *rest), "col_indices must be int32 or int64"),
        ((grad, x, crow, col, 1, 0, F32), "blocks must not be empty"),
        ((grad, x, crow, col, 1, 1, torch.float64), "dtype must be float32"),
        ((grad, x, crow, col, 0, 0, F32), "crow_indices of a 2:4 layer must be empty"),
    ):
        with named(words), pytest.raises(RuntimeError, match=words):
            kernels.operator("sparse_weight_gradient")(*args)


@pytest.mark.parametrize("pattern", ["unstructured", "block4x4", "2:4"])
def test_modules(kernels: Emulation, pattern: str) -> None:
    """Layers and their gradients, which go through the transposed structure."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 21)
    module = rk.SparseLinear.from_dense(linear, 0.5 if pattern == "2:4" else 0.7, pattern, epilogue="gelu")
    integers = module.quantize("dynamic")
    groups = module.quantize("dynamic", granularity=32)
    x = torch.randn(2, 5, 40, requires_grad=True)

    def results() -> list[torch.Tensor]:
        out = module(x)
        found = [module(x.detach()), out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]
        return [*found, integers(x.detach()), *torch.autograd.grad(groups(x).square().sum(), x)]

    # Not on packed layers, which only the CPU has: as on a GPU.
    with rk.backend("reference"):
        theirs = results()
        with kernels.active():
            ours = results()
    for a, b in zip(ours, theirs, strict=True):
        assert_matches(a, b)
