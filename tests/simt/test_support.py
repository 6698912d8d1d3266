"""How an operator's file becomes an emulated operator, on a small one of its own."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import operators

from . import support
from .support import BUILD, Emulation, cache_folder, compiled, kernel_sources, require


@pytest.fixture(autouse=True, scope="module")
def _emulation_is_there() -> None:
    require()


# Sums blocks of values in shared memory; a block of 0 threads cannot be launched.
SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/cuda.cuh"

template <typename T>
__global__ void sum_blocks(const T* in, T* out, int64_t count) {
  __shared__ T tile[1024];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = at < count ? in[at] : T{0};
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) tile[threadIdx.x] += tile[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = tile[0];
}

using torch::stable::Tensor;

Tensor block_sums(const Tensor& values, int64_t threads) {
  const int64_t count = values.numel(), per_block = threads > 0 ? threads : 1;
  const unsigned blocks = static_cast<unsigned>((count + per_block - 1) / per_block);
  auto out = torch::stable::new_empty(values, {static_cast<int64_t>(blocks)});
  RK_LAUNCH(sum_blocks<float>, blocks, static_cast<unsigned>(threads), 0, rk::cuda_stream(0),
            static_cast<const float*>(values.data_ptr()), static_cast<float*>(out.data_ptr()), count);
  return out;
}

Tensor fresh_memory(const Tensor&) {
  const int64_t sizes[2] = {50, 7}, strides[2] = {7, 1};
  const int32_t type = aoti_torch_dtype_float32(), place = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  aoti_torch_empty_strided(2, sizes, strides, type, place, 0, &handle);
  return Tensor(handle);
}

// What is wrong: 1 reads past the end of the values, 2 reads a tensor that is gone, 3 reads values in code of the host.
Tensor wrong_sum(const Tensor& values, int64_t how) {
  auto out = torch::stable::new_empty(values, {1});
  const float* in = static_cast<const float*>(values.data_ptr());
  if (how == 2) {
    const Tensor copy = torch::stable::new_empty(values, {32});
    in = static_cast<const float*>(copy.data_ptr());
  }
  const int64_t count = how == 1 ? values.numel() + 1 : how == 3 && in[0] > 5 ? 5 : values.numel();
  RK_LAUNCH(sum_blocks<float>, 1, 64, 0, rk::cuda_stream(0), in, static_cast<float*>(out.data_ptr()), count);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(simt_support, RK_DEVICE_KEY, m) {
  m.impl("block_sums", TORCH_BOX(&block_sums));
  m.impl("fresh_memory", TORCH_BOX(&fresh_memory));
  m.impl("wrong_sum", TORCH_BOX(&wrong_sum));
}
"""


@pytest.fixture(scope="module")
def block_sums() -> Iterator[torch._ops.OpOverload]:
    source = cache_folder(BUILD, "support") / "block_sums" / "op_cuda.cu"
    if not source.exists() or source.read_text() != SOURCE:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(SOURCE)
    library = torch.library.Library("simt_support", "DEF")
    library.define("block_sums(Tensor values, int threads) -> Tensor")
    library.define("fresh_memory(Tensor like) -> Tensor")
    library.define("wrong_sum(Tensor values, int how) -> Tensor")
    torch.ops.load_library(str(compiled(BUILD, source.parent.parent, [source]) / "kernels.so"))
    yield torch.ops.simt_support.block_sums.default
    library._destroy()


def test_operator_runs_on_cpu_tensors(block_sums: torch._ops.OpOverload) -> None:
    values = torch.arange(1000.0)
    assert torch.equal(block_sums(values, 128), torch.stack([part.sum() for part in values.split(128)]))


