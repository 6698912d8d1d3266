// Vectors in AVX-512. Included by vectors.h only, inside its namespaces.
#pragma once

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

// Four numbers of 32 bits, one of which is spread over a vector.
using Quad = __m512i;
inline Quad quad(__m128i x) { return _mm512_broadcast_i32x4(x); }
template <int J>
inline vi spread_i(Quad q) {
  return _mm512_shuffle_epi32(q, static_cast<_MM_PERM_ENUM>(J * 0x55));
}

// 32 words in registers, from which every lane picks one.
struct Words32 {
  vi low, high;
};
inline Words32 load_words32(const int32_t* p) { return {load_i32(p), load_i32(p + lanes)}; }
inline vi pick(const Words32& words, const uint8_t* at) {
  const vi i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm512_permutex2var_epi32(words.low, i, words.high);
}
inline vi pick_shared(const Words32& words, const uint8_t* at) {
  const __m128i each = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const vi i = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi32_si128(load_word(at)), each));
  return _mm512_permutex2var_epi32(words.low, i, words.high);
}
inline vf load_i8(const void* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

// acc + the products of 4 unsigned bytes with 4 signed ones, in every lane.
inline vi dot_bytes(vi acc, vi a, vi w) {
#if defined(__AVX512VNNI__)
  return dot(acc, a, w);
#else
  const vi low = _mm512_set1_epi32(0x00ff00ff);
  const Weights4 split = {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  return dot(acc, {_mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16(a, 8), low)}, split);
#endif
}

// Transposes 4 x 4 words in every 128 bits.
inline void transpose_fours(vi (&r)[8], int first) {
  vi* const t = r + first;
  const vi a = _mm512_unpacklo_epi32(t[0], t[1]), b = _mm512_unpackhi_epi32(t[0], t[1]);
  const vi c = _mm512_unpacklo_epi32(t[2], t[3]), d = _mm512_unpackhi_epi32(t[2], t[3]);
  t[0] = _mm512_unpacklo_epi64(a, c), t[1] = _mm512_unpackhi_epi64(a, c);
  t[2] = _mm512_unpacklo_epi64(b, d), t[3] = _mm512_unpackhi_epi64(b, d);
}

// 8 columns and not 16: where rows stand a multiple of 4 KB apart, 16 of them do not fit into their set of L1
// (1.5 times the time on Zen 4).
constexpr int tile_columns = 8;
inline void load_columns(const int32_t* p, int64_t stride, vf (&columns)[tile_columns]) {
  const auto rows = [&](int i) {
    const __m256i* low = reinterpret_cast<const __m256i*>(p + i * stride);
    const __m256i* high = reinterpret_cast<const __m256i*>(p + (i + 4) * stride);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)), _mm256_loadu_si256(high), 1);
  };
  vi r[8] = {rows(0), rows(1), rows(2), rows(3), rows(8), rows(9), rows(10), rows(11)};
  transpose_fours(r, 0);
  transpose_fours(r, 4);
  // r[j]: column j of the rows 0 to 3, column 4 + j of them, the same of the rows 4 to 7; r[4 + j]: of those
  // from 8 on.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    columns[j] = float_i(_mm512_shuffle_i32x4(r[j], r[4 + j], 0x88));
    columns[4 + j] = float_i(_mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd));
  }
}

// Rows become columns: in every step pairs that stand 1, 2, 4 and 8 apart.
inline void transpose(vf (&rows)[lanes]) {
  vi r[lanes], t[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) r[i] = bits_i(rows[i]);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 * a + j]: rows 4 * a to 4 * a + 3 of the columns j, j + 4, j + 8, j + 12.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vi a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const vi c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const vi d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    rows[j] = float_i(_mm512_shuffle_i32x4(a, c, 0x88));
    rows[8 + j] = float_i(_mm512_shuffle_i32x4(a, c, 0xdd));
    rows[4 + j] = float_i(_mm512_shuffle_i32x4(b, d, 0x88));
    rows[12 + j] = float_i(_mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// The sums of four vectors.
inline __m128 four_sums(vf a, vf b, vf c, vf d) {
  const vf ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const vf cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const vf all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                     _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
