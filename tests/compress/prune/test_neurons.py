"""prune_neurons: smaller models against masked ones and against neurons picked by hand, and what is left alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import tiny_dataset
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.converters import sparse_linear as sparse_module
from recsys_kernels.models import RankingModel, save_model
from recsys_kernels.models.dlrm import DLRM, DLRMConfig, Table

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count: int = 20, width: int = 16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 24, bias=False), nn.GELU(), nn.Linear(24, 4)
    )


def normed() -> nn.Sequential:
    """With values of each neuron in between, none of them at its start."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.PReLU(32),
        nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24, affine=False), nn.PReLU()),
        nn.Linear(24, 4),
    )
    with torch.no_grad():
        for value in (*model[1].parameters(), *model[2].parameters()):
            value.uniform_(0.5, 2.0)
    for _ in range(5):
        model(rows(64) * 3 + 1)
    return model.eval()


def picked(values: torch.Tensor, dropped: int) -> list[int]:
    """The neurons that are left when those with the lowest values go."""
    order = sorted(range(len(values)), key=values.tolist().__getitem__)
    return sorted(order[dropped:])


# ---- what is dropped -----------------------------------------------------------------------------------------------


def test_which_neurons_and_what_is_left() -> None:
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    new, report = rk.prune_neurons(model, 0.25)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (new.training, new[2].training) == (True, True)
    first = picked(model[0].weight.norm(dim=1) * model[3].weight.norm(dim=0), 8)
    second = picked(model[3].weight.norm(dim=1) * model[5].weight.norm(dim=0), 6)
    assert torch.equal(new[0].weight, model[0].weight[first])
    assert torch.equal(new[0].bias, model[0].bias[first])
    assert torch.equal(new[3].weight, model[3].weight[second][:, first])
    assert new[3].bias is None
    assert torch.equal(new[5].weight, model[5].weight[:, second])
    assert torch.equal(new[5].bias, model[5].bias)
    sizes = [(layer.in_features, layer.out_features) for layer in (new[0], new[3], new[5])]
    assert sizes == [(16, 24), (24, 18), (18, 4)]
    assert [(layer.before, layer.after, layer.following) for layer in report.layers] == [
        (32, 24, "3"),
        (24, 18, "5"),
        (4, 4, ""),
    ]
    assert report.layers[2].reason == "its outputs are those of the Sequential"
    assert report.parameters_before == 32 * 17 + 24 * 32 + 4 * 25
    assert report.parameters_after == 24 * 17 + 18 * 24 + 4 * 19 == sum(p.numel() for p in new.parameters())


@pytest.mark.parametrize("make", [mlp, normed])
def test_the_same_as_neurons_that_give_nothing(make: Any) -> None:
    """Against the whole model, in which what follows ignores the dropped neurons."""
    model = make().eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    first, second, third = linears
    scores = {first: torch.randperm(32), second: torch.randperm(24)}
    new, _ = rk.prune_neurons(model, 0.5, scores=scores, sample_inputs=rows())
    with torch.no_grad():
        before = model(rows())
        linears[second].weight[:, scores[first] < 16] = 0.0
        linears[third].weight[:, scores[second] < 12] = 0.0
        assert not torch.allclose(model(rows()), before, atol=1e-2)
        torch.testing.assert_close(new(rows()), model(rows()), atol=1e-5, rtol=1e-5)


def test_values_of_each_neuron_in_between() -> None:
    model = normed()
    new, _ = rk.prune_neurons(model, 0.5)
    kept = picked(model[1].weight.abs() * model[3][0].weight.norm(dim=0), 16)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(new[1], name), getattr(model[1], name)[kept])
    assert new[1].num_features == new[2].num_parameters == 16
    assert new[1].num_batches_tracked == 5
    assert torch.equal(new[2].weight, model[2].weight[kept])
    # Without a factor of its own the norm undoes every scale: only the following layer counts.
    kept = picked(model[4].weight.norm(dim=0), 12)
    assert torch.equal(new[3][0].bias, model[3][0].bias[kept])
    assert torch.equal(new[3][1].running_mean, model[3][1].running_mean[kept])
    assert new[3][1].weight is None
    assert new[3][2].num_parameters == 1
    model.train()(rows())
    new.train()(rows()).sum().backward()  # and it can be trained on
    assert all(p.grad is not None and p.grad.shape == p.shape for p in new.parameters())


