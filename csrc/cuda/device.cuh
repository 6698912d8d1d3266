// Helpers that the GPU kernels share: numbers, loads by width, sums over groups of lanes.
#pragma once

#include <cstring>

#include "cuda/cuda.cuh"

#if !defined(__grid_constant__)
#define __grid_constant__
#endif

namespace rk {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp_lanes = 32;

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Returns its argument unknown to the compiler. A test of the value stays in its place; otherwise loops
// would be copied for each of its outcomes.
__device__ __forceinline__ int opaque(int x) {
#if !defined(RK_SIMT)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Returns its pointer unknown to the compiler, which then keeps the pointer in registers instead of computing
// it anew.
__device__ __forceinline__ const char* opaque(const char* p) {
#if !defined(RK_SIMT)
  asm volatile("" : "+l"(p));
#endif
  return p;
}

// Returns its pointer and tells the compiler that the pointer is into global memory.
__device__ __forceinline__ char* in_global(char* p) {
#if !defined(RK_SIMT)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Through the read-only cache: for memory that nobody writes while the kernel runs.
template <typename V>
__device__ __forceinline__ V load_constant(const void* p) {
#if defined(RK_SIMT)
  return *static_cast<const V*>(p);
#else
  return __ldg(static_cast<const V*>(p));
#endif
}

// A 4- or 8-byte integer of an array whose type is known at run time only.
__device__ __forceinline__ int64_t load_integer(const void* data, bool is_64, int64_t at) {
  return is_64 ? static_cast<int64_t>(load_constant<long long>(static_cast<const int64_t*>(data) + at))
               : load_constant<int>(static_cast<const int32_t*>(data) + at);
}

// ---- numbers ----

__device__ __forceinline__ float f16_to_float(uint32_t bits) {
  return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)}));
}

__device__ __forceinline__ float bf16_to_float(uint32_t bits) { return bits_as<float>(bits << 16); }

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}

// 2^exponent for exponents of normal floats.
__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_as<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// ---- loads ----

// An unsigned integer, or vector of them, of as many bytes.
template <int Bytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using type = uint4;
};
template <>
struct VectorOf<8> {
  using type = uint2;
};
template <>
struct VectorOf<4> {
  using type = unsigned;
};

// One load of 4-byte words.
template <int Words>
__device__ __forceinline__ void load_words(uint32_t (&word)[Words], const void* p) {
  const auto v = load_constant<typename VectorOf<4 * Words>::type>(p);
  if constexpr (Words == 1) {
    word[0] = v;
  } else {
    word[0] = v.x, word[1] = v.y;
    if constexpr (Words == 4) word[2] = v.z, word[3] = v.w;
  }
}

template <int Words>
__device__ __forceinline__ void store_words(void* p, const uint32_t (&word)[Words]) {
  if constexpr (Words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Words / 4; ++i) {
      static_cast<uint4*>(p)[i] = {word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]};
    }
  } else {
    static_assert(Words == 2, "2 or a multiple of 4");
    *static_cast<uint2*>(p) = {word[0], word[1]};
  }
}

__device__ __forceinline__ bool is_aligned(const void* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & static_cast<uintptr_t>(bytes - 1)) == 0;
}

// ---- groups of lanes ----

// Whether a condition holds for any lane of the warp. Loops with shuffles end by it even where all lanes
// agree: the compiler knows that this is the same for all of them. Else it takes them to leave one by one,
// and writes everything inside twice.
__device__ __forceinline__ bool any_lane(bool condition) { return __any_sync(all_lanes, condition) != 0; }

// The sum over the lanes whose numbers differ only in the bits [from, to), in each of them. All 32 lanes must
// come here.
template <typename Float>
__device__ __forceinline__ Float sum_over(Float x, int from, int to) {
  for (int lanes = from; lanes < to; lanes <<= 1) x += __shfl_xor_sync(all_lanes, x, lanes);
  return x;
}

}  // namespace rk
