"""Gradients of int8 layers, functional.int8_linear, Int8MLP, and layers in compiled and exported code."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_support import DTYPES, EPILOGUES, GRANULARITIES, SCHEMES, float_layer, quantize, rows, weights_of
from torch.nn import GELU, Dropout, Identity, Linear, ReLU, Sequential, Sigmoid, SiLU

import recsys_kernels as rk
from recsys_kernels.ops.linear.int8.compiled import PACKS
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- gradients ------------------------------------------------------------------------------------------------------

# The quantization of these is exact, so that the derivative is taken where the float layer takes it.
STEP = 2.0**-5
EXACT_RANGE = (-128 * STEP, 127 * STEP)


def exact_rows(*shape: int) -> torch.Tensor:
    return torch.randint(-40, 40, shape, generator=torch.Generator().manual_seed(len(shape))) * STEP


def exact_layer(activation: str, **options: Any) -> rk.Int8Linear:
    if activation == "static":
        options["input_range"] = EXACT_RANGE
    module = rk.Int8Linear.from_float(float_layer(), activation, **options)
    if activation == "static":
        assert module.input_qparams is not None
        assert module.input_qparams.tolist() == [STEP, 128.0]
    return module


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ["static", "weight_only"])
def test_gradients_are_those_of_the_dequantized_layer(
    implementation: str, activation: str, granularity: str | int
) -> None:
    for epilogue, function in EPILOGUES.items():
        module = exact_layer(activation, epilogue=epilogue, granularity=granularity)
        assert module.bias is not None
        for shape in ((7, 40), (40,), (2, 3, 40), (0, 40)):
            x = exact_rows(*shape).requires_grad_()
            upstream = torch.randn(*shape[:-1], 21, generator=torch.Generator().manual_seed(5))
            actual = torch.autograd.grad(module(x), (x, module.bias), upstream)
            y, bias = x.detach().double().requires_grad_(), module.bias.detach().double().requires_grad_()
            out = function(F.linear(y, weights_of(module), bias))
            wanted = torch.autograd.grad(out, (y, bias), upstream.double())
            for one, two in zip(actual, wanted, strict=True):
                assert one.dtype == torch.float32
                assert_matches(one, two)
            assert_matches(module(x).detach(), out.detach())


@pytest.mark.parametrize("activation", SCHEMES)
def test_gradients_of_rounded_activations(implementation: str, activation: str) -> None:
    """The derivative of the function is taken at the layer's own values."""
    for epilogue, function in EPILOGUES.items():
        module, plain = (quantize(float_layer(), activation, epilogue=name) for name in (epilogue, None))
        assert module.bias is not None
        x, upstream = rows().requires_grad_(), rows(7, 21)
        actual = torch.autograd.grad(module(x), (x, module.bias), upstream)
        before = plain(x).detach().double().requires_grad_()
        (grad,) = torch.autograd.grad(function(before), before, upstream.double())
        for one, two in zip(actual, (grad @ weights_of(module), grad.sum(0)), strict=True):
            assert_matches(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_gradients(implementation: str, dtype: torch.dtype) -> None:
    for epilogue in EPILOGUES:
        for output_type in DTYPES:
            module = quantize(float_layer(), "weight_only", epilogue=epilogue).to(output_type)
            x = rows().to(dtype).requires_grad_()
            out = module(x)
            out.float().square().sum().backward()
            assert (out.dtype, x.grad.dtype, module.bias.grad.dtype) == (output_type, dtype, torch.float32)
            full = quantize(float_layer(), "weight_only", epilogue=epilogue)
            y = x.detach().float().requires_grad_()
            full(y).square().sum().backward()
            for one, two in ((x.grad, y.grad), (module.bias.grad, full.bias.grad)):
                assert (one.float() - two).abs().max() <= 0.02 * two.abs().max()


def test_only_what_is_needed_gets_a_gradient() -> None:
    module = quantize(float_layer(), epilogue="gelu")
    x = rows()
    module(x).sum().backward()
    assert x.grad is None
    assert module.bias.grad is not None
    module.requires_grad_(False)
    assert not module(x).requires_grad
    y = rows().requires_grad_()
    module(y).sum().backward()
    assert y.grad is not None
    with torch.no_grad():
        assert not module(y).requires_grad
    unbiased = quantize(float_layer(bias=False), epilogue="relu")
    assert not unbiased(x).requires_grad
    assert unbiased(y).requires_grad
    (grad,) = torch.autograd.grad(module(y).square().sum(), y, create_graph=True)
    assert torch.autograd.grad(grad.sum(), y)[0].abs().max() > 0


def test_gradients_go_the_same_way_with_and_without_recording() -> None:
    """The result is the same to the bit whether a gradient is recorded or not."""
    for activation in SCHEMES:
        for epilogue in EPILOGUES:
            module = quantize(float_layer(), activation, epilogue=epilogue)
            recorded = module(rows())
            with torch.no_grad():
                assert torch.equal(recorded, module(rows()))


# ---- functional -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", SCHEMES)
def test_functional(implementation: str, activation: str) -> None:
    for granularity in GRANULARITIES:
        for epilogue in EPILOGUES:
            module = quantize(float_layer(), activation, granularity=granularity, epilogue=epilogue)
            options = {
                "activation": activation,
                "input_qparams": module.input_qparams,
                "epilogue": epilogue,
                "group": granularity if granularity == 32 else 0,
            }
            scales = [module.weight_scale]
            if granularity == "channel":
                scales.append(module.weight_scale[:, 0])
            if granularity == "tensor":
                scales += [module.weight_scale[0], module.weight_scale[0, 0], module.weight_scale.expand(21, 1)]
            for dtype in DTYPES:
                x = rows().to(dtype)
                wanted = module.to(dtype)(x)
                for scale in scales:
                    out = rk.functional.int8_linear(x, module.weight, scale, module.bias, **options)
                    assert torch.equal(out, wanted)
            other = rk.functional.int8_linear(x, module.weight, scales[0], module.bias, **options, dtype=torch.float32)
            assert torch.equal(other, module.float()(x))
    without = rk.functional.int8_linear(rows(), module.weight, module.weight_scale, **options)
    assert_matches(without, quantize_without_bias(module)(rows()).double())


def quantize_without_bias(module: rk.Int8Linear) -> rk.Int8Linear:
    """The same layer with a bias of zero."""
    with torch.no_grad():
        module.bias.zero_()
    return module.requires_grad_(False)


def test_functional_gradients(implementation: str) -> None:
    module = exact_layer("static", epilogue="silu")
    for bias_type in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x, bias = exact_rows(7, 40).requires_grad_(), module.bias.detach().to(bias_type).requires_grad_()
        out = rk.functional.int8_linear(
            x,
            module.weight,
            module.weight_scale,
            bias,
            activation="static",
            input_qparams=module.input_qparams,
            epilogue="silu",
        )
        actual = torch.autograd.grad(out.sum(), (x, bias))
        y, b = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
        wanted = torch.autograd.grad(F.silu(F.linear(y, weights_of(module), b)).sum(), (y, b))
        assert actual[1].dtype == bias_type
        assert_matches(actual[0], wanted[0])
        assert_matches(actual[1], wanted[1], torch.float32 if bias_type == torch.float64 else bias_type)


def test_functional_refuses(implementation: str) -> None:
    weight, scale = torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    x = torch.ones(2, 4)
    call = rk.functional.int8_linear
    with pytest.raises(ValueError, match="activation must be 'dynamic', 'static' or 'weight_only', but is 'int8'"):
        call(x, weight, scale, activation="int8")
    with pytest.raises(ValueError, match="epilogue must be None"):
        call(x, weight, scale, epilogue="softmax")
    with pytest.raises(RuntimeError, match="weight_scale has no gradient"):
        call(x, weight, scale.clone().requires_grad_())
    for bad in (
        lambda: call(x, weight, scale[:2]),
        lambda: call(x, weight, torch.ones(1, 3)),
        lambda: call(x, weight, scale, torch.ones(2)),
        lambda: call(x, weight, scale, activation="static"),
        lambda: call(x, weight, scale, activation="static", input_qparams=torch.zeros(2)),
        lambda: call(x, weight, scale, input_qparams=torch.ones(2)),
        lambda: call(x, weight, scale, group=16),
        lambda: call(x, weight.float(), scale),
        lambda: call(x, weight[0], scale),
        lambda: call(x, weight, scale.double()),
        lambda: call(x[:, :3], weight, scale),
        lambda: call(x.double(), weight, scale),
        lambda: call(x, weight, scale, dtype=torch.int32),
    ):
        for grad in (False, True):
            x.requires_grad_(grad)
            with pytest.raises(RuntimeError):
                bad()


# ---- Int8MLP --------------------------------------------------------------------------------------------------------


def float_mlp(**options: Any) -> Sequential:
    torch.manual_seed(8)
    return Sequential(
        Linear(40, 64, **options),
        ReLU(),
        Dropout(0.5),
        Sequential(Linear(64, 33, bias=False, **options), GELU(), Identity()),
        Linear(33, 20, **options),
        SiLU(),
        Linear(20, 20, **options),
        Linear(20, 1, **options),
        Sigmoid(),
    )


RANGES = [(-4, 4), (0, 4), (-0.2, 2), (-0.3, 1), (-1, 1)]


def int8_mlp(activation: str = "dynamic", mlp: Sequential | None = None, **options: Any) -> rk.Int8MLP:
    ranges = RANGES if activation == "static" else None
    return rk.Int8MLP.from_float(mlp or float_mlp(), activation, input_ranges=ranges, **options)


@pytest.mark.parametrize("activation", SCHEMES)
@pytest.mark.parametrize("granularity", ["channel", 32])
def test_mlp_is_close_to_float(implementation: str, activation: str, granularity: str | int) -> None:
    source = float_mlp().eval()
    mlp = int8_mlp(activation, source, granularity=granularity)
    for shape in ((9,), (), (2, 3), (0,), (300,)):
        x = torch.randn(*shape, 40, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            out, wanted = mlp(x), source(x)
            assert out.shape == wanted.shape
            assert (out - wanted).abs().max() < 0.01 if out.numel() else True
    assert [layer.epilogue for layer in mlp] == ["relu", "gelu", "silu", None, "sigmoid"]
    assert [layer.bias is None for layer in mlp] == [False, True, False, False, False]
    assert not mlp.training
    assert int8_mlp(mlp=float_mlp().train()).training
    plain = mlp.to_float()
    assert [type(m) for m in plain] == [Linear, ReLU, Linear, GELU, Linear, SiLU, Linear, Linear, Sigmoid]
    with torch.no_grad():
        assert (plain(x) - mlp(x)).abs().max() < 0.01


@pytest.mark.parametrize("activation", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_is_its_layers(implementation: str, activation: str, dtype: torch.dtype) -> None:
    """One call, with or without gradients, and layer by layer with float32 between them."""
    mlp = int8_mlp(activation).to(dtype)
    x = rows(33).to(dtype)
    y = x
    for layer in mlp[:-1]:
        y = layer.run(y, torch.float32)
    wanted = mlp[-1](y)
    recorded = mlp(x)
    with torch.no_grad():
        out = mlp(x)
        again = mlp(x.reshape(3, 11, 40)).reshape(33, 1)
    assert out.dtype == recorded.dtype == dtype
    assert torch.equal(recorded, wanted)
    if activation != "weight_only" or implementation != "reference":  # BLAS adds in an order that depends on sizes
        assert torch.equal(out, wanted)
        assert torch.equal(again, out)
    assert_matches(out, wanted.detach().double())


def test_mlp_gradients(implementation: str) -> None:
    mlp = int8_mlp("weight_only")
    x, y = rows().requires_grad_(), rows().double().requires_grad_()
    mlp(x).sum().backward()
    out, biases = y, []
    for layer in mlp:
        if layer.bias is not None:
            biases.append(layer.bias.detach().double().requires_grad_())
        out = EPILOGUES[layer.epilogue](
            F.linear(out, weights_of(layer), biases[-1] if layer.bias is not None else None)
        )
    wanted = torch.autograd.grad(out.sum(), (y, *biases))
    actual = (x.grad, *(layer.bias.grad for layer in mlp if layer.bias is not None))
    for one, two in zip(actual, wanted, strict=True):
        assert_matches(one, two)


def test_mlp_state_is_that_of_its_layers() -> None:
    mlp = int8_mlp("static")
    state = mlp.state_dict()
    assert list(state) == [
        f"{number}.{name}"
        for number in range(5)
        for name in ("bias", "weight", "weight_scale", "input_qparams")
        if (number, name) != (1, "bias")
    ]
    other = rk.Int8MLP(
        *[
            rk.Int8Linear(
                layer.in_features, layer.out_features, layer.bias is not None, "static", epilogue=layer.epilogue
            )
            for layer in mlp
        ]
    )
    other.load_state_dict(state)
    with torch.no_grad():
        wanted = mlp(rows())
        assert torch.equal(other(rows()), wanted)
        other[2].load_state_dict({n: t // 2 if n == "weight" else t for n, t in mlp[2].state_dict().items()})
        assert not torch.equal(other(rows()), wanted)
        other.load_state_dict(state)
        assert torch.equal(other(rows()), wanted)


def test_mlp_sees_layers_that_change() -> None:
    mlp = int8_mlp()
    with torch.no_grad():
        before = mlp(rows())
        plain, mlp[3] = mlp[3], mlp[3].with_epilogue("relu")  # the same tensors
        assert not torch.equal(mlp(rows()), before)
        mlp[3] = plain
        assert torch.equal(mlp(rows()), before)
        mlp[3] = rk.Int8Linear.from_float(Linear(20, 20))
        assert not torch.equal(mlp(rows()), before)
        before = mlp(rows())
        assert mlp[:3](rows()).shape == (7, 20)
        del mlp[3]
        assert not torch.equal(mlp(rows()), before)
        mlp.append(rk.Int8Linear.from_float(Linear(1, 4)))
        assert mlp(rows()).shape == (7, 4)
        mlp.append(rk.Int8Linear.from_float(Linear(5, 4)))
        with pytest.raises(ValueError, match="layer 5 takes 5 features, but the one before it gives 4"):
            mlp(rows())
        mlp[5] = ReLU()
        with pytest.raises(TypeError, match="layer 5 must be an Int8Linear, but is a ReLU"):
            mlp(rows())


def test_mlps_that_are_refused() -> None:
    refused: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, r"must be a torch\.nn\.Sequential, but is a Linear", Linear(3, 4), {}),
        (TypeError, "1 is a Tanh, which", Sequential(Linear(3, 4), torch.nn.Tanh()), {}),
        (TypeError, r"1\.0 is a LayerNorm", Sequential(Linear(3, 4), Sequential(torch.nn.LayerNorm(4))), {}),
        (ValueError, "holds no", Sequential(), {}),
        (ValueError, "holds no", Sequential(Dropout()), {}),
        (ValueError, r"0 \(ReLU\(\)\) does not follow a Linear", Sequential(ReLU(), Linear(3, 4)), {}),
        (ValueError, r"2 \(Sigmoid\(\)\) does not follow", Sequential(Linear(3, 4), ReLU(), Sigmoid()), {}),
        (ValueError, "is not the exact function", Sequential(Linear(3, 4), GELU("tanh")), {}),
        (ValueError, "layer 1 takes 5 features, but the one before", Sequential(Linear(3, 4), Linear(5, 2)), {}),
        (ValueError, "needs input_ranges", float_mlp(), {"activation": "static"}),
        (ValueError, "one range for each of the 5", float_mlp(), {"activation": "static", "input_ranges": RANGES[1:]}),
        (ValueError, "is for activation='static'", float_mlp(), {"input_ranges": RANGES}),
        (ValueError, "granularity must be", float_mlp(), {"granularity": 7}),
        (ValueError, "float64", float_mlp(dtype=torch.float64), {}),
    ]  # fmt: skip
    for kind, message, mlp, options in refused:
        with pytest.raises(kind, match=message):
            pytest.fail(f"accepted: {rk.Int8MLP.from_float(mlp, **options)}")
    with pytest.raises(ValueError, match="at least one layer"):
        rk.Int8MLP()
    with pytest.raises(TypeError, match="layer 0 must be an Int8Linear, but is a Linear"):
        rk.Int8MLP(Linear(3, 4))  # type: ignore[arg-type]


# ---- compiled code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_are_packed_once(backend: str) -> None:
    torch.compiler.reset()
    for module in (quantize(float_layer()), int8_mlp("static"), quantize(float_layer(), granularity="tensor")):
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        weight = module.weight if isinstance(module, rk.Int8Linear) else module[0].weight
        with torch.no_grad():
            for count in (7, 9, 1):
                assert torch.equal(compiled(rows(count)), module(rows(count)))
                packed = PACKS.value_of(weight)
                assert torch.equal(compiled(rows(count)), module(rows(count)))
                assert PACKS.value_of(weight) is packed
            module.load_state_dict({n: t.clone() for n, t in module.state_dict().items()})
            assert torch.equal(compiled(rows()), module(rows()))
            assert PACKS.value_of(weight) is not packed


def test_packed_layers_of_compiled_code_go_with_their_weights() -> None:
    torch.compiler.reset()
    module = quantize(float_layer())
    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend="eager")(rows())
    packed = weakref.ref(PACKS.value_of(module.weight))
    count = len(PACKS)
    del module
    torch.compiler.reset()
    gc.collect()
    assert packed() is None
    assert len(PACKS) < count


def test_compiled_layers_with_other_numbers_share_no_pack() -> None:
    """The same tensors with another function, and the same first layer in a longer chain."""
    first, second = quantize(float_layer(), epilogue="relu"), quantize(float_layer(21, 5))
    tensors = ([first.weight], [first.weight_scale], [first.bias], [None])
    longer = ([first.weight, second.weight], [first.weight_scale, second.weight_scale], [first.bias, second.bias])
    run = torch.ops.recsys_kernels.int8_layers
    x = rows()
    with torch.no_grad():
        for _ in range(2):
            relu, plain = (run(x, *tensors, [0, 0, number], torch.float32) for number in (1, 0))
            assert torch.equal(relu, first(x))
            assert torch.equal(relu, F.relu(plain))
            assert plain.min() < 0
            both = run(x, *longer, [None, None], [0, 0, 1, 0, 0, 0], torch.float32)
            assert torch.equal(both, rk.Int8MLP(first, second)(x))


def test_operator_of_compiled_code_checks_its_arguments(implementation: str) -> None:
    layer = quantize(float_layer())
    good = ([layer.weight], [layer.weight_scale], [layer.bias.detach()], [None], [0, 0, 0])
    run, x = torch.ops.recsys_kernels.int8_layers, rows()
    run(x, *good, torch.float32)
    for number, bad in ((0, []), (1, []), (2, [None, None]), (3, []), (4, [0, 0]), (4, [0, 0, 9]), (1, [layer.weight])):
        args = [*good]
        args[number] = bad
        with pytest.raises(RuntimeError):
            pytest.fail(f"{number}, {bad} was accepted: {run(x, *args, torch.float32)}")
    with pytest.raises(RuntimeError):
        run(x[:, :39], *good, torch.float32)


def test_exported_program_holds_the_canonical_state() -> None:
    mlp = int8_mlp("static").eval()
    with torch.no_grad():
        program = torch.export.export(mlp, (rows(),), dynamic_shapes=({0: torch.export.Dim("count", min=2)},))
        assert set(program.state_dict) == set(mlp.state_dict())
        assert not program.constants
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert names == {"recsys_kernels.int8_linear.default"}
        assert_matches(program.module()(rows(30)), mlp(rows(30)).double())
