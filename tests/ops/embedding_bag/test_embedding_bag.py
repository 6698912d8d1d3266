"""The embedding bag over one float table: values, gradients, and what torch.nn.EmbeddingBag does."""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import named

import recsys_kernels as rk
from recsys_kernels import testing
from recsys_kernels.ops.embedding_bag import autograd
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, MODES
from recsys_kernels.testing import BagSample, assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = testing.FLOAT_DTYPES
MODE_NAMES = {number: name for name, number in MODES.items()}
ops = torch.ops.recsys_kernels
_IDS, _OFFSETS = torch.tensor([1, 2, 3]), torch.tensor([0, 2])


@functools.cache
def samples(dtype: torch.dtype) -> list[BagSample]:
    return testing.embedding_bag_samples(dtype)


@functools.cache
def expected(dtype: torch.dtype) -> list[torch.Tensor]:
    return [testing.expected_embedding_bag(sample) for sample in samples(dtype)]


def bag_of_position(sample: BagSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that count and the bag of each, found position by position."""
    flat = sample.indices.reshape(-1).tolist()
    if sample.offsets is None:
        length = sample.indices.shape[1]
        bounds = [bag * length for bag in range(sample.num_bags + 1)]
    else:
        bounds = sample.offsets.tolist() + ([] if sample.include_last_offset else [len(flat)])
    found = [
        (position, bag)
        for bag in range(sample.num_bags)
        for position in range(bounds[bag], bounds[bag + 1])
        if flat[position] != sample.padding_idx
    ]
    pairs = torch.tensor(found, dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def upstream(sample: BagSample) -> torch.Tensor:
    rng = torch.Generator().manual_seed(22)
    return torch.randn(sample.num_bags, sample.weight.shape[1], generator=rng).to(sample.weight.dtype)


def float64_gradients(sample: BagSample) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the table and the per-sample weights by torch's autograd in float64."""
    weight = sample.weight.double().clone().requires_grad_()
    grad = upstream(sample).double()
    if sample.mode == MAX:
        offsets = sample.offsets
        if offsets is None:  # torch refuses a matrix without columns
            offsets = torch.arange(sample.num_bags) * sample.indices.shape[1]
        out = F.embedding_bag(
            sample.indices.reshape(-1),
            weight,
            offsets,
            mode="max",
            include_last_offset=sample.include_last_offset,
            padding_idx=None if sample.padding_idx < 0 else sample.padding_idx,
        )
        return torch.autograd.grad(out, weight, grad)[0], None
    position, bag = bag_of_position(sample)
    rows = weight[sample.indices.reshape(-1).long()[position]]
    factors = None
    if sample.per_sample_weights is not None:
        factors = sample.per_sample_weights.double().clone().requires_grad_()
        rows = rows * factors.reshape(-1)[position].unsqueeze(1)
    out = torch.zeros(sample.num_bags, weight.shape[1], dtype=torch.float64).index_add(0, bag, rows)
    if sample.mode == MEAN:
        out = out / torch.bincount(bag, minlength=sample.num_bags).clamp(min=1).unsqueeze(1)
    if factors is None:
        return torch.autograd.grad(out, weight, grad)[0], None
    grads = torch.autograd.grad(out, (weight, factors), grad)
    return grads[0], grads[1]


@functools.cache
def expected_gradients(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [float64_gradients(sample) for sample in samples(dtype)]


def run_with_gradients(sample: BagSample, sparse: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same through recsys_kernels.functional."""
    weight = sample.weight.detach().requires_grad_()
    factors = sample.per_sample_weights
    factors = None if factors is None else factors.detach().requires_grad_()
    out = rk.functional.embedding_bag(
        sample.indices,
        weight,
        sample.offsets,
        mode=MODE_NAMES[sample.mode],
        sparse=sparse,
        per_sample_weights=factors,
        include_last_offset=sample.include_last_offset,
        padding_idx=None if sample.padding_idx < 0 else sample.padding_idx,
    )
    grads = torch.autograd.grad(out, [weight] + ([] if factors is None else [factors]), upstream(sample))
    return grads[0], grads[1] if factors is not None else None


# ---- values and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(implementation: str, dtype: torch.dtype) -> None:
    assert len(samples(dtype)) > 200
    for sample, result in zip(samples(dtype), expected(dtype), strict=True):
        with named(sample):
            args = sample.args
            padding = None if sample.padding_idx < 0 else sample.padding_idx
            out = rk.functional.embedding_bag(
                sample.indices,
                sample.weight,
                sample.offsets,
                mode=MODE_NAMES[sample.mode],
                per_sample_weights=sample.per_sample_weights,
                include_last_offset=sample.include_last_offset,
                padding_idx=padding,
            )
            assert out.dtype == dtype
            assert_matches(out, result)
            if implementation != "reference":
                assert torch.equal(out, ops.embedding_bag(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(implementation: str, dtype: torch.dtype) -> None:
    for sample, (grad_weight, grad_factors) in zip(samples(dtype), expected_gradients(dtype), strict=True):
        with named(sample):
            actual_weight, actual_factors = run_with_gradients(sample)
            assert actual_weight.dtype == dtype
            assert_matches(actual_weight, grad_weight)
            if grad_factors is not None:
                assert actual_factors is not None
                assert actual_factors.dtype == dtype
                assert_matches(actual_factors, grad_factors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_gradients(implementation: str, dtype: torch.dtype) -> None:
    for sample, (grad_weight, grad_factors) in zip(samples(dtype), expected_gradients(dtype), strict=True):
        if sample.mode == MAX:
            continue
        with named(sample):
            actual, factors = run_with_gradients(sample, sparse=True)
            assert actual.is_sparse
            assert actual.shape == sample.weight.shape
            assert actual.dtype == dtype
            # Rows are added up after they were rounded, so that the sum is taken in float64 here.
            assert_matches(actual.double().to_dense(), grad_weight, dtype)
            if grad_factors is not None:
                assert factors is not None
                assert_matches(factors, grad_factors)


def test_optimizer_steps_on_sparse_gradients() -> None:
    ours, theirs = (
        rk.EmbeddingBag(50, 8, sparse=True, mode="sum"),
        torch.nn.EmbeddingBag(50, 8, sparse=True, mode="sum"),
    )
    theirs.load_state_dict(ours.state_dict())
    bags = torch.randint(0, 50, (6, 4))
    for module in (ours, theirs):
        optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(bags).square().sum().backward()
            optimizer.step()
    assert_matches(ours.weight, theirs.weight)


def test_expanded_gradient(implementation: str) -> None:
    """The gradient of a plain sum has no strides: kernels that read it as a matrix must not trust its memory."""
    weight = torch.randn(9, 17, requires_grad=True)
    bags = torch.randint(0, 9, (5, 3))
    rk.functional.embedding_bag(bags, weight, mode="sum").sum().backward()
    count = torch.bincount(bags.flatten(), minlength=9).float()
    assert weight.grad is not None
    assert torch.equal(weight.grad, count.unsqueeze(1).expand(9, 17))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradcheck(implementation: str, mode: str, padding_idx: int | None) -> None:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(9, generator=rng, dtype=torch.float64, requires_grad=True)
    indices, offsets = torch.tensor([0, 2, 2, 6, 1, 1, 3, 2, 5]), torch.tensor([0, 3, 3, 8])

    def run(w: torch.Tensor, f: torch.Tensor | None = None) -> torch.Tensor:
        return rk.functional.embedding_bag(
            indices, w, offsets, mode=mode, per_sample_weights=f, padding_idx=padding_idx
        )

    assert torch.autograd.gradcheck(run, (weight,))
    if mode != "max":
        assert torch.autograd.gradcheck(run, (weight, factors))


# ---- max ------------------------------------------------------------------------------------------------------------


def test_max_of_equal_values_takes_the_first(implementation: str) -> None:
    weight = torch.tensor([[1.0, 5.0, -0.0], [2.0, 5.0, 0.0], [2.0, 4.0, 0.0]], requires_grad=True)
    bags = torch.tensor([[0, 1, 2], [2, 1, 0]])
    out = rk.functional.embedding_bag(bags, weight, mode="max")
    assert out.tolist() == [[2.0, 5.0, 0.0], [2.0, 5.0, 0.0]]
    grad = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    out.backward(grad)
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 10.0, 100.0], [1.0, 20.0, 0.0], [2.0, 0.0, 200.0]]
    theirs = weight.detach().clone().requires_grad_()
    F.embedding_bag(bags, theirs, mode="max").backward(grad)
    assert torch.equal(weight.grad, theirs.grad)


def test_max_of_infinities_and_nan_is_that_of_torch(implementation: str) -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([[-inf, inf, nan, 1.0], [-inf, 2.0, 3.0, nan], [-inf, nan, 4.0, 2.0]])
    for bags in (torch.tensor([[0, 1, 2]]), torch.tensor([[1, 0, 2], [2, 1, 0]]), torch.tensor([[1], [2]])):
        ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
        out = rk.functional.embedding_bag(bags, ours, mode="max")
        wanted = F.embedding_bag(bags, theirs, mode="max")
        assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0)), (bags, out, wanted)
        out.backward(torch.ones_like(out))
        wanted.backward(torch.ones_like(wanted))
        assert torch.equal(ours.grad, theirs.grad)


def test_argmax_names_rows(implementation: str) -> None:
    from recsys_kernels.backends import selection

    weight = torch.tensor([[3.0, 1.0], [2.0, 9.0], [4.0, 0.0]])
    run = selection.implementation("embedding_bag_max", weight)
    out, argmax = run(weight, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2]), -1, False, True)
    assert out.tolist() == [[3.0, 9.0], [0.0, 0.0], [4.0, 0.0]]
    assert argmax.tolist() == [[0, 1], [-1, -1], [2, 2]]
    out, argmax = run(weight, torch.tensor([2, 1, 0]), torch.tensor([0]), 2, False, True)
    assert argmax.tolist() == [[0, 1]]


@pytest.mark.parametrize("most_rows", [1 << 40, 7 * 9 + 2, 4 * 9 + 2, 9 + 2, 1])
def test_gradient_of_max_in_parts_of_columns(
    implementation: str, monkeypatch: pytest.MonkeyPatch, most_rows: int
) -> None:
    """Elements of a table can be more than a GPU's operators count, where they are what is summed."""
    monkeypatch.setattr(autograd, "_MOST_ROWS", most_rows)
    widths = []
    by_element = autograd._max_backward_by_element

    def watched(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append(grad.shape[1])
        return by_element(grad, *rest)

    monkeypatch.setattr(autograd, "_max_backward_by_element", watched)
    rng = torch.Generator().manual_seed(41)
    table, grad = torch.randn(9, 7, generator=rng), torch.randn(6, 7, generator=rng)
    indices, offsets = torch.tensor([3, 0, 8, 8, 2, 5, 5, 1]), torch.tensor([0, 2, 2, 3, 5, 7, 8])
    grads = []
    for lookup in (rk.functional.embedding_bag, F.embedding_bag):
        weight = table.clone().requires_grad_()
        out = lookup(indices, weight, offsets, mode="max", include_last_offset=True)
        torch.use_deterministic_algorithms(lookup is rk.functional.embedding_bag)
        try:
            grads += torch.autograd.grad(out, weight, grad)
        finally:
            torch.use_deterministic_algorithms(False)
    assert_matches(*grads, torch.float32)
    width = {1 << 40: 7, 7 * 9 + 2: 7, 4 * 9 + 2: 4, 9 + 2: 1, 1: 1}[most_rows]
    assert widths == [min(width, 7 - first) for first in range(0, 7, width)]


# ---- beyond torch -----------------------------------------------------------------------------------------------


def test_weighted_mean_divides_by_the_size_of_the_bag(implementation: str) -> None:
    weight = torch.tensor([[1.0], [10.0], [100.0]], requires_grad=True)
    factors = torch.tensor([2.0, 3.0, 5.0, 7.0], requires_grad=True)
    out = rk.functional.embedding_bag(
        torch.tensor([0, 1, 2, 1]), weight, torch.tensor([0, 3]), per_sample_weights=factors, padding_idx=2
    )
    assert out.tolist() == [[(2 * 1 + 3 * 10) / 2], [7 * 10]]
    out.sum().backward()
    assert weight.grad is not None
    assert factors.grad is not None
    assert weight.grad.tolist() == [[1.0], [8.5], [0.0]]
    assert factors.grad.tolist() == [0.5, 5.0, 0.0, 10.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rows_are_summed_in_float32(implementation: str, dtype: torch.dtype) -> None:
    """4096 ones and then ones that a 16-bit sum would lose; gradients of a row used 5000 times likewise."""
    weight = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    bags = torch.zeros(1, 5000, dtype=torch.int64)
    out = rk.functional.embedding_bag(bags, weight, mode="sum")
    assert out.tolist() == torch.full((1, 3), 5000.0).to(dtype).tolist()
    rk.functional.embedding_bag(bags.t(), weight, mode="sum").sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == torch.full((1, 3), 5000.0).to(dtype).tolist()


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads(isa: str, threads: None, dtype: torch.dtype, mode: str) -> None:
    """Bags of very different lengths, some longer than a thread's share, so that the work really is split."""
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 30, (400,), generator=rng)
    lengths[17], lengths[200:260] = 6000, 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    indices = (torch.rand(total, generator=rng).square() * 3000).long()
    weight = torch.randn(3000, 40, generator=rng, dtype=torch.float64).to(dtype)
    factors = torch.randn(total, generator=rng, dtype=torch.float64).to(dtype) if mode != "max" else None
    sample = BagSample("threads", weight, indices, offsets, factors, MODES[mode], 5, True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append((ops.embedding_bag(*sample.args), *run_with_gradients(sample)))
    # A wrong split would be off by whole rows; sums of 6000 float32 numbers are off by some 3e-6.
    loose = dtype if dtype != torch.float32 else torch.float16
    assert_matches(results[0][0], testing.expected_embedding_bag(sample), loose)
    assert_matches(results[0][1], float64_gradients(sample)[0], loose)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)


def test_first_bad_index_is_named_with_several_threads(threads: None) -> None:
    torch.set_num_threads(2)
    indices = torch.zeros(20_000, dtype=torch.int64)
    indices[12_345], indices[700] = 99, -3
    with pytest.raises(
        IndexError, match="index -3 at position 700 of indices is out of range for a table with 10 rows"
    ):
        rk.functional.embedding_bag(indices.reshape(-1, 10), torch.randn(10, 16))


# ---- edges -------------------------------------------------------------------------------------------------------


def test_table_is_not_changed_and_results_are_fresh(implementation: str) -> None:
    weight = torch.randn(6, 4)
    before = weight.clone()
    bags = torch.randint(0, 6, (3, 2))
    one, two = (rk.functional.embedding_bag(bags, weight) for _ in range(2))
    one.zero_()
    assert torch.equal(weight, before)
    assert not torch.equal(one, two)


def test_no_bags_but_indices(implementation: str) -> None:
    """Indices that no bag holds: nothing comes out and the gradient is zero, as in torch."""
    for offsets, last in ((torch.tensor([0]), True), (torch.zeros(0, dtype=torch.int64), False)):
        for mode in MODES:
            weight = torch.randn(5, 4, requires_grad=True)
            factors = torch.randn(3, requires_grad=True) if mode != "max" else None
            out = rk.functional.embedding_bag(
                _IDS, weight, offsets, mode=mode, per_sample_weights=factors, include_last_offset=last
            )
            assert out.shape == (0, 4)
            out.sum().backward()
            assert weight.grad is not None
            assert not weight.grad.any()
            assert factors is None or not factors.grad.any()


def test_tables_without_rows_or_columns(implementation: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for mode in MODES:
        weight = torch.randn(0, 3, requires_grad=True)
        out = rk.functional.embedding_bag(none, weight, torch.zeros(2, dtype=torch.int64), mode=mode)
        assert out.tolist() == [[0.0] * 3] * 2
        out.sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == (0, 3)
        with pytest.raises(IndexError, match="with 0 rows"):
            rk.functional.embedding_bag(_IDS, weight, _OFFSETS, mode=mode)
        wide = torch.randn(5, 0, requires_grad=True)
        out = rk.functional.embedding_bag(_IDS, wide, _OFFSETS, mode=mode)
        assert out.shape == (2, 0)
        out.sum().backward()
        assert wide.grad is not None
        assert wide.grad.shape == (5, 0)


@pytest.mark.parametrize("mode", MODES)
def test_table_beyond_4_gib(isa: str, mode: str) -> None:
    """Rows whose place does not fit into 32 bits. Only the pages of two rows are ever touched."""
    rows, dim = (1 << 20) + 100, 1024
    weight = torch.empty(rows, dim)
    weight[0], weight[-1] = 1.0, 5.0
    out = rk.functional.embedding_bag(torch.tensor([[rows - 1, 0, rows - 1]]), weight, mode=mode)
    assert_matches(out, torch.full((1, dim), {"sum": 11.0, "mean": 11.0 / 3, "max": 5.0}[mode]))


def test_calls_from_several_threads_at_once(isa: str) -> None:
    """A server answers requests from a pool of threads; the kernels run without the interpreter's lock."""
    bag, ids = rk.EmbeddingBag(2000, 48, mode="sum"), [torch.randint(0, 2000, (40, 30)) for _ in range(4)]
    wanted = [bag(i) for i in ids]

    def serve(number: int) -> bool:
        return all(torch.equal(bag(ids[number]), wanted[number]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(4)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back_after_results_and_errors(isa: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    weight, good = torch.randn(1000, 256), torch.randint(0, 1000, (1000, 2))
    bad = good.clone()
    bad[-1, -1] = 1000

    def calls(count: int) -> None:
        for _ in range(count):
            ops.embedding_bag(weight, good, None, None, 0, -1, False)
            with contextlib.suppress(IndexError):
                ops.embedding_bag(weight, bad, None, None, 0, -1, False)

    calls(20)
    before = resident()
    calls(300)  # of a megabyte each
    assert resident() - before < 50 << 20
