"""The Triton kernels against float64 results in plain loops and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import REFERENCE, TRITON

import recsys_kernels as rk
from recsys_kernels.backends import registry
from recsys_kernels.ops.embedding_bag import autograd
from recsys_kernels.ops.embedding_bag import triton as kernels
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, SUM
from recsys_kernels.ops.embedding_bag.spec import FeaturePlan
from recsys_kernels.testing import (
    FLOAT_DTYPES,
    BagSample,
    CollectionSample,
    assert_matches,
    collection_samples,
    embedding_bag_samples,
    expected_embedding_bag,
)

SAMPLES = {dtype: embedding_bag_samples(dtype, small=True) for dtype in FLOAT_DTYPES}
# The other types are the same code but for the type: a sample of each kind.
FEW = ("width-33", "int32-int64", "matrix", "padding-0", "strided-indices", "last-offset-b", "only-empty")
# Two types differ from the others by nothing but their name: one kind.
LEAST = ("width-33", "only-empty")


def chosen(dtype: torch.dtype, keep: Callable[[BagSample], bool]) -> list[Any]:
    names = {torch.float32: ("",), torch.bfloat16: LEAST, torch.float64: LEAST}.get(dtype, FEW)
    samples = [s for s in SAMPLES[dtype] if keep(s) and s.name.startswith(names)]
    return [pytest.param(s, id=f"{s.name}-{str(dtype)[6:]}") for s in samples]


def all_samples(keep: Callable[[BagSample], bool], dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> list[Any]:
    return [param for dtype in dtypes for param in chosen(dtype, keep)]


def expected_gradients(sample: BagSample, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float64 gradients of the table and of the per-sample weights, by autograd through the plain loops."""
    weight = sample.weight.double().clone().requires_grad_()
    weights = None if sample.per_sample_weights is None else sample.per_sample_weights.double().clone().requires_grad_()
    out = expected_embedding_bag(replace(sample, weight=weight, per_sample_weights=weights))
    if not out.requires_grad:
        return torch.zeros_like(weight), None if weights is None else torch.zeros_like(weights)
    out.backward(grad.double())
    assert weight.grad is not None
    return weight.grad, None if weights is None else weights.grad


def grad_like(sample: BagSample) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    shape = (sample.num_bags, sample.weight.shape[1])
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(sample.weight.dtype)


# ---- forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", all_samples(lambda s: True))
def test_forward(sample: BagSample) -> None:
    out = TRITON.embedding_bag(*sample.args)
    assert out.dtype == sample.weight.dtype
    assert_matches(out, expected_embedding_bag(sample))


@pytest.mark.parametrize("sample", all_samples(lambda s: s.mode == MAX))
def test_max(sample: BagSample) -> None:
    args = (sample.weight, sample.indices, sample.offsets, sample.padding_idx, sample.include_last_offset)
    out, argmax = TRITON.embedding_bag_max(*args, True)
    assert_matches(out, expected_embedding_bag(sample))
    # Columns hold no equal values but in repeated rows, so that the row is the only one.
    picked = sample.weight.gather(0, argmax.clamp(min=0)) if sample.weight.shape[0] else out
    assert torch.equal(out, torch.where(argmax < 0, 0.0, picked))
    assert torch.equal(argmax, REFERENCE.embedding_bag_max(*args, True)[1])


def test_max_of_equal_and_odd_values() -> None:
    """Of equals the first row; a NaN counts where it is the first value of its bag, as in torch."""
    inf, nan = float("inf"), float("nan")
    weight = torch.tensor([[1.0, -inf, 2.0, nan], [1.0, -inf, nan, nan], [0.0, nan, 5.0, 1.0], [nan, 0.0, -0.0, inf]])
    # The last bag begins with padding and holds more rows than a tile, the first ones NaN in a column or another.
    indices = torch.tensor([2, 1, 0] + [3, 3] + [1, 0] + [4, 4, 3, 2] + [1] * 40)
    offsets = torch.tensor([0, 3, 5, 7, 7])
    weight = torch.cat([weight, torch.full((1, 4), 9.0)])
    args = (indices, offsets)
    out, argmax = TRITON.embedding_bag_max(weight, *args, 4, False, True)
    assert out[:2].nan_to_num(7.0, posinf=8.0).tolist() == [[1.0, 7.0, 5.0, 1.0], [7.0, 0.0, 0.0, 8.0]]
    assert argmax[:2].tolist() == [[1, 2, 2, 2], [3, 3, 3, 3]]
    assert out[2].tolist()[0] == 1.0
    assert out[2].isnan().tolist() == [False, False, True, True]
    assert argmax[2:].tolist() == [[1, 1, 1, 1], [-1] * 4, [3, 3, 2, 3]]
    assert out[3].tolist() == [0.0] * 4
    assert out[4].nan_to_num(7.0, posinf=8.0).tolist() == [7.0, 0.0, 5.0, 8.0]
    expected = torch.nn.functional.embedding_bag(indices, weight, offsets, mode="max", padding_idx=4)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert out.isnan().equal(expected.isnan())
    pooled = TRITON.embedding_bag(weight, *args, None, MAX, 4, False)
    assert torch.equal(pooled.nan_to_num(7.0), out.nan_to_num(7.0))
    assert pooled.isnan().equal(out.isnan())


