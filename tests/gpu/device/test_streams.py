"""Streams and CUDA graphs: what torch's scheduling needs of an operator and no emulation shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import recsys_kernels as rk

ROWS, DIM, BATCH, LENGTH = 1000, 64, 128, 20
SLEEP = 200_000_000  # cycles: about 0.1 s


@pytest.fixture(autouse=True)
def _no_poison() -> None:
    """Filling fresh memory would be one more kernel in every graph."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["float", "int8", "int4", "collection"])
def lookup(request: pytest.FixtureRequest, gpu: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """One lookup of BATCH bags of LENGTH indices."""
    torch.manual_seed(16)
    bag = rk.EmbeddingBag(ROWS, DIM, mode="sum", device=gpu).requires_grad_(False)
    offsets = torch.arange(0, BATCH * LENGTH + 1, LENGTH, device=gpu)
    if request.param == "float":
        return lambda indices: bag(indices)
    if request.param != "collection":
        small = rk.QuantizedEmbeddingBag.from_float(bag, int(request.param[3:]))
        return lambda indices: small(indices)
    table = rk.EmbeddingBagConfig("a", ROWS, DIM)
    collection = rk.EmbeddingBagCollection([table]).to(gpu).requires_grad_(False)
    return lambda indices: collection(indices.flatten(), offsets)


def some_indices(device: torch.device, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, ROWS, (BATCH, LENGTH), generator=rng).to(device)


def test_work_is_on_the_current_stream(gpu: torch.device, lookup: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The indices are written late on the same stream, and the other stream is busy all the while."""
    right, wrong = some_indices(gpu, 1), some_indices(gpu, 2)
    wanted = lookup(right)
    indices, stream, done = wrong.clone(), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(20 * SLEEP)
    busy.record()
    with rk.bounds_check("ignore"), torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        indices.copy_(right)
        out = lookup(indices)
        done.record()
    done.synchronize()
    assert not busy.query(), "the lookup waited for another stream"
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_nothing_waits_for_the_device(
    backend: str, gpu: torch.device, lookup: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A call returns while the GPU is still busy with what was there before."""
    indices = some_indices(gpu, 3)
    for mode in ("raise", "clamp", "ignore") if backend == "cuda" else ("clamp", "ignore"):
        with rk.bounds_check(mode):
            lookup(indices)
            torch.cuda.synchronize()
            busy = torch.cuda.Event()
            torch.cuda._sleep(5 * SLEEP)
            busy.record()
            lookup(indices)
            assert not busy.query(), mode
            torch.cuda.synchronize()


@pytest.mark.parametrize("warm", [True, False])
def test_graphs(backend: str, gpu: torch.device, lookup: Callable[[torch.Tensor], torch.Tensor], warm: bool) -> None:
    """Captured once, replayed with other indices in the same place; also when the capture is the first call."""
    indices = some_indices(gpu, 4)
    if warm:
        lookup(indices)
    elif backend == "triton":
        pytest.skip("Triton compiles at the first call")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lookup(indices)
    for seed in (5, 6, 7):
        indices.copy_(some_indices(gpu, seed))
        graph.replay()
        assert torch.equal(out, lookup(indices))
    indices[3, 4] = ROWS + 5
    graph.replay()
    torch.cuda.synchronize()
    if backend == "cuda":  # the kernels of a graph write down what is wrong, too; Triton's cannot be asked
        with pytest.raises(IndexError, match=f"index {ROWS + 5} at position {3 * LENGTH + 4}"):
            rk.check_bounds()
    with rk.bounds_check("ignore"):
        assert torch.equal(out, lookup(indices))


def test_graph_of_a_training_step(gpu: torch.device) -> None:
    bag = rk.EmbeddingBag(ROWS, DIM, mode="mean", device=gpu)
    indices = some_indices(gpu, 8)

    def step() -> torch.Tensor:
        (grad,) = torch.autograd.grad(bag(indices).square().sum(), bag.weight)
        return grad

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    for seed in (9, 10):
        indices.copy_(some_indices(gpu, seed))
        graph.replay()
        assert torch.equal(grad, step())
    rk.check_bounds()
