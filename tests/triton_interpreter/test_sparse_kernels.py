"""The Triton kernels of sparse linear layers against numpy, and against the reference's integers bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from int8_gpu_cases import NOT_VALID, SPOILED_ROWS
from sparse_gpu_cases import (
    WRONG,
    WRONG_STRUCTURES,
    GradientCase,
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
from support import REFERENCE, TRITON
from test_bad_input import guarded

import recsys_kernels as rk
from recsys_kernels.ops.linear.activation import (
    DYNAMIC,
    RELU,
    STATIC,
    WEIGHT_ONLY,
)
from recsys_kernels.ops.linear.sparse import triton as kernels
from recsys_kernels.testing import (
    FLOAT_DTYPES,
    SPARSE_PATTERNS,
    SparseSample,
    assert_matches,
    expected_sparse_linear,
    sparse_linear_samples,
)

# Some of each type, and those with gaps, of which all are few numbers.
SAMPLES = [
    sample
    for first, dtype in enumerate(FLOAT_DTYPES[:3])
    for number, sample in enumerate(sparse_linear_samples(dtype, small=True))
    if number % 31 == 9 * first or (first == 0 and sample.name.startswith(("strided", "to-")) and number % 3 == 0)
]
F32, F16, BF16 = FLOAT_DTYPES[:3]
GRADIENTS = [
    *(gradient_case(19, 35, 21, pattern, F32) for pattern in SPARSE_PATTERNS),
    gradient_case(140, 9, 5, "unstructured", F16),
    gradient_case(140, 9, 5, "block4x4", BF16),
    gradient_case(0, 9, 5, "block16x1", F32),
    gradient_case(0, 9, 5, "2:4", F32),
    gradient_case(3, 1, 1, "unstructured", F32),
]


def assert_same_bits(sample: SparseSample) -> None:
    ours, theirs = TRITON.sparse_linear(*sample.args), REFERENCE.sparse_linear(*sample.args)
    assert ours.isnan().equal(theirs.isnan())
    assert ours.nan_to_num(0.5).equal(theirs.nan_to_num(0.5))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s}-{str(s.input.dtype)[6:]}")
def test_forward(sample: SparseSample) -> None:
    out = TRITON.sparse_linear(*sample.args)
    assert out.dtype == sample.dtype
    assert_matches(out, expected_sparse_linear(sample))


@pytest.mark.parametrize("pattern", SPARSE_PATTERNS)
@pytest.mark.parametrize("rows", [3, 20])
def test_every_pattern(rows: int, pattern: str) -> None:
    """The kernels for few and for many rows; blocks of 16 rows are multiplied with tensor cores, but for float32."""
    for scheme in (DYNAMIC, STATIC):
        assert_same_bits(layer(rows, 41, 21, pattern, scheme))
    for number, scheme in enumerate((None, WEIGHT_ONLY)):
        for dtype in (F32, F16, BF16)[number::2]:
            sample = layer(rows, 41, 21, pattern, scheme)
            weight = sample.weight if scheme is not None else sample.weight.to(dtype)
            sample = replace(sample, input=sample.input.to(dtype), weight=weight)
            assert_matches(TRITON.sparse_linear(*sample.args), expected_sparse_linear(sample))


@pytest.mark.parametrize("pattern", ["unstructured", "block16x1"])
def test_types_that_differ(pattern: str) -> None:
    """As gradients of layers in half precision are: nothing is rounded to the narrower type."""
    for rows in (2, 17):
        sample = layer(rows, 20, 16, pattern, weight=layer(rows, 20, 16, pattern).weight.to(F16))
        assert_matches(TRITON.sparse_linear(*sample.args), expected_sparse_linear(sample))


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "block16x4", "2:4"])
def test_odd_rows(pattern: str, scheme: int) -> None:
    """Constant, tiny and huge rows; NaN and infinity spoil their own row only."""
    assert_same_bits(odd_rows(scheme, pattern))
    sample = replace(odd_rows(scheme, pattern), activation=RELU)
    few = TRITON.sparse_linear(*replace(sample, input=sample.input[4:9]).args)
    assert few.isnan().all(1).tolist() == [row in SPOILED_ROWS for row in range(4, 9)]
    many = TRITON.sparse_linear(*sample.args)
    assert many.isnan().all(1).tolist() == [row in SPOILED_ROWS for row in range(12)]
    assert not many[[0, 5, 9]].isnan().any()


@pytest.mark.parametrize("pattern", SPARSE_PATTERNS)
def test_groups(pattern: str) -> None:
    """Scales by groups of columns, of which the last is not whole, and blocks lie in two."""
    for number, (rows, width, columns) in enumerate(((3, 72, 21), (18, 150, 5), (2, 257, 5))):
        for scheme in (DYNAMIC, STATIC, WEIGHT_ONLY):
            sample = layer(rows, width, columns, pattern, scheme, (32, 64, 128)[number], bias=torch.ones(columns))
            sample = replace(sample, input=sample.input.to((F32, F16, BF16)[number]))
            assert_matches(TRITON.sparse_linear(*sample.args), expected_sparse_linear(sample))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
@pytest.mark.parametrize("pattern", ["unstructured", "block16x4", "2:4"])
def test_odd_rows_of_groups(pattern: str, scheme: int) -> None:
    sample = odd_rows(scheme, pattern, group=32)
    sparser = torch.arange(20).unsqueeze(1) % 16 < 9  # some rows of weights keep nothing
    sample = replace(sample, weight=sample.weight * sparser, kept=sample.kept & sparser)
    assert_odd_rows(TRITON.sparse_linear(*sample.args), REFERENCE.sparse_linear(*sample.args))
    few = replace(sample, input=sample.input[4:9])
    assert_odd_rows(TRITON.sparse_linear(*few.args), REFERENCE.sparse_linear(*few.args))
    assert TRITON.sparse_linear(*replace(sample, input=sample.input[:0]).args).shape == (0, 20)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "block16x4", "2:4"])
def test_nan_and_infinity_go_through_kept_weights_only(pattern: str, dtype: torch.dtype) -> None:
    for rows in (7, 12):
        sample = spoiled(rows, pattern, dtype)
        expected = expected_spoiled(sample)
        out = TRITON.sparse_linear(*sample.args).double()
        finite = expected.isfinite()
        assert 0 < finite[1:].sum() < finite[1:].numel()
        assert torch.where(finite, 0.0, out).allclose(torch.where(finite, 0.0, expected), equal_nan=True)
        assert_matches(out.where(finite, 0.0), expected.where(finite, 0.0), dtype)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("scheme", [DYNAMIC, WEIGHT_ONLY])
def test_int8_values_past_the_last_column_are_no_weights(scheme: int, rows: int) -> None:
    """Of the second four of six columns positions 1 and 2 are kept: column 5, and one that does not exist."""
    torch.manual_seed(0)
    values = torch.tensor([[3, -5, 7, 100], [11, 2, -9, -100]], dtype=torch.int8)
    col = torch.tensor([[0b1001_0100], [0b1001_0100]], dtype=torch.uint8)  # columns 0, 1, 5 (and 6)
    dense = torch.tensor([[3, -5, 0, 0, 0, 7], [11, 2, 0, 0, 0, -9]], dtype=torch.int8)
    scale, x = torch.tensor([0.5, 0.25]), torch.randn(rows, 6)
    empty = torch.empty(0, dtype=torch.int32)
    out = TRITON.sparse_linear(x, values, empty, col, 2, 6, scale, None, None, scheme, 0, F32)
    expected = torch.ops.recsys_kernels.int8_linear(x, dense, scale[:, None], 0, None, None, scheme, 0, F32)
    assert_matches(out, expected)


def test_longest_rows() -> None:
    assert_same_bits(longest_rows(1))


@pytest.mark.parametrize(("block", "dtype"), [((3, 5), F32), ((20, 1), F16), ((33, 2), F32), ((1, 7), BF16)], ids=str)
def test_blocks_of_any_shape(block: tuple[int, int], dtype: torch.dtype) -> None:
    """With int64 structures; what blocks hold past the last row and column is no weight."""
    for rows in (2, 9):
        args, expected = raw(rows, 13, 37, block, dtype)
        assert_matches(TRITON.sparse_linear(*args), expected)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_weight_gradient(case: GradientCase) -> None:
    out = TRITON.sparse_weight_gradient(*case.args)
    assert out.dtype == case.args[-1]
    assert_matches(out, case.expected)


def test_weight_gradient_past_the_end() -> None:
    """Is 0, whatever the input holds, and NaN stays where it is."""
    grad, x = torch.ones(2, 3), torch.ones(2, 5)
    x[1, 4] = float("nan")
    out = TRITON.sparse_weight_gradient(grad, x, int32(0, 2), int32(0, 1), 4, 4, F32)
    inside = torch.zeros(2, 4, 4)
    inside[0, :3], inside[1, :3, 0] = 2.0, float("nan")
    assert out.allclose(inside, rtol=0.0, atol=0.0, equal_nan=True)
    codes = torch.tensor([[0x44, 0x08], [0x44, 0x04], [0x44, 0x0E]], dtype=torch.uint8)
    out = TRITON.sparse_weight_gradient(grad, torch.ones(2, 10), int32(), codes, 0, 0, F32)
    assert out.tolist() == [[2.0] * 4 + [2.0, 0.0], [2.0] * 6, [2.0] * 4 + [0.0, 0.0]]


@pytest.mark.parametrize(("scale", "zero"), NOT_VALID)
def test_static_numbers_that_are_not_valid(scale: float, zero: float) -> None:
    """The reference raises; a GPU's kernel, for which nobody waits, gives NaN."""
    sample = replace(layer(3, 20, 5, scheme=STATIC), input_qparams=torch.tensor([scale, zero]))
    with pytest.raises(RuntimeError, match="input_qparams"):
        REFERENCE.sparse_linear(*sample.args)
    assert TRITON.sparse_linear(*sample.args).isnan().all()
    sample = replace(layer(3, 40, 5, scheme=STATIC, group=32), input_qparams=torch.tensor([scale, zero]))
    assert TRITON.sparse_linear(*sample.args).isnan().all()


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arguments(change: Callable[[tuple[Any, ...]], tuple[Any, ...]], words: str) -> None:
    args = change(layer(3, 8, 5, scheme=DYNAMIC).args)
    with pytest.raises(RuntimeError, match=words):
        TRITON.sparse_linear(*args)
    with pytest.raises(RuntimeError, match=words):
        REFERENCE.sparse_linear(*args)


