// Vectors of floats and integers for the level that a kernel is compiled for. Intrinsics stand in this
// folder, and nowhere else.
//
// Everything is in an unnamed namespace: a weak symbol compiled with AVX-512 flags could otherwise be the
// copy that the linker keeps for the whole library, and crash a machine without AVX-512.
#pragma once

#include "simd/f16.h"

namespace {
namespace simd {

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
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#else
#include "simd/generic.h"
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
  // The rounding is that of float_to_bf16.
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

// Loads four words or four floats. For every type, 16 bytes must be readable.
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
