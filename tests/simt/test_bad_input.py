"""Wrong arguments to the emulated CUDA C++ embedding bag: the reference's errors, later, and no access elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import REFERENCE, named

from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, SUM
from recsys_kernels.testing import assert_matches

from .support import Emulation

EMPTY = torch.empty(0, dtype=torch.float16)


@pytest.fixture(autouse=True)
def _nothing_found(kernels: Emulation) -> Iterator[None]:
    """No kernel has found anything wrong that a test did not ask for."""
    yield
    assert kernels.take_fault() is None


def calls(indices: torch.Tensor, offsets: torch.Tensor | None, padding: int = -1) -> dict[str, tuple[Any, ...]]:
    """The arguments of every operator for the same lookups in 7 rows of 6 columns."""
    rng = torch.Generator().manual_seed(31)
    weight, scales = torch.randn(7, 6, generator=rng), torch.randn(7, 2, generator=rng).half()
    quantized = torch.randint(0, 256, (7, 6), generator=rng, dtype=torch.uint8)
    num_bags = indices.shape[0] if offsets is None else offsets.numel() - 1
    grad, last = torch.randn(num_bags, 6, generator=rng), offsets is not None
    bags = (indices, offsets, None, MEAN, padding, last)
    all_calls: dict[str, tuple[Any, ...]] = {
        "embedding_bag": (weight, *bags),
        "embedding_bag_max": (weight, indices, offsets, padding, last, True),
        "embedding_bag_backward": (grad, *bags, 7),
        "embedding_bag_weights_backward": (grad, weight, indices, offsets, MEAN, padding, last),
        "quantized_embedding_bag": (quantized, scales, 0, 6, 8, *bags, torch.float32),
    }
    if offsets is not None and padding < 0:
        plan = torch.tensor([[0, 6, 0, SUM, 0, 0], [1, 6, 6, MEAN, 8, 0]])
        all_calls["embedding_bag_collection"] = (
            [weight, quantized], [EMPTY, scales], plan, indices, offsets, None, 12, torch.float32,
        )  # fmt: skip
    return all_calls


NAMES = tuple(calls(torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)))
OFFSETS = torch.tensor([0, 2, 5, 5, 8])


def reference_error(name: str, args: tuple[Any, ...]) -> tuple[type[Exception], str]:
    with pytest.raises((IndexError, RuntimeError)) as caught:
        getattr(REFERENCE, name)(*args)
    return caught.type, str(caught.value)


def assert_raised_later(kernels: Emulation, name: str, args: tuple[Any, ...]) -> None:
    """By the check, in the reference's words; or by the next call, which has nothing wrong itself."""
    kind, message = reference_error(name, args)
    kernels.operator(name)(*args)
    with pytest.raises(kind) as caught:
        kernels.check_bounds()
    assert str(caught.value) == message
    kernels.check_bounds()  # only once
    kernels.operator(name)(*args)
    good = calls(torch.zeros(8, dtype=torch.int64), OFFSETS)["embedding_bag"]
    # Nothing of this package's Python runs in a direct call.
    with pytest.raises(IndexError if issubclass(kind, IndexError) else kind) as caught:
        kernels.operator("embedding_bag")(*good)
    assert str(caught.value) == f"{message} (found by an earlier call)"
    kernels.operator("embedding_bag")(*good)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_index(kernels: Emulation, seed: int, name: str) -> None:
    kernels.seed(seed)
    for bad in (7, -1, 1 << 40, -(1 << 62), -(1 << 31)):
        indices = torch.tensor([0, 6, 2, 3, 1, bad, 0, 4])
        assert_raised_later(kernels, name, calls(indices, OFFSETS)[name])
        if name != "embedding_bag_collection":
            assert_raised_later(kernels, name, calls(indices.reshape(2, 4), None)[name])
    small = torch.tensor([0, 6, 2, 3, 1, (1 << 31) - 1, 0, 4], dtype=torch.int32)
    assert_raised_later(kernels, name, calls(small, OFFSETS.int())[name])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_offset(kernels: Emulation, seed: int, name: str) -> None:
    kernels.seed(seed)
    # One of them wrong in each, since any of several may be found first.
    for offsets in ([0, 3, 2, 8, 8], [0, 3, 4, 4, 9], [0, -1, 4, 4, 8], [0, 4, 4, 4, 1 << 40], [-4, 0, 0, 0, 8]):
        indices = torch.arange(8) % 6
        assert_raised_later(kernels, name, calls(indices, torch.tensor(offsets))[name])
        if max(offsets) < 1 << 31:
            assert_raised_later(kernels, name, calls(indices.int(), torch.tensor(offsets, dtype=torch.int32))[name])
    if name not in ("embedding_bag_backward", "embedding_bag_weights_backward"):
        assert_raised_later(kernels, name, calls(torch.arange(6), torch.tensor([1, 2, 3, 4, 5]))[name])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_offset_without_indices(kernels: Emulation, seed: int, name: str) -> None:
    """A lookup of nothing, in which offsets go beyond it; its gradients look at them, too."""
    kernels.seed(seed)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert_raised_later(kernels, name, calls(nothing, torch.tensor([0, 0, 0, 0, 3]))[name])
    kernels.operator(name)(*calls(nothing, torch.zeros(5, dtype=torch.int64))[name])


