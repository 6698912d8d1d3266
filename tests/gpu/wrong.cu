// Kernels for test_cuda_code.py: one as it should be, and one for each fault that the check must find.
#include <cuda_runtime.h>

namespace rk {

template <typename V>
__global__ void copy(const V* __restrict__ from, V* __restrict__ to) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  V values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = from[at + i * 1024];
#pragma unroll
  for (int i = 0; i < 4; ++i) to[at + i * 1024] = values[i];
}

template __global__ void copy<float4>(const float4*, float4*);
template __global__ void copy<float>(const float*, float*);  // narrow

// As many wide loads, each of which waits for the one before.
__global__ void one_by_one(const float4* __restrict__ from, float4* __restrict__ to) {
  float4 values[4];
  int at = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = from[at];
    at = __float_as_int(values[i].x);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[threadIdx.x + i * 1024] = values[i];
}

// An array that no register holds, because the positions in it are known only when the kernel runs.
__global__ void in_local_memory(const float* from, const int* where, float* to) {
  float values[64] = {};
  for (int i = 0; i < 64; ++i) values[where[i] & 63] += from[i * 32 + static_cast<int>(threadIdx.x)];
  to[threadIdx.x] = values[where[threadIdx.x] & 63];
}

__global__ void in_shared_memory(const float* from, float* to) {
  __shared__ float values[1024];
  values[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = values[1023 - threadIdx.x];
}

}  // namespace rk
