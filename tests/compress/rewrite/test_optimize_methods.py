"""optimize(methods=...): methods beside forward that must work, in models built as those of published packages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table_support import with_dequantized_tables
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.converters import embedding_tables
from recsys_kernels.compress.rewrite import compare

USERS, ITEMS, DIM, BATCH = 20, 30, 16, 5


class Interaction(dict[str, Any]):
    """What such models take as the argument of their methods."""


def interaction() -> Interaction:
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randint(high, (BATCH,), generator=generator) for high in (USERS, ITEMS))
    return Interaction(user=users, item=items, sequence=torch.randint(ITEMS, (BATCH, 4), generator=generator))


class Translation(nn.Module):
    """Distances between a sequence and every item: bytes in place of floats give no error, only wrong scores."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM)

    def forward(self, users: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        return self.user(users) + self.item(sequence[:, -1])

    def calculate_loss(self, given: Interaction) -> torch.Tensor:
        return self.predict(given).mean()

    def predict(self, given: Interaction) -> torch.Tensor:
        return -(self.forward(given["user"], given["sequence"]) - self.item(given["item"])).norm(dim=-1)

    def full_sort_predict(self, given: Interaction) -> torch.Tensor:
        out = self.forward(given["user"], given["sequence"])
        return -(out.unsqueeze(1) - self.item.weight).norm(dim=-1)


class Products(Translation):
    """Scores by a product with the transposed table."""

    def full_sort_predict(self, given: Interaction) -> torch.Tensor:
        items = self.item.weight[:ITEMS]
        return torch.matmul(self.forward(given["user"], given["sequence"]), items.transpose(0, 1))


class Propagation(nn.Module):
    """Both tables in one, spread over a graph: forward itself reads the weights and has no arguments."""

    graph: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM)
        self.register_buffer("graph", torch.eye(USERS + ITEMS).roll(1, 0))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.cat([self.user.weight, self.item.weight], dim=0)
        layers = torch.stack([start, self.graph @ start], dim=1).mean(dim=1)
        users, items = torch.split(layers, [USERS, ITEMS])
        return users, items

    def full_sort_predict(self, given: Interaction) -> torch.Tensor:
        users, items = self.forward()
        return users[given["user"]] @ items.T


MODELS: list[tuple[type[nn.Module], tuple[Any, ...]]] = [
    (Translation, (interaction()["user"], interaction()["sequence"])),
    (Products, (interaction()["user"], interaction()["sequence"])),
    (Propagation, ()),
]


@pytest.mark.parametrize(("kind", "inputs"), MODELS)
@pytest.mark.parametrize("way", ["source", "sample_inputs", "methods"])
def test_methods_compute_with_the_quantized_values(kind: type[nn.Module], inputs: tuple[Any, ...], way: str) -> None:
    torch.manual_seed(0)
    model: Any = kind()
    given = interaction()
    options: dict[str, dict[str, Any]] = {
        "source": {},
        "sample_inputs": {"sample_inputs": inputs},
        "methods": {"methods": {"full_sort_predict": given}},
    }
    new: Any
    new, report = rk.optimize(model, **options[way])
    assert {layer.action for layer in report.layers} == {"int8"}
    with torch.no_grad():
        scores, expected = new.full_sort_predict(given), with_dequantized_tables(model, new).full_sort_predict(given)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        difference = (scores - model.full_sort_predict(given)).abs().max().item()
    assert 0 < difference < 0.2
    assert report.bytes_after < report.bytes_before
    if way == "methods":
        (call,) = report.calls
        assert call.name == "full_sort_predict"
        assert call.output_error == report.output_error == pytest.approx(difference, rel=1e-3)
        assert "outputs on the call 'full_sort_predict': largest difference" in str(report)


def test_every_call_is_compared() -> None:
    model, given = Products(), interaction()
    inputs = (given["user"], given["sequence"])

    def best_item(model: Any) -> torch.Tensor:
        return model.full_sort_predict(given).amax(1)

    methods: list[Any] = ["forward", best_item, lambda model: model.predict(given)]
    _, report = rk.optimize(model, sample_inputs=inputs, methods=methods)
    assert [call.name for call in report.calls] == ["forward", "forward", "best_item", "<lambda>"]
    assert report.output_error == max(call.output_error for call in report.calls) > 0
    assert report.to_dict()["calls"][2]["output_error"] == report.calls[2].output_error


