"""Sparse linear layers: the tests of Triton's interpreter on the device, and modules."""

from __future__ import annotations

from typing import Any

import pytest
import test_sparse_kernels
import torch
from sparse_gpu_cases import WRONG_STRUCTURES
from test_sparse_kernels import (  # noqa: F401
    test_blocks_of_any_shape,
    test_every_pattern,
    test_forward,
    test_groups,
    test_longest_rows,
    test_nan_and_infinity_go_through_kept_weights_only,
    test_odd_rows,
    test_odd_rows_of_groups,
    test_static_numbers_that_are_not_valid,
    test_types_that_differ,
    test_weight_gradient,
    test_weight_gradient_past_the_end,
    test_wrong_arguments,
    test_wrong_arguments_of_gradients,
)

import recsys_kernels as rk
from recsys_kernels.testing import assert_matches

OF_GPUS = (
    test_static_numbers_that_are_not_valid,
    test_wrong_arguments,
    test_wrong_arguments_of_gradients,
)


@pytest.fixture(autouse=True)
def _kernels(backend: str, on_device: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu" and request.function in OF_GPUS:
        pytest.skip("the CPU's kernels look into structures, and say what is wrong in other words")
    monkeypatch.setattr(test_sparse_kernels, "TRITON", on_device)


@pytest.mark.parametrize("name", WRONG_STRUCTURES)
def test_wrong_structures_read_nothing_outside(gpu: torch.device, name: str) -> None:
    """Emulated, rows that overlap would be reported: they are written twice."""
    test_sparse_kernels.test_wrong_structures_read_nothing_outside(name)


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "2:4"])
def test_modules(device: torch.device, pattern: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32)
    module = rk.SparseLinear.from_dense(linear, 0.5 if pattern == "2:4" else 0.7, pattern, epilogue="gelu")
    integers = module.quantize("dynamic")
    groups = module.quantize("dynamic", granularity=32)
    x = torch.randn(2, 5, 48, requires_grad=True)

    def results(there: torch.device) -> list[torch.Tensor]:
        module.to(there), integers.to(there), groups.to(there)
        on_it = x.detach().to(there).requires_grad_()
        out = module(on_it)
        found = [module(on_it.detach()), out, *torch.autograd.grad(out.square().sum(), [on_it, *module.parameters()])]
        found += torch.autograd.grad(groups(on_it).square().sum(), on_it)
        return [*found, integers(on_it.detach())]

    with rk.backend("reference"):
        theirs = [one.cpu() for one in results(torch.device("cpu"))]
    for ours, wanted in zip(results(device), theirs, strict=True):
        assert_matches(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48, 32), (130, 5), (512, 256)], ids=str)
def test_16_bit_modules_of_two_of_four(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """On GPUs that have a unit for 2:4 torch's operator, elsewhere ours; frozen, which is where it is used."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(*shape, dtype=dtype)
    module = rk.SparseLinear.from_dense(linear, pattern="2:4", epilogue="relu").requires_grad_(False)
    for count in (1, 8, 9, 200):
        x = torch.randn(count, shape[0]).to(dtype)
        wide = x.double().requires_grad_()
        wanted = torch.relu(module.to("cpu").to_dense()[0].double()(wide))  # type: ignore[index]
        (wanted_grad,) = torch.autograd.grad(wanted.sum(), wide)
        on_it = x.to(device).requires_grad_()
        out = module.to(device)(on_it)
        assert out.dtype == dtype
        assert_matches(out, wanted, torch.bfloat16)
        (grad,) = torch.autograd.grad(out.sum(), on_it)
        assert_matches(grad, wanted_grad, torch.bfloat16)
