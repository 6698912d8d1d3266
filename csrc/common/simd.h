// Vectors of floats for the level that a kernel is compiled for. The only file with intrinsics.
//
// Everything is in an unnamed namespace: a weak symbol compiled with AVX-512 flags could otherwise be the
// copy that the linker keeps for the whole library, and crash a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
namespace simd {

// ---- scalar conversions, any CPU ----

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays a (quiet) NaN.
inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
inline float f16_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | (rest > 0x7c00u) << 22);
  if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + 0x38000000u));
  // A subnormal is rest * 2^-24: exact in float.
  return float_of(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f));
}

// Round to nearest even.
inline uint16_t float_to_f16(float x) {
  const uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (a < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded to nearest even, in the low
    // mantissa bits.
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}
#endif

// A row's scale and bias, stored side by side as two halves, and sums of them. In one register where there is
// one: two scalar conversions a row would take more of the shuffle port than the row itself.
#if defined(__F16C__)
struct ScaleBias {
  __m128 both;
  float scale() const { return _mm_cvtss_f32(both); }
  float bias() const { return _mm_cvtss_f32(_mm_movehdup_ps(both)); }
  void multiply(float w) { both = _mm_mul_ps(both, _mm_set1_ps(w)); }
  void add(const ScaleBias& other) { both = _mm_add_ps(both, other.both); }
};
inline ScaleBias no_scale_bias() { return {_mm_setzero_ps()}; }
inline ScaleBias load_scale_bias(const void* p) {
  int32_t halves;
  std::memcpy(&halves, p, sizeof halves);
  return {_mm_cvtph_ps(_mm_cvtsi32_si128(halves))};
}
#else
struct ScaleBias {
  float first, second;
  float scale() const { return first; }
  float bias() const { return second; }
  void multiply(float w) { first *= w, second *= w; }
  void add(const ScaleBias& other) { first += other.first, second += other.second; }
};
inline ScaleBias no_scale_bias() { return {0.0f, 0.0f}; }
inline ScaleBias load_scale_bias(const void* p) {
  uint16_t half[2];
  std::memcpy(half, p, sizeof half);
  return {f16_to_float(half[0]), f16_to_float(half[1])};
}
#endif

// ---- prefetch ----

// Into L2, not L1: a core has a dozen or two L1 miss slots and many more at L2 (random 256-byte rows: 7.8
// GB/s with L1 prefetch, 19 GB/s with L2 prefetch on a Zen 4 core).
// In assembly where it can be: gcc takes a function that only prefetches for one without effect and drops its
// calls.
#if defined(__x86_64__)
inline void prefetch_l2(const void* p) {
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
}
inline void prefetch_l1(const void* p) {
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
}
#else
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
#endif

inline int32_t load_word(const void* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Every 4 bytes become bytes 0 and 2 and then bytes 1 and 3 as 16-bit numbers, in place; `count` bytes, a
// multiple of 4, with room for twice as many.
inline void split_bytes(uint8_t* p, int64_t count) {
  for (int64_t i = count - 4; i >= 0; i -= 4) {
    const uint32_t four = static_cast<uint32_t>(load_word(p + i));
    const uint32_t even = four & 0x00ff00ffu, odd = four >> 8 & 0x00ff00ffu;
    std::memcpy(p + 2 * i, &even, sizeof even);
    std::memcpy(p + 2 * i + 4, &odd, sizeof odd);
  }
}

// ---- addresses ----

// Writes the addresses of 8 rows; false when an index is not below `num_rows` or equals `excluded`.
template <typename Index>
inline bool row_addresses(const Index* indices, uint64_t num_rows, int64_t excluded, const uint8_t* rows,
                          int64_t stride, const uint8_t** out) {
#if defined(__AVX512F__)
  __m512i index;
  if constexpr (sizeof(Index) == 8) {
    index = _mm512_loadu_si512(indices);
  } else {
    index = _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)));
  }
  const __m512i first = _mm512_set1_epi64(reinterpret_cast<int64_t>(rows));
  _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_mullo_epi64(index, _mm512_set1_epi64(stride)), first));
  const __mmask8 bad = _mm512_cmpge_epu64_mask(index, _mm512_set1_epi64(static_cast<int64_t>(num_rows)));
  return (bad | _mm512_cmpeq_epi64_mask(index, _mm512_set1_epi64(excluded))) == 0;
