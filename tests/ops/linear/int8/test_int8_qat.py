"""Quantization-aware training, and the training of what weight-only layers have: values, gradients, state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_support import DTYPES, EPILOGUES, GRANULARITIES, RANGE, SCHEMES, float_layer, quantize, rows, weights_of

import recsys_kernels as rk

pytestmark = pytest.mark.usefixtures("one_thread")


def qat(linear: torch.nn.Linear, activation: str = "dynamic", **options: Any) -> Any:
    if activation == "static":
        options.setdefault("input_range", RANGE)
    return rk.Int8Linear.qat(linear, activation, **options)


def straight(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The second value with the gradient of the first."""
    return value + (rounded - value).detach()


def fake_weight(weight: torch.Tensor, granularity: str | int) -> torch.Tensor:
    """Weights rounded to int8 in float64, by the documented formula, with the gradient of what was not rounded."""
    single = weight.detach().float()
    step = granularity if isinstance(granularity, int) else single.shape[1]
    out = []
    for part in single.split(step, 1):
        largest = single.abs().max() if granularity == "tensor" else part.abs().amax(1, keepdim=True)
        scale = (largest / 127).clamp(min=2.0**-100)
        out.append((part / scale).round().clamp(-127, 127).double() * scale.double())
    return straight(weight, torch.cat(out, 1))


def fake_rows(x: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """Rows rounded to 8 bits, likewise; with ends of a static range these have the gradient of LSQ+."""
    if ends is None:
        low, high = x.detach().amin(1, keepdim=True).clamp(max=0), x.detach().amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / 255
        zero = (-low / step).round()
        return straight(x, ((x / step).round() * step).detach())
    low, high = ends
    step = (high - low) / 255
    zero = straight(-low / step, (-low / step).round())
    scaled = straight(x / step, (x / step).detach().round())
    return step * ((scaled + zero).clamp(0, 255) - zero)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", SCHEMES)
def test_output_is_that_of_the_deployed_layer_bit_for_bit(implementation: str, activation: str) -> None:
    for granularity in GRANULARITIES:
        for epilogue in EPILOGUES:
            module = qat(float_layer(70, 21), activation, epilogue=epilogue, granularity=granularity)
            deployed = module.convert()
            assert (deployed.epilogue, deployed.granularity) == (epilogue, granularity)
            for count in (1, 5, 40):
                x = rows(count, 70)
                with torch.no_grad():
                    wanted = deployed(x)
                    assert torch.equal(module.eval()(x), wanted)
                # With a gradient it takes the same way, so that a loss is that of the deployed layer.
                assert torch.equal(module(x).detach(), wanted)
                trained = module.train()(x).detach()  # which moves a running range
                assert torch.equal(trained, module.convert()(x).detach())
                module.eval()
                deployed = module.convert()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype) -> None:
    linear = float_layer(dtype=dtype)
    module = qat(linear, "static", epilogue="silu").eval()
    assert module.weight.dtype == module.bias.dtype == torch.float32
    x = rows().to(dtype)
    out = module(x.requires_grad_())
    assert out.dtype == dtype
    out.sum().backward()
    assert (x.grad.dtype, module.weight.grad.dtype) == (dtype, torch.float32)
    with torch.no_grad():
        assert torch.equal(module.convert()(x), out)
        assert torch.equal(quantize(linear, "static", epilogue="silu")(x), out)
        half = copy.deepcopy(module).half()
        assert half(x).dtype == torch.float16
        assert half.weight.dtype == torch.float32
        assert half.convert().dtype == torch.float16
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        module.double()


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", SCHEMES)
def test_gradients(implementation: str, activation: str) -> None:
    for granularity in ("channel", "tensor", 32):
        for epilogue, function in EPILOGUES.items():
            options = {"ranges": "learnable", "input_range": (-1.5, 2.0)} if activation == "static" else {}
            module = qat(float_layer(70, 21), activation, epilogue=epilogue, granularity=granularity, **options).eval()
            x = rows(9, 70).requires_grad_()
            seed = torch.randn(9, 21, generator=torch.Generator().manual_seed(1))
            module(x).backward(seed)
            weight, bias = (p.detach().double().requires_grad_() for p in (module.weight, module.bias))
            same = x.detach().double().requires_grad_()
            ends = None if activation != "static" else torch.tensor((-1.5, 2.0)).double().requires_grad_()
            values = same if activation == "weight_only" else fake_rows(same, ends)
            function(F.linear(values, fake_weight(weight, granularity), bias)).backward(seed.double())
            found = {"input": x.grad, "weight": module.weight.grad, "bias": module.bias.grad}
            wanted = {"input": same.grad, "weight": weight.grad, "bias": bias.grad}
            for name, grad in found.items():
                torch.testing.assert_close(grad.double(), wanted[name], rtol=1e-4, atol=1e-4, msg=f"{name} {epilogue}")
            if ends is not None:
                # Relative to LSQ's factor; a zero point of an integer makes a difference of up to half a step in 255.
                factor = 255**1.5 / x.numel() ** 0.5
                assert x.grad[(x < -1.5) | (x > 2.0)].abs().max() == 0
                difference = (module.input_range.grad.double() / factor - ends.grad).abs()
                assert (difference < 0.01 * ends.grad.abs() + 0.05).all(), (difference, ends.grad)


