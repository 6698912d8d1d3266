// Atomic operations, bits, conversions: what each gives for some arguments, as the CUDA manuals have it.

#include <climits>
#include <cstring>
#include <limits>

#include "cases.h"

namespace {

struct Results {
  static constexpr int most = 80;
  double got[most], expected[most];
  int count;
};

__device__ void note(Results* r, double got, double expected) {
  r->got[r->count] = got;
  r->expected[r->count++] = expected;
}

bool check(void (*kernel)(Results*)) {
  Buffer<Results> results(1, Results{});
  RK_RUN(kernel, 1, 1, 0, nullptr, results.get());
  const Results& r = results[0];
  bool good = r.count > 0;
  for (int i = 0; i < r.count; ++i) {
    if (!(std::isnan(r.got[i]) && std::isnan(r.expected[i])))
      good = same("result", i, r.got[i], r.expected[i]) && good;
  }
  return good;
}

__global__ void bits(Results* r) {
  note(r, __popc(0xf0f0u), 8);
  note(r, __popcll(0xf0f000000001ull), 9);
  note(r, __ffs(0), 0);
  note(r, __ffs(0x50), 5);
  note(r, __ffsll(1ll << 40), 41);
  note(r, __clz(0), 32);
  note(r, __clz(1), 31);
  note(r, __clz(-1), 0);
  note(r, __clzll(1), 63);
  note(r, __brev(1u), 0x80000000u);
  note(r, __brev(0x12345678u), 0x1e6a2c48u);
  note(r, static_cast<double>(__brevll(2ull)), static_cast<double>(1ull << 62));
  note(r, __byte_perm(0x33221100u, 0x77665544u, 0x7610), 0x77661100u);
  note(r, __byte_perm(0x80221100u, 0x77665544u, 0x000b), 0x000000ffu);
  note(r, __funnelshift_l(0x80000000u, 1u, 1), 3);
  note(r, __funnelshift_r(0x80000000u, 1u, 31), 3);
  note(r, __mulhi(INT_MIN, 2), -1);
  note(r, __umulhi(0x80000000u, 4u), 2);
  note(r, static_cast<double>(__mul64hi(LLONG_MIN, 2ll)), -1);
  note(r, static_cast<double>(__umul64hi(1ull << 63, 4ull)), 2);
  note(r, __float_as_int(-1.0f), static_cast<double>(static_cast<int>(0xbf800000u)));
  note(r, __float_as_uint(1.0f), 0x3f800000u);
  note(r, __int_as_float(0x40400000), 3);
  note(r, __uint_as_float(0xc0400000u), -3);
  note(r, __longlong_as_double(__double_as_longlong(0.1)), 0.1);
  note(r, __dp4a(0x7f80ff01, 0x7f800203, 10), 127 * 127 + 128 * 128 - 2 + 3 + 10);
  note(r, __dp4a(0x7f80ff01u, 0x7f800203u, 10u), 127 * 127 + 128 * 128 + 510 + 3 + 10);
  note(r, __dp4a(0x7f7f7f7f, 0x7f7f7f7f, INT_MAX), static_cast<double>(INT_MIN + 4 * 127 * 127 - 1));
  note(r, __dp4a(make_char4(1, -2, 3, -4), make_char4(5, 6, 7, 8), -1), 5 - 12 + 21 - 32 - 1);
  note(r, __dp4a(make_uchar4(255, 0, 1, 2), make_uchar4(255, 9, 1, 2), 1u), 65025 + 1 + 4 + 1);
  note(r, min(-1, 2u), 2);
  note(r, max(-1, 2), 2);
  note(r, min(-3ll, 2ll), -3);
}

__global__ void floats(Results* r) {
  const float nan = __int_as_float(0x7fffffff), infinity = __int_as_float(0x7f800000);
  note(r, __float2int_rn(2.5f), 2);
  note(r, __float2int_rn(3.5f), 4);
  note(r, __float2int_rn(-2.5f), -2);
  note(r, __float2int_rz(-2.9f), -2);
  note(r, __float2int_ru(2.1f), 3);
  note(r, __float2int_rd(-2.1f), -3);
  note(r, __float2int_rn(1e20f), INT_MAX);
  note(r, __float2int_rn(-1e20f), INT_MIN);
  note(r, __float2int_rn(nan), 0);
  note(r, __float2uint_rn(-5.0f), 0);
  note(r, __float2uint_rn(4e9f), 4e9);
  note(r, static_cast<double>(__float2ll_rn(infinity)), static_cast<double>(LLONG_MAX));
  note(r, __int2float_rn(16777217), 16777216);
  note(r, __uint2float_rn(0xffffffffu), 4294967296.0);
  note(r, min(nan, 3.0f), 3);
  note(r, max(3.0f, nan), 3);
  note(r, fmaxf(-infinity, -1.0f), -1);
  note(r, __saturatef(-2.0f), 0);
  note(r, __saturatef(0.25f), 0.25);
  note(r, __saturatef(nan), 0);
  note(r, __fmaf_rn(3.0f, 5.0f, 0.5f), 15.5);
  note(r, __fmaf_rn(1.0f + 0x1p-12f, 1.0f - 0x1p-12f, -1.0f), -0x1p-24);
  note(r, __fadd_rn(1.0f, 0x1p-24f), 1);
  note(r, __fmul_rn(1.5f, 1.5f), 2.25);
  note(r, __fdiv_rn(1.0f, 3.0f), 1.0f / 3.0f);
  note(r, fabs(rsqrtf(4.0f) - 0.5f) < 1e-6f, 1);
  note(r, fabs(__expf(1.0f) - 2.7182817f) < 1e-5f, 1);
  note(r, __half2float(__float2half_rn(65519.0f)), 65504);
  note(r, __half2float(__float2half_rn(65520.0f)), infinity);
  note(r, __half2float(__float2half_rn(1.0f + 0x1p-11f)), 1);
  note(r, __half2float(__float2half_rn(1.0f + 3 * 0x1p-11f)), 1 + 0x1p-9);
  note(r, __half2float(__float2half_rn(0x1p-25f)), 0);
  note(r, __half2float(__float2half_rn(0x1.8p-25f)), 0x1p-24);
  note(r, __half2float(__float2half_rn(nan)), nan);
  note(r, __bfloat162float(__float2bfloat16_rn(1.0f + 0x1p-8f)), 1);
  note(r, __bfloat162float(__float2bfloat16_rn(1.0f + 3 * 0x1p-8f)), 1 + 0x1p-6);
  note(r, __bfloat162float(__float2bfloat16_rn(3.4e38f)), infinity);
  note(r, __bfloat162float(__float2bfloat16_rn(nan)), nan);
  note(r, __low2float(__hadd2(__floats2half2_rn(1.0f, 2.0f), __floats2half2_rn(0.5f, 0.25f))), 1.5);
  note(r,
       __high2float(
           __hfma2(__floats2half2_rn(1.0f, 2.0f), __floats2half2_rn(3.0f, 4.0f), __float2half2_rn(1.0f))),
       9);
}

// Each does one operation, notes what was there before, and then what is there.
template <typename T, typename Operation>
__device__ void atomically(Results* r, T before, double after, Operation operation) {
  __shared__ T place;
  place = before;
  note(r, static_cast<double>(operation(&place)), static_cast<double>(before));
  note(r, static_cast<double>(place), after);
}

using Long = unsigned long long;

__global__ void atomics(Results* r) {
  atomically(r, 5, 3, [](int* p) { return atomicAdd(p, -2); });
  atomically(r, 0xffffffffu, 1, [](unsigned* p) { return atomicAdd(p, 2u); });
  atomically(r, Long{1} << 40, static_cast<double>((Long{1} << 40) + 1),
             [](Long* p) { return atomicAdd(p, Long{1}); });
  atomically(r, 1.5f, 2, [](float* p) { return atomicAdd(p, 0.5f); });
  atomically(r, 1.5, 2, [](double* p) { return atomicAdd(p, 0.5); });
  atomically(r, 5, 7, [](int* p) { return atomicSub(p, -2); });
  atomically(r, 5, 9, [](int* p) { return atomicExch(p, 9); });
  atomically(r, 5.0f, 9, [](float* p) { return atomicExch(p, 9.0f); });
  atomically(r, 5, -9, [](int* p) { return atomicMin(p, -9); });
  atomically(r, 5u, 5, [](unsigned* p) { return atomicMin(p, 0xfffffff0u); });
  atomically(r, -5ll, 9, [](long long* p) { return atomicMax(p, 9ll); });
  atomically(r, 5u, 0xfffffff0u, [](unsigned* p) { return atomicMax(p, 0xfffffff0u); });
  atomically(r, 5u, 6, [](unsigned* p) { return atomicInc(p, 6u); });
  atomically(r, 6u, 0, [](unsigned* p) { return atomicInc(p, 6u); });
  atomically(r, 0u, 6, [](unsigned* p) { return atomicDec(p, 6u); });
  atomically(r, 9u, 6, [](unsigned* p) { return atomicDec(p, 6u); });
  atomically(r, 4u, 3, [](unsigned* p) { return atomicDec(p, 6u); });
  atomically(r, 12, 8, [](int* p) { return atomicAnd(p, 10); });
  atomically(r, 12u, 14, [](unsigned* p) { return atomicOr(p, 10u); });
  atomically(r, Long{12}, 6, [](Long* p) { return atomicXor(p, Long{10}); });
  atomically(r, 5, 7, [](int* p) { return atomicCAS(p, 5, 7); });
  atomically(r, 5, 5, [](int* p) { return atomicCAS(p, 6, 7); });
  atomically(r, Long{5}, 7, [](Long* p) { return atomicCAS(p, Long{5}, Long{7}); });
  atomically(r, 5, 6, [](int* p) { return atomicAdd_system(p, 1); });
  atomically(r, 5u, 6, [](unsigned* p) { return atomicAdd_block(p, 1u); });
}

// ---- many threads at once ----

__global__ void add_halves(__half* half, __nv_bfloat16* bfloat, double* sum, Long* most) {
  atomicAdd(half, __float2half(1.0f));
#if RK_ARCH >= 800
  atomicAdd(bfloat, __float2bfloat16(1.0f));
#endif
  atomicAdd(sum, 0.5);
  atomicMax(most, Long{threadIdx.x} << 33);
}

// A lock, held by one thread at a time, in shared memory.
__global__ void update_by_compare_and_swap(float* product) {
  int* bits = reinterpret_cast<int*>(product);
  int seen = atomicAdd(bits, 0);
  for (;;) {
    const int before = atomicCAS(bits, seen, __float_as_int(__int_as_float(seen) * 2.0f));
    if (before == seen) break;
    seen = before;
  }
}

__global__ void all_halves(float* half, float* bfloat) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const __half_raw h{static_cast<unsigned short>(i)};
  const __nv_bfloat16_raw b{static_cast<unsigned short>(i)};
  half[i] = __half2float(__half(h));
  bfloat[i] = __bfloat162float(__nv_bfloat16(b));
}

