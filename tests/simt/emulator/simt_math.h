// Arithmetic and bit functions that CUDA knows and the host's library does not.
#pragma once

#include <cmath>
#include <limits>

#define RK_SIMT_MATH __attribute__((always_inline)) inline

// ---- bits ----

RK_SIMT_MATH int __popc(unsigned x) { return __builtin_popcount(x); }
RK_SIMT_MATH int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
RK_SIMT_MATH int __ffs(int x) { return __builtin_ffs(x); }
RK_SIMT_MATH int __ffsll(long long x) { return __builtin_ffsll(x); }
RK_SIMT_MATH int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
RK_SIMT_MATH int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
RK_SIMT_MATH unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
RK_SIMT_MATH unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}
// Each of the low four digits of `selector` picks a byte of y:x; its high bit asks for the byte's sign
// instead.
RK_SIMT_MATH unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t all = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(all >> (8 * (digit & 7))) & 0xff;
    if (digit & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
RK_SIMT_MATH unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
RK_SIMT_MATH unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

RK_SIMT_MATH int __float_as_int(float x) { return simt::bits<int>(x); }
RK_SIMT_MATH unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
RK_SIMT_MATH float __int_as_float(int x) { return simt::bits<float>(x); }
RK_SIMT_MATH float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
RK_SIMT_MATH long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
RK_SIMT_MATH double __longlong_as_double(long long x) { return simt::bits<double>(x); }

// ---- integers ----

RK_SIMT_MATH int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
RK_SIMT_MATH unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
RK_SIMT_MATH long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
RK_SIMT_MATH unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

namespace simt {

// The sum wraps round, as on a GPU.
template <typename Byte, typename Sum>
RK_SIMT_MATH Sum dot4(unsigned a, unsigned b, Sum c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; ++i) {
    const Sum x = static_cast<Byte>(a >> (8 * i)), y = static_cast<Byte>(b >> (8 * i));
    sum += static_cast<unsigned>(x * y);
  }
  return static_cast<Sum>(sum);
}

}  // namespace simt

RK_SIMT_MATH int __dp4a(int a, int b, int c) {
  return simt::dot4<int8_t>(static_cast<unsigned>(a), static_cast<unsigned>(b), c);
}
RK_SIMT_MATH unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return simt::dot4<uint8_t>(a, b, c); }
RK_SIMT_MATH int __dp4a(char4 a, char4 b, int c) {
  return simt::dot4<int8_t>(simt::bits<unsigned>(a), simt::bits<unsigned>(b), c);
}
RK_SIMT_MATH unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
  return simt::dot4<uint8_t>(simt::bits<unsigned>(a), simt::bits<unsigned>(b), c);
}

// CUDA's own, in the global namespace. Mixed signs compare as unsigned numbers.
#define RK_SIMT_MIN_MAX(R, A, B)                                                          \
  RK_SIMT_MATH R min(A a, B b) {                                                          \
    return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); \
  }                                                                                       \
  RK_SIMT_MATH R max(A a, B b) {                                                          \
    return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); \
  }
RK_SIMT_MIN_MAX(int, int, int)
RK_SIMT_MIN_MAX(unsigned, unsigned, unsigned)
RK_SIMT_MIN_MAX(unsigned, int, unsigned)
RK_SIMT_MIN_MAX(unsigned, unsigned, int)
RK_SIMT_MIN_MAX(long, long, long)
RK_SIMT_MIN_MAX(unsigned long, unsigned long, unsigned long)
RK_SIMT_MIN_MAX(unsigned long, long, unsigned long)
RK_SIMT_MIN_MAX(unsigned long, unsigned long, long)
RK_SIMT_MIN_MAX(long long, long long, long long)
RK_SIMT_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
RK_SIMT_MIN_MAX(unsigned long long, long long, unsigned long long)
RK_SIMT_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef RK_SIMT_MIN_MAX
// Of a number and NaN, the number.
RK_SIMT_MATH float min(float a, float b) { return fminf(a, b); }
RK_SIMT_MATH float max(float a, float b) { return fmaxf(a, b); }
RK_SIMT_MATH double min(double a, double b) { return fmin(a, b); }
RK_SIMT_MATH double max(double a, double b) { return fmax(a, b); }
RK_SIMT_MATH double min(float a, double b) { return fmin(a, b); }
RK_SIMT_MATH double max(float a, double b) { return fmax(a, b); }
RK_SIMT_MATH double min(double a, float b) { return fmin(a, b); }
RK_SIMT_MATH double max(double a, float b) { return fmax(a, b); }

