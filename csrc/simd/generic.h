// Vectors for any CPU. Included by vectors.h only, inside its namespaces.
#pragma once

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
// They wrap, as the instructions of the other levels do: a damaged pack may hold any sums.
typedef uint32_t vu __attribute__((vector_size(16)));
inline vi add_i(vi a, vi b) {
  return reinterpret_cast<vi>(reinterpret_cast<vu>(a) + reinterpret_cast<vu>(b));
}
inline vi sub_i(vi a, vi b) {
  return reinterpret_cast<vi>(reinterpret_cast<vu>(a) - reinterpret_cast<vu>(b));
}
inline vi mul_i(vi a, vi b) {
  return reinterpret_cast<vi>(reinterpret_cast<vu>(a) * reinterpret_cast<vu>(b));
}
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

using Quad = vi;
template <int J>
inline vi spread_i(Quad q) {
  return broadcast_i(q[J]);
}

struct Words32 {
  const int32_t* words;
};
inline Words32 load_words32(const int32_t* p) { return {p}; }
inline vi pick(const Words32& words, const uint8_t* at) {
  return vi{words.words[at[0]], words.words[at[1]], words.words[at[2]], words.words[at[3]]};
}
inline vi pick_shared(const Words32& words, const uint8_t* at) { return broadcast_i(words.words[at[0]]); }
inline vf load_i8(const void* p) {
  const int8_t* b = static_cast<const int8_t*>(p);
  return vf{float(b[0]), float(b[1]), float(b[2]), float(b[3])};
}

inline vi dot_bytes(vi acc, vi a, vi w) {
  for (int shift = 0; shift < 32; shift += 8)
    acc = add_i(acc, (a >> shift & 255) * (w << (24 - shift) >> 24));
  return acc;
}

inline void transpose(vf (&r)[lanes]) {
  const vf a = {r[0][0], r[1][0], r[2][0], r[3][0]}, b = {r[0][1], r[1][1], r[2][1], r[3][1]};
  const vf c = {r[0][2], r[1][2], r[2][2], r[3][2]}, d = {r[0][3], r[1][3], r[2][3], r[3][3]};
  r[0] = a, r[1] = b, r[2] = c, r[3] = d;
}
