"""Many tables in one call: against one lookup a feature, and through every way of changing the tables."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import recsys_kernels as rk
from recsys_kernels import testing
from recsys_kernels.backends import registry, selection
from recsys_kernels.ops.embedding_bag.collection_autograd import embedding_bag_collection
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN
from recsys_kernels.testing import CollectionSample, assert_matches, expected_embedding_bag

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = testing.FLOAT_DTYPES
Config = rk.EmbeddingBagConfig


def expected(sample: CollectionSample) -> torch.Tensor:
    parts, begin = [], 0
    for part in sample.feature_samples():
        end = begin + part.indices.numel()
        if part.per_sample_weights is not None:  # not rounded to the type of a 16-bit table
            assert sample.per_sample_weights is not None
            part = replace(part, per_sample_weights=sample.per_sample_weights[begin:end])
        parts.append(expected_embedding_bag(part))
        begin = end
    return torch.cat(parts, dim=1)


def reference_gradients(sample: CollectionSample, grad: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of all tables and of the per-sample weights, feature by feature in float64."""
    tables = [w.double().clone().requires_grad_() for w in sample.weights]
    factors = sample.per_sample_weights
    factors = None if factors is None else factors.double().clone().requires_grad_()
    batch, offsets, outs = grad.shape[0], sample.offsets.tolist(), []
    for number, feature in enumerate(sample.features):
        columns = []
        for row in range(batch):
            begin, end = offsets[number * batch + row], offsets[number * batch + row + 1]
            rows = tables[feature.table][sample.indices[begin:end].long()]
            if end == begin:
                columns.append(torch.zeros(feature.dim, dtype=torch.float64))
            elif feature.mode == MAX:
                columns.append(rows.amax(0))
            else:
                rows = rows if factors is None else rows * factors[begin:end].unsqueeze(1)
                columns.append(rows.mean(0) if feature.mode == MEAN else rows.sum(0))
        outs.append(torch.stack(columns) if columns else torch.zeros(0, feature.dim, dtype=torch.float64))
    out = torch.cat(outs, dim=1)
    wanted = tables + ([] if factors is None else [factors])
    if not out.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    grads = torch.autograd.grad(out, wanted, grad.double(), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(implementation: str, dtype: torch.dtype) -> None:
    run = selection.implementation("embedding_bag_collection", torch.empty(0))
    for sample in testing.collection_samples(dtype):
        assert_matches(run(*sample.args), expected(sample))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(implementation: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(40)
    for sample in testing.collection_samples(dtype):
        weights = [w.detach().requires_grad_() for w in sample.weights]
        factors = sample.per_sample_weights
        factors = None if factors is None else factors.detach().requires_grad_()
        call = registry.operators["embedding_bag_collection"].unflat(sample.args)
        tables, bags = call.tables._replace(weights=weights), call.bags._replace(per_sample_weights=factors)
        out = embedding_bag_collection(tables, sample.features, bags, call.total_dim, call.dtype)
        grad = torch.randn(out.shape, generator=rng).to(out.dtype)
        actual = torch.autograd.grad(out, weights + ([] if factors is None else [factors]), grad)
        for number, (got, wanted) in enumerate(zip(actual, reference_gradients(sample, grad), strict=True)):
            try:
                assert_matches(got, wanted)
            except AssertionError as error:
                raise AssertionError(f"{sample}, gradient {number}: {error}") from error


def test_gradcheck(implementation: str) -> None:
    collection = rk.EmbeddingBagCollection(
        [Config("a", 5, 3, ["x", "y"]), Config("b", 4, 2, pooling="mean"), Config("c", 3, 4, pooling="max")],
        weight_dtype=torch.float64,
    )
    indices, offsets = torch.tensor([0, 4, 4, 1, 2, 3, 3, 0, 1, 2, 0]), torch.tensor([0, 2, 3, 3, 4, 4, 8, 9, 11])
    factors = torch.randn(11, dtype=torch.float64, requires_grad=True)
    tables = tuple(p.detach().clone().requires_grad_() for p in collection.parameters())
    names = [name for name, _ in collection.named_parameters()]

    def run(f: torch.Tensor, *weights: torch.Tensor) -> Any:
        return torch.func.functional_call(collection, dict(zip(names, weights, strict=True)), (indices, offsets, f))

    # Max pooling has no factors: those of its positions have no effect and no gradient.
    assert torch.autograd.gradcheck(run, (factors, *tables))


# ---- the module ---------------------------------------------------------------------------------------------------


def make(dtype: torch.dtype = torch.float32) -> rk.EmbeddingBagCollection:
    torch.manual_seed(41)
    return rk.EmbeddingBagCollection(
        [
            Config("user", 40, 16),
            Config("item", 100, 24, ["item", "history"], "mean"),
            Config("genre", 7, 5, pooling="max"),
            Config("one", 1, 1, ["always"]),
        ],
        weight_dtype=dtype,
    )


SIZES = {"user": 40, "item": 100, "history": 100, "genre": 7, "always": 1}
BATCH = 6


def features(
    batch: int = BATCH, index_type: torch.dtype = torch.int64
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    rng = torch.Generator().manual_seed(42)
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, rows in SIZES.items():
        lengths = torch.randint(0, 5, (batch,), generator=rng)
        offsets = lengths.cumsum(0) - lengths
        ids = torch.randint(0, rows, (int(lengths.sum()),), generator=rng)
        found[name] = ids.to(index_type), offsets.to(index_type)
    return found


def jagged(inputs: dict[str, tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, lengths = [], []
    for own, offsets in inputs.values():
        assert offsets is not None
        ends = torch.cat([offsets[1:], offsets.new_full((1,), own.numel())])
        ids.append(own)
        lengths.append(ends - offsets)
    every = torch.cat(lengths)
    return torch.cat(ids), torch.cat([every.new_zeros(1), every.cumsum(0).to(every.dtype)])


def one_by_one(collection: rk.EmbeddingBagCollection, inputs: Any) -> torch.Tensor:
    """Feature by feature with the collection's own bags as torch modules in float64."""
    parts = []
    for config in collection.tables:
        bag = collection.embedding_bags[config.name]
        weight = bag.dequantize() if isinstance(bag, rk.QuantizedEmbeddingBag) else bag.weight.detach()
        reader = torch.nn.EmbeddingBag.from_pretrained(weight.double(), mode=config.pooling)
        parts += [reader(inputs[name][0].long(), inputs[name][1].long()) for name in config.features]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mapping_and_jagged_input(implementation: str, dtype: torch.dtype, index_type: torch.dtype) -> None:
    collection = make(dtype)
    inputs = features(index_type=index_type)
    out = collection(inputs)
    assert out.shape == (BATCH, collection.output_dim) == (BATCH, 16 + 24 + 24 + 5 + 1)
    assert out.dtype == dtype
    assert_matches(out, one_by_one(collection, inputs))
    assert collection.feature_names == ("user", "item", "history", "genre", "always")
    assert torch.equal(collection(*jagged(inputs)), out)
    # The order of a mapping does not count.
    assert torch.equal(collection(dict(reversed(list(inputs.items())))), out)
    last = {name: (ids, torch.cat([o, o.new_full((1,), ids.numel())])) for name, (ids, o) in inputs.items()}
    assert torch.equal(collection(last, include_last_offset=True), out)
    matrices = {name: (torch.randint(0, rows, (4, 3)).to(index_type), None) for name, rows in SIZES.items()}
    flat = {name: (m.flatten(), torch.arange(4, dtype=index_type) * 3) for name, (m, _) in matrices.items()}
    assert torch.equal(collection(matrices), collection(flat))


def test_types_can_be_mixed_in_a_mapping(implementation: str) -> None:
    collection, inputs = make(), features()
    mixed = {
        name: (ids.int(), offsets) if number % 2 else (ids, offsets.int())
        for number, (name, (ids, offsets)) in enumerate(inputs.items())
    }
    assert torch.equal(collection(mixed), collection(inputs))


def test_batches_of_any_size(implementation: str) -> None:
    collection = make()
    for batch in (0, 1, 2, 33):
        inputs = features(batch)
        out = collection(inputs)
        assert out.shape == (batch, collection.output_dim)
        if batch:
            assert_matches(out, one_by_one(collection, inputs))
    empty = {name: (torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)) for name in SIZES}
    assert not collection(empty).any()


def test_training_step_is_that_of_separate_bags(implementation: str) -> None:
    collection, inputs = make(), features()
    bags = {
        config.name: torch.nn.EmbeddingBag.from_pretrained(
            collection.table(config.name).detach().clone(), freeze=False, mode=config.pooling
        )
        for config in collection.tables
    }
    parts = [bags[config.name](*inputs[name]) for config in collection.tables for name in config.features]
    grad = torch.randn(BATCH, collection.output_dim)
    torch.cat(parts, dim=1).backward(grad)
    collection(inputs).backward(grad)
    for name, bag in bags.items():
        assert_matches(collection.table(name).grad, bag.weight.grad)
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.5)
    optimizer.step()
    assert_matches(collection(inputs), one_by_one(collection, inputs))


@pytest.mark.parametrize("frozen", ["user", "item", "genre"])
def test_frozen_tables_get_no_gradient(implementation: str, frozen: str) -> None:
    collection = make()
    collection.table(frozen).requires_grad_(False)
    collection(features()).sum().backward()
    for config in collection.tables:
        assert (collection.table(config.name).grad is None) == (config.name == frozen)


@pytest.mark.parametrize("bits", [8, 4, {"item": 8, "user": 4}, {}])
def test_quantize(implementation: str, bits: Any) -> None:
    collection, inputs = make(), features()
    before = {name: t.clone() for name, t in collection.state_dict().items()}
    quantized = collection.eval().quantize(bits)
    assert not quantized.training
    chosen = bits if isinstance(bits, dict) else dict.fromkeys(("user", "item", "genre", "one"), bits)
    for name, bag in quantized.embedding_bags.items():
        assert isinstance(bag, rk.QuantizedEmbeddingBag) == (name in chosen)
        if name in chosen:
            assert bag.bits == chosen[name]
            assert quantized.table(name).dtype == torch.uint8
            # The lookup over one table is tested on its own; here that the collection reads the right ones.
            wanted = rk.QuantizedEmbeddingBag.from_float(collection.embedding_bags[name], chosen[name])
            assert torch.equal(bag.weight, wanted.weight)
        else:
            assert bag.weight is collection.table(name)
    out = quantized(inputs)
    assert out.dtype == torch.float32
    assert_matches(out, one_by_one(quantized, inputs))
    assert torch.equal(quantized(*jagged(inputs)), out)
    assert all(torch.equal(t, before[name]) for name, t in collection.state_dict().items())
    assert quantized.nbytes == sum(
        bag.nbytes if name in chosen else bag.weight.nbytes for name, bag in quantized.embedding_bags.items()
    )
    factors = torch.rand(jagged(inputs)[0].shape, requires_grad=True)
    loss = quantized(*jagged(inputs), factors).sum()
    loss.backward()
    nudged = factors.detach() + 0.5
    assert factors.grad is not None
    change = quantized(*jagged(inputs), nudged).sum().double() - loss.detach().double()
    assert abs(float(factors.grad.double().sum()) * 0.5 - float(change.detach())) < 1e-3


def test_quantize_again_and_unknown_names() -> None:
    quantized = make().quantize({"user": 8})
    twice = quantized.quantize(4)
    assert twice.embedding_bags["user"] is quantized.embedding_bags["user"]
    assert twice.embedding_bags["item"].bits == 4
    with pytest.raises(KeyError, match="no table 'nobody'; the tables are user, item, genre, one"):
        make().quantize({"nobody": 8})
    with pytest.raises(KeyError, match="no table 'nobody'"):
        make().table("nobody")
    with pytest.raises(ValueError, match="bits must be 8 or 4"):
        make().quantize(3)


def test_tables_of_different_types(implementation: str) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float32)
    torch.manual_seed(43)
    collection = rk.EmbeddingBagCollection(
        [
            Config(name, SIZES[name], 9 + number, weight_dtype=dtype)
            for number, (name, dtype) in enumerate(zip(("user", "item", "history", "genre"), types, strict=True))
        ]
    )
    inputs = {name: pair for name, pair in features().items() if name != "always"}
    assert collection(inputs).dtype == torch.float32
    assert_matches(collection(inputs), one_by_one(collection, inputs))
    collection(inputs).sum().backward()
    assert [collection.table(name).grad.dtype for name in collection.embedding_bags] == list(types)
    quantized = collection.quantize({"user": 8, "genre": 4})
    assert_matches(quantized(inputs), one_by_one(quantized, inputs))
    wide = rk.EmbeddingBagCollection([Config("a", 3, 4, weight_dtype=torch.float64), Config("b", 3, 4)])
    with pytest.raises(RuntimeError, match="float64 tables"):
        wide({"a": (torch.tensor([0]), torch.tensor([0])), "b": (torch.tensor([0]), torch.tensor([0]))})


# ---- state --------------------------------------------------------------------------------------------------------


def test_state_dict_names_and_round_trip(tmp_path: Path) -> None:
    collection, inputs = make(), features()
    assert list(collection.state_dict()) == [
        f"embedding_bags.{name}.weight" for name in ("user", "item", "genre", "one")
    ]
    assert [name for name, _ in collection.named_parameters()] == list(collection.state_dict())
    fresh = rk.EmbeddingBagCollection(collection.tables)
    fresh(inputs)
    fresh.load_state_dict(collection.state_dict())
    assert torch.equal(fresh(inputs), collection(inputs))
    for bits in (8, 4, {"user": 4}):
        scaled = make()
        with torch.no_grad():
            for p in scaled.parameters():
                p.mul_(1e3)
        quantized = scaled.quantize(bits)
        names = set(quantized.state_dict())
        assert {"embedding_bags.user.weight", "embedding_bags.user.scale_bias", "embedding_bags.user.exponent"} <= names
        save_file(quantized.state_dict(), tmp_path / "tables.safetensors")
        other = make().quantize(bits)
        before = other(inputs)
        other.load_state_dict(load_file(tmp_path / "tables.safetensors"))
        assert torch.equal(other(inputs), quantized(inputs))
        assert not torch.equal(before, other(inputs))


def _saved(module: torch.nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
def test_copies(how: Callable[[Any], Any], used: bool, bits: int | None) -> None:
    collection, inputs = make(), features()
    if bits is not None:
        collection = collection.quantize(bits)
    if used:
        collection(inputs)
    other = how(collection)
    wanted = collection(inputs)
    assert torch.equal(other(inputs), wanted)
    for name in other.embedding_bags:
        other.table(name).data.zero_()
    if bits is None:
        assert not other(inputs).any()
    assert torch.equal(collection(inputs), wanted)
    other.load_state_dict(collection.state_dict())
    assert torch.equal(other(inputs), wanted)


@pytest.mark.parametrize("bits", [None, 8, {"item": 4}])
def test_casts(implementation: str, bits: Any) -> None:
    collection, inputs = make(), features()
    if bits is not None:
        collection = collection.quantize(bits)
    collection(inputs)
    for cast, dtype in (
        (collection.half, torch.float16),
        (collection.float, torch.float32),
        (lambda: collection.to(torch.bfloat16), torch.bfloat16),
        (collection.float, torch.float32),
        (lambda: torch.nn.Sequential(collection).half(), torch.float16),
    ):
        cast()
        out = collection(inputs)
        assert out.dtype == dtype
        assert_matches(out, one_by_one(collection, inputs))


def scaled_bag(name: str, factor: float, bits: int | None = None) -> torch.nn.Module:
    bag = copy.deepcopy(make().embedding_bags[name])
    with torch.no_grad():
        bag.weight.mul_(factor)
    return bag if bits is None else rk.QuantizedEmbeddingBag.from_float(bag, bits)


_CHANGES: dict[str, Callable[[rk.EmbeddingBagCollection], object]] = {
    "replace a bag by a float one": lambda c: c.embedding_bags.update({"item": scaled_bag("item", 3.0)}),
    "replace a bag by an int8 one": lambda c: c.embedding_bags.update({"item": scaled_bag("item", 3e4, 8)}),
    "replace a bag by an int4 one": lambda c: c.embedding_bags.update({"genre": scaled_bag("genre", 1e-4, 4)}),
    "replace the first bag": lambda c: c.embedding_bags.update({"user": scaled_bag("user", 1e-4, 8)}),
    "set the attribute": lambda c: setattr(c.embedding_bags, "item", scaled_bag("item", 3e4, 8)),
    "load into one bag": lambda c: c.embedding_bags["item"].load_state_dict(
        scaled_bag("item", 1e5, getattr(c.embedding_bags["item"], "bits", None)).state_dict()
    ),
    "cast one bag": lambda c: c.embedding_bags["item"].half(),
    "cast all bags": lambda c: c.embedding_bags.half(),
    "change in place": lambda c: c.table("user").data.fill_(1),
}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("change", _CHANGES)
def test_changed_tables_are_seen(change: str, bits: int | None) -> None:
    """What is prepared once for all calls must be prepared again when a table changes in any way."""
    collection, inputs = make(), features()
    if bits is not None:
        collection = collection.quantize(bits)
    before = collection(inputs)
    _CHANGES[change](collection)
    out = collection(inputs)
    assert out.dtype == copy.deepcopy(collection).half().float()(inputs).dtype or out.dtype == torch.float16
    wanted = one_by_one(collection, inputs)
    assert_matches(out, wanted, torch.float16 if "cast" in change else torch.float32)
    assert "cast" in change or not torch.equal(before, out)
    kinds = {bag.dtype if isinstance(bag, rk.QuantizedEmbeddingBag) else bag.weight.dtype for bag in _bags(collection)}
    assert out.dtype == (kinds.pop() if len(kinds) == 1 else torch.float32)


def _bags(collection: rk.EmbeddingBagCollection) -> list[Any]:
    return list(collection.embedding_bags.values())


def test_replaced_parameter_is_seen() -> None:
    collection, inputs = make(), features()
    collection(inputs)
    collection.embedding_bags["item"].weight = torch.nn.Parameter(torch.ones(100, 24))
    assert_matches(collection(inputs), one_by_one(collection, inputs))
    collection(inputs).sum().backward()
    assert collection.table("item").grad is not None


def test_one_bag_in_two_places_adds_up_its_gradient() -> None:
    collection = rk.EmbeddingBagCollection([Config("a", 5, 4), Config("b", 5, 4)])
    collection.embedding_bags["b"] = collection.embedding_bags["a"]
    ids = torch.tensor([1, 1, 3, 1])
    out = collection(ids, torch.tensor([0, 2, 4]))
    assert torch.equal(out[:, :4], collection.table("a")[ids[:2]].sum(0, keepdim=True))
    out.sum().backward()
    grad = collection.table("a").grad
    assert grad is not None
    assert grad[:, 0].tolist() == [0, 3, 0, 1, 0]


def test_calls_from_several_threads_at_once() -> None:
    """Also while what is prepared for all calls is being prepared again."""
    collection, inputs = make(), features()
    wanted = collection(inputs)

    def serve(number: int) -> bool:
        for step in range(60):
            if number == 0 and step % 3 == 0:
                table = collection.embedding_bags["item"]
                table.weight = torch.nn.Parameter(table.weight.detach().clone())
            if not torch.equal(collection(inputs), wanted):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(4)))


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8])
def test_index_errors_name_table_feature_position_and_value(implementation: str, bits: int | None) -> None:
    collection, inputs = make(), features()
    if bits is not None:
        collection = collection.quantize(bits)
    ids, offsets = inputs["history"]
    bad = ids.clone()
    bad[2] = 100
    before = inputs["user"][0].numel() + inputs["item"][0].numel()
    pattern = (
        rf"index 100 at position {before + 2} of indices is out of range for table 'item' \(feature 'history'\) "
        "with 100 rows"
    )
    with pytest.raises(IndexError, match=pattern):
        collection({**inputs, "history": (bad, offsets)})
    bad[2] = -7
    flat, starts = jagged({**inputs, "history": (bad, offsets)})
    with pytest.raises(IndexError, match=rf"index -7 at position {before + 2} .*table 'item' \(feature 'history'\)"):
        collection(flat, starts)