float decode(unsigned bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits & ((1u << exponent_bits) - 1));
  const double fraction = bits & ((1u << fraction_bits) - 1), one = 1 << fraction_bits;
  double value =
      exponent == 0 ? std::ldexp(fraction / one, 1 - bias) : std::ldexp(1 + fraction / one, exponent - bias);
  if (exponent == (1 << exponent_bits) - 1) value = fraction == 0 ? INFINITY : NAN;
  return static_cast<float>(bits >> 15 ? -value : value);
}

__global__ void cached(const float4* in, float4* out) {
  const unsigned i = threadIdx.x;
  float4 x = __ldg(in + i), y = __ldcs(in + i), z = __ldcg(in + i), w = __ldca(in + i);
  __stcs(out + i, make_float4(x.x + y.x, x.y + z.y, y.z + z.z, x.w + w.w));
}

}  // namespace

RK_RIGHT(bits) { return check(bits); }
RK_RIGHT(floats) { return check(floats); }
RK_RIGHT(atomics) { return check(atomics); }
RK_RIGHT(atomics_of_many) {
  Buffer<__half> half(1, __float2half(0.0f));
  Buffer<__nv_bfloat16> bfloat(1, __float2bfloat16(0.0f));
  Buffer<double> sum(1, 0.0);
  Buffer<Long> most(1, 0);
  RK_RUN(add_halves, 3, 64, 0, nullptr, half.get(), bfloat.get(), sum.get(), most.get());
  return same("half", 0, __half2float(half[0]), 192.0f) && same("sum", 0, sum[0], 96.0) &&
         same("most", 0, most[0], Long{63} << 33);
}
RK_RIGHT(compare_and_swap) {
  Buffer<float> product(1, 1.0f);
  RK_RUN(update_by_compare_and_swap, 2, 40, 0, nullptr, product.get());
  return same("product", 0, product[0], 0x1p80f);
}
RK_RIGHT(all_16_bit_floats) {
  Buffer<float> half(65536), bfloat(65536);
  RK_RUN(all_halves, 256, 256, 0, nullptr, half.get(), bfloat.get());
  bool good = true;
  for (unsigned i = 0; i < 65536 && good; ++i) {
    const float h = decode(i, 5), b = decode(i, 8);
    good = (std::isnan(h) ? std::isnan(half[i]) : same("half", static_cast<int>(i), half[i], h)) &&
           (std::isnan(b) ? std::isnan(bfloat[i]) : same("bfloat16", static_cast<int>(i), bfloat[i], b));
  }
  return good;
}
RK_RIGHT(cached_loads) {
  Buffer<float4> in(32), out(32);
  for (int i = 0; i < 32; ++i) in[i] = make_float4(i + 0.0f, i + 0.25f, i + 0.5f, i + 0.75f);
  RK_RUN(cached, 1, 32, 0, nullptr, in.get(), out.get());
  bool good = true;
  for (int i = 0; i < 32; ++i) {
    good = same("x", i, out[i].x, 2.0f * i) && same("y", i, out[i].y, 2.0f * i + 0.5f) &&
           same("z", i, out[i].z, 2.0f * i + 1.0f) && same("w", i, out[i].w, 2.0f * i + 1.5f) && good;
  }
  return good;
}
