"""Sparse int8 layers whose groups of columns have scales of their own."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sparse_gpu_cases import assert_odd_rows, layer, odd_rows
from sparse_support import DTYPES, PATTERNS, RANGE, SCHEMES, dense_of, float_layer, rows, sparse
from support import named

import recsys_kernels as rk
from recsys_kernels.backends import selection
from recsys_kernels.compress.sizes import stored_bytes
from recsys_kernels.ops.linear.activation import (
    DYNAMIC,
    STATIC,
    WEIGHT_ONLY,
)
from recsys_kernels.ops.linear.sparse import crossover, reference
from recsys_kernels.ops.linear.sparse.crossover import FEW_ROWS
from recsys_kernels.testing import assert_matches, expected_sparse_linear

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = (32, 64, 128)
WIDTHS = (1, 32, 33, 64, 65, 127, 128, 129, 300)
NUMBERS = {"dynamic": DYNAMIC, "static": STATIC, "weight_only": WEIGHT_ONLY}


def linear(*args: Any) -> torch.Tensor:
    return selection.implementation("sparse_linear", args[0])(*args)


def grouped(
    pattern: str = "unstructured",
    activation: str = "dynamic",
    group: int | str = 32,
    linear: torch.nn.Linear | None = None,
    **options: Any,
) -> rk.SparseLinear:
    module = sparse(pattern, linear or float_layer(150), **options)
    # Columns of different sizes, so that a wrong group shows.
    with torch.no_grad():
        _, columns = reference.places(*module._stored())
        module.values *= (1.0 + columns / 16).float()
    return module.quantize(activation, input_range=RANGE if activation == "static" else None, granularity=group)


def fake_quantized(x: torch.Tensor, module: rk.SparseLinear) -> torch.Tensor:
    """Rows as the numbers that they are rounded to, float64, for a layer of any scheme."""
    x = x.float()
    if module.activation == "weight_only":
        return x.double()
    if module.input_qparams is not None:
        scale, zero = module.input_qparams.unbind()
    else:
        high, low = x.amax(1, keepdim=True).clamp(min=0), x.amin(1, keepdim=True).clamp(max=0)
        scale = high * torch.tensor(1 / 255) - low * torch.tensor(1 / 255)
        zero = torch.round(-low * (1 / scale)).clamp(0, 255)
    q = (torch.round(x * (1 / scale)) + zero).clamp(0, 255)
    return (q - zero).double() * scale.double()


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_width(implementation: str, pattern: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for number, group in enumerate(GROUPS):
            for at, scheme in enumerate(NUMBERS.values()):
                for count in (1, 21) if dtype == torch.float32 else ((3, 40)[at % 2],):
                    options = {"bias": torch.linspace(-1, 1, 19) if number else None, "activation": (number + at) % 5}
                    sample = layer(count, width, 19, pattern, scheme, group, **options)
                    sample = replace(sample, input=sample.input.to(dtype), dtype=dtype)
                    with named(sample):
                        assert_matches(linear(*sample.args), expected_sparse_linear(sample))


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_odd_rows(implementation: str, pattern: str, scheme: int) -> None:
    """Constant, tiny and huge rows; NaN and infinity spoil all of their row, and no other."""
    for copies in (1, 4):
        sample = odd_rows(scheme, pattern, copies, 32)
        some = torch.arange(20).unsqueeze(1) % 16 < 9  # of some rows of weights nothing is kept
        sample = replace(sample, weight=sample.weight * some, kept=sample.kept & some)
        rest = sample.layer[:-1]
        with rk.backend("reference"):
            wanted = linear(*sample.args)
        assert_odd_rows(linear(*sample.args), wanted)
        for at in range(0, 12, 3):  # few at a time
            assert_odd_rows(linear(sample.input[at : at + 3], *rest, 0, torch.float32), wanted[at : at + 3])
        for activation in range(1, 5):
            for dtype in DTYPES:
                out = linear(sample.input.half() if dtype == torch.float16 else sample.input, *rest, activation, dtype)
                assert out[6:9].isnan().all()
                assert not out[9:12].isnan().any() or dtype == torch.float16  # 1e30 is infinite there


def test_threads(threads: None) -> None:
    """Each quantizes the rows for its own part of the output, and spoils that part only."""
    torch.set_num_threads(2)
    for pattern in ("unstructured", "block16x4", "2:4"):
        for count, width, columns in ((4, 1500, 2000), (150, 300, 500)):
            sample = layer(count, width, columns, pattern, DYNAMIC, 64)
            wanted = expected_sparse_linear(sample)
            sample.input[2, 7] = float("inf")
            out = linear(*sample.args)
            assert out[2].isnan().all()
            others = torch.arange(count) != 2
            assert_matches(out[others], wanted[others])


@pytest.mark.parametrize("pattern", ["unstructured", "block4x4", "2:4"])
def test_weights_only_spread_nan_where_they_are_kept(implementation: str, pattern: str) -> None:
    module, x = grouped(pattern, "weight_only"), rows(9, 150)
    x[3, 70] = float("nan")
    kept_there = dense_of(module)[:, 70] != 0
    for part in (x, x[2:5]):
        found = linear(part, *module.operands(), torch.float32).isnan()
        wanted = torch.zeros_like(found)
        wanted[part.isnan().any(1)] = kept_there
        if pattern == "unstructured":
            assert found.equal(wanted)
        assert not (wanted & ~found).any()
        assert not found[~part.isnan().any(1)].any()
        assert not found.all(1).any()


def test_one_group_is_one_scale_a_row(implementation: str) -> None:
    """To the last bit."""
    for pattern in PATTERNS:
        for activation in SCHEMES:
            input_range = RANGE if activation == "static" else None
            one = sparse(pattern).quantize(activation, input_range=input_range)
            for group in (64, 128):
                module = sparse(pattern).quantize(activation, input_range=input_range, granularity=group)
                assert module.weight_scale.shape == (22,)  # type: ignore[union-attr]
                assert "granularity" not in repr(module)
                with torch.no_grad():
                    assert torch.equal(module(rows(2)), one(rows(2)))
                    assert torch.equal(module(rows(20)), one(rows(20)))
            layer = one.operands()
            column = (*layer[:5], layer[5].unsqueeze(1), *layer[6:])  # type: ignore[union-attr]
            for x in (rows(2), rows(20)):
                assert torch.equal(linear(x, *column, torch.float32), linear(x, *layer, torch.float32))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)], ids=str)
def test_empty_batches(implementation: str, shape: tuple[int, ...]) -> None:
    for activation in SCHEMES:
        x = torch.empty(*shape, 150, requires_grad=True)
        out = grouped("block4x1", activation)(x)
        assert out.shape == (*shape, 22)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


WRONG = {
    "flat": ((66,), 65),
    "rows": ((21, 3), 65),
    "rows without groups": ((21,), 65),
    "none": ((22, 0), 65),
    "a count that is none of them": ((22, 4), 65),
    "transposed": ((3, 22), 65),
    "three dimensions": ((22, 3, 1), 65),
    "no dimension": ((), 65),
    "groups of a narrow layer": ((22, 2), 32),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scales_are_refused(implementation: str, name: str) -> None:
    shape, width = WRONG[name]
    sample = replace(layer(3, width, 22, scheme=DYNAMIC), weight_scale=torch.ones(shape))
    words = "weight_scale must have 22 values" + (", or 22 x 3 or 22 x 2 of groups" if width == 65 else ", but has")
    with pytest.raises(RuntimeError, match=words):
        pytest.fail(f"accepted: {linear(*sample.args)}")
    pack = selection.implementation("sparse_pack", sample.input)
    with pytest.raises(RuntimeError, match=words):
        pytest.fail(f"accepted: {pack(*sample.layer, 1)}")
    state = grouped(linear=float_layer(width, 22)).state_dict()
    module = rk.SparseLinear(width, 22, activation="dynamic")
    with pytest.raises(RuntimeError, match=words):
        module.load_state_dict({**state, "weight_scale": torch.ones(shape)})
    assert module.nnz == 0


def test_how_many_groups_there_are() -> None:
    for width in range(1, 400):
        found = {size: -(-width // size) for size in GROUPS}
        for size, count in found.items():
            given = reference.scale_group(7, width, (7, count))
            assert given == (0 if count == 1 else size)
        assert reference.scale_group(7, width, (7,)) == 0
    with pytest.raises(
        RuntimeError, match=r"must have 7 values, or 7 x 10 or 7 x 5 or 7 x 3 of groups of columns, but"
    ):
        reference.scale_group(7, 300, (7, 4))


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_are_quantized_as_dense_ones(pattern: str, group: int) -> None:
    for width in WIDTHS:
        pruned = sparse(pattern, float_layer(width))
        module = pruned.quantize(granularity=group)
        dense = rk.Int8Linear.from_float(pruned.to_dense(), granularity=group)  # type: ignore[arg-type]
        count = -(-width // group)
        assert module.weight_scale.shape == ((22, count) if count > 1 else (22,))  # type: ignore[union-attr]
        assert torch.equal(module.weight_scale.reshape(22, -1), dense.weight_scale)  # type: ignore[union-attr]
        assert torch.equal(module.dequantize(), dense.dequantize())
        assert torch.equal(module.to_dense().weight, dense.dequantize())  # type: ignore[union-attr]
        assert_matches(module.dequantize(), dense_of(module))
        plain = pruned.quantize()
        more = module.weight_scale.nbytes - plain.weight_scale.nbytes  # type: ignore[union-attr]
        assert stored_bytes(module) == stored_bytes(plain) + more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", SCHEMES)
def test_modules(implementation: str, activation: str, dtype: torch.dtype) -> None:
    for pattern in PATTERNS:
        for group in GROUPS:
            module = grouped(pattern, activation, group, epilogue="relu").to(dtype)
            with torch.no_grad():
                for count in (1, 4, 30):
                    x = rows(count, 150).to(dtype)
                    y = F.linear(fake_quantized(x, module), dense_of(module), module.bias.double())  # type: ignore[union-attr]
                    with named((pattern, group, count)):
                        assert_matches(module(x), F.relu(y))
            assert f"granularity={group}" in repr(module)


def test_groups_are_closer_to_the_weights() -> None:
    float_module = sparse(linear=float_layer(300))
    x = rows(50, 300)
    errors = []
    for granularity in ("tensor", "channel", 128, 64, 32):
        out = float_module.quantize("weight_only", granularity=granularity)(x)
        errors.append((out - float_module(x)).square().mean().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("activation", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient_of_the_input(implementation: str, pattern: str, activation: str) -> None:
    for group in GROUPS:
        module = grouped(pattern, activation, group, epilogue="relu")
        x = rows(9, 150).requires_grad_()
        direction = torch.randn(9, 22, generator=torch.Generator().manual_seed(3))
        out = module(x)
        grads = torch.autograd.grad(out, (x, module.bias), direction)  # type: ignore[arg-type]
        passed = direction.double() * (out.detach() > 0)
        assert_matches(grads[0], passed @ dense_of(module))
        assert_matches(grads[1], passed.sum(0))


def test_functional(implementation: str) -> None:
    module = grouped("block4x1", group=64, linear=float_layer(152, 24))
    x, stored = rows(5, 152), (module.values, module.crow_indices, module.col_indices)
    scale = module.weight_scale
    assert scale is not None
    with torch.no_grad():
        out = rk.functional.sparse_linear(x, *stored, bias=module.bias, weight_scale=scale)
        assert_matches(out, module(x).double())
        wide = scale.repeat_interleave(2, 1)[:, ::2]  # not contiguous
        assert torch.equal(rk.functional.sparse_linear(x, *stored, bias=module.bias, weight_scale=wide), out)
    with pytest.raises(RuntimeError, match="weight_scale must have 24 values, or 24 x 5 or 24 x 3 or 24 x 2 of groups"):
        rk.functional.sparse_linear(x, *stored, weight_scale=scale.flatten())


@pytest.mark.parametrize("activation", SCHEMES)
def test_layers_that_run_dense(monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    """As dense int8 layers with the same groups; the limits are those of floats."""
    asked = []

    def limits(dtype: torch.dtype, scheme: int, block_rows: int) -> tuple[float, float]:
        asked.append(dtype)
        return (0.0, 0.0) if dtype == torch.float32 else (1.0, 1.0)

    for pattern in PATTERNS:
        for group in GROUPS:
            module = grouped(pattern, activation, group, epilogue="silu")
            with torch.no_grad():
                wanted = {count: module(rows(count, 150)) for count in (1, FEW_ROWS + 1)}
                other_limits = crossover.limits_of(sparse(pattern, float_layer(150)).operands())
                assert crossover.limits_of(module.operands()) == other_limits
                monkeypatch.setattr(crossover, "limits", limits)
                other = copy.deepcopy(module)
                for count, result in wanted.items():
                    assert_matches(other(rows(count, 150)), result.double())
                assert other._prepared is not None
                assert other._prepared.value.runs_dense == (True, True)
                assert "runs: dense" in repr(other)
                assert set(asked) == {torch.float32}
                monkeypatch.undo()


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_states_of_any_granularity(implementation: str, pattern: str, assign: bool, tmp_path: Path) -> None:
    """A layer takes scales of every kind, whatever it had."""
    x = rows(6, 150)
    for activation in SCHEMES:
        module = rk.SparseLinear(150, 22, pattern=pattern, activation=activation)
        for number, granularity in enumerate(("channel", 32, 128, "tensor", 64, 32, "channel")):
            ready = grouped(pattern, activation, granularity)
            save_file(ready.state_dict(), tmp_path / "layer.safetensors")
            given = load_file(tmp_path / "layer.safetensors") if number % 2 else ready.state_dict()
            module.load_state_dict(given, assign=assign)
            assert torch.equal(module.weight_scale, ready.weight_scale)  # type: ignore[arg-type]
            with torch.no_grad():
                assert torch.equal(module(x), ready(x))
            assert ("granularity" in repr(module)) == isinstance(granularity, int)


def test_states_that_are_refused() -> None:
    good = grouped().state_dict()
    for value, words in (
        (float("nan"), "holds NaN or infinity"),
        (0.0, "must be positive"),
        (-1.0, "must be positive"),
    ):
        bad = good["weight_scale"].clone()
        bad[3, 2] = value
        module = rk.SparseLinear(150, 22, activation="dynamic")
        with pytest.raises(RuntimeError, match=f"weight_scale {words}"):
            module.load_state_dict({**good, "weight_scale": bad})
        assert module.weight_scale.shape == (22,)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"weight_scale must be torch\.float32"):
        rk.SparseLinear(150, 22, activation="dynamic").load_state_dict({**good, "weight_scale": bad.double()})


def test_meta_device() -> None:
    empty = rk.SparseLinear(150, 22, activation="dynamic", device="meta")
    module = grouped()
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(rows(7, 150)), module(rows(7, 150)))


@pytest.mark.parametrize("activation", SCHEMES)
def test_copies_and_changes(implementation: str, activation: str) -> None:
    module, x = grouped("block4x1", activation), rows(7, 150)
    unused = len(pickle.dumps(module))
    with torch.no_grad():
        wanted = module(x)
        assert len(pickle.dumps(module)) == unused  # nothing packed in it
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), wanted)
            other.weight_scale[:, 1] *= 3
            assert_matches(other(x), F.linear(fake_quantized(x, module), dense_of(other), other.bias.double()))
            assert torch.equal(module(x), wanted)


@pytest.mark.parametrize("activation", ["dynamic", "weight_only"])
@pytest.mark.parametrize("pattern", ["unstructured", "block4x4", "2:4"])
def test_compile_and_export(pattern: str, activation: str) -> None:
    torch.compiler.reset()
    module = grouped(pattern, activation, epilogue="gelu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = rows(7, 150).requires_grad_()
    for change in (False, True):
        with torch.no_grad():
            if change:
                module.weight_scale[:, 2] *= 2  # type: ignore[index]
            assert torch.equal(compiled(x), module(x))
            assert torch.equal(compiled(rows(40, 150)), module(rows(40, 150)))
        grads = [torch.autograd.grad(f(x).square().sum(), (x, module.bias)) for f in (compiled, module)]  # type: ignore[arg-type]
        for one, two in zip(*grads, strict=True):
            assert_matches(one, two.double())
    module.requires_grad_(False)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (rows(7, 150),), dynamic_shapes=({0: batch},))
    assert_matches(program.module()(rows(11, 150)), module(rows(11, 150)).double())
