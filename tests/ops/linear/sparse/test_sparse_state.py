"""The state of sparse layers: files, what is refused, changes that are seen, copies, casts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_support import DTYPES, PATTERNS, dense_of, float_layer, quantized, rows, sparse

import recsys_kernels as rk
from recsys_kernels.ops.linear.sparse import packs, reference
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("float", "dynamic", "static", "weight_only")


def made(kind: str, pattern: str = "unstructured") -> rk.SparseLinear:
    return sparse(pattern) if kind == "float" else quantized(pattern, kind)


def fresh(kind: str, pattern: str = "unstructured", **more: Any) -> rk.SparseLinear:
    return rk.SparseLinear(41, 22, pattern=pattern, activation=None if kind == "float" else kind, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_dict(implementation: str, pattern: str, kind: str, tmp_path: Path) -> None:
    module = made(kind, pattern)
    with torch.no_grad():
        wanted = module(rows())
    state = module.state_dict()
    names = {"values", "crow_indices", "col_indices", "bias"}
    names |= {"float": set(), "static": {"weight_scale", "input_qparams"}}.get(kind, {"weight_scale"})
    assert set(state) == names
    save_file(state, tmp_path / "layer.safetensors")
    for given in (state, load_file(tmp_path / "layer.safetensors")):
        for assign in (False, True):
            other = fresh(kind, pattern)
            values = other.values
            if kind != "static":
                other(rows())  # and is packed now
            assert other.load_state_dict(given, assign=assign) == ([], [])  # type: ignore[comparison-overlap]
            assert (other.values is values) == (not assign)  # an optimizer knows it
            for _ in range(2):
                with torch.no_grad():
                    assert torch.equal(other(rows()), wanted)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh(kind, pattern).load_state_dict({n: t for n, t in state.items() if n != "bias"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh(kind, pattern, bias=False).load_state_dict(state)


def test_other_layers_are_refused() -> None:
    state = sparse().state_dict()
    with pytest.raises(RuntimeError, match="values are of the pattern 'unstructured', but the layer's is 'block4x1'"):
        fresh("float", "block4x1").load_state_dict(state)
    with pytest.raises(RuntimeError, match="crow_indices must have 24 values, but has 23"):
        rk.SparseLinear(41, 23).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"col_indices\[\d+\] is \d+ in row \d+, but must be"):
        rk.SparseLinear(20, 22).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"values must be torch\.int8, but is torch\.float32"):
        fresh("dynamic").load_state_dict({**state, "weight_scale": torch.ones(22)})
    nested = torch.nn.Sequential(fresh("float"))
    with pytest.raises(RuntimeError, match=r"0\.values must be of"):
        nested.load_state_dict({f"0.{k}": v[:-1] if k == "values" else v for k, v in state.items()})


def test_states_that_are_refused() -> None:
    inf, nan = float("inf"), float("nan")
    good = quantized(activation="static").state_dict()
    crow, col, scale = good["crow_indices"], good["col_indices"], good["weight_scale"]
    falls, twice, outside = crow.clone(), col.clone(), col.clone()
    falls[3], outside[17] = crow[4] + 1, 41
    at = int((crow.diff() > 1).nonzero()[0])
    twice[crow[at] + 1] = twice[crow[at]]
    bad = {
        "falling rows": ("crow_indices", falls, r"crow_indices\[4\] is \d+, but must not be below"),
        "a column twice": ("col_indices", twice, r"col_indices\[\d+\] is \d+ in row \d+ for the second time"),
        "a column outside": ("col_indices", outside, r"col_indices\[17\] is 41 in row \d+, but must be 0 to 40"),
        "too few columns": ("col_indices", col[:-1], r"crow_indices\[22\] is \d+, but must be the number of"),
        "float columns": ("col_indices", col.float(), r"col_indices must be torch\.int32, but is torch\.float32"),
        "uint8 values": ("values", good["values"].to(torch.uint8), r"must be torch\.int8, but is torch\.uint8"),
        "scale 0": ("weight_scale", scale * 0, "weight_scale must be positive"),
        "scale NaN": ("weight_scale", scale * nan, "weight_scale holds NaN or infinity"),
        "infinite scale": ("weight_scale", scale * inf, "weight_scale holds NaN or infinity"),
        "integer bias": ("bias", torch.ones(22, dtype=torch.int32), "bias must be float32, float16 or bfloat16"),
        "small scale": ("input_qparams", torch.tensor([1e-38, 3.0]), "a scale of at least 7.88861e-31"),
        "zero point": ("input_qparams", torch.tensor([1.0, 0.5]), "an integer from 0 to 255"),
    }
    for name, (key, value, message) in bad.items():
        for strict in (True, False):
            for assign in (True, False):
                module = fresh("static")
                with pytest.raises(RuntimeError, match=message):
                    pytest.fail(f"{name}: {module.load_state_dict({**good, key: value}, strict, assign)}")
                assert module.nnz == 0, name  # nothing was loaded


def test_corrupted_files_of_2_to_4_layers() -> None:
    state = sparse("2:4").state_dict()
    codes = state["col_indices"].clone()
    codes[5, 0] = 0x45
    with pytest.raises(RuntimeError, match="the positions 1 and 1 for the columns 0 to 3 of row 5"):
        fresh("float", "2:4").load_state_dict({**state, "col_indices": codes})
    with pytest.raises(RuntimeError, match="crow_indices of a 2:4 layer must be empty"):
        fresh("float", "2:4").load_state_dict({**state, "crow_indices": torch.zeros(3, dtype=torch.int32)})


def changes(module: rk.SparseLinear) -> dict[str, Callable[[], Any]]:
    """Ways in which the state of a layer changes; each changes its result."""

    def step(optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            module(rows()).sum().backward()
        module(rows())  # without a gradient, and before the step
        optimizer.step()  # a fused one does not count as writing
        optimizer.zero_grad()

    def replaced(name: str, value: torch.Tensor) -> None:
        setattr(module, name, torch.nn.Parameter(value) if name in module._parameters else value)

    def loaded(assign: bool) -> None:
        double = {n: t * 2 if n in ("weight_scale", "bias") else t for n, t in module.state_dict().items()}
        module.load_state_dict(double, assign=assign)

    found = {
        "values in place": lambda: module.values.neg_(),
        "values replaced": lambda: replaced("values", module.values.detach() // 2 + 1),
        "bias in place": lambda: module.bias.add_(1),  # type: ignore[union-attr]
        "columns replaced": lambda: replaced("col_indices", 40 - _order(module)),
        "data replaced": lambda: setattr(module.values, "data", module.values.detach() // 2 + 1),
        "data of the bias": lambda: setattr(module.bias, "data", module.bias.detach() + 1),  # type: ignore[union-attr]
        "SGD": lambda: step(torch.optim.SGD(module.parameters(), 0.1)),
        "fused Adam": lambda: step(torch.optim.Adam(module.parameters(), 0.1, fused=True)),
        "AdamW of many": lambda: step(torch.optim.AdamW(module.parameters(), 0.1, foreach=True)),
        "state loaded": lambda: loaded(False),
        "state assigned": lambda: loaded(True),
        "another structure": lambda: module.load_state_dict(
            {**module.state_dict(), **{n: t for n, t in _another(module).items() if n in ("values", "col_indices")}}
        ),
    }
    if module.weight_scale is not None:
        found["scale in place"] = lambda: module.weight_scale.mul_(3)  # type: ignore[union-attr]
    return found


def _order(module: rk.SparseLinear) -> torch.Tensor:
    """For every weight how many of its row follow it."""
    crow = module.crow_indices.tolist()
    return torch.tensor([b - 1 - i for a, b in pairwise(crow) for i in range(a, b)]).int()


def _another(module: rk.SparseLinear) -> dict[str, torch.Tensor]:
    crow = module.crow_indices.tolist()
    col = torch.tensor([i - a for a, b in pairwise(crow) for i in range(a, b)]).int()
    return {**module.state_dict(), "col_indices": col}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("kind", ["float", "dynamic", "weight_only"])
def test_changes_are_seen(kind: str, inference: bool) -> None:
    module = made(kind)
    with torch.inference_mode(inference), torch.no_grad():
        before = module(rows())
        for what, change in changes(module).items():
            if inference and what in ("SGD", "fused Adam", "AdamW of many"):
                continue
            change()
            for _ in range(2):
                out = module(rows())
                assert not torch.equal(out, before), what
                with rk.backend("reference"):
                    assert_matches(out, module(rows()).double())
            before = out


def test_what_blocks_hold_past_the_end_is_no_weight() -> None:
    """Files can hold anything there; neither a product nor a scale comes from it."""
    for pattern in ("block4x1", "block16x16", "2:4"):
        module = sparse(pattern, float_layer(41, 22), 0.2)
        rows_at, columns = reference.places(*module._stored())
        outside = ((rows_at >= 22) | (columns >= 41)).expand_as(module.values)
        assert outside.any()
        with torch.no_grad():
            wanted = [layer(rows()) for layer in (module, module.quantize(), module.quantize(granularity="tensor"))]
            module.values[outside] = 1e6
            found = [layer(rows()) for layer in (module, module.quantize(), module.quantize(granularity="tensor"))]
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
            module.values[outside] = float("nan")
            assert torch.equal(module.quantize()(rows()), wanted[1])


def test_a_load_of_other_weights_drops_the_gradient() -> None:
    module = sparse(linear=float_layer(41, 22), sparsity=0.8)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(rows()).sum().backward()
    module.load_state_dict(sparse(sparsity=0.5).state_dict())
    module(rows()).sum().backward()
    optimizer.step()
    assert module.values.grad is not None
    assert module.values.grad.shape == module.values.shape


def test_refresh_after_writes_that_torch_does_not_count() -> None:
    module = sparse().requires_grad_(False)
    before = module(rows())
    module.values.data.mul_(2)
    module.refresh()
    assert_matches(module(rows()), 2 * before.double() - module.bias.double())  # type: ignore[union-attr]


def test_nan_in_what_was_trained_is_packed_once() -> None:
    module = sparse()
    module(rows()).sum().backward()
    with torch.no_grad():
        module.values[0] = float("nan")
        module(rows())
        known = module._prepared
        module(rows())
    assert module._prepared is known


def test_compiled_layers_that_share_values_keep_their_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    first, second = sparse().requires_grad_(False), sparse().requires_grad_(False)
    second.values, second.crow_indices, second.col_indices = first.values, first.crow_indices, first.col_indices
    second.bias = torch.nn.Parameter(torch.ones(22), requires_grad=False)
    compiled = [torch.compile(module, fullgraph=True, backend="aot_eager") for module in (first, second)]
    for module in compiled:
        module(rows())
    monkeypatch.setattr(packs, "Packs", None)  # nothing is made anew
    results = [module(rows()) for module in compiled]
    monkeypatch.undo()
    assert all(torch.equal(found, module(rows())) for found, module in zip(results, (first, second), strict=True))


def test_compiled_code_sees_changes() -> None:
    torch.compiler.reset()
    module = sparse()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    step = torch.optim.Adam(module.parameters(), 0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            before = compiled(rows())
        compiled(rows()).sum().backward()
        step.step()
        step.zero_grad()
        with torch.no_grad():
            assert torch.equal(compiled(rows()), module(rows()))
            assert not torch.equal(compiled(rows()), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "2:4"])
def test_copies(implementation: str, pattern: str, kind: str) -> None:
    module = made(kind, pattern)
    unused = len(pickle.dumps(module))
    with torch.no_grad():
        wanted = module(rows())
        module(rows(40))
        assert len(pickle.dumps(module)) == unused  # nothing packed in it
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(rows()), wanted)
            other.values.neg_()
            assert not torch.equal(other(rows()), wanted)
            assert torch.equal(module(rows()), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts(implementation: str, dtype: torch.dtype) -> None:
    for pattern in PATTERNS:
        module = sparse(pattern)
        structure = module.crow_indices.clone(), module.col_indices.clone()
        module.to(dtype)
        assert module.dtype == module.values.dtype == module.bias.dtype == dtype  # type: ignore[union-attr]
        assert torch.equal(module.crow_indices, structure[0])
        assert torch.equal(module.col_indices, structure[1])
        x = rows().to(dtype)
        with torch.no_grad():
            wanted = torch.nn.functional.linear(x.double(), dense_of(module), module.bias.double())  # type: ignore[union-attr]
            assert_matches(module(x), wanted)
        q = quantized(pattern)
        before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
        full = q(rows()).detach()
        q.to(dtype)
        assert torch.equal(q(rows()), full.to(dtype))
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in q.state_dict().items())
        for layer in (module, q):
            with pytest.raises(ValueError, match=r"float32, float16 or bfloat16.*torch\.float64"):
                layer.double()


def test_meta_device() -> None:
    for kind in KINDS:
        for pattern in ("unstructured", "block4x1", "2:4"):
            module = made(kind, pattern)
            empty = fresh(kind, pattern, device="meta")
            assert empty(rows().to("meta")).shape == (7, 22)
            empty.load_state_dict(module.state_dict(), assign=True)
            assert torch.equal(empty(rows()), module(rows()))


def test_layers_of_nothing_and_of_everything(implementation: str) -> None:
    for pattern in PATTERNS[:-1]:
        empty, linear = fresh("float", pattern), float_layer()
        assert empty.nnz == 0
        assert torch.equal(empty(rows()), torch.zeros(7, 22))
        full = rk.SparseLinear.from_dense(linear, 0.0, pattern)
        assert torch.equal(dense_of(full), linear.weight.detach().double())
        assert_matches(full(rows()).detach(), linear(rows()).detach().double())
