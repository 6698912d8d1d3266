"""The CUDA C++ embedding bag, emulated, against float64 results in plain loops and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import REFERENCE, named

import recsys_kernels as rk
from recsys_kernels.ops.embedding_bag import reference
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, SUM
from recsys_kernels.ops.embedding_bag.spec import FeaturePlan, QuantizedTable
from recsys_kernels.testing import (
    FLOAT_DTYPES,
    BagSample,
    CollectionSample,
    assert_matches,
    collection_samples,
    embedding_bag_samples,
    expected_embedding_bag,
)

from .support import Emulation

EMPTY = torch.empty(0, dtype=torch.float16)


@functools.cache
def samples(dtype: torch.dtype) -> list[BagSample]:
    return embedding_bag_samples(dtype)


@functools.cache
def expected(dtype: torch.dtype) -> list[torch.Tensor]:
    return [expected_embedding_bag(sample) for sample in samples(dtype)]


def upstream(sample: BagSample) -> torch.Tensor:
    rng = torch.Generator().manual_seed(23)
    shape = (sample.num_bags, sample.weight.shape[1])
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(sample.weight.dtype)


def float64_gradients(sample: BagSample) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the table and of the per-sample weights, by autograd through the plain loops."""
    weight = sample.weight.double().clone().requires_grad_()
    factors = sample.per_sample_weights
    factors = None if factors is None else factors.double().clone().requires_grad_()
    out = expected_embedding_bag(replace(sample, weight=weight, per_sample_weights=factors))
    if out.requires_grad:
        out.backward(upstream(sample).double())
    grads = [None if t is None else t.grad if t.grad is not None else torch.zeros_like(t) for t in (weight, factors)]
    assert grads[0] is not None
    return grads[0], grads[1]


