"""Wrong indices and offsets on the device: found, named in the CPU's words, raised once, and by nobody too early."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from support import REFERENCE
from test_bad_input import NAMES, calls

import recsys_kernels as rk
from recsys_kernels.backends import selection
from recsys_kernels.testing import assert_matches

OFFSETS = torch.tensor([0, 2, 5, 5, 8])
FINE = torch.tensor([0, 6, 2, 3, 1, 5, 0, 4])


def fault(error: BaseException) -> tuple[type, str]:
    """Class and message. Operators that are called directly raise Python's own class, the reference a subclass."""
    return IndexError if isinstance(error, IndexError) else type(error), str(error)


def wanted_error(name: str, args: tuple[Any, ...]) -> tuple[type, str]:
    with pytest.raises((IndexError, RuntimeError)) as caught:
        getattr(REFERENCE, name)(*args)
    return fault(caught.value)


def with_one(position: int, value: int) -> torch.Tensor:
    indices = FINE.clone()
    indices[position] = value
    return indices


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("position", "value"), [(0, 7), (7, -1), (5, 1 << 40), (3, -(1 << 62)), (4, (1 << 31) - 1)])
def test_one_wrong_index(on_device: Any, name: str, position: int, value: int) -> None:
    indices = with_one(position, value)
    kinds = [(indices, OFFSETS)]
    if name != "embedding_bag_collection":
        kinds.append((indices.reshape(2, 4), None))
    if abs(value) < 1 << 31:
        kinds.append((indices.int(), OFFSETS.int()))
    for wrong, offsets in kinds:
        args = calls(wrong, offsets)[name]
        with pytest.raises((IndexError, RuntimeError)) as caught:
            getattr(on_device, name)(*args)
        assert fault(caught.value) == wanted_error(name, args)
    assert getattr(on_device, name)(*calls(FINE, OFFSETS)[name]) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offsets", [[0, 2, 5, 5, 9], [0, 2, -3, 8, 8]], ids=str)
def test_one_wrong_offset(on_device: Any, name: str, offsets: list[int]) -> None:
    args = calls(FINE, torch.tensor(offsets))[name]
    with pytest.raises(RuntimeError) as caught:
        getattr(on_device, name)(*args)
    assert fault(caught.value) == wanted_error(name, args)


def test_many_wrong_indices_are_one_error(on_device: Any) -> None:
    """Whichever comes first: the message is right about the one that it names."""
    indices = torch.arange(1000) + 50
    with pytest.raises(IndexError) as caught:
        on_device.embedding_bag(torch.ones(50, 8), indices.reshape(100, 10), None, None, 0, -1, False)
    value, position, rows = map(int, re.findall(r"\d+", str(caught.value)))
    assert (value, rows) == (position + 50, 50)
    on_device.embedding_bag(torch.ones(50, 8), indices.reshape(100, 10) % 50, None, None, 0, -1, False)


def run(name: str, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """One call that nobody waits for."""
    args = [
        [one.to(device) for one in arg] if isinstance(arg, list) else arg.to(device)
        if isinstance(arg, torch.Tensor) else arg
        for arg in calls(indices, OFFSETS)[name]
    ]  # fmt: skip
    out = selection.implementation(name, indices.to(device))(*args)
    return out[0] if isinstance(out, tuple) else out


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", NAMES)
def test_cuda_kernels_raise_later(raises_later: bool, device: torch.device, name: str) -> None:
    if not raises_later:
        pytest.skip("raises at once")
    run(name, with_one(5, 77), device)
    wait(device)
    message = r"index 77 at position 5 of indices .* \(found by an earlier call\)"
    with pytest.raises(IndexError, match=message):
        run(name, FINE, device)
    run(name, FINE, device)
    rk.check_bounds(device)
    run(name, with_one(5, 77), device)
    with pytest.raises(IndexError, match=r"index 77 at position 5 of indices .* rows$"):
        rk.check_bounds(device)
    rk.check_bounds(device)


@pytest.mark.parametrize("mode", ["clamp", "ignore"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_raised_where_nobody_asked(backend: str, device: torch.device, name: str, mode: str) -> None:
    if backend == "cpu":
        pytest.skip("the CPU's kernels always raise")
    with rk.bounds_check(mode):
        out = run(name, with_one(5, 77), device)
        assert bool(out.isfinite().all())
        rk.check_bounds(device)
    rk.check_bounds(device)


@pytest.mark.parametrize("mode", ["clamp", "ignore"])
def test_gradient_of_the_weights_of_quantized_rows(gpu: torch.device, mode: str) -> None:
    """A mean counts the indices that count."""
    torch.manual_seed(17)
    bag = rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag(7, 16, mode="mean"), 8)
    indices = with_one(5, 77)
    right, keep = indices.clamp(0, 6), torch.ones(8, dtype=torch.bool) if mode == "clamp" else indices < 7
    grads = []
    for device, ids in ((gpu, indices), (torch.device("cpu"), right)):
        weights = torch.linspace(-1, 1, 8, device=device, requires_grad=True)
        own, bounds = ids, OFFSETS
        if device.type == "cpu":
            own, bounds = ids[keep], torch.cat([torch.zeros(1), keep.cumsum(0)]).long()[OFFSETS]
        used = weights if device.type == "cuda" else weights[keep]
        with rk.backend("reference") if device.type == "cpu" else contextlib.nullcontext(), rk.bounds_check(mode):
            out = bag.to(device)(own.to(device), bounds.to(device), used)
            grads += torch.autograd.grad(out.square().sum(), weights)
    assert_matches(*grads)


def test_modules_name_the_table(raises_later: bool, device: torch.device) -> None:
    tables = [rk.EmbeddingBagConfig("user", 5, 4), rk.EmbeddingBagConfig("item", 9, 4)]
    collection = rk.EmbeddingBagCollection(tables).to(device)
    wrong, offsets = torch.tensor([0, 1, 9, 2], device=device), torch.tensor([0, 1, 2, 3, 4], device=device)
    where = r"table 'item' \(feature 'item'\) with 9 rows"
    if raises_later:  # whose call it was is not known then
        collection(wrong, offsets)
        wait(device)
        where = r"the table of feature #1 with 9 rows \(found by an earlier call\)"
    with pytest.raises(IndexError, match=f"index 9 at position 2 .* {where}"):
        collection(wrong % 5 if raises_later else wrong, offsets)
