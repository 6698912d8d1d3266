"""The operators on a GPU: `pytest tests/gpu/device --backend=cuda` or `--backend=triton`.

`--backend=cpu` runs the same tests on the CPU's kernels, which shows that the tests are right, and `--backend=emulated`
those of operators on the emulated CUDA kernels. Without the option nothing is collected here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# The tests of Triton's interpreter and of the operators are run here on the device.
TESTS = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(TESTS), str(TESTS / "triton_interpreter")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", choices=["cuda", "triton", "cpu", "emulated"], help="run the operators on this backend"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    backend = config.getoption("--backend", None)
    emulated = ("test_operators.py", "test_faults.py", "test_int8.py", "test_sparse.py")
    unfit = backend == "emulated" and collection_path.suffix == ".py" and collection_path.name not in emulated
    return True if backend is None or unfit else None


def pytest_configure(config: pytest.Config) -> None:
    backend = config.getoption("--backend", None)
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        raise pytest.UsageError("torch sees no GPU")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """What the operators run on."""
    return str(request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def device(backend: str) -> torch.device:
    """Where their tensors are."""
    return torch.device("cuda" if backend in ("cuda", "triton") else "cpu")


@pytest.fixture(scope="session")
def raises_later(backend: str) -> bool:
    """Whether an operator returns before anybody knows what its kernel finds wrong."""
    return backend in ("cuda", "emulated")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same for tests that mean nothing on the CPU."""
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(autouse=True)
def _on_backend(backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator on the backend, fresh memory full of NaN, and no fault left over from the test before."""
    import recsys_kernels as rk

    if backend == "emulated" and "gpu" in request.fixturenames:
        pytest.skip("needs a GPU")  # not later: a test that calls no emulated operator is an error
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    if backend == "emulated":
        from simt.support import emulation

        kernels = emulation()
        assert kernels is not None
        monkeypatch.setattr(rk, "check_bounds", lambda device=None: kernels.check_bounds())
        with kernels.active():
            yield
    else:
        with rk.backend(backend):
            yield
    torch.use_deterministic_algorithms(False)
    rk.check_bounds()


@pytest.fixture
def on_device(device: torch.device) -> Any:
    """The operators as functions of CPU tensors that run on the device."""
    from on_device import OnDevice

    return OnDevice(device)
