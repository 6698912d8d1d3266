"""What tests of emulated kernels use: the kernels, and the package's operators running on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .support import BUILD, SEEDS, Emulation, emulation

# These run what they need in processes of their own.
collect_ignore = [] if BUILD == "checked" else ["test_programs.py", "test_support.py"]


@pytest.fixture(scope="session")
def kernels() -> Emulation:
    """The emulated kernels of the package, compiled from what is in csrc/ now."""
    found = emulation()
    assert found is not None, "there is no op_cuda.cu in csrc"
    return found


@pytest.fixture(params=SEEDS, ids="seed-{}".format)
def seed(request: pytest.FixtureRequest) -> int:
    """Each of the ways to order blocks and threads."""
    return int(request.param)


@pytest.fixture
def emulated(kernels: Emulation, seed: int) -> Iterator[Emulation]:
    """The package's operators run on the emulated kernels, in each order of threads."""
    kernels.seed(seed)
    before = kernels.launches()
    with kernels.active():
        yield kernels
    assert kernels.launches() > before, "no kernel was launched"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Every torch.empty is full of NaN or of the largest integers, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    used = emulation() if emulation.cache_info().currsize else None
    assert used is None or (error := used.host_error()) is None, error
