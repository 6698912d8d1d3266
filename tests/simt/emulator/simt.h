// CUDA device code, run on the CPU: csrc/cuda/cuda.cuh includes this in the place of the CUDA headers when
// g++ compiles a .cuh or op_cuda.cu with -DRK_SIMT.
//
// Every thread of a block is a fiber with a stack of its own; blocks run one after the other. A seed
// (simt_seed) gives the order of blocks and threads. A thread runs until it has to wait (barrier, shuffle) or
// meets an atomic operation. What it does between two such points happens all at once: the checked build
// (below) sees what that hides.
//
// What the emulation accepts, a GPU must accept, so it is the stricter of the two. Errors here are:
//
// - A barrier that some threads do not reach, because they have ended, or because they wait at another one:
//   even at the same line of a function that was called from elsewhere.
// - A mask that leaves out the calling lane, or names one that has ended or does not exist.
// - Lanes of one mask that meet at different places. A shuffle that reads from a lane outside of the mask.
// - __shfl_up/down/xor_sync by less than 0 or more than 31 lanes; a width that is not a power of two.
// - Deadlock, and waiting for what no thread does.
// - Intrinsics at addresses not aligned for their type. Atomic operations on local variables.
// - Launches of too many threads, blocks or bytes of shared memory.
//
// Shared memory, new tensors and other memory of the device are full of NaN (all bits set). A thread's own
// variables start with large numbers where the code gives them none. Lanes of which __activemask says that
// they are together are so by chance, as on a GPU.
//
// There are two builds (tests/simt/support.py). In both, UBSan's checks look for misaligned vectors, signed
// overflow, and indices past the end of arrays.
//
// - address: with AddressSanitizer, for what is outside of allocated memory.
// - checked: the compiler calls the emulation at every access to memory (races.cpp), and all that is wrong is
//   an exception. Reported are, whatever the schedule was: two accesses that no barrier orders, in shared or
//   global memory, of one block or of two; shared memory that is read before it is written; kernels that
//   touch what is not the device's, even past the end of a view of a larger tensor; host code that reads
//   tensors.
//
// Not seen are:
//
// - Memory ordering: everything is seen at once by everybody. The checked build takes __syncthreads and
//   __syncwarp for an order and nothing else: it reports what relies on atomics with fences.
// - What nvcc makes of the code: registers, spills, bank conflicts, coalescing, speed, warps kept together.
// - Approximate functions (__expf is expf), fused multiply-adds, denormals that are flushed to zero.
// - Asynchronous copies, streams and graphs (a launch has ended when it returns), clusters, textures.
// - Inline PTX: each wrapper around it needs an emulation of its own, as in csrc/cuda/mma.cuh.
// - More threads than __launch_bounds__ allows; too much static shared memory, which ptxas refuses.
// - Pointers that leave one array in static shared memory for the next.
// - A thread that spins without atomic operations, fences, volatile accesses or __nanosleep: it never ends.
//
// Where g++ differs from nvcc, write `__shared__ __align__(16) T x[n]` instead of `__shared__ alignas(16)`,
// RK_DYNAMIC_SHARED, RK_LAUNCH, and `__attribute__((noinline))` instead of `__noinline__`.
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

// All static shared memory of a library lies together in its thread-local memory, templates' too, so that it
// can be filled before each block; one block runs at a time in a thread of the operating system.
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
  run({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, thread, &closure,
       sizeof closure});
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
