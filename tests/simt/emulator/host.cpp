// The calls of the CUDA runtime that host code makes, for one emulated device whose streams do everything at
// once.

#include "host.h"

#include "memory.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace {

// An sm_75 device's limits, the smallest of those that are to be served, but with few and small
// multiprocessors: code that sizes its grid by them meets grids that do not cover the work at once.
constexpr int multiprocessors = 3;
constexpr int threads_per_multiprocessor = 1024;
constexpr int shared_by_default = 48 << 10;
constexpr int shared_if_asked = 64 << 10;

std::mutex guard;
std::map<const void*, int> shared_limit;  // of kernels that have asked for more than the default
std::map<const void*, unsigned> pinned;   // flags of what cudaHostAlloc gave

// Not in thread-local memory: that is shared memory of blocks here (see simt.h).
cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

cudaError_t allocate(void** memory, size_t size, bool of_host_too = false) {
  *memory = nullptr;
  if (size == 0) return cudaSuccess;
  *memory = malloc(size);
  if (*memory == nullptr) return result(cudaErrorMemoryAllocation);
  memset(*memory, 0xff, size);  // NaN, and -1
  simt::add_memory(*memory, *memory, size, of_host_too);
  return cudaSuccess;
}

}  // namespace

namespace simt {

void check_launch(const Launch& launch) {
  const dim3 g = launch.grid, b = launch.block;
  const auto refuse = [&launch](cudaError_t error, const std::string& why) {
    throw std::runtime_error(std::string("launching ") + launch.name + ": " + cudaGetErrorString(error) +
                             " (" + why + ")");
  };
  const auto size = [](const dim3& d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    refuse(cudaErrorInvalidConfiguration, "the grid is " + size(g) + " blocks");
  }
  if (b.x == 0 || b.y == 0 || b.z == 0 || b.x > 1024 || b.y > 1024 || b.z > 64 ||
      uint64_t{b.x} * b.y * b.z > 1024) {
    refuse(cudaErrorInvalidConfiguration, "the block is " + size(b) + " threads");
  }
  std::lock_guard<std::mutex> lock(guard);
  const auto found = shared_limit.find(launch.kernel);
  const size_t limit = static_cast<size_t>(found == shared_limit.end() ? shared_by_default : found->second);
  if (launch.shared_bytes > limit) {
    refuse(cudaErrorInvalidValue, std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory, " +
                                      std::to_string(limit) + " may be used");
  }
}

}  // namespace simt

extern "C" {

// ---- errors ----

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error();
  last_error() = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error(); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "an error of another kind";
  }
}

// ---- memory ----

cudaError_t cudaMalloc(void** memory, size_t size) { return allocate(memory, size); }
cudaError_t cudaMallocAsync(void** memory, size_t size, cudaStream_t) { return allocate(memory, size); }
cudaError_t cudaMallocManaged(void** memory, size_t size, unsigned) { return allocate(memory, size, true); }
cudaError_t cudaFree(void* memory) {
  if (memory != nullptr && !simt::forget_memory(memory)) return result(cudaErrorInvalidValue);
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }

cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned flags) {
  const cudaError_t error = allocate(memory, size, true);
  std::lock_guard<std::mutex> lock(guard);
  if (error == cudaSuccess) pinned[*memory] = flags;
  return error;
}

cudaError_t cudaMallocHost(void** memory, size_t size) {
  return cudaHostAlloc(memory, size, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void* memory) {
  std::lock_guard<std::mutex> lock(guard);
  if (memory != nullptr && pinned.erase(memory) == 0) return result(cudaErrorInvalidValue);
  simt::forget_memory(memory);
  free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* memory, unsigned flags) {
  std::lock_guard<std::mutex> lock(guard);
  const auto found = pinned.find(memory);
  const bool mapped = found != pinned.end() && (found->second & cudaHostAllocMapped) != 0;
  if (!mapped || flags != 0) return result(cudaErrorInvalidValue);
  *device = memory;
  return cudaSuccess;
}

cudaError_t cudaMemset(void* memory, int value, size_t size) {
  if (size > 0) memset(memory, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  return cudaMemset(memory, value, size);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (size > 0) memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, size, kind);
}

// ---- the device and its streams ----

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = threads_per_multiprocessor;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = shared_by_default;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_if_asked;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = RK_SIMT_ARCH / 100;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = RK_SIMT_ARCH / 10 % 10;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::lock_guard<std::mutex> lock(guard);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > shared_if_asked) {
    return result(cudaErrorInvalidValue);
  }
  shared_limit[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                                   size_t shared_bytes, unsigned) {
  if (threads < 1 || threads > 1024) return result(cudaErrorInvalidValue);
  *blocks = threads_per_multiprocessor / threads;
  if (shared_bytes > 0 && *blocks > static_cast<int>(shared_if_asked / shared_bytes)) {
    *blocks = static_cast<int>(shared_if_asked / shared_bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared_bytes, 0);
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return cudaSuccess;
}

}  // extern "C"
