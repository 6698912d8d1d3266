"""int8 linear layers of real sizes, and in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import test_int8_kernels
import torch
from int8_gpu_cases import layer

import recsys_kernels as rk
from recsys_kernels.ops.linear.activation import DYNAMIC, STATIC, WEIGHT_ONLY
from recsys_kernels.testing import assert_matches


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
def test_real_sizes(gpu: torch.device, on_device: Any, monkeypatch: pytest.MonkeyPatch, scheme: int) -> None:
    """Every kernel with many programs: the integers of all of them are exact."""
    monkeypatch.setattr(test_int8_kernels, "TRITON", on_device)
    for rows, width, columns, group in ((1, 4096, 4096, 0), (16, 1024, 4096, 0), (7, 415, 333, 0), (513, 1024, 1000, 0),
                                        (40, 1024, 512, 32), (600, 1025, 300, 128)):  # fmt: skip
        test_int8_kernels.assert_same_bits(layer(rows, width, columns, scheme, group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_real_sizes_of_weights_only(gpu: torch.device, on_device: Any, dtype: torch.dtype) -> None:
    for rows, width, columns, group in ((1, 4096, 1024, 0), (100, 1024, 512, 64)):
        sample = layer(rows, width, columns, WEIGHT_ONLY, group, dtype=dtype)
        sample = layer(rows, width, columns, WEIGHT_ONLY, group, input=sample.input.to(dtype), dtype=dtype)
        exact = sample.input.double() @ sample.weight.double().t()
        assert_matches(on_device.int8_linear(*sample.args), exact)


def test_graph(gpu: torch.device) -> None:
    """Captured once, replayed with other rows."""
    torch.manual_seed(0)
    linear = rk.Int8Linear.from_float(torch.nn.Linear(300, 200)).to(gpu)
    x = torch.randn(9, 300, device=gpu)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            linear(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(out, linear(x))
