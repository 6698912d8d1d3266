"""Tangents, higher derivatives and functorch's transforms of embedding bags, against plain torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import recsys_kernels as rk
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM = 7, 3
IDS = torch.tensor([1, 2, 2, 6, 0, 1, 4])
OFFSETS = torch.tensor([0, 3, 3, 5])
RNG = torch.Generator().manual_seed(31)
WEIGHT = torch.randn(ROWS, DIM, generator=RNG, dtype=torch.float64)
FACTORS = torch.randn(IDS.shape, generator=RNG, dtype=torch.float64)
UPSTREAM = torch.randn(4, DIM, generator=RNG, dtype=torch.float64)
CASES = [("sum", False, None), ("sum", True, 2), ("mean", False, 2), ("mean", True, None), ("max", False, 2)]


@pytest.fixture(autouse=True)
def _without_the_warning_about_loops() -> Iterator[None]:
    # vmap says that it runs an operator once for each entry.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ours(weight: torch.Tensor, factors: torch.Tensor | None, mode: str, padding_idx: int | None) -> torch.Tensor:
    return rk.functional.embedding_bag(
        IDS, weight, OFFSETS, mode=mode, per_sample_weights=factors, padding_idx=padding_idx
    )


def plain(weight: torch.Tensor, factors: torch.Tensor | None, mode: str, padding_idx: int | None) -> torch.Tensor:
    """Bag by bag with torch's indexing."""
    bags = []
    for begin, end in zip(OFFSETS.tolist(), [*OFFSETS.tolist()[1:], IDS.numel()], strict=True):
        positions = [p for p in range(begin, end) if int(IDS[p]) != padding_idx]
        if not positions:
            bags.append(weight.sum(0) * 0)
            continue
        rows = weight[IDS[positions]]
        if mode == "max":
            bags.append(rows.amax(0))
            continue
        if factors is not None:
            rows = rows * factors[positions].unsqueeze(1)
        bags.append(rows.mean(0) if mode == "mean" else rows.sum(0))
    return torch.stack(bags)


Bag = Callable[[torch.Tensor, torch.Tensor | None, str, "int | None"], torch.Tensor]


def curved(bag: Bag, mode: str, padding_idx: int | None, weighted: bool) -> Callable[..., torch.Tensor]:
    """A scalar with second derivatives in both arguments."""

    def f(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return (bag(weight, factors if weighted else None, mode, padding_idx).pow(3) * UPSTREAM).sum()

    return f


def same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple):
        assert len(got) == len(wanted)
        for one, two in zip(got, wanted, strict=True):
            same(one, two)
        return
    assert wanted.abs().max() > 0
    assert_matches(got, wanted)


@pytest.mark.parametrize(("mode", "weighted", "padding_idx"), CASES)
def test_tangents(implementation: str, mode: str, weighted: bool, padding_idx: int | None) -> None:
    tangents = (torch.randn_like(WEIGHT), torch.randn_like(FACTORS))

    def tangent_of(bag: Bag) -> list[torch.Tensor]:
        def f(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
            return bag(weight, factors if weighted else None, mode, padding_idx)

        found = [jvp(f, (WEIGHT, FACTORS), tangents)[1]]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, t) for v, t in zip((WEIGHT, FACTORS), tangents, strict=True)]
            found.append(forward_ad.unpack_dual(f(*duals)).tangent)
            trained = forward_ad.make_dual(WEIGHT.clone().requires_grad_(), tangents[0])
            found.append(forward_ad.unpack_dual(f(trained, FACTORS)).tangent)
        if weighted:
            found.append(jvp(lambda v: f(WEIGHT, v), (FACTORS,), tangents[1:])[1])
        return found

    for got, wanted in zip(tangent_of(ours), tangent_of(plain), strict=True):
        same(got.detach(), wanted.detach())


@pytest.mark.parametrize(("mode", "weighted", "padding_idx"), CASES)
def test_transforms(implementation: str, mode: str, weighted: bool, padding_idx: int | None) -> None:
    got, wanted = (curved(bag, mode, padding_idx, weighted) for bag in (ours, plain))
    of = (0, 1) if weighted else 0
    for transform in (grad, jacfwd, jacrev):
        same(transform(got, argnums=of)(WEIGHT, FACTORS), transform(wanted, argnums=of)(WEIGHT, FACTORS))
    same(vjp(got, WEIGHT, FACTORS)[1](torch.tensor(2.0).double())[0], 2 * grad(wanted)(WEIGHT, FACTORS))
    twice = grad(lambda w, f: vmap(got, (0, None))(torch.stack([w, w + 1]), f).sum())  # vmap within grad
    twice_wanted = grad(lambda w, f: wanted(w, f) + wanted(w + 1, f))
    same(twice(WEIGHT, FACTORS), twice_wanted(WEIGHT, FACTORS))
    many = torch.stack([WEIGHT, WEIGHT.flip(0), WEIGHT + 1])
    same(vmap(grad(got), (0, None))(many, FACTORS), vmap(grad(wanted), (0, None))(many, FACTORS))
    same(vmap(got, (0, None))(many, FACTORS), vmap(wanted, (0, None))(many, FACTORS))


