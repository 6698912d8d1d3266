"""prune and remove_masks: masks against torch.nn.utils.prune and hand-computed ones, every option, what goes wrong."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import recsys_kernels as rk
from recsys_kernels.compress.prune.layers import PruningMask

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(20, 16), mlp()
        self.spare = nn.Linear(16, 8)
        self.conv, self.bilinear = nn.Conv1d(4, 4, 1), nn.Bilinear(4, 4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.table(ids))


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".parametrizations.weight.0"): module.mask
        for name, module in model.named_modules()
        if isinstance(module, PruningMask)
    }


def with_gradients(model: nn.Module) -> nn.Module:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    return model


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_each_layer_as_torch_does_it(sparsity: float) -> None:
    model, other = mlp(), mlp()
    report = rk.prune(model, sparsity)
    for index, (name, mask) in zip((0, 2, 4), masks(model).items(), strict=True):
        assert name == str(index)
        torch_prune.l1_unstructured(other[index], "weight", sparsity)
        assert torch.equal(mask, other[index].weight_mask.bool())
    x = torch.randn(5, 16)
    assert torch.equal(model(x), other(x))
    assert [layer.shape for layer in report.layers] == [(32, 16), (24, 32), (4, 24)]
    for layer, mask in zip(report.layers, masks(model).values(), strict=True):
        assert layer.before == 0.0
        assert layer.after == pytest.approx(1 - mask.float().mean().item())


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_all_layers_together_as_torch_does_it(sparsity: float) -> None:
    model, other = mlp(), mlp()
    for one in (model, other):
        with torch.no_grad():
            one[0].weight *= 1.5
            one[4].weight *= 1.0 if sparsity == 0.5 else 0.1
    report = rk.prune(model, sparsity, scope="global")
    torch_prune.global_unstructured(
        [(other[index], "weight") for index in (0, 2, 4)], torch_prune.L1Unstructured, amount=sparsity
    )
    wanted = {str(index): other[index].weight_mask.bool() for index in (0, 2, 4)}
    if sparsity == 0.5:
        assert all(torch.equal(mask, wanted[name]) for name, mask in masks(model).items())
    else:  # torch empties the last layer, which would cut the network; here its largest weight is kept
        assert not wanted["4"].any()
        kept = masks(model)["4"].nonzero().tolist()
        assert kept == [list(divmod(int(other[4].weight_orig.abs().argmax()), 24))]
    total = sum(mask.numel() for mask in wanted.values())
    assert sum(int((~mask).sum()) for mask in masks(model).values()) == round(sparsity * total)
    assert report.sparsity == pytest.approx(sparsity, abs=1 / total)


def test_no_layer_is_emptied() -> None:
    for scope in ("layer", "global"):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([[1e-9, 1e-9]]))
        rk.prune(model, 0.999, scope=scope)
        assert [int(mask.sum()) for mask in masks(model).values()] == [1, 1]
        assert masks(model)["1"].tolist() == [[False, True]]  # of equal ones the first goes


@pytest.mark.parametrize("pattern", ["block4x1", "block1x16", "block16x4", "2:4", "1:4", "4:8"])
def test_patterns(pattern: str) -> None:
    model = mlp()
    weights = [model[index].weight.detach().clone() for index in (0, 2, 4)]
    kept = {"2:4": 2, "1:4": 1, "4:8": 4}.get(pattern)
    rk.prune(model, None if kept else 0.5, pattern)
    for weight, mask in zip(weights, masks(model).values(), strict=True):
        if kept:
            of = int(pattern[-1])
            for group, chosen in zip(weight.reshape(-1, of).abs(), mask.reshape(-1, of), strict=True):
                assert sorted(group[chosen].tolist()) == sorted(group.tolist())[of - kept :]
        else:
            rows, columns = map(int, pattern.removeprefix("block").split("x"))
            blocks = [
                (weight[r : r + rows, c : c + columns].abs().mean().item(), mask[r : r + rows, c : c + columns])
                for r in range(0, weight.shape[0], rows)
                for c in range(0, weight.shape[1], columns)
            ]
            assert all(bool(block.all()) or not bool(block.any()) for _, block in blocks)
            dropped = [mean for mean, block in blocks if not block.any()]
            assert sorted(dropped) == sorted(mean for mean, _ in blocks)[: round(0.5 * len(blocks))]


def test_blocks_together() -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight *= 100
    report = rk.prune(model, 0.5, "block4x1", scope="global")
    assert report.layers[2].after == 0.0
    units = [8 * 16, 6 * 32, 24]
    dropped = sum(int((~mask).sum()) for mask in masks(model).values()) // 4
    assert dropped == round(0.5 * sum(units))


def test_scores_from_gradients() -> None:
    for scores in ("movement", "first_order"):
        model = with_gradients(mlp())
        weight, gradient = model[2].weight.detach().clone(), model[2].weight.grad
        rk.prune(model, 0.75, scores=scores, layers="2")
        product = [w * g for w, g in zip(weight.flatten().tolist(), gradient.flatten().tolist(), strict=True)]
        value = [-p if scores == "movement" else abs(p) for p in product]
        dropped = set(sorted(range(len(value)), key=value.__getitem__)[: round(0.75 * len(value))])
        assert set((~masks(model)["2"]).flatten().nonzero().squeeze(1).tolist()) == dropped
        assert masks(model).keys() == {"2"}


def test_given_scores() -> None:
    model = mlp()
    given = {"0": torch.randn(32, 16), "4": torch.arange(96.0).reshape(4, 24)}
    rk.prune(model, 0.5, scores=given, layers=("0", "4"))
    assert masks(model)["4"].tolist() == [[False] * 24] * 2 + [[True] * 24] * 2
    assert given["0"][masks(model)["0"]].min() > given["0"][~masks(model)["0"]].max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    rk.prune(model, 0.5, scope="global")
    assert model[0].weight.dtype == dtype
    assert model(torch.randn(3, 16, dtype=dtype)).dtype == dtype
    x = torch.randn(2, 16, dtype=dtype)
    model(x).sum().backward()
    assert not model[0].parametrizations.weight.original.grad[~masks(model)["0"]].any()


def test_amounts() -> None:
    model = mlp()
    report = rk.prune(model, amounts={"0": 0.75, "2": 0.0})
    assert [layer.after for layer in report.layers] == [0.75, 0.0, 0.0]
    assert report.layers[2].reason == "not in amounts"
    assert masks(model).keys() == {"0", "2"}
    report = rk.prune(model, 0.5, amounts={"4": 0.25})
    assert [layer.after for layer in report.layers] == [0.5, 0.5, 0.25]
    # With one threshold for all others.
    model = mlp()
    report = rk.prune(model, 0.5, scope="global", amounts={"4": 0.25})
    alone = mlp()
    rk.prune(alone, 0.5, scope="global", layers=("0", "2"))
    assert report.layers[2].after == 0.25
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(alone).items())
    report = rk.prune(mlp(), amounts={"0": 0.0, "2": 0.5}, pattern="2:4")
    assert [layer.after for layer in report.layers] == [0.0, 0.5, 0.0]


def test_which_layers() -> None:
    class Own(nn.Linear):
        pass

    choices: list[tuple[Any, set[str]]] = [
        (None, {"top.0", "top.2", "top.4", "spare"}),
        ("top", {"top.0", "top.2", "top.4"}),
        ("top.[02]", {"top.0", "top.2"}),
        (nn.Sequential, {"top.0", "top.2", "top.4"}),
        (["spare", "top.4"], {"top.4", "spare"}),
        (lambda name, module: module.out_features > 8, {"top.0", "top.2"}),
        (Own, {"spare"}),
    ]
    for layers, wanted in choices:
        model = Model()
        model.spare = Own(16, 8)
        report = rk.prune(model, 0.5, layers=layers)
        assert masks(model).keys() == wanted == {layer.name for layer in report.pruned}
    linear = nn.Linear(4, 4)
    assert "(the model)" in str(rk.prune(linear, 0.5))
    assert torch.count_nonzero(linear.weight) == 8


def test_the_report() -> None:
    report = rk.prune(mlp(), 0.9)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "sparsity"]
    assert lines[2].split() == ["0", "32", "x", "16", "0.0%", "->", "90.0%"]
    assert lines[-1] == "pattern unstructured: 90.0% of the pruned layers' weights"
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["layers"][1]["shape"] == [24, 32]
    zeros = [round(0.9 * size) for size in (512, 768, 96)]
    assert plain["sparsity"] == report.sparsity == pytest.approx(sum(zeros) / (512 + 768 + 96))


# ---- what a mask does ----------------------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects() -> None:
    model = with_gradients(mlp())
    before = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    rk.prune(model, 0.5)
    by_id = {id(p) for p in model.parameters()}
    assert all(id(p) in by_id for p, _, _ in before)
    assert all(torch.equal(p, values) and p.grad is grad for p, values, grad in before)
    assert rk.remove_masks(model, keep_zeros=False) == ("0", "2", "4")
    after = list(model.parameters())
    assert {id(p) for p in after} == {id(p) for p, _, _ in before}
    assert all(torch.equal(p, values) for p, values, _ in before)
    assert type(model[0]) is nn.Linear


def test_zeros_for_good() -> None:
    model, x = mlp(), torch.randn(3, 16)
    names = set(model.state_dict())
    weight, pointer = model[0].weight, model[0].weight.data_ptr()
    rk.prune(model, 0.9)
    outputs, kept = model(x), masks(model)
    assert "0.parametrizations.weight.0.mask" in model.state_dict()
    assert rk.remove_masks(model) == ("0", "2", "4")
    assert model[0].weight is weight
    assert weight.data_ptr() == pointer
    assert set(model.state_dict()) == names
    assert all(torch.equal(model[int(name)].weight != 0, mask) for name, mask in kept.items())
    assert torch.equal(model(x), outputs)
    assert rk.remove_masks(model) == ()


def test_zeros_are_zeros_whatever_is_behind() -> None:
    linear = nn.Linear(4, 4)
    rk.prune(linear, 0.5)
    mask = linear.parametrizations.weight[0].mask
    with torch.no_grad():
        linear.parametrizations.weight.original[~mask] = math.nan
    assert not linear.weight[~mask].any()
    assert not torch.signbit(linear.weight[~mask]).any()
    linear(torch.randn(3, 4)).sum().backward()
    gradient = linear.parametrizations.weight.original.grad
    assert not gradient[~mask].any()
    assert gradient[mask].all()
    rk.remove_masks(linear)
    assert not linear.weight[~mask].any()


def test_new_masks_replace_old_ones() -> None:
    model = mlp()
    rk.prune(model, 0.9)
    mask = masks(model)["0"]
    report = rk.prune(model, 0.5)
    assert report.layers[0].before == pytest.approx(0.9, abs=1e-3)
    assert report.layers[0].after == 0.5
    assert masks(model)["0"] is mask  # in place
    assert len(model[0].parametrizations.weight) == 1
    other = mlp()
    rk.prune(other, 0.5)
    assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(model).items())


def test_copies_and_state_dicts(tmp_path: Any) -> None:
    model, x = mlp(), torch.randn(3, 16)
    rk.prune(model, 0.9)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = mlp()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    rk.prune(other, 0.0)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other(x), model(x))
    rk.prune(twin, 0.0)
    assert torch.count_nonzero(model[0].weight) == round(0.1 * 512)
    assert "PruningMask(shape=(32, 16), sparsity=0.9004)" in repr(model)
    assert "PruningMask(shape=(32, 16))" in repr(copy.deepcopy(model).to("meta"))
    half = copy.deepcopy(model).half()
    assert masks(half)["0"].dtype == torch.bool


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_copies_keep_their_masks(keep_zeros: bool) -> None:
    model, x = mlp(), torch.randn(3, 16)
    rk.prune(model, 0.9)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    outputs = model(x)
    rk.remove_masks(model, keep_zeros=keep_zeros)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), outputs if keep_zeros else mlp()(x))
    assert torch.equal(first(x), outputs)
    rk.prune(first, 0.0)
    rk.remove_masks(first)
    assert torch.equal(second(x), outputs)
    assert torch.equal(copy.deepcopy(second)(x), outputs)


def test_compiled() -> None:
    model, x = mlp(), torch.randn(3, 16)
    rk.prune(model, 0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    rk.prune(model, 0.9)  # seen without compiling again
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), model(x))


def test_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    report = rk.prune(layer, 0.5)
    assert {one.name for one in report.pruned} == {"self_attn.out_proj", "linear1", "linear2"}
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        outputs = layer(x)
        rk.remove_masks(layer)
        assert torch.allclose(layer(x), outputs, atol=1e-6)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must be at least 0 and below 1, but is 1\.0"),
        ({"sparsity": -0.5}, ValueError, r"sparsity must be at least 0 and below 1, but is -0\.5"),
        ({"sparsity": None}, ValueError, "sparsity must be given with the pattern 'unstructured', but is None"),
        ({"pattern": "3x3"}, ValueError, "pattern must be 'unstructured', .* but is '3x3'"),
        ({"pattern": "2:4", "sparsity": 0.9}, ValueError, r"sparsity must be None or 0\.5 with the pattern '2:4'"),
        ({"pattern": "2:4", "sparsity": None, "scope": "global"}, ValueError, "scope must be 'layer' with .* '2:4'"),
        ({"scope": "model"}, ValueError, "scope must be 'layer' or 'global', but is 'model'"),
        ({"scores": "taylor"}, ValueError, "scores must be 'magnitude', .* but is 'taylor'"),
        ({"scores": "movement"}, ValueError, r"scores='movement' needs gradients, but 'top\.0' has none"),
        ({"scores": {}}, ValueError, r"scores has no entry for the layer 'top\.0'"),
        (
            {"scores": {"spare": torch.ones(2)}, "layers": "spare"},
            ValueError,
            r"scores\['spare'\] must have the shape \(8, 16\), but has \(2,\)",
        ),
        ({"scores": {"spare": 1}, "layers": "spare"}, TypeError, r"scores\['spare'\] must be a tensor, but is int"),
        (
            {"scores": {"spare": torch.full((8, 16), math.nan)}, "layers": "spare"},
            ValueError,
            r"the score of 'spare' is nan at \[0, 0\], but must be finite",
        ),
        ({"layers": "tops"}, ValueError, "layers: 'tops' names no module of the model"),
        ({"layers": "conv"}, ValueError, r"layers: 'conv' names no torch\.nn\.Linear"),
        ({"layers": nn.LSTM}, ValueError, "layers: LSTM names no module"),
        ({"layers": [3]}, TypeError, "layers takes names, patterns, module classes and functions, not 3"),
        ({"layers": 3}, TypeError, "layers takes names, patterns, module classes and functions, not 3"),
        ({"layers": int}, TypeError, "layers takes names, patterns, module classes and functions, not <class 'int'>"),
        ({"layers": []}, ValueError, r"no torch\.nn\.Linear that can be pruned"),
        ({"amounts": {"bottom": 0.5}}, ValueError, "amounts: 'bottom' names no linear layer that was chosen"),
        ({"amounts": {"spare": 1.5}}, ValueError, r"amounts\['spare'\] must be at least 0 and below 1, but is 1\.5"),
        ({"amounts": {}, "sparsity": None}, ValueError, "amounts is empty"),
        ({"model": "model"}, TypeError, r"model must be a torch\.nn\.Module, but is str"),
        ({"model": nn.ReLU()}, ValueError, r"the model has no torch\.nn\.Linear that can be pruned"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        rk.prune(**{"model": model, "sparsity": 0.5, **options})
    assert not masks(model)


def test_weights_that_are_not_finite() -> None:
    model = mlp()
    for value in (math.nan, math.inf):
        with torch.no_grad():
            model[2].weight[5, 7] = value
        with pytest.raises(ValueError, match=rf"the weight of '2' is {value} at \[5, 7\], but must be finite"):
            rk.prune(model, 0.5)
        assert not masks(model)


def test_layers_that_can_not_be_pruned() -> None:
    model = nn.ModuleDict(
        {
            "fine": nn.Linear(8, 8),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
            "lazy": nn.LazyLinear(8),
            "meta": nn.Linear(8, 8, device="meta"),
            "empty": nn.Linear(0, 8),
            "tied": nn.Linear(8, 20),
            "table": nn.Embedding(20, 8),
            "old": torch_prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
        }
    )
    model["tied"].weight = model["table"].weight
    reasons = {layer.name: layer.reason for layer in rk.prune(model, 0.5).layers}
    assert reasons == {
        "fine": "",
        "spectral": "its weight is parametrized: _SpectralNorm",
        "lazy": "its weight has no shape yet: call the model once",
        "meta": "on the meta device: there are no values yet",
        "empty": "empty",
        "tied": "its weight is shared with another module",
        "old": "its weight is not a parameter",
    }
    assert "kept: on the meta device" in str(rk.prune(model, 0.5))
    assert parametrize.is_parametrized(model["fine"], "weight")
    for name, reason in reasons.items():
        if reason:
            with pytest.raises(ValueError, match=f"layers: '{name}' can't be pruned: {reason}"):
                rk.prune(model, 0.5, layers=name)
            with pytest.raises(ValueError, match=f"amounts: '{name}' can't be pruned: {reason}"):
                rk.prune(model, amounts={name: 0.5})
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear that can be pruned; meta: on the meta device"):
        rk.prune(model, 0.5, layers="m*ta")


def test_a_layer_at_two_places_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.again = self.fc

    model = Twice()
    report = rk.prune(model, 0.5, layers="again")
    assert [layer.name for layer in report.layers] == ["fc"]
    assert len(masks(model)) == 1
    assert rk.prune(model, amounts={"fc": 0.25}).sparsity == 0.25
