"""The state of int8 layers: files, changes that are seen, copies, casts."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_support import OPTIONS, float_layer, quantize, rows
from safetensors.torch import load_file, save_file

import recsys_kernels as rk
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")


def fresh(name: str, **more: Any) -> rk.Int8Linear:
    return rk.Int8Linear(40, 21, **OPTIONS[name], **more)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict(implementation: str, name: str, tmp_path: Path) -> None:
    module = quantize(float_layer(), **OPTIONS[name])
    wanted = module(rows())
    state = module.state_dict()
    scales = {"weight_only": (1, 1), "groups": (21, 2)}.get(name, (21, 1))
    expected = {
        "weight": ((21, 40), torch.int8),
        "weight_scale": (scales, torch.float32),
        "bias": ((21,), torch.float32),
        "input_qparams": ((2,), torch.float32),
    }
    if name != "static":
        del expected["input_qparams"]
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == expected
    save_file(state, tmp_path / "layer.safetensors")
    for given in (state, load_file(tmp_path / "layer.safetensors")):
        for assign in (False, True):
            other = fresh(name)
            if name != "static":
                assert not torch.equal(other(rows()), wanted)  # and is packed now
            assert other.load_state_dict(given, assign=assign) == ([], [])  # type: ignore[comparison-overlap]
            assert torch.equal(other(rows()), wanted)
            with torch.no_grad():
                assert torch.equal(other(rows()), wanted)
    with pytest.raises(RuntimeError, match="size mismatch"):
        rk.Int8Linear(40, 22, **OPTIONS[name]).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh(name).load_state_dict({n: t for n, t in state.items() if n != "weight_scale"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh(name, bias=False).load_state_dict(state)


def test_states_that_are_refused() -> None:
    inf, nan = float("inf"), float("nan")
    good = quantize(float_layer(), "static").state_dict()
    bad = {
        "float weight": ("weight", float_layer().weight.detach(), "must be torch.int8, but is torch.float32"),
        "uint8 weight": ("weight", good["weight"].to(torch.uint8), "must be torch.int8, but is torch.uint8"),
        "half scale": ("weight_scale", good["weight_scale"].half(), "must be torch.float32, but is torch.float16"),
        "scale 0": ("weight_scale", good["weight_scale"] * 0, "weight_scale must be positive"),
        "negative scale": ("weight_scale", -good["weight_scale"], "weight_scale must be positive"),
        "infinite scale": ("weight_scale", good["weight_scale"] * inf, "weight_scale holds NaN or infinity"),
        "scale NaN": ("weight_scale", good["weight_scale"] * nan, "weight_scale holds NaN or infinity"),
        "integer bias": ("bias", torch.ones(21, dtype=torch.int32), "bias must be a float type"),
        "qparams NaN": ("input_qparams", torch.tensor([nan, 0.0]), "input_qparams holds NaN"),
        "negative qparams": (
            "input_qparams",
            torch.tensor([-1.0, 0.0]),
            "must be a scale and an integer from 0 to 255",
        ),
        "zero point 256": ("input_qparams", torch.tensor([1.0, 256.0]), "an integer from 0 to 255"),
        "zero point 0.5": ("input_qparams", torch.tensor([1.0, 0.5]), "an integer from 0 to 255"),
    }
    for name, (key, value, message) in bad.items():
        for strict in (True, False):
            module = fresh("static")
            with pytest.raises(RuntimeError, match=message):
                pytest.fail(f"{name} was accepted: {module.load_state_dict({**good, key: value}, strict=strict)}")
            assert not module.weight.any(), name  # nothing was loaded
    nested = torch.nn.Sequential(fresh("static"))
    with pytest.raises(RuntimeError, match=r"0\.weight_scale must be positive"):
        nested.load_state_dict({f"0.{k}": v * 0 if k == "weight_scale" else v for k, v in good.items()})


def test_assigned_half_bias_becomes_float() -> None:
    module, state = fresh("dynamic"), quantize(float_layer()).state_dict()
    half = state["bias"].half()
    module.load_state_dict({**state, "bias": half}, assign=True)
    assert module.bias is not None
    assert module.bias.dtype == torch.float32
    assert half.dtype == torch.float16
    assert torch.equal(module.bias, half.float())
    module(rows())


def changes(module: rk.Int8Linear, run: Any) -> dict[str, Callable[[], Any]]:
    """Ways in which the state of a layer changes; each changes its result."""

    def step(optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            run(rows()).sum().backward()
        run(rows())  # without a gradient, and before the step
        optimizer.step()  # a fused one does not count as writing
        optimizer.zero_grad()

    def assign(name: str, value: torch.Tensor) -> None:
        setattr(module, name, torch.nn.Parameter(value) if name in module._parameters else value)

    bias = module.bias
    assert bias is not None
    found = {
        "weight in place": lambda: module.weight.neg_(),
        "a row of the weight": lambda: module.weight[3].fill_(100),
        "a view of the weight": lambda: module.weight.view(-1)[5:700].zero_(),
        "weight replaced": lambda: assign("weight", (module.weight // 2)),
        "scale in place": lambda: module.weight_scale.mul_(3),
        "scale replaced": lambda: assign("weight_scale", module.weight_scale * 5),
        "bias in place": lambda: module.bias.add_(1),  # type: ignore[union-attr]
        "bias replaced": lambda: assign("bias", torch.nn.Parameter(torch.randn(21))),
        "bias of a function": lambda: torch.nn.init.uniform_(module.bias, 5, 6),  # type: ignore[arg-type]
        "SGD": lambda: step(torch.optim.SGD(module.parameters(), 0.1)),
        "Adam": lambda: step(torch.optim.Adam(module.parameters(), 0.1)),
        "fused Adam": lambda: step(torch.optim.Adam(module.parameters(), 0.1, fused=True)),
        "AdamW of many": lambda: step(torch.optim.AdamW(module.parameters(), 0.1, foreach=True)),
        "state loaded": lambda: module.load_state_dict(
            {n: t * 2 if n in ("weight_scale", "bias") else t for n, t in module.state_dict().items()}
        ),
        "state assigned": lambda: module.load_state_dict(
            {n: t * 2 if n in ("weight_scale", "bias") else t for n, t in module.state_dict().items()}, assign=True
        ),
    }
    if module.input_qparams is not None:
        found |= {
            "qparams in place": lambda: module.input_qparams.mul_(torch.tensor([1.5, 1.0])),  # type: ignore[union-attr]
            "qparams replaced": lambda: assign("input_qparams", torch.tensor([0.01, 3.0])),
        }
    return found


@pytest.mark.parametrize("mode", ["eager", "inference", "compiled", "mlp", "compiled mlp"])
@pytest.mark.parametrize("name", OPTIONS)
def test_changes_are_seen(name: str, mode: str) -> None:
    torch.compiler.reset()
    module = quantize(float_layer(), **OPTIONS[name])
    run: Any = rk.Int8MLP(module) if "mlp" in mode else module
    if "compiled" in mode:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = rows()
    with torch.inference_mode(mode == "inference"), torch.no_grad():
        before = run(x)
        for what, change in changes(module, run).items():
            if mode == "inference" and what in ("SGD", "Adam", "fused Adam", "AdamW of many"):
                continue
            change()
            for _ in range(2):
                out = run(x)
                assert not torch.equal(out, before), what
                with rk.backend("reference"):
                    assert_matches(out, module(x).double())
            before = out


def test_compiled_training_is_seen_outside_of_it() -> None:
    torch.compiler.reset()
    module = quantize(float_layer())
    compiled, optimizer = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.optim.Adam
    step = optimizer(module.parameters(), 0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            before = module(rows())
        compiled(rows()).sum().backward()
        with torch.no_grad():
            assert torch.equal(module(rows()), before)
            step.step()
            step.zero_grad()
            assert_matches(module(rows()), before.double() - 0.1)


def test_modules_made_or_loaded_in_inference_mode() -> None:
    """Inference tensors do not count what is written to them."""
    source = quantize(float_layer(), **OPTIONS["static"])
    with torch.inference_mode():
        made = quantize(float_layer(), **OPTIONS["static"])
        copied, loaded = copy.deepcopy(source), fresh("static")
        loaded.load_state_dict({n: t.clone() for n, t in source.state_dict().items()}, assign=True)
        wanted = source(rows())
    for module in (made, copied, loaded):
        for inference in (True, False):
            with torch.inference_mode(inference), torch.no_grad():
                assert torch.equal(module(rows()), wanted)
                for _ in range(2):
                    before = module(rows())
                    module.weight.neg_()
                    assert not torch.equal(module(rows()), before)
                    before = module(rows())
                    module.bias.neg_()
                    assert not torch.equal(module(rows()), before)
                assert torch.equal(module(rows()), wanted)


def test_functional_call_sees_other_tensors() -> None:
    module = quantize(float_layer())
    x = rows()
    bias = torch.randn(21, requires_grad=True)
    for _ in range(2):
        before = module(x)
        out = torch.func.functional_call(module, {"bias": bias}, (x,))
        assert_matches(out.detach(), (before - module.bias + bias).detach().double())
        (grad,) = torch.autograd.grad(out.sum(), bias)
        assert torch.equal(grad, torch.full((21,), 7.0))
        with torch.no_grad():
            assert_matches(torch.func.functional_call(module, {"bias": bias.detach()}, (x,)), out.detach().double())
            assert torch.equal(module(x), before)


def copies(module: torch.nn.Module, folder: Path) -> dict[str, Any]:
    torch.save(module, folder / "module.pt")
    return {
        "deepcopy": copy.deepcopy(module),
        "copy": copy.copy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(folder / "module.pt", weights_only=False),
    }


@pytest.mark.parametrize("name", [*OPTIONS, "mlp"])
def test_copies(implementation: str, name: str, tmp_path: Path) -> None:
    if name == "mlp":
        module: Any = rk.Int8MLP(quantize(float_layer(), epilogue="relu"), quantize(float_layer(21, 5)))
    else:
        module = quantize(float_layer(), **OPTIONS[name])
    unused = len(pickle.dumps(module))
    with torch.no_grad():
        wanted = module(rows())
        module(rows())
        assert len(pickle.dumps(module)) == unused  # nothing packed in it
        for kind, other in copies(module, tmp_path).items():
            assert torch.equal(other(rows()), wanted), kind
            assert other.state_dict().keys() == module.state_dict().keys()
            if kind == "copy":
                continue
            first = other[0] if name == "mlp" else other
            first.weight.neg_()
            assert not torch.equal(other(rows()), wanted), kind
            assert torch.equal(module(rows()), wanted), kind


@pytest.mark.parametrize("name", OPTIONS)
def test_casts_change_the_output_only(implementation: str, name: str) -> None:
    module = quantize(float_layer(), **OPTIONS[name])
    before = {n: t.clone() for n, t in module.state_dict().items()}
    full = module(rows()).detach()
    for cast, dtype in (
        (module.half, torch.float16),
        (module.bfloat16, torch.bfloat16),
        (module.float, torch.float32),
        (lambda: module.to(torch.float16), torch.float16),
        (lambda: module.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda: module.to(rows(1)), torch.float32),
        (lambda: module.type(torch.float16), torch.float16),
        (lambda: torch.nn.Sequential(module).float(), torch.float32),
    ):
        cast()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out = module(rows())
            assert module.dtype == out.dtype == dtype
            assert torch.equal(out, full.to(dtype))
        state = module.state_dict()
        assert all(torch.equal(state[n], t) and state[n].dtype == t.dtype for n, t in before.items())
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, but dtype is torch\.float64"):
        module.double()
    assert torch.equal(module(rows()), full)


def test_meta_device() -> None:
    module = quantize(float_layer(), "static", epilogue="relu")
    wanted = module(rows())
    empty = rk.Int8Linear(40, 21, activation="static", epilogue="relu", device="meta")
    assert empty(rows().to("meta")).shape == (7, 21)
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(empty(rows()), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            made = rk.Int8Linear(40, 21, activation="static", epilogue="relu")
    made.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(made(rows()), wanted)


def test_share_memory() -> None:
    module = quantize(float_layer())
    wanted = module(rows())
    module.share_memory()
    assert module.weight.is_shared()
    assert torch.equal(module(rows()), wanted)
    assert torch.equal(torch.load(_saved(module), weights_only=False)(rows()), wanted)


def _saved(module: torch.nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file
