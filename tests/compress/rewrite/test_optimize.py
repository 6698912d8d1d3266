"""optimize: every structure that models of published packages have, and what must be left alone."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from table_support import dequantize, with_dequantized_tables
from torch import nn
from torch.nn.utils import parametrizations, prune

import recsys_kernels as rk
from recsys_kernels.compress.rewrite.optimize import optimize
from recsys_kernels.compress.rewrite.report import LayerReport

ROWS, DIM, BATCH, LENGTH = 50, 16, 6, 4


def table_bytes(rows: int, dim: int, bits: int) -> int:
    """Rows, a float16 scale and bias a row, and the int64 exponent; for dims without padding between rows."""
    return rows * (dim * bits // 8 + 4) + 8


def ids(*shape: int, high: int = ROWS) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def only(report: Any) -> LayerReport:
    (layer,) = report.layers
    return layer


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


# ---- structures ----------------------------------------------------------------------------------------------------


class Columns(nn.Module):
    """As deepctr-torch's models: dicts of tables, ids in float columns, weights once more in a list for a penalty."""

    def __init__(self) -> None:
        super().__init__()
        names = ("user", "item", "genre")
        self.embedding_dict = nn.ModuleDict({n: nn.Embedding(ROWS, DIM, sparse=True) for n in names})
        self.linear = nn.ModuleDict({n: nn.Embedding(ROWS, 1) for n in names})
        self.regularization_weight = [(list(self.embedding_dict.parameters()), 1e-5)]
        self.top = nn.Linear(3 * DIM, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = [(n, x[:, i : i + 1].long()) for i, n in enumerate(self.embedding_dict)]
        deep = torch.cat([self.embedding_dict[n](c) for n, c in columns], dim=-1)
        wide = torch.cat([self.linear[n](c) for n, c in columns], dim=-1).sum(-1)
        return self.top(deep).squeeze(1) + wide


class Feature:
    """As torch-rechub's features: a plain object that makes and keeps its table."""

    def __init__(self, name: str) -> None:
        self.name, self.embed = name, nn.Embedding(ROWS, DIM, padding_idx=0)


class Features(nn.Module):
    """One table found through its feature object and through two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = [Feature("item"), Feature("user")]
        self.one = nn.ModuleDict({f.name: f.embed for f in self.features})
        self.two = nn.ModuleDict({"history": self.features[0].embed})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        history = self.two["history"](x).mean(1)
        return history + sum(feature.embed(x[:, i]) for i, feature in enumerate(self.features))


class Pooled(nn.Module):
    """Bags in a list, a collection, and a lookup table that shares its parameter with a bag."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("sum", "mean", "max")
        self.bags = nn.ModuleList([nn.EmbeddingBag(ROWS, DIM, mode=m, padding_idx=1) for m in modes])
        self.fused = rk.EmbeddingBag(ROWS, DIM, mode="sum", scale_grad_by_freq=True, include_last_offset=True)
        self.item = nn.Embedding(ROWS, DIM)
        self.item.weight = self.bags[0].weight  # type: ignore[assignment]
        configs = [rk.EmbeddingBagConfig("a", ROWS, 8, ["a", "b"]), rk.EmbeddingBagConfig("c", ROWS, 8)]
        self.collection = rk.EmbeddingBagCollection(configs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [bag(x) for bag in self.bags]
        offsets = torch.arange(0, x.numel() + 1, x.shape[1])
        parts += [self.fused(x.flatten(), offsets), self.item(x[:, 0])]
        return torch.cat([*parts, self.collection({"a": (x, None), "b": (x, None), "c": (x, None)})], dim=1)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "columns": (Columns, 3),
    "features": (Features, 2),
    "pooled": (Pooled, 7),
    "sequential": (lambda: nn.Sequential(nn.Sequential(nn.Embedding(ROWS, DIM)), nn.Linear(DIM, 2)), 1),
    "an embedding": (lambda: nn.Embedding(ROWS, DIM, padding_idx=3), 1),
    "a bag": (lambda: nn.EmbeddingBag(ROWS, DIM), 1),
}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    state = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return state, [(id(m), m.training, len(m._forward_hooks)) for m in model.modules()]


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    state, modules = snapshot(model)
    assert modules == before[1]
    assert state.keys() == before[0].keys()
    for name, (key, tensor) in state.items():
        assert key == before[0][name][0]
        assert torch.equal(tensor, before[0][name][1])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("choice", ["int8", "int4"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_are_those_of_the_dequantized_tables(name: str, choice: str, sampled: bool) -> None:
    torch.manual_seed(0)
    make, swapped = STRUCTURES[name]
    model = make().train()
    x = ids(BATCH, LENGTH)
    before, random = snapshot(model), torch.get_rng_state()
    new, report = optimize(model, choice, sample_inputs=x if sampled else None)
    assert torch.equal(torch.get_rng_state(), random)
    assert_unchanged(model, before)
    assert len(report.swapped) == swapped
    assert {layer.action for layer in report.swapped} == {choice}
    assert all(module.training for module in new.modules())
    twin = with_dequantized_tables(model, new)
    with torch.no_grad():
        torch.testing.assert_close(new(x), twin(x), rtol=1e-5, atol=1e-5)
        difference = (new(x) - model(x)).abs().max().item()
    assert difference > 1e-4  # it is quantized
    if sampled:
        assert report.output_error == pytest.approx(difference, rel=1e-3)
    assert not {id(p) for p in new.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("choice", "bits"), [("int8", 8), ("int4", 4)])
def test_report_holds_bytes_and_errors(choice: str, bits: int) -> None:
    model = Columns()
    new, report = optimize(model, choice)
    swapped, kept = report.swapped, report.kept
    assert [layer.names for layer in swapped] == [(f"embedding_dict.{n}",) for n in ("user", "item", "genre")]
    assert [layer.names for layer in kept] == [(f"linear.{n}",) for n in ("user", "item", "genre")]
    for layer in swapped:
        assert (layer.kind, layer.shape, layer.dtype) == ("Embedding", (ROWS, DIM), "float32")
        assert (layer.bytes_before, layer.bytes_after) == (ROWS * DIM * 4, table_bytes(ROWS, DIM, bits))
        weight = model.get_parameter(layer.names[0] + ".weight").detach()
        error = (dequantize(new.get_submodule(layer.names[0])) - weight.double()).abs().max().item()
        assert layer.max_error == pytest.approx(error, rel=1e-3)
        assert layer.relative_error == pytest.approx(error / weight.abs().max().item(), rel=1e-3)
    rest = 3 * ROWS * 4 + (3 * DIM + 1) * 4
    assert report.bytes_before == 3 * ROWS * DIM * 4 + rest
    assert report.bytes_after == 3 * table_bytes(ROWS, DIM, bits) + rest
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["shape"] == [ROWS, DIM]
    assert all(
        word in str(report) for word in ("embedding_dict.user", "too narrow", f"{report.bytes_after:,}", "50 x 16")
    )


def test_shared_tables_are_quantized_once() -> None:
    new, report = optimize(Pooled())
    assert new.item.weight.data_ptr() == new.bags[0].weight.data_ptr()
    assert new.item.scale_bias.data_ptr() == new.bags[0].scale_bias.data_ptr()
    shared = {layer.name: layer.reason for layer in report.layers if layer.reason}
    assert shared == {"bags.0": "one table with 'item'", "item": "one table with 'bags.0'"}
    # The shared exponent counts once, too; the collection keeps its plan on the side: 3 features of 6 int64.
    tables = 4 * table_bytes(ROWS, DIM, 8) + 2 * table_bytes(ROWS, 8, 8)
    assert report.bytes_after == tables + 3 * 6 * 8
    assert report.bytes_before == 4 * ROWS * DIM * 4 + 2 * ROWS * 8 * 4 + 3 * 6 * 8


def test_a_layer_at_two_places_stays_one() -> None:
    new, report = optimize(model := Features())
    assert [layer.names for layer in report.layers] == [("one.item", "two.history"), ("one.user",)]
    assert new.one["item"] is new.two["history"] is new.features[0].embed
    assert isinstance(new.features[1].embed, rk.QuantizedEmbedding)
    assert isinstance(model.features[1].embed, nn.Embedding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_settings_are_kept(dtype: torch.dtype) -> None:
    bag = nn.EmbeddingBag(ROWS, 64, mode="sum", include_last_offset=True, padding_idx=-1, dtype=dtype)
    embedding = nn.Embedding(ROWS, 64, padding_idx=2, dtype=dtype)
    new, report = optimize(nn.ModuleList([bag, embedding]))
    assert (new[0].mode, new[0].include_last_offset, new[0].padding_idx) == ("sum", True, ROWS - 1)
    assert new[1].padding_idx == 2
    assert torch.count_nonzero(new[1](torch.tensor([2]))) == 0
    assert new[0](ids(8), torch.tensor([0, 8])).dtype == new[1](ids(3)).dtype == dtype
    assert [layer.dtype for layer in report.layers] == [str(dtype).removeprefix("torch.")] * 2
    for layer in report.layers:
        assert layer.bytes_before == ROWS * 64 * dtype.itemsize
        assert layer.max_error is not None
        assert 0 < layer.max_error < 0.03


@pytest.mark.parametrize(
    ("dim", "dtype", "swapped"),
    [(1, torch.float32, False), (2, torch.float32, True), (2, torch.float16, False), (8, torch.float16, True)],
)
def test_narrow_tables_are_swapped_only_if_that_saves(dim: int, dtype: torch.dtype, swapped: bool) -> None:
    _, report = optimize(nn.Embedding(1000, dim, dtype=dtype))
    assert (only(report).action == "int8") == swapped
    assert swapped or "too narrow" in only(report).reason


# ---- layers left alone ---------------------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 4


class SmallInit(nn.Embedding):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)


def with_values(value: float) -> nn.Module:
    embedding = nn.Embedding(ROWS, DIM)
    with torch.no_grad():
        embedding.weight[7, 3] = value
    return embedding


def with_own_forward() -> nn.Module:
    embedding = nn.Embedding(ROWS, DIM)
    embedding.forward = MethodType(lambda self, x: self.weight[x] * 2, embedding)  # type: ignore[method-assign]
    return embedding


def with_state_hook() -> nn.Module:
    embedding = nn.Embedding(ROWS, DIM)
    embedding.register_state_dict_post_hook(lambda *args: None)
    return embedding


def resized() -> nn.Module:
    embedding = nn.Embedding(ROWS, DIM)
    embedding.weight = nn.Parameter(torch.zeros(ROWS + 1, DIM))
    return embedding


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: nn.Embedding(ROWS, DIM, max_norm=1.0), "max_norm"),
    "max_norm bag": (lambda: nn.EmbeddingBag(ROWS, DIM, max_norm=1.0), "max_norm"),
    "NaN": (lambda: with_values(math.nan), "row 7 of weight holds NaN or infinity"),
    "infinity": (lambda: with_values(math.inf), "row 7 of weight holds NaN or infinity"),
    "meta": (lambda: nn.Embedding(ROWS, DIM, device="meta"), "meta device"),
    "no rows": (lambda: nn.Embedding(0, DIM), "empty"),
    "own forward": (lambda: Scaled(ROWS, DIM), "its class has its own forward"),
    "replaced forward": (with_own_forward, "its forward was replaced"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Embedding(ROWS, DIM)), "parametrized: weight"),
    "old weight_norm": (lambda: nn.utils.spectral_norm(nn.Embedding(ROWS, DIM)), "has weight_orig, weight_u"),
    "pruned": (lambda: prune.l1_unstructured(nn.Embedding(ROWS, DIM), "weight", 0.5), "masks of torch.nn.utils"),
    "quantized": (lambda: rk.QuantizedEmbedding(ROWS, DIM), "a QuantizedEmbedding already"),
    "float8": (lambda: nn.Embedding(ROWS, DIM).to(torch.float8_e4m3fn), "its weight is float8_e4m3fn"),
    "state hook": (with_state_hook, "hooks on its state_dict"),
    "resized": (resized, "its weight is (51, 16)"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", KEPT)
def test_kept_with_the_reason(name: str) -> None:
    make, reason = KEPT[name]
    model = nn.ModuleList([make(), nn.Embedding(ROWS, DIM)])
    kind = type(model[0])
    new, report = optimize(model)
    kept, swapped = report.layers
    assert (kept.action, swapped.action) == ("kept", "int8")
    assert reason in kept.reason
    assert reason in str(report)
    assert kept.bytes_before == kept.bytes_after
    assert kept.max_error is None
    assert type(new[0]).__name__ == kind.__name__
    for name_, tensor in model[0].state_dict().items():
        other = new[0].state_dict()[name_]
        assert other is not tensor
        if tensor.device.type != "meta":
            torch.testing.assert_close(other, tensor, equal_nan=True)


def test_a_subclass_that_only_initializes_is_swapped() -> None:
    new, report = optimize(SmallInit(ROWS, DIM))
    assert only(report).kind == "SmallInit"
    assert isinstance(new, rk.QuantizedEmbedding)


def test_unregistered_layers_are_reported_and_work() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = [nn.Sequential(nn.Embedding(ROWS, DIM))]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tables[0](x)

    model = Model()
    new, report = optimize(model, sample_inputs=ids(3))
    assert only(report).names == ("tables[0].0",)
    assert "not a registered submodule" in only(report).reason
    assert torch.equal(new(ids(3)), model(ids(3)))
    assert new.tables[0] is not model.tables[0]


# ---- weights used by others ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie: Callable[[nn.Embedding, nn.Linear], Any]) -> None:
        super().__init__()
        self.items, self.free = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        self.decoder = nn.Linear(DIM, ROWS, bias=False)
        self.extra = nn.Module()
        tie(self.items, self.decoder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.items(x) + self.free(x))


def tie_parameter(items: nn.Embedding, decoder: nn.Linear) -> None:
    decoder.weight = items.weight


def tie_memory(items: nn.Embedding, decoder: nn.Linear) -> None:
    decoder.weight = nn.Parameter(items.weight.data)


def tie_part(items: nn.Embedding, decoder: nn.Linear) -> None:
    decoder.head = nn.Parameter(items.weight.data[10:12])


def tie_buffer(items: nn.Embedding, decoder: nn.Linear) -> None:
    decoder.register_buffer("table", items.weight.data)


def tie_list(items: nn.Embedding, decoder: nn.Linear) -> None:
    decoder.parameters_ = nn.ParameterList([items.weight])


def tie_kept_table(items: nn.Embedding, decoder: nn.Linear) -> None:
    decoder.other = nn.Embedding(ROWS, DIM, max_norm=1.0, _weight=items.weight.data)
    decoder.other.weight = items.weight


def tie_unregistered(items: nn.Embedding, decoder: nn.Linear) -> None:
    hidden = nn.Linear(DIM, ROWS)
    hidden.weight = items.weight
    decoder.hidden = [hidden]


TIES = {
    tie_parameter: "decoder.weight",
    tie_memory: "decoder.weight",
    tie_part: "decoder.head",
    tie_buffer: "decoder.table",
    tie_list: "decoder.parameters_.0",
    tie_kept_table: "decoder.other.weight",
    tie_unregistered: "decoder.hidden[0].weight",
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
def test_tied_tables_are_left_alone(tie: Callable[..., Any], sampled: bool) -> None:
    model = Tied(tie)
    x = ids(BATCH)
    new, report = optimize(model, sample_inputs=x if sampled else None)
    items, free = report.layers[:2]
    assert (items.name, items.action, items.reason) == ("items", "kept", f"its weight is shared with {TIES[tie]!r}")
    assert (free.name, free.action) == ("free", "int8")
    if tie is tie_parameter:
        assert new.items.weight is new.decoder.weight
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x))


def test_tables_side_by_side_in_one_memory_are_not_tied() -> None:
    memory = torch.randn(2 * ROWS, DIM)
    tables = [nn.Embedding.from_pretrained(part, freeze=False) for part in memory.chunk(2)]
    new, report = optimize(nn.ModuleList(tables))
    assert [layer.action for layer in report.layers] == ["int8", "int8"]
    assert (report.bytes_before, report.bytes_after) == (memory.nbytes, 2 * table_bytes(ROWS, DIM, 8))
    assert isinstance(new[0], rk.QuantizedEmbedding)


def test_skipping_one_of_two_that_share_keeps_both() -> None:
    _, report = optimize(Pooled(), skip="item")
    kept = {layer.name: layer.reason for layer in report.kept}
    assert kept == {"item": "skip='item'", "bags.0": "its weight is shared with 'item.weight'"}


def test_a_collection_by_table() -> None:
    configs = [rk.EmbeddingBagConfig(n, ROWS, DIM, pooling=p) for n, p in (("a", "sum"), ("b", "mean"), ("c", "max"))]
    collection = rk.EmbeddingBagCollection(configs)
    x = {name: (ids(BATCH, LENGTH), None) for name in "abc"}
    new, report = optimize(collection, "int4", skip="embedding_bags.b", sample_inputs=x)
    assert {layer.name: layer.action for layer in report.layers} == {
        "embedding_bags.a": "int4",
        "embedding_bags.b": "kept",
        "embedding_bags.c": "int4",
    }
    torch.testing.assert_close(new(x), with_dequantized_tables(collection, new)(x))
    assert isinstance(new, rk.EmbeddingBagCollection)
    assert torch.equal(new(x), collection.quantize({"a": 4, "c": 4})(x))


# ---- the copy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_no_swapped_table_is_copied(monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    copied = []
    deepcopy = nn.Parameter.__deepcopy__

    def count(parameter: nn.Parameter, memo: Any) -> nn.Parameter:
        copied.append(tuple(parameter.shape))
        return deepcopy(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", count)
    optimize(Columns(), sample_inputs=ids(BATCH, LENGTH) if sampled else None)
    assert (ROWS, 1) in copied  # kept tables are
    assert (ROWS, DIM) not in copied


@pytest.mark.parametrize("copy_of", [lambda model: model, copy.deepcopy, by_pickle])
def test_weights_held_elsewhere_become_nan(copy_of: Callable[..., nn.Module]) -> None:
    model = Columns()
    new, report = optimize(model)
    for weight in copy_of(new).regularization_weight[0][0]:
        assert weight.shape == (ROWS, DIM)
        assert weight.untyped_storage().nbytes() == 4
        assert weight.isnan().all()
    assert report.layers[0].reason == "regularization_weight[0][0][0] is NaN now"
    assert model.regularization_weight[0][0][0] is model.embedding_dict["user"].weight


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_what_training_left_in_a_model() -> None:
    model = Columns()
    model.optim = torch.optim.Adagrad(model.parameters())
    loss = model(ids(BATCH, LENGTH)).sum()
    loss.backward()
    model.optim.step()
    model.loss = loss  # deepcopy refuses a tensor with a graph
    new, report = optimize(model)
    assert new.optim is None
    assert report.notes == ("optim: the optimizer is not copied",)
    assert "optim: the optimizer is not copied" in str(report)
    assert (new.loss.grad_fn, new.loss.item()) == (None, loss.item())
    assert model.optim.state[model.embedding_dict["user"].weight]["step"] == 1


def test_forward_hooks_and_attributes_are_carried_over() -> None:
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(module) or (args[0] % 2,))
    model[0].register_forward_hook(lambda module, args, kwargs, out: out + 100, with_kwargs=True)
    model[0].vocabulary = {"a": 1}
    new, _ = optimize(model)
    out = new(torch.tensor([2, 3]))
    torch.testing.assert_close(out, dequantize(new[0])[:2].float() + 100)
    assert seen == [new[0]]
    assert new[0].vocabulary == {"a": 1}
    assert new[0].vocabulary is not model[0].vocabulary
    assert not hasattr(new[0], "max_norm")


@pytest.mark.parametrize("copy_of", [copy.deepcopy, by_torch_save, by_pickle])
@pytest.mark.parametrize("make", [Columns, Features, Pooled])
def test_new_models_can_be_copied_and_pickled(make: Callable[[], nn.Module], copy_of: Callable[..., nn.Module]) -> None:
    new, report = optimize(make())
    x = ids(BATCH, LENGTH)
    other = copy_of(new)
    assert torch.equal(other(x), new(x))
    again = optimize(other)[1]
    assert {layer.action for layer in again.layers} == {"kept"}
    if copy_of is copy.deepcopy:  # files store what tables share once for each
        assert again.bytes_before == report.bytes_after


@pytest.mark.parametrize("make", [Columns, Features, Pooled])
def test_state_dicts_go_from_one_new_model_to_another(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    one, other = optimize(make())[0], optimize(make())[0]
    x = ids(BATCH, LENGTH)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_a_bare_model_is_copied_and_reported() -> None:
    model = nn.Linear(2, 2)
    new, report = optimize(model)
    assert new is not model
    assert torch.equal(new.weight, model.weight)
    assert report.layers == ()
    assert str(report) == "no layer of the kinds asked for\nwhole model: 24 bytes as before"


def test_none_leaves_the_tables() -> None:
    model = Columns()
    new, report = optimize(model, embedding=None)
    assert report.layers == ()
    assert report.bytes_before == report.bytes_after
    assert torch.equal(new.embedding_dict["user"].weight, model.embedding_dict["user"].weight)
    assert new.regularization_weight[0][0][0] is new.embedding_dict["user"].weight


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("embedding_dict.user", {"user"}),
        (["embedding_dict.user", "*.genre"], {"user", "genre"}),
        ("embedding_dict", {"user", "item", "genre"}),
        (nn.Embedding, {"user", "item", "genre"}),
        ((nn.ModuleDict,), {"user", "item", "genre"}),
        (iter(["*.[ui]*"]), {"user", "item"}),
        (nn.Linear, set()),
    ],
)
def test_skip(skip: Any, kept: set[str]) -> None:
    _, report = optimize(Columns(), skip=skip)
    tables = [layer for layer in report.layers if layer.name.startswith("embedding_dict")]
    assert {layer.name.split(".")[1] for layer in tables if layer.action == "kept"} == kept
    assert all(layer.reason.startswith("skip=") for layer in tables if layer.action == "kept")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embedding": "int2"}, ValueError, "embedding must be 'int8', 'int4' or None, but is 'int2'"),
        ({"embedding": 8}, ValueError, "embedding must be 'int8', 'int4' or None, but is 8"),
        ({"skip": "embedding_dict.usr"}, ValueError, "skip: 'embedding_dict.usr' names no module"),
        ({"skip": ["top", "*.bias"]}, ValueError, "skip: '\\*.bias' names no module"),
        ({"skip": nn.Conv2d}, ValueError, "skip: Conv2d names no module"),
        ({"skip": [3]}, TypeError, "skip takes names, patterns and module classes, not 3"),
        ({"skip": [int]}, TypeError, "not <class 'int'>"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize(Columns(), **arguments)


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is Tensor"):
        rk.optimize(torch.ones(2, 2))  # type: ignore[arg-type]