def test_bad_input(implementation: str) -> None:
    collection, inputs = make(), features()
    flat, offsets = jagged(inputs)
    for message, error, args in (
        ("missing features: history, always", ValueError, ({k: inputs[k] for k in ("user", "item", "genre")},)),
        ("unknown features: color", ValueError, ({**inputs, "color": inputs["user"]},)),
        ("has 5 bags, but feature 'user' has 6", ValueError, ({**inputs, "genre": features(5)["genre"]},)),
        ("feature 'item' has no offsets", ValueError, ({**inputs, "item": (inputs["item"][0], None)},)),
        ("indices and offsets of feature 'item' must be 1-D", ValueError, ({**inputs, "item": (flat[None], offsets)},)),
        ("don't go with a mapping", ValueError, (inputs, offsets)),
        ("offsets must be a tensor", ValueError, (flat,)),
        ("offsets must have F\\*B\\+1 entries for F = 5 features, but has", RuntimeError, (flat, offsets[:-1])),
        ("offsets must start at 0", RuntimeError, (flat[:-1], offsets)),
        ("offsets must start at 0", RuntimeError, (flat, offsets + 1)),
        ("offsets must start at 0", RuntimeError, (flat, offsets.flip(0))),
        ("must be int32 or int64", RuntimeError, (flat.float(), offsets)),
        ("must be int32 or int64", RuntimeError, (flat, offsets.float())),
        ("per_sample_weights must have one value for each", RuntimeError, (flat, offsets, torch.ones(3))),
        ("dimension", RuntimeError, (flat[None], offsets)),
    ):
        with pytest.raises(error, match=message):
            pytest.fail(f"accepted, though {message}: {collection(*args)}")


