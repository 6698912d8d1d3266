"""optimize on models of published packages, as their users call them; skipped where a package is not installed.

What is particular about them (ids in float columns, tables in dicts and in feature objects, parameters in lists of
penalties, weights read in forward) is also in models of our own in test_optimize.py and test_optimize_reads.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import recsys_kernels as rk

ROWS, DIM, BATCH, LENGTH = 200, 16, 16, 5


def deepctr(name: str) -> tuple[nn.Module, torch.Tensor]:
    models = pytest.importorskip("deepctr_torch.models", reason="deepctr-torch is not installed")
    inputs = pytest.importorskip("deepctr_torch.inputs")
    item = inputs.SparseFeat("item", ROWS, DIM)
    columns = [inputs.SparseFeat("user", ROWS, DIM), item, inputs.DenseFeat("price", 1)]
    if name == "DIN":
        history = inputs.SparseFeat("hist_item", ROWS, DIM, embedding_name="item")
        columns.append(inputs.VarLenSparseFeat(history, LENGTH, length_name="seq_length"))
        model = models.DIN(columns, ["item"], att_weight_normalization=True)
    else:
        model = getattr(models, name)(columns, columns)
    for parameter in model.parameters():  # as if trained: the package's own 1e-4 leaves outputs at 0.5 exactly
        nn.init.normal_(parameter, std=0.1)
    x = torch.randint(1, LENGTH, (BATCH, max(end for _, end in model.feature_index.values()))).float()
    return model, x


def rechub(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    features = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
    ranking = pytest.importorskip("torch_rechub.models.ranking")
    matching = pytest.importorskip("torch_rechub.models.matching")
    normal = pytest.importorskip("torch_rechub.basic.initializers").RandomNormal(0, 0.1)
    user, item = (features.SparseFeature(n, ROWS, DIM, initializer=normal) for n in ("user", "item"))
    history = features.SequenceFeature("history", ROWS, DIM, pooling="concat", shared_with="item")
    models = {
        "DeepFM": lambda: ranking.DeepFM([user, item], [user, item], {"dims": [8]}),
        "DIN": lambda: ranking.DIN([user], [history], [item], {"dims": [8]}, {"dims": [8]}),
        "DSSM": lambda: matching.DSSM([user], [item], {"dims": [8]}, {"dims": [8]}),
        "STAMP": lambda: matching.STAMP(features.SequenceFeature("history", ROWS, DIM), 0.1, 0.1),
        "SINE": lambda: matching.SINE(["history"], ["item"], ["negative"], ROWS, DIM, 8, 6, 2, LENGTH),
    }
    x = {n: torch.randint(1, ROWS, (BATCH,)) for n in ("user", "item")}
    x["negative"] = torch.randint(1, ROWS, (BATCH, 3))
    return models[name](), {**x, "history": torch.randint(1, ROWS, (BATCH, LENGTH))}


CASES: list[tuple[Any, str, set[str], set[str]]] = [
    *(
        (
            deepctr,
            name,
            {"embedding_dict.user", "embedding_dict.item"},
            {"linear_model.embedding_dict.user", "linear_model.embedding_dict.item"},
        )
        for name in ("DeepFM", "DCN", "xDeepFM", "WDL")
    ),
    (deepctr, "DIN", {"embedding_dict.user", "embedding_dict.item"}, set()),
    *(
        (rechub, name, {"embedding.embed_dict.user", "embedding.embed_dict.item"}, set())
        for name in ("DeepFM", "DIN", "DSSM")
    ),
    (rechub, "STAMP", {"item_emb"}, set()),
    (rechub, "SINE", {"item_embedding", "concept_embedding", "position_embedding"}, set()),
]


@pytest.mark.parametrize(("package", "name", "swapped", "kept"), CASES)
def test_published_models(package: Any, name: str, swapped: set[str], kept: set[str]) -> None:
    torch.manual_seed(0)
    model, x = package(name)
    model.eval()
    new, report = rk.optimize(model)
    sampled, trial = rk.optimize(model, sample_inputs=x)
    for one in (report, trial):
        assert {layer.name for layer in one.swapped} == swapped
        assert {layer.name for layer in one.kept} == kept
    with torch.no_grad():
        expected, out = model(x), new(x)
        assert torch.equal(out, sampled(x))
    assert trial.output_error == pytest.approx((out - expected).abs().max().item())
    assert (trial.output_error > 0) == bool(swapped)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("package", "name"), [(package, name) for package, name, _, _ in CASES])
def test_published_models_with_int8_layers(package: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = package(name)
    model.eval()
    linears = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    new, report = rk.optimize(model, embedding=None, linear="int8")
    assert {n for layer in report.layers for n in layer.names} == linears
    assert len(report.swapped) > 0.7 * len(report.layers) or not linears
    monkeypatch.setattr(
        "recsys_kernels.compress.converters.linear._microseconds", lambda first, second, rows: (2.0, 1.0)
    )
    sampled, trial = rk.optimize(model, embedding=None, linear="int8", sample_inputs=x, min_sqnr=10.0)
    with torch.no_grad():
        expected, out = model(x), new(x)
        if {layer.name for layer in trial.swapped} == {layer.name for layer in report.swapped}:
            assert torch.equal(out, sampled(x))
    # In cin_linear of xDeepFM terms of 17.9 in all leave a sum of 0.08: too little for 8 bits.
    assert all(layer.sqnr is None or layer.sqnr > 25 or layer.name == "cin_linear" for layer in trial.layers)
    torch.testing.assert_close(out, expected, atol=1e-2 if name == "xDeepFM" else 5e-3, rtol=0)
