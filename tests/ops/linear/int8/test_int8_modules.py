"""Int8Linear, Int8MLP and functional.int8_linear: quantization, state, gradients, copies, compiled code."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from int8_support import DTYPES, EPILOGUES, GRANULARITIES, SCHEMES, float_layer, quantize, rows, weights_of
from support import Calls

import recsys_kernels as rk
from recsys_kernels.backends.registry import native
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- quantization ---------------------------------------------------------------------------------------------------


def hard_weights() -> dict[str, torch.Tensor]:
    """Weights that are hard to quantize."""
    normal = torch.randn(9, 150, generator=torch.Generator().manual_seed(1))
    return {
        "normal": normal,
        "zero-rows": normal * (torch.arange(9) % 2).unsqueeze(1),
        "zero": torch.zeros(3, 130),
        "constant": torch.full((4, 70), -0.7),
        "large": normal * 1e37,
        "small": normal * 1e-25,
        "denormal": normal * 1e-40,
        "mixed": normal * torch.logspace(-8, 4, 9).unsqueeze(1),
        "outlier": torch.cat([normal, torch.full((9, 1), 100.0)], 1),
        "one": torch.tensor([[0.3]]),
        "one-column": normal[:, :1],
        "one-row": normal[:1],
    }


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_by_the_formula(granularity: str | int) -> None:
    for name, weight in hard_weights().items():
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], False)
        linear.weight.data = weight
        module = quantize(linear, granularity=granularity)
        w = weight.numpy()
        q, scales = np.zeros(w.shape, np.int8), []
        step = granularity if isinstance(granularity, int) else w.shape[1]
        for start in range(0, w.shape[1], step):
            part = w[:, start : start + step]
            largest = np.abs(part).max(keepdims=True) if granularity == "tensor" else np.abs(part).max(1, keepdims=True)
            scale = np.maximum(largest / np.float32(127), np.float32(2.0**-100))
            assert scale.dtype == np.float32
            q[:, start : start + step] = np.clip(np.rint(part / scale), -127, 127)
            scales.append(scale)
        assert np.array_equal(module.weight.numpy(), q), name
        assert np.array_equal(module.weight_scale.numpy(), np.concatenate(scales, 1)), name
        assert module.weight.min() >= -127
        # Half a step, and what float32 rounds in the quotient.
        spread = np.concatenate(scales, 1).repeat(step, 1)[:, : w.shape[1]] if len(scales) > 1 else scales[0]
        error = np.abs(weights_of(module).numpy() - w.astype(np.float64))
        assert (error <= spread * 0.5 * (1 + 1e-4)).all(), name
        assert (module.dequantize()[weight == 0] == 0).all()


def test_finer_scales_are_closer() -> None:
    linear = float_layer(600, 50)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-1, 0, 50).unsqueeze(1)).mul_(torch.logspace(0, -1, 600))
    errors = [
        (weights_of(quantize(linear, granularity=g)) - linear.weight.double()).square().mean().item()
        for g in ("tensor", "channel", 128, 64, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[1] > 6 * errors[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", SCHEMES)
def test_close_to_the_float_layer(implementation: str, activation: str, dtype: torch.dtype) -> None:
    """Signal to noise: 8 bits leave more than 35 dB (weights and activations) or 40 dB (weights)."""
    for granularity in GRANULARITIES:
        for epilogue, function in EPILOGUES.items():
            linear, x = float_layer(300, 64, dtype=dtype), rows(33, 300).to(dtype)
            module = quantize(linear, activation, granularity=granularity, epilogue=epilogue)
            with torch.no_grad():
                wanted = function(F.linear(x.double(), linear.weight.double(), linear.bias.double()))
                out = module(x)
            assert out.dtype == module.dtype == dtype
            noise = (out.double() - wanted).square().mean() / wanted.square().mean()
            assert noise < 10 ** (-4.0 if activation == "weight_only" else -3.5), (granularity, epilogue, noise)


def test_input_range() -> None:
    for low, high in ((-1.0, 2.0), (0.0, 5.1), (-3.0, 0.0), (1.0, 3.0), (-3.0, -1.0), (-1e-20, 1e-20), (-3e38, 3e38)):
        module = quantize(float_layer(), "static", input_range=(low, high))
        scale, zero_point = module.state_dict()["input_qparams"].double().tolist()
        bottom, top = min(low, 0.0), max(high, 0.0)
        assert scale == pytest.approx((top - bottom) / 255, rel=1e-6)
        assert zero_point == round(-bottom / scale)
        assert (0 - zero_point) * scale == pytest.approx(bottom, abs=scale * 0.51)
        assert (255 - zero_point) * scale == pytest.approx(top, abs=scale * 0.51)
    # Within the range half a step is lost, outside of it everything.
    one = torch.nn.Linear(1, 1, False)
    torch.nn.init.ones_(one.weight)
    module = quantize(one, "static", input_range=(-1.0, 3.0))
    x = torch.linspace(-2, 5, 701).unsqueeze(1)
    with torch.no_grad():
        assert (module(x) - x.clamp(-1, 3)).abs().max() < 4 / 255 * 0.51 + 4 / 255
        assert (module(x) - x.clamp(-1, 3))[(x >= -1) & (x <= 3)].abs().max() < 4 / 255 * 0.51


def test_wrong_options() -> None:
    linear = float_layer()
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "activation": ({"activation": "int8"}, "activation must be 'dynamic', 'static' or 'weight_only'"),
        "a function as activation": ({"activation": "relu"}, "epilogue='relu'"),
        "epilogue": ({"epilogue": "tanh"}, "epilogue must be None, 'relu', 'gelu', 'sigmoid' or 'silu', but is 'tanh'"),
        "granularity": ({"granularity": 16}, "granularity must be 'channel', 'tensor', 32, 64 or 128, but is 16"),
        "granularity name": ({"granularity": "row"}, "but is 'row'"),
        "no range": ({"activation": "static"}, "needs input_range"),
        "range for dynamic": ({"input_range": (0, 1)}, "input_range is for activation='static'"),
        "empty range": ({"activation": "static", "input_range": (1.0, 1.0)}, r"low < high, both finite, but is \(1.0"),
        "reversed range": ({"activation": "static", "input_range": (1.0, -1.0)}, "low < high"),
        "infinite range": ({"activation": "static", "input_range": (0.0, float("inf"))}, "both finite"),
        "range with NaN": ({"activation": "static", "input_range": (float("nan"), 1.0)}, "both finite"),
        "range beyond float32": ({"activation": "static", "input_range": (0.0, 1e39)}, "both finite"),
    }
    for name, (options, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"{name} was accepted: {rk.Int8Linear.from_float(linear, **options)}")
    for sizes in ((0, 3), (3, 0), (-1, 3), (65537, 1)):
        with pytest.raises(ValueError, match="in_features must be from 1 to 65536"):
            rk.Int8Linear(*sizes)
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, but dtype is torch\.float64"):
        rk.Int8Linear(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"but dtype is torch\.float64"):
        rk.Int8Linear.from_float(linear.double())
    for other in (torch.nn.Bilinear(3, 4, 5), torch.nn.ReLU(), torch.zeros(3), None):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, but is a"):
            rk.Int8Linear.from_float(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_in_a_float_layer_are_refused(value: float) -> None:
    linear = float_layer()
    with torch.no_grad():
        linear.weight[20, 3] = linear.weight[13, 39] = value
    with pytest.raises(ValueError, match="row 13 of weight holds NaN or infinity"):
        quantize(linear)
    linear = float_layer()
    with torch.no_grad():
        linear.bias[5] = value
    with pytest.raises(ValueError, match="element 5 of bias is NaN or infinity"):
        quantize(linear)


def test_from_float_leaves_the_layer_alone() -> None:
    for trains in (True, False):
        linear = float_layer().train(trains).requires_grad_(trains)
        before = copy.deepcopy(linear.state_dict())
        module = quantize(linear)
        assert all(torch.equal(t, before[name]) for name, t in linear.state_dict().items())
        assert module.training == trains
        assert [p.requires_grad for p in module.parameters()] == [trains]
        assert module.bias is not None
        assert module.bias.data_ptr() != linear.bias.data_ptr()
    assert quantize(float_layer(bias=False)).bias is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_float(implementation: str, dtype: torch.dtype) -> None:
    for granularity in GRANULARITIES:
        for bias in (True, False):
            source = float_layer(150, 21, bias, dtype=dtype).eval()
            module = quantize(source, "weight_only", granularity=granularity)
            linear = module.to_float()
            assert type(linear) is torch.nn.Linear
            assert (linear.weight.dtype, linear.training) == (dtype, False)
            assert_matches(linear.weight, weights_of(module))
            assert (linear.bias is None) != bias
            if bias:
                assert torch.equal(linear.bias, source.bias)
            # Once more the same integers, but for scales that 16 bits round.
            again = quantize(linear, granularity=granularity)
            assert (again.weight.int() - module.weight.int()).abs().max() <= (0 if dtype == torch.float32 else 1)
    for epilogue, function in EPILOGUES.items():
        module = quantize(float_layer(), "weight_only", epilogue=epilogue)
        plain = module.to_float()
        assert isinstance(plain, torch.nn.Linear if epilogue is None else torch.nn.Sequential)
        x = rows()
        with torch.no_grad():
            wanted = function(F.linear(x.double(), weights_of(module), module.bias.double()))
            assert_matches(module(x), wanted)
            assert (plain(x).double() - wanted).abs().max() < 2e-6


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", SCHEMES)
def test_inputs_of_any_shape(implementation: str, activation: str) -> None:
    module = quantize(float_layer(), activation, epilogue="relu")
    x = rows(24)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            wanted = module(x)
            for shape in ((24,), (4, 6), (2, 3, 4), (1, 24, 1)):
                assert torch.equal(module(x.reshape(*shape, 40)), wanted.reshape(*shape, 21))
            assert_matches(module(x[3]).detach(), wanted[3].detach().double())
            assert torch.equal(module(x.t().contiguous().t()), wanted)
            assert torch.equal(module(x.repeat_interleave(2, 1)[:, ::2]), wanted)
            for shape in ((0,), (2, 0), (0, 3)):
                assert module(torch.empty(*shape, 40)).shape == (*shape, 21)


def test_wrong_inputs_raise_what_linear_raises(implementation: str) -> None:
    linear = float_layer()
    for module in (quantize(linear), rk.Int8MLP(quantize(linear))):
        for bad in (torch.randn(3, 39), torch.randn(41), torch.randn(2, 40, 3), torch.tensor(1.0), torch.ones(3, 0)):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    with pytest.raises(RuntimeError):
                        linear(bad)
                    with pytest.raises(RuntimeError):
                        module(bad)
        for bad in (torch.ones(3, 40, dtype=torch.int64), torch.ones(3, 40).double()):
            with pytest.raises(
                RuntimeError, match=r"input must be float32, float16 or bfloat16, but is (int|torch|float)"
            ):
                module(bad)
        with pytest.raises(RuntimeError, match=r"40.*39|39.*40"):
            module(torch.randn(3, 39))


def test_static_layer_without_a_range() -> None:
    module = rk.Int8Linear(40, 21, activation="static")
    for call in (module, rk.Int8MLP(module)):
        with pytest.raises(
            RuntimeError, match=r"needs the range of its input: give Int8Linear input_range=\(low, high\)"
        ):
            call(rows())
    ready = quantize(float_layer(), "static")
    module.load_state_dict(ready.state_dict())
    assert torch.equal(module(rows()), ready(rows()))


def test_a_call_is_one_operator() -> None:
    linear = float_layer()
    modules = {
        "linear": quantize(linear),
        "frozen": quantize(linear).requires_grad_(False),
        "mlp": rk.Int8MLP(quantize(linear, epilogue="relu"), quantize(float_layer(21, 5))),
    }
    for name, module in modules.items():
        with torch.set_grad_enabled(name == "frozen"):
            module(rows())
            with Calls() as calls:
                module(rows())
        assert [n for n in calls.names if "recsys" in n or "linear" in n] == ["recsys_kernels::int8_chain"], name
        packed = module._prepared
        with torch.no_grad():
            module(rows())
        assert module._prepared is packed, name


def test_layers_run_from_their_operands_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = rk.Int8MLP(quantize(float_layer(), epilogue="relu"), quantize(float_layer(21, 5)))
    with torch.no_grad():
        wanted = mlp(rows())
        monkeypatch.setattr(native, "reason", "taken away for a test")
        other = copy.deepcopy(mlp)
        assert torch.equal(other(rows()), wanted)
        assert torch.equal(mlp(rows()), wanted)
    assert other._packed is None
    assert other[0]._prepared is None


def test_backend_is_chosen_at_the_call() -> None:
    module = quantize(float_layer())
    with torch.no_grad():
        wanted = module(rows())
        with rk.backend("reference"), Calls() as calls:
            assert_matches(module(rows()), wanted)
        assert not any("recsys" in name for name in calls.names)
        with rk.backend("cpu"):
            assert torch.equal(module(rows()), wanted)


def test_repr_says_what_it_is() -> None:
    assert repr(quantize(float_layer())) == "Int8Linear(40, 21, bias=True, activation='dynamic')"
    module = quantize(float_layer(bias=False), "static", epilogue="gelu", granularity=64)
    wanted = "Int8Linear(40, 21, bias=False, activation='static', epilogue='gelu', granularity=64)"
    assert repr(module) == wanted