def test_the_kind_of_model_that_checks_its_table_fails_with_the_name_of_the_call() -> None:
    class Checks(Products):
        def full_sort_predict(self, given: Interaction) -> torch.Tensor:
            assert isinstance(self.item, nn.Embedding)
            return super().full_sort_predict(given)

    with pytest.raises(RuntimeError, match=r"fails on the call 'full_sort_predict', .* in skip \(AssertionError"):
        rk.optimize(Checks(), methods={"full_sort_predict": interaction()})
    _, report = rk.optimize(Checks(), skip="item", methods={"full_sort_predict": interaction()})
    assert [layer.action for layer in report.layers] == ["int8", "kept"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": "rank"}, ValueError, "methods: Products has no method 'rank'"),
        ({"methods": ["full_sort_predict"]}, ValueError, "'full_sort_predict' needs arguments: give sample_inputs, or"),
        ({"methods": [3]}, TypeError, "methods takes names of methods and functions of a model, not 3"),
        ({"methods": {3: ()}}, TypeError, "methods takes names of methods and functions of a model, not 3"),
        (
            {"methods": {"predict": (1, 2)}},
            TypeError,
            r"predict\(given: .*\) .* cannot be called with the arguments for 'predict', taken for 2 arguments",
        ),
        (
            {"sample_inputs": torch.arange(3)},
            TypeError,
            r"forward\(users: .*\) .* with sample_inputs, taken for 1 argument: \(Tensor\): missing a required",
        ),
        (
            {"sample_inputs": [torch.arange(3), torch.ones(3, 4)]},
            TypeError,
            "sample_inputs, a list, which is taken for the only argument: give several arguments as a tuple",
        ),
    ],
)
def test_wrong_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.optimize(Products(), **options)


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="Python 3.11 has notes on exceptions")
def test_the_models_own_error_says_what_it_got() -> None:
    with pytest.raises(TypeError) as caught:
        rk.optimize(nn.Embedding(9, 4), sample_inputs=[torch.arange(3)])
    notes = "".join(getattr(caught.value, "__notes__", ()))
    assert "sample_inputs, a list, which is taken for the only argument" in notes


# ---- times ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lookups of under 100 indices are slower in int8, others faster; the lookups that were timed."""
    seen: list[Any] = []

    def microseconds(first: Any, second: Any, lookup: dict[str, torch.Tensor]) -> tuple[float, float]:
        torch.testing.assert_close(second(**lookup), first(**lookup), rtol=0, atol=0.1)
        seen.append({name: tuple(value.shape) for name, value in lookup.items()})
        return (3.0, 7.5) if lookup["input"].numel() < 100 else (400.0, 150.0)

    monkeypatch.setattr(embedding_tables, "_microseconds", microseconds)
    monkeypatch.setattr(compare, "_microseconds", lambda *arguments: (1234.0, 99.5))
    return seen


def test_slower_tables_are_said(timed: list[Any]) -> None:
    model = nn.Sequential(nn.Embedding(ITEMS, DIM))
    new: Any
    new, report = rk.optimize(model, sample_inputs=torch.arange(4))
    assert isinstance(new[0], rk.QuantizedEmbedding)  # bytes are what tables are swapped for
    (layer,) = report.layers
    assert layer.reason == "slower: 7.5 us instead of 3.0 for 4 indices"
    assert (layer.float_us, layer.int8_us) == (3.0, 7.5)
    assert report.slower == ("0",)
    assert "slower than in float at this size: '0'; skip= keeps such layers in float" in str(report)
    assert "largest difference" in str(report)
    assert "99.5 us instead of 1,234" in str(report)
    assert (report.calls[0].float_us, report.calls[0].new_us) == (1234.0, 99.5)
    _, report = rk.optimize(model, sample_inputs=torch.arange(4), batch_size=200)
    assert report.layers[0].reason == "150 us instead of 400 for 200 indices"
    assert report.slower == ()
    _, report = rk.optimize(model, batch_size=1)
    assert report.layers[0].reason == "slower: 7.5 us instead of 3.0 for 1 index"
    assert report.calls == ()
    assert timed == [{"input": (4,)}, {"input": (200,)}, {"input": (1, 1)}]
    assert optimize_without_times(model) == ""


def optimize_without_times(model: nn.Module) -> str:
    return rk.optimize(model)[1].layers[0].reason


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.square = (nn.EmbeddingBag(ITEMS, DIM, mode="sum") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(0, x.numel(), x.shape[1])
        weights = torch.ones(x.shape)
        return self.flat(x.flatten(), offsets) + self.square(x, per_sample_weights=weights)


def test_lookups_follow_the_batch_size(timed: list[Any]) -> None:
    x = torch.arange(12).reshape(3, 4)
    rk.optimize(Bags(), sample_inputs=x)
    rk.optimize(Bags(), sample_inputs=x, batch_size=7)
    rk.optimize(Bags(), sample_inputs=x, batch_size=1)
    square = [{"input": (n, 4), "per_sample_weights": (n, 4)} for n in (3, 7, 1)]
    flat = [{"input": (12,), "offsets": (3,)}, {"input": (7, 4)}, {"input": (1, 4)}]
    assert timed == [lookup for pair in zip(flat, square, strict=True) for lookup in pair]


def test_a_real_measurement() -> None:
    _, report = rk.optimize(Translation(), sample_inputs=(torch.arange(4), torch.ones(4, 3, dtype=torch.int64)))
    for layer in report.layers:
        assert layer.float_us is not None
        assert layer.int8_us is not None
        assert layer.float_us > 0.1
        assert layer.int8_us > 0.1
        assert ("slower" in layer.reason) == (layer.int8_us > layer.float_us)
    (call,) = report.calls
    assert call.float_us is not None
    assert call.new_us is not None
    assert min(call.float_us, call.new_us) > 1.0
