"""Sizes that small tests do not reach: addresses beyond 32 bits, long grids, rows that every bag names."""

from __future__ import annotations

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels import _backends


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
    run = _backends.implementation("embedding_bag_backward", on_gpu[0])
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
