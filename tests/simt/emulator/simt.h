// CUDA device code, run on the CPU: csrc/common/cuda.cuh includes this in the place of the CUDA headers when g++
// compiles a .cuh or op_cuda.cu with -DRK_SIMT.
//
// Every thread of a block is a fiber with a stack of its own; blocks run one after the other. A seed (simt_seed) gives
// the order of blocks and threads. A thread runs until it has to wait (barrier, shuffle) or meets an atomic operation,
// so what it does between two such points happens all at once: the build for races (below) sees what that hides.
//
// What the emulation accepts, a GPU must accept. So it is the stricter of the two; these are errors here:
//  - a barrier that some threads do not reach, because they have ended, or wait elsewhere, even at the same barrier
//    of a function called from another place
//  - a mask that does not name the calling lane, or names one that has ended or does not exist; lanes of a mask that
//    meet at different places; a shuffle from a lane that is not in the mask
//  - __shfl_up/down/xor_sync by 32 lanes or more, or by less than none; a width that is not a power of two
//  - deadlock, and waiting for something that no thread does
//  - intrinsics at addresses that are not aligned for their type, atomic operations on local variables
//  - writing just outside of the dynamic shared memory
// Shared memory is full of NaN (all bits set) before each block, and so is what a thread's own variables start with,
// as far as the compiler lets one choose. __activemask names no more lanes than the caller may count on.
//
// Three builds (support.py): plain; with AddressSanitizer and UBSan (memory outside of what was allocated, misaligned
// float4, signed overflow, static shared arrays indexed past their end); and for races, where the compiler calls the
// emulation at every access (races.cpp). That one reports every two accesses that no barrier orders, whatever the
// schedule was: in shared and in global memory, of one block and of different blocks.
//
// It cannot see:
//  - memory ordering: here everything is seen at once by everybody. The build for races knows __syncthreads and
//    __syncwarp; it takes nothing else (atomics with fences) as an order, and reports what relies on it
//  - what nvcc makes of the code: registers, spills, bank conflicts, coalescing, speed; warps that a GPU keeps together
//  - approximate functions (__expf is expf here), fused multiply-adds, denormals flushed to zero
//  - asynchronous copies, streams and graphs (a launch has ended when it returns), clusters, textures, inline PTX
//    (each wrapper around PTX needs an emulation of its own, as in csrc/common/mma.cuh)
//  - whether memory belongs to the device: every pointer of the host is good here
//  - more threads than __launch_bounds__ allows, and static shared memory that is too large
//  - a thread that spins without any atomic operation, fence, volatile access or __nanosleep: it spins for ever
//
// Where g++ differs from nvcc: write `__shared__ __align__(16) T x[n]`, not `__shared__ alignas(16)`; dynamic shared
// memory needs RK_DYNAMIC_SHARED; launches need RK_LAUNCH; `__attribute__((noinline))`, not `__noinline__`.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include <cuda_runtime.h>
// After it, or its names for conversions are not there.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.h"

// All static shared memory of a library lies together in its thread-local memory, templates' too, so that it can be
// filled before each block; one block runs at a time in a thread of the operating system.
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __maxnreg__
#define __maxnreg__(...)
#undef __grid_constant__
#define __grid_constant__

extern RK_SIMT_BUILTIN uint3 threadIdx, blockIdx;
extern RK_SIMT_BUILTIN dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// Fails unless an address is a multiple of the size of what lies there.
template <typename T>
__attribute__((always_inline)) inline void check_aligned(const char* what, const T* address) {
  if (__builtin_expect(reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0, 0)) {
    fail("%s of %zu bytes at an address that is not a multiple of it: %p", what, sizeof(T),
         static_cast<const void*>(address));
  }
}

template <typename To, typename From>
__attribute__((always_inline)) inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// A value in the low bytes of 64 bits, and back.
template <typename T>
__attribute__((always_inline)) inline uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t all = 0;
  memcpy(&all, static_cast<const void*>(&value), sizeof value);
  return all;
}

template <typename T>
__attribute__((always_inline)) inline T unpack(uint64_t all) {
  T value;
  memcpy(static_cast<void*>(&value), &all, sizeof value);
  return value;
}

// A launch: the arguments are converted once to the parameters' types, and copied for each thread.
template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            A&&... arguments) {
  static_assert((std::is_trivially_destructible_v<P> && ...), "a kernel's parameters must be plain data");
  struct Closure {
    void (*kernel)(P...);
    std::tuple<std::remove_cv_t<P>...> arguments;
  };
  const Closure closure{kernel, std::tuple<std::remove_cv_t<P>...>(static_cast<P>(arguments)...)};
  const auto thread = [](const void* data) {
    const Closure& c = *static_cast<const Closure*>(data);
    std::apply(c.kernel, c.arguments);
  };
  run({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, thread, &closure, sizeof closure});
}

}  // namespace simt

// The toolkit has this overload for nvcc only.
template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return ::cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

#include "simt_atomics.h"
#include "simt_math.h"
#include "simt_memory.h"
#include "simt_warp.h"