@pytest.mark.parametrize("dim", [130, 300])
@pytest.mark.parametrize("mode", [SUM, MEAN, MAX])
def test_more_columns_than_a_block(dim: int, mode: int) -> None:
    weight = torch.randn(6, dim, generator=torch.Generator().manual_seed(1))
    sample = BagSample("", weight, torch.tensor([[5, 0, 3], [1, 1, 2]]), None, None, mode)
    assert_matches(TRITON.embedding_bag(*sample.args), expected_embedding_bag(sample))
    grad = grad_like(sample)
    table, _ = expected_gradients(sample, grad)
    if mode == MAX:
        _, argmax = TRITON.embedding_bag_max(weight, sample.indices, None, -1, False, True)
        assert_matches(autograd.max_backward(grad, argmax, 6), table)
        return
    assert_matches(TRITON.embedding_bag_backward(grad, *sample.bag_args, 6), table)
    weighted = replace(sample, per_sample_weights=torch.ones(sample.indices.shape))
    samples = TRITON.embedding_bag_weights_backward(grad, weight, sample.indices, None, mode, -1, False)
    assert_matches(samples, expected_gradients(weighted, grad)[1])


def quantized(sample: BagSample, bits: int) -> tuple[tuple[Any, ...], BagSample]:
    """A quantized table of the sample's shape and the sample with its exact values."""
    rng = torch.Generator().manual_seed(4)
    rows, dim = sample.weight.shape
    columns = dim if bits == 8 else (dim + 1) // 2
    weight = torch.randint(0, 256, (rows, columns), generator=rng, dtype=torch.uint8)
    scale_bias = torch.randn(rows, 2, generator=rng).half()
    table = (weight, scale_bias, -3, dim, bits)
    q = weight if bits == 8 else torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)[:, :dim]
    scale, bias = scale_bias.double().unbind(1)
    return table, replace(sample, weight=(q.double() * scale[:, None] + bias[:, None]) / 8)


# The bags are those of float tables, so here, too, a sample of each kind is enough.
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sample", [s for s in SAMPLES[torch.float32] if s.name.startswith(("width-1", *FEW))], ids=str)
def test_quantized(sample: BagSample, bits: int) -> None:
    table, exact = quantized(sample, bits)
    out = TRITON.quantized_embedding_bag(*table, *sample.bag_args, torch.float32)
    assert_matches(out, expected_embedding_bag(exact))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantized_output_types(dtype: torch.dtype, bits: int) -> None:
    sample = next(s for s in SAMPLES[torch.float32] if s.name == "width-33-mean-weighted")
    table, exact = quantized(sample, bits)
    out = TRITON.quantized_embedding_bag(*table, *sample.bag_args, dtype)
    assert out.dtype == dtype
    # q * scale + bias is taken in float32 before a float64 sum.
    assert_matches(out, expected_embedding_bag(exact), torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [64, 300])
def test_quantized_rows_with_their_scales_behind_them(dim: int, bits: int) -> None:
    sample = BagSample("", torch.zeros(9, dim), torch.tensor([[8, 0], [3, 3]]), None)
    (weight, scale_bias, *rest), exact = quantized(sample, bits)
    columns = weight.shape[1]
    behind = columns + columns % 2
    wide = torch.full((9, behind + 4), 255, dtype=torch.uint8)
    rows, scales = wide[:, :columns].copy_(weight), wide[:, behind:].view(torch.float16).copy_(scale_bias)
    out = TRITON.quantized_embedding_bag(rows, scales, *rest, *sample.bag_args, torch.float32)
    assert_matches(out, expected_embedding_bag(exact))
    plan, offsets = torch.tensor([[0, dim, 0, SUM, bits, -3]]), torch.tensor([0, 2, 4])
    ids = sample.indices.flatten()
    out = TRITON.embedding_bag_collection([rows], [scales], plan, ids, offsets, None, dim, torch.float32)
    assert_matches(out, expected_embedding_bag(exact))