def test_faults_after_faults(kernels: Emulation, seed: int) -> None:
    """Of many wrong indices one is written down, whole; the next one only after it was read."""
    kernels.seed(seed)
    for number in range(5):
        wrong = torch.arange(64).reshape(8, 8) + 7 + 100 * number
        kernels.operator("embedding_bag")(*calls(wrong, None)["embedding_bag"])
        fault = kernels.take_fault()
        assert fault is not None
        assert fault.value == fault.position + 7 + 100 * number
        assert kernels.take_fault() is None


def test_table_without_rows(kernels: Emulation, seed: int) -> None:
    kernels.seed(seed)
    args = (torch.ones(0, 6), torch.tensor([0]), torch.tensor([0, 0, 1]), None, MEAN, -1, True)
    assert_raised_later(kernels, "embedding_bag", args)
    grad = (torch.ones(2, 6), *args[1:], 0)
    assert_raised_later(kernels, "embedding_bag_backward", grad)


@pytest.fixture(params=["raise", "clamp", "ignore"])
def mode(request: pytest.FixtureRequest, kernels: Emulation) -> Iterator[str]:
    kernels._select_bounds_check(request.param)
    yield request.param
    kernels._select_bounds_check("raise")


@pytest.mark.parametrize("name", NAMES)
def test_what_wrong_indices_count_for(kernels: Emulation, seed: int, mode: str, name: str) -> None:
    """Clamped they are the nearest row; else they are absent, as padding is."""
    kernels.seed(seed)
    bad = torch.tensor([0, 6, -3, 3, 1, 1 << 33, 5, 7, 6, 2])
    offsets = torch.tensor([0, 2, 5, 5, 10])
    if name == "embedding_bag_collection" and mode != "clamp":  # knows no padding
        keep = torch.tensor([0, 6, 3, 1, 5, 6, 2])
        good = calls(keep, torch.tensor([0, 2, 4, 4, 7]))[name]
    elif mode == "clamp":
        good = calls(bad.clamp(0, 6), offsets)[name]
    else:
        good = calls(torch.where((bad < 0) | (bad > 6), 4, bad), offsets, 4)[name]
    ours = kernels.operator(name)(*calls(bad, offsets)[name])
    theirs = getattr(REFERENCE, name)(*good)
    for a, b in zip(*([ours], [theirs]) if isinstance(ours, torch.Tensor) else (ours, theirs), strict=True):
        assert_matches(a, b, torch.float32)
    fault = kernels.take_fault()
    assert (fault is not None) == (mode == "raise")
    if fault is not None:
        assert bad[fault.position] == fault.value
        assert fault.value in (-3, 1 << 33, 7)


