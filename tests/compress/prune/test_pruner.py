"""Pruner: schedules by formula, zeros under every optimizer, resuming bit for bit, scores against autograd by hand."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.prune.layers import PruningMask

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.5),
    "foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 1))


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [module.mask for module in model.modules() if isinstance(module, PruningMask)]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 16, generator=generator)
    return x, (x[:, :4].sum(1, keepdim=True)).sin()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, pruner: rk.Pruner | None, steps: range, run: Any = None
) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        ((run or model)(x) - y).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


# ---- schedules -----------------------------------------------------------------------------------------------------


def test_the_cubic_schedule_by_formula() -> None:
    schedule = rk.CubicSchedule(begin=10, end=50, every=10, initial=0.2)
    assert [step for step in range(80) if schedule.moves(step)] == [10, 20, 30, 40, 50]
    # 0.9 - 0.7 * (1 - (t - 10) / 40)^3
    wanted = {0: 0.0, 9: 0.0, 10: 0.2, 20: 0.9 - 0.7 * 0.421875, 30: 0.8125, 40: 0.9 - 0.7 / 64, 50: 0.9, 70: 0.9}
    assert {step: schedule.sparsity(step, 0.9) for step in wanted} == pytest.approx(wanted)
    uneven = rk.CubicSchedule(3, 10, every=4)
    assert [step for step in range(20) if uneven.moves(step)] == [3, 7, 10]
    assert uneven.sparsity(10, 0.7) == 0.7
    assert uneven.end == 10
    assert [uneven.sparsity(step, 0.8) for step in (3, 10)] == [0.0, 0.8]


def test_numbers_of_numpy() -> None:
    schedule = rk.CubicSchedule(np.int64(1), np.int32(9), np.uint8(2), np.float32(0.25))
    assert schedule == rk.CubicSchedule(1, 9, 2, 0.25)
    assert [type(value) for value in vars(schedule).values()] == [int, int, int, float]
    assert type(rk.OneShot(np.int64(3)).at) is int
    model = mlp()
    pruner = rk.Pruner(model, np.float32(0.5), schedule=rk.OneShot(), amounts={"0": np.float64(0.75)})
    assert [layer.after for layer in pruner.finish().layers] == [0.75, 0.5, 0.5]


def test_all_at_once() -> None:
    schedule = rk.OneShot(3)
    assert [step for step in range(8) if schedule.moves(step)] == [3] == [schedule.end]
    assert [schedule.sparsity(step, 0.9) for step in (0, 2, 3, 9)] == [0.0, 0.0, 0.9, 0.9]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk.CubicSchedule(10, 10), ValueError, "end must be after begin, but begin is 10 and end 10"),
        (lambda: rk.CubicSchedule(-1, 10), ValueError, "begin must be at least 0, but is -1"),
        (lambda: rk.CubicSchedule(0, 10, 0), ValueError, "every must be at least 1, but is 0"),
        (lambda: rk.CubicSchedule(0, 10.0), TypeError, r"end must be a number of steps \(int\), but is 10\.0"),
        (lambda: rk.CubicSchedule(0, 10, 1, 1.0), ValueError, r"initial must be at least 0 and below 1, but is 1\.0"),
        (lambda: rk.CubicSchedule(0, 10, 1, math.nan), ValueError, "initial must be .* but is nan"),
        (lambda: rk.OneShot(-1), ValueError, "at must be at least 0, but is -1"),
        (lambda: rk.CubicSchedule(0, np.float32(9)), TypeError, "end must be a number of steps"),
        (lambda: rk.OneShot(True), TypeError, r"at must be a number of steps \(int\), but is True"),
    ],
)
def test_numbers_that_are_no_schedule(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zeros(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())  # made before the masks: the parameters stay the same
    pruner = rk.Pruner(model, 0.8, schedule=rk.CubicSchedule(begin=2, end=14, every=3))
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(30):
        train(model, optimizer, pruner, range(step, step + 1))
        for index, mask in zip((0, 2, 4), masks(model), strict=True):
            weight = model[index].weight
            assert not weight[~mask].any()
            assert not torch.signbit(weight[~mask]).any()
        share = max(0.0, 0.8 - 0.8 * (1 - (min(3 * ((step - 1) // 3), 12)) / 12) ** 3) if step >= 1 else 0.0
        assert pruner.sparsity == pytest.approx(share, abs=0.002)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert pruner.steps == 30
    x, _ = batch(0)
    outputs = model(x)
    report = pruner.finish()
    assert torch.equal(model(x), outputs)
    assert [type(module) for module in model] == [type(module) for module in mlp()]
    for layer, index in zip(report.layers, (0, 2, 4), strict=True):
        zeros = int((model[index].weight == 0).sum())
        assert zeros == round(0.8 * model[index].weight.numel())
        assert (layer.before, layer.after) == (0.0, pytest.approx(zeros / model[index].weight.numel()))
    assert pruner.sparsity == pytest.approx(report.sparsity)


def test_a_masked_model_trains_as_one_with_a_mask_in_its_forward() -> None:
    """Momentum and weight decay of what is dropped change nothing of what is kept."""

    class Masked(nn.Module):
        def __init__(self, linears: nn.Sequential, kept: list[torch.Tensor]) -> None:
            super().__init__()
            self.linears, self.kept = linears, kept

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            functions = [nn.functional.relu, nn.functional.gelu, lambda x: x]
            for index, mask, function in zip((0, 2, 4), self.kept, functions, strict=True):
                layer = self.linears[index]
                x = function(nn.functional.linear(x, layer.weight.masked_fill(~mask, 0.0), layer.bias))
            return x

    model, other = mlp(), mlp()
    pruner = rk.Pruner(model, 0.7, schedule=rk.OneShot())
    reference = Masked(other, [mask.clone() for mask in masks(model)])
    for one, prunes in ((model, pruner), (reference, None)):
        train(one, torch.optim.SGD(one.parameters(), 0.05, momentum=0.9, weight_decay=0.01), prunes, range(20))
    pruner.finish()
    for index, mask in zip((0, 2, 4), reference.kept, strict=True):
        assert torch.equal(model[index].weight, other[index].weight.masked_fill(~mask, 0.0))
        assert torch.equal(model[index].bias, other[index].bias)


def test_gradual_pruning_learns() -> None:
    x, y = batch(1000)
    losses = {}
    for name in ("dense", "gradual"):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        pruner = None
        if name == "gradual":
            pruner = rk.Pruner(model, 0.8, schedule=rk.CubicSchedule(50, 200, 10), layers=["0", "2"])
        train(model, optimizer, pruner, range(400))
        losses[name] = (model(x) - y).square().mean().item()
    untrained = (mlp()(x) - y).square().mean().item()
    assert losses["gradual"] < 0.2 * untrained
    assert pruner is not None
    assert pruner.sparsity == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize("scores", ["magnitude", "movement", "first_order"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resuming_bit_for_bit(scores: str, scope: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, rk.Pruner]:
        model = mlp()
        pruner = rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(begin=3, end=17, every=2), scores=scores, scope=scope)
        return model, torch.optim.AdamW(model.parameters(), 0.01), pruner

    straight = make()
    train(*straight, range(20))
    first = make()
    train(*first, range(10))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    train(*first, range(10, 13))  # what was saved must not depend on what comes after
    file.seek(0)
    second = make()
    with torch.no_grad():
        for parameter in second[0].parameters():
            parameter.normal_()
    for part, state in zip(second, torch.load(file), strict=True):
        part.load_state_dict(state)
    train(*second, range(10, 20))
    for (name, value), other in zip(straight[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert straight[2].steps == second[2].steps == 20
    for name, value in straight[2].state_dict()["scores"].items():
        assert torch.equal(value, second[2].state_dict()["scores"][name])


def test_copies() -> None:
    model = mlp()
    pruner = rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(0, 10), scores="movement")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, pruner, range(5))
    model.zero_grad()
    twin, other = copy.deepcopy((model, pruner))
    before = other.sparsity
    train(model, optimizer, pruner, range(5, 10))
    assert other.sparsity == before < pruner.sparsity
    assert other.model is twin
    train(twin, torch.optim.SGD(twin.parameters(), 0.1), other, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(masks(model), masks(twin), strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    """Masks that move need no compiling again."""
    results = []
    for compiled in (False, True):
        model = mlp()
        pruner = rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(2, 8, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        run: Any = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        train(model, optimizer, pruner, range(2), run)
        with torch.compiler.set_stance("fail_on_recompile"):
            train(model, optimizer, pruner, range(2, 12), run)
        results.append([p.detach().clone() for p in model.parameters()])
        assert pruner.sparsity == pytest.approx(0.9, abs=0.001)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["movement", "first_order"])
def test_scores_add_up(kind: str) -> None:
    model = mlp()
    pruner = rk.Pruner(model, 0.75, schedule=rk.OneShot(5), scores=kind, layers="2")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sums = torch.zeros(24, 32)
    for step in range(5):
        train(model, optimizer, None, range(step, step + 1))
        weight = model[2].parametrizations.weight.original
        product = weight.detach() * weight.grad
        sums += -product if kind == "movement" else product.abs()
        assert pruner.step() == (step == 4)
        assert torch.equal(pruner.state_dict()["scores"]["2"], sums)
    kept = masks(model)[0]
    assert int((~kept).sum()) == round(0.75 * 24 * 32)
    assert sums[kept].min() >= sums[~kept].max()
    train(model, optimizer, pruner, range(5, 7))
    assert torch.equal(pruner.state_dict()["scores"]["2"], sums)  # no use for more
    assert torch.equal(masks(model)[0], kept)


def test_gradients_that_are_not_finite_count_nothing() -> None:
    model = mlp()
    pruner = rk.Pruner(model, 0.5, schedule=rk.OneShot(2), scores="first_order")
    train(model, torch.optim.SGD(model.parameters(), 0.1), None, range(1))
    weight = model[0].parametrizations.weight.original
    weight.grad[0, 0], weight.grad[0, 1] = math.inf, math.nan  # a GradScaler skips such a step
    pruner.step()
    scores = pruner.state_dict()["scores"]["0"]
    assert scores[0, :2].tolist() == [0.0, 0.0]
    assert torch.isfinite(scores).all()
    assert torch.count_nonzero(scores) > 300


def test_layers_without_a_gradient() -> None:
    model = mlp()
    pruner = rk.Pruner(model, 0.5, schedule=rk.OneShot(2), scores="movement")
    with pytest.raises(RuntimeError, match=r"no layer has a gradient for scores='movement': call step\(\) before"):
        pruner.step()
    assert pruner.steps == 0
    model(batch(0)[0]).sum().backward()
    model[4].parametrizations.weight.original.grad = None
    pruner.step()
    assert pruner.state_dict()["scores"]["4"] is None
    message = r"'4' has had no gradient until step 2, so that there is no score='movement' for it: .* requires_grad"
    with pytest.raises(RuntimeError, match=message):
        pruner.step()
    assert all(mask.all() for mask in masks(model))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_frozen_and_unused_layers_are_not_pruned_by_scores_they_do_not_have(scope: str) -> None:
    for spoil in (lambda model: model[0].requires_grad_(False), lambda model: None):
        model = nn.Sequential(*mlp(), nn.Module())
        model[5].unused = nn.Linear(8, 8)
        spoil(model)
        run = model[:5]
        pruner = rk.Pruner(model, 0.5, schedule=rk.CubicSchedule(2, 9), scores="first_order", scope=scope)
        optimizer = torch.optim.SGD(run.parameters(), 0.01)
        train(model, optimizer, pruner, range(2), run)  # nothing is dropped at the begin
        with pytest.raises(RuntimeError, match=r"'(0|5\.unused)' has had no gradient until step 3"):
            train(model, optimizer, pruner, range(2, 3), run)
        assert all(mask.all() for mask in masks(model))
        amounts = {"0": 0.0, "5.unused": 0.0}  # left dense, they need none
        pruner = rk.Pruner(model, 0.5, schedule=rk.OneShot(2), scores="first_order", scope=scope, amounts=amounts)
        train(model, optimizer, pruner, range(3), run)
        assert [1 - mask.float().mean().item() for mask in masks(model)][::3] == [0.0, 0.0]
        assert not masks(model)[1].all()


def test_weights_come_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    pruner = rk.Pruner(model, 0.5, schedule=rk.CubicSchedule(0, 3, initial=0.5))
    original = model[0].parametrizations.weight.original
    assert masks(model)[0].tolist() == [[False, False], [True, True]]
    with torch.no_grad():
        original[1, 0] = 0.5
    assert pruner.step()
    assert masks(model)[0].tolist() == [[False, True], [False, True]]
    assert model[0].weight.tolist() == [[0.0, 2.0], [0.0, 4.0]]


@pytest.mark.parametrize("pattern", ["2:4", "block4x1"])
def test_patterns(pattern: str) -> None:
    model = mlp()
    schedule: Any = rk.OneShot(2) if pattern == "2:4" else rk.CubicSchedule(0, 4)
    pruner = rk.Pruner(model, 0.5, pattern, schedule=schedule, layers=["0", "2"])
    train(model, torch.optim.Adam(model.parameters()), pruner, range(6))
    assert pruner.sparsity == 0.5
    for mask in masks(model):
        if pattern == "2:4":
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
        else:
            blocks = mask.reshape(-1, 4, mask.shape[1]).sum(1)
            assert ((blocks == 0) | (blocks == 4)).all()


def test_amounts_and_masks_that_there_are() -> None:
    model = mlp()
    rk.prune(model, 0.5, layers="2")
    pruner = rk.Pruner(model, schedule=rk.CubicSchedule(1, 3), amounts={"0": 0.75, "2": 0.875})
    assert [round(1 - mask.float().mean().item(), 3) for mask in masks(model)] == [0.0, 0.5]
    for _ in range(3):
        pruner.step()
    assert [1 - mask.float().mean().item() for mask in masks(model)] == [0.75, 0.875]
    report = pruner.finish()
    assert [(layer.name, layer.before, layer.after) for layer in report.layers] == [
        ("0", 0.0, 0.75),
        ("2", 0.5, 0.875),
        ("4", 0.0, 0.0),
    ]
    assert report.layers[2].reason == "not in amounts"
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("scores", ["magnitude", "movement"])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("begin", [0, 2])
def test_a_pruned_model_is_pruned_further(scope: str, scores: str, held: bool, begin: int) -> None:
    model = mlp()
    rk.prune(model, 0.5, scope=scope)
    if not held:
        rk.remove_masks(model)
    schedule = rk.CubicSchedule(begin, begin + 4)
    pruner = rk.Pruner(model, 0.9, schedule=schedule, scores=scores, scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # zeros that no mask holds stay, too
    seen = [pruner.sparsity]
    for step in range(7):
        train(model, optimizer, pruner, range(step, step + 1))
        seen.append(pruner.sparsity)
    # 0.9 - 0.4 * (1 - t / 4)^3
    wanted = [0.5, 0.9 - 0.4 * 27 / 64, 0.85, 0.9 - 0.4 / 64, 0.9]
    assert seen[begin : begin + 5] == pytest.approx(wanted, abs=0.002)
    assert seen[:begin] == pytest.approx([0.5 if held else 0.0] * begin)


def test_what_is_there_is_no_start_when_one_is_asked_for() -> None:
    def first(before: float, target: float, **options: Any) -> float:
        model = mlp()
        rk.prune(model, before)
        return rk.Pruner(model, target, schedule=rk.CubicSchedule(0, 4, **options)).sparsity

    assert first(0.5, 0.9, initial=0.0) == 0.0
    assert first(0.5, 0.9, initial=0.25) == pytest.approx(0.25)
    assert first(0.5, 0.25) == pytest.approx(0.25)  # no sparser than asked for
    model = mlp()
    nn.init.zeros_(model[4].weight)  # a start for training, not a layer that was pruned
    rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(0, 4))
    assert masks(model)[2].all()


def test_a_schedule_of_ones_own() -> None:
    class Linear:
        end = 4

        def moves(self, step: int) -> bool:
            return step <= self.end

        def sparsity(self, step: int, target: float) -> float:
            return target * step / 4

    model = mlp()
    pruner = rk.Pruner(model, 0.5, schedule=Linear(), layers=["0"])
    seen = [pruner.sparsity]
    for _ in range(5):
        pruner.step()
        seen.append(pruner.sparsity)
    assert seen == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert repr(pruner).startswith("Pruner(1 layer, unstructured, ")
    assert repr(pruner).endswith("steps=5, sparsity=0.5000)")

    class Wrong(Linear):
        def sparsity(self, step: int, target: float) -> float:
            return 2 * target * step

    wrong = rk.Pruner(mlp(), 0.5, schedule=Wrong())
    with pytest.raises(ValueError, match=r"the schedule's sparsity at step 1 for '0' must be .* below 1, but is 1\.0"):
        wrong.step()


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be at least 0 and below 1"),
        ({"pattern": "dense"}, ValueError, "pattern must be 'unstructured'"),
        ({"scores": "taylor"}, ValueError, "scores must be one of 'magnitude', .* but is 'taylor'"),
        ({"scope": "all"}, ValueError, "scope must be 'layer' or 'global'"),
        ({"layers": "7"}, ValueError, "layers: '7' names no module"),
        ({"schedule": 0.5}, TypeError, r"schedule must be a CubicSchedule, a OneShot or the like, but is 0\.5"),
        ({"schedule": rk.CubicSchedule(0, 9, 1, 0.6)}, ValueError, r"initial of the schedule is 0\.6, above .* 0\.5"),
        ({"sparsity": None, "pattern": "2:4", "schedule": rk.CubicSchedule(0, 9)}, ValueError, "must be a OneShot"),
        ({"schedule": rk.OneShot(), "scores": "movement"}, ValueError, "step 0, when there are no gradients yet"),
        ({"model": nn.ReLU()}, ValueError, r"no torch\.nn\.Linear that can be pruned"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        rk.Pruner(**{"model": model, "sparsity": 0.5, "schedule": rk.CubicSchedule(0, 9), **options})
    assert not masks(model)


def test_weights_that_are_not_finite() -> None:
    model = mlp()
    pruner = rk.Pruner(model, 0.5, schedule=rk.CubicSchedule(0, 4, 2))
    with torch.no_grad():
        model[2].parametrizations.weight.original[3, 1] = math.nan
    assert not pruner.step()
    kept = [mask.clone() for mask in masks(model)]
    with pytest.raises(ValueError, match=r"the weight of '2' is nan at \[3, 1\], but must be finite"):
        pruner.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, masks(model), strict=True))


def test_after_the_end() -> None:
    model = mlp()
    pruner = rk.Pruner(model, 0.5, schedule=rk.OneShot())
    pruner.finish()
    with pytest.raises(RuntimeError, match=r"step\(\) after finish\(\)"):
        pruner.step()
    with pytest.raises(RuntimeError, match=r"finish\(\) was called before"):
        pruner.finish()
    assert pruner.sparsity == pytest.approx(0.5, abs=0.001)


def test_states_of_other_pruners() -> None:
    def make(schedule: Any = None, **options: Any) -> rk.Pruner:
        given = {"sparsity": 0.5, "scores": "movement", "layers": ["0", "2"], **options}
        return rk.Pruner(mlp(), schedule=schedule or rk.CubicSchedule(1, 9), **given)

    def altered(**values: Any) -> dict[str, Any]:
        return {**good, **values}

    pruner = make()
    good = make().state_dict()
    shaped = {"0": torch.ones(32, 16), "2": torch.ones(24, 32)}
    infinite = {"0": torch.ones(32, 16), "2": torch.full((24, 32), math.nan)}
    cases: list[tuple[Any, str]] = [
        ({}, "state_dict must have steps, scores, start, settings"),
        (3, "state_dict must have steps, scores, start, settings"),
        (make(scores="first_order").state_dict(), "of a Pruner with scores='first_order', but this one has 'movement'"),
        (make(pattern="block4x1").state_dict(), "with pattern='block4x1', but this one has 'unstructured'"),
        (make(layers="0").state_dict(), r"with layers=\['0'\], but this one has \['0', '2'\]"),
        (make(sparsity=0.9).state_dict(), r"with sparsity=\{'0': 0\.9, .*, but this one has \{'0': 0\.5"),
        (make(scope="global").state_dict(), "with scope='global', but this one has 'layer'"),
        (make(amounts={"0": 0.5}).state_dict(), r"with amounts=\['0'\], but this one has \[\]"),
        (
            make(rk.CubicSchedule(1, 8)).state_dict(),
            r"with schedule=\{'type': 'CubicSchedule', .*'end': 8, .*, but this one has \{.*'end': 9",
        ),
        (make(rk.OneShot(9)).state_dict(), "with schedule={'type': 'OneShot', .*, but this one has"),
        (altered(settings=None), r"state_dict\['settings'\] must be a dict, but is None"),
        (altered(settings={**good["settings"], "scope": torch.ones(2)}), "with scope=tensor"),
        (altered(settings={"pattern": "unstructured"}), "has no setting scores"),
        (altered(steps=-1), r"state_dict\['steps'\] must be at least 0, but is -1"),
        (altered(steps="5"), r"state_dict\['steps'\] must be a number of steps \(int\), but is '5'"),
        (altered(steps=None), r"state_dict\['steps'\] must be a number of steps \(int\), but is None"),
        (
            altered(steps=5, scores={"0": torch.ones(2, 2), "2": torch.ones(24, 32)}),
            r"the score of '0' in state_dict must be a float tensor \(32, 16\), but is float32 \(2, 2\)",
        ),
        (altered(scores={**shaped, "2": shaped["2"].long()}), r"of '2' .* float tensor \(24, 32\), but is int64"),
        (altered(scores={**shaped, "2": "none"}), r"of '2' .* must be a float tensor \(24, 32\), but is str"),
        (altered(scores=infinite), r"the score of '2' in state_dict is nan at \[0, 0\], but must be finite"),
        (altered(scores={}), r"state_dict\['scores'\] must have '0', '2', but has nothing"),
        (altered(scores={**shaped, "7": None}), r"state_dict\['scores'\] must have '0', '2', but has '0', '2', '7'"),
        (altered(scores=None), r"state_dict\['scores'\] must be a dict, but is None"),
        (altered(start=None), r"state_dict\['start'\] must be a dict, but is None"),
        (altered(start={"0": 0.5}), r"state_dict\['start'\] must have '0', '2', but has '0'"),
        (altered(start={"0": 0.5, "2": math.nan}), r"state_dict\['start'\]\['2'\] must be at least 0 .* but is nan"),
        (altered(start={"0": 0.5, "2": "0"}), r"state_dict\['start'\]\['2'\] must be a number, but is str"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(state)
        assert pruner.steps == 0
        assert pruner.state_dict()["scores"] == {"0": None, "2": None}
        assert pruner.state_dict()["start"] == {}
    pruner.load_state_dict(altered(steps=np.int64(5), scores=shaped, start={"0": 0.25, "2": 0.0}))
    assert type(pruner.steps) is int
    assert torch.equal(pruner.state_dict()["scores"]["2"], torch.ones(24, 32))
    pruner.state_dict()["scores"]["2"].zero_()
    assert shaped["2"].all()  # a copy


def test_the_start_is_resumed() -> None:
    """Also by a Pruner that was made of a model that is sparser by now, or not pruned at all."""
    model, fresh = mlp(), mlp()
    rk.prune(model, 0.5)
    pruner = rk.Pruner(model, 0.9, schedule=rk.CubicSchedule(0, 4))
    pruner.step()
    other = rk.Pruner(fresh, 0.9, schedule=rk.CubicSchedule(0, 4))
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(pruner.state_dict())
    again = rk.Pruner(copy.deepcopy(model), 0.9, schedule=rk.CubicSchedule(0, 4))
    again.load_state_dict(pruner.state_dict())
    for one in (pruner, other, again):
        one.step()
    assert other.sparsity == again.sparsity == pruner.sparsity == pytest.approx(0.85, abs=0.001)


def test_states_with_schedules_of_ones_own() -> None:
    class Own(rk.OneShot):
        pass

    pruner = rk.Pruner(mlp(), 0.5, schedule=Own(3))
    pruner.load_state_dict(rk.Pruner(mlp(), 0.5, schedule=Own(3)).state_dict())
    for other in (Own(4), rk.OneShot(3)):
        with pytest.raises(ValueError, match=r"with schedule=.*, but this one has .*'Own'"):
            pruner.load_state_dict(rk.Pruner(mlp(), 0.5, schedule=other).state_dict())


# ---- the end -------------------------------------------------------------------------------------------------------


def test_finishing_too_early() -> None:
    pruner = rk.Pruner(mlp(), 0.8, schedule=rk.CubicSchedule(0, 12, 3))
    for _ in range(3):
        pruner.step()
    message = r"finish\(\) at step 3 of 12: 46\.2% of the weights are dropped, not the 80\.0% that were asked for"
    with pytest.warns(UserWarning, match=message):
        report = pruner.finish()
    assert report.sparsity == pytest.approx(0.8 - 0.8 * 27 / 64, abs=0.001)


@pytest.mark.filterwarnings("error")
def test_finishing_in_time() -> None:
    for schedule in (rk.OneShot(), rk.OneShot(2), rk.CubicSchedule(0, 2)):
        pruner = rk.Pruner(mlp(), 0.8, schedule=schedule)
        for _ in range(schedule.end):
            pruner.step()
        assert pruner.finish().sparsity == pytest.approx(0.8, abs=0.001)
