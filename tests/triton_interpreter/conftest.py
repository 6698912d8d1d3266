"""These tests run in a process of their own (see test_triton.py): Triton's interpreter is chosen before its import."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison():
    """Every torch.empty is full of NaN or of the largest integers, so that what a kernel forgets to write is seen."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