def test_scores_from_gradients() -> None:
    model = mlp().eval()
    model(rows()).square().mean().backward()
    new, _ = rk.prune_neurons(model, 0.5, scores="first_order", layers="0")
    value = (model[0].weight * model[0].weight.grad).sum(1) + model[0].bias * model[0].bias.grad
    assert torch.equal(new[0].bias, model[0].bias[picked(value.double().abs(), 16)])
    assert new[3].out_features == 24
    assert all(p.grad is None for p in (new[0].weight, new[0].bias, new[3].weight))


def test_given_scores() -> None:
    model = mlp()
    new, report = rk.prune_neurons(model, 0.5, scores={"0": torch.arange(32)}, layers=["0"])
    assert torch.equal(new[0].weight, model[0].weight[16:])
    assert [layer.name for layer in report.layers] == ["0"]


@pytest.mark.parametrize(("fraction", "left"), [(0.0, 32), (0.01, 32), (0.5, 16), (0.999, 1)])
def test_fractions(fraction: float, left: int) -> None:
    new, _ = rk.prune_neurons(mlp(), fraction)
    assert new[0].out_features == left
    assert new(rows()).shape == (20, 4)


def test_types_and_frozen_layers() -> None:
    model = mlp().bfloat16()
    model[0].requires_grad_(False)
    new, _ = rk.prune_neurons(model, 0.5, sample_inputs=rows().bfloat16())
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in new.parameters()] == [False, False, True, True, True]


def test_the_report() -> None:
    report = rk.prune_neurons(mlp(), 0.5)[1]
    lines = str(report).splitlines()
    assert lines[2].split() == ["0", "32", "->", "16", "columns", "of", "'3'"]
    assert lines[4].split()[:3] == ["5", "4", "kept:"]
    assert lines[-1].startswith("whole model: 1,412 -> ")
    assert len(report.pruned) == 2
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["layers"][0] == {"name": "0", "before": 32, "after": 16, "following": "3", "reason": ""}


def test_a_ranking_model() -> None:
    table = Table("items", 50, ("item",))
    model = DLRM(DLRMConfig(3, (table,), dim=16, bottom=(32,), top=(64, 32))).eval()
    inputs = (torch.randn(4, 3), torch.arange(8), torch.arange(0, 9, 2))
    new, report = rk.prune_neurons(model, 0.25, sample_inputs=inputs)
    assert [layer.after for layer in report.pruned] == [24, 48, 24]
    assert new(*inputs).shape == (4,)
    assert (new.config.bottom, new.config.top) == ((24,), (48, 24))
    assert (model.config.bottom, model.config.top) == ((32,), (64, 32))
    twin = DLRM(new.config).eval()
    twin.load_state_dict(new.state_dict())
    assert torch.equal(twin(*inputs), new(*inputs))
    same, _ = rk.prune_neurons(model, 0.0)
    assert same.config == model.config
    assert torch.equal(same(*inputs), model(*inputs))


