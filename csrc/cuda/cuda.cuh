// The device side of a kernel or of an op_cuda.cu, two ways: nvcc compiles it for GPUs; g++ with -DRK_SIMT
// compiles the very same code for the emulation in tests/simt, which runs it on the CPU with checks that no
// GPU makes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(RK_SIMT)

#include "simt.h"  // the emulation's threadIdx, __shfl_sync, atomicAdd, cudaGetLastError and so on

// The library in which operators register: STABLE_TORCH_LIBRARY_IMPL(RK_LIBRARY, RK_DEVICE_KEY, m). The
// emulated ones have a library of their own, and their tensors are on the CPU.
#define RK_LIBRARY recsys_kernels_simt
#define RK_DEVICE_KEY CPU

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RK_LIBRARY recsys_kernels
#define RK_DEVICE_KEY CUDA

#endif

// The compute capability times 100 that device code is compiled for, 0 in host code. For `#if RK_ARCH >=
// 800`:
// __CUDA_ARCH__ itself would switch the toolkit's headers to PTX in the emulation.
#if defined(__CUDA_ARCH__)
#define RK_ARCH __CUDA_ARCH__
#elif defined(RK_SIMT)
#define RK_ARCH RK_SIMT_ARCH
#else
#define RK_ARCH 0
#endif

extern "C" {
// torch's C interface. The stream is weak: a torch without CUDA does not have it.
int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
struct DeviceGuardOpaque;
int32_t aoti_torch_create_device_guard(int32_t device_index, DeviceGuardOpaque** guard);
int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque* guard);
}

namespace rk {

#if defined(RK_SIMT)
constexpr bool emulated = true;
#else
constexpr bool emulated = false;
#endif

inline void cuda_check(cudaError_t error, const char* what) {
  if (__builtin_expect(error != cudaSuccess, 0)) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// The stream that torch would use now on a device.
inline cudaStream_t cuda_stream(int32_t device_index) {
  void* stream = nullptr;
#if !defined(RK_SIMT)
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("the torch that is loaded has no CUDA, so it has no CUDA streams");
  }
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
    throw std::runtime_error("torch could not give the current stream of CUDA device " +
                             std::to_string(device_index));
  }
#else
  static_cast<void>(device_index);
#endif
  return static_cast<cudaStream_t>(stream);
}

// Makes a device the current one for the life of the object.
class DeviceGuard {
 public:
#if defined(RK_SIMT)
  explicit DeviceGuard(int32_t) {}
#else
  explicit DeviceGuard(int32_t device_index) {
    if (aoti_torch_create_device_guard(device_index, &guard_) != 0) {
      throw std::runtime_error("torch could not switch to CUDA device " + std::to_string(device_index));
    }
  }
#endif
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardOpaque* guard_ = nullptr;
};

}  // namespace rk

// RK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) runs a kernel and throws
// std::runtime_error if it could not be launched. A kernel with commas in its name needs brackets:
// RK_LAUNCH((lookup<float, 4>), ...). RK_DYNAMIC_SHARED(type, name) declares `type* name`, the block's
// dynamic shared memory, aligned to 16 bytes.
#if defined(RK_SIMT)

#define RK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)
#define RK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::simt::dynamic_shared())

#else

#define RK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)       \
  do {                                                                  \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::rk::cuda_check(cudaGetLastError(), "launching " #kernel);         \
  } while (false)
#define RK_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char rk_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(rk_dynamic_shared)

#endif