def test_offset_errors_name_the_position_in_the_whole_argument(implementation: str) -> None:
    collection = make()
    flat, offsets = jagged(features())
    offsets[4 * BATCH + 2] = flat.numel() + 5
    with pytest.raises(RuntimeError, match=rf"offsets\[{4 * BATCH + 2}\] is {flat.numel() + 5}"):
        collection(flat, offsets)


def test_configs_are_checked() -> None:
    for message, make_it in (
        ("pooling of table 'a' must be", lambda: Config("a", 3, 4, pooling="median")),
        ("must have rows and columns", lambda: Config("a", 0, 4)),
        ("must have rows and columns", lambda: Config("a", 3, 0)),
        ("must not be empty or hold a dot", lambda: Config("a.b", 3, 4)),
        ("must not be empty or hold a dot", lambda: Config("", 3, 4)),
        ("feature_names of table 'a' must not be empty", lambda: Config("a", 3, 4, [])),
        ("at least one table", lambda: rk.EmbeddingBagCollection([])),
        ("table names must be unique", lambda: rk.EmbeddingBagCollection([Config("a", 3, 4), Config("a", 3, 4)])),
        (
            "feature names must be unique",
            lambda: rk.EmbeddingBagCollection([Config("a", 3, 4), Config("b", 3, 4, ["a"])]),
        ),
        ("feature names must be unique", lambda: rk.EmbeddingBagCollection([Config("a", 3, 4, ["x", "x"])])),
    ):
        with pytest.raises(ValueError, match=message):
            make_it()


