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
  float f[lanes];
  uint16_t h[lanes];
  std::memcpy(f, &x, sizeof f);
  for (int i = 0; i < lanes; ++i) h[i] = float_to_bf16(f[i]);
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