@pytest.mark.parametrize("name", NAMES[:5])
def test_what_wrong_offsets_count_for(kernels: Emulation, seed: int, mode: str, name: str) -> None:
    """Clamped to what there is and not below the one before; else the bags beside them are empty."""
    kernels.seed(seed)
    indices = torch.arange(8) % 6
    cases = [
        ([0, 3, 5, 100], [(0, 3), (3, 5), (5, 8)], [(0, 3), (3, 5), (0, 0)]),
        ([0, 8, 100, 9], [(0, 8), (8, 8), (8, 8)], [(0, 8), (0, 0), (0, 0)]),
    ]
    if name in ("embedding_bag_backward", "embedding_bag_weights_backward"):
        cases.append(([-5, 2, 7, 8], [(0, 2), (2, 7), (7, 8)], [(0, 0), (2, 7), (7, 8)]))
    else:  # where a position may be in two bags
        cases.append(([0, 3, 2, 100, 8], [(0, 3), (3, 3), (2, 8), (8, 8)], [(0, 3), (0, 0), (0, 0), (0, 0)]))
    for bad, clamped, emptied in cases:
        ranges = clamped if mode == "clamp" else emptied
        parts = [indices[begin:end] for begin, end in ranges]
        bounds = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0)
        ours = kernels.operator(name)(*calls(indices, torch.tensor(bad))[name])
        theirs = getattr(REFERENCE, name)(*calls(torch.cat(parts), bounds)[name])
        if name == "embedding_bag_weights_backward":  # positions of no bag have no gradient
            full = torch.zeros(8)
            full[torch.cat([torch.arange(*r) for r in ranges]).long()] = theirs
            theirs = full
        with named((bad, mode)):
            pairs = ([ours], [theirs]) if isinstance(ours, torch.Tensor) else (ours, theirs)
            for a, b in zip(*pairs, strict=True):
                assert_matches(a, b, torch.float32)
        fault = kernels.take_fault()
        assert (fault is not None) == (mode == "raise")
        assert fault is None or fault.value in (100, 9, -5, 2, 8)


@pytest.mark.parametrize("name", ["embedding_bag_backward", "embedding_bag_weights_backward"])
def test_offsets_in_any_order(kernels: Emulation, seed: int, mode: str, name: str) -> None:
    """Bags that overlap: each position counts in one of them at most, and always the same."""
    rng = torch.Generator().manual_seed(32)
    indices = torch.randint(0, 7, (40,), generator=rng)
    for _ in range(4):
        offsets = torch.randint(-3, 44, (12,), generator=rng)
        results = []
        for other in (seed, seed + 3):
            kernels.seed(other)
            results.append(kernels.operator(name)(*calls(indices, offsets)[name]))
            assert (kernels.take_fault() is not None) == (mode == "raise")
        assert torch.equal(*results)


def test_plan_that_does_not_fit(kernels: Emulation, seed: int) -> None:
    kernels.seed(seed)
    weights, scales = [torch.ones(7, 6), torch.ones(7, 6).byte()], [EMPTY, torch.ones(7, 2).half()]
    good = [[0, 6, 0, SUM, 0, 0], [1, 6, 6, MEAN, 8, 0]]
    indices, offsets = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 4])
    run = kernels.operator("embedding_bag_collection")
    run(weights, scales, torch.tensor(good), indices, offsets, None, 12, torch.float32)
    wrong = [
        [2, 6, 6, 0, 0, 0], [-1, 6, 6, 0, 0, 0], [0, 7, 0, 0, 0, 0], [0, 6, 7, 0, 0, 0], [0, 6, -1, 0, 0, 0],
        [0, 6, 6, 3, 0, 0], [0, 6, 6, -1, 0, 0], [1, 6, 6, 0, 4, 0], [1, 6, 6, 0, 0, 0], [0, 6, 6, 0, 8, 0],
        [1, 6, 6, 0, 8, 127], [0, -1, 0, 0, 0, 0], [1 << 40, 6, 6, 0, 0, 0], [0, 6, 1 << 62, 0, 0, 0],
    ]  # fmt: skip
    for row in wrong:
        with named(row):
            run(weights, scales, torch.tensor([good[0], row]), indices, offsets, None, 12, torch.float32)
            with pytest.raises(RuntimeError, match="plan row 1 does not fit the tables or total_dim"):
                kernels.check_bounds()


