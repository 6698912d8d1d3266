"""Wrong arguments to the Triton kernels: the reference's errors, and no access to memory that is not an argument's."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import REFERENCE, TRITON

import recsys_kernels as rk
from recsys_kernels.ops.embedding_bag import triton as kernels
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, SUM
from recsys_kernels.testing import BagSample, assert_matches, expected_embedding_bag

SCALES = torch.ones(7, 2, dtype=torch.float16)
EMPTY = torch.empty(0, dtype=torch.float16)
PLAN = torch.tensor([[0, 6, 0, 0, 0, 0], [1, 6, 6, 1, 8, 0]])


def guarded(tensor: torch.Tensor, before: bool = False) -> torch.Tensor:
    """A copy that ends (or begins) where a page begins (ends) that may not be touched: one byte too far kills us."""
    size = mmap.PAGESIZE
    pages = -(-max(1, tensor.nbytes) // size)
    memory = mmap.mmap(-1, (pages + 1) * size)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = start if before else start + pages * size
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(size), 0) == 0
    offset = size if before else pages * size - tensor.nbytes
    if tensor.numel() == 0:
        return tensor
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.copy_(tensor.reshape(-1)).reshape(tensor.shape)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reads_nothing_outside(dtype: torch.dtype, before: bool) -> None:
    for dim in (1, 5, 8, 33):
        for mode in (SUM, MEAN, MAX):
            weight = guarded(torch.randn(7, dim).to(dtype), before)
            indices = guarded(torch.tensor([6, 0, 6, 3, 3, 0, 6]), before)
            offsets = guarded(torch.tensor([0, 0, 5]), before)
            weights = None if mode == MAX else guarded(torch.randn(7).to(dtype), before)
            sample = BagSample("", weight, indices, offsets, weights, mode)
            out = guarded(torch.full((3, dim), float("nan")).to(dtype), before)
            bags = kernels._bags(weight.device, indices, offsets, weights, False)
            kernels._pool_table(out, weight, None, bags, mode, -1)
            assert_matches(out, expected_embedding_bag(sample))
        grad = guarded(torch.randn(3, dim).to(dtype), before)
        args = (indices, offsets)
        TRITON.embedding_bag_max(weight, *args, 3, False, True)
        TRITON.embedding_bag_backward(grad, *args, None, MEAN, 3, False, 7)
        TRITON.embedding_bag_weights_backward(grad, weight, *args, MEAN, 3, False)


@pytest.mark.parametrize("before", [False, True])
def test_reads_nothing_outside_of_quantized_tables(before: bool) -> None:
    for dim, bits in ((5, 8), (32, 8), (5, 4), (64, 4)):
        weight = guarded(torch.randint(0, 256, (7, dim if bits == 8 else (dim + 1) // 2), dtype=torch.uint8), before)
        scales = guarded(torch.randn(7, 2).half(), before)
        indices, offsets = guarded(torch.tensor([6, 0, 6, 3]), before), guarded(torch.tensor([0, 0, 3, 4]), before)
        args = (indices, offsets, None, SUM, -1, True)
        expected = REFERENCE.quantized_embedding_bag(weight, scales, 0, dim, bits, *args, torch.float32)
        out = TRITON.quantized_embedding_bag(weight, scales, 0, dim, bits, *args, torch.float32)
        assert_matches(out, expected)
        plan = guarded(torch.tensor([[0, dim, 0, SUM, bits, 0]]), before)
        out = TRITON.embedding_bag_collection([weight], [scales], plan, indices, offsets, None, dim, torch.float32)
        assert_matches(out, expected)


def calls(indices: torch.Tensor, offsets: torch.Tensor | None) -> dict[str, tuple[Any, ...]]:
    """The arguments of every operator for the same lookups in 7 rows of 6 columns."""
    weight, quantized = torch.ones(7, 6), torch.ones(7, 6, dtype=torch.uint8)
    num_bags = indices.shape[0] if offsets is None else offsets.numel() - 1
    grad = torch.ones(num_bags, 6)
    bags = (indices, offsets, None, SUM, -1, offsets is not None)
    return {
        "embedding_bag": (weight, *bags),
        "embedding_bag_max": (weight, indices, offsets, -1, offsets is not None, True),
        "embedding_bag_backward": (grad, *bags, 7),
        "embedding_bag_weights_backward": (grad, weight, indices, offsets, SUM, -1, offsets is not None),
        "quantized_embedding_bag": (quantized, SCALES, 0, 6, 8, *bags, torch.float32),
        "embedding_bag_collection": (
            [weight, quantized], [EMPTY, SCALES], PLAN, indices, offsets, None, 12, torch.float32,
        ),
    }  # fmt: skip


NAMES = tuple(calls(torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)))


def assert_same_error(name: str, args: tuple[Any, ...]) -> None:
    messages = []
    for module in (REFERENCE, TRITON):
        run: Callable[..., Any] = getattr(module, name)
        with pytest.raises((IndexError, RuntimeError)) as caught:
            run(*args)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[1] == messages[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [7, -1, 1 << 40, -(1 << 62), -(1 << 31)])
def test_index_out_of_range(name: str, bad: int) -> None:
    indices = torch.tensor([0, 6, 2, 3, 1, bad, 1 << 50, 4])
    assert_same_error(name, calls(indices, torch.tensor([0, 2, 5, 5, 8]))[name])
    if name != "embedding_bag_collection":
        assert_same_error(name, calls(indices.reshape(2, 4), None)[name])
    small = torch.tensor([0, 6, 2, 3, 1, max(-(1 << 31), min(bad, (1 << 31) - 1)), 9, 4], dtype=torch.int32)
    assert_same_error(name, calls(small, torch.tensor([0, 2, 5, 5, 8], dtype=torch.int32))[name])


@pytest.mark.parametrize("name", NAMES)
def test_index_without_rows(name: str) -> None:
    weight, scales = torch.ones(0, 6), torch.ones(0, 2, dtype=torch.float16)
    args = list(calls(torch.tensor([0, 0]), torch.tensor([0, 1, 2]))[name])
    for at, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and arg.shape == (7, 6):
            args[at] = weight.to(arg.dtype)
        elif isinstance(arg, torch.Tensor) and arg.shape == (7, 2):
            args[at] = scales
        elif isinstance(arg, list):
            args[at] = [a[:0] for a in arg]
    if name == "embedding_bag_backward":
        args[-1] = 0
    assert_same_error(name, tuple(args))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 2, 8, 8], [0, 3, 4, 9, 8], [0, -1, 4, 4, 8], [0, 1 << 40, 4, 4, 8], [0, 1, 2, 3, 9], [-4, 0, 0, 0, 8]],
    ids=str,
)
def test_offsets_out_of_order(name: str, offsets: list[int]) -> None:
    indices = torch.arange(8) % 6
    assert_same_error(name, calls(indices, torch.tensor(offsets))[name])
    if max(offsets) < 1 << 31:
        assert_same_error(name, calls(indices.int(), torch.tensor(offsets, dtype=torch.int32))[name])


@pytest.mark.parametrize("name", ["embedding_bag", "embedding_bag_max", "quantized_embedding_bag", NAMES[-1]])
def test_offsets_that_start_late(name: str) -> None:
    assert_same_error(name, calls(torch.arange(6), torch.tensor([1, 2, 3, 4, 5]))[name])


def test_offsets_without_their_end() -> None:
    weight = torch.ones(3, 2)
    for offsets in ([0, 5], [1, 2], [0, 3, 2]):
        args = (weight, torch.tensor([0, 1, 2, 0]), torch.tensor(offsets), None, SUM, -1, False)
        assert_same_error("embedding_bag", args)


def test_wrong_types_and_shapes() -> None:
    weight, indices, offsets = torch.ones(3, 2), torch.tensor([0, 1]), torch.tensor([0, 2])
    rest = (SUM, -1, True)
    for args in (
        (weight, indices.short(), offsets, None, *rest),
        (weight, indices, offsets.float(), None, *rest),
        (weight, indices.reshape(1, 2), offsets, None, *rest),
        (weight, indices, None, None, *rest),
        (weight, indices, offsets.reshape(1, 2), None, *rest),
        (weight, indices, offsets[:0], None, *rest),
        (weight, indices, offsets, torch.ones(3), *rest),
    ):
        assert_same_error("embedding_bag", args)
    assert_same_error("embedding_bag_backward", (torch.ones(1, 2), indices, offsets, None, MAX, -1, True, 3))
    assert_same_error("embedding_bag_weights_backward", (torch.ones(1, 2), weight, indices, offsets, MAX, -1, True))
    with pytest.raises(RuntimeError, match="weight must be a floating point tensor"):
        TRITON.embedding_bag(weight.char(), indices, offsets, None, *rest)
    with pytest.raises(RuntimeError, match=r"grad must have shape \[1, 2\], but has \[2, 2\]"):
        TRITON.embedding_bag_backward(torch.ones(2, 2), indices, offsets, None, *rest, 3)
    with pytest.raises(RuntimeError, match="must have 3 columns, but has 6"):
        TRITON.quantized_embedding_bag(
            SCALES.repeat(1, 3).byte(), SCALES, 0, 6, 4, indices, offsets, None, *rest, weight.dtype
        )
    with pytest.raises(
        RuntimeError, match=r"scale_bias must be a float16 tensor of shape \[7, 2\] with contiguous rows"
    ):
        TRITON.quantized_embedding_bag(
            SCALES.byte(), SCALES.float(), 0, 2, 8, indices, offsets, None, *rest, weight.dtype
        )
    with pytest.raises(RuntimeError, match="indices must be on cpu like the other arguments, but is on meta"):
        TRITON.embedding_bag(weight, indices.to("meta"), offsets, None, *rest)


def test_collection_arguments() -> None:
    args = list(calls(torch.arange(6), torch.tensor([0, 2, 3, 4, 6]))["embedding_bag_collection"])
    assert TRITON.embedding_bag_collection(*args).shape == (2, 12)
    for at, value, match in (
        (2, PLAN.int(), "plan must be a contiguous int64 tensor"),
        (4, torch.tensor([0, 2, 3, 6]), "offsets must have F[*]B[+]1 entries for F = 2 features, but has 4"),
        (1, [EMPTY], "one entry for each table"),
        (1, [EMPTY, EMPTY], r"scale_bias must be a float16 tensor of shape \[7, 2\] with contiguous rows"),
        (7, torch.int32, "dtype must be a floating point tensor"),
        (7, torch.float64, "float64 tables need a float64 output and can't be mixed with others"),
        (0, [args[0][0].double(), args[0][1]], "float64 tables need a float64 output and can't be mixed with others"),
    ):
        with pytest.raises(RuntimeError, match=match):
            TRITON.embedding_bag_collection(*args[:at], value, *args[at + 1 :])


def test_public_modules_name_the_table() -> None:
    tables = [rk.EmbeddingBagConfig("user", 5, 4), rk.EmbeddingBagConfig("item", 9, 4)]
    collection = rk.EmbeddingBagCollection(tables)
    with rk.backend("triton"):
        with pytest.raises(IndexError, match=r"index 9 at position 2 .* table 'item' \(feature 'item'\) with 9 rows"):
            collection(torch.tensor([0, 1, 9, 2]), torch.tensor([0, 1, 2, 3, 4]))
        with pytest.raises(IndexError, match="index 5 at position 1 of indices"):
            rk.EmbeddingBag(5, 3)(torch.tensor([[4, 5]]))
