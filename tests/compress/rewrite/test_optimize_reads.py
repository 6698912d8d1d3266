"""Tables whose weight other code reads: found in the source, or by a run on sample inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_support import without_timing
from table_support import with_dequantized_tables
from torch import nn

import recsys_kernels as rk
from recsys_kernels.compress.rewrite.optimize import optimize
from recsys_kernels.ops.embedding_bag.dequantizing import DequantizingEmbedding

ROWS, DIM = 30, 16


class Base(nn.Module):
    """Reads its tables in the ordinary way; subclasses add one read of `items.weight` or of `tables`."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.free = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        self.tables = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM)})
        nn.init.normal_(self.items.weight)
        self.initialize()
        self.__private()

    def __private(self) -> None:
        nn.init.normal_(self.tables["a"].weight)

    def initialize(self) -> None:
        with torch.no_grad():
            self.free.weight.mul_(0.5)

    def lookup(self, x: torch.Tensor) -> torch.Tensor:
        return self.items(x) + self.free(x) + self.tables["a"](x).to(self.free.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x)


class Scores(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ self.items.weight.T


# fmt: off
class LeftComment(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lookup(x)
# a comment further left than the code
        return h + self.items.weight[:1]
# fmt: on


class Silent(Base):
    """Adds integers to floats without an error if the table is swapped."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) + self.items.weight.unsqueeze(0)[:, : x.shape[0]]


class Alias(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.items
        same = table
        return self.lookup(x) @ same.weight.T


class Helper(Base):
    @property
    def everything(self) -> Any:
        return self.items.weight

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.everything.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.lookup(x))


class Inherited(Scores):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Getattr(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ getattr(self.items, "weight").T  # noqa: B009


class Dtype(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x).to(self.items.weight.dtype)


class Held(Base):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"items": [self.items]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ self.parts["items"][0].weight.T


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) @ self.inner.items.weight.T


class Subscript(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ self.tables["a"].weight.T


class Loop(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lookup(x)
        for _, table in self.tables.items():
            h = h @ table.weight.T
        return h


class Comprehension(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ torch.cat([table.weight for table in self.tables.values()]).T


READS: list[tuple[Callable[[], nn.Module], str]] = [
    *((kind, "items") for kind in (Scores, LeftComment, Silent, Alias, Helper, Inherited, Getattr, Dtype, Held)),
    *((kind, "tables.a") for kind in (Subscript, Loop, Comprehension)),
    (Outer, "inner.items"),
]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("make", "name"), READS)
def test_reads_get_the_values_of_the_quantized_rows(make: Callable[[], nn.Module], name: str, sampled: bool) -> None:
    model = make()
    x = torch.arange(4)
    new, report = optimize(model, sample_inputs=x if sampled else None)
    assert report.kept == ()
    notes = {layer.name: layer.reason for layer in report.layers}
    assert [n for n, text in notes.items() if "reads its weight: up to 1,920 bytes of floats" in text] == [name]
    assert "(test_optimize_reads.py:" in notes[name]
    kinds = {layer.name: type(new.get_submodule(layer.name)) for layer in report.layers}
    assert kinds == {n: DequantizingEmbedding if n == name else rk.QuantizedEmbedding for n in notes}
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x), rtol=1e-5, atol=1e-5)
    if sampled:
        assert report.output_error == pytest.approx((new(x) - model(x)).abs().max().item(), rel=1e-4)


def test_the_note_names_the_line() -> None:
    line = Scores.forward.__code__.co_firstlineno + 1
    for inputs in (None, torch.arange(4)):
        _, report = optimize(Scores(), sample_inputs=inputs)
        (layer,) = [layer for layer in report.layers if "reads its weight" in layer.reason]
        assert layer.name == "items"
        assert f"forward (test_optimize_reads.py:{line}) reads its weight" in layer.reason


def test_initialization_and_device_do_not_keep_a_table() -> None:
    assert len(optimize(Base())[1].swapped) == 3


class Elsewhere(Base):
    """The read is on a way that the sample inputs do not take."""

    def penalty(self) -> torch.Tensor:
        return self.items.weight.norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.lookup(x) @ self.free.weight.T
        return self.lookup(x)


def test_methods_that_did_not_run_work_too() -> None:
    model = Elsewhere()
    for inputs in (None, torch.arange(4)):
        new, report = optimize(model, sample_inputs=inputs)
        assert report.kept == ()
        places = {layer.name: layer.reason.split(" (")[0] for layer in report.layers if "reads" in layer.reason}
        assert places == {"items": "Elsewhere.penalty", "free": "Elsewhere.forward"}
        twin = with_dequantized_tables(model, new)
        torch.testing.assert_close(new.penalty(), twin.penalty())
        torch.testing.assert_close(new.train()(torch.arange(4)), twin.train()(torch.arange(4)))


class LinearElsewhere(nn.Module):
    """Reads of the weights of linear layers, which no new layer serves."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.trained, self.free = (nn.Linear(64, 64) for _ in range(3))

    def scores(self) -> torch.Tensor:
        return self.read.weight.norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.free(self.trained(self.read(x)))
        if self.training:
            x = x + self.trained.weight.norm()
        return x if not self.training else x + self.trained.weight.norm()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {"read", "trained"}),
        ({"sample_inputs": torch.ones(2, 64)}, {"read"}),
        ({"sample_inputs": torch.ones(2, 64), "methods": ()}, set()),
        ({"sample_inputs": torch.ones(2, 64), "methods": lambda model: model.scores()}, {"read"}),
    ],
)
def test_linear_layers_that_other_methods_read_stay(
    options: dict[str, Any], kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_timing(monkeypatch)
    model = LinearElsewhere()
    new, report = optimize(model, linear="int8", **options)
    assert {layer.name for layer in report.kept} == kept
    assert all("its weight is read by LinearElsewhere." in layer.reason for layer in report.kept)
    if "read" in kept:
        torch.testing.assert_close(new.scores(), model.scores())


def _all_scores(h: torch.Tensor, table: Any) -> torch.Tensor:
    return h @ table.weight.T


class Hidden(Base):
    """The source does not show it: the table is handed to a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _all_scores(self.lookup(x), self.items)


class Listed(Base):
    """The parameter itself stands in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.output = [self.items.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ self.output[0].T


class Parameters(Base):
    """The parameter is not taken from the attribute ``weight``, which is all that a new table serves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) @ next(self.items.parameters()).T


@pytest.mark.parametrize("kind", [Hidden, Listed, Parameters])
def test_a_trial_run_sees_hidden_reads(kind: type[Base]) -> None:
    x = torch.arange(4)
    model = kind()
    new, report = optimize(model, sample_inputs=x)
    assert [layer.name for layer in report.kept] == ([] if kind is Hidden else ["items"])
    assert all("which does not take it from the layer" in layer.reason for layer in report.kept)
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x), rtol=1e-5, atol=1e-5)
    assert report.output_error == pytest.approx((new(x) - model(x)).abs().max().item(), rel=1e-4)


def test_hidden_reads_do_not_give_wrong_numbers() -> None:
    x = torch.arange(4)
    assert optimize(Listed())[0](x).isnan().all()


def _add_position(table: Any, h: torch.Tensor) -> torch.Tensor:
    return h + table.weight[: len(h)]


def _call(table: Any, x: torch.Tensor) -> torch.Tensor:
    return table(x)


class HandedOver(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _add_position(self.items, self.lookup(x))


class Computed(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) + getattr(self, "it" + "ems"[: len(x)]).weight[: len(x)]


class Submodule(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) + self.get_submodule("tables.a").weight[: len(x)]


class Mapped(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) + sum(map(lambda table: table.weight[x], self.tables.values()))  # noqa: C417


class Parameter(Base):
    def add(self, table: Any, h: torch.Tensor) -> torch.Tensor:
        return h + table.weight[: len(h)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(self.items, self.lookup(x))


class Property(Base):
    @property
    def table(self) -> nn.Module:
        return self.items

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x) + self.table.weight[: len(x)]  # type: ignore[operator,index]


class Harmless(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _call(self.items, x) + self.lookup(x) * len(self.tables)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (HandedOver, {"items"}),
        (Computed, {"items", "free", "tables.a"}),
        (Submodule, {"tables.a"}),
        (Mapped, {"tables.a"}),
        (Parameter, {"items", "free", "tables.a"}),
        (Property, {"items", "free", "tables.a"}),
        (Harmless, set()),
    ],
)
def test_reads_that_may_be_of_a_table_are_served(kind: type[Base], read: set[str]) -> None:
    model, x = kind(), torch.arange(4)
    new, report = optimize(model)
    assert report.kept == ()
    assert {layer.name for layer in report.layers if f"{kind.__name__}." in layer.reason} == read
    names = {name for name, module in new.named_modules() if isinstance(module, DequantizingEmbedding)}
    assert names == read
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x), rtol=1e-5, atol=1e-5)
    assert "outputs were not compared" in str(report)
    assert "outputs were not compared" not in str(optimize(model, sample_inputs=x)[1])


def test_code_without_source_is_told() -> None:
    names: dict[str, Any] = {"Base": Base}
    code = "class Made(Base):\n  def forward(self, x):\n    return self.lookup(x) @ self.items.weight.T\n"
    exec(compile(code, "<made>", "exec"), names)
    model, x = names["Made"](), torch.arange(4)
    new, report = optimize(model)
    assert "no source of Made.forward: give sample_inputs" in str(report)
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x))
    _, report = optimize(model, sample_inputs=x)
    assert [layer.name for layer in report.layers if "reads its weight" in layer.reason] == ["items"]
    assert report.notes == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules_are_told() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Embedding(ROWS, DIM))), nn.Linear(DIM, 2))
    new, report = optimize(model, sample_inputs=torch.arange(4))
    assert report.layers == ()
    assert report.notes == ("0: scripted, left as it is; optimize before torch.jit.script",)
    assert report.bytes_before == report.bytes_after == (ROWS * DIM + 2 * DIM + 2) * 4
    assert torch.equal(new(torch.arange(4)), model(torch.arange(4)))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models(wrap: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    new, report = optimize(wrap(model))
    (layer,) = report.swapped
    error = (new(torch.arange(ROWS)) - model(torch.arange(ROWS))).abs().max().item()
    assert error == pytest.approx(layer.max_error, rel=1e-4)


def test_traced_graphs() -> None:
    graph, x = torch.fx.symbolic_trace(Scores()), torch.arange(4)
    new, report = optimize(graph)
    # Tracing wrote the read of `.device` as a variable of its own, which is one read too many here.
    assert {layer.name for layer in report.layers if "reads its weight" in layer.reason} == {"items", "free"}
    torch.testing.assert_close(new(x), with_dequantized_tables(graph, new)(x))


def test_a_hook_that_reads_the_weight_is_served() -> None:
    model, x = nn.Sequential(nn.Embedding(ROWS, DIM)), torch.arange(4)
    model[0].register_forward_hook(lambda module, args, out: out * module.weight.abs().max())
    new, report = optimize(model, sample_inputs=x)
    assert "reads its weight" in report.swapped[0].reason
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x))
    new, _ = optimize(model)  # the source does not show it
    torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x))


def test_one_of_two_tables_that_share_is_read() -> None:
    class Shared(Base):
        def __init__(self) -> None:
            super().__init__()
            self.free.weight = self.items.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lookup(x) @ self.items.weight.T

    x, model = torch.arange(4), Shared()
    for inputs in (None, x):
        new, report = optimize(model, sample_inputs=inputs)
        assert len(report.swapped) == 3
        assert new.items.stored_rows.data_ptr() == new.free.stored_rows.data_ptr()
        torch.testing.assert_close(new(x), with_dequantized_tables(model, new)(x), rtol=1e-5, atol=1e-5)


def test_collections_may_read_their_tables() -> None:
    collection = rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("a", ROWS, DIM)])
    arguments = (torch.arange(4), torch.tensor([0, 2, 4]))
    _, report = optimize(nn.Sequential(collection)[0], sample_inputs=arguments)
    assert len(report.swapped) == 1


# ---- trial runs ----------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(DIM)
        self.calls: list[int] = []
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        self.calls.append(len(x))
        self.count += 1
        scale.mul_(2)
        noise = torch.rand(DIM)
        out = self.norm(self.dropout(self.table(x))) * scale + noise
        return {"out": out, "ids": x, "name": "result"}


def test_trial_runs_leave_no_trace() -> None:
    model = Stateful().train()
    scale = torch.ones(1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new, report = optimize(model, sample_inputs=(torch.arange(8), scale))
    assert scale.item() == 1
    for one in (model, new):
        assert (one.calls, one.count.item(), one.training, one.norm.training) == ([], 0, True, True)
        assert one.norm.num_batches_tracked == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Dropout is off and both runs draw the same noise, so what is left is the tables' error, doubled.
    (layer,) = report.swapped
    assert layer.max_error is not None
    assert report.output_error is not None
    assert 0 < report.output_error <= 2 * layer.max_error * 1.001


class Checks(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.items, nn.Embedding)
        return self.lookup(x)


class Counts(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lookup(x).sum() + torch.zeros(len(list(self.parameters())))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Checks, r"the optimized model fails on sample_inputs, .* in skip \(AssertionError: "),
        (Counts, r"outputs of the optimized model have the shapes \[\(0,\)\] instead of \[\(3,\)\]"),
    ],
)
def test_a_new_model_that_fails_is_an_error(kind: type[Base], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        optimize(kind(), sample_inputs=torch.arange(4))


def test_skip_names_what_fails() -> None:
    _, report = optimize(Checks(), skip="items", sample_inputs=torch.arange(4))
    assert len(report.swapped) == 2


def test_a_wrong_call_is_the_callers_error() -> None:
    with pytest.raises(IndexError):
        optimize(Base(), sample_inputs=torch.tensor([ROWS]))


class Sharp(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lookup(x)
        exact = torch.full_like(h, float("inf"))
        return torch.stack((exact, h / (h - h.detach()), torch.where(self.swapped(), h.new_tensor(float("nan")), h)))

    def swapped(self) -> torch.Tensor:
        return torch.tensor(not isinstance(self.items, nn.Embedding))


def test_values_that_are_not_finite_on_one_side_count_as_infinite_error() -> None:
    _, report = optimize(Sharp(), sample_inputs=torch.arange(4))
    assert report.output_error == float("inf")
    _, report = optimize(Sharp(), skip="*", sample_inputs=torch.arange(4))
    assert report.output_error == 0.0