def test_operator_checks_the_plan(isa: str) -> None:
    """What a module never does, but a caller of the operator may: it must not read or write outside of anything."""
    table, none = torch.randn(6, 4), torch.empty(0, dtype=torch.float16)
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    run = torch.ops.recsys_kernels.embedding_bag_collection
    good = [0, 4, 0, 0, 0, 0]
    assert run([table], [none], torch.tensor([good]), ids, offsets, None, 4, torch.float32).equal(table[:2])
    for column, value in ((0, 1), (0, -1), (1, 5), (1, 3), (1, -4), (2, 1), (2, -1), (3, 3), (3, -1), (4, 8), (4, 3)):
        plan = torch.tensor([good])
        plan[0, column] = value
        with pytest.raises(RuntimeError):
            pytest.fail(f"{plan} was accepted: {run([table], [none], plan, ids, offsets, None, 4, torch.float32)}")
    huge = torch.tensor([[0, 4, 2**63 - 4, 0, 0, 0]])
    for plan, scales in (
        (huge, [none]),
        (torch.tensor([good]).int(), [none]),
        (torch.zeros(0, 6, dtype=torch.int64), [none]),
        (torch.tensor(good), [none]),
        (torch.tensor([good[:5]]), [none]),
        (torch.tensor([good]), [none, none]),
        (torch.tensor([[0, 4, 0, 0, 8, 0]]), []),
    ):
        with pytest.raises(RuntimeError):
            pytest.fail(f"{plan} was accepted: {run([table], scales, plan, ids, offsets, None, 4, torch.float32)}")
    with pytest.raises(RuntimeError):
        run([table], [], torch.tensor([good]), ids, torch.zeros(0, dtype=torch.int64), None, 4, torch.float32)