#else
  bool good = true;
  for (int k = 0; k < 8; ++k) {
    const int64_t index = indices[k];
    good &= static_cast<uint64_t>(index) < num_rows && index != excluded;
    // As integers: the address of a row that does not exist is no pointer.
    out[k] = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(rows) +
                                              static_cast<uintptr_t>(index) * static_cast<uintptr_t>(stride));
  }
  return good;
#endif
}

// ---- vectors of floats ----
//
// lanes          floats in a vector
// max_vectors    accumulators that leave room for the loads and constants of the inner loop
// load_*         `lanes` elements;  load_*(p, n) the first n (0 < n <= lanes), the rest zero, nothing read
// past n
// *_i4           rows hold two elements a byte, the even one in the low half; a load gives the even elements
// of
//                `lanes` bytes in one vector and the odd ones in another. interleave() restores the order.
// at_most, at_least   NaN stays NaN
// *_i            vectors of 32-bit integers;  round_i rounds to nearest, of equals to the even one
// dot            acc + the products of 4 unsigned bytes (the same for all lanes) with 4 signed bytes a lane,
//                exactly; splits_bytes: it takes the unsigned ones as split_bytes leaves them
// add_pairs      acc + the products of 2 signed 16-bit numbers a lane, where splits_bytes

#if defined(__AVX512F__)

constexpr int lanes = 16;
constexpr int max_vectors = 16;
using vf = __m512;
using mask = __mmask16;

inline mask first(int n) { return static_cast<mask>((1u << n) - 1); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vf broadcast(float x) { return _mm512_set1_ps(x); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }

inline vf from_u8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)); }
inline vf from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline void from_i4(__m128i x, vf& even, vf& odd) {
  const __m512i u = _mm512_cvtepu8_epi32(x);
  even = _mm512_cvtepi32_ps(_mm512_and_si512(u, _mm512_set1_epi32(15)));
  odd = _mm512_cvtepi32_ps(_mm512_srli_epi32(u, 4));
}