def test_memory_that_an_operator_asks_for_is_poisoned(block_sums: torch._ops.OpOverload) -> None:
    used_before = [torch.full((50, 7), 3.0) for _ in range(20)]
    del used_before
    assert torch.ops.simt_support.fresh_memory(torch.ones(1)).isnan().all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        # The values are a part of a larger tensor, which AddressSanitizer could not tell from the rest.
        (1, r"op_cuda.cu:\d+: touches 4 bytes of .*, which are not the device's, or past the end of a tensor"),
        (2, r"op_cuda.cu:\d+: touches 4 bytes of .*, which are not the device's, or past the end of a tensor"),
        (3, r"simt: code of the host touches memory of the device, at op_cuda.cu:\d+"),
    ],
)
def test_memory_that_is_not_where_it_is_used(block_sums: torch._ops.OpOverload, how: int, message: str) -> None:
    values = torch.ones(64)[:32]
    assert torch.ops.simt_support.wrong_sum(values, 0).tolist() == [32.0]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.simt_support.wrong_sum(values, how)
    assert torch.ops.simt_support.wrong_sum(values, 0).tolist() == [32.0]


def test_launch_error_is_raised_and_the_next_call_is_well(block_sums: torch._ops.OpOverload) -> None:
    for threads in (0, 2048):
        with pytest.raises(RuntimeError, match=r"launching sum_blocks<float>: invalid configuration argument"):
            block_sums(torch.ones(3), threads)
        assert block_sums(torch.ones(64), 32).tolist() == [32.0, 32.0]


def test_kernel_error_is_raised_and_the_next_call_is_well(block_sums: torch._ops.OpOverload) -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(address + page, page, 0) == 0  # nobody may touch the second page
    values = torch.frombuffer((ctypes.c_float * (page // 2)).from_address(address), dtype=torch.float32)
    assert block_sums(values[: page // 4], 512).tolist() == [0.0, 0.0]
    with pytest.raises(RuntimeError, match=r"simt: kernel sum_blocks<float>, block .*thread .*op_cuda.cu:\d+: crashed"):
        block_sums(values[: page // 4 + 1], 512)
    assert block_sums(torch.ones(64), 64).tolist() == [64.0]


def test_threads_of_the_system_may_call_at_once(block_sums: torch._ops.OpOverload) -> None:
    """As the backward of another device does. Static shared memory is each one's own."""
    results: dict[int, list[bool]] = {}

    def call(number: int) -> None:
        values = torch.full((256,), float(number))
        results[number] = [block_sums(values, 64).tolist() == [64.0 * number] * 4 for _ in range(20)]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [all(results[number]) for number in range(4)] == [True] * 4


def test_every_file_of_an_operator_is_compiled() -> None:
    folders = {path.parent.name for path in kernel_sources() if path.name == "op_cuda.cu"}
    assert folders == {path.parent.name for path in Path(selection.__file__).parents[1].glob("csrc/**/*_kernel.cuh")}


def test_emulation_holds_operators_of_this_package(kernels: Emulation) -> None:
    assert "embedding_bag" in kernels.operators
    assert kernels.operators <= set(operators)
    for name in kernels.operators:
        schema = getattr(torch.ops.recsys_kernels, name).default._schema
        assert str(kernels.operator(name)._schema) == str(schema).replace("recsys_kernels::", "recsys_kernels_simt::")


def test_operators_are_routed_only_while_it_is_active(kernels: Emulation) -> None:
    weight = torch.zeros(2, 3)
    before = selection.implementation("embedding_bag", weight)
    with kernels.active():
        assert selection.implementation("embedding_bag", weight) is kernels.operator("embedding_bag")
        assert selection.implementation("embedding_bag", weight.to("meta")) is before
    assert selection.implementation("embedding_bag", weight) is before


def test_emulation_that_nobody_used_is_an_error(kernels: Emulation) -> None:
    with pytest.raises(AssertionError, match="no emulated operator has been called"), kernels.active():
        pass


@pytest.mark.parametrize("is_served", [True, False])
@pytest.mark.parametrize("in_ci", [True, False])
def test_nothing_is_skipped_for_want_of_a_compiler_in_ci(
    monkeypatch: pytest.MonkeyPatch, in_ci: bool, is_served: bool
) -> None:
    monkeypatch.setattr(support, "why_not", lambda: "it is Sunday")
    monkeypatch.setattr(support, "_is_served", lambda: is_served)
    if in_ci:
        monkeypatch.setenv("CI", "1")
    else:
        monkeypatch.delenv("CI", raising=False)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match="it is Sunday") as caught:
        support.require()
    assert (caught.type is pytest.fail.Exception) == (in_ci and is_served)
