"""The sparse linear operators: products, packs, gradients at kept places, what is refused."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_support import DTYPES, FUNCTIONS, PATTERNS, pack, run_packed
from support import named

from recsys_kernels import functional, testing
from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import operators
from recsys_kernels.ops.linear.sparse import autograd as op
from recsys_kernels.ops.linear.sparse.spec import SparseLayer
from recsys_kernels.testing import SparseSample, assert_matches, expected_sparse_linear

pytestmark = pytest.mark.usefixtures("one_thread")

DYNAMIC, STATIC, WEIGHT_ONLY = 0, 1, 2
NONE, RELU, GELU, SIGMOID, SILU = range(5)


def linear(*args: Any) -> torch.Tensor:
    return selection.implementation("sparse_linear", args[0])(*args)


def weight_gradient(*args: Any) -> torch.Tensor:
    return selection.implementation("sparse_weight_gradient", args[0])(*args)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def csr(matrix: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, crow_indices and col_indices of a matrix, by scipy."""
    found = scipy.sparse.csr_matrix(np.asarray(matrix))
    structure = torch.from_numpy(found.indptr.astype(np.int32)), torch.from_numpy(found.indices.astype(np.int32))
    return torch.from_numpy(found.data), *structure


def random_matrix(n: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    rng = draw(seed)
    return torch.randn(n, k, generator=rng) * (torch.rand(n, k, generator=rng) < density)


def floats(weight: torch.Tensor) -> tuple[Any, ...]:
    """A layer of float values without bias."""
    return (*csr(weight), *weight.shape, None, None, None, WEIGHT_ONLY, NONE)


# ---- all options ------------------------------------------------------------------------------------------------


@lru_cache
def samples(dtype: torch.dtype) -> list[tuple[SparseSample, torch.Tensor]]:
    """Every sample of a type with what it should give."""
    return [(sample, expected_sparse_linear(sample)) for sample in testing.sparse_linear_samples(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample_against_numpy(implementation: str, dtype: torch.dtype) -> None:
    for sample, wanted in samples(dtype):
        with named(sample):
            out = linear(*sample.args)
            assert (out.dtype, out.is_contiguous()) == (sample.dtype, True)
            assert_matches(out, wanted)


@pytest.mark.parametrize("kind", [0, 1], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers_give_the_same(implementation: str, dtype: torch.dtype, kind: int) -> None:
    for sample, wanted in samples(dtype):
        with named(sample):
            n, k = sample.weight.shape
            rows = sample.input.reshape(wanted[..., 0].numel(), k)
            out = run_packed(rows, pack(*sample.layer, kind), n, sample.dtype)
            assert (out.dtype, out.is_contiguous()) == (sample.dtype, True)
            assert_matches(out, wanted.reshape(out.shape))


def test_samples_hold_every_option() -> None:
    found = {(s.pattern, s.weight.dtype == torch.int8, s.scheme) for s, _ in samples(torch.float32)}
    assert found == {(p, q, s) for p in PATTERNS for q in (True, False) for s in range(3) if q or s == WEIGHT_ONLY}
    assert {s.activation for s, _ in samples(torch.float32)} == set(range(5))
    assert {s.weight.shape for s, _ in samples(torch.float32)} >= {(1, 1), (1, 7), (17, 1), (333, 415)}
    stored = [s.kept.float().mean().item() for s, _ in samples(torch.float32)]
    assert min(stored) == 0
    assert max(stored) == 1
    assert any(not s.kept.any(1).all() and s.kept.any() for s, _ in samples(torch.float32))  # an empty row


@pytest.mark.parametrize("size", [*range(1, 20), 31, 33, 63, 64, 65, 66, 127, 129, 257])
def test_sizes_against_scipy(implementation: str, size: int) -> None:
    for m, k, n in ((size, 37, 21), (5, size, 21), (6, 37, size), (size, size, size)):
        weight, x = random_matrix(n, k, 0.3, seed=size), torch.randn(m, k, generator=draw(size))
        wanted = (scipy.sparse.csr_matrix(weight.double().numpy()) @ x.double().numpy().T).T
        assert_matches(linear(x, *floats(weight), torch.float32), torch.from_numpy(np.ascontiguousarray(wanted)))


def test_a_layer_by_hand(implementation: str) -> None:
    """Two rows of a 2:4 layer, 5 columns wide, written down as the documentation says."""
    # Row 0: 2 at column 1, 3 at column 3, 5 at column 4. Row 1: 7 at column 0, 11 at column 2.
    values = torch.tensor([[2.0, 3.0, 5.0, 0.0], [7.0, 11.0, 0.0, 0.0]])
    codes = torch.tensor([[1 + 4 * 3 + 16 * (0 + 4 * 1)], [0 + 4 * 2 + 16 * (0 + 4 * 1)]], dtype=torch.uint8)
    layer = (values, torch.zeros(0, dtype=torch.int32), codes, 2, 5, None, torch.tensor([100.0, 200.0]), None)
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]])
    out = linear(x, *layer, WEIGHT_ONLY, NONE, torch.float32)
    assert out.tolist() == [[20 + 3000 + 50000 + 100, 7 + 1100 + 200]]
    # The same matrix by blocks of 4 rows: two rows and three columns of them lie past the end.
    blocks = torch.zeros(4, 4, 1)
    blocks[:, :2, 0] = torch.tensor([[0.0, 7.0], [2.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    crow, col = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    out = linear(x, blocks, crow, col, 2, 5, None, None, None, WEIGHT_ONLY, RELU, torch.float32)
    assert out.tolist() == [[53020, 7]]


def test_values_past_the_end_are_no_weights(implementation: str) -> None:
    blocks = torch.full((2, 4, 16), 1.0)
    blocks[:, 3:] = float("nan")  # of 7 rows and 18 columns
    blocks[:1, 3] = 1.0
    blocks[1, :, 2:] = float("inf")
    blocks[1, 3:] = float("nan")
    crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    out = linear(torch.ones(3, 18), blocks, crow, col, 7, 18, None, None, None, WEIGHT_ONLY, NONE, torch.float32)
    assert out.tolist() == [[16.0] * 4 + [2.0] * 3] * 3


def test_index_types(implementation: str) -> None:
    weight, x = random_matrix(9, 20, 0.4), torch.randn(4, 20, generator=draw(1))
    values, crow, col, *rest = floats(weight)
    wanted = linear(x, values, crow, col, *rest, torch.float32)
    for one in (torch.int32, torch.int64):
        for two in (torch.int32, torch.int64):
            assert torch.equal(linear(x, values, crow.to(one), col.to(two), *rest, torch.float32), wanted)


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "2:4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_go_through_kept_weights_only(implementation: str, pattern: str, value: float) -> None:
    x = torch.randn(20, 40, generator=draw(2)).abs() + 0.1
    bad = x.clone()
    bad[3, 7] = value
    bad[11, 39] = value
    for sample, _ in samples(torch.float32):
        if sample.pattern != pattern or sample.weight.dtype == torch.int8 or sample.weight.shape[1] != 40:
            continue
        layer = (*sample.stored, *sample.weight.shape, None, None, None, WEIGHT_ONLY, NONE)
        for rows in (slice(0, 20), slice(3, 4), slice(3, 12)):
            good, out = (linear(part[rows], *layer, torch.float32) for part in (x, bad))
            for row, column in ((3, 7), (11, 39)):
                if rows.start <= row < rows.stop:
                    reached = sample.kept[:, column]
                    assert not out[row - rows.start][reached & (sample.weight[:, column] != 0)].isfinite().any()
                    keep = good[row - rows.start][~reached]
                    assert_matches(out[row - rows.start][~reached], keep.double())
            clean = [r for r in range(rows.start, rows.stop) if r not in (3, 11)]
            if clean:
                at = [r - rows.start for r in clean]
                assert_matches(out[at], good[at].double())


def test_int8_rows_with_nan_become_nan(implementation: str) -> None:
    for sample, wanted in samples(torch.float32):
        rows = sample.input.shape[:-1].numel()
        if sample.scheme == WEIGHT_ONLY or rows < 2 or sample.input.dim() != 2:
            continue
        bad = sample.input.clone()
        bad[1, -1] = float("inf")
        out = linear(bad, *sample.layer, torch.float32)
        with named(sample):
            assert out[1].isnan().all()
            rest = [row for row in range(rows) if row != 1]
            assert_matches(out[rest], wanted[rest])


def test_int8_products_are_those_of_the_dense_operator(implementation: str) -> None:
    """To the last bit, whatever the order of the sums."""
    for sample, _ in samples(torch.float32):
        if sample.scheme == WEIGHT_ONLY or sample.dtype != torch.float32 or sample.weight_scale.dim() == 2:  # type: ignore[union-attr]
            continue
        dense = selection.implementation("int8_linear", sample.input)
        parts = (sample.weight_scale.unsqueeze(1), 0, sample.bias, sample.input_qparams, sample.scheme, NONE)  # type: ignore[union-attr]
        with named(sample):
            layer = (*sample.layer[:-1], NONE)
            assert torch.equal(
                linear(sample.input, *layer, torch.float32),
                dense(sample.input, sample.weight, *parts, torch.float32),
            )


@pytest.mark.parametrize("n", [1, 5, 40])
def test_large_layers_in_parts(n: int) -> None:
    """The reference takes a few output rows at a time."""
    k = 1 << 20
    columns = torch.randperm(k, generator=draw(3))[: 3 * n].reshape(n, 3).sort(1).values
    values = torch.randn(3 * n, generator=draw(4))
    crow, x = torch.arange(0, 3 * n + 1, 3), torch.randn(2, k, generator=draw(5))
    layer = (values, crow, columns.reshape(-1), n, k, None, None, None, WEIGHT_ONLY, NONE)
    out = operators["sparse_linear"].reference(x, *layer, torch.float32)
    assert_matches(out, (x[:, columns].double() * values.reshape(n, 3)).sum(2))
    grad = torch.randn(2, n, generator=draw(6))
    found = operators["sparse_weight_gradient"].reference(grad, x, crow, columns.reshape(-1), 1, 1, torch.float32)
    wanted = torch.einsum("mn,mnc->nc", grad.double(), x[:, columns].double())
    assert_matches(found, wanted.reshape(-1))


# ---- gradients --------------------------------------------------------------------------------------------------


def masked_gradients(sample: SparseSample, x: torch.Tensor, function: Any, seed: int) -> Any:
    """Those of a dense layer whose dropped weights are masked, in float64: of the input, weights and bias."""
    weight, wide = (sample.weight.double() * sample.scales).requires_grad_(), x.detach().double().requires_grad_()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if sample.bias is None else sample.bias.double()
    bias = bias.requires_grad_()
    out = function(F.linear(wide, weight * sample.kept, bias))
    direction = torch.randn(out.shape, generator=draw(seed), dtype=torch.float64)
    return direction, *torch.autograd.grad(out, (wide, weight, bias), direction)


@pytest.mark.parametrize("epilogue", FUNCTIONS)
def test_gradients_against_a_masked_dense_layer(implementation: str, epilogue: str | None) -> None:
    for number, (sample, _) in enumerate(samples(torch.float32)):
        if sample.scheme != WEIGHT_ONLY or sample.dtype != torch.float32:
            continue
        if epilogue in ("gelu", "silu") and sample.weight.shape[0] == 1:
            continue  # the only output may lie where the derivative is next to 0, and all of it is rounding
        x = sample.input.detach().clone().requires_grad_()
        values, crow, col = sample.stored
        trains = values.is_floating_point()
        values = values.clone().requires_grad_(trains)
        bias = None if sample.bias is None else sample.bias.clone().requires_grad_()
        n = sample.weight.shape[0]
        out = functional.sparse_linear(
            x,
            values,
            crow,
            col,
            n,
            bias,
            weight_scale=sample.weight_scale,
            activation=None if trains else "weight_only",
            epilogue=epilogue,
        )
        direction, *wanted = masked_gradients(sample, x, FUNCTIONS[epilogue], number)
        inputs = [t for t in (x, values, bias) if t is not None and t.requires_grad]
        grads = list(torch.autograd.grad(out, inputs, direction.float()))
        with named(sample):
            assert_matches(grads.pop(0), wanted[0])
            if trains:
                found = op.reference.to_dense(op.reference.check_layer(sample.layer._replace(values=grads.pop(0))))
                assert_matches(found, wanted[1] * sample.kept)
            if bias is not None:
                assert_matches(grads.pop(0), wanted[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_of_every_structure(implementation: str, dtype: torch.dtype) -> None:
    for sample, _ in samples(dtype):
        n, k = sample.weight.shape
        x = sample.input.reshape(sample.input.shape[:-1].numel(), k)
        grad = torch.randn(x.shape[0], n, generator=draw(n)).to(dtype)
        values, crow, col = sample.stored
        shape = op.block_shape(values)
        for out_type in {dtype, torch.float32}:
            found = weight_gradient(grad, x, crow, col, *shape, out_type)
            with named(sample):
                assert found.shape == values.shape
                assert found.dtype == out_type
                layer = op.reference.CheckedLayer(found.float(), crow, col, n, k, None, None, None, WEIGHT_ONLY, NONE)
                wanted = (grad.double().t() @ x.double()) * sample.kept
                dense = op.reference.to_dense(layer)
                if sample.pattern == "2:4":  # which also stores what is not kept
                    dense = dense * sample.kept
                assert_matches(dense, wanted, out_type)


def test_gradient_of_infinite_rows_stays_at_its_places(implementation: str) -> None:
    """What lies past the end of a matrix is no weight and has no gradient."""
    x, grad = torch.full((2, 5), float("inf")), torch.ones(2, 3)
    crow, col = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    found = weight_gradient(grad, x, crow, col, 4, 4, torch.float32)
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[0, :3], inside[1, :3, :1] = True, True
    assert found[inside].isinf().all()
    assert not found[~inside].any()
    codes = torch.full((3, 1), 0x44, dtype=torch.uint8)
    found = weight_gradient(grad, x, torch.zeros(0, dtype=torch.int32), codes, 0, 0, torch.float32)
    assert found[:, :3].isinf().all()
    assert not found[:, 3].any()


@pytest.mark.parametrize("shape", [(-1, 1), (-4, 1), (1, 0), (4, -1)], ids=str)
def test_gradients_of_blocks_of_no_size(implementation: str, shape: tuple[int, int]) -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        weight_gradient(torch.ones(2, 3), torch.ones(2, 4), empty, empty, *shape, torch.float32)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_gradcheck(implementation: str) -> None:
    """A linear function's differences are exact but for rounding, so float32 will do."""
    weight = random_matrix(6, 9, 0.4, seed=1)
    values, crow, col = csr(weight)
    x, bias = torch.randn(3, 9, generator=draw(2)), torch.randn(6, generator=draw(3))

    def run(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.sparse_linear(x, values, crow, col, bias=bias)

    inputs = tuple(t.requires_grad_() for t in (x, values, bias))
    assert torch.autograd.gradcheck(run, inputs, eps=0.125, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_transposed_structures(pattern: str) -> None:
    for sample, _ in samples(torch.float32):
        if sample.pattern != pattern:
            continue
        values, crow, col = sample.stored
        n, k = sample.weight.shape
        flipped = op.transpose_structure(crow, col, *op.block_shape(values), n, k)
        structure = (flipped.crow_indices, flipped.col_indices, flipped.out_features, n)
        scale = None if sample.weight_scale is None else torch.ones(flipped.out_features)
        with named(sample):
            operands = SparseLayer(flipped.values(values), *structure, scale, None, None, WEIGHT_ONLY, NONE)
            layer = op.reference.check_layer(operands)
            assert torch.equal(op.reference.to_dense(layer)[:k], sample.weight.t())
            assert not op.reference.to_dense(layer)[k:].any()


# ---- torch ------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    """Schema and shape for every kind of layer, tracing (which takes longest) for each pattern and type of weights."""
    seen, traced = set(), set()
    for sample, _ in samples(torch.float32):
        key = (
            sample.pattern,
            sample.scheme,
            sample.weight.dtype,
            sample.weight_scale is None or sample.weight_scale.dim(),
        )
        if key in seen or sample.weight.numel() > 20_000 or sample.input.numel() == 0:
            continue
        seen.add(key)
        values, crow, col = sample.stored
        rows = sample.input.reshape(-1, sample.weight.shape[1])
        grad = torch.randn(rows.shape[0], sample.weight.shape[0], generator=draw(1))
        packed = pack(*sample.layer, 0)
        calls = {
            "sparse_linear": sample.args,
            "sparse_layer": sample.args,
            "sparse_pack": (*sample.layer, 1),
            "sparse_packed": (rows, packed, sample.weight.shape[0], torch.float16),
            "sparse_weight_gradient": (grad, rows, crow, col, *op.block_shape(values), torch.float32),
        }
        for name, args in calls.items():
            kind = (name, sample.pattern, sample.weight.dtype)
            checks = ("test_schema", "test_faketensor", *(() if kind in traced else ("test_aot_dispatch_dynamic",)))
            traced.add(kind)
            with named(f"{name} {sample}"):
                torch.library.opcheck(getattr(torch.ops.recsys_kernels, name).default, args, test_utils=checks)
    assert len(seen) >= 30
    assert len(traced) >= 10 * len(testing.SPARSE_PATTERNS)


# ---- bad input --------------------------------------------------------------------------------------------------


def good_layer() -> dict[str, Any]:
    crow, col = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([1, 3, 0, 2, 3], dtype=torch.int32)
    return {
        "values": torch.arange(1.0, 6.0),
        "crow": crow,
        "col": col,
        "n": 3,
        "k": 4,
        "scale": None,
        "bias": None,
        "qparams": None,
        "scheme": WEIGHT_ONLY,
        "activation": NONE,
    }


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


STRUCTURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "does not start at 0": ({"crow": int32(1, 2, 2, 5)}, RuntimeError, r"crow_indices\[0\] must be 0, but is 1"),
    "falls": (
        {"crow": int32(0, 3, 2, 5)},
        RuntimeError,
        r"crow_indices\[2\] is 2, but must not be below the 3 before it",
    ),
    "negative": ({"crow": int32(0, -1, 2, 5)}, RuntimeError, r"crow_indices\[1\] is -1, but must not be below the 0"),
    "ends early": ({"crow": int32(0, 2, 2, 4)}, RuntimeError, r"crow_indices\[3\] is 4, but must be .* col_indices, 5"),
    "ends late": ({"crow": int32(0, 2, 2, 9)}, RuntimeError, r"crow_indices\[3\] is 9, but must be .* col_indices, 5"),
    "too few rows": ({"crow": int32(0, 2, 5)}, RuntimeError, "crow_indices must have 4 values, but has 3"),
    "too many rows": ({"n": 2}, RuntimeError, "crow_indices must have 3 values, but has 4"),
    "column out of range": (
        {"col": int32(1, 3, 0, 2, 4)},
        IndexError,
        r"col_indices\[4\] is 4 in row 2, but must be 0 to 3",
    ),
    "negative column": ({"col": int32(-1, 3, 0, 2, 3)}, IndexError, r"col_indices\[0\] is -1 in row 0, but must be 0"),
    "a column twice": (
        {"col": int32(1, 3, 0, 2, 2)},
        RuntimeError,
        r"col_indices\[4\] is 2 in row 2 for the second time",
    ),
    "unsorted": (
        {"col": int32(1, 3, 2, 0, 3)},
        RuntimeError,
        r"col_indices\[3\] is 0 in row 2, but must be above the 2 before it",
    ),
    "too few values": ({"values": torch.ones(4)}, RuntimeError, "values must have as many elements as col_indices, 5"),
    "types of values": ({"values": torch.ones(5).double()}, RuntimeError, "values must be float32, float16, bfloat16"),
    "no dimension": ({"values": torch.ones(())}, RuntimeError, "values must have 1, 2 or 3 dimensions, but has 0"),
    "a scale of floats": ({"scale": torch.ones(3)}, RuntimeError, "weight_scale belongs to int8 values"),
    "int8 without a scale": (
        {"values": torch.ones(5, dtype=torch.int8)},
        RuntimeError,
        "weight_scale belongs to int8 values",
    ),
    "a scheme of floats": ({"scheme": DYNAMIC}, RuntimeError, "float values take scheme 2"),
    "scheme": ({"scheme": 3}, RuntimeError, "scheme must be 0 .* but is 3"),
    "activation": ({"activation": 5}, RuntimeError, "activation must be 0 .* but is 5"),
    "bias": ({"bias": torch.ones(4)}, RuntimeError, "bias must have 3 values, but has"),
    "qparams": ({"qparams": torch.ones(2)}, RuntimeError, "belong to scheme 1"),
    "no outputs": ({"n": 0, "crow": int32(0)}, RuntimeError, "out_features must be 1 to"),
    "no inputs": ({"k": 0}, RuntimeError, "in_features must be 1 to"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_wrong_layers_are_refused(implementation: str, name: str) -> None:
    change, error, message = STRUCTURES[name]
    layer = {**good_layer(), **change}
    with pytest.raises(error, match=message):
        pytest.fail(f"accepted: {linear(torch.ones(2, 4), *layer.values(), torch.float32)}")
    with pytest.raises(error, match=message):
        pytest.fail(f"accepted: {pack(*layer.values(), 0)}")
    if set(change) <= {"crow", "col"} and "rows" not in name:
        structure = (layer["crow"], layer["col"], 1, 1)
        with pytest.raises(error, match=message):
            weight_gradient(torch.ones(2, 3), torch.ones(2, 4), *structure, torch.float32)


def test_wrong_2_to_4_layers_are_refused(implementation: str) -> None:
    crow, values = torch.zeros(0, dtype=torch.int32), torch.ones(3, 6)
    good = torch.full((3, 2), 0x44, dtype=torch.uint8)

    def run(values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor) -> None:
        linear(torch.ones(2, 9), values, crow, col, 3, 9, None, None, None, WEIGHT_ONLY, NONE, torch.float32)

    run(values, crow, good)
    for code, low, high, columns in ((0x40, 0, 0, "0 to 3"), (0x14, 1, 0, "4 to 7"), (0xF4, 3, 3, "4 to 7")):
        bad = good.clone()
        bad[1, 0] = code
        message = f"the positions {low} and {high} for the columns {columns} of row 1, but the first must be below"
        with pytest.raises(RuntimeError, match=message):
            run(values, crow, bad)
    bad = good.clone()
    bad[2, 1] = 5
    with pytest.raises(RuntimeError, match="columns 8 to 11 of row 2"):
        run(values, crow, bad)
    with pytest.raises(RuntimeError, match="crow_indices of a 2:4 layer must be empty, but has 4 values"):
        run(values, int32(0, 2, 4, 6), good)
    with pytest.raises(RuntimeError, match="col_indices of a 2:4 layer must be a uint8 matrix"):
        run(values, crow, good.int())
    with pytest.raises(RuntimeError, match=r"col_indices of a 2:4 layer must have shape \[3, 2\], but has \[3, 1\]"):
        run(values, crow, good[:, :1])
    with pytest.raises(RuntimeError, match=r"values of a 2:4 layer must have shape \[3, 6\], but has \[3, 4\]"):
        run(values[:, :4], crow, good)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5), (0, 3), ()], ids=str)
def test_wrong_inputs_are_refused(implementation: str, shape: tuple[int, ...]) -> None:
    layer = tuple(good_layer().values())
    with pytest.raises(RuntimeError, match=r"input .*(must|does not fit)"):
        linear(torch.ones(shape), *layer, torch.float32)
    if len(shape) == 2:
        with pytest.raises(RuntimeError, match=r"input .*(must|does not fit)"):
            run_packed(torch.ones(shape), pack(*layer, 1), 3, torch.float32)


def test_wrong_types_are_refused(implementation: str) -> None:
    layer = tuple(good_layer().values())
    for bad in (torch.ones(2, 4).double(), torch.ones(2, 4, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="input must be float32, float16 or bfloat16, but is"):
            linear(bad, *layer, torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16, but is"):
        linear(torch.ones(2, 4), *layer, torch.float64)
    with pytest.raises(RuntimeError, match="kind must be 0"):
        pack(*layer, 2)
    with pytest.raises(RuntimeError, match="outputs, not 4"):
        run_packed(torch.ones(2, 4), pack(*layer, 0), 4, torch.float32)
    packed = pack(*layer, 0)
    for bad_pack in (packed[:10], packed[:-64], packed[:0], torch.zeros_like(packed), packed.char()):
        with pytest.raises(RuntimeError, match="packed"):
            run_packed(torch.ones(2, 4), bad_pack, 3, torch.float32)


@st.composite
def corrupted(choose: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A structure with one number changed, and which."""
    n, k, seed = choose(st.integers(1, 9)), choose(st.integers(2, 30)), choose(st.integers(0, 1 << 20))
    weight = random_matrix(n, k, choose(st.sampled_from([0.2, 0.5, 1.0])), seed)
    values, crow, col = csr(weight)
    where = choose(st.sampled_from(["crow", "col"] if len(col) else ["crow"]))
    tensor = crow if where == "crow" else col
    at = choose(st.integers(0, len(tensor) - 1))
    wrong = choose(st.sampled_from([-1, -(2**31), 0, 1, k - 1, k, len(col), len(col) + 1, 2**31 - 1]))
    tensor[at] = wrong
    return {
        **good_layer(),
        "values": values,
        "crow": crow,
        "col": col,
        "n": n,
        "k": k,
    }, f"{where}_indices[{at}]={wrong}"


def is_csr(layer: dict[str, Any]) -> bool:
    """Whether a structure is well formed, by plain loops."""
    crow, col = layer["crow"].tolist(), layer["col"].tolist()
    if crow[0] != 0 or crow[-1] != len(col) or any(b < a for a, b in pairwise(crow)):
        return False
    rows = [col[a:b] for a, b in pairwise(crow)]
    return all(row == sorted(set(row)) and all(0 <= c < layer["k"] for c in row) for row in rows)


def test_every_corrupted_structure_is_refused(implementation: str) -> None:
    refused = 0

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(corrupted())
    def run(case: tuple[dict[str, Any], str]) -> None:
        nonlocal refused
        layer, what = case
        x = torch.ones(2, layer["k"])
        if is_csr(layer):
            linear(x, *layer.values(), torch.float32)
            return
        refused += 1
        with pytest.raises((IndexError, RuntimeError), match=r"(crow|col)_indices(\[\d+\])? ") as error:
            pytest.fail(f"{what} was accepted: {linear(x, *layer.values(), torch.float32)}")
        if isinstance(error.value, IndexError):
            assert not all(0 <= c < layer["k"] for c in layer["col"].tolist())
        with pytest.raises(error.type, match=r"(crow|col)_indices"):
            pack(*layer.values(), 0)

    run()
    assert refused > 200
