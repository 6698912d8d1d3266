// Conversions between floats and their 16-bit types, one number at a time, and the scale and bias of a row.
// Unnamed namespace: see vectors.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
namespace simd {

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

}  // namespace simd
}  // namespace