def test_wrong_arguments(kernels: Emulation) -> None:
    weight, indices, offsets = torch.ones(3, 2), torch.tensor([0, 1]), torch.tensor([0, 2])
    rest = (SUM, -1, True)
    run = kernels.operator("embedding_bag")
    for args, match in (
        ((weight, indices.short(), offsets, None, *rest), "indices must be int32 or int64, but is int16"),
        ((weight, indices, offsets.float(), None, *rest), "offsets must be int32 or int64, but is float32"),
        ((weight, indices, None, None, *rest), r"must have 2 dimension\(s\), but has 1"),
        ((weight, indices, offsets[:0], None, *rest), "include_last_offset needs at least one offset"),
        ((weight, indices, offsets, torch.ones(3), *rest), "one value for each of the 2 indices, but has 3"),
        ((weight.char(), indices, offsets, None, *rest), "weight must be a floating point tensor, but is int8"),
        ((weight[0], indices, offsets, None, *rest), r"weight must have 2 dimension\(s\), but has 1"),
        ((weight, indices, offsets, None, 3, -1, True), r"mode must be 0 \(sum\), 1 \(mean\) or 2 \(max\), but is 3"),
    ):
        with pytest.raises(RuntimeError, match=match):
            run(*args)
    run = kernels.operator("embedding_bag_backward")
    with pytest.raises(RuntimeError, match="grad must have one row for each of the 1 bags, but has 2"):
        run(torch.ones(2, 2), indices, offsets, None, *rest, 3)
    with pytest.raises(RuntimeError, match="use embedding_bag_max"):
        run(torch.ones(1, 2), indices, offsets, None, MAX, -1, True, 3)
    run = kernels.operator("embedding_bag_weights_backward")
    with pytest.raises(RuntimeError, match=r"grad must have shape \[1, 2\]"):
        run(torch.ones(1, 3), weight, indices, offsets, *rest)
    run = kernels.operator("quantized_embedding_bag")
    with pytest.raises(RuntimeError, match="must have 1 columns, but has 2"):
        run(torch.zeros(3, 2).byte(), torch.ones(3, 2).half(), 0, 2, 4, indices, offsets, None, *rest, torch.float32)
    run = kernels.operator("embedding_bag_collection")
    plan = torch.tensor([[0, 2, 0, 0, 0, 0]])
    with pytest.raises(RuntimeError, match="float64 tables need a float64 output and can't be mixed with others"):
        run([weight.double()], [], plan, indices, offsets, None, 2, torch.float32)
    with pytest.raises(RuntimeError, match="weights has tables of uint8, but scale_bias is empty"):
        run([weight.byte()], [], plan, indices, offsets, None, 2, torch.float32)
    with pytest.raises(RuntimeError, match=r"offsets must have F[*]B[+]1 entries for F = 0 features, but has 2"):
        run([weight], [], plan[:0], indices, offsets, None, 2, torch.float32)


def test_modes_and_devices_that_do_not_exist(kernels: Emulation) -> None:
    assert kernels._functions.rk_cuda_select_bounds_check(3) == 1
    assert kernels._functions.rk_cuda_select_bounds_check(-1) == 1
    assert kernels.take_fault(-1) is None
    assert kernels.take_fault(1000) is None
