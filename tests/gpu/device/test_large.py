"""Sizes that small tests do not reach: addresses beyond 32 bits, long grids, rows that every bag names."""

from __future__ import annotations

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.backends import selection


@pytest.fixture(autouse=True)
def _no_poison() -> None:
    """Gigabytes of NaN take long to write."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("dtype", "rows", "dim"), [(torch.float16, 40_000_000, 64), (torch.float32, 9_000_000, 130)])
def test_tables_beyond_32_bits(gpu: torch.device, dtype: torch.dtype, rows: int, dim: int) -> None:
    """More than 2^32 bytes, and the first also more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 2 * rows * dim * dtype.itemsize:
        pytest.skip("the GPU has too little memory")
    table = torch.empty(rows, dim, dtype=dtype, device=gpu)
    table[-3:] = torch.arange(3.0, device=gpu).unsqueeze(1).to(dtype)
    table[:2] = 7
    indices = torch.tensor([[rows - 1, rows - 2], [0, rows - 1], [1, 0]], device=gpu)
    out = rk.functional.embedding_bag(indices, table, mode="sum")
    rk.check_bounds()
    assert out[:, 0].tolist() == [3.0, 9.0, 14.0]
    assert bool((out == out[:, :1]).all())


@pytest.mark.parametrize(("bits", "rows"), [(8, 70_000_000), (4, 140_000_000)])
def test_quantized_tables_beyond_32_bits(gpu: torch.device, bits: int, rows: int) -> None:
    """More than 2^32 bytes of rows."""
    columns = 64 * bits // 8
    if torch.cuda.mem_get_info()[0] < 1.3 * rows * (columns + 4):
        pytest.skip("the GPU has too little memory")
    table = torch.empty(rows, columns, dtype=torch.uint8, device=gpu)
    scales = torch.empty(rows, 2, dtype=torch.float16, device=gpu)
    used = torch.tensor([0, 1, rows - 2, rows - 1], device=gpu)
    values = torch.tensor([1, 2, 3, 4], device=gpu)
    table[used] = (values * (17 if bits == 4 else 1)).to(torch.uint8).unsqueeze(1)
    scales[used] = torch.stack([2.0 * values, values], 1).half()
    indices = used[torch.tensor([[3, 2], [0, 3], [1, 0]], device=gpu)]
    run = selection.implementation("quantized_embedding_bag", indices)
    out = run(table, scales, 0, 64, bits, indices, None, None, 0, -1, False, torch.float32)
    rk.check_bounds()
    row = [3.0, 10.0, 21.0, 36.0]  # scale * q + bias
    assert out[:, 0].tolist() == [row[3] + row[2], row[0] + row[3], row[1] + row[0]]
    assert bool((out == out[:, :1]).all())


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_gradients_beyond_32_bits(gpu: torch.device, mode: str) -> None:
    """A table's gradient of more than 2^32 bytes; of max also of more than 2^32 elements, which come in parts."""
    rows, dim = (20_000_000, 64) if mode == "sum" else (70_000_000, 64)
    dtype = torch.float32 if mode == "sum" else torch.float16
    # The table, its gradient, and for max a part of the gradient in float32 and in float16.
    if torch.cuda.mem_get_info()[0] < (2.5 if mode == "sum" else 5.5) * rows * dim * dtype.itemsize:
        pytest.skip("the GPU has too little memory")
    table = torch.zeros(rows, dim, dtype=dtype, device=gpu, requires_grad=True)
    indices = torch.tensor([[rows - 1, rows - 1], [0, 0], [rows - 1, rows - 1], [1, 1]], device=gpu)
    out = rk.functional.embedding_bag(indices, table, mode=mode)
    grad = torch.arange(1.0, 5.0, device=gpu).unsqueeze(1).expand(4, dim).to(dtype).contiguous()
    (found,) = torch.autograd.grad(out, table, grad)
    rk.check_bounds()
    times = 2.0 if mode == "sum" else 1.0
    for row, value in ((rows - 1, 4.0), (0, 2.0), (1, 4.0), (2, 0.0), (rows // 2, 0.0)):
        assert bool((found[row] == times * value).all()), row


def test_more_bags_than_a_grid_has_rows(gpu: torch.device) -> None:
    """2^16 is the most that a grid has in its second and third dimension."""
    count = 3_000_000
    table = torch.arange(1000.0, device=gpu).unsqueeze(1).repeat(1, 4)
    indices = torch.arange(count, device=gpu).remainder_(1000)
    out = rk.functional.embedding_bag(indices, table, torch.arange(count, device=gpu), mode="sum")
    rk.check_bounds()
    assert torch.equal(out[:, 3], indices.float())


@pytest.mark.parametrize("hot", [1.0, 0.5, 0.0])
def test_gradient_is_the_same_at_every_run(gpu: torch.device, hot: float) -> None:
    """Also of a row that half of all bags name, or all."""
    rng = torch.Generator().manual_seed(15)
    count, rows, dim = 400_000, 50_000, 64
    indices = torch.randint(0, rows, (count,), generator=rng)
    indices[torch.rand(count, generator=rng) < hot] = 17
    grad = torch.randn(count // 20, dim, generator=rng)
    wanted = torch.zeros(rows, dim, dtype=torch.float64)
    wanted.index_add_(0, indices, grad.double().repeat_interleave(20, 0))
    on_gpu = (grad.to(gpu), indices.reshape(-1, 20).to(gpu), None, None, 0, -1, False, rows)
    run = selection.implementation("embedding_bag_backward", on_gpu[0])
    first = run(*on_gpu)
    for _ in range(5):
        assert torch.equal(run(*on_gpu), first)
    rk.check_bounds()
    # Sums of hundreds of thousands of float32 numbers: the error grows with the square root of their number.
    allowed = 1e-6 * max(1.0, hot * count) ** 0.5 * 4
    torch.testing.assert_close(first.cpu().double(), wanted, rtol=1e-4, atol=allowed)


def test_one_long_bag(gpu: torch.device) -> None:
    count = 1_000_000
    table = torch.ones(10, 64, device=gpu)
    indices = torch.arange(count, device=gpu).remainder_(10).unsqueeze(0)
    out = rk.functional.embedding_bag(indices, table, mode="sum")
    mean = rk.functional.embedding_bag(indices, table, mode="mean")
    rk.check_bounds()
    assert bool((out == count).all())
    assert bool((mean == 1.0).all())
