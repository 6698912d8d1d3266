"""optimize(linear=...): what becomes one call, what is swapped alone, what stays in float, and what the report says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_support import WIDTH, by_name, kinds, mlp, only_linear, rows, without_timing
from torch import nn
from torch.nn.utils import parametrizations, prune

import recsys_kernels as rk
from recsys_kernels.compress.rewrite.optimize import optimize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return without_timing(monkeypatch)


# ---- what becomes one call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["int8", "int8-static", "int8-weight-only"])
@pytest.mark.parametrize("trains", [True, False])
def test_an_mlp_becomes_one_call(choice: str, trains: bool) -> None:
    model = nn.ModuleDict({"top": mlp().train(trains)})
    before = copy.deepcopy(model.state_dict())
    ranges = {"top.0": (-3.0, 3.0), "top.3": (0.0, 2.0), "top.6": (-0.2, 1.0)} if choice == "int8-static" else None
    new, report = only_linear(model, choice, ranges=ranges)
    assert type(model["top"]) is nn.Sequential
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(new["top"]) is rk.Int8MLP
    assert {module.training for module in new["top"].modules()} == {trains}
    assert [(layer.action, layer.shape) for layer in report.layers] == [
        (choice, (40, WIDTH)),
        (choice, (20, 40)),
        (choice, (6, 20)),
    ]
    wanted = rk.Int8MLP.from_float(
        model["top"],
        {"int8": "dynamic", "int8-static": "static", "int8-weight-only": "weight_only"}[choice],
        input_ranges=None if ranges is None else list(ranges.values()),
    )
    with torch.no_grad():
        assert torch.equal(new["top"](rows()), wanted(rows()))
        error = (new["top"](rows()) - model["top"].eval()(rows())).abs().max()
    assert 1e-5 < error < 0.1
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_runs_in_a_longer_sequential() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(),
        nn.Linear(WIDTH, 32),
        nn.Identity(),
        nn.SiLU(),
        nn.LayerNorm(32),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Sigmoid(),
        nn.Sigmoid(),
        nn.Linear(16, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.GELU("tanh"),
    )
    new, report = only_linear(model.eval())
    assert kinds(new) == {
        "0": "ReLU",
        "1": "Int8Linear",
        "4": "LayerNorm",
        "5": "Int8MLP",
        "5.0": "Int8Linear",
        "5.1": "Int8Linear",
        "9": "Sigmoid",
        "10": "Int8Linear",
        "11": "Tanh",
        "12": "Int8Linear",
        "13": "GELU",
    }
    assert len(report.swapped) == 5
    epilogues = [module.epilogue for module in new.modules() if isinstance(module, rk.Int8Linear)]
    assert epilogues == ["silu", "relu", "sigmoid", None, None]
    wanted = rows()
    for module in model:
        wanted = rk.Int8Linear.from_float(module)(wanted) if isinstance(module, nn.Linear) else module(wanted)
    torch.testing.assert_close(new(rows()), wanted, rtol=1e-5, atol=1e-5)


def test_nested_sequentials_become_one_call() -> None:
    block = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.ReLU())  # noqa: E731
    torch.manual_seed(0)
    model = nn.Sequential(block(WIDTH, 16), nn.Sequential(block(16, 16), nn.Dropout(0.1)), nn.Linear(16, 4)).eval()
    new, _ = only_linear(model)
    assert type(new) is rk.Int8MLP
    assert len(new) == 3
    assert torch.equal(new(rows()), rk.Int8MLP.from_float(model)(rows()))
    mixed = nn.Sequential(block(WIDTH, 16), nn.Sequential(nn.LayerNorm(16), *block(16, 16)), nn.Linear(16, 4)).eval()
    new, _ = only_linear(mixed)
    assert [type(module).__name__ for module in new] == ["Int8MLP", "Sequential", "Int8Linear"] or [
        type(module).__name__ for module in new
    ] == ["Int8Linear", "Sequential", "Int8Linear"]
    assert [type(module).__name__ for module in new[1]] == ["LayerNorm", "Int8Linear"]
    assert (new(rows()) - mixed(rows())).abs().max() < 0.1


class Shared(nn.Module):
    """One activation module in two MLPs, as many models have it."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.one = nn.Sequential(nn.Linear(WIDTH, 16), act, nn.Linear(16, 8), act)
        self.two = nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 8))
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.two(self.one(x)))


@pytest.mark.parametrize("sampled", [True, False])
def test_a_shared_function_is_folded(no_timing: Any, sampled: bool) -> None:
    new, _ = only_linear(Shared(), sample_inputs=rows() if sampled else None)
    assert kinds(new) == {
        **dict.fromkeys(("one", "two"), "Int8MLP"),
        **dict.fromkeys(("one.0", "one.1", "two.0", "two.1"), "Int8Linear"),
        "act": "ReLU",
    }