def test_wrong_arguments_of_gradients() -> None:
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
        for module in (TRITON, REFERENCE):
            with pytest.raises(RuntimeError, match=words):
                module.sparse_weight_gradient(*args)


@pytest.mark.parametrize("name", WRONG_STRUCTURES)
def test_wrong_structures_read_nothing_outside(name: str) -> None:
    crow, col = (guarded(part, before) for part, before in zip(WRONG_STRUCTURES[name], (False, True), strict=True))
    values = guarded(torch.ones(6))
    for rows in (2, 9):
        for before in (False, True):
            x, grad = guarded(torch.ones(rows, 8), before), guarded(torch.ones(rows, 3), before)
            arguments = (None, None, None, WEIGHT_ONLY, 0, F32)
            out = TRITON.sparse_linear(x, values, crow, col, 3, 8, *arguments)
            assert (out >= 0).all()
            assert (out <= 6).all()
            blocks = guarded(torch.ones(6, 4, 4))
            out = TRITON.sparse_linear(x, blocks, crow, col, 12, 8, *arguments)
            assert (out >= 0).all()
            assert (out <= 24).all()
            TRITON.sparse_weight_gradient(grad, x, crow, col, 1, 1, F32)
            TRITON.sparse_weight_gradient(guarded(torch.ones(rows, 12), before), x, crow, col, 4, 4, F32)