inline vf load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline vf load_f32(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline vf load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline vf load_f16(const void* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline vf load_bf16(const void* p) { return from_bf16(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline vf load_bf16(const void* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline vf load_u8(const void* p) { return from_u8(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline vf load_u8(const void* p, int n) { return from_u8(_mm_maskz_loadu_epi8(first(n), p)); }
inline void load_i4(const void* p, vf& even, vf& odd) {
  from_i4(_mm_loadu_si128(static_cast<const __m128i*>(p)), even, odd);
}
inline void load_i4(const void* p, int n, vf& even, vf& odd) {
  from_i4(_mm_maskz_loadu_epi8(first(n), p), even, odd);
}

inline void interleave(vf& even, vf& odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const vf a = _mm512_permutex2var_ps(even, low, odd);
  odd = _mm512_permutex2var_ps(even, high, odd);
  even = a;
}

inline void store_f32(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline void store_f32(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf at_most(vf x, vf limit) { return _mm512_min_ps(limit, x); }
inline vf at_least(vf x, vf limit) { return _mm512_max_ps(limit, x); }
inline float smallest(vf x) { return _mm512_reduce_min_ps(x); }
inline float largest(vf x) { return _mm512_reduce_max_ps(x); }

using vi = __m512i;
inline vi zero_i() { return _mm512_setzero_si512(); }
inline vi broadcast_i(int32_t x) { return _mm512_set1_epi32(x); }
inline vi load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
inline vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi sub_i(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi mul_i(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
inline vi max_i(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline int32_t largest_i(vi x) { return _mm512_reduce_max_epi32(x); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
inline vi round_i(vf x) { return _mm512_cvtps_epi32(x); }
inline vi bits_i(vf x) { return _mm512_castps_si512(x); }
inline vf float_i(vi x) { return _mm512_castsi512_ps(x); }
inline vi magnitude_bits(vf x) { return _mm512_and_si512(bits_i(x), _mm512_set1_epi32(0x7fffffff)); }
inline bool all_finite(vf x) {
  return _mm512_cmpgt_epi32_mask(magnitude_bits(x), _mm512_set1_epi32(0x7f7fffff)) == 0;
}
inline vi shift_left_23(vi x) { return _mm512_slli_epi32(x, 23); }
inline void store_u8(uint8_t* p, vi x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
template <int J>
inline vf weight_as_float(const int8_t* p) {
  return to_float(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_loadu_si512(p), 24 - 8 * J), 24));
}
#if defined(__AVX512VNNI__)
using Weights4 = vi;
using Bytes4 = vi;
inline Weights4 load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
constexpr bool splits_bytes = false;
inline Bytes4 broadcast_bytes(const uint8_t* p) { return _mm512_set1_epi32(load_word(p)); }
// In assembly: gcc 12 copies every accumulator there and back around the intrinsic.
inline vi dot(vi acc, Bytes4 a, Weights4 w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(w));
  return acc;
}
#else
struct Weights4 {
  vi even, odd;
};
using Bytes4 = Weights4;
inline Weights4 load_weights(const int8_t* p) {
  const vi w = _mm512_loadu_si512(p);
  return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
}
constexpr bool splits_bytes = true;
inline vi broadcast_word(const uint8_t* p) { return _mm512_set1_epi32(load_word(p)); }
inline Bytes4 broadcast_bytes(const uint8_t* p) { return {broadcast_word(p), broadcast_word(p + 4)}; }
inline vi load_i16(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void store_i16(int16_t* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi add_pairs(vi acc, vi a, vi b) {
  vi products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(products) : "v"(a), "v"(b));
  return acc;
}
inline vi dot(vi acc, Bytes4 a, Weights4 w) {
  return add_pairs(add_pairs(acc, a.even, w.even), a.odd, w.odd);
}
#endif

#elif defined(__AVX2__)

constexpr int lanes = 8;
constexpr int max_vectors = 8;
using vf = __m256;

inline vf zero() { return _mm256_setzero_ps(); }
inline vf broadcast(float x) { return _mm256_set1_ps(x); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline vf from_u8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)); }

inline vf load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline vf load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline vf load_bf16(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline vf load_u8(const void* p) { return from_u8(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline void load_i4(const void* p, vf& even, vf& odd) {
  const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  even = _mm256_cvtepi32_ps(_mm256_and_si256(u, _mm256_set1_epi32(15)));
  odd = _mm256_cvtepi32_ps(_mm256_srli_epi32(u, 4));
}

inline void interleave(vf& even, vf& odd) {
  const vf low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  even = _mm256_permute2f128_ps(low, high, 0x20);
  odd = _mm256_permute2f128_ps(low, high, 0x31);
}

inline void store_f32(float* p, vf x) { _mm256_storeu_ps(p, x); }

inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf at_most(vf x, vf limit) { return _mm256_min_ps(limit, x); }
inline vf at_least(vf x, vf limit) { return _mm256_max_ps(limit, x); }

using vi = __m256i;
inline vi zero_i() { return _mm256_setzero_si256(); }
inline vi broadcast_i(int32_t x) { return _mm256_set1_epi32(x); }
inline vi load_i32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const vi*>(p)); }
inline vi add_i(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi sub_i(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi mul_i(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
inline vi max_i(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline vf to_float(vi x) { return _mm256_cvtepi32_ps(x); }
inline vi round_i(vf x) { return _mm256_cvtps_epi32(x); }
inline vi bits_i(vf x) { return _mm256_castps_si256(x); }
inline vf float_i(vi x) { return _mm256_castsi256_ps(x); }
inline vi magnitude_bits(vf x) { return _mm256_and_si256(bits_i(x), _mm256_set1_epi32(0x7fffffff)); }
inline bool all_finite(vf x) {
  return _mm256_movemask_ps(float_i(_mm256_cmpgt_epi32(magnitude_bits(x), _mm256_set1_epi32(0x7f7fffff)))) ==
         0;
}
inline vi shift_left_23(vi x) { return _mm256_slli_epi32(x, 23); }
inline void store_u8(uint8_t* p, vi x) {
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
template <int J>
inline vf weight_as_float(const int8_t* p) {
  const vi w = _mm256_loadu_si256(reinterpret_cast<const vi*>(p));
  return to_float(_mm256_srai_epi32(_mm256_slli_epi32(w, 24 - 8 * J), 24));
}
// maddubs would take one instruction for two of these, but saturates: 255 * 127 * 2 exceeds 16 bits.
struct Weights4 {
  vi even, odd;
};
using Bytes4 = Weights4;
inline Weights4 load_weights(const int8_t* p) {
  const vi w = _mm256_loadu_si256(reinterpret_cast<const vi*>(p));
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}
constexpr bool splits_bytes = true;
inline vi broadcast_word(const uint8_t* p) { return _mm256_set1_epi32(load_word(p)); }
inline Bytes4 broadcast_bytes(const uint8_t* p) { return {broadcast_word(p), broadcast_word(p + 4)}; }
inline vi load_i16(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const vi*>(p)); }
inline void store_i16(int16_t* p, vi x) { _mm256_storeu_si256(reinterpret_cast<vi*>(p), x); }
inline vi add_pairs(vi acc, vi a, vi b) {
  // In assembly: gcc would have all products wait in registers, and the sums in memory.
  vi products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(a), "x"(b));
  return acc;
}
inline vi dot(vi acc, Bytes4 a, Weights4 w) {
  return add_pairs(add_pairs(acc, a.even, w.even), a.odd, w.odd);
}

#else

// The compiler's own vectors: SSE2 on x86-64, NEON on Arm.
constexpr int lanes = 4;
constexpr int max_vectors = 8;
typedef float vf __attribute__((vector_size(16)));

inline vf zero() { return vf{}; }
inline vf broadcast(float x) { return vf{x, x, x, x}; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf add(vf a, vf b) { return a + b; }
inline float sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline vf load_f32(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vf load_f16(const void* p) {
  uint16_t h[lanes];
  std::memcpy(h, p, sizeof h);
  return vf{f16_to_float(h[0]), f16_to_float(h[1]), f16_to_float(h[2]), f16_to_float(h[3])};
}
inline vf load_bf16(const void* p) {
  uint16_t h[lanes];
  std::memcpy(h, p, sizeof h);
  return vf{bf16_to_float(h[0]), bf16_to_float(h[1]), bf16_to_float(h[2]), bf16_to_float(h[3])};
}
inline vf load_u8(const void* p) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  return vf{float(b[0]), float(b[1]), float(b[2]), float(b[3])};
}
inline void load_i4(const void* p, vf& even, vf& odd) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  even = vf{float(b[0] & 15), float(b[1] & 15), float(b[2] & 15), float(b[3] & 15)};
  odd = vf{float(b[0] >> 4), float(b[1] >> 4), float(b[2] >> 4), float(b[3] >> 4)};
}

inline void interleave(vf& even, vf& odd) {
  const vf a = {even[0], odd[0], even[1], odd[1]};
  odd = vf{even[2], odd[2], even[3], odd[3]};
  even = a;
}

inline void store_f32(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

inline vf sub(vf a, vf b) { return a - b; }
inline vf div(vf a, vf b) { return a / b; }
inline vf at_most(vf x, vf limit) { return x > limit ? limit : x; }
inline vf at_least(vf x, vf limit) { return x < limit ? limit : x; }

typedef int32_t vi __attribute__((vector_size(16)));
inline vi zero_i() { return vi{}; }
inline vi broadcast_i(int32_t x) { return vi{x, x, x, x}; }
inline vi load_i32(const int32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vi add_i(vi a, vi b) { return a + b; }
inline vi sub_i(vi a, vi b) { return a - b; }
inline vi mul_i(vi a, vi b) { return a * b; }
inline vi max_i(vi a, vi b) { return a > b ? a : b; }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
// To nearest, of equals the even one: 1.5 * 2^23 leaves no bits behind the point. For magnitudes below 2^22.
inline vi round_i(vf x) {
  vf shifted = x + 12582912.0f;
  vi bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}
inline vi bits_i(vf x) { return reinterpret_cast<vi>(x); }
inline vf float_i(vi x) { return reinterpret_cast<vf>(x); }
inline vi magnitude_bits(vf x) { return bits_i(x) & 0x7fffffff; }
inline vi shift_left_23(vi x) { return x << 23; }
inline void store_u8(uint8_t* p, vi x) {
  for (int i = 0; i < lanes; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
template <int J>
inline vf weight_as_float(const int8_t* p) {
  return vf{static_cast<float>(p[J]), static_cast<float>(p[4 + J]), static_cast<float>(p[8 + J]),
            static_cast<float>(p[12 + J])};
}
struct Weights4 {
  vi of[4];
};
struct Bytes4 {
  int32_t of[4];
};
inline Weights4 load_weights(const int8_t* p) {
  Weights4 w;
  for (int j = 0; j < 4; ++j) w.of[j] = vi{p[j], p[4 + j], p[8 + j], p[12 + j]};
  return w;
}
constexpr bool splits_bytes = false;
inline Bytes4 broadcast_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline vi dot(vi acc, const Bytes4& a, const Weights4& w) {
  for (int j = 0; j < 4; ++j) acc += w.of[j] * a.of[j];
  return acc;
}

#endif

#if !defined(__AVX512F__)
inline float smallest(vf x) {
  float least = x[0];
  for (int i = 1; i < lanes; ++i) least = x[i] < least ? x[i] : least;
  return least;
}
inline float largest(vf x) {
  float most = x[0];
  for (int i = 1; i < lanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
inline int32_t largest_i(vi x) {
  int32_t of[lanes];
  std::memcpy(of, &x, sizeof of);
  int32_t most = of[0];
  for (int i = 1; i < lanes; ++i) most = of[i] > most ? of[i] : most;
  return most;
}
#endif

#if !defined(__AVX2__)
inline bool all_finite(vf x) { return largest_i(magnitude_bits(x)) < 0x7f800000; }
#endif

// Stores of the first n elements, rounded to nearest even.
inline void store_f16(void* p, vf x, int n) {
  uint16_t h[lanes];
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(h), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes; ++i) h[i] = float_to_f16(x[i]);
#endif
  std::memcpy(p, h, sizeof(uint16_t) * static_cast<unsigned>(n));
}

inline void store_bf16(void* p, vf x, int n) {
  uint16_t h[lanes];
#if defined(__AVX512F__)
  // As float_to_bf16.
  const vi u = bits_i(x), high = _mm512_srli_epi32(u, 16);
  const vi odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const vi rounded = _mm512_srli_epi32(add_i(u, add_i(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude_bits(x), _mm512_set1_epi32(0x7f800000));
  const vi kept = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_cvtepi32_epi16(kept));
#elif defined(__AVX2__)
  const vi u = bits_i(x), high = _mm256_srli_epi32(u, 16);
  const vi odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const vi rounded = _mm256_srli_epi32(add_i(u, add_i(odd, _mm256_set1_epi32(0x7fff))), 16);
  const vi nan = _mm256_cmpgt_epi32(magnitude_bits(x), _mm256_set1_epi32(0x7f800000));
  const vi kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(h),
                   _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
#else
  for (int i = 0; i < lanes; ++i) h[i] = float_to_bf16(x[i]);
#endif
  std::memcpy(p, h, sizeof(uint16_t) * static_cast<unsigned>(n));
}

#if !defined(__AVX512F__)
// Without masks a tail goes through a zeroed buffer, so that nothing past the row is read or written.
template <typename T>
struct Padded {
  T data[lanes];
  Padded(const void* p, int n) : data{} { std::memcpy(data, p, sizeof(T) * static_cast<unsigned>(n)); }
};
inline vf load_f32(const float* p, int n) {
  return n == lanes ? load_f32(p) : load_f32(Padded<float>(p, n).data);
}
inline vf load_f16(const void* p, int n) {
  return n == lanes ? load_f16(p) : load_f16(Padded<uint16_t>(p, n).data);
}
inline vf load_bf16(const void* p, int n) {
  return n == lanes ? load_bf16(p) : load_bf16(Padded<uint16_t>(p, n).data);
}
inline vf load_u8(const void* p, int n) {
  return n == lanes ? load_u8(p) : load_u8(Padded<uint8_t>(p, n).data);
}
inline void load_i4(const void* p, int n, vf& even, vf& odd) {
  if (n == lanes) return load_i4(p, even, odd);
  load_i4(Padded<uint8_t>(p, n).data, even, odd);
}
inline void store_f32(float* p, vf x, int n) {
  if (n == lanes) return store_f32(p, x);
  float buffer[lanes];
  store_f32(buffer, x);
  std::memcpy(p, buffer, sizeof(float) * static_cast<unsigned>(n));
}
#endif

}  // namespace simd
}  // namespace
