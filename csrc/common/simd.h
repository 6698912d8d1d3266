// Vectors of floats for the level that a kernel is compiled for. Intrinsics stand here and in
// the simd_*.h of the levels, and nowhere else.
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
// dot_bytes      as dot, but the unsigned bytes are those of each lane
// Quad           four words; spread_i<J> fills a vector with one of them. One load for four weights: a load
// for
//                each would take the place of a load of activations (95 against 86 GFLOP/s on Zen 4)
// pick           every lane takes one of 32 words that stand ready in registers where they fit; pick_shared:
// four
//                lanes take the same
// load_columns   of `lanes` rows of words that stand `stride` apart, the first tile_columns columns, a vector
//                each
// transpose      rows of a square become columns

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

#if !defined(__AVX512F__)
constexpr int tile_columns = lanes;
inline void load_columns(const int32_t* p, int64_t stride, vf (&columns)[tile_columns]) {
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) columns[i] = float_i(load_i32(p + i * stride));
  transpose(columns);
}
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

// ---- four numbers ----

// As words, or as floats. Whatever their type, 16 bytes may be read.
#if defined(__AVX2__)
inline Quad quad_words(const void* p) { return quad(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Quad quad_f16(const void* p) {
  return quad(_mm_castps_si128(_mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(p)))));
}
inline Quad quad_bf16(const void* p) {
  return quad(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))), 16));
}
inline Quad quad_i8(const void* p) {
  return quad(_mm_castps_si128(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_word(p))))));
}
// Adds the sums of four vectors to four floats.
inline void add_sums(const vf (&x)[4], float* p) {
  _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), four_sums(x[0], x[1], x[2], x[3])));
}
// The first n of them.
inline void add_sums(const vf (&x)[4], float* p, int n) {
  const __m128i some = _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3));
  const __m128 sums = _mm_add_ps(_mm_maskload_ps(p, some), four_sums(x[0], x[1], x[2], x[3]));
  _mm_maskstore_ps(p, some, sums);
}
#else
inline Quad quad_words(const void* p) { return load_i32(static_cast<const int32_t*>(p)); }
inline Quad quad_f16(const void* p) { return bits_i(load_f16(p)); }
inline Quad quad_bf16(const void* p) { return bits_i(load_bf16(p)); }
inline Quad quad_i8(const void* p) { return bits_i(load_i8(p)); }
inline void add_sums(const vf (&x)[4], float* p) {
  for (int i = 0; i < 4; ++i) p[i] += sum(x[i]);
}
inline void add_sums(const vf (&x)[4], float* p, int n) {
  for (int i = 0; i < n; ++i) p[i] += sum(x[i]);
}
#endif
template <int J>
inline vf spread(Quad q) {
  return float_i(spread_i<J>(q));
}

}  // namespace simd
}  // namespace
