"""Sparse linear layers of real sizes, trained, and in CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import test_sparse_kernels
import torch
from sparse_gpu_cases import gradient_case, layer

import recsys_kernels as rk
from recsys_kernels.ops.linear.activation import (
    DYNAMIC,
    STATIC,
)
from recsys_kernels.testing import assert_matches

PATTERNS = ("unstructured", "block4x1", "block16x4", "2:4")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_sizes(gpu: torch.device, on_device: Any, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Every kernel with many programs: the integers of all of them are exact."""
    monkeypatch.setattr(test_sparse_kernels, "TRITON", on_device)
    for rows, width, columns in ((1, 2048, 1024), (8, 415, 333), (513, 1024, 500), (130, 1025, 300)):
        for scheme in (DYNAMIC, STATIC):
            test_sparse_kernels.assert_same_bits(layer(rows, width, columns, pattern, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_sizes_of_floats(gpu: torch.device, on_device: Any, pattern: str, dtype: torch.dtype) -> None:
    for rows, width, columns in ((1, 2048, 500), (600, 1024, 333)):
        sample = layer(rows, width, columns, pattern)
        sample = replace(sample, input=sample.input.to(dtype), weight=sample.weight.to(dtype), dtype=dtype)
        exact = sample.input.double() @ sample.weight.double().t()
        assert_matches(on_device.sparse_linear(*sample.args), exact)
        case = gradient_case(rows, width, columns, pattern, dtype)
        assert_matches(on_device.sparse_weight_gradient(*case.args), case.expected)


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1"])
def test_training(gpu: torch.device, pattern: str) -> None:
    """Steps on the device are those of the CPU."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(200, 100)
    x, wanted, losses = torch.randn(300, 200), torch.randn(300, 100), []
    for device, backend in (("cpu", rk.backend("reference")), (gpu, nullcontext())):
        module = rk.SparseLinear.from_dense(linear, 0.9, pattern, epilogue="relu").to(device)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        with backend:
            for _ in range(10):
                loss = torch.nn.functional.mse_loss(module(x.to(device)), wanted.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_graph(gpu: torch.device) -> None:
    """Captured once, replayed with other rows."""
    torch.manual_seed(0)
    module = rk.SparseLinear.from_dense(torch.nn.Linear(300, 200), 0.9).quantize("dynamic").to(gpu)
    x = torch.randn(9, 300, device=gpu)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            module(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(out, module(x))
