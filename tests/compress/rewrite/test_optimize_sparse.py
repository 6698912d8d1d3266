"""optimize(linear="sparse" and the like): what is pruned, what stays dense, and what the report says."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_support import WIDTH, by_name, kinds, mlp, only_linear, rows, without_timing
from small_data import tiny_dataset
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.converters import linear as linear_module
from recsys_kernels.compress.converters import sparse_linear as sparse_module
from recsys_kernels.compress.rewrite.optimize import optimize
from recsys_kernels.models import DLRM, DLRMConfig, save_model

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICES = ("sparse", "int8+sparse", "int8-static+sparse")


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return without_timing(monkeypatch)


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where sparse layers are always faster."""
    monkeypatch.setattr(sparse_module, "runs_dense", lambda *layer: (False, False))


def pruned_by_hand(model: nn.Sequential, sparsity: float) -> nn.Sequential:
    """Its layers with the lowest magnitudes set to zero, by sorting."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin:
            if isinstance(layer, nn.Linear):
                lowest = layer.weight.abs().flatten().argsort()[: round(sparsity * layer.weight.numel())]
                layer.weight.flatten().index_fill_(0, lowest, 0.0)
    return twin


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("trains", [True, False])
def test_an_mlp_is_pruned(choice: str, trains: bool) -> None:
    model = nn.ModuleDict({"top": mlp().train(trains)})
    before = copy.deepcopy(model.state_dict())
    ranges = {"top.0": (-3.0, 3.0), "top.3": (0.0, 2.0), "top.6": (-0.2, 1.0)} if "static" in choice else None
    new, report = only_linear(model, choice, sparsity=0.75, ranges=ranges)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert kinds(new) == {"top": "SparseMLP", **dict.fromkeys(("top.0", "top.1", "top.2"), "SparseLinear")}
    assert {module.training for module in new["top"].modules()} == {trains}
    assert [layer.epilogue for layer in new["top"]] == ["relu", "gelu", None]
    assert [layer.activation for layer in new["top"]] == [
        {"sparse": None, "int8+sparse": "dynamic"}.get(choice, "static")
    ] * 3
    wanted = pruned_by_hand(model["top"].eval(), 0.75)
    with torch.no_grad():
        close = 1e-5 if choice == "sparse" else 0.05
        torch.testing.assert_close(new["top"](rows()), wanted(rows()), rtol=close, atol=close)
        assert not torch.allclose(new["top"](rows()), model["top"](rows()), rtol=0.05, atol=0.05)
    for layer in report.layers:
        assert layer.action == choice
        assert layer.sparsity == 0.75
        assert layer.pattern == "unstructured"
        assert layer.reason == "75.0% of its weights dropped, unstructured"
        assert layer.bytes_after < layer.bytes_before / 1.5
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["sparsity"] == 0.75
    assert "75.0% of its weights dropped" in str(report)
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.usefixtures("never_dense", "no_timing")
@pytest.mark.parametrize(("pattern", "sparsity"), [("block4x1", 0.5), ("2:4", 0.5), ("1:4", 0.75), ("block16x4", 0.8)])
def test_patterns(pattern: str, sparsity: float) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    new, report = only_linear(model, "sparse", sparsity=sparsity, pattern=pattern, batch_size=1)
    assert not report.kept
    assert {layer.pattern for layer in report.swapped} == {pattern}
    new, report = only_linear(model, "int8+sparse", sparsity=sparsity, pattern=pattern)
    assert [layer.pattern for layer in report.layers] == [pattern, pattern]
    twin = copy.deepcopy(model)
    rk.prune(twin, sparsity, pattern)
    with torch.no_grad():
        torch.testing.assert_close(new(rows(9, 64)), twin(rows(9, 64)), rtol=0.05, atol=0.05)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.top, self.out = nn.Embedding(30, WIDTH), mlp(), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.top(self.table(ids)))


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("choice", ["sparse", "int8+sparse"])
def test_pruned_models_are_taken_as_they_are(
    no_timing: Any, never_dense: None, choice: str, masks: bool, sampled: bool
) -> None:
    model, ids = Two().eval(), torch.arange(30)
    rk.prune(model, 0.75, layers="top.*")
    model.top[0].register_forward_hook(lambda module, args, out: out + 1.0)
    model.optimizer = torch.optim.Adam(model.parameters())
    if not masks:
        rk.remove_masks(model)
    before = kinds(model)
    new, report = optimize(model, "int8", linear=choice, skip="top.3", sample_inputs=ids if sampled else None)
    assert kinds(model) == before
    layers = by_name(report)
    assert {name: layer.action for name, layer in layers.items()} == {
        "table": "int8", "top.0": choice, "top.3": "kept", "top.6": choice, "out": "kept",
    }  # fmt: skip
    assert layers["out"].reason == "none of its weights is zero; give a sparsity to prune it"
    assert layers["top.0"].sparsity == 0.75
    assert layers["top.0"].kind == "Linear"
    # What is kept keeps its mask.
    assert kinds(new)["top.3"] == ("ParametrizedLinear" if masks else "Linear")
    assert new.top[3].weight.count_nonzero() == 200
    assert new.optimizer is None
    assert report.notes == ("optimizer: the optimizer is not copied",)
    if sampled:
        assert layers["top.0"].sqnr is not None
        assert layers["top.0"].sqnr > (100 if choice == "sparse" else 30)
    with torch.no_grad():
        torch.testing.assert_close(new(ids), model(ids), rtol=0.1, atol=0.1)
    fresh = Two().eval()
    with torch.no_grad():
        assert not torch.allclose(fresh(ids), model(ids), rtol=0.1, atol=0.1)


def test_a_model_that_is_one_masked_layer(never_dense: None) -> None:
    linear = nn.Linear(WIDTH, 32)
    rk.prune(linear, 0.75)
    new, report = only_linear(linear, "sparse")
    assert type(new) is rk.SparseLinear
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), linear(rows()))
    assert report.bytes_before > report.bytes_after


def test_a_layer_that_is_sparser_already_keeps_no_zeros(never_dense: None) -> None:
    linear = nn.Linear(WIDTH, 32)
    with torch.no_grad():
        linear.weight[:, 2:] = 0.0
    new, report = only_linear(linear, "sparse", sparsity=0.5)
    assert new.nnz == 64
    assert report.layers[0].sparsity == pytest.approx(1 - 2 / WIDTH)


def test_noise(no_timing: Any, never_dense: None) -> None:
    model = mlp().eval()
    _, report = only_linear(model, "sparse", sparsity=0.75, sample_inputs=rows(200))
    wanted = F.relu(model[0](rows(200))).double()
    out = F.relu(pruned_by_hand(model, 0.75)[0](rows(200))).double()
    ratio = 10 * torch.log10(wanted.square().sum() / (out - wanted).square().sum()).item()
    layer = by_name(report)["0"]
    assert layer.action == "sparse"  # asked for, however much of the output that is
    assert layer.sqnr == pytest.approx(ratio, abs=0.05)
    assert layer.sqnr is not None
    assert layer.sqnr < 20
    _, report = only_linear(model, "sparse", sparsity=0.75, sample_inputs=rows(200), min_sqnr=20.0)
    assert by_name(report)["0"].reason == f"SQNR {layer.sqnr:.1f} dB, less than min_sqnr=20"
    assert not report.swapped


def test_int8_noise_of_a_pruned_layer_keeps_it(no_timing: Any, never_dense: None) -> None:
    linear = nn.Linear(WIDTH, 64)
    with torch.no_grad():
        linear.weight[:, 1:20] = 0.0
        linear.weight[:, 0] = 1e4
    x = rows(50)
    x[:, 0] = 0.0
    new, report = only_linear(linear, "int8+sparse", sample_inputs=x)
    assert type(new) is nn.Linear
    assert "less than min_sqnr=20" in report.layers[0].reason


def test_dense_where_that_is_measured_faster(monkeypatch: pytest.MonkeyPatch, never_dense: None) -> None:
    timed = []

    def microseconds(first: Any, second: Any, rows: torch.Tensor) -> tuple[float, float]:
        timed.append((type(first).__name__, type(second).__name__, tuple(rows.shape)))
        return (10.0, 12.5) if rows.shape[1] == 20 else (80.0, 20.0)

    monkeypatch.setattr(linear_module, "_microseconds", microseconds)
    new, report = only_linear(mlp().eval(), "sparse", sparsity=0.75, batch_size=7)
    # Each by itself, unlike int8 layers, of which a run is one call.
    assert timed == [
        ("Sequential", "SparseLinear", (7, WIDTH)),
        ("Sequential", "SparseLinear", (7, 40)),
        ("Linear", "SparseLinear", (7, 20)),
    ]
    assert [layer.reason for layer in report.layers] == [
        "75.0% of its weights dropped, unstructured; 20.0 us instead of 80.0 for 7 rows",
        "75.0% of its weights dropped, unstructured; 20.0 us instead of 80.0 for 7 rows",
        "dense is faster for 7 rows: 10.0 us, sparse 12.5 us",
    ]
    assert kinds(new) == {"0": "SparseLinear", "3": "SparseLinear", "6": "Linear"}


def long_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 40),
        nn.Identity(),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Linear(40, 32), nn.SiLU()),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 16)),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Linear(16, 8),
    ).eval()


def test_layers_in_a_part_of_a_sequential_keep_their_places(never_dense: None) -> None:
    model = long_mlp()
    new, report = only_linear(model, "sparse", sparsity=0.75)
    assert kinds(new) == {
        "0": "LayerNorm",
        "1": "SparseLinear",
        "5": "SparseLinear",
        "6": "Sequential",
        "6.0": "SparseLinear",
        "6.1": "SparseLinear",
        "8": "Tanh",
        "9": "SparseLinear",
    }
    assert [m.epilogue for m in new.modules() if isinstance(m, rk.SparseLinear)] == [
        "relu", "silu", "relu", "sigmoid", None,
    ]  # fmt: skip
    assert [layer.name for layer in report.layers] == ["1", "5.0", "6.1", "6.3", "9"]
    assert {layer.reason for layer in report.layers} == {"75.0% of its weights dropped, unstructured"}
    wanted = copy.deepcopy(model)
    rk.prune(wanted, 0.75)
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), wanted(rows()))
        other, _ = only_linear(long_mlp(), "sparse", sparsity=0.7)
        other.load_state_dict(new.state_dict())
        assert torch.equal(other(rows()), new(rows()))
        for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
            assert repr(other) == repr(new)
            assert torch.equal(other(rows()), new(rows()))
    assert "(5): SparseLinear(40, 32, " in repr(new)
    assert {name.rpartition(".")[0] for name in new.state_dict()} == {"0", "1", "5", "6.0", "6.1", "9"}
    again, report = only_linear(new, "sparse", sparsity=0.9)
    assert kinds(again) == kinds(new)
    assert {layer.reason for layer in report.layers} == {"a SparseLinear already"}


def test_int8_layers_in_a_part_of_a_sequential_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_module, "runs_packed", lambda values: True)
    monkeypatch.setattr(sparse_module, "runs_dense", lambda layer: (layer[4] < 40,) * 2)
    model = long_mlp()
    new, report = only_linear(model, "int8+sparse", sparsity=0.75)
    assert kinds(new) == {
        "0": "LayerNorm",
        "1": "Int8Linear",
        "5": "SparseLinear",
        "6": "Int8MLP",
        "6.0": "Int8Linear",
        "6.1": "Int8Linear",
        "8": "Tanh",
        "9": "Int8Linear",
    }
    assert [layer.action for layer in report.layers] == ["int8", "int8+sparse", "int8", "int8", "int8"]
    wanted = copy.deepcopy(model)
    rk.prune(wanted[5], 0.75)
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), wanted(rows()), rtol=0.05, atol=0.05)


def test_an_int8_call_begins_before_a_nested_sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_module, "runs_packed", lambda values: True)
    monkeypatch.setattr(sparse_module, "runs_dense", lambda layer: (layer[4] != 16,) * 2)
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12))
    model = nn.Sequential(nn.Sequential(), nn.Linear(WIDTH, 20), nn.ReLU(), block, nn.Tanh()).eval()
    new, _ = only_linear(model, "int8+sparse", sparsity=0.75)
    assert kinds(new) == {
        "1": "Int8MLP", "1.0": "Int8Linear", "1.1": "Int8Linear", "3": "SparseLinear", "4": "Tanh",
    }  # fmt: skip
    wanted = copy.deepcopy(model)
    rk.prune(wanted[3][2], 0.75)
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), wanted(rows()), rtol=0.05, atol=0.05)


def test_dense_where_that_is_known_to_be_faster(monkeypatch: pytest.MonkeyPatch, no_timing: Any) -> None:
    monkeypatch.setattr(sparse_module, "runs_packed", lambda values: True)
    monkeypatch.setattr(sparse_module, "runs_dense", lambda *layer: (False, True))
    model = mlp().eval()
    _, report = only_linear(model, "sparse", sparsity=0.75, batch_size=2)
    assert len(report.swapped) == 3  # faster for few rows
    _, report = only_linear(model, "sparse", sparsity=0.75)
    assert len(report.swapped) == 3  # nobody knows for how many
    new, report = only_linear(model, "sparse", sparsity=0.75, sample_inputs=rows(9))
    assert {layer.reason for layer in report.kept} == {"faster dense: 75.0% of its weights dropped"}
    assert torch.equal(new(rows()), model(rows()))
    # Those with int8 values are dense int8 ones then, of weights that nobody dropped.
    new, report = only_linear(model, "int8+sparse", sparsity=0.75, sample_inputs=rows(9))
    assert type(new) is rk.Int8MLP
    assert {(layer.action, layer.sparsity) for layer in report.layers} == {("int8", None)}
    assert "faster dense: 75.0% of its weights dropped" in report.layers[0].reason
    assert torch.equal(new(rows()), rk.Int8MLP.from_float(model)(rows()))


def test_larger_layers_need_a_measurement(no_timing: Any, never_dense: None) -> None:
    linear = nn.Linear(WIDTH, 64)
    _, report = only_linear(linear, "sparse", sparsity=0.1)
    assert "bytes with 10.0% of its weights dropped; batch_size or sample_inputs" in report.layers[0].reason
    assert not report.swapped
    _, report = only_linear(linear, "sparse", sparsity=0.1, batch_size=3)
    assert report.layers[0].action == "sparse"
    assert f"larger than {linear.weight.nbytes + linear.bias.nbytes:,} bytes" in report.layers[0].reason


def test_layers_that_share_a_weight_share_the_new_one(never_dense: None) -> None:
    model = nn.ModuleList([nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)])
    model[1].weight = model[0].weight
    for choice in ("sparse", "int8+sparse"):
        new, report = only_linear(model, choice, sparsity=0.75)
        assert new[0].values is new[1].values
        assert new[0].col_indices is new[1].col_indices
        assert not torch.equal(new[0].bias, new[1].bias)
        assert "one table with '1'" in report.layers[0].reason


def test_layers_left_alone() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.fc.weight)

    with_nan = nn.Linear(WIDTH, 8)
    with torch.no_grad():
        with_nan.weight[5, 2] = float("nan")
    masked = Reader()
    rk.prune(masked, 0.75)
    for model, reason in (
        (Reader(), "Reader.forward"),
        (masked, "Reader.forward"),
        (nn.MultiheadAttention(WIDTH, 4), "inside a MultiheadAttention, which reads its weight"),
        (nn.Linear(WIDTH, 8).double(), "its weight is float64"),
        (with_nan, "row 5 of weight holds NaN or infinity"),
        (rk.SparseLinear(WIDTH, 8), "a SparseLinear already"),
        (rk.Int8Linear(WIDTH, 8), "an Int8Linear already"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 8)), "parametrized: weight"),
    ):
        new, report = only_linear(model, "sparse", sparsity=0.9)
        assert not report.swapped
        assert any(reason in layer.reason for layer in report.kept), report
        assert kinds(new) == kinds(model)
    _, report = only_linear(nn.Linear(65537, 1), "int8+sparse", sparsity=0.9)
    assert "in_features must be from 1 to 65536" in report.layers[0].reason
    half = nn.Linear(WIDTH, 8)
    with torch.no_grad():
        half.weight[0, 0] = 0.0
    _, report = only_linear(half, "sparse", pattern="2:4")
    assert "of which '2:4' keeps 2" in report.layers[0].reason


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"linear": "sparse", "sparsity": 0.9, "pattern": "diagonal"}, ValueError, "pattern must be 'unstructured'"),
        ({"linear": "int8", "sparsity": 0.9}, ValueError, "sparsity is for linear='sparse', .*but linear is 'int8'"),
        ({"sparsity": 0.9}, ValueError, "sparsity is for linear='sparse', .*but linear is None"),
        ({"linear": "int8", "pattern": "2:4"}, ValueError, "pattern is for linear='sparse', .*but linear is 'int8'"),
        ({"linear": "sparse", "sparsity": 1.0}, ValueError, "sparsity must be at least 0 and below 1, but is 1.0"),
        ({"linear": "sparse", "sparsity": 0.9, "pattern": "2:4"}, ValueError, "None or 0.5 with the pattern '2:4'"),
        ({"linear": "sparse", "sparsity": "most"}, TypeError, "sparsity must be a number"),
        ({"linear": "sparse", "pattern": 4}, TypeError, "pattern must be a string"),
        ({"linear": "int8-static+sparse", "sparsity": 0.9}, ValueError, r"needs ranges=rk\.calibrate"),
        ({"linear": "sparse", "ranges": {}}, ValueError, "ranges is for linear='int8-static', but linear is 'sparse'"),
        (
            {"linear": "sparsely"},
            ValueError,
            "'sparse', 'int8.sparse', 'int8-static.sparse' or None, but is 'sparsely'",
        ),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize(mlp(), **options)


def test_a_ranking_model_is_pruned_saved_and_loaded(never_dense: None, tmp_path: Path) -> None:
    data = tiny_dataset()
    torch.manual_seed(0)
    model = DLRM(DLRMConfig.for_schema(data.schema, dim=16)).eval()
    batch = data.batch(data.rows("test")[:50])[:3]
    small, report = rk.optimize(model, linear="int8+sparse", sparsity=0.8, pattern="block4x1", skip="head.top.6")
    assert {layer.action for layer in report.layers} == {"int8", "int8+sparse", "kept"}
    with pytest.raises(ValueError, match=r"MLPs of one form \(.*\), but has int8\+sparse: bottom, top; float32: top"):
        save_model(small, data.schema, tmp_path)
    small, _ = rk.optimize(model, linear="sparse", sparsity=0.8, pattern="block4x1")
    with pytest.raises(ValueError, match=r"MLPs of one form .* but has sparse: bottom, top; float32: top"):
        save_model(small, data.schema, tmp_path)  # the layer of one output is no block of four
    small, _ = rk.optimize(model, linear="sparse", sparsity=0.8)
    save_model(small, data.schema, tmp_path)
    loaded = rk.load_model(tmp_path).model
    assert loaded.config.mlp == "sparse"
    assert loaded.config.mlp_pattern == "unstructured"
    with torch.no_grad():
        assert torch.equal(loaded(*batch), small(*batch))
        assert not torch.equal(loaded(*batch), model(*batch))


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("choice", ["sparse", "int8+sparse"])
def test_the_new_model_compiles_and_copies(choice: str) -> None:
    new, _ = only_linear(mlp().eval(), choice, sparsity=0.75)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = new(rows())
        torch.testing.assert_close(compiled(rows()), wanted)
        for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
            assert torch.equal(other(rows()), wanted)


def test_a_masked_layer_in_a_plain_attribute_and_hooks(never_dense: None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 8))
            self.first = [self.mlp[0]]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) + self.first[0](x)[:, :8]

    model = Model().eval()
    rk.prune(model, 0.75)
    new, report = only_linear(model, "sparse")
    assert len(report.swapped) == 2
    assert new.first[0] is new.mlp[0]
    with torch.no_grad():
        torch.testing.assert_close(new(rows()), model(rows()))
    kept, report = only_linear(model, "sparse", skip="mlp")
    assert not report.swapped
    assert kept.first[0] is kept.mlp[0]
    assert kept.mlp[0] is not model.mlp[0]
    assert kept.mlp[0].weight.count_nonzero() == model.mlp[0].weight.count_nonzero()
    assert report.bytes_after == report.bytes_before


def test_masked_layers_that_are_faster_dense_are_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user asked for a model that runs: a mask would be applied at every call. What is skipped keeps its mask."""
    monkeypatch.setattr(sparse_module, "runs_packed", lambda values: True)
    monkeypatch.setattr(sparse_module, "runs_dense", lambda layer: (True, True))
    model = nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, 12)).eval()
    rk.prune(model, 0.3)
    new, report = only_linear(model, "sparse", skip="2")
    found = kinds(new)
    assert [found[name] for name in "012"] == ["Linear", "ReLU", "ParametrizedLinear"]
    assert "faster dense" in str(report.layers[0].reason)
    assert (new[0].weight == 0).sum() == (model[0].weight == 0).sum() > 0
    with torch.no_grad():
        assert torch.equal(new(rows()), model(rows()))