@pytest.mark.parametrize("linear", [None, "int8", "int8+sparse"])
def test_a_smaller_ranking_model_is_saved_and_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear: str | None
) -> None:
    monkeypatch.setattr(sparse_module, "runs_dense", lambda *layer: (False, False))
    data = tiny_dataset()
    torch.manual_seed(0)
    model = DLRM(DLRMConfig.for_schema(data.schema, dim=16)).eval()
    batch = data.batch(data.rows("test")[:50])[:3]
    served, _ = rk.prune_neurons(RankingModel(model, data.schema), 0.5, sample_inputs=tuple(batch))
    small = served.model
    assert (small.config.bottom, small.config.top) == ((32,), (64, 32))
    if linear is not None:
        sparsity = 0.8 if "sparse" in linear else None
        small, _ = rk.optimize(small, linear=linear, sparsity=sparsity)
    save_model(small, data.schema, tmp_path)
    loaded = rk.load_model(tmp_path).model
    assert loaded.config.top == (64, 32)
    with torch.no_grad():
        assert torch.equal(loaded(*batch), small(*batch))
        assert not torch.equal(loaded(*batch), model(*batch))


# ---- what is left alone --------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Every way in which neurons are in use elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 16))
        self.softmax = nn.Sequential(nn.Linear(16, 8), nn.Softmax(-1), nn.Linear(8, 16))
        self.taken = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.read = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.tied = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.alone = nn.Linear(16, 16)
        self.shared = nn.ReLU()
        norm = nn.BatchNorm1d(8)
        self.one = nn.Sequential(nn.Linear(16, 8), norm, nn.Linear(8, 16))
        self.two = nn.Sequential(nn.Linear(16, 8), norm, nn.Linear(8, 16))
        self.hooked = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.hooked[1].register_forward_hook(lambda module, args, output: output)
        self.masked = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.fine = nn.Sequential(nn.Linear(16, 8), self.shared, nn.Linear(8, 16))
        self.table = nn.Embedding(8, 16)
        self.table.weight = self.tied[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer_norm(x) + self.softmax(x) + self.tied(x) + self.alone(x) + self.one(x) + self.two(x)
        x = x + self.taken[2](self.shared(self.taken[0](x))) + self.hooked(x) + self.masked(x) + self.fine(x)
        return self.read(x) @ self.read[0].weight.t()


@pytest.mark.parametrize("sample_inputs", [None, rows()])
def test_neurons_in_use_elsewhere(sample_inputs: Any) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    rk.prune(model, 0.5, layers="masked.0")
    new, report = rk.prune_neurons(model, 0.5, sample_inputs=sample_inputs)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert [name for name, reason in reasons.items() if not reason] == ["fine.0"]
    wanted = {
        "layer_norm.0": "'layer_norm.1', which follows, is a LayerNorm, which may compute over all neurons",
        "softmax.0": "'softmax.1', which follows, is a Softmax, which may compute over all neurons",
        "alone": "not in a torch.nn.Sequential before another linear layer",
        "one.0": "'one.1', which follows, is a BatchNorm1d that is used in several places",
        "two.0": "'one.1', which follows, is a BatchNorm1d that is used in several places",
        "hooked.0": "'hooked.1', which follows, is a ReLU with hooks or another forward",
        "tied.0": "its weight is shared with 'table.weight'",
        "masked.0": "parametrized: weight",
        "fine.2": "its outputs are those of the Sequential",
    }
    assert {name: reasons[name] for name in wanted} == wanted
    assert "its Sequential is not only called: " in reasons["taken.0"]
    assert "its weight is read by" in reasons["read.0"]
    assert new(rows()).shape == (20, 8)
    assert new.fine[0].out_features == 4
    for name, reason in wanted.items():
        with pytest.raises(ValueError, match="can't lose neurons") as error:
            rk.prune_neurons(model, 0.5, layers=name, sample_inputs=sample_inputs)
        assert str(error.value) == f"layers: {name!r} can't lose neurons: {reason}"


def test_what_follows_can_not_be_changed() -> None:
    torch.manual_seed(0)

    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + input

    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), Own(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    _, report = rk.prune_neurons(model, 0.5, sample_inputs=rows())
    assert [layer.reason for layer in report.layers] == [
        "'2', which follows, can't be changed: its class has its own forward",
        "its class has its own forward",
        "",
        "its outputs are those of the Sequential",
    ]


def test_layers_used_twice() -> None:
    linear = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), linear, nn.ReLU(), linear)
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear that can lose neurons; 0: '2', which follows, is used"):
        rk.prune_neurons(model, 0.5)


