"""sensitivity: metrics against models pruned by hand, weights restored bit for bit, and amounts for prune."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import recsys_kernels as rk
from recsys_kernels.compress.prune.sensitivity import Sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 4))


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(X) - 1.0).square().mean().item()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


def test_metrics_are_those_of_pruned_models() -> None:
    model = mlp()
    before = state(model)
    found = rk.sensitivity(model, loss, (0.9, 0.5, 0.5), higher_is_better=False)
    assert same(model, before)
    assert type(model[0]) is nn.Linear
    assert found.baseline == loss(mlp())
    assert found.sparsities == (0.5, 0.9)
    assert list(found.metrics) == ["0", "2", "4"]
    for name, values in found.metrics.items():
        for sparsity, value in zip(found.sparsities, values, strict=True):
            other = mlp()
            torch_prune.l1_unstructured(other[int(name)], "weight", sparsity)
            assert value == pytest.approx(loss(other), rel=1e-6)
        assert found.drops(name) == pytest.approx([value - found.baseline for value in values])


@pytest.mark.parametrize("pattern", ["2:4", "block4x1"])
def test_patterns_and_layers(pattern: str) -> None:
    found = rk.sensitivity(mlp(), loss, pattern=pattern, layers=["0", "2"])
    assert found.sparsities == ((0.5,) if pattern == "2:4" else (0.5, 0.7, 0.8, 0.9, 0.95))
    assert list(found.metrics) == ["0", "2"]
    other = mlp()
    rk.prune(other, 0.5, pattern, layers="2")
    assert found.metrics["2"][0] == pytest.approx(loss(other), rel=1e-6)


def test_masked_models_are_pruned_further() -> None:
    model = mlp()
    rk.prune(model, 0.6)
    before = state(model)
    found = rk.sensitivity(model, loss, (0.5, 0.9))
    assert same(model, before)
    assert [values[0] for values in found.metrics.values()] == [found.baseline] * 3
    other = mlp()
    rk.prune(other, 0.6)
    rk.prune(other, amounts={"2": 0.9})
    assert found.metrics["2"][1] == pytest.approx(loss(other), rel=1e-6)


def test_what_a_mask_has_dropped_goes_first() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    rk.prune(model, 0.5, scores={"0": torch.tensor([[2.0, 2.0, 1.0, 1.0]])})  # 1 and 2 are left
    found = rk.sensitivity(model, lambda m: m[0].weight.sum().item(), (0.5, 0.75))
    assert found.baseline == 3.0
    assert found.metrics == {"0": (3.0, 2.0)}


def test_sparsities_of_numpy() -> None:
    found = rk.sensitivity(mlp(), loss, np.array([0.75, 0.5], dtype=np.float32))
    assert found.sparsities == (0.5, 0.75)
    assert json.loads(json.dumps(found.to_dict()))["sparsities"] == [0.5, 0.75]


def test_from_the_scan_to_a_pruned_model() -> None:
    model = mlp()
    found = rk.sensitivity(model, lambda m: -loss(m))
    amounts = found.amounts(0.01)
    assert set(amounts.values()) <= {0.0, *found.sparsities}
    report = rk.prune(model, amounts=amounts)
    assert [layer.after for layer in report.layers] == pytest.approx(list(amounts.values()), abs=0.01)


def test_amounts() -> None:
    nan = math.nan
    metrics = {
        "robust": (0.80, 0.81, 0.795),
        "falls": (0.80, 0.75, 0.70),
        "back": (0.75, 0.80, 0.80),  # better again, but not all the way
        "bad": (0.1, 0.1, 0.1),
        "nan": (0.80, nan, 0.80),
    }
    found = Sensitivity(0.80, (0.5, 0.8, 0.9), metrics, "unstructured")
    assert found.amounts(0.01) == {"robust": 0.9, "falls": 0.5, "back": 0.0, "bad": 0.0, "nan": 0.5}
    assert found.amounts(0.0) == {"robust": 0.8, "falls": 0.5, "back": 0.0, "bad": 0.0, "nan": 0.5}
    assert found.amounts(1.0) == {"robust": 0.9, "falls": 0.9, "back": 0.9, "bad": 0.9, "nan": 0.5}
    lower = Sensitivity(0.5, (0.5, 0.8), {"a": (0.51, 0.6), "b": (0.4, 0.4)}, "unstructured", higher_is_better=False)
    assert lower.amounts(0.02) == {"a": 0.5, "b": 0.8}
    for wrong in (-0.1, nan):
        with pytest.raises(ValueError, match=f"max_drop must be at least 0, but is {wrong}"):
            found.amounts(wrong)


def test_the_table() -> None:
    found = Sensitivity(0.8, (0.5, 0.95), {"top.0": (0.79, 0.123456789), "": (0.8, 0.7)}, "block4x1")
    assert str(found).splitlines() == [
        "layer         50%      95%",
        "-----------  ----  -------",
        "top.0        0.79  0.12346",
        "(the model)   0.8      0.7",
        "pattern block4x1, one layer at a time; as it is: 0.8 (higher is better)",
    ]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["metrics"]["top.0"] == [0.79, 0.123456789]
    assert Sensitivity(**plain).metrics.keys() == found.metrics.keys()


def test_weights_are_put_back_after_an_error() -> None:
    model = mlp()
    before = state(model)
    calls = []

    def evaluate(one: nn.Module) -> float:
        calls.append(torch.count_nonzero(model[0].weight).item())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        rk.sensitivity(model, evaluate)
    assert calls == [512, 256, 512 - round(0.7 * 512)]
    assert same(model, before)


def test_tensors_and_numbers() -> None:
    for make in (torch.tensor, int, float, lambda value: torch.ones(1, requires_grad=True) * value):
        assert rk.sensitivity(mlp(), lambda m, make=make: make(3)).metrics["0"] == (3.0,) * 5
    for wrong in (None, "good", torch.ones(2), [1.0]):
        with pytest.raises(TypeError, match="evaluate must return a number, but returned "):
            rk.sensitivity(mlp(), lambda m, wrong=wrong: wrong)


def test_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    rk.sensitivity(mlp(), loss)
    assert capsys.readouterr().err == ""  # not a terminal
    rk.sensitivity(mlp(), loss, progress=True)
    assert "16/16" in capsys.readouterr().err


def test_progress_without_tqdm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    wanted = [
        "pruning one layer at a time: 1 of 3 done (0)",
        "pruning one layer at a time: 2 of 3 done (2)",
        "pruning one layer at a time: 3 of 3 done (4)",
    ]
    rk.sensitivity(mlp(), loss, progress=True)
    assert capsys.readouterr().err.splitlines() == wanted
    for progress in (None, False):
        rk.sensitivity(mlp(), loss, progress=progress)
        assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    rk.sensitivity(mlp(), loss)
    rk.sensitivity(mlp(), loss, progress=False)
    rk.sensitivity(nn.Linear(16, 4), loss)
    assert capsys.readouterr().err.splitlines() == [*wanted, "pruning one layer at a time: 1 of 1 done (the model)"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsities": 0.5}, TypeError, r"sparsities must be several numbers, such as \(0\.5, 0\.9\), but is 0\.5"),
        ({"sparsities": "0.5"}, TypeError, "sparsities must be several numbers, .* but is '0.5'"),
        ({"sparsities": np.float32(0.5)}, TypeError, "sparsities must be several numbers"),
        ({"sparsities": [[0.5]]}, TypeError, "sparsities must be a number, but is list"),
        ({"sparsities": (s for s in (0.0,))}, ValueError, r"above 0 and below 1, but are \(0\.0,\)"),
        ({"sparsities": ()}, ValueError, r"sparsities must be at least one number above 0 and below 1, but are \(\)"),
        ({"sparsities": (0.0, 0.5)}, ValueError, "sparsities must be at least one number above 0"),
        ({"sparsities": (0.5, 1.0)}, ValueError, r"sparsities must be at least 0 and below 1, but is 1\.0"),
        ({"pattern": "4:2"}, ValueError, "pattern must be 'unstructured'"),
        ({"layers": "7"}, ValueError, "layers: '7' names no module"),
        ({"evaluate": 3}, TypeError, "evaluate must be a function of the model, but is int"),
        ({"model": nn.ReLU()}, ValueError, r"no torch\.nn\.Linear that can be pruned"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.sensitivity(**{"model": mlp(), "evaluate": loss, **options})


def test_weights_that_are_not_finite() -> None:
    model, calls = mlp(), []
    with torch.no_grad():
        model[4].weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"the weight of '4' is nan at \[1, 2\], but must be finite"):
        rk.sensitivity(model, lambda m: calls.append(1) or 1.0)
    assert not calls  # nothing was measured in vain