@pytest.mark.parametrize(("mode", "weighted", "padding_idx"), CASES)
def test_second_derivatives(implementation: str, mode: str, weighted: bool, padding_idx: int | None) -> None:
    got, wanted = (curved(bag, mode, padding_idx, weighted) for bag in (ours, plain))
    of = (0, 1) if weighted else 0
    expected = hessian(wanted, argnums=of)(WEIGHT, FACTORS)
    same(hessian(got, argnums=of)(WEIGHT, FACTORS), expected)
    same(jacrev(jacrev(got, argnums=of), argnums=of)(WEIGHT, FACTORS), expected)

    def penalty(f: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs = [WEIGHT.clone().requires_grad_(), FACTORS.clone().requires_grad_()][: 1 + weighted]
        first = torch.autograd.grad(f(inputs[0], inputs[-1]), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    same(penalty(got), penalty(wanted))


def test_gradcheck_of_the_second_order() -> None:
    inputs = WEIGHT.clone().requires_grad_(), FACTORS.clone().requires_grad_()
    for mode in ("sum", "mean"):
        assert torch.autograd.gradgradcheck(lambda w, f, mode=mode: ours(w, f, mode, 2), inputs)
        assert torch.autograd.gradcheck(lambda w, f, mode=mode: ours(w, f, mode, 2), inputs, check_forward_ad=True)


def test_gradients_for_each_sample_agree_with_torch(implementation: str) -> None:
    """As per-sample gradients of private training take them."""
    batch = torch.tensor([[1, 2], [3, 3], [6, 0]])
    bags = [c.from_pretrained(WEIGHT, mode="mean", freeze=False) for c in (rk.EmbeddingBag, torch.nn.EmbeddingBag)]

    def gradients(bag: torch.nn.Module) -> torch.Tensor:
        def loss(parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(bag, parameters, (ids.unsqueeze(0),)).square().sum()

        return vmap(grad(loss), (None, 0))(dict(bag.named_parameters()), batch)["weight"]

    same(gradients(bags[0]), gradients(bags[1]))


# ---- quantized tables and collections -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_quantized_tables_differentiate_their_weights(implementation: str, mode: str) -> None:
    bag = torch.nn.EmbeddingBag.from_pretrained(WEIGHT.float(), mode=mode, padding_idx=2)
    quantized = rk.QuantizedEmbeddingBag.from_float(bag)
    rows = quantized.dequantize().double()
    factors, change = FACTORS.float(), torch.randn(FACTORS.shape)

    def got(f: torch.Tensor) -> torch.Tensor:
        return quantized(IDS, OFFSETS, f)

    def wanted(f: torch.Tensor) -> torch.Tensor:
        return plain(rows, f.double(), mode, 2)

    same(jvp(got, (factors,), (change,))[1], jvp(wanted, (factors,), (change,))[1])
    same(jacrev(got)(factors), jacrev(wanted)(factors))
    same(jacfwd(got)(factors), jacfwd(wanted)(factors))
    cubes = [lambda f, g=g: (g(f).pow(3) * UPSTREAM).sum().float() for g in (got, wanted)]
    same(hessian(cubes[0])(factors), hessian(cubes[1])(factors))


def _collection(dtype: torch.dtype = torch.float64) -> tuple[rk.EmbeddingBagCollection, tuple[torch.Tensor, ...]]:
    torch.manual_seed(3)
    tables = [
        rk.EmbeddingBagConfig("user", ROWS, DIM, ["user", "friend"]),
        rk.EmbeddingBagConfig("item", 4, 2, pooling="mean"),
        rk.EmbeddingBagConfig("word", 5, 2, pooling="max"),
    ]
    offsets = torch.tensor([0, 2, 3, 3, 5, 6, 8, 9, 11])
    ids = torch.tensor([1, 6, 2, 0, 3, 1, 3, 2, 2, 4, 1])
    return rk.EmbeddingBagCollection(tables, weight_dtype=dtype), (ids, offsets, torch.rand(11, dtype=dtype))


def plain_collection(
    tables: dict[str, torch.Tensor], ids: torch.Tensor, offsets: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """The bags of that collection, one after the other, with torch's indexing."""
    out = []
    for number, (table, mode) in enumerate((("user", "sum"), ("user", "sum"), ("item", "mean"), ("word", "max"))):
        weight = tables[table]
        for bag in range(2):
            at = slice(int(offsets[2 * number + bag]), int(offsets[2 * number + bag + 1]))
            rows = weight[ids[at]] if mode == "max" else weight[ids[at]] * factors[at].unsqueeze(1)
            if rows.shape[0] == 0:
                out.append(weight.sum(0) * 0)
            else:
                out.append({"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0)}[mode])
    return torch.cat(out)


def test_collections_have_all_derivatives(implementation: str) -> None:
    collection, (ids, offsets, factors) = _collection()
    weights = {name: value.detach() for name, value in collection.named_parameters()}

    def got(values: dict[str, torch.Tensor], f: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(collection, values, (ids, offsets, f)).pow(3).sum()

    def wanted(values: dict[str, torch.Tensor], f: torch.Tensor) -> torch.Tensor:
        tables = {name: values[f"embedding_bags.{name}.weight"] for name in ("user", "item", "word")}
        return plain_collection(tables, ids, offsets, f).pow(3).sum()

    def flat(result: Any) -> list[torch.Tensor]:
        return [t for t in torch.utils._pytree.tree_leaves(result) if t.abs().max() > 0]

    for transform in (grad, jacfwd, jacrev, hessian):
        found, expected = (flat(transform(f, argnums=(0, 1))(weights, factors)) for f in (got, wanted))
        assert len(found) == len(expected) >= 4
        for one, two in zip(found, expected, strict=True):
            assert_matches(one, two)
    tangents = ({name: torch.randn_like(value) for name, value in weights.items()}, torch.randn_like(factors))
    same(jvp(got, (weights, factors), tangents)[1], jvp(wanted, (weights, factors), tangents)[1])

    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}

    def penalty(f: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(f(leaves, factors), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    same(penalty(got), penalty(wanted))


def test_collections_of_integer_rows_have_tangents(implementation: str) -> None:
    collection, (ids, offsets, factors) = _collection(torch.float32)
    quantized = collection.quantize()
    tables = {name: quantized.embedding_bags[name].dequantize().double() for name in ("user", "item", "word")}
    change = torch.randn(factors.shape)

    def got(f: torch.Tensor) -> torch.Tensor:
        return quantized(ids, offsets, f).pow(3).sum()

    def wanted(f: torch.Tensor) -> torch.Tensor:
        return plain_collection(tables, ids, offsets, f).pow(3).sum()

    exact = jvp(wanted, (factors.double(),), (change.double(),))[1]
    same(jvp(got, (factors,), (change,))[1], exact)
    same(jacrev(got)(factors), jacrev(wanted)(factors.double()))


# ---- compiled ------------------------------------------------------------------------------------------------------


def _trained(bag: torch.nn.Module, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    bag.zero_grad()
    out = bag(*args)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    found = bag.weight.grad
    assert isinstance(found, torch.Tensor)
    return out.detach(), found


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sparse_gradients_compile(mode: str, padding_idx: int | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(5)
    bag = rk.EmbeddingBag(ROWS, DIM, mode=mode, sparse=True, padding_idx=padding_idx)
    compiled = torch.compile(bag, fullgraph=True, backend="aot_eager")
    all_padding = (torch.full_like(IDS, 2), OFFSETS)
    calls = [(IDS, OFFSETS), all_padding, (IDS[:6].reshape(2, 3),), (IDS, OFFSETS, FACTORS.float())]
    for call in calls:
        wanted_out, wanted = _trained(bag, *call)
        out, found = _trained(compiled, *call)
        assert wanted.is_sparse
        assert found.is_sparse
        assert_matches(out, wanted_out)
        assert_matches(found.to_dense(), wanted.to_dense())


def test_sparse_gradients_compile_with_a_last_offset() -> None:
    """Indices behind the last offset belong to no bag."""
    torch._dynamo.reset()
    bag = rk.EmbeddingBag(ROWS, DIM, sparse=True, include_last_offset=True)
    compiled = torch.compile(bag, fullgraph=True, backend="aot_eager")
    for last in (5, IDS.numel()):
        call = (IDS, torch.tensor([0, 3, 3, last]))
        wanted, found = _trained(bag, *call)[1], _trained(compiled, *call)[1]
        assert_matches(found.to_dense(), wanted.to_dense())
        assert set(found.coalesce().indices()[0].tolist()) == set(wanted.coalesce().indices()[0].tolist())


def test_small_index_types_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rk.functional.embedding_bag, fullgraph=True, backend="aot_eager")
    weight = WEIGHT.float()
    assert_matches(compiled(IDS.to(torch.int8), weight, OFFSETS), F.embedding_bag(IDS, weight, OFFSETS))


def test_a_collection_is_copied_after_a_transform() -> None:
    """The collection keeps no table of a transform, which cannot be copied once the transform has ended."""
    collection = rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("a", 10, 8)])
    name, weight = next(iter(collection.named_parameters()))
    args = torch.tensor([1, 2]), torch.tensor([0, 1, 2])
    torch.func.jacrev(lambda table: torch.func.functional_call(collection, {name: table}, args))(weight.detach())
    copied = copy.deepcopy(collection)
    torch.testing.assert_close(copied(*args), collection(*args))
