"""What the Triton kernels do about wrong indices when nobody wants an error: the nearest row, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import REFERENCE, TRITON

import recsys_kernels as rk
from recsys_kernels.backends import selection
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, SUM
from recsys_kernels.testing import assert_matches

ROWS, DIM = 7, 12
OFFSETS = torch.tensor([0, 3, 3, 4, 6, 8, 11])  # the fourth bag holds only wrong indices
INDICES = torch.tensor([0, ROWS, 6, 2, -1, 1 << 40, -(1 << 62), 5, 5, ROWS, -(1 << 31), 3])


def repaired(mode: str, indices: torch.Tensor, padding_idx: int) -> tuple[torch.Tensor, int, int]:
    """Indices that are right and mean the same, the padding index, and the rows of padding behind the table.

    What is ignored becomes padding. There can be one padding index, so that padding of the caller's moves, too.
    """
    if mode == "clamp":
        return indices.clamp(0, ROWS - 1), padding_idx, 0
    absent = (indices < 0) | (indices >= ROWS)
    if padding_idx >= 0:
        absent |= indices == padding_idx
    return torch.where(absent, ROWS, indices), ROWS, 1


@pytest.mark.parametrize("padding_idx", [-1, 0, 5])
@pytest.mark.parametrize("mode", ["clamp", "ignore"])
def test_single_tables(mode: str, padding_idx: int) -> None:
    torch.manual_seed(6)
    right, padding, more = repaired(mode, INDICES, padding_idx)
    weight, factors = torch.randn(ROWS, DIM), torch.randn(INDICES.numel())
    weight[0] = float("nan")  # what the first index of a bag is decides what becomes of NaN
    behind = torch.cat([weight, torch.full((more, DIM), float("nan"))])
    grad = torch.randn(OFFSETS.numel(), DIM)
    with rk.bounds_check(mode):
        for pooling in (SUM, MEAN, MAX):
            weights = None if pooling == MAX else factors
            out = TRITON.embedding_bag(weight, INDICES, OFFSETS, weights, pooling, padding_idx, False)
            assert_matches(out, REFERENCE.embedding_bag(behind, right, OFFSETS, weights, pooling, padding, False))
            if pooling == MAX:
                out, argmax = TRITON.embedding_bag_max(weight, INDICES, OFFSETS, padding_idx, False, True)
                wanted, rows = REFERENCE.embedding_bag_max(behind, right, OFFSETS, padding, False, True)
                assert_matches(out, wanted)
                assert torch.equal(argmax, rows)
                continue
            out = TRITON.embedding_bag_backward(grad, INDICES, OFFSETS, weights, pooling, padding_idx, False, ROWS)
            wanted = REFERENCE.embedding_bag_backward(
                grad, right, OFFSETS, weights, pooling, padding, False, ROWS + more
            )
            assert_matches(out, wanted[:ROWS])
            out = TRITON.embedding_bag_weights_backward(grad, weight, INDICES, OFFSETS, pooling, padding_idx, False)
            args = (right, OFFSETS, pooling, padding, False)
            assert_matches(out, REFERENCE.embedding_bag_weights_backward(grad, behind, *args))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["clamp", "ignore"])
def test_quantized_tables_and_collections(mode: str, bits: int) -> None:
    torch.manual_seed(7)
    right, padding, more = repaired(mode, INDICES, -1)
    rows = torch.randint(0, 256, (ROWS + 1, DIM * bits // 8), dtype=torch.uint8)
    scales = torch.randn(ROWS + 1, 2).half()
    table, behind = (rows[:ROWS], scales[:ROWS]), (rows[: ROWS + more], scales[: ROWS + more])
    rest = (-2, DIM, bits)
    parts = []
    for pooling in (SUM, MEAN, MAX):
        wanted = REFERENCE.quantized_embedding_bag(
            *behind, *rest, right, OFFSETS, None, pooling, padding, False, torch.float32
        )
        with rk.bounds_check(mode):
            out = TRITON.quantized_embedding_bag(
                *table, *rest, INDICES, OFFSETS, None, pooling, -1, False, torch.float32
            )
        assert_matches(out, wanted)
        parts.append(wanted)
    count = INDICES.numel()
    plan = torch.tensor([[0, DIM, DIM * f, f, bits, -2] for f in range(3)])
    offsets = torch.cat([OFFSETS, OFFSETS + count, OFFSETS + 2 * count, torch.tensor([3 * count])])
    args = ([table[0]], [table[1]], plan, INDICES.repeat(3), offsets, None, 3 * DIM, torch.float32)
    with rk.bounds_check(mode):
        assert_matches(TRITON.embedding_bag_collection(*args), torch.cat(parts, 1))


@pytest.mark.parametrize("mode", ["clamp", "ignore"])
def test_table_without_rows(mode: str) -> None:
    with rk.bounds_check(mode):
        for pooling in (SUM, MEAN, MAX):
            args = (torch.ones(0, 3), torch.tensor([[0, 1], [-1, 5]]), None, None, pooling, -1, False)
            assert TRITON.embedding_bag(*args).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("mode", "bags"),
    [("clamp", [[0, 1], [2, 3], [], []]), ("ignore", [[], [], [], []])],
)
def test_wrong_offsets(mode: str, bags: list[list[int]]) -> None:
    """What is left of the ranges -5:2, 2:9, 9:-2 and -2:-3 of four indices."""
    offsets = torch.tensor([-5, 2, 9, -2, -3])
    args = (torch.tensor([0, 1, 2, 3]), offsets, None, SUM, -1, True)
    grad = torch.arange(1.0, 5.0).reshape(4, 1)
    with rk.bounds_check(mode):
        out = TRITON.embedding_bag(torch.eye(4), *args)
        gradient = TRITON.embedding_bag_backward(grad, *args, 4)
    assert [row.nonzero().flatten().tolist() for row in out] == bags
    wanted = [sum(float(bag + 1) for bag, rows in enumerate(bags) if row in rows) for row in range(4)]
    assert gradient.flatten().tolist() == wanted


def test_only_raise_waits_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the flags is what waits: everything else that a call does is queued."""
    waited: list[str] = []
    to_list: Callable[[torch.Tensor], Any] = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waited.append(selection.bounds_mode()) or to_list(self))
    bags = (torch.tensor([0, 1, 2]), torch.tensor([0, 2]), None, MEAN, -1, False)
    for mode in ("raise", "clamp", "ignore"):
        with rk.bounds_check(mode):
            TRITON.embedding_bag(torch.ones(3, 4), *bags)
            TRITON.embedding_bag_backward(torch.ones(2, 4), *bags, 3)
    assert waited == ["raise", "raise"]


def test_modules_and_their_gradients() -> None:
    bag = rk.EmbeddingBag(5, 3, mode="sum")
    with rk.backend("triton"), rk.bounds_check("clamp"):
        bag(torch.tensor([[4, 9], [-3, 1]])).sum().backward()
    assert bag.weight.grad is not None
    assert bag.weight.grad[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 2.0]
    with rk.backend("triton"), pytest.raises(IndexError, match="index 9 at position 1"):
        bag(torch.tensor([[4, 9], [-3, 1]]))