@functools.cache
def expected_gradients(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [float64_gradients(sample) for sample in samples(dtype)]


@pytest.fixture(autouse=True)
def _nothing_found(kernels: Emulation) -> Iterator[None]:
    """No kernel has found anything wrong that a test did not ask for."""
    yield
    assert kernels.take_fault() is None


# ---- every sample ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_forward(kernels: Emulation, seed: int, dtype: torch.dtype) -> None:
    kernels.seed(seed)
    run = kernels.operator("embedding_bag")
    for sample, result in zip(samples(dtype), expected(dtype), strict=True):
        with named(sample):
            out = run(*sample.args)
            assert out.dtype == dtype
            assert_matches(out, result)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_max(kernels: Emulation, seed: int, dtype: torch.dtype) -> None:
    kernels.seed(seed)
    run = kernels.operator("embedding_bag_max")
    for sample in samples(dtype):
        if sample.mode != MAX:
            continue
        with named(sample):
            args = (sample.weight, sample.indices, sample.offsets, sample.padding_idx, sample.include_last_offset, True)
            # Max pooling rounds nothing.
            for ours, theirs in zip(run(*args), REFERENCE.embedding_bag_max(*args), strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_backward(kernels: Emulation, seed: int, dtype: torch.dtype) -> None:
    kernels.seed(seed)
    run = kernels.operator("embedding_bag_backward")
    run_weights = kernels.operator("embedding_bag_weights_backward")
    for sample, (grad_weight, grad_factors) in zip(samples(dtype), expected_gradients(dtype), strict=True):
        if sample.mode == MAX:
            continue
        with named(sample):
            out = run(upstream(sample), *sample.bag_args, sample.weight.shape[0])
            assert out.dtype == dtype
            assert_matches(out, grad_weight)
            if grad_factors is None:
                continue
            bags = (sample.indices, sample.offsets, sample.mode, sample.padding_idx, sample.include_last_offset)
            out = run_weights(upstream(sample), sample.weight, *bags)
            assert out.dtype == dtype
            assert_matches(out, grad_factors)


def expected_collection(sample: CollectionSample) -> torch.Tensor:
    parts, begin = [], 0
    for part in sample.feature_samples():
        end = begin + part.indices.numel()
        if part.per_sample_weights is not None:  # not rounded to the type of a 16-bit table
            assert sample.per_sample_weights is not None
            part = replace(part, per_sample_weights=sample.per_sample_weights[begin:end])
        parts.append(expected_embedding_bag(part))
        begin = end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_collection(kernels: Emulation, seed: int, dtype: torch.dtype) -> None:
    kernels.seed(seed)
    run = kernels.operator("embedding_bag_collection")
    for sample in collection_samples(dtype):
        with named(sample):
            out = run(*sample.args)
            assert out.dtype == sample.dtype
            assert_matches(out, expected_collection(sample))


# ---- quantized rows ----------------------------------------------------------------------------------------------

# One vector of 16 bytes of each, several, one lane too many for a warp, odd numbers of halves.
QUANTIZED_WIDTHS = (1, 2, 3, 4, 8, 13, 15, 16, 31, 32, 48, 64, 100, 127, 128, 300, 1040)


def quantized_table(rows: int, dim: int, bits: int, fused: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bytes, and scales and biases beside the rows, or behind each of them in the same memory."""
    rng = torch.Generator().manual_seed(dim)
    columns = dim if bits == 8 else (dim + 1) // 2
    weight = torch.randint(0, 256, (rows, columns), generator=rng, dtype=torch.uint8)
    scale_bias = torch.randn(rows, 2, generator=rng).half()
    if not fused:
        return weight, scale_bias
    memory = torch.empty(rows, (columns + 1) // 2 * 2 + 4, dtype=torch.uint8)
    memory[:, :columns] = weight
    memory[:, -4:] = scale_bias.view(torch.uint8)
    return memory[:, :columns], memory.view(torch.float16)[:, -2:]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(kernels: Emulation, seed: int, bits: int) -> None:
    kernels.seed(seed)
    run = kernels.operator("quantized_embedding_bag")
    rng = torch.Generator().manual_seed(24)
    indices = torch.randint(0, 30, (90,), generator=rng)
    offsets, weights = torch.tensor([0, 0, 3, 3, 70]), torch.randn(90, generator=rng)
    for dim in QUANTIZED_WIDTHS:
        for fused in (False, True):
            table = quantized_table(30, dim, bits, fused)
            for number, mode in enumerate((SUM, MEAN, MAX)):
                dtype = FLOAT_DTYPES[(dim + number) % 4]
                ids, factors = indices.int() if fused else indices, None if mode == MAX else weights
                args = (*table, -3, dim, bits, ids, offsets, factors, mode, 5, False)
                with named((dim, fused, mode, dtype)):
                    out = run(*args, dtype)
                    assert out.dtype == dtype
                    exact = REFERENCE.quantized_embedding_bag(*args, torch.float64)
                    assert_matches(out, exact, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_long_bags_of_quantized_rows(kernels: Emulation, seed: int, bits: int) -> None:
    """The sums of scale * q and of the biases, each many times the result, must not be apart until the end."""
    kernels.seed(seed)
    dim, rng = 512, torch.Generator().manual_seed(35)  # a warp a row, so that no groups share the bag
    weight, scale_bias = quantized_table(50, dim, bits)
    scale_bias[:, 0] = 1 + torch.rand(50, generator=rng)
    scale_bias[:, 1] = scale_bias[:, 0] * (-127.5 if bits == 8 else -7.5)
    indices = torch.randint(0, 50, (1, 6000), generator=rng)
    args = (weight, scale_bias, 0, dim, bits, indices, None, None, SUM, -1, False)
    out = kernels.operator("quantized_embedding_bag")(*args, torch.float32)
    rows = reference.dequantize_rows(QuantizedTable(weight, scale_bias, 0, dim, bits)).double()
    exact = rows[indices[0]].sum(0, keepdim=True)
    error = ((out - exact).abs().max() / exact.abs().max()).item()
    assert error < 2e-5  # 8e-6; apart until the end 6.5e-5


def mixed_tables() -> tuple[list[torch.Tensor], list[torch.Tensor], list[FeaturePlan]]:
    """Tables of every type that can stand side by side; some of their columns begin at odd places of the output."""
    rng = torch.Generator().manual_seed(25)
    weights: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    features: list[FeaturePlan] = []
    column = 0
    kinds = [(torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 0), (torch.uint8, 8), (torch.uint8, 4)]
    for dim in (32, 16, 3, 48, 1, 160):
        for kind, (dtype, bits) in enumerate(kinds):
            if bits:
                weight, scale = quantized_table(20, dim, bits)
            else:
                weight, scale = torch.randn(20, dim, generator=rng).to(dtype), EMPTY
            mode = (SUM, MEAN, MAX)[(dim + kind) % 3]
            features.append(FeaturePlan(len(weights), dim, column, mode, bits, 2 if bits else 0))
            column += dim
            weights.append(weight)
            scales.append(scale)
    return weights, scales, features


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:3], ids=str)
@pytest.mark.parametrize("repeat", [1, 5])
def test_tables_of_all_types(kernels: Emulation, seed: int, dtype: torch.dtype, repeat: int) -> None:
    """In one launch, or, with more than 64 tables, in several."""
    kernels.seed(seed)
    weights, scales, features = mixed_tables()
    weights, scales = weights * repeat, scales * repeat
    width = sum(f.dim for f in features)
    features = [
        f._replace(table=f.table + 30 * r, column=f.column + width * r) for r in range(repeat) for f in features
    ][::-1]
    rng = torch.Generator().manual_seed(26)
    lengths = torch.randint(0, 5, (len(features) * 4,), generator=rng)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.randint(0, 20, (int(offsets[-1]),), generator=rng)
    plan = torch.tensor([list(f) for f in features])
    args = (weights, scales, plan, indices, offsets, torch.randn(indices.shape, generator=rng), width * repeat)
    before = kernels.launches()
    out = kernels.operator("embedding_bag_collection")(*args, dtype)
    assert kernels.launches() - before == -(-len(weights) // 64)
    assert_matches(out, REFERENCE.embedding_bag_collection(*args, torch.float32), dtype)


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_alignments(kernels: Emulation, seed: int, dtype: torch.dtype) -> None:
    """Rows that begin at any element, any number of elements apart: wide, narrow and single loads."""
    kernels.seed(seed)
    rng = torch.Generator().manual_seed(27)
    memory = torch.randn(4000, generator=rng, dtype=torch.float64).to(dtype)
    indices, offsets = torch.randint(0, 6, (30,), generator=rng), torch.tensor([0, 4, 4, 21])
    for dim in (16, 64, 132, 260, 520):
        for start in (0, 1, 2, 4, 8):
            for stride in (dim, dim + 1, dim + 2, dim + 12):
                weight = memory.as_strided((6, dim), (stride, 1), start)
                with named((dim, start, stride)):
                    sample = BagSample("", weight, indices, offsets, None, MEAN)
                    assert_matches(kernels.operator("embedding_bag")(*sample.args), expected_embedding_bag(sample))
                    grad = memory.as_strided((4, dim), (stride, 1), start)
                    out = kernels.operator("embedding_bag_backward")(grad, *sample.bag_args, 6)
                    exact = REFERENCE.embedding_bag_backward(grad.double(), indices, offsets, None, MEAN, -1, False, 6)
                    assert_matches(out, exact)


def test_rows_of_many_tiles(kernels: Emulation, seed: int) -> None:
    kernels.seed(seed)
    for dim in (4096, 4099):
        weight = torch.randn(5, dim)
        for mode in (SUM, MAX):
            sample = BagSample("", weight, torch.tensor([[0, 3, 3], [4, 1, 2]]), None, None, mode)
            assert_matches(kernels.operator("embedding_bag")(*sample.args), expected_embedding_bag(sample))
        grad = torch.randn(2, dim)
        out = kernels.operator("embedding_bag_backward")(grad, *replace(sample, mode=SUM).bag_args, 5)
        assert torch.equal(out, torch.stack([grad[0], grad[1], grad[1], grad[0] * 2, grad[1]]))


@pytest.mark.parametrize("mode", [SUM, MEAN, MAX])
def test_bags_of_many_lengths(kernels: Emulation, seed: int, mode: int) -> None:
    """Few long bags are shared by the groups of a team, many bags take a group each: in both a warp's bags differ."""
    kernels.seed(seed)
    rng = torch.Generator().manual_seed(28)
    for dim, num_bags, longest in ((4, 5, 300), (16, 40, 100), (64, 3, 90), (128, 7, 40), (1, 70, 70), (8, 2, 1000)):
        lengths = torch.randint(0, longest, (num_bags,), generator=rng)
        lengths[::3] = 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        indices = torch.randint(0, 50, (int(offsets[-1]),), generator=rng)
        weights = None if mode == MAX else torch.randn(indices.shape, generator=rng)
        weight = torch.randn(50, dim, generator=rng)
        sample = BagSample("", weight, indices, offsets, weights, mode, 7, True)
        with named((dim, num_bags, longest)):
            assert_matches(kernels.operator("embedding_bag")(*sample.args), expected_embedding_bag(sample))


@pytest.mark.parametrize("lengths", ["ones", "ones and zeros", "a few longer"])
def test_bags_of_one_row(kernels: Emulation, seed: int, lengths: str) -> None:
    """Many of them, which groups take several at once; and a bag among them that has more."""
    kernels.seed(seed)
    rng = torch.Generator().manual_seed(33)
    count = torch.ones(301, dtype=torch.int64)
    if lengths != "ones":
        count[torch.randint(0, 301, (60,), generator=rng)] = 0
    if lengths == "a few longer":
        count[[7, 100, 300]] = torch.tensor([2, 40, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    size = int(offsets[-1])
    indices, weights = torch.randint(0, 20, (size,), generator=rng), torch.randn(size, generator=rng)
    kinds = [(dtype, 0) for dtype in FLOAT_DTYPES] + [(torch.uint8, 8), (torch.uint8, 4)]
    for dim in (4, 8, 16, 64, 128, 256, 1056):
        for dtype, bits in kinds:
            bags = (indices, offsets, weights.to(dtype) if not bits else weights, MEAN, 6, True)
            with named((dim, dtype, bits)):
                if bits:
                    args = (*quantized_table(20, dim, bits), 3, dim, bits, *bags, torch.float32)
                    out = kernels.operator("quantized_embedding_bag")(*args)
                    assert_matches(out, REFERENCE.quantized_embedding_bag(*args))
                else:
                    weight = torch.randn(20, dim, generator=rng).to(dtype)
                    out = kernels.operator("embedding_bag")(weight, *bags)
                    assert_matches(out, expected_embedding_bag(BagSample("", weight, *bags)))


def test_nan_and_infinity(kernels: Emulation, seed: int) -> None:
    """As in torch: of a maximum's rows a NaN stays when it is the first. A row that does not count spoils nothing."""
    kernels.seed(seed)
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[nan, -inf], [1.0, -inf], [2.0, nan], [inf, inf]]).repeat(1, 8)
    bags = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 1], [1, 1, 1]])
    for dim in (1, 2, 16):
        args = (weight[:, :dim], bags, None, -1, False, True)
        theirs = REFERENCE.embedding_bag_max(*args)
        for ours, other in zip(kernels.operator("embedding_bag_max")(*args), theirs, strict=True):
            assert torch.equal(ours.nan_to_num(99.0), other.nan_to_num(99.0))
        out = kernels.operator("embedding_bag")(weight[:, :dim], bags, None, None, MAX, -1, False)
        assert torch.equal(out.nan_to_num(99.0), theirs[0].nan_to_num(99.0))
        # Row 3 is padding, with an infinite weight; the second bag's weights are infinite, the first bag's are not.
        weights = torch.tensor([[1.0, inf, 1.0], [inf, 1.0, inf]])
        rows = torch.ones(4, dim)
        rows[3] = inf
        ids = torch.tensor([[1, 3, 1], [1, 1, 1]])
        out = kernels.operator("embedding_bag")(rows, ids, None, weights, SUM, 3, False)
        assert torch.equal(out, torch.tensor([[2.0], [inf]]).expand(2, dim))
        grad = torch.tensor([[1.0], [2.0]]).expand(2, dim)
        out = kernels.operator("embedding_bag_weights_backward")(grad, rows, ids, None, SUM, 3, False)
        assert torch.equal(out, torch.tensor([[1.0, 0.0, 1.0], [2.0, 2.0, 2.0]]) * dim)


