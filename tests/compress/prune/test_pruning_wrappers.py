"""Masks in models that torch wraps: DistributedDataParallel, averaged models, hooks of parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import recsys_kernels as rk
from recsys_kernels.compress.prune.layers import PruningMask

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32) if norm else nn.ReLU(), nn.Linear(32, 4))


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [module.mask for module in model.modules() if isinstance(module, PruningMask)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, pruner: rk.Pruner | None = None) -> None:
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


# ---- DistributedDataParallel ---------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scores", ["magnitude", "movement"])
@pytest.mark.parametrize("first", ["masks", "wrapper", "wrapper, and steps"])
def test_distributed(norm: bool, inside: bool, scores: str, first: str) -> None:
    """As without the wrapper, in whatever order they are put on, and after the masks are gone."""
    alone, model = mlp(norm), mlp(norm)
    found = []
    for one, wraps in ((alone, False), (model, True)):
        run: Any = DistributedDataParallel(one) if wraps and first != "masks" else one
        optimizer = torch.optim.SGD(one.parameters(), 0.05, momentum=0.9)
        if first == "wrapper, and steps":
            train(run, optimizer, range(2))
        pruned = one if inside else run
        pruner = rk.Pruner(pruned, 0.8, schedule=rk.CubicSchedule(1, 6), scores=scores)
        if wraps and first == "masks":
            run = DistributedDataParallel(one)
        train(run, optimizer, range(2, 10), pruner)
        found.append([mask.clone() for mask in masks(one)])
        assert pruner.sparsity == pytest.approx(0.8, abs=0.003)
        pruner.finish()
        if wraps and not norm and pruned is one:
            run = DistributedDataParallel(one)  # which can't be told that its last buffers are gone
        train(run, optimizer, range(10, 12))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for (name, value), other in zip(alone.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.usefixtures("group")
def test_distributed_at_once() -> None:
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, range(2))
    report = rk.prune(model, 0.75)
    assert [layer.name for layer in report.layers] == ["module.0", "module.2"]
    train(model, optimizer, range(2, 5))
    assert all(not model.module[i].weight[~mask].any() for i, mask in zip((0, 2), masks(model), strict=True))
    before = copy.deepcopy(model.module)
    assert rk.remove_masks(model) == ("module.0", "module.2")
    x = torch.randn(3, 16)
    assert torch.equal(model(x), before(x))
    train(model, optimizer, range(5, 8))
    assert all(torch.count_nonzero(p.grad) for p in model.parameters())


@pytest.mark.usefixtures("group")
def test_the_last_buffers_of_a_distributed_model() -> None:
    inner = mlp()
    rk.prune(inner, 0.75)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    train(model, optimizer, range(2))
    assert rk.remove_masks(model) == ("module.0", "module.2")
    train(model, optimizer, range(2, 4))
    assert [type(layer) for layer in inner] == [nn.Linear, nn.ReLU, nn.Linear]


def test_hooks_of_a_parameter_stay() -> None:
    """Among them those that an optimizer steps in."""
    model = mlp()
    weight, seen = model[0].weight, []
    weight.register_hook(lambda gradient: seen.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    for step in range(3):
        model(torch.randn(3, 16)).sum().backward()
        assert len(seen) == 2
        assert seen.count("gradient") == 1
        assert any(one is weight for one in seen)
        seen.clear()
        if step == 0:
            rk.prune(model, 0.5)
        elif step == 1:
            rk.remove_masks(model)


# ---- averaged models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_averaged_models(options: dict[str, Any]) -> None:
    """The average has the masks of the last model that went in."""
    model = mlp()
    pruner = rk.Pruner(model, 0.8, schedule=rk.CubicSchedule(2, 8))
    average = AveragedModel(model, **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    weights = []
    for step in range(10):
        train(model, optimizer, range(step, step + 1), pruner)
        average.update_parameters(model)
        weights.append(model[0].parametrizations.weight.original.detach().clone())
        assert all(torch.equal(a, b) for a, b in zip(masks(average), masks(model), strict=True))
    assert rk.remove_masks(average) == ("module.0", "module.2")
    wanted = weights[0]
    for number, weight in enumerate(weights[1:], 2):
        wanted = wanted.lerp(weight, 0.1 if options else 1 / number)
    torch.testing.assert_close(average.module[0].weight, wanted.where(masks(model)[0], 0.0))
    assert torch.count_nonzero(average.module[0].weight) == round(0.2 * 512)