// ---- floats ----

RK_SIMT_MATH float rsqrtf(float x) { return 1.0f / sqrtf(x); }
RK_SIMT_MATH double rsqrt(double x) { return 1.0 / sqrt(x); }
RK_SIMT_MATH float __fadd_rn(float a, float b) { return a + b; }
RK_SIMT_MATH float __fsub_rn(float a, float b) { return a - b; }
RK_SIMT_MATH float __fmul_rn(float a, float b) { return a * b; }
RK_SIMT_MATH float __fdiv_rn(float a, float b) { return a / b; }
RK_SIMT_MATH float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
RK_SIMT_MATH float __frcp_rn(float x) { return 1.0f / x; }
RK_SIMT_MATH float __fsqrt_rn(float x) { return sqrtf(x); }
RK_SIMT_MATH double __dadd_rn(double a, double b) { return a + b; }
RK_SIMT_MATH double __dmul_rn(double a, double b) { return a * b; }
RK_SIMT_MATH double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
RK_SIMT_MATH float __fdividef(float a, float b) { return a / b; }
RK_SIMT_MATH float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
RK_SIMT_MATH float __expf(float x) { return expf(x); }
RK_SIMT_MATH float __logf(float x) { return logf(x); }
RK_SIMT_MATH float __log2f(float x) { return log2f(x); }
RK_SIMT_MATH float __powf(float x, float y) { return powf(x, y); }
RK_SIMT_MATH float __tanhf(float x) { return tanhf(x); }

namespace simt {

// What a GPU's conversion gives: the nearest value of the type, 0 for NaN.
template <typename To, typename From>
RK_SIMT_MATH To saturate(From rounded) {
  if (rounded != rounded) return 0;
  if (rounded <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (rounded >= static_cast<From>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(rounded);
}

}  // namespace simt

#define RK_SIMT_FLOAT_TO(name, To)                                                           \
  RK_SIMT_MATH To __float2##name##_rn(float x) { return simt::saturate<To>(nearbyintf(x)); } \
  RK_SIMT_MATH To __float2##name##_rz(float x) { return simt::saturate<To>(truncf(x)); }     \
  RK_SIMT_MATH To __float2##name##_ru(float x) { return simt::saturate<To>(ceilf(x)); }      \
  RK_SIMT_MATH To __float2##name##_rd(float x) { return simt::saturate<To>(floorf(x)); }
RK_SIMT_FLOAT_TO(int, int)
RK_SIMT_FLOAT_TO(uint, unsigned)
RK_SIMT_FLOAT_TO(ll, long long)
RK_SIMT_FLOAT_TO(ull, unsigned long long)
#undef RK_SIMT_FLOAT_TO
RK_SIMT_MATH float __int2float_rn(int x) { return static_cast<float>(x); }
RK_SIMT_MATH float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
RK_SIMT_MATH float __ll2float_rn(long long x) { return static_cast<float>(x); }
RK_SIMT_MATH float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }

// ---- 16-bit floats: what the toolkit's headers have for nvcc only ----

// Exact in double but where the terms are 2^31 times apart.
RK_SIMT_MATH __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
RK_SIMT_MATH __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) +
                           __bfloat162float(c));
}
RK_SIMT_MATH __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
RK_SIMT_MATH __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
