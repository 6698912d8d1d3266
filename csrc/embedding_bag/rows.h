// Rows of every type as vectors of floats.
#pragma once

#include "kernel.h"
#include "simd/vectors.h"

namespace {

using rk::ElementType;
using rk::Matrix;
using rk::Table;
using simd::lanes;
using simd::vf;

constexpr bool is_quantized(ElementType t) { return t == ElementType::u8 || t == ElementType::u4; }

constexpr int64_t row_bytes(ElementType t, int64_t dim) {
  switch (t) {
    case ElementType::f64:
      return dim * 8;
    case ElementType::f32:
      return dim * 4;
    case ElementType::f16:
    case ElementType::bf16:
      return dim * 2;
    case ElementType::u8:
      return dim;
    default:
      return (dim + 1) / 2;
  }
}

// One vector (u4: two, even and odd elements) from byte or element `first` on; n < lanes only for the last
// one.
template <ElementType T>
inline vf load(const uint8_t* row, int64_t first) {
  if constexpr (T == ElementType::f32) return simd::load_f32(reinterpret_cast<const float*>(row) + first);
  if constexpr (T == ElementType::f16) return simd::load_f16(row + 2 * first);
  if constexpr (T == ElementType::bf16) return simd::load_bf16(row + 2 * first);
  return simd::load_u8(row + first);
}

template <ElementType T>
inline vf load(const uint8_t* row, int64_t first, int n) {
  if constexpr (T == ElementType::f32) return simd::load_f32(reinterpret_cast<const float*>(row) + first, n);
  if constexpr (T == ElementType::f16) return simd::load_f16(row + 2 * first, n);
  if constexpr (T == ElementType::bf16) return simd::load_bf16(row + 2 * first, n);
  return simd::load_u8(row + first, n);
}

// acc += w * row, the whole row in registers. Only a row whose last vector is not full needs a mask.
template <ElementType T, int N, bool Full>
inline void add_row(vf (&acc)[N], const uint8_t* row, vf w, int tail) {
  if constexpr (T == ElementType::u4) {
#pragma GCC unroll 16
    for (int g = 0; g < N / 2; ++g) {
      vf even, odd;
      if (Full || g < N / 2 - 1) {
        simd::load_i4(row + g * lanes, even, odd);
      } else {
        simd::load_i4(row + g * lanes, tail, even, odd);
      }
      acc[2 * g] = simd::fma(even, w, acc[2 * g]);
      acc[2 * g + 1] = simd::fma(odd, w, acc[2 * g + 1]);
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      const bool full = Full || v < N - 1;
      acc[v] = simd::fma(full ? load<T>(row, v * lanes) : load<T>(row, v * lanes, tail), w, acc[v]);
    }
  }
}

void store(const Matrix& out, int64_t offset, vf x, int n) {
  switch (out.type) {
    case ElementType::f32:
      return simd::store_f32(static_cast<float*>(out.data) + offset, x, n);
    case ElementType::f16:
      return simd::store_f16(static_cast<uint16_t*>(out.data) + offset, x, n);
    case ElementType::bf16:
      return simd::store_bf16(static_cast<uint16_t*>(out.data) + offset, x, n);
    default: {
      float f[lanes];
      simd::store_f32(f, x);
      for (int i = 0; i < n; ++i) static_cast<double*>(out.data)[offset + i] = f[i];
    }
  }
}

__attribute__((noinline)) void store_floats(const Matrix& out, int64_t offset, const float* x, int64_t n) {
  for (int64_t c = 0; c < n; c += lanes) {
    const int rest = n - c < lanes ? static_cast<int>(n - c) : lanes;
    store(out, offset + c, simd::load_f32(x + c, rest), rest);
  }
}

// Stores a row from registers. Only floats are stored in line: the conversions would be unrolled 70 times
// over.
template <int N>
inline void store_registers(const vf (&acc)[N], const Matrix& out, int64_t offset, int64_t dim) {
  if (out.type != ElementType::f32) {
    float buffer[N * lanes];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) simd::store_f32(buffer + v * lanes, acc[v]);
    return store_floats(out, offset, buffer, dim);
  }
  float* p = static_cast<float*>(out.data) + offset;
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    // The last pair of a u4 row can end in its first vector.
    const int64_t left = dim - v * lanes;
    if (left >= lanes)
      simd::store_f32(p + v * lanes, acc[v]);
    else if (left > 0)
      simd::store_f32(p + v * lanes, acc[v], static_cast<int>(left));
  }
}

inline double element(const void* data, ElementType type, int64_t i) {
  switch (type) {
    case ElementType::f64:
      return static_cast<const double*>(data)[i];
    case ElementType::f32:
      return static_cast<const float*>(data)[i];
    case ElementType::f16:
      return simd::f16_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return simd::bf16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

// Calls f(first, vector, n) over a row as floats, without scale and bias.
template <ElementType T, typename F>
inline void for_each_vector(const uint8_t* row, int64_t dim, F&& f) {
  if constexpr (T == ElementType::u4) {
    const int64_t bytes = (dim + 1) / 2;
    for (int64_t b = 0; b < bytes; b += lanes) {
      vf even, odd;
      simd::load_i4(row + b, bytes - b < lanes ? static_cast<int>(bytes - b) : lanes, even, odd);
      simd::interleave(even, odd);
      const int64_t left = dim - 2 * b;
      f(2 * b, even, left < lanes ? static_cast<int>(left) : lanes);
      if (left > lanes) f(2 * b + lanes, odd, left < 2 * lanes ? static_cast<int>(left - lanes) : lanes);
    }
  } else {
    int64_t c = 0;
    for (; c + lanes <= dim; c += lanes) f(c, load<T>(row, c), lanes);
    if (c < dim) f(c, load<T>(row, c, static_cast<int>(dim - c)), static_cast<int>(dim - c));
  }
}

inline const uint8_t* scale_bias_of(const Table& t, int64_t row) {
  return static_cast<const uint8_t*>(t.scale_bias) + row * t.scale_bias_stride;
}

// Writes a row's values (scaled) to `x`.
template <ElementType T>
void decode(const Table& t, int64_t row, float* x) {
  simd::ScaleBias sb = simd::no_scale_bias();
  if constexpr (is_quantized(T)) sb = simd::load_scale_bias(scale_bias_of(t, row));
  const vf scale = simd::broadcast(sb.scale() * t.multiplier),
           bias = simd::broadcast(sb.bias() * t.multiplier);
  const uint8_t* data = static_cast<const uint8_t*>(t.rows) + row * t.row_stride;
  for_each_vector<T>(data, t.dim, [&](int64_t c, vf v, int n) {
    simd::store_f32(x + c, is_quantized(T) ? simd::fma(v, scale, bias) : v, n);
  });
}

}  // namespace
