// Vectors in AVX2. Included by vectors.h only, inside its namespaces.
#pragma once

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

using Quad = __m256i;
inline Quad quad(__m128i x) { return _mm256_broadcastsi128_si256(x); }
template <int J>
inline vi spread_i(Quad q) {
  return _mm256_shuffle_epi32(q, J * 0x55);
}

struct Words32 {
  const int32_t* words;
};
inline Words32 load_words32(const int32_t* p) { return {p}; }
inline vi pick(const Words32& words, const uint8_t* at) {
  return _mm256_i32gather_epi32(
      words.words, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))), 4);
}
inline vi pick_shared(const Words32& words, const uint8_t* at) {
  const __m128i low = _mm_set1_epi32(words.words[at[0]]), high = _mm_set1_epi32(words.words[at[1]]);
  return _mm256_set_m128i(high, low);
}
inline vf load_i8(const void* p) {
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

inline vi dot_bytes(vi acc, vi a, vi w) {
  const vi low = _mm256_set1_epi32(0x00ff00ff);
  const Weights4 split = {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
  return dot(acc, {_mm256_and_si256(a, low), _mm256_and_si256(_mm256_srli_epi16(a, 8), low)}, split);
}

inline void transpose(vf (&r)[lanes]) {
  vf t[lanes];
  for (int i = 0; i < lanes; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < lanes; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const vf low = r[i], high = r[4 + i];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

inline __m128 four_sums(vf a, vf b, vf c, vf d) {
  const vf all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
