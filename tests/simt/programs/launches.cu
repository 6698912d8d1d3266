// Launches that no GPU would make.

#include "cases.h"

namespace {

__global__ void one_each(int* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[blockIdx.x * blockDim.x * blockDim.y * blockDim.z + thread] = 1;
}

#if defined(RK_SIMT)  // nvcc would not compile it
__global__ void launches_another(int* out) { RK_LAUNCH(one_each, 1, 1, 0, nullptr, out); }
#endif

bool run(dim3 grid, dim3 block, size_t shared_bytes = 0) {
  Buffer<int> out(1024);
  RK_RUN(one_each, grid, block, shared_bytes, nullptr, out.get());
  return out[0] == 1;
}

}  // namespace

RK_CASE(no_blocks) { return run(right ? 1 : 0, 32); }
RK_CASE(too_many_threads) { return run(1, right ? 1024 : 1025); }
RK_CASE(too_deep) { return run(1, dim3(1, 1, right ? 64 : 65)); }
RK_CASE(too_much_shared) { return run(1, 32, (48 << 10) + (right ? 0 : 1)); }
RK_CASE(more_shared_without_asking) {
  const auto allow = [](int bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(one_each, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    rk::cuda_check(error, "asking for shared memory");
  };
  allow(right ? 60 << 10 : 48 << 10);
  const bool good = run(1, 32, 60 << 10);
  allow(48 << 10);
  return good;
}
RK_CASE(more_shared_than_there_is) {
  const auto error = cudaFuncSetAttribute(one_each, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          right ? 64 << 10 : 65 << 10);
  rk::cuda_check(error, "asking for shared memory");
  return cudaGetLastError() == cudaSuccess;
}
#if defined(RK_SIMT)
RK_CASE(kernel_launches_a_kernel) {
  Buffer<int> out(1, 0);
  const auto kernel = right ? one_each : launches_another;
  RK_RUN(kernel, 1, 1, 0, nullptr, out.get());
  return out[0] == 1;
}
#endif
