"""SparseLinear: pruning, conversions, calls, compiled code, where it runs dense, 2:4 on GPUs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from sparse_support import DTYPES, FUNCTIONS, PATTERNS, SCHEMES, dense_of, float_layer, quantized, rows, sparse
from support import Calls

import recsys_kernels as rk
from recsys_kernels.backends.registry import native
from recsys_kernels.ops.linear.sparse import crossover, packs, semi_structured
from recsys_kernels.ops.linear.sparse import layer as layer_module
from recsys_kernels.ops.linear.sparse.patterns import keep_mask
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- pruning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*PATTERNS, "1:4", "4:8"])
@pytest.mark.parametrize("shape", [(41, 22), (1, 1), (7, 1), (1, 7), (64, 32), (6, 3), (17, 5)], ids=str)
def test_from_dense_keeps_the_largest(shape: tuple[int, int], pattern: str) -> None:
    linear = float_layer(*shape)
    module = sparse(pattern, linear) if ":" not in pattern else rk.SparseLinear.from_dense(linear, pattern=pattern)
    mask = keep_mask(linear.weight.detach().abs(), None if ":" in pattern else 0.8, pattern)
    assert torch.equal(dense_of(module), torch.where(mask, linear.weight.detach(), 0.0).double())
    assert module.pattern == ("unstructured" if pattern in ("1:4", "4:8") else pattern)
    assert torch.equal(module.dequantize().double(), dense_of(module))
    assert module.sparsity == max(0.0, 1 - module.values.numel() / linear.weight.numel())
    assert module.nnz == module.values.numel()


def test_unstructured_by_hand() -> None:
    linear = torch.nn.Linear(4, 3, bias=False)
    weight = [[0.1, -5.0, 0.2, 3.0], [0.0, 0.3, 0.0, 0.1], [-4.0, 0.0, 2.0, -6.0]]
    linear.weight.data = torch.tensor(weight)
    module = rk.SparseLinear.from_dense(linear, 7 / 12)
    assert module.values.tolist() == [-5.0, 3.0, -4.0, 2.0, -6.0]
    assert module.crow_indices.tolist() == [0, 2, 2, 5]
    assert module.col_indices.tolist() == [1, 3, 0, 2, 3]
    assert module.bias is None
    assert module(torch.eye(4)).tolist() == [[0, 0, -4], [-5, 0, 0], [0, 0, 2], [3, 0, -6]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_zero_is_dropped(pattern: str) -> None:
    """sparsity=None: a layer that was pruned elsewhere."""
    pruned = sparse(pattern).to_dense()
    again = rk.SparseLinear.from_dense(pruned, None, pattern)  # type: ignore[arg-type]
    assert torch.equal(dense_of(again), pruned.weight.detach().double())
    assert again.nnz <= sparse(pattern).nnz
    torch.nn.init.zeros_(pruned.weight)
    empty = rk.SparseLinear.from_dense(pruned, None, pattern)  # type: ignore[arg-type]
    assert empty.nnz == (0 if pattern != "2:4" else 22 * 22)
    assert torch.equal(empty(rows()), pruned.bias.expand(7, 22))


def test_more_weights_than_the_pattern_keeps() -> None:
    linear = float_layer(8, 2)
    with torch.no_grad():
        linear.weight[:] = torch.tensor([[1.0, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"row 1 of weight has 3 weights in the columns 4 to 7, of which '2:4'"):
        rk.SparseLinear.from_dense(linear, None, "2:4")


def test_masked_layers_are_taken_as_they_are() -> None:
    class Mask(torch.nn.Module):
        def __init__(self, mask: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.mask

    linear, mask = float_layer(), torch.rand(22, 41, generator=torch.Generator().manual_seed(1)) < 0.3
    wanted = (linear.weight.detach() * mask).double()
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", Mask(mask))
    module = rk.SparseLinear.from_dense(linear, None)
    assert torch.equal(dense_of(module), wanted)
    assert module.values.requires_grad
    assert module.values.is_leaf


def test_wrong_options() -> None:
    linear = float_layer()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"pattern": "block2x2"}, "pattern must be 'unstructured'"),
        ({"pattern": "dense"}, "but is 'dense'"),
        ({"sparsity": 1.0}, "must be at least 0 and below 1, but is 1.0"),
        ({"sparsity": -0.1}, "must be at least 0 and below 1"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "sparsity must be None or 0.5 with the pattern '2:4'"),
        ({"epilogue": "tanh"}, "epilogue must be None, 'relu', 'gelu', 'sigmoid' or 'silu', but is 'tanh'"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"{options}: {rk.SparseLinear.from_dense(linear, **options)}")
    with pytest.raises(ValueError, match=r"gives float32, float16 or bfloat16, but dtype is torch\.float64"):
        rk.SparseLinear.from_dense(linear.double())
    for other in (torch.nn.Bilinear(3, 4, 5), torch.nn.ReLU(), torch.zeros(3), None):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, but is a"):
            rk.SparseLinear.from_dense(other)  # type: ignore[arg-type]
    for sizes in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ValueError, match="must be at least 1"):
            rk.SparseLinear(*sizes)
    with pytest.raises(ValueError, match="1 to 65536, but is 65537"):
        rk.SparseLinear(65537, 1, activation="dynamic")
    with pytest.raises(ValueError, match="stores 'unstructured', blocks or '2:4', but pattern is '1:4'"):
        rk.SparseLinear(8, 8, pattern="1:4")
    with pytest.raises(ValueError, match="input_range is for activation='static'"):
        rk.SparseLinear(8, 8, activation="dynamic", input_range=(0, 1))
    module = sparse()
    for options, message in (
        ({"activation": "static"}, "needs input_range"),
        ({"activation": "int8"}, "activation must be 'dynamic'"),
        ({"granularity": 16}, "granularity must be 'channel', 'tensor', 32, 64 or 128, but is 16"),
        ({"activation": "static", "input_range": (1.0, 1.0)}, "low < high"),
    ):
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"{options}: {module.quantize(**options)}")
    with pytest.raises(RuntimeError, match="int8 weights already"):
        module.quantize().quantize()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_are_refused(value: float) -> None:
    linear = float_layer()
    with torch.no_grad():
        linear.weight[13, 39] = value
    with pytest.raises(ValueError, match=r"scores\[13, 39\] is (nan|inf), but must be finite"):
        rk.SparseLinear.from_dense(linear)
    for pattern in PATTERNS:
        module = sparse(pattern)
        with torch.no_grad():
            module.values.view(-1)[0] = value
        row = int((~dense_of(module).isfinite()).nonzero()[0, 0])
        with pytest.raises(ValueError, match=f"row {row} of values holds NaN or infinity"):
            module.quantize()
    module = sparse()
    with torch.no_grad():
        module.bias[5] = value  # type: ignore[index]
    with pytest.raises(ValueError, match="element 5 of bias is NaN or infinity"):
        module.quantize()


# ---- conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_dense(implementation: str, pattern: str, dtype: torch.dtype) -> None:
    for epilogue, function in FUNCTIONS.items():
        module = sparse(pattern, float_layer(dtype=dtype), epilogue=epilogue).eval()
        plain = module.to_dense()
        assert isinstance(plain, torch.nn.Linear if epilogue is None else torch.nn.Sequential)
        first = plain if epilogue is None else plain[0]  # type: ignore[index]
        assert (first.weight.dtype, plain.training) == (dtype, False)
        assert torch.equal(first.weight.detach().double(), dense_of(module))
        x = rows().to(dtype)
        with torch.no_grad():
            wanted = function(F.linear(x.double(), dense_of(module), module.bias.double()))
            assert_matches(module(x), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_sparse(implementation: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(5)
    matrix = torch.randn(16, 32, generator=rng) * (torch.rand(16, 32, generator=rng) < 0.2)
    matrix, bias, x = matrix.to(dtype), torch.randn(16, generator=rng), rows(5, 32).to(dtype)
    wanted = F.linear(x.double(), matrix.double(), bias.to(dtype).double())
    tensors = {
        "unstructured": matrix.to_sparse_csr(),
        "block4x1": matrix.to_sparse_bsr((4, 1)),
        "block16x4": matrix.to_sparse_bsr((16, 4)),
        "block1x16": matrix.to_sparse_bsr((1, 16)),
    }
    for pattern, tensor in tensors.items():
        module = rk.SparseLinear.from_sparse(tensor, bias.to(dtype), epilogue="relu")
        assert module.pattern == pattern
        assert_matches(module(x).detach(), F.relu(wanted))
        assert module.values.data_ptr() != tensor.values().data_ptr()
    assert rk.SparseLinear.from_sparse(matrix.to_sparse_bsr((1, 1))).pattern == "unstructured"
    for other in (matrix, matrix.to_sparse_coo(), matrix.to_sparse_csc(), [1.0]):
        with pytest.raises(TypeError, match=r"must be in the layout torch\.sparse_csr or torch\.sparse_bsr, but is"):
            rk.SparseLinear.from_sparse(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern must be"):
        rk.SparseLinear.from_sparse(matrix.to_sparse_bsr((2, 2)))
    with pytest.raises(ValueError, match="bias must have shape"):
        rk.SparseLinear.from_sparse(tensors["unstructured"], torch.ones(3))
    torch.sparse.check_sparse_tensor_invariants.disable()
    broken = torch.sparse_csr_tensor(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.ones(2), (1, 4))
    with pytest.raises(RuntimeError, match=r"col_indices\[1\] is 1 in row 0 for the second time"):
        rk.SparseLinear.from_sparse(broken)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_quantization_by_the_formula(pattern: str, granularity: str) -> None:
    module = sparse(pattern)
    q = module.quantize(granularity=granularity)
    dense = dense_of(module).numpy().astype(np.float32)
    largest = np.abs(dense).max(1)
    if granularity == "tensor":
        largest = np.full_like(largest, largest.max())
    scale = np.maximum(largest / np.float32(127), np.float32(2.0**-100))
    assert np.array_equal(q.weight_scale.numpy(), scale)  # type: ignore[union-attr]
    wanted = np.clip(np.rint(dense / scale[:, None]), -127, 127)
    assert np.array_equal(dense_of(q).numpy(), wanted.astype(np.float64) * scale[:, None].astype(np.float64))
    assert q.values.dtype == torch.int8
    assert torch.equal(q.col_indices, module.col_indices)
    assert torch.equal(q.crow_indices, module.crow_indices)


@pytest.mark.parametrize("activation", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_int8_layers_are_those_of_the_dense_operator(implementation: str, pattern: str, activation: str) -> None:
    """The dense int8 layer with the same weights gives the same integers."""
    module = quantized(pattern, activation)
    q = (dense_of(module) / module.weight_scale.double().unsqueeze(1)).round().to(torch.int8)  # type: ignore[union-attr]
    with torch.no_grad():
        for count in (1, 7, 40):
            wanted = rk.functional.int8_linear(
                rows(count),
                q,
                module.weight_scale,  # type: ignore[arg-type]
                module.bias,
                activation=activation,
                input_qparams=module.input_qparams,
            )
            assert_matches(module(rows(count)), wanted.double())
    x = rows(33)
    noise = (module(x) - sparse(pattern)(x)).square().mean() / sparse(pattern)(x).square().mean()
    assert noise < 10 ** (-4.0 if activation == "weight_only" else -3.5)


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "2:4"])
@pytest.mark.parametrize("kind", ["float", "dynamic"])
def test_inputs_of_any_shape(implementation: str, kind: str, pattern: str) -> None:
    module = sparse(pattern, epilogue="relu") if kind == "float" else quantized(pattern, epilogue="relu")
    x = rows(24)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            wanted = module(x)
            for shape in ((24,), (4, 6), (2, 3, 4), (1, 24, 1)):
                assert torch.equal(module(x.reshape(*shape, 41)), wanted.reshape(*shape, 22))
            assert_matches(module(x[3]).detach(), wanted[3].detach().double())
            assert torch.equal(module(x.t().contiguous().t()), wanted)
            assert torch.equal(module(x.repeat_interleave(2, 1)[:, ::2]), wanted)
            for shape in ((0,), (2, 0), (0, 3)):
                assert module(torch.empty(*shape, 41)).shape == (*shape, 22)


def test_wrong_inputs_raise_what_linear_raises(implementation: str) -> None:
    linear = float_layer()
    dense = rk.SparseLinear.from_dense(linear, 0.0)
    for module in (sparse(), sparse("2:4"), dense, quantized()):
        for bad in (torch.randn(3, 40), torch.randn(42), torch.randn(2, 41, 3), torch.tensor(1.0), torch.ones(3, 0)):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    with pytest.raises(RuntimeError):
                        linear(bad)
                    with pytest.raises(RuntimeError):
                        pytest.fail(f"accepted {bad.shape}: {module(bad)}")
        for bad in (torch.ones(3, 41, dtype=torch.int64), torch.ones(3, 41).double()):
            with torch.no_grad(), pytest.raises(RuntimeError, match="input must be float32, float16 or bfloat16, but"):
                module(bad)


def test_static_layer_without_a_range() -> None:
    module = rk.SparseLinear(41, 22, activation="static")
    with pytest.raises(RuntimeError, match=r"needs the range of its input: call quantize\(\) with input_range"):
        module(rows())
    ready = quantized(activation="static")
    module.load_state_dict(ready.state_dict())
    assert torch.equal(module(rows()), ready(rows()))


def test_a_call_is_one_operator() -> None:
    for module in (sparse(), quantized("block4x1"), sparse("2:4")):
        for x in (rows(3), rows(40)):
            with torch.no_grad():
                module(x)
                prepared = module._prepared
                with Calls() as calls:
                    module(x)
            assert [n for n in calls.names if "recsys" in n] in (
                ["recsys_kernels::sparse_packed"],
                ["recsys_kernels::int8_chain"],
            )
            assert module._prepared is prepared


def test_layers_run_from_their_operands_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sparse()
    with torch.no_grad():
        wanted = module(rows())
        monkeypatch.setattr(native, "reason", "taken away for a test")
        monkeypatch.setattr(native, "isa", lambda: None)
        other = copy.deepcopy(module)
        assert_matches(other(rows()), wanted.double())
        assert other._prepared is None
        assert "runs" not in repr(other)


def test_wide_indices_are_checked_before_they_are_rounded() -> None:
    """2^32 would become column 0."""
    for crow, col in (([0, 1, 2], [2**32, 1]), ([0, 2**32 + 1, 2], [0, 1])):
        with torch.sparse.check_sparse_tensor_invariants(False):
            matrix = torch.sparse_csr_tensor(crow, col, [1.0, 2.0], size=(2, 4))
        with pytest.raises((IndexError, RuntimeError), match="indices"):
            rk.SparseLinear.from_sparse(matrix)


def test_default_sparsity() -> None:
    linear = float_layer(64, 32)
    assert rk.SparseLinear.from_dense(linear).sparsity == pytest.approx(0.9, abs=0.01)
    assert rk.SparseLinear.from_dense(linear, pattern="2:4").sparsity == 0.5
    with pytest.raises(ValueError, match="2:4"):
        rk.SparseLinear.from_dense(linear, 0.9, "2:4")


def test_repr_says_what_it_is() -> None:
    assert repr(sparse()) == ("SparseLinear(41, 22, bias=True, pattern='unstructured', sparsity=0.8004, runs: sparse)")
    text = repr(quantized("block4x1", "static", linear=float_layer(bias=False), epilogue="gelu"))
    assert "bias=False, pattern='block4x1', sparsity=0.78" in text
    assert "activation='static', epilogue='gelu'" in text


# ---- compiled code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "2:4"])
@pytest.mark.parametrize("kind", ["float", "dynamic", "static"])
def test_compile_and_export(kind: str, pattern: str) -> None:
    torch.compiler.reset()
    module = sparse(pattern, epilogue="gelu") if kind == "float" else quantized(pattern, kind, epilogue="gelu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = rows().requires_grad_()
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
        before = packs.PACKS.value_of(module.values)
        assert before is not None
        assert torch.equal(compiled(rows(40)), module(rows(40)))
        assert packs.PACKS.value_of(module.values) is before
    inputs = [x, *module.parameters()]
    grads = [torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, module)]
    for one, two in zip(*grads, strict=True):
        assert_matches(one, two.double())
    module.requires_grad_(False)
    for count in (7, 2):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(module, (rows(count),), dynamic_shapes=({0: batch},))
        assert_matches(program.module()(rows(11)), module(rows(11)).double())


def test_functional_names_and_shapes(implementation: str) -> None:
    module = sparse("block4x1", float_layer(40, 20))
    stored = module.values.detach(), module.crow_indices, module.col_indices
    x, wanted = rows(5, 40), F.linear(rows(5, 40).double(), dense_of(module))
    assert_matches(rk.functional.sparse_linear(x, *stored), wanted)
    assert_matches(rk.functional.sparse_linear(x, *stored, epilogue="relu", dtype=torch.float16), F.relu(wanted))
    pairs = sparse("2:4", float_layer(40, 20))
    stored = pairs.values.detach(), pairs.crow_indices, pairs.col_indices
    assert_matches(rk.functional.sparse_linear(x, *stored), F.linear(x.double(), dense_of(pairs)))
    q = pairs.quantize(granularity="tensor")
    scale = q.weight_scale[:1]  # type: ignore[index]
    out = rk.functional.sparse_linear(x, q.values, q.crow_indices, q.col_indices, weight_scale=scale)
    with torch.no_grad():
        assert_matches(out, (q(x) - q.bias).double())
    for activation in ("dynamic", "relu"):
        with pytest.raises(ValueError, match="is for int8 values, but values are torch"):
            rk.functional.sparse_linear(x, *stored, activation=activation)
    with pytest.raises(RuntimeError, match="weight_scale has no gradient"):
        rk.functional.sparse_linear(x, q.values, *stored[1:], weight_scale=scale.requires_grad_())


# ---- where a layer runs dense ---------------------------------------------------------------------------------------


def test_table_of_crossovers() -> None:
    from recsys_kernels.backends.registry import ISA_LEVELS

    assert set(crossover.CROSSOVER) == set(ISA_LEVELS)
    for level, kinds in crossover.CROSSOVER.items():
        assert set(kinds) == {"float32", "16-bit", "int8", "int8 float"}, level
        for kind, by_rows in kinds.items():
            assert set(by_rows) == {1, 4}
            assert all(0.05 < limit <= 1.0 for pair in by_rows.values() for limit in pair), (level, kind)


@pytest.mark.parametrize("limits", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)], ids=["both", "few", "many"])
@pytest.mark.parametrize("kind", ["float", *SCHEMES])
def test_layers_that_run_dense(monkeypatch: pytest.MonkeyPatch, kind: str, limits: tuple[float, float]) -> None:
    for pattern in PATTERNS:
        module = sparse(pattern, epilogue="silu") if kind == "float" else quantized(pattern, kind, epilogue="silu")
        with torch.no_grad():
            wanted = {count: module(rows(count)) for count in (1, 16, 17)}
            monkeypatch.setattr(crossover, "limits", lambda *args: limits)
            other = copy.deepcopy(module)
            for count, result in wanted.items():
                other(rows(count))
                with Calls() as calls:
                    out = other(rows(count))
                assert_matches(out, result.double())
                dense = limits[count > crossover.FEW_ROWS] == 0.0
                assert ("recsys_kernels::sparse_packed" in calls.names) != dense
                assert ("recsys_kernels::int8_chain" in calls.names) == (dense and kind != "float")
                assert other(rows(count).reshape(count, 1, 41)).shape == (count, 1, 22)
            assert other(rows(1)[0]).shape == (22,)
            assert "runs: dense" in repr(other)
            other.values.neg_()
            if kind in ("float", "weight_only"):
                wide = F.linear(rows(17).double(), dense_of(other), other.bias.double())  # type: ignore[union-attr]
                assert_matches(other(rows(17)), F.silu(wide))
            with rk.backend("reference"), Calls() as calls:
                other(rows(17))
            assert not any("int8_chain" in name for name in calls.names)
            monkeypatch.undo()


def test_dense_layers_heed_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sparse ones don't: results would differ with the table."""
    module = sparse(linear=float_layer(300, 20)).requires_grad_(False)
    wanted = module(rows(20, 300))
    monkeypatch.setattr(crossover, "limits", lambda *args: (0.0, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches(copy.deepcopy(module)(rows(20, 300)), wanted.double())


def test_density_of_int8_products_is_that_of_fours() -> None:
    """Four columns of a row are multiplied together, whether one of them is kept or all are."""
    one_of_four = torch.tensor([[1.0, 0, 0, 0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 3]])
    linear = torch.nn.Linear(9, 2)
    linear.weight.data = one_of_four
    module = rk.SparseLinear.from_dense(linear, None)
    assert crossover.density(module.operands()) == pytest.approx(3 / 18)
    assert crossover.density(module.quantize("weight_only").operands()) == pytest.approx(3 / 18)
    assert crossover.density(module.quantize().operands()) == pytest.approx(3 / 6)
    assert crossover.density(quantized("2:4").operands()) == 1.0
    blocks = quantized("block4x4")
    assert crossover.density(blocks.operands()) == pytest.approx(blocks.values.shape[0] / (6 * 11), rel=0.2)


# ---- 2:4 on GPUs ----------------------------------------------------------------------------------------------------


def test_semi_structured_layers_are_asked_for_only_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    half = sparse("2:4").half()
    assert not semi_structured.serves(half.values)

    class OnGpu:
        def __init__(self, values: torch.Tensor) -> None:
            self.dtype, self.device = values.dtype, torch.device("cuda", 0)
            self.dims = values.dim()

        def dim(self) -> int:
            return self.dims

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, with_library, without in (((8, 0), True, True), ((9, 0), True, False), ((7, 5), False, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for library, wanted in ((True, with_library), (False, without)):
            monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda found=library: found)
            assert semi_structured.serves(OnGpu(half.values)) == wanted  # type: ignore[arg-type]
            assert not semi_structured.serves(OnGpu(sparse("2:4").values))  # type: ignore[arg-type]
            assert not semi_structured.serves(OnGpu(sparse().half().values))  # type: ignore[arg-type]
    monkeypatch.delattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not semi_structured.serves(OnGpu(half.values))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(41, 22), (64, 64), (1, 1), (130, 5), (5, 130)], ids=str)
def test_semi_structured_products(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What torch gets: whole tiles of which every four columns hold two weights; here multiplied as dense ones."""
    given: list[tuple[int, ...]] = []

    def compress(weight: torch.Tensor) -> torch.Tensor:
        given.append(tuple(weight.shape))
        assert weight.is_contiguous()
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 2
        return weight

    monkeypatch.setattr(semi_structured, "compress", compress)
    monkeypatch.setattr(semi_structured, "serves", lambda values: True)
    monkeypatch.setattr(layer_module, "runs_packed", lambda values: False)
    for epilogue, function in FUNCTIONS.items():
        module = sparse("2:4", float_layer(*shape, dtype=dtype), epilogue=epilogue)
        given.clear()
        for count in (1, 8, 9):
            x = rows(count, shape[0]).to(dtype)
            wanted = F.linear(x.double(), dense_of(module), module.bias.detach().double())  # type: ignore[union-attr]
            with torch.no_grad():
                assert_matches(module(x) * 0.5, function(wanted) * 0.5, torch.bfloat16)  # the product is rounded, too
                assert torch.equal(module(x.reshape(count, 1, -1)), module(x).unsqueeze(1))
        assert given == [(-(-shape[1] // 64) * 64, -(-shape[0] // 64) * 64)]  # once
        # A frozen layer's gradient goes through it, by functions of our own; a trained one does not use it.
        x = rows(3, shape[0]).to(dtype).requires_grad_()
        module.requires_grad_(False)
        (grad,) = torch.autograd.grad(module(x).sum(), x)
        wide = x.detach().double().requires_grad_()
        out = function(F.linear(wide, dense_of(module), module.bias.double()))  # type: ignore[union-attr]
        (wanted,) = torch.autograd.grad(out.sum(), wide)
        scale = dense_of(module).abs().sum(0).max() + 1e-3
        assert ((grad.double() - wanted).abs() / scale).max() < 0.03
        module.requires_grad_(True)
        module(x).sum().backward()
        assert len(given) == 1
        with torch.no_grad():
            module.values.mul_(2)
            module(x)
            assert module(torch.empty(0, shape[0], dtype=dtype)).shape == (0, shape[1])
            with pytest.raises(RuntimeError, match="does not fit a weight of shape"):
                module(torch.ones(2, shape[0] + 1, dtype=dtype))
        assert len(given) == 2
    with torch.no_grad():
        assert module(rows(3, shape[0])).dtype == dtype  # another type of input: as everywhere else
    assert len(given) == 2


def test_scipy_agrees(implementation: str) -> None:
    module = sparse(linear=float_layer(300, 200, bias=False), sparsity=0.95)
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    matrix = scipy.sparse.csr_matrix((state["values"], state["col_indices"], state["crow_indices"]), (200, 300))
    x = rows(50, 300)
    wanted = (matrix.astype(np.float64) @ x.double().numpy().T).T
    assert_matches(module(x).detach(), torch.from_numpy(np.ascontiguousarray(wanted)))