# ---- many tables -------------------------------------------------------------------------------------------------


def expected_collection(sample: CollectionSample) -> torch.Tensor:
    parts = sample.feature_samples()
    if sample.per_sample_weights is not None:
        # The float32 weights themselves, where feature_samples gives them the table's type.
        at = [int(v) for v in sample.offsets[:: max(1, (sample.offsets.numel() - 1) // len(parts))]]
        exact = [sample.per_sample_weights[at[f] :][: p.indices.numel()] for f, p in enumerate(parts)]
        parts = [replace(p, per_sample_weights=w) for p, w in zip(parts, exact, strict=True)]
    return torch.cat([expected_embedding_bag(part) for part in parts], 1)


@pytest.mark.parametrize(
    "sample", [s for d in FLOAT_DTYPES for s in collection_samples(d)], ids=lambda s: f"{s}-{s.dtype}"
)
def test_collection(sample: CollectionSample) -> None:
    out = TRITON.embedding_bag_collection(*sample.args)
    assert out.dtype == sample.dtype
    assert_matches(out, expected_collection(sample))


def mixed_collection() -> tuple[tuple[Any, ...], torch.Tensor]:
    """Every type of row and every pooling in one call, with more widths than the kernel holds copies for."""
    rng = torch.Generator().manual_seed(5)
    kinds = [torch.float32, 8, torch.float16, 4, torch.bfloat16, 8, 4, torch.float32]
    dims, modes, batch, rows = [16, 48, 5, 33, 130, 150, 1, 64], [0, 1, 2, 1, 0, 2, 0, 1], 3, 11
    weights, scales, plan, exact, column = [], [], [], [], 0
    for table, (kind, dim, mode) in enumerate(zip(kinds, dims, modes, strict=True)):
        values = torch.randn(rows, dim, generator=rng)
        bits = kind if isinstance(kind, int) else 0
        if isinstance(kind, torch.dtype):
            weights.append(values.to(kind))
            scales.append(torch.empty(0, dtype=torch.float16))
            exact.append(weights[-1])
        else:
            (weight, scale_bias, *_), sample = quantized(BagSample("", values, torch.zeros(0), None), kind)
            weights.append(weight)
            scales.append(scale_bias)
            exact.append(sample.weight)
        plan.append(FeaturePlan(table, dim, column, mode, bits, -3 if bits else 0))
        column += dim
    count = len(kinds)
    offsets = torch.cat([torch.zeros(1), torch.randint(0, 4, (count * batch,), generator=rng).cumsum(0)]).long()
    indices = torch.randint(0, rows, (int(offsets[-1]),), generator=rng)
    sample = CollectionSample("mixed", exact, plan, indices, offsets, None, torch.float32)
    args = (weights, scales, torch.tensor([list(f) for f in plan]), indices, offsets, None, column, torch.float32)
    return args, expected_collection(sample)


def test_collection_of_every_type() -> None:
    args, expected = mixed_collection()
    assert_matches(TRITON.embedding_bag_collection(*args), expected)
    # With fewer widths each has a copy of the pooling of its own.
    weights, scales, plan, indices, offsets, _, _, dtype = args
    for chosen in ([1, 3, 6], [0, 7], [5], [2, 4]):
        part = plan[chosen].clone()
        part[:, 2] = torch.cat([torch.zeros(1), part[:-1, 1].cumsum(0)]).long()
        spans = torch.cat([offsets[f * 3 : f * 3 + 4].diff() for f in chosen]).cumsum(0)
        own = torch.cat([indices[offsets[f * 3] : offsets[f * 3 + 3]] for f in chosen])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), spans])
        out = TRITON.embedding_bag_collection(weights, scales, part, own, bounds, None, int(part[:, 1].sum()), dtype)
        columns = torch.cat([torch.arange(int(plan[f, 2]), int(plan[f, 2] + plan[f, 1])) for f in chosen])
        assert_matches(out, expected[:, columns])


def test_tables_may_change_between_calls() -> None:
    args, expected = mixed_collection()
    assert_matches(TRITON.embedding_bag_collection(*args), expected)
    args[0][0].mul_(2.0)
    assert_matches(TRITON.embedding_bag_collection(*args)[:, :16], expected[:, :16] * 2.0)
    args[0][0] = args[0][0].clone() * 2.0
    assert_matches(TRITON.embedding_bag_collection(*args)[:, :16], expected[:, :16] * 4.0)


