"""calibrate and equalize: ranges by every method against numpy, bounded memory, errors, and unchanged float models."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import recsys_kernels as rk
from recsys_kernels.compress.quantize.calibrate import Observer

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 16


def rows(seed: int, count: int = 50, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 4)
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(20, WIDTH), mlp()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.spare = nn.Linear(WIDTH, 8)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.top(self.norm(self.table(ids)) * scale)


def seen_by(layer: nn.Module, batches: list[torch.Tensor]) -> np.ndarray:
    x = torch.cat(batches)
    return x.numpy()


# ---- ranges --------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_inputs() -> None:
    model, batches = mlp().train(), [rows(seed) * (seed + 1) for seed in range(3)]
    before = copy.deepcopy(model.state_dict())
    ranges = rk.calibrate(model, iter(batches))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    x = torch.cat(batches)
    for name in ("0", "3", "5"):
        with torch.no_grad():
            low, high = model[: int(name)](x).aminmax()
        assert ranges.pop(name) == pytest.approx((low.item(), high.item()))
    assert ranges == {}


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_from_calibration_to_the_static_model(method: str) -> None:
    model, batches = mlp().eval(), [rows(seed) for seed in range(4)]
    ranges = rk.calibrate(model, batches, method)
    new, report = rk.optimize(model, linear="int8-static", ranges=json.loads(json.dumps(ranges)))
    assert {layer.action for layer in report.layers} == {"int8-static"}
    x = torch.cat(batches)
    with torch.no_grad():
        wanted = model(x)
        error = (new(x) - wanted).square().mean() / wanted.square().mean()
    assert error < 1e-3


@pytest.mark.parametrize("masks", ["rk.prune", "Pruner", "torch"])
def test_masked_layers_are_calibrated(masks: str) -> None:
    model, batches = Model().eval(), [torch.arange(20), torch.arange(5, 15)]
    if masks == "torch":
        for number in (0, 3, 5):
            prune.l1_unstructured(model.top[number], "weight", 0.9)
    elif masks == "rk.prune":
        rk.prune(model, 0.9, layers="top.*")
    else:
        rk.Pruner(model, 0.9, layers="top.*", schedule=rk.OneShot()).step()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    ranges = rk.calibrate(model, batches, skip="spare")
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert list(ranges) == ["top.0", "top.3", "top.5"]
    with torch.no_grad():
        low, high = model.top[:3](model.norm(model.table(batches[0]))).aminmax()
    assert ranges["top.3"] == pytest.approx((low.item(), high.item()))
    new, report = rk.optimize(model, None, linear="int8-static+sparse", ranges=ranges, skip="spare")
    actions = {layer.name: layer.action for layer in report.layers if layer.name != "table"}
    assert actions == {**dict.fromkeys(("top.0", "top.3", "top.5"), "int8-static+sparse"), "spare": "kept"}
    with torch.no_grad():
        torch.testing.assert_close(new(batches[0]), model(batches[0]), rtol=0.05, atol=0.05)
    if masks == "rk.prune":
        rk.remove_masks(model)
        assert rk.calibrate(model, batches, skip="spare") == ranges


def distributions() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    normal = random.normal(size=40_000).astype(np.float32)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "shifted": normal + 5,
        "negative": -np.abs(normal) - 0.5,
        "outliers": np.concatenate([normal, np.float32([60.0, -45.0])]),
        "tiny": normal * np.float32(1e-30),
        "large": normal * np.float32(5e37),
        "heavy": random.standard_t(2, size=40_000).astype(np.float32),
    }


def observed(values: np.ndarray, parts: int = 7) -> Observer:
    observer = Observer(True)
    # The smallest ones first, so that the histogram has to stretch again and again.
    ordered = values[np.argsort(np.abs(values))]
    for part in np.array_split(ordered, parts):
        observer.add(torch.from_numpy(part).reshape(-1, 1))
    return observer


@pytest.mark.parametrize("share", [0.9, 0.999, 0.9999])
def test_percentiles(share: float) -> None:
    for name, values in distributions().items():
        low, high = observed(values).range("percentile", share)
        span = float(values.max()) - float(values.min())
        step = max(span, float(np.abs(values).max())) / 2000
        assert low == pytest.approx(np.quantile(values, 1 - share), abs=step), name
        assert high == pytest.approx(np.quantile(values, share), abs=step), name
        assert values.min() <= low < high <= values.max()


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    """Of values in 8 bits, as the int8 layer quantizes them, in float64."""
    bottom, top = min(low, 0.0), max(high, 0.0)
    scale = (top - bottom) / 255
    zero = np.round(-bottom / scale)
    q = np.clip(np.round(values.astype(np.float64) / scale) + zero, 0, 255)
    return float(np.square((q - zero) * scale - values).sum())


def test_mse_is_no_worse_than_the_others_and_finds_outliers() -> None:
    for name, values in distributions().items():
        observer = observed(values)
        errors = {
            method: squared_error(values, *observer.range(method, 0.9999)) for method in ("minmax", "percentile", "mse")
        }
        assert errors["mse"] <= 1.02 * min(errors["minmax"], errors["percentile"]), (name, errors)
        # And within reach of the best pair of ends.
        fractions = np.linspace(0.1, 1, 19)
        best = min(
            squared_error(values, min(float(values.min()), 0) * a, max(float(values.max()), 0) * b)
            for a in fractions
            for b in fractions
            if min(float(values.min()), 0) * a < max(float(values.max()), 0) * b
        )
        assert errors["mse"] <= 1.05 * best, name
    values = distributions()["outliers"]
    assert squared_error(values, *observed(values).range("mse", 1)) < 0.95 * squared_error(values, -45.0, 60.0)


def test_order_and_size_of_batches_do_not_matter() -> None:
    values = distributions()["heavy"]
    once = Observer(True)
    once.add(torch.from_numpy(values).reshape(-1, 1))
    for method in ("minmax", "percentile", "mse"):
        assert observed(values).range(method, 0.999) == pytest.approx(once.range(method, 0.999), rel=1e-6)
        assert observed(values, 1).range(method, 0.999) == once.range(method, 0.999)


def test_special_inputs() -> None:
    for method in ("minmax", "percentile", "mse"):
        zeros = Observer(True)
        zeros.add(torch.zeros(3, 4))
        assert zeros.range(method, 0.9) == (0.0, 1.0)
        zeros.add(torch.full((1, 4), 2.0))
        low, high = zeros.range(method, 1.0)
        assert low == 0.0
        assert high == pytest.approx(2.0, rel=0.05)
        for value in (3.0, -3.0):
            constant = Observer(True)
            constant.add(torch.full((5, 2), value))
            assert constant.range(method, 0.99) == (min(value, 0.0), max(value, 0.0))


def test_memory_does_not_grow() -> None:
    observer = Observer(True)
    size = len(observer._counts)
    for seed in range(5):
        observer.add(rows(seed) * 10**seed)
        assert len(observer._counts) == size
        assert observer._counts.sum() == (seed + 1) * 50 * WIDTH
    kept = [value for value in vars(observer).values() if isinstance(value, torch.Tensor)]
    assert [value.numel() for value in kept] == [size]
    assert len(Observer(False)._counts) == 0


def test_layers_at_several_places_get_one_range() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)
            self.again = self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.fc(input=x) * 10)

    model = Twice()
    ranges = rk.calibrate(model, [rows(0)])
    with torch.no_grad():
        both = torch.cat([rows(0), model.fc(rows(0)) * 10])
    assert ranges == {"fc": pytest.approx((both.min().item(), both.max().item()))}
    _, report = rk.optimize(model, linear="int8-static", ranges=ranges)
    assert [layer.action for layer in report.layers] == ["int8-static"]


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_errors() -> None:
    model = mlp()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "entropy"}, "method must be one of minmax, percentile, mse, but is 'entropy'"),
        ({"method": "percentile", "percentile": 50.0}, "percentile must be above 50 and at most 100"),
        ({"percentile": 101}, "percentile must be above 50 and at most 100"),
        ({"batches": []}, "batches is empty"),
        ({"skip": nn.Sequential}, "no linear layer that can be swapped"),
        ({"skip": "top"}, "skip: 'top' names no module"),
        ({"batches": [rows(0), rows(1) * float("inf")]}, "batch 1: the input of '0' holds NaN or infinity"),
        ({"batches": [rows(0) * float("nan")]}, "batch 0: the input of '0' holds NaN or infinity"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            rk.calibrate(**{"model": model, "batches": [rows(0)], **options})
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        rk.calibrate("model", [])  # type: ignore[arg-type]


def test_layers_that_are_not_reached() -> None:
    model, ids = Model(), torch.arange(20)
    with pytest.raises(RuntimeError, match="no batch reached 'spare'; name what is not used in skip"):
        rk.calibrate(model, [ids])
    with pytest.raises(RuntimeError, match=r"no batch reached 'top\.0', 'top\.3', 'top\.5', 'spare'"):
        rk.calibrate(model, [ids[:0]])
    ranges = rk.calibrate(model, [ids, (ids, 2.0)], skip="spare")
    assert ranges.keys() == {"top.0", "top.3", "top.5"}
    assert ranges["top.0"] == pytest.approx(tuple(2 * end for end in rk.calibrate(model, [ids], skip="spare")["top.0"]))
    assert model.norm.num_batches_tracked == 0  # it ran in eval mode
    model.train()
    model.norm.eval()
    rk.calibrate(model, [ids], skip="spare")
    assert (model.training, model.norm.training, model.top.training) == (True, False, True)


def test_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")

    def batches() -> Iterator[torch.Tensor]:
        yield from (rows(seed) for seed in range(3))

    rk.calibrate(mlp(), batches())
    assert capsys.readouterr().err == ""  # not a terminal
    rk.calibrate(mlp(), batches(), progress=True)
    assert "3batch" in capsys.readouterr().err.replace(" ", "")


# ---- equalization --------------------------------------------------------------------------------------------------


def uneven() -> nn.Sequential:
    """An MLP whose second and third layer get channels of very different size."""
    model = mlp()
    with torch.no_grad():
        for layer, seed in ((model[0], 1), (model[3], 2)):
            sizes = 10 ** torch.empty(layer.out_features).uniform_(
                -1.5, 1.5, generator=torch.Generator().manual_seed(seed)
            )
            layer.weight.mul_(sizes.unsqueeze(1))
            layer.bias.mul_(sizes)
    return nn.Sequential(*model[:4], nn.ReLU(), model[5]).eval()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_equalized_models_compute_the_same_bit_for_bit(alpha: float) -> None:
    model, batches = uneven(), [rows(seed) for seed in range(3)]
    before = copy.deepcopy(model.state_dict())
    new = rk.equalize(model, batches, alpha)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in new] == [type(module) for module in model]
    x = torch.cat([rows(9, 100) * 3, rows(10, 3)])
    with torch.no_grad():
        assert torch.equal(new(x), model(x))
    for first, second in ((0, 3), (3, 5)):
        with torch.no_grad():
            largest = model[:second](torch.cat(batches)).abs().amax(0)
        factor = (model[first].bias / new[first].bias).detach()
        if first == 0:
            assert torch.equal(new[first].weight * factor.unsqueeze(1), model[first].weight)
        assert torch.equal(factor.log2(), factor.log2().round())
        weights = before[f"{second}.weight"].abs().amax(0)
        wanted = (alpha * largest.log2() - (1 - alpha) * weights.log2()).clamp(-8, 8)
        assert ((factor.log2() - wanted).abs() <= 0.5 + 1e-3)[largest > 0].all()


def test_equalization_quantizes_better() -> None:
    model, batches = uneven(), [rows(seed) for seed in range(3)]
    x = rows(11, 300)
    with torch.no_grad():
        wanted = model(x)
        errors = []
        for candidate in (model, rk.equalize(model, batches)):
            for choice in ("int8", "int8-static"):
                ranges = rk.calibrate(candidate, batches) if choice == "int8-static" else None
                new, _ = rk.optimize(candidate, linear=choice, ranges=ranges)
                errors.append(((new(x) - wanted).square().mean() / wanted.square().mean()).item())
    assert errors[2] < 0.7 * errors[0], errors
    assert errors[3] < 0.7 * errors[1], errors


def test_only_consecutive_layers_are_equalized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
    )
    new = rk.equalize(model, [rows(0)])
    changed = [name for name, value in new.named_parameters() if not torch.equal(value, model.get_parameter(name))]
    assert set(changed) == {"4.weight", "4.bias", "6.weight"}
    assert new.training
    with pytest.raises(ValueError, match="no two linear layers in a row"):
        rk.equalize(nn.Sequential(nn.Linear(WIDTH, 8), nn.Sigmoid(), nn.Linear(8, 8)), [rows(0)])
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1, but is 1\.5"):
        rk.equalize(model, [rows(0)], 1.5)
    with pytest.raises(ValueError, match="batches is empty"):
        rk.equalize(model, [])
    with pytest.raises(RuntimeError, match="no batch reached '6'"):
        rk.equalize(model, [rows(0)[:0]])


def test_layers_that_share_a_weight_are_not_equalized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight = model[2].weight
    with torch.no_grad():
        model[0].weight[3] *= 100
        model[4].weight[3] *= 100
    with pytest.raises(ValueError, match="no two linear layers in a row"):
        rk.equalize(model, [rows(0)])
    model = nn.Sequential(*model, nn.ReLU(), nn.Linear(8, 4)).eval()
    new = rk.equalize(model, [rows(0)])
    assert new[2].weight is new[3].weight
    assert not torch.equal(new[4].weight, model[4].weight)
    with torch.no_grad():
        assert torch.equal(new(rows(1)), model(rows(1)))


def test_channels_that_are_never_used_stay() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0  # ReLU: always 0
        model[2].weight[:, 5] = 0.0
    new = rk.equalize(model, [rows(0)])
    for channel in (2, 5):
        assert torch.equal(new[0].weight[channel], model[0].weight[channel])
        assert torch.equal(new[2].weight[:, channel], model[2].weight[:, channel])
    with torch.no_grad():
        assert torch.equal(new(rows(1)), model(rows(1)))