# ---- gradients of rows that occur often --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40, 5000])
def test_hot_rows(kernels: Emulation, seed: int, rows: int, dtype: torch.dtype) -> None:
    """Runs of equal rows within a chunk, over several, and over the chunks of chunks."""
    kernels.seed(seed)
    rng = torch.Generator().manual_seed(29)
    run = kernels.operator("embedding_bag_backward")
    for count, dim in ((32, 8), (33, 5), (2049, 3), (9000, 1)):
        indices = torch.randint(0, rows, (count,), generator=rng)
        indices[count // 3 : count // 2] = rows - 1
        offsets = torch.randint(0, count, (60,), generator=rng).sort().values
        offsets[0] = 0
        grad = torch.randint(-2, 3, (60, dim), generator=rng).to(dtype)  # sums of them are exact
        args = (indices, offsets, None, SUM, 0, False, rows)
        with named((count, dim)):
            exact = REFERENCE.embedding_bag_backward(grad.double(), *args)
            assert torch.equal(run(grad, *args), exact.to(dtype))


def test_same_bits_in_every_order(kernels: Emulation) -> None:
    rng = torch.Generator().manual_seed(30)
    indices = torch.randint(0, 5, (700,), generator=rng)
    offsets = torch.tensor([0, 3, 300])
    weight, grad = torch.randn(5, 24, generator=rng), torch.randn(3, 24, generator=rng)
    every: dict[str, tuple[Any, ...]] = {
        "embedding_bag": (weight, indices, offsets, None, SUM, -1, False),
        "embedding_bag_backward": (grad, indices, offsets, None, MEAN, -1, False, 5),
        "embedding_bag_weights_backward": (grad, weight, indices, offsets, SUM, -1, False),
    }
    for name, args in every.items():
        results = []
        for seed in range(6):
            kernels.seed(seed)
            results.append(kernels.operator(name)(*args))
        assert all(torch.equal(result, results[0]) for result in results)


# ---- modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_module(emulated: Emulation, mode: str) -> None:
    bag = rk.EmbeddingBag(20, 12, mode=mode, padding_idx=3)
    plain = torch.nn.EmbeddingBag(20, 12, mode=mode, padding_idx=3)
    plain.load_state_dict(bag.state_dict())
    indices, offsets = torch.randint(0, 20, (30,)), torch.tensor([0, 4, 4, 20])
    weights = torch.rand(30) if mode == "sum" else None
    out, theirs = bag(indices, offsets, weights), plain(indices, offsets, weights)
    out.square().sum().backward()
    theirs.square().sum().backward()
    assert_matches(out, theirs)
    assert bag.weight.grad is not None
    assert plain.weight.grad is not None
    assert_matches(bag.weight.grad, plain.weight.grad)


def test_gradient_of_weights(emulated: Emulation) -> None:
    weight, factors = torch.randn(9, 6, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    indices = torch.randint(0, 9, (4, 3))
    results = []
    for run in (rk.functional.embedding_bag, torch.nn.functional.embedding_bag):
        out = run(indices, weight, mode="sum", per_sample_weights=factors)
        results.append([out, *torch.autograd.grad(out.exp().sum(), (weight, factors))])
    for ours, theirs in zip(*results, strict=True):
        assert_matches(ours, theirs)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_modules(kernels: Emulation, seed: int, bits: int) -> None:
    bag = rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag(20, 13, mode="sum"), bits)
    rows = rk.QuantizedEmbedding.from_float(torch.nn.Embedding(20, 13), bits)
    indices, weights = torch.randint(0, 20, (5, 4)), torch.rand(5, 4, requires_grad=True)

    def results() -> list[torch.Tensor]:
        out = bag(indices, None, weights)
        return [bag(indices), rows(indices), out, *torch.autograd.grad(out.square().sum(), weights)]

    with rk.backend("reference"):
        theirs = results()
    kernels.seed(seed)
    with kernels.active():
        ours = results()
    for a, b in zip(ours, theirs, strict=True):
        assert_matches(a, b)


def test_collection_module(kernels: Emulation, seed: int) -> None:
    tables = [
        rk.EmbeddingBagConfig("user", 30, 16, ["viewer", "owner"], "sum"),
        rk.EmbeddingBagConfig("item", 12, 7, ["item"], "mean"),
        rk.EmbeddingBagConfig("word", 50, 32, ["word"], "max"),
    ]
    collection = rk.EmbeddingBagCollection(tables)
    offsets = torch.cat([torch.zeros(1), torch.randint(0, 4, (12,)).cumsum(0)]).long()
    indices = torch.randint(0, 12, (int(offsets[-1]),))
    weights = torch.rand(indices.shape, requires_grad=True)

    def results() -> list[torch.Tensor]:
        out = collection(indices, offsets, weights)
        mixed = collection.quantize({"item": 8, "word": 4})(indices, offsets).detach()
        return [out, mixed, *torch.autograd.grad(out.square().sum(), [weights, *collection.parameters()])]

    with rk.backend("reference"):
        theirs = results()
    kernels.seed(seed)
    with kernels.active():
        ours = results()
    for a, b in zip(ours, theirs, strict=True):
        assert_matches(a, b)