def test_a_batch_norm_over_something_else() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(5), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="'1', which follows, is a BatchNorm1d of 5 channels, not 8"):
        rk.prune_neurons(model, 0.5, sample_inputs=torch.randn(3, 5, 16))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 1.0}, ValueError, r"fraction must be at least 0 and below 1, but is 1\.0"),
        ({"fraction": "half"}, TypeError, "fraction must be a number, but is str"),
        (
            {"scores": "movement"},
            ValueError,
            "scores must be 'magnitude', 'first_order' or tensors .* but is 'movement'",
        ),
        ({"scores": "first_order"}, ValueError, "scores='first_order' needs gradients, but '0' has none"),
        ({"scores": {}}, ValueError, r"scores\['0'\] must be a tensor of shape \(32,\), but is None"),
        (
            {"scores": {"0": torch.ones(3)}},
            ValueError,
            r"scores\['0'\] must be a tensor of shape \(32,\), but is \(3,\)",
        ),
        ({"layers": "7"}, ValueError, "layers: '7' names no module"),
        ({"layers": "5"}, ValueError, "layers: '5' can't lose neurons: its outputs are those of the Sequential"),
        ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module, but is int"),
        ({"model": nn.Linear(4, 4)}, ValueError, r"can lose neurons; \(the model\): not in a torch\.nn\.Sequential"),
        ({"model": nn.ReLU()}, ValueError, r"the model has no torch\.nn\.Linear that can lose neurons$"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.prune_neurons(**{"model": mlp(), "fraction": 0.5, **options})


@pytest.mark.parametrize("scores", ["magnitude", "first_order", "given"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("make", "layer"), [(mlp, "0"), (mlp, "5"), (normed, "0"), (normed, "3.0"), (normed, "4")])
def test_weights_that_are_not_finite(make: Any, layer: str, value: float, scores: Any) -> None:
    model = make()
    model(rows()).sum().backward()
    with torch.no_grad():
        model.get_submodule(layer).weight[2, 3] = value
    if scores == "given":
        scores = {name: torch.ones(m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(ValueError, match=rf"the weight of '{layer}' is {value} at \[2, 3\], but must be finite"):
        rk.prune_neurons(model, 0.5, scores=scores)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite(value: float) -> None:
    model = normed()
    with torch.no_grad():
        model[1].weight[7] = value
    with pytest.raises(ValueError, match=r"the score of neuron 7 of '0' is (nan|inf), but must be finite"):
        rk.prune_neurons(model, 0.5)
    with pytest.raises(ValueError, match=rf"the score of neuron 2 of '0' is {value}, but must be finite"):
        rk.prune_neurons(mlp(), 0.5, scores={"0": torch.ones(32).index_fill(0, torch.tensor(2), value)}, layers="0")


def test_a_batch_norm_over_as_many_positions_as_there_are_neurons() -> None:
    """Of inputs [batch, positions, features] BatchNorm1d takes the positions, which only a call shows."""
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    with pytest.raises(RuntimeError, match="the smaller model fails on sample_inputs, the given one does not"):
        rk.prune_neurons(model, 0.5, sample_inputs=torch.randn(3, 8, 16))
    assert rk.prune_neurons(model, 0.5, sample_inputs=rows())[0][0].out_features == 4


def test_a_model_that_knows_its_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert sum(m.out_features for m in self.modules() if isinstance(m, nn.Linear)) == 60, "another size"
            return self.layers(x)

    with pytest.raises(RuntimeError, match=r"the smaller model fails on sample_inputs.*AssertionError: another size"):
        rk.prune_neurons(Fixed(), 0.5, sample_inputs=rows())