@pytest.mark.parametrize("bits", [None, 8])
def test_results_do_not_depend_on_threads(isa: str, threads: None, bits: int | None) -> None:
    """A large and several small tables, so that pieces begin and end inside of tables."""
    torch.manual_seed(44)
    collection = rk.EmbeddingBagCollection(
        [Config("a", 5000, 48), Config("b", 10, 3, pooling="mean"), Config("c", 3000, 20, ["x", "y"], "max")]
    )
    if bits is not None:
        collection = collection.quantize(bits)
    batch, rows = 150, (5000, 10, 3000, 3000)
    lengths = torch.randint(0, 30, (4 * batch,))
    lengths[3] = 2500
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.cat([torch.randint(0, n, (int(lengths[f * batch :][:batch].sum()),)) for f, n in enumerate(rows)])
    factors = torch.rand(ids.numel(), requires_grad=True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = collection(ids, offsets, factors)
        wanted = [factors, *collection.parameters()]
        grads = torch.autograd.grad(out, wanted, torch.ones_like(out).cumsum(1) * 1e-2)
        results.append([out.detach(), *grads])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def _pair_of_tables(**options: Any) -> rk.EmbeddingBagCollection:
    return rk.EmbeddingBagCollection([rk.EmbeddingBagConfig(name, 6, 4) for name in ("user", "item")], **options)


def test_meta_tables_or_ids_give_no_values() -> None:
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
    for real in (_pair_of_tables(), _pair_of_tables().quantize()):
        for call in (
            lambda real=real: copy.deepcopy(real).to("meta")(ids, offsets),
            lambda real=real: real(ids.to("meta"), offsets),
            lambda real=real: real(ids, offsets.to("meta")),
            lambda real=real: real(ids, offsets, torch.ones(3, device="meta")),
        ):
            with pytest.raises(RuntimeError, match="meta"):
                call()
            with torch.no_grad(), pytest.raises(RuntimeError, match="meta"):
                call()
    on_meta = _pair_of_tables(device="meta")
    assert on_meta(ids.to("meta"), offsets.to("meta")).shape == (1, 8)


def test_lists_are_named() -> None:
    collection = _pair_of_tables()
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
    with pytest.raises(TypeError, match=r"indices must be a tensor or a mapping .* list"):
        collection([1, 2, 3], offsets)
    with pytest.raises(TypeError, match="offsets must be a tensor, but is of type list"):
        collection(ids, [0, 1, 3])
    with pytest.raises(TypeError, match="per_sample_weights must be a tensor, but is of type list"):
        collection(ids, offsets, [1.0, 1.0, 1.0])


def test_integer_rows_have_no_float64_output() -> None:
    collection = _pair_of_tables().quantize({"item": 8})
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    with pytest.raises(TypeError, match=r"table 'item'.*float64"):
        collection.double()
    assert all(torch.equal(collection.state_dict()[name], value) for name, value in before.items())
    collection.half()(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))
    assert _pair_of_tables().double()(torch.tensor([1]), torch.tensor([0, 1, 1])).dtype == torch.float64


def test_broken_scales_are_refused_by_the_name_of_their_table() -> None:
    collection = _pair_of_tables().quantize()
    state = {name: value.clone() for name, value in collection.state_dict().items()}
    state["embedding_bags.item.scale_bias"][2, 0] = -1
    with pytest.raises(RuntimeError, match=r"embedding_bags.item.scale_bias .*row 2"):
        collection.load_state_dict(state)