def test_gradients_only_where_they_are_needed() -> None:
    linear = float_layer()
    linear.weight.requires_grad_(False)
    module = qat(linear)
    x = rows().requires_grad_()
    module(x).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is not None
    assert x.grad is not None
    assert not qat(float_layer().requires_grad_(False))(rows()).requires_grad


@pytest.mark.parametrize("ranges", ["running", "learnable"])
@pytest.mark.parametrize("activation", SCHEMES)
def test_training_recovers_what_rounding_lost(activation: str, ranges: str) -> None:
    """With one scale for uneven channels and inputs of rank 3 there are better integers than the nearest ones."""
    torch.manual_seed(0)
    teacher = torch.nn.Linear(16, 8)
    with torch.no_grad():
        teacher.weight.mul_(torch.logspace(0, -1.5, 8).unsqueeze(1))
    x = torch.randn(256, 3) @ torch.randn(3, 16)
    wanted = teacher(x).detach()
    module = qat(teacher, activation, granularity="tensor", ranges=ranges, input_range=None)
    module(x)  # the range of a static one
    with torch.no_grad():
        before = F.mse_loss(module.eval()(x), wanted)
    optimizer = torch.optim.Adam(module.parameters(), 3e-5, fused=True)
    module.train()
    losses = []
    for _ in range(150):
        loss = F.mse_loss(module(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = min(losses)
    assert best < 0.9 * before.item()
    deployed = module.eval().convert()
    with torch.no_grad():
        assert torch.equal(deployed(x), module(x))


# ---- ranges --------------------------------------------------------------------------------------------------------


def test_running_ranges() -> None:
    module = qat(float_layer(), "static", input_range=None, momentum=0.25)
    with pytest.raises(RuntimeError, match="has seen no input: call it in training mode first, or give input_range"):
        module.eval()(rows())
    with pytest.raises(RuntimeError, match="has seen no input"):
        module.convert()
    module.train()
    first, second = rows(7), rows(8) * 3
    module(first)
    torch.testing.assert_close(module.input_range, torch.stack(first.aminmax()))
    module(second)
    expected = 0.75 * torch.stack(first.aminmax()) + 0.25 * torch.stack(second.aminmax())
    torch.testing.assert_close(module.input_range, expected)
    module.eval()(second * 100)
    torch.testing.assert_close(module.input_range, expected)
    module.train()(torch.full((3, 40), float("nan")))  # nothing to learn from
    torch.testing.assert_close(module.input_range, expected)
    assert module.input_range.grad_fn is None
    deployed = module.convert()
    low, high = expected.double().tolist()
    assert deployed.input_qparams[0].item() == pytest.approx((high - low) / 255, rel=1e-6)


def test_learnable_ranges() -> None:
    module = qat(float_layer(), "static", ranges="learnable", input_range=None)
    assert "input_range" in dict(module.named_parameters())
    module(rows(7))
    start = torch.stack(rows(7).aminmax())
    torch.testing.assert_close(module.input_range.detach(), start)
    optimizer = torch.optim.SGD([module.input_range], 1e-3)
    module(rows(8) * 3).square().sum().backward()  # much of it clipped: the range grows
    optimizer.step()
    assert not torch.equal(module.input_range.detach(), start)
    with torch.no_grad():
        assert torch.equal(module.eval()(rows()), module.convert()(rows()))
    with torch.no_grad():  # ends that training has moved too far still give a layer
        module.input_range.copy_(torch.tensor([0.5, -0.5]))
        assert torch.isfinite(module(rows())).all()
        assert torch.equal(module(rows()), module.convert()(rows()))


# ---- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["running", "learnable"])
def test_state_and_copies(ranges: str) -> None:
    module = qat(float_layer(), "static", epilogue="relu", ranges=ranges, input_range=None)
    module(rows(20))
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "weight": (21, 40),
        "bias": (21,),
        "input_range": (2,),
    }
    module.eval()
    other = qat(float_layer(40, 21).requires_grad_(False), "static", epilogue="relu", ranges=ranges, input_range=None)
    with torch.no_grad():
        other.weight.zero_()
        other.load_state_dict(module.state_dict())
        for same in (other.eval(), copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu")):
            assert torch.equal(same(rows()), module(rows()))
    assert repr(module) == (f"QATLinear(40, 21, bias=True, activation='static', epilogue='relu', ranges='{ranges}')")
    assert qat(float_layer(bias=False)).bias is None


def test_the_float_layer_is_not_touched() -> None:
    linear = float_layer().train()
    before = copy.deepcopy(linear.state_dict())
    module = qat(linear)
    with torch.no_grad():
        module.weight.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    assert module.training
    assert not qat(linear.eval()).training


def test_wrong_options() -> None:
    linear = float_layer()
    for options, message in (
        ({"ranges": "fixed"}, "ranges must be 'running' or 'learnable', but is 'fixed'"),
        ({"momentum": 0.0}, "momentum must be above 0 and at most 1"),
        ({"activation": "relu"}, "activation must be 'dynamic', 'static' or 'weight_only'"),
        ({"input_range": (0, 1)}, "input_range is for activation='static'"),
        ({"granularity": 7}, "granularity must be"),
        ({"epilogue": "tanh"}, "epilogue must be"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.Int8Linear.qat(linear, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear"):
        rk.Int8Linear.qat(torch.nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"40.*39|39.*40"):
        qat(linear)(rows(3, 39))
    module = qat(linear)
    with torch.no_grad():
        module.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match="row 3 of weight holds NaN or infinity"):
        module(rows())


@pytest.mark.parametrize(
    ("activation", "ranges"), [("dynamic", "running"), ("static", "running"), ("static", "learnable")]
)
def test_compiled_training(activation: str, ranges: str) -> None:
    torch.compiler.reset()
    module: Any = qat(float_layer(), activation, epilogue="gelu", ranges=ranges, input_range=None)
    if ranges == "learnable":
        module = rk.Int8MLP.qat(torch.nn.Sequential(*mlp()[:2], *mlp()[3:4]), activation, ranges=ranges)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for one in (module, twin):
        one.optimizer = torch.optim.SGD(one.parameters(), 1e-3)
    for seed in (20, 21):
        outputs = [run(rows(seed)) for run in (module, compiled)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for one, out in zip((module, twin), outputs, strict=True):
            one.optimizer.zero_grad()
            out.square().sum().backward()
            one.optimizer.step()
    for (name, value), other in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        assert torch.equal(twin.eval().convert()(rows()), twin(rows()))
        torch.testing.assert_close(compiled(rows()), twin(rows()), rtol=1e-5, atol=1e-5)


# ---- MLPs ----------------------------------------------------------------------------------------------------------


def mlp() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(40, 30),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Identity(), torch.nn.GELU()),
        torch.nn.Linear(20, 3),
    )


@pytest.mark.parametrize("activation", SCHEMES)
def test_an_mlp_and_what_it_is_converted_to(implementation: str, activation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = rk.Int8MLP.qat(mlp().to(dtype), activation, granularity=32)
        assert [type(m).__name__ for m in module] == ["QATLinear", "Dropout", "QATLinear", "QATLinear"]
        assert [m.epilogue for m in module.layers()] == ["relu", "gelu", None]
        module(rows(30))
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        for _ in range(2):
            module(rows(30)).float().square().sum().backward()
            optimizer.step()
        module.eval()
        deployed = module.convert()
        assert isinstance(deployed, rk.Int8MLP)
        for count in (1, 9, 40):
            with torch.no_grad():
                assert torch.equal(deployed(rows(count)), module(rows(count)))
        assert deployed(rows()).dtype == dtype


def test_dropout_is_there_in_training() -> None:
    module = rk.Int8MLP.qat(mlp())
    assert not torch.equal(module(rows()), module(rows()))
    module.eval()
    assert torch.equal(module(rows()), module(rows()))
    with pytest.raises(ValueError, match="input_ranges must have one range for each of the 3 layers"):
        rk.Int8MLP.qat(mlp(), "static", input_ranges=[(0, 1)])
    with pytest.raises(TypeError, match="Tanh"):
        rk.Int8MLP.qat(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()))


# ---- weight-only layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_of_the_scales_of_weights(implementation: str, granularity: str | int) -> None:
    for epilogue, function in EPILOGUES.items():
        module = quantize(float_layer(150, 21), "weight_only", granularity=granularity, epilogue=epilogue)
        assert isinstance(module.weight_scale, torch.nn.Parameter)
        seed = torch.randn(9, 21, generator=torch.Generator().manual_seed(1))
        x = rows(9, 150).requires_grad_()
        module(x).backward(seed)
        scale = module.weight_scale.detach().double().requires_grad_()
        step = granularity if isinstance(granularity, int) else 150
        spread = scale[:, torch.arange(150) // step]
        same = x.detach().double().requires_grad_()
        bias = module.bias.detach().double()  # type: ignore[union-attr]
        function(F.linear(same, module.weight.double() * spread, bias)).backward(seed.double())
        assert module.weight_scale.grad is not None
        torch.testing.assert_close(module.weight_scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(x.grad.double(), same.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_scales_of_other_layers_are_no_parameters() -> None:
    for activation in ("dynamic", "static"):
        assert [name for name, _ in quantize(float_layer(), activation).named_parameters()] == ["bias"]
    frozen = quantize(float_layer().requires_grad_(False), "weight_only")
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(rows()).requires_grad


@pytest.mark.parametrize("granularity", ["channel", "tensor", 32])
@pytest.mark.parametrize("compiled", [True, False])
def test_training_of_weight_only_layers(granularity: str | int, compiled: bool) -> None:
    torch.compiler.reset()
    module = quantize(float_layer(), "weight_only", granularity=granularity)
    run: Any = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    x, wanted = rows(64), float_layer(40, 21)(rows(64)).detach() * 1.5 + 0.25
    optimizer = torch.optim.Adam(module.parameters(), 2e-3, fused=True)
    with torch.no_grad():
        before = F.mse_loss(run(x), wanted)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(run(x), wanted).backward()
        optimizer.step()
        with torch.no_grad():  # the packed copy follows
            torch.testing.assert_close(run(x), F.linear(x, weights_of(module).float(), module.bias))
    with torch.no_grad():
        assert F.mse_loss(run(x), wanted) < 0.5 * before


def test_functional_scales() -> None:
    module = quantize(float_layer(), "weight_only")
    for scale in (torch.tensor(0.01), torch.full((21,), 0.01), torch.full((21, 1), 0.01)):
        scale.requires_grad_()
        out = rk.functional.int8_linear(rows(), module.weight, scale, activation="weight_only")
        (grad,) = torch.autograd.grad(out.sum(), scale)
        sums = (rows() @ module.weight.float().t()).sum(0)
        torch.testing.assert_close(
            grad.reshape(-1), sums if scale.numel() > 1 else sums.sum().reshape(1), rtol=1e-4, atol=1e-2
        )
    with pytest.raises(RuntimeError, match="weight_scale has no gradient but with activation='weight_only'"):
        rk.functional.int8_linear(rows(), module.weight, scale)


def test_a_trained_scale_may_have_any_sign() -> None:
    module = quantize(float_layer(), "weight_only")
    with torch.no_grad():
        module.weight_scale[3] *= -1
        wanted = module(rows())
        other = rk.Int8Linear(40, 21, activation="weight_only")
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(rows()), wanted)
    bad = {**module.state_dict(), "weight_scale": module.weight_scale.detach() * float("nan")}
    with pytest.raises(RuntimeError, match="weight_scale holds NaN or infinity"):
        other.load_state_dict(bad)


def test_with_epilogue() -> None:
    for activation in SCHEMES:
        module = quantize(float_layer(), activation, granularity=32).eval()
        other = module.with_epilogue("relu")
        assert other.weight is module.weight
        assert other.bias is module.bias
        assert not other.training
        with torch.no_grad():
            assert torch.equal(other(rows()), module(rows()).relu())
        assert module.epilogue is None
