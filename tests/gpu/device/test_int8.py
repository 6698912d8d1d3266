"""int8 linear layers: the tests of Triton's interpreter on the device, and modules."""

from __future__ import annotations

from typing import Any

import pytest
import test_int8_kernels
import torch
from test_int8_kernels import (  # noqa: F401
    test_forward,
    test_longest_rows,
    test_odd_rows,
    test_same_integers_as_the_reference,
    test_static_numbers_that_are_not_valid,
    test_wrong_arguments,
)

import recsys_kernels as rk
from recsys_kernels.testing import assert_matches

OF_GPUS = (test_static_numbers_that_are_not_valid, test_wrong_arguments)


@pytest.fixture(autouse=True)
def _kernels(backend: str, on_device: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu" and request.function in OF_GPUS:
        pytest.skip("the CPU's kernels say it in other words")
    monkeypatch.setattr(test_int8_kernels, "TRITON", on_device)


@pytest.mark.parametrize("activation", ["dynamic", "static", "weight_only"])
def test_modules(device: torch.device, activation: str) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.GELU(), torch.nn.Linear(30, 3))
    ranges = [(-4.0, 4.0), (-1.0, 4.0)] if activation == "static" else None
    mlp = rk.Int8MLP.from_float(plain, activation=activation, input_ranges=ranges)
    x = torch.randn(5, 40, requires_grad=True)

    def results(there: torch.device) -> list[torch.Tensor]:
        mlp.to(there)
        on_it = x.detach().to(there).requires_grad_()
        out = mlp(on_it)
        return [mlp(on_it.detach()), out, *torch.autograd.grad(out.square().sum(), [on_it, *mlp.parameters()])]

    with rk.backend("reference"):
        theirs = [one.cpu() for one in results(torch.device("cpu"))]
    for ours, wanted in zip(results(device), theirs, strict=True):
        assert_matches(ours, wanted)