class Whole(nn.Module):
    """Only calls its MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class OneByOne(Whole):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.mlp:
            x = layer(x) * 2
        return x


class ByNumber(Whole):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp[2](self.mlp[1](self.mlp[0](x) - 1))


class Part(Whole):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + self.mlp[:1](x)[:, :8]


class Handed(Whole):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_one_by_one(self.mlp, x)


class Aliased(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.first = [self.mlp[0]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + self.first[0](x)[:, :8]


class TwoNames(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.last = self.mlp[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + self.last(x[:, :16])


class Hooked(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.mlp[1].register_forward_hook(lambda module, args, out: out + 1)


class HookedLinear(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.mlp[0].register_forward_hook(lambda module, args, out: out - 0.25)


def run_one_by_one(layers: Any, x: torch.Tensor) -> torch.Tensor:
    return layers[2](layers[1](layers[0](x)) + 1)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    "make", [OneByOne, ByNumber, Part, Handed, Aliased, TwoNames, Hooked, HookedLinear], ids=lambda make: make.__name__
)
def test_modules_that_are_needed_one_by_one(no_timing: Any, make: Callable[[], Any], sampled: bool) -> None:
    model = make().eval()
    new, report = only_linear(model, sample_inputs=rows() if sampled else None)
    assert type(new.mlp) is nn.Sequential
    assert [layer.action for layer in report.layers] == ["int8", "int8"]
    told = "as its Sequential is not only called: " in report.layers[0].reason
    assert told == (make in (OneByOne, ByNumber, Part, Handed) or (make is Aliased and sampled))
    twin = copy.deepcopy(model)
    for name in ("0", "2"):
        layer = rk.Int8Linear.from_float(getattr(model.mlp, name))
        twin.mlp.get_submodule(name).forward = layer.forward
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), twin(rows()), rtol=1e-5, atol=1e-5)
    if make is Aliased:
        assert new.first[0] is new.mlp[0]


@pytest.mark.parametrize("sampled", [True, False])
def test_an_mlp_that_is_only_called_becomes_one_call(no_timing: Any, sampled: bool) -> None:
    new, _ = only_linear(Whole(), sample_inputs=rows() if sampled else None)
    assert kinds(new) == {"mlp": "Int8MLP", "mlp.0": "Int8Linear", "mlp.1": "Int8Linear"}


def test_hooks_and_attributes_of_a_sequential_are_carried_over() -> None:
    model = mlp().eval()
    model.register_forward_hook(lambda module, args, out: out + 100)
    model.note = "kept"
    new, _ = only_linear(model)
    assert type(new) is rk.Int8MLP
    assert new(rows()).min() > 90
    assert new.note == "kept"


def test_a_sequential_with_hooks_on_its_state_stays_one() -> None:
    model = mlp()
    model.register_state_dict_post_hook(lambda *args: None)
    new, report = only_linear(model)
    assert type(new) is nn.Sequential
    assert len(report.swapped) == 3


def test_code_without_a_source_may_take_modules_out() -> None:
    names: dict[str, Any] = {"Base": Whole}
    exec("class Model(Base):\n def forward(self, x):\n  return self.mlp[2](self.mlp[1](self.mlp[0](x) - 1))", names)
    model = names["Model"]().eval()
    new, report = only_linear(model)
    assert kinds(new) == {"mlp": "Sequential", "mlp.0": "Int8Linear", "mlp.1": "ReLU", "mlp.2": "Int8Linear"}
    assert "no source of Model.forward" in report.notes[0]
    assert (new(rows()) - model(rows())).abs().max() < 0.1


def test_copies_of_the_new_model() -> None:
    new, _ = only_linear(Shared().eval())
    with torch.no_grad():
        for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
            assert torch.equal(other(rows()), new(rows()))
        again, report = only_linear(new)
        assert torch.equal(again(rows()), new(rows()))
    assert {(layer.action, layer.reason) for layer in report.layers} == {("kept", "an Int8Linear already")}


# ---- layers left alone ---------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.fc.weight)


class TiedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.own = self.fc.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) - self.own


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items, self.fc = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16)
        self.fc.weight = self.items.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def with_nan() -> nn.Module:
    linear = nn.Linear(WIDTH, 8)
    with torch.no_grad():
        linear.weight[5, 2] = float("nan")
    return linear


def attention() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.unsqueeze(0)
            return self.attention(x, x, x)[0]

    return Model()


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own forward": (lambda: Scaled(WIDTH, 8), "its class has its own forward"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 8)), "parametrized: weight"),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(WIDTH, 8)), "has bias, weight_g, weight_v instead"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(WIDTH, 8), "weight", 0.5), "has masks of torch.nn.utils.prune"),
    "read": (Reader, "its weight is read by Reader.forward"),
    "tied bias": (TiedBias, "its bias is shared with 'own'"),
    "tied": (Tied, "its weight is shared with 'items.weight'"),
    "attention": (attention, "inside a MultiheadAttention, which reads its weight"),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True),
        "inside a TransformerEncoderLayer, which reads its weight",
    ),
    "float64": (lambda: nn.Linear(WIDTH, 8).double(), "its weight is float64"),
    "one column": (lambda: nn.Linear(1, 8), "too small: int8 would take 72 bytes, scales included"),
    "NaN": (with_nan, "row 5 of weight holds NaN or infinity"),
    "meta": (lambda: nn.Linear(WIDTH, 8, device="meta"), "meta device"),
    "lazy": (lambda: nn.LazyLinear(8), "its class has its own"),
    "quantized": (lambda: rk.Int8Linear(WIDTH, 8), "an Int8Linear already"),
    "too wide": (lambda: nn.Linear(65537, 1), "in_features must be from 1 to 65536"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Lazy modules")
@pytest.mark.parametrize("name", KEPT)
def test_kept_with_the_reason(name: str) -> None:
    make, reason = KEPT[name]
    model = make().eval()
    new, report = only_linear(model)
    assert report.layers
    assert not report.swapped
    assert any(reason in layer.reason for layer in report.kept), report
    assert reason in str(report)
    assert kinds(new) == kinds(model)
    if name in ("read", "tied bias", "tied", "attention"):
        assert torch.equal(new(rows()), model(rows()))


def test_attention_with_the_layers_around_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True), 2, enable_nested_tensor=False
            )
            self.out = nn.Linear(WIDTH, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.encoder(x))

    model = Model().eval()
    new, report = only_linear(model)
    assert [layer.name for layer in report.swapped] == ["out"]
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(new(x), rk.Int8Linear.from_float(model.out)(model.encoder(x)))


def test_layers_that_share_a_weight_share_the_new_one() -> None:
    model = nn.ModuleList([nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)])
    model[1].weight = model[0].weight
    new, report = only_linear(model)
    assert new[0].weight is new[1].weight
    assert new[0].weight_scale is new[1].weight_scale
    assert not torch.equal(new[0].bias, new[1].bias)
    assert [layer.reason for layer in report.layers] == ["one table with '1'", "one table with '0'"]
    _, report = only_linear(model, skip="0")
    assert {layer.name: layer.reason for layer in report.kept} == {
        "0": "skip='0'",
        "1": "its weight is shared with '0.weight'",
    }


def test_tables_and_linear_layers_together() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items, self.top = nn.Embedding(30, WIDTH), mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.top(self.items(x))

    model = Model().eval()
    new, report = rk.optimize(model, embedding="int4", linear="int8", skip="top.3")
    assert {layer.name: layer.action for layer in report.layers} == {
        "items": "int4",
        "top.0": "int8",
        "top.3": "kept",
        "top.6": "int8",
    }
    assert {name: kind for name, kind in kinds(new).items() if "." in name} == {
        "top.0": "Int8Linear",
        "top.3": "Linear",
        "top.4": "Dropout",
        "top.5": "GELU",
        "top.6": "Int8Linear",
    }
    ids = torch.arange(30)
    with torch.no_grad():
        assert 0 < (new(ids) - model(ids)).abs().max() < 0.5
    assert by_name(optimize(model)[1]).keys() == {"items"}  # linear layers only if they are asked for


def random_sequential(random: Any, width: int, depth: int = 0) -> tuple[nn.Sequential, int]:
    """Any order of layers, functions, what is left out and what ends a run, and Sequentials of them."""
    modules: list[nn.Module] = []
    for _ in range(random.integers(1, 6)):
        kind = random.integers(0, 10)
        if kind < 4:
            out = int(random.integers(4, 12))
            modules.append(nn.Linear(width, out, bool(random.integers(0, 2))))
            width = out
        elif kind < 8:
            functions = (nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Dropout, nn.Identity)
            modules.append(functions[random.integers(0, len(functions))]())
        elif kind == 8 or depth == 2:
            modules.append((nn.Tanh(), nn.LayerNorm(width), nn.GELU("tanh"))[random.integers(0, 3)])
        else:
            inner, width = random_sequential(random, width, depth + 1)
            modules.append(inner)
    return nn.Sequential(*modules), width


def one_by_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The model with each linear layer quantized by itself."""
    for module in model.children():
        if isinstance(module, nn.Sequential):
            x = one_by_one(module, x)
        else:
            x = rk.Int8Linear.from_float(module)(x) if isinstance(module, nn.Linear) else module(x)
    return x


def test_random_sequentials(no_timing: Any) -> None:
    random = np.random.default_rng(0)
    folded = 0
    for seed in range(150):
        torch.manual_seed(seed)
        model = random_sequential(random, WIDTH)[0].eval()
        new, report = only_linear(model, **({"min_sqnr": -100.0, "sample_inputs": rows()} if seed % 2 else {}))
        assert all(layer.action == "int8" for layer in report.layers)
        with torch.no_grad():
            torch.testing.assert_close(new(rows()), one_by_one(model, rows()), rtol=1e-4, atol=1e-5)
        # Nothing of a run is left beside it.
        left = [module for module in new.modules() if isinstance(module, nn.Linear)]
        assert not left
        folded += sum(isinstance(module, rk.Int8MLP) for module in new.modules())
    assert folded > 50