@pytest.mark.parametrize("before", [False, True])
def test_reads_nothing_outside(before: bool) -> None:
    for pattern in ("unstructured", "block4x1", "block1x16", "block16x4", "2:4"):
        for rows, scheme in ((3, None), (9, DYNAMIC), (9, WEIGHT_ONLY), (3, STATIC)):
            s = layer(rows, 35, 18, pattern, scheme, bias=torch.ones(18))
            arguments = [guarded(t, before) if isinstance(t, torch.Tensor) else t for t in s.args]
            assert_matches(TRITON.sparse_linear(*arguments), expected_sparse_linear(s))
        case = gradient_case(3, 35, 18, pattern, F32)
        arguments = [guarded(t, before) if isinstance(t, torch.Tensor) else t for t in case.args]
        assert_matches(TRITON.sparse_weight_gradient(*arguments), case.expected)


def test_default_tiles() -> None:
    """Tensor cores for blocks of 16 rows in half precision, wide tiles for many rows, long ones for few."""

    def chosen(rows: int, block_rows: int, entries: int, product: torch.dtype) -> tuple[Any, ...]:
        return tuple(kernels.default_tile(rows, block_rows, entries, product))

    assert chosen(1, 1, 100, F32) == (1, 128, 1, False, 1)
    assert chosen(1, 1, 10**6, F32) == (1, 4096, 1, False, 4)
    assert chosen(5, 4, 100, torch.int8) == (4, 128, 8, False, 4)
    assert chosen(9, 1, 100, F32) == (1, 32, 32, False, 1)
    assert chosen(4096, 1, 100, F32) == (1, 8, 128, False, 1)
    assert chosen(4096, 4, 100, F16) == (4, 4, 64, False, 1)
    assert chosen(4096, 16, 100, F32) == (16, 4, 64, False, 4)
    assert chosen(4096, 16, 100, F16) == (16, 32, 128, True, 4)
    assert chosen(64, 40, 100, torch.int8) == (16, 64, 64, True, 4)


@pytest.mark.parametrize("pattern", ["unstructured", "block4x4", "2:4"])
def test_modules(pattern: str) -> None:
    """Layers and their gradients, which go through the transposed structure."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 21)
    module = rk.SparseLinear.from_dense(linear, 0.5 if pattern == "2:4" else 0.7, pattern, epilogue="gelu")
    integers = module.quantize("dynamic")
    groups = module.quantize("dynamic", granularity=32)
    x = torch.randn(2, 5, 40, requires_grad=True)
    results = []
    for backend in ("reference", "triton"):
        with rk.backend(backend):
            out = module(x)
            found = [module(x.detach()), out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]
            results.append([*found, integers(x.detach()), *torch.autograd.grad(groups(x).square().sum(), x)])
    for ours, theirs in zip(*results, strict=True):
        assert_matches(ours, theirs)