@pytest.mark.parametrize("change", [(0, 99), (0, -1), (1, 17), (1, -1), (2, 10**6), (3, 3), (4, 8), (4, 5)])
def test_plan_that_does_not_fit(change: tuple[int, int]) -> None:
    args, _ = mixed_collection()
    plan = args[2].clone()
    plan[0, change[0]] = change[1]
    with pytest.raises(RuntimeError, match="plan row 0 does not fit"):
        TRITON.embedding_bag_collection(*args[:2], plan, *args[3:])


# ---- gradients ---------------------------------------------------------------------------------------------------


# Left out: what differs in the table alone, and a row of 200 indices that the chunks below share out in less time.
ELSEWHERE = ("strided-table", "transposed-table", "same-index")


@pytest.mark.parametrize(
    "sample",
    all_samples(lambda s: s.mode != MAX and not s.name.endswith("mean-weighted") and not s.name.startswith(ELSEWHERE)),
)
def test_backward(sample: BagSample) -> None:
    grad = grad_like(sample)
    out = TRITON.embedding_bag_backward(grad, *sample.bag_args, sample.weight.shape[0])
    assert out.dtype == grad.dtype
    assert_matches(out, expected_gradients(sample, grad)[0])


@pytest.mark.parametrize("name", ["width-16-mean-weighted", "padding-6-sum", "all-padding-sum", "same-index-mean"])
@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_backward_of_rows_that_span_chunks(monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(kernels, "_CHUNK", chunk * 2)  # sums of sums of sums: 40 positions in chunks of 4
    sample = next(s for s in SAMPLES[torch.float64] if s.name == name)
    grad = grad_like(sample)
    out = TRITON.embedding_bag_backward(grad, *sample.bag_args, sample.weight.shape[0])
    assert_matches(out, expected_gradients(sample, grad)[0])


@pytest.mark.parametrize("sample", all_samples(lambda s: s.per_sample_weights is not None))
def test_weights_backward(sample: BagSample) -> None:
    grad = grad_like(sample)
    args = (sample.weight, sample.indices, sample.offsets, sample.mode, sample.padding_idx, sample.include_last_offset)
    out = TRITON.embedding_bag_weights_backward(grad, *args)
    assert out.shape == sample.indices.shape
    assert_matches(out, expected_gradients(sample, grad)[1])


def test_backward_keeps_infinities_in_their_rows() -> None:
    grad = torch.tensor([[1.0, 2.0], [float("inf"), float("nan")], [3.0, 4.0]])
    indices = torch.tensor([[0, 1], [2, 2], [1, 3]])
    out = TRITON.embedding_bag_backward(grad, indices, None, None, SUM, -1, False, 5)
    assert out[[0, 1, 3, 4]].tolist() == [[1.0, 2.0], [4.0, 6.0], [3.0, 4.0], [0.0, 0.0]]
    assert out[2, 0] == float("inf")
    assert out[2, 1].isnan()
    weight = torch.ones(5, 2)
    samples = TRITON.embedding_bag_weights_backward(grad, weight, indices, None, SUM, 2, False)
    assert samples.tolist() == [[3.0, 3.0], [0.0, 0.0], [7.0, 7.0]]


def test_backward_of_a_part_of_the_offsets() -> None:
    """A collection passes one feature's offsets with all indices: the others' may be of no row of this table."""
    indices = torch.tensor([99, 99, 1, 2, 1, 99])
    grad = torch.tensor([[1.0], [10.0]])
    for bounds in (torch.tensor([2, 3, 5]), torch.tensor([2, 3, 5], dtype=torch.int32)):
        out = TRITON.embedding_bag_backward(grad, indices, bounds, None, SUM, -1, True, 3)
        assert out.tolist() == [[0.0], [11.0], [10.0]]
        samples = TRITON.embedding_bag_weights_backward(grad, torch.ones(3, 1), indices, bounds, SUM, -1, True)
        assert samples.tolist() == [0.0, 0.0, 1.0, 10.0, 10.0, 0.0]
        _, argmax = TRITON.embedding_bag_max(torch.arange(3.0).reshape(3, 1), indices, bounds, -1, True, False)
        assert argmax.tolist() == [[1], [2]]


def test_expanded_gradient() -> None:
    """What sum() hands back: one element with strides of zero."""
    indices = torch.tensor([[0, 1], [1, 1]])
    grad = torch.tensor(2.0).expand(2, 20)
    out = TRITON.embedding_bag_backward(grad, indices, None, None, SUM, -1, False, 2)
    assert torch.equal(out, torch.tensor([[2.0], [6.0]]).expand(2, 20))
    samples = TRITON.embedding_bag_weights_backward(grad, torch.ones(2, 20), indices, None, SUM, -1, False)
    assert torch.equal(samples, torch.full((2, 2), 40.0))


# ---- through the public surface ----------------------------------------------------------------------------------


@pytest.fixture
def calls_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that ran on Triton."""
    names: list[str] = []

    def watch(name: str) -> None:
        operator = registry.operators[name]
        run = operator.triton
        monkeypatch.setitem(operator.__dict__, "triton", lambda *args: (names.append(name), run(*args))[1])

    for name in ("embedding_bag", "embedding_bag_max", "embedding_bag_backward", "embedding_bag_weights_backward"):
        watch(name)
    watch("quantized_embedding_bag")
    watch("embedding_bag_collection")
    return names


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_module(mode: str, calls_seen: list[str]) -> None:
    bag = rk.EmbeddingBag(20, 12, mode=mode, padding_idx=3)
    plain = torch.nn.EmbeddingBag(20, 12, mode=mode, padding_idx=3)
    plain.load_state_dict(bag.state_dict())
    indices, offsets = torch.randint(0, 20, (30,)), torch.tensor([0, 4, 4, 20])
    weights = torch.rand(30) if mode == "sum" else None
    with rk.backend("triton"):
        out = bag(indices, offsets, weights)
        (out * out).sum().backward()
        with torch.no_grad():
            assert torch.equal(bag(indices, offsets, weights), out)
    expected = plain(indices, offsets, weights)
    (expected * expected).sum().backward()
    assert_matches(out, expected)
    assert_matches(bag.weight.grad, plain.weight.grad)
    # The maximum's gradient, too, is summed by the operator whose order is certain, as on a GPU.
    wanted = {"embedding_bag", "embedding_bag_backward"}
    assert set(calls_seen) == (wanted | {"embedding_bag_max"} if mode == "max" else wanted)


def test_functional_gradient_of_weights(calls_seen: list[str]) -> None:
    weight = torch.randn(9, 6, requires_grad=True)
    factors = torch.rand(4, 3, requires_grad=True)
    indices = torch.randint(0, 9, (4, 3))
    with rk.backend("triton"):
        rk.functional.embedding_bag(indices, weight, mode="sum", per_sample_weights=factors).exp().sum().backward()
    ours, weight.grad, own, factors.grad = weight.grad, None, factors.grad, None
    torch.nn.functional.embedding_bag(indices, weight, mode="sum", per_sample_weights=factors).exp().sum().backward()
    assert_matches(ours, weight.grad)
    assert_matches(own, factors.grad)
    assert set(calls_seen) == {"embedding_bag", "embedding_bag_backward", "embedding_bag_weights_backward"}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_modules(bits: int, calls_seen: list[str]) -> None:
    bag = torch.nn.EmbeddingBag(20, 13, mode="mean")
    embedding = torch.nn.Embedding.from_pretrained(bag.weight.detach())
    indices = torch.randint(0, 20, (5, 4))
    ours = rk.QuantizedEmbeddingBag.from_float(bag, bits)
    rows = rk.QuantizedEmbedding.from_float(embedding, bits)
    with rk.backend("reference"):
        expected, expected_rows = ours(indices), rows(indices)
    with rk.backend("triton"):
        out, out_rows = ours(indices), rows(indices)
    assert_matches(out, expected)
    assert_matches(out_rows, expected_rows)
    assert calls_seen == ["quantized_embedding_bag"] * 2


def test_collection_module(calls_seen: list[str]) -> None:
    tables = [
        rk.EmbeddingBagConfig("user", 30, 16, ["viewer", "owner"], "sum"),
        rk.EmbeddingBagConfig("item", 12, 7, ["item"], "mean"),
        rk.EmbeddingBagConfig("word", 50, 32, ["word"], "max"),
    ]
    collection = rk.EmbeddingBagCollection(tables)
    offsets = torch.cat([torch.zeros(1), torch.randint(0, 4, (12,)).cumsum(0)]).long()
    indices = torch.randint(0, 12, (int(offsets[-1]),))
    results = {}
    for name in ("reference", "triton"):
        collection.zero_grad()
        with rk.backend(name):
            out = collection(indices, offsets)
            out.square().sum().backward()
            mixed = collection.quantize({"item": 8, "word": 4})(indices, offsets).detach()
        results[name] = [out, mixed, *(p.grad.clone() for p in collection.parameters())]
    for ours, expected in zip(results["triton"], results["reference"], strict=True):
        assert_matches(ours, expected)
    assert {"embedding_bag_collection", "embedding_bag_backward", "embedding_bag_max"} <= set(calls_seen)
