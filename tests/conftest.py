"""Fixtures that the tests share, for every implementation of this machine, and a check that all of them were built."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import isa_levels

import recsys_kernels as rk
from recsys_kernels.backends.registry import native

HERE = Path(__file__).parent
# The slowest files come first, so that no process runs one alone at the end.
FIRST = (
    "test_simt.py",
    "gpu/test_cuda_code.py",
    "test_triton.py",
    "simt/test_embedding_bag.py",
    "build/test_native.py",
    "gpu/test_triton_aot.py",
)
IMPLEMENTATIONS = ("reference", *isa_levels())


def pytest_configure() -> None:
    # The tests that run on a machine with a GPU do not need hypothesis.
    if importlib.util.find_spec("hypothesis") is not None:
        from hypothesis import settings

        # The examples are the same in every run, so that a failure comes from a change and not from chance.
        settings.register_profile("default", max_examples=1050, deadline=None, derandomize=True, database=None)
        settings.register_profile("sanitize", max_examples=150, deadline=None, derandomize=True, database=None)
        settings.load_profile("default")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the other cores have processes of their own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {HERE / name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True, scope="session")
def _native_library_is_there() -> None:
    # Without this a build that failed would look like a pass, on the references.
    assert native.reason is None, f"the native library is missing, so these tests would test nothing: {native.reason}"


@pytest.fixture(params=isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Sets each instruction-set level in turn for the time of a test."""
    before = native.isa()
    assert before is not None
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects the reference, then the native kernels at every instruction-set level, for the time of a test."""
    if request.param == "reference":
        with rk.backend("reference"):
            yield request.param
        return
    before = native.isa()
    assert before is not None
    native.select_isa(request.param)
    with rk.backend("cpu"):
        yield request.param
    native.select_isa(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs a test of small calls on one thread: otherwise the reference's many small steps wait for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
