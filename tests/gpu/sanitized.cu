// Kernels that are wrong on purpose, in the namespace of the library's: each tool of compute-sanitizer must
// find its own under the options that it watches the library with.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace rk {

__global__ void beyond_memory(int* memory, int count) { memory[count + threadIdx.x] = 1; }

__global__ void race(int* memory) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  memory[threadIdx.x] = shared[63 - threadIdx.x];  // of the other warp, without a barrier
}

__global__ void never_written(const int* memory, int* out) { out[threadIdx.x] = memory[threadIdx.x] + 1; }

}  // namespace rk

int main(int, char** arguments) {
  const char* tool = arguments[1];
  int *memory = nullptr, *out = nullptr;
  if (cudaMalloc(&memory, 64 * sizeof(int)) != cudaSuccess ||
      cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) {
    std::printf("no memory on the GPU\n");
    return 1;
  }
  if (std::strcmp(tool, "memcheck") == 0) {
    rk::beyond_memory<<<1, 64>>>(memory, 64);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    rk::race<<<1, 64>>>(memory);
  } else {
    rk::never_written<<<1, 64>>>(memory, out);
  }
  cudaDeviceSynchronize();
  return 0;
}
