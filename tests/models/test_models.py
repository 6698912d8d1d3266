"""The ranking model, its plain torch twin, training, and model folders."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score
from small_data import tiny_dataset
from torch import nn

import recsys_kernels as rk
from recsys_kernels.data import Dataset, Schema, Vocabulary
from recsys_kernels.jobs.compress.variants import VARIANTS, Material
from recsys_kernels.models import (
    DLRM,
    DLRMConfig,
    ModelFileError,
    PlainDLRM,
    RankingModel,
    files,
    load_model,
    save_model,
)
from recsys_kernels.models import train as training
from recsys_kernels.models.requests import normalize
from recsys_kernels.models.train import TrainSettings, evaluate, imitate, predict, train

OURS = frozenset({files.WEIGHTS, files.CONFIG, files.VOCABULARIES})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def model(data: Dataset) -> DLRM:
    torch.manual_seed(0)
    model = DLRM(DLRMConfig.for_schema(data.schema, dim=16)).eval()
    with torch.no_grad():
        for table in model.config.tables:
            model.embeddings.table(table.name).normal_()
    return model


def test_forward_against_the_formula(data: Dataset, model: DLRM) -> None:
    rows = data.rows("test")[:7]
    batch = data.batch(rows)
    vectors = [_mlp(model.head.bottom, batch.dense.double())]
    for name, table in data.schema.features:
        weight = model.embeddings.table(table).detach().double()
        values, lengths = data.bags[name].take(rows)
        parts = torch.from_numpy(values.astype(np.int64)).split(lengths.tolist())
        vectors.append(torch.stack([weight[p].mean(0) if len(p) else torch.zeros(16).double() for p in parts]))
    pairs = [(vectors[i] * vectors[j]).sum(1) for i in range(len(vectors)) for j in range(i)]
    expected = _mlp(model.head.top, torch.cat((vectors[0], torch.stack(pairs, dim=1)), dim=1)).squeeze(1)
    torch.testing.assert_close(model(*batch[:3]).double(), expected, rtol=1e-4, atol=1e-4)


def _mlp(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().double().T + layer.bias.detach().double()
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
    return x


def test_tables_go_through_one_collection(data: Dataset, model: DLRM) -> None:
    assert isinstance(model.embeddings, rk.EmbeddingBagCollection)
    assert list(model.embeddings.feature_names) == [name for name, _ in data.schema.features]
    assert model.config.feature_names == list(data.bags)
    assert not [m for m in model.head.modules() if isinstance(m, nn.EmbeddingBag | nn.Embedding)]


def test_plain_twin_has_the_same_weights_and_answers(data: Dataset, model: DLRM) -> None:
    plain = PlainDLRM(model)
    assert {type(bag) for bag in plain.bags.values()} == {nn.EmbeddingBag}
    for name, bag in plain.bags.items():
        assert bag.weight.equal(model.embeddings.table(name))
        assert bag.weight.data_ptr() != model.embeddings.table(name).data_ptr()
    batch = data.batch(data.rows("test"))
    torch.testing.assert_close(plain(*plain.prepare(batch)), model(*batch[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (4, 0.5)])
def test_quantized_model_is_close_and_small(data: Dataset, model: DLRM, bits: int, tolerance: float) -> None:
    small = model.quantize(bits)
    assert not small.training
    assert small.config.embedding == f"int{bits}"
    assert small.embeddings.nbytes < model.embeddings.nbytes * (bits / 32 + 0.1)
    for name in ("bottom", "top"):
        for left, right in zip(getattr(small.head, name), getattr(model.head, name), strict=True):
            if isinstance(left, nn.Linear):
                assert left.weight.equal(right.weight)
    batch = data.batch(data.rows("test"))
    difference = (small(*batch[:3]) - model(*batch[:3])).abs().max()
    assert 0 < difference < tolerance * model(*batch[:3]).abs().max()


def test_a_new_model_has_float_tables(model: DLRM) -> None:
    with pytest.raises(ValueError, match="quantize it after training"):
        DLRM(model.quantize(8).config)


def _learnable() -> Dataset:
    """Labels that follow from the item alone, so that only the tables can learn them."""
    data = tiny_dataset(1)
    data.labels = (data.bags["item"].values % 2).astype(np.float32)
    data.dense = np.zeros_like(data.dense)
    return data


def test_training_learns_through_the_tables_and_is_reproducible() -> None:
    data = _learnable()
    settings = TrainSettings(epochs=40, batch_size=64, learning_rate=1e-2, embedding_decay=0.0, drop_ids=0.0, seed=3)
    results = []
    steps: list[tuple[int, int]] = []
    for _ in range(2):
        torch.manual_seed(3)
        model = DLRM(DLRMConfig.for_schema(data.schema, dim=8))
        steps.clear()
        epochs = train(model, data, settings, lambda done, total: steps.append((done, total)))
        results.append((epochs, model.state_dict()))
        assert not model.training
        assert steps[-1] == (len(steps), len(steps))
    assert results[0][0] == results[1][0]
    assert all(results[0][1][name].equal(results[1][1][name]) for name in results[0][1])
    quality = evaluate(model, data, "test")
    assert quality.auc > 0.95
    assert quality.auc == roc_auc_score(data.labels[data.rows("test")], predict(model, data, "test", batch_size=7))
    # The weights kept are those of the best epoch.
    assert evaluate(model, data, "validation").auc == max(epoch.auc for epoch in epochs)


def test_the_average_weights_late_steps_most() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = training._Average(model)
    total = 4000
    for step in range(1, total + 1):
        with torch.no_grad():
            model.weight.fill_(step / total)
        average.add()
    # The mean of x under the density 9 x ** 8 on [0, 1].
    assert average.model.weight.item() == pytest.approx(0.9, abs=0.001)
    assert model.weight.item() == 1.0
    first = training._Average(model)
    with torch.no_grad():
        model.weight.fill_(7.0)
    first.add()
    assert first.model.weight.item() == 7.0


def material(data: Dataset) -> Material:
    def tune(model: DLRM, teacher: DLRM) -> None:
        imitate(model, teacher, data, TrainSettings(epochs=1, batch_size=256, learning_rate=1e-4))

    return Material([data.batch(data.rows("train")[:300])[:3]], tune)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_save_and_load_are_bit_identical(variant: object, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    made = variant.make(model, material(data))  # type: ignore[attr-defined]
    save_model(made, data.schema, tmp_path)
    served = rk.load_model(str(tmp_path))
    assert not served.training
    assert not served.model.training
    batch = data.batch(data.rows("test"))
    assert served(*batch[:3]).equal(made(*batch[:3]))
    assert served.model.embeddings.nbytes == made.embeddings.nbytes
    examples = [
        {"user": "3", "item": "5", "genres": ["Comedy", "Opera"], "liked_items": ["1", "2"], "user_age": 30},
        {},
    ]
    encoded = data.schema.encode(examples)
    assert served.predict(examples).equal(made(*encoded[:3]).detach().sigmoid())
    with pytest.raises(KeyError, match="unknown feature 'colour'"):
        served.predict([{"colour": "red"}])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_an_empty_batch_has_an_empty_answer(variant: object, data: Dataset, model: DLRM) -> None:
    made = variant.make(model, material(data))  # type: ignore[attr-defined]
    assert RankingModel(made, data.schema).predict([]).shape == (0,)
    batch = data.batch(np.array([], np.int64))
    assert made(*batch[:3]).shape == (0,)
    plain = PlainDLRM(model)
    assert plain(*plain.prepare(batch)).shape == (0,)


def test_predict_takes_what_callers_have(data: Dataset, model: DLRM) -> None:
    served = RankingModel(model, data.schema)
    expected = served.predict([{"user": "3", "liked_items": ["1", "2"], "user_age": 30.0}])
    assert not expected.equal(served.predict([{"user": "4", "liked_items": ["1", "2"], "user_age": 30.0}]))
    assert not expected.equal(served.predict([{"user": "3", "liked_items": ["1", "3"], "user_age": 30.0}]))
    assert not expected.equal(served.predict([{"user": "3", "liked_items": ["1", "2"], "user_age": 31.0}]))
    for user in (3, 3.0, np.int32(3), np.float32(3), np.array(3), np.str_("3"), torch.tensor(3)):
        for bag in ((1, 2), np.array([1, 2]), np.array([1.0, 2.0]), np.array(["1", "2"]), pd.Series([1, 2])):
            for age in (30, np.float32(30), np.array(30), torch.tensor(30.0)):
                example = {"user": user, "liked_items": bag, "user_age": age, "item": None, "item_count": np.nan}
                assert served.predict(iter([example])).equal(expected), example
    frame = pd.DataFrame({"user": [3, None], "liked_items": [["1", "2"], None], "user_age": [30, None]})
    records = served.predict(frame.to_dict("records"))
    torch.testing.assert_close(records, torch.cat((expected, served.predict([{}]))))
    # An id that is written as a fraction stays one, also where the fraction is whole.
    schema = Schema([], [("price", "price")], {"price": Vocabulary(["2.0", "2", "2.5"])}, frozenset({"price"}))
    encoded = schema.encode(normalize([{"price": [2.0, 2, 2.5, 7.0]}], schema))
    assert encoded.indices.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("user", r"an iterable of dicts, one an example, such as \[.*\], not a str"),
        (None, r"an iterable of dicts, one an example, such as \[.*\], not None"),
        ({"user": "3"}, "not a dict: put a single example into a list"),
        (pd.DataFrame({"user": ["3"]}), r'not a DataFrame: give the DataFrame\'s \.to_dict\("records"\)'),
        ([{}, "user"], r"but number 1 is a str \('user'\)"),
        ([196, 242], r"such as \[{'user': '196', 'item': '242'}\], but number 0 is an int \(196\)"),
        ([{"user": ["3", "4"]}], r"feature 'user' takes one value, not a list of 2 \(\['3', '4'\]\)"),
        ([{"user_age": "old"}], r"feature 'user_age' takes a number, not a str \('old'\)"),
        ([{"user_age": [30]}], "feature 'user_age' takes a number, not a list"),
        ([{"user_age": np.array([30.0])}], "feature 'user_age' takes a number, not a ndarray"),
        ([{"user_age": 1j}], "feature 'user_age' takes a number, not a complex"),
        ([{"liked_items": [["1"]]}], "feature 'liked_items' takes an id or a list of ids, not a list"),
        ([{"liked_items": np.ones((2, 2))}], "feature 'liked_items' takes an id or a list of ids"),
        ([{"user": b"3"}], "feature 'user' takes an id or a list of ids, not a bytes"),
        ([{"user": {"id": 3}}], "feature 'user' takes an id or a list of ids, not a dict"),
    ],
)
def test_predict_says_what_is_wrong(examples: Any, message: str, data: Dataset, model: DLRM) -> None:
    with pytest.raises(TypeError, match=message):
        RankingModel(model, data.schema).predict(examples)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"user": 1.5}, "feature 'user' takes ids, and 1.5 is none"),
        ({"liked_items": [1, np.float32(2.5)]}, "feature 'liked_items' takes ids, and 2.5 is none"),
        ({"item": math.inf}, "feature 'item' takes ids, and inf is none"),
        ({"item_count": -3}, "feature 'item_count' takes a number of at least 0, not -3"),
        ({"user_days": -0.5}, "feature 'user_days' takes a number of at least 0, not -0.5"),
        ({"user_age": torch.tensor(-1)}, "feature 'user_age' takes a number of at least 0, not -1"),
        ({"user_mean": -math.inf}, "feature 'user_mean' takes a finite number, not -inf"),
    ],
)
def test_predict_refuses_numbers_that_a_feature_cannot_have(
    example: dict[str, Any], message: str, data: Dataset, model: DLRM, tmp_path: Path
) -> None:
    save_model(model, data.schema, tmp_path)
    for served in (RankingModel(model, data.schema), load_model(tmp_path)):
        with pytest.raises(ValueError, match=message):
            served.predict([{}, example])
    served.predict([{"user_bias": -1.5, "user_count": 0, "user": -1, "item": 10**30}])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_an_optimized_model_is_saved_as_what_it_is(form: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    small, _ = rk.optimize(model, embedding=form)
    assert isinstance(small, DLRM)
    save_model(small, data.schema, tmp_path)
    served = rk.load_model(tmp_path)
    assert served.model.config.embedding == form
    batch = data.batch(data.rows("test"))
    assert served(*batch[:3]).equal(small(*batch[:3]))


@pytest.mark.parametrize("linear", ["int8", "int8-static", "int8-weight-only"])
def test_a_model_with_optimized_mlps_is_saved_as_what_it_is(
    linear: str, data: Dataset, model: DLRM, tmp_path: Path
) -> None:
    batch = data.batch(data.rows("test"))
    ranges = rk.calibrate(model, [batch[:3]]) if linear == "int8-static" else None
    small, report = rk.optimize(model, embedding="int4", linear=linear, ranges=ranges)
    assert {layer.action for layer in report.layers} == {"int4", linear}
    assert isinstance(small, DLRM)
    save_model(small, data.schema, tmp_path)
    served = rk.load_model(tmp_path)
    assert (served.model.config.embedding, served.model.config.mlp) == ("int4", linear)
    assert isinstance(served.model.head.top, rk.Int8MLP)
    with torch.no_grad():
        assert served(*batch[:3]).equal(small(*batch[:3]))


def test_mlps_of_two_forms_are_not_saved(data: Dataset, model: DLRM, tmp_path: Path) -> None:
    top, _ = rk.optimize(model, embedding=None, linear="int8", skip="head.bottom")
    part, _ = rk.optimize(model, embedding=None, linear="int8", skip="head.top.3")
    groups = [rk.Int8MLP.from_float(mlp, granularity=32) for mlp in (model.head.bottom, model.head.top)]  # type: ignore[arg-type]
    training = [rk.Int8MLP.qat(mlp) for mlp in (model.head.bottom, model.head.top)]  # type: ignore[arg-type]
    for mixed, message in (
        (top, "but has float32: bottom; int8: top"),
        (part, "but has int8: bottom, top; float32: top"),
        (model.with_mlps(groups, "int8"), "but has int8 with scales by 32: bottom, top"),
        (model.with_mlps(training, "int8"), "but has QATLinear: bottom, top"),
        (copy.deepcopy(model).half().float(), ""),
    ):
        if not message:
            save_model(mixed, data.schema, tmp_path)
            continue
        with pytest.raises(ValueError, match=message):
            save_model(mixed, data.schema, tmp_path)
        assert not list(tmp_path.iterdir())


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes `model.json` as an attacker can: with the hashes made to fit again."""
    path = folder / files.CONFIG
    body = json.loads(path.read_text())
    change(body)
    body.pop("self_sha256", None)
    body["self_sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body))


def _rehash(body: dict[str, Any], folder: Path) -> None:
    for name in (files.WEIGHTS, files.VOCABULARIES):
        body["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()


def _write_as_before(model: DLRM, schema: Schema, folder: Path) -> None:
    """A folder of the first release, which knew neither forms of MLPs nor ranges of dense features."""
    config = {name: value for name, value in model.config.to_json().items() if not name.startswith("mlp")}
    dense = [{"name": f.name, "log": f.log, "mean": f.mean, "std": f.std} for f in schema.dense]
    features = [list(pair) for pair in schema.features]
    safetensors.torch.save_file(dict(model.state_dict()), folder / files.WEIGHTS)
    tokens = {table: schema.vocabularies[table].tokens for _, table in schema.features}
    (folder / files.VOCABULARIES).write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    body = {
        "format": 1,
        "kind": "dlrm",
        "config": config,
        "schema": {"dense": dense, "features": features, "bags": sorted(schema.bags)},
        "sha256": {},
    }
    (folder / files.CONFIG).write_text(json.dumps(body))
    _rewrite(folder, lambda body: _rehash(body, folder))


def test_folders_of_the_first_release_are_read(data: Dataset, model: DLRM, tmp_path: Path) -> None:
    _write_as_before(model, data.schema, tmp_path)
    batch = data.batch(data.rows("test"))
    loaded = load_model(tmp_path)
    assert loaded(*batch[:3]).equal(model(*batch[:3]))
    assert loaded.schema.dense[0].low is None
    # Nothing cuts an old model's dense features, since it was trained on what was not cut.
    assert not loaded.predict([{"user_age": 80}]).equal(loaded.predict([{"user_age": 90}]))


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "hash of a device": (lambda b: b["sha256"].update({"/dev/zero": "0"}), "sha256 has '/dev/zero'"),
    "no hashes": (lambda b: b.update(sha256={}), "sha256 lacks 'model.safetensors'"),
    "one hash": (lambda b: b["sha256"].pop(files.VOCABULARIES), "sha256 lacks 'vocabularies.json'"),
    "hashes as a list": (lambda b: b.update(sha256=[]), "sha256 is not an object"),
    "another key": (lambda b: b.update(plugin="os"), "the file has 'plugin'"),
    "no schema": (lambda b: b.pop("schema"), "the file lacks 'schema'"),
    "std of NaN": (lambda b: b["schema"]["dense"][0].update(std=float("nan")), "holds NaN"),
    "std of 0": (lambda b: b["schema"]["dense"][0].update(std=0), "std of feature 'user_mean' is 0, not above 0"),
    "std as text": (
        lambda b: b["schema"]["dense"][0].update(std="1"),
        "std of feature 'user_mean' is '1', not a number",
    ),
    "huge mean": (lambda b: b["schema"]["dense"][0].update(mean=10**400), "mean of feature 'user_mean' is 1"),
    "range upside down": (lambda b: b["schema"]["dense"][0].update(low=1, high=0), "low and high .* no range"),
    "log as a number": (lambda b: b["schema"]["dense"][0].update(log=1), "log of feature 'user_mean' is 1"),
    "feature twice": (lambda b: b["schema"]["dense"][1].update(name="user_mean"), "feature 'user_mean' stands twice"),
    "fewer dense features": (lambda b: b["schema"]["dense"].pop(), "but config.num_dense is"),
    "other features": (lambda b: b["schema"]["features"].reverse(), "schema.features differ"),
    "bag of no feature": (lambda b: b["schema"]["bags"].append("colour"), "schema.bags is 'colour', not one of"),
    "bag as a list": (lambda b: b["schema"]["bags"].append(["user"]), r"schema.bags is \['user'\], not one of"),
    "many layers": (lambda b: b["config"].update(top=[1] * 200_000), "config.top is not a list of 0 to 63 entries"),
    "wide layer": (lambda b: b["config"].update(top=[2**40]), "a width of config.top is 1099511627776"),
    "wide rows": (lambda b: b["config"].update(dim=2**16), "model.safetensors: tensor .* not F32"),
    "many rows": (lambda b: b["config"]["tables"][0].update(rows=2**40), "model.safetensors: tensor .* not F32"),
    "rows as a float": (lambda b: b["config"]["tables"][0].update(rows=15.0), "rows of table 'user' is 15.0"),
    "dim as a truth": (lambda b: b["config"].update(dim=True), "config.dim is True, not a whole number"),
    "dim as text": (lambda b: b["config"].update(dim="16"), "config.dim is '16', not a whole number"),
    "pooling": (lambda b: b["config"]["tables"][0].update(pooling="eval"), "pooling of table 'user' is 'eval'"),
    "dotted name": (lambda b: b["config"]["tables"][0].update(name="a.b"), "name 'a.b' holds a dot"),
    "table twice": (lambda b: b["config"]["tables"][0].update(name="item"), "table 'item' stands twice"),
    "unknown form": (lambda b: b["config"].update(mlp="int2"), "config.mlp is 'int2', not one of float32"),
    "form as a list": (lambda b: b["config"].update(mlp=[]), r"config.mlp is \[\], not one of"),
    "another form": (lambda b: b["config"].update(mlp="int8"), r"has another tensor|lacks the tensor"),
    "pattern without pruning": (lambda b: b["config"].update(mlp_pattern="2:4"), "config.mlp_pattern is '2:4'"),
    "dropout": (lambda b: b["config"].update(dropout=-1), "config.dropout is -1"),
    "argument": (lambda b: b["config"].update(device="cuda"), "config has 'device'"),
    "format of a later version": (lambda b: b.update(format=2), "is not a model of format 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configurations_are_refused(case: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    change, message = HOSTILE[case]
    save_model(model, data.schema, tmp_path)
    _rewrite(tmp_path, change)
    start = time.perf_counter()
    with pytest.raises(ModelFileError, match=message) as caught:
        load_model(tmp_path)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


VOCABULARIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "token twice": (lambda v: v["user"].__setitem__(1, v["user"][0]), "vocabulary of table 'user' holds a token twice"),
    "a token less": (
        lambda v: v["user"].pop(),
        "vocabulary of table 'user' has 13 tokens, but a table of 15 rows needs",
    ),
    "a token more": (lambda v: v["user"].append("new"), "vocabulary of table 'user' has 15 tokens"),
    "no vocabulary": (lambda v: v.pop("user"), "lacks 'user'"),
    "another vocabulary": (lambda v: v.update(colour=[]), "has 'colour'"),
    "tokens as text": (lambda v: v.update(user="a" * 14), "vocabulary of table 'user' is not a list of texts"),
    "numbers": (lambda v: v["user"].__setitem__(0, 3), "vocabulary of table 'user' is not a list of texts"),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_hostile_vocabularies_are_refused(case: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    change, message = VOCABULARIES[case]
    save_model(model, data.schema, tmp_path)
    tokens = json.loads((tmp_path / files.VOCABULARIES).read_text())
    change(tokens)
    (tmp_path / files.VOCABULARIES).write_text(json.dumps(tokens))
    _rewrite(tmp_path, lambda body: _rehash(body, tmp_path))
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path)


JSON_TEXTS = {
    "deep": ("[" * 100_000, "is not JSON"),
    "twice": ('{"format": 1, "format": 1}', "a key stands twice"),
    "long number": ('{"format": ' + "9" * 10_000 + "}", "is not JSON"),
    "large": (" " * (3 << 20), r"has 3,145,728 bytes, but at most 2,097,152 belong there"),
    "list": ("[1]", "is not a model of format 1"),
    "no text": ("\udcff", "is not JSON"),
}


@pytest.mark.parametrize("case", JSON_TEXTS)
def test_hostile_json_is_refused(case: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    text, message = JSON_TEXTS[case]
    save_model(model, data.schema, tmp_path)
    (tmp_path / files.CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("name", sorted(OURS))
def test_only_regular_files_are_read(name: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    save_model(model, data.schema, tmp_path)
    for replace in (
        lambda path: path.symlink_to("/dev/zero"),
        os.mkfifo,
        Path.mkdir,
    ):
        (tmp_path / name).unlink()
        replace(tmp_path / name)
        with pytest.raises(ModelFileError, match=rf"{re.escape(name)}: (is not a regular file|cannot be read)"):
            load_model(tmp_path)
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
        save_model(model, data.schema, tmp_path)
    # A link to a file is fine: caches of downloaded models are made of them.
    (tmp_path / name).rename(tmp_path / "blob")
    (tmp_path / name).symlink_to("blob")
    load_model(tmp_path)


def _set(state: dict[str, torch.Tensor], name: str, value: float) -> None:
    state[name].view(-1)[0] = value


WEIGHTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "NaN in a table": (
        "fp32",
        lambda s: _set(s, "embeddings.embedding_bags.user.weight", np.nan),
        "user.weight holds NaN",
    ),
    "infinite weight": ("fp32", lambda s: _set(s, "head.top.0.weight", -np.inf), r"head\.top\.0\.weight holds NaN"),
    "huge weight": ("fp32", lambda s: _set(s, "head.top.0.bias", 1e30), "a magnitude above"),
    "NaN scale": (
        "int8",
        lambda s: _set(s, "embeddings.embedding_bags.user.scale_bias", np.nan),
        r"model\.safetensors",
    ),
    "exponent": ("int8", lambda s: s["embeddings.embedding_bags.user.exponent"].fill_(100), "reach a magnitude above"),
    "huge exponent": ("int8", lambda s: s["embeddings.embedding_bags.user.exponent"].fill_(2**40), "exponent must be"),
    "no range": ("int8-mlp-static", lambda s: s["head.top.0.input_qparams"].zero_(), "cannot score an example"),
    "column": ("pruned", lambda s: _set(s, "head.top.0.col_indices", 2**30), "does not fit"),
    "rows": ("int8-pruned", lambda s: _set(s, "head.top.0.crow_indices", 7), "does not fit"),
    "missing tensor": ("fp32", lambda s: s.pop("head.top.0.bias"), r"lacks the tensor 'head\.top\.0\.bias'"),
    "further tensor": ("fp32", lambda s: s.update(x=torch.zeros(1)), "has another tensor 'x'"),
    "other type": (
        "fp32",
        lambda s: s.update({"head.top.0.bias": torch.zeros(128).double()}),
        r"is 'F64' \[128\], not F32",
    ),
    "other shape": (
        "fp32",
        lambda s: s.update({"head.top.0.bias": torch.zeros(1, 128)}),
        r"is 'F32' \[1, 128\], not F32",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_hostile_weights_are_refused(case: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    form, change, message = WEIGHTS[case]
    variant = next(variant for variant in VARIANTS if variant.name == form)
    save_model(variant.make(model, material(data)), data.schema, tmp_path)
    state = safetensors.torch.load_file(tmp_path / files.WEIGHTS)
    change(state)
    safetensors.torch.save_file(state, tmp_path / files.WEIGHTS)
    _rewrite(tmp_path, lambda body: _rehash(body, tmp_path))
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path)


def test_a_signed_folder_is_loaded_with_its_key_alone(data: Dataset, model: DLRM, tmp_path: Path) -> None:
    key = b"sixteen bytes or more"
    save_model(model, data.schema, tmp_path, key=key)
    expected = RankingModel(model, data.schema).predict([{}])
    assert load_model(tmp_path, key=key).predict([{}]).equal(expected)
    assert load_model(tmp_path).predict([{}]).equal(expected)  # without a key nothing is asked
    with pytest.raises(ModelFileError, match="is not signed with this key, or was altered"):
        load_model(tmp_path, key=b"another key of 16")
    # What hashes alone let pass: a change by someone who computes them anew.
    (tmp_path / files.WEIGHTS).write_bytes((tmp_path / files.WEIGHTS).read_bytes()[:-4] + b"\0\0\0\0")
    _rewrite(tmp_path, lambda body: _rehash(body, tmp_path))
    load_model(tmp_path)
    with pytest.raises(ModelFileError, match="is not signed with this key, or was altered"):
        load_model(tmp_path, key=key)
    save_model(model, data.schema, tmp_path)
    with pytest.raises(ModelFileError, match="is not signed, but a key was given"):
        load_model(tmp_path, key=key)
    for wrong, error in ((b"short", ValueError), ("text of sixteen bytes", TypeError)):
        with pytest.raises(error, match="key must"):
            load_model(tmp_path, key=wrong)  # type: ignore[arg-type]
        with pytest.raises(error, match="key must"):
            save_model(model, data.schema, tmp_path, key=wrong)  # type: ignore[arg-type]


def test_what_could_not_be_loaded_is_not_saved(data: Dataset, model: DLRM, tmp_path: Path) -> None:
    schema = copy.deepcopy(data.schema)
    schema.vocabularies["user"] = Vocabulary(["1"])
    with pytest.raises(ModelFileError, match="vocabulary of table 'user' has 1 tokens"):
        save_model(model, schema, tmp_path)
    assert not list(tmp_path.iterdir())


FUZZED = ["fp32", "int4-mlp", "int8-mlp-static", "int8-pruned"]


@pytest.mark.parametrize("form", FUZZED)
def test_mutated_folders_load_or_are_refused(form: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == form)
    save_model(variant.make(model, material(data)), data.schema, tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in OURS}
    random = np.random.default_rng(len(form))
    header = 8 + int.from_bytes(whole[files.WEIGHTS][:8], "little")
    examples = [{"user": "3", "item": "5", "genres": ["Comedy"], "liked_items": ["1", "2"], "user_age": 30}, {}]
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(200):
        name = str(random.choice(sorted(OURS)))
        reach = header if name == files.WEIGHTS and random.random() < 0.5 else len(whole[name])
        content = bytearray(whole[name])
        _mutate(content, reach, random)
        for other, old in whole.items():
            (tmp_path / other).write_bytes(content if other == name else old)
        with suppress(ValueError, KeyError, AttributeError, TypeError, RecursionError):
            _rewrite(tmp_path, lambda body: _rehash(body, tmp_path))
        try:
            served = load_model(tmp_path)
            known = {feature.name for feature in served.schema.dense} | {name for name, _ in served.schema.features}
            scores = served.predict([{name: row[name] for name in row if name in known} for row in examples])
        except ModelFileError:
            outcomes["refused"] += 1
        else:
            assert scores.isfinite().all()
            outcomes["loaded"] += 1
    assert min(outcomes.values()) > 10, outcomes


def _mutate(content: bytearray, reach: int, random: np.random.Generator) -> None:
    """A few random changes within the first `reach` bytes: other bytes, digits, what is cut out or repeated."""
    for _ in range(random.choice([1, 1, 1, 3])):
        place = int(random.integers(0, max(1, min(reach, len(content)))))
        kind = random.integers(0, 6)
        if kind <= 2:
            content[place] = int(random.integers(0, 256))
        elif kind == 3:
            content[place : place + 1] = random.choice([b"0", b"9", b"-", b"[]", b"null", b'"', b"1e9", b","])
        elif kind == 4:
            del content[place : place + int(random.integers(1, 30))]
        else:
            content[place:place] = content[place : place + int(random.integers(1, 30))]


def test_mlps_of_another_form_share_the_tables(model: DLRM) -> None:
    mlps = [rk.Int8MLP.from_float(mlp) for mlp in (model.head.bottom, model.head.top)]  # type: ignore[arg-type]
    other = model.with_mlps(mlps, "int8")
    assert other.embeddings is model.embeddings
    assert (other.config.mlp, model.config.mlp) == ("int8", "float32")
    assert (other.training, type(model.head.top)) == (model.training, nn.Sequential)
    smaller = other.quantize(8)
    assert (smaller.config.mlp, smaller.config.embedding, type(smaller.head.top)) == ("int8", "int8", rk.Int8MLP)
    with pytest.raises(ValueError, match="a new model has float32 MLPs, not int8; quantize them after training"):
        DLRM(other.config)


def test_imitation_follows_the_teacher_and_reads_no_labels(data: Dataset, model: DLRM) -> None:
    blind = copy.copy(data)
    blind.labels = np.full_like(data.labels, np.nan)
    pupil = copy.deepcopy(model).train()
    with torch.no_grad():
        pupil.head.top[-1].bias.add_(2.0)  # type: ignore[index]
    steps: list[tuple[int, int]] = []

    def distance() -> float:
        return float(np.abs(predict(pupil, data, "test") - predict(model, data, "test")).mean())

    before = distance()
    settings = TrainSettings(epochs=10, batch_size=64, learning_rate=1e-2, drop_ids=0.0)
    imitate(pupil, model, blind, settings, lambda done, total: steps.append((done, total)))
    assert distance() < 0.3 * before
    assert not pupil.training
    assert steps[-1] == (len(steps), len(steps))


def test_tables_of_two_forms_are_not_saved(data: Dataset, model: DLRM, tmp_path: Path) -> None:
    mixed, _ = rk.optimize(model, embedding="int8", skip="embeddings.embedding_bags.user")
    with pytest.raises(ValueError, match=r"but has .*float32: user(;|$)") as caught:
        save_model(mixed, data.schema, tmp_path)
    assert "int8: " in str(caught.value)
    with pytest.raises(ValueError, match="but has float64: "):
        save_model(copy.deepcopy(model).double(), data.schema, tmp_path)
    assert not list(tmp_path.iterdir())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _edit(path: Path) -> None:
    body = json.loads(path.read_text())
    body["config"]["dim"] = 8
    path.write_text(json.dumps(body))


def _newer(path: Path) -> None:
    path.write_text(json.dumps({"format": 99}))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut weights": (files.WEIGHTS, _cut, r"model\.safetensors: was cut short or altered"),
    "altered weights": (files.WEIGHTS, _flip, r"model\.safetensors: was cut short or altered"),
    "altered tokens": (files.VOCABULARIES, _flip, r"vocabularies\.json: was cut short or altered"),
    "cut config": (files.CONFIG, _cut, "is not JSON"),
    "altered config": (files.CONFIG, _edit, r"model\.json: was altered"),
    "other format": (files.CONFIG, _newer, "is not a model of format 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models_are_refused(case: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[case]
    save_model(model, data.schema, tmp_path)
    load_model(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("name", sorted(OURS))
def test_missing_file_is_named(name: str, data: Dataset, model: DLRM, tmp_path: Path) -> None:
    save_model(model, data.schema, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_model(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with files.new_folder(target, OURS) as scratch:
        (scratch / files.CONFIG).write_text("first")
        assert not target.exists()
    assert (target / files.CONFIG).read_text() == "first"
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(error)):
            _fail_while_writing(target, error)
        assert (target / files.CONFIG).read_text() == "first"
        assert os.listdir(target.parent) == ["out"]
    with files.new_folder(target, OURS) as scratch:
        (scratch / files.WEIGHTS).write_text("third")
    assert os.listdir(target) == [files.WEIGHTS]
    assert os.listdir(target.parent) == ["out"]


def _fail_while_writing(target: Path, error: BaseException) -> None:
    with files.new_folder(target, OURS) as scratch:
        (scratch / files.CONFIG).write_text("second")
        raise error


def test_an_interrupt_between_the_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with files.new_folder(target, OURS) as scratch:
        (scratch / files.CONFIG).write_text("first")
    rename, calls = os.rename, []

    def interrupted(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, place)

    monkeypatch.setattr(files.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.new_folder(target, OURS):
        pass
    assert (target / files.CONFIG).read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis\.txt\)"), files.new_folder(tmp_path, OURS):
        pass
    with pytest.raises(NotADirectoryError), files.new_folder(tmp_path / "thesis.txt", OURS):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("part", ["out", "."])
def test_a_folder_without_write_permission_is_refused_at_once(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    locked = (tmp_path / part).resolve()
    # Not by chmod: an administrator may write anywhere.
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != locked)
    with pytest.raises(PermissionError, match="no permission to write") as caught:
        files.check_out(tmp_path / "out", OURS)
    assert caught.value.filename == str(locked)


def test_a_place_that_takes_no_folders_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What making a folder in /proc says; an error of the scratch folder would name a path that nobody has heard of.
    def fail(*args: object, **options: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path / ".out-scratch"))

    monkeypatch.setattr(files.tempfile, "mkdtemp", fail)
    with pytest.raises(OSError, match="no folder can be made there") as caught:
        files.check_out(tmp_path / "out", OURS)
    assert caught.value.filename == str(tmp_path)
    assert "scratch" not in str(caught.value)


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for text in ("first", "second"):
        with files.new_folder(tmp_path / "link", OURS) as scratch:
            (scratch / files.CONFIG).write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "out" / files.CONFIG).read_text() == text
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        files.check_out(tmp_path / "loop", OURS)


def test_the_current_folder_is_refused_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", "../link", tmp_path / "here"):
        with pytest.raises(OSError, match="is the current folder"):
            files.check_out(Path(name), OURS)


def test_disk_full_while_writing_weights_is_an_oserror(
    data: Dataset, model: DLRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_model(model, data.schema, tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_missing_bags_are_empty_and_single_features_take_one_value() -> None:
    vocabulary = Vocabulary(["a", "b"])
    schema = Schema(
        [], [("user", "user"), ("liked", "liked")], {"user": vocabulary, "liked": vocabulary}, frozenset({"liked"})
    )
    batch = schema.encode([{}, {"user": "b", "liked": ["a", "b"]}])
    assert batch.indices.tolist() == [0, 2, 1, 2]  # the unknown user, b; no liked item, then two
    assert batch.offsets.tolist() == [0, 1, 2, 2, 4]
    with pytest.raises(TypeError, match="'user' takes one value"):
        schema.encode([{"user": ["a", "b"]}])
    again = Schema.from_json(schema.to_json(), {"user": ["a", "b"], "liked": ["a", "b"]})
    assert again.bags == schema.bags
