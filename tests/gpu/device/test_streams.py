"""Streams and CUDA graphs: what torch's scheduling needs of an operator and no emulation shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.testing import assert_matches

ROOT = Path(__file__).resolve().parents[3]
ROWS, DIM, BATCH, LENGTH = 1000, 64, 128, 20
SLEEP = 200_000_000  # cycles: about 0.1 s


@pytest.fixture(autouse=True)
def _no_poison() -> None:
    """Filling fresh memory would be one more kernel in every graph."""
    torch.use_deterministic_algorithms(False)


def make_lookup(kind: str, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """One lookup of BATCH bags of LENGTH indices."""
    torch.manual_seed(16)
    bag = rk.EmbeddingBag(ROWS, DIM, mode="sum", device=device).requires_grad_(False)
    offsets = torch.arange(0, BATCH * LENGTH + 1, LENGTH, device=device)
    if kind == "float":
        return lambda indices: bag(indices)
    if kind != "collection":
        small = rk.QuantizedEmbeddingBag.from_float(bag, int(kind[3:]))
        return lambda indices: small(indices)
    table = rk.EmbeddingBagConfig("a", ROWS, DIM)
    collection = rk.EmbeddingBagCollection([table]).to(device).requires_grad_(False)
    return lambda indices: collection(indices.flatten(), offsets)


@pytest.fixture(params=["float", "int8", "int4", "collection"])
def lookup(request: pytest.FixtureRequest, gpu: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Each kind of lookup."""
    return make_lookup(request.param, gpu)


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


def test_graphs(backend: str, gpu: torch.device, lookup: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Captured once, replayed with other indices in the same place."""
    lookup(some_indices(gpu, 4))
    indices, out, graph = replayed(lookup, gpu)
    indices[3, 4] = ROWS + 5
    graph.replay()
    torch.cuda.synchronize()
    if backend == "cuda":  # the kernels of a graph write down what is wrong, too; Triton's cannot be asked
        with pytest.raises(IndexError, match=f"index {ROWS + 5} at position {3 * LENGTH + 4}"):
            rk.check_bounds()
    with rk.bounds_check("ignore"):
        assert torch.equal(out, lookup(indices))


def replayed(
    lookup: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph]:
    """A graph of a lookup, after replays that were right, with what it reads and writes."""
    indices = some_indices(device, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lookup(indices)
    for seed in (5, 6, 7):
        indices.copy_(some_indices(device, seed))
        graph.replay()
        assert torch.equal(out, lookup(indices))
    return indices, out, graph


@pytest.mark.parametrize("kind", ["float", "collection"])
def test_graph_of_the_first_call(backend: str, gpu: torch.device, kind: str) -> None:
    """In a process of its own, in which no kernel was loaded before and nothing was allocated for faults."""
    if backend == "triton":
        pytest.skip("Triton compiles at the first call")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_streams, recsys_kernels as rk\n"
        "device = torch.device('cuda')\n"
        "with rk.backend(sys.argv[2]):\n"
        "    test_streams.replayed(test_streams.make_lookup(sys.argv[3], device), device)\n"
        "print('captured')\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), backend, kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "captured\n", done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["mean", "max", "collection"])
def test_graph_of_a_training_step(gpu: torch.device, kind: str) -> None:
    indices = some_indices(gpu, 8)
    tables = [rk.EmbeddingBagConfig("a", ROWS, DIM), rk.EmbeddingBagConfig("b", ROWS, DIM, pooling="mean")]
    offsets = torch.arange(0, BATCH * LENGTH + 1, LENGTH, device=gpu)  # half of the bags for each table
    module: torch.nn.Module = rk.EmbeddingBagCollection(tables).to(gpu)
    if kind != "collection":
        module = rk.EmbeddingBag(ROWS, DIM, mode=kind, device=gpu)
    weights = list(module.parameters())

    def step() -> tuple[torch.Tensor, ...]:
        out = module(indices.flatten(), offsets) if kind == "collection" else module(indices)
        return torch.autograd.grad(out.square().sum(), weights)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    for seed in (9, 10):
        indices.copy_(some_indices(gpu, seed))
        graph.replay()
        for captured, again in zip(grads, step(), strict=True):
            assert_matches(captured, again)
    rk.check_bounds()


def test_device_that_is_not_the_current_one(backend: str, gpu: torch.device) -> None:
    """Its kernels, its stream and its faults."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    with torch.cuda.device(first):
        indices, weight = some_indices(second, 11), torch.randn(ROWS, DIM, device=second, requires_grad=True)
        out = rk.functional.embedding_bag(indices, weight, mode="sum")
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert out.device == grad.device == second
        assert_matches(out, weight.detach().double()[indices].sum(1))
        assert torch.equal(grad[:, 0], torch.bincount(indices.flatten(), minlength=ROWS).float())
        if backend == "cuda":
            rk.functional.embedding_bag(indices + ROWS, weight.detach(), mode="sum")
            rk.check_bounds(first)
            with pytest.raises(IndexError, match=f"with {ROWS} rows"):
                rk.check_bounds(second)
