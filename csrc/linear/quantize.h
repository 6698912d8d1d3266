// Rows of activations: to bytes, between float types, and to columns of a panel.
#pragma once

#include "linear/types.h"
#include "simd/vectors.h"

namespace {

using rk::ElementType;
using rk::Matrix;
using rk::RowScale;
using rk::Scheme;
using simd::lanes;
using simd::vf;
using simd::vi;

inline int32_t round_one(float x) {
  int32_t of[lanes];
  const vi rounded = simd::round_i(simd::broadcast(x));
  std::memcpy(of, &rounded, sizeof of);
  return of[0];
}

inline vf load_part(const float* x, int64_t k, int64_t n) {
  return n - k >= lanes ? simd::load_f32(x + k) : simd::load_f32(x + k, static_cast<int>(n - k));
}

struct Range {
  float low, high;  // zero is always inside
  bool finite;
};

inline Range range_of(const float* x, int64_t n) {
  vf low = simd::zero(), high = simd::zero();
  vi bits = simd::zero_i();
  for (int64_t k = 0; k < n; k += lanes) {
    const vf v = load_part(x, k, n);
    low = simd::at_most(v, low);
    high = simd::at_least(v, high);
    bits = simd::max_i(bits, simd::magnitude_bits(v));
  }
  return {simd::smallest(low), simd::largest(high), simd::largest_i(bits) < 0x7f800000};
}

// Floats to bytes, with the scale and zero point of their row.
class Quantizer {
 public:
  explicit Quantizer(const RowScale& row)
      : inverse_(simd::broadcast(1.0f / row.scale)),
        low_(simd::broadcast(static_cast<float>(-row.zero_point))),
        high_(simd::broadcast(static_cast<float>(255 - row.zero_point))),
        zero_(simd::broadcast_i(row.zero_point)) {}

  vi operator()(vf x) const {
    x = simd::at_least(simd::at_most(simd::mul(x, inverse_), high_), low_);
    return simd::add_i(simd::round_i(x), zero_);
  }

 private:
  vf inverse_, low_, high_;
  vi zero_;
};

// The `k` floats of a row to bytes, with zeros up to `padded_k`. A dynamic scheme takes scale and zero point
// from the row, another those of `fixed`. A row with NaN or infinity has the scale NaN.
inline RowScale quantize_row(Scheme scheme, const RowScale& fixed, const float* x, int64_t k,
                             int64_t padded_k, uint8_t* q) {
  const Range range = range_of(x, k);
  if (!range.finite) {
    std::memset(q, 0, static_cast<size_t>(padded_k));
    return {simd::float_of(0x7fc00000), 0};
  }
  RowScale row = fixed;
  if (scheme == Scheme::dynamic) {
    // Divided before they are subtracted: the difference can exceed the largest float.
    constexpr float part = 1.0f / 255.0f, least = 7.88860905e-31f;  // 2^-100
    row.scale = range.high * part - range.low * part;
    if (row.scale < least) row.scale = least;
    const int32_t zero = round_one(-range.low * (1.0f / row.scale));
    row.zero_point = zero < 0 ? 0 : zero > 255 ? 255 : zero;
  }
  const Quantizer quantize(row);
  int64_t i = 0;
  for (; i + lanes <= k; i += lanes) simd::store_u8(q + i, quantize(simd::load_f32(x + i)));
  if (i < k) {
    uint8_t last[lanes];
    simd::store_u8(last, quantize(load_part(x, i, k)));
    std::memcpy(q + i, last, static_cast<size_t>(k - i));
  }
  std::memset(q + k, 0, static_cast<size_t>(padded_k - k));
  return row;
}

// Types of 16 bits.
inline vf load_as_float(const Matrix& m, int64_t at, int n) {
  const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
  return m.type == ElementType::f16 ? simd::load_f16(p, n) : simd::load_bf16(p, n);
}

inline void to_floats(const Matrix& m, int64_t row, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c += lanes) {
    const int n = count - c < lanes ? static_cast<int>(count - c) : lanes;
    simd::store_f32(out + c, load_as_float(m, row * m.stride + c, n), n);
  }
}

inline void from_floats(const float* x, int64_t count, const Matrix& m, int64_t row) {
  for (int64_t c = 0; c < count; c += lanes) {
    const int n = count - c < lanes ? static_cast<int>(count - c) : lanes;
    uint16_t* p = static_cast<uint16_t*>(m.data) + row * m.stride + c;
    const vf v = simd::load_f32(x + c, n);
    m.type == ElementType::f16 ? simd::store_f16(p, v, n) : simd::store_bf16(p, v, n);
  }
}

// A row of activations as the floats that it stands for when it is quantized; zeros, and the scale NaN, if it
// has NaN or infinity. `memory` is for 2 * k floats.
inline RowScale quantize_floats(Scheme scheme, const RowScale& fixed, const Matrix& in, int64_t row,
                                int64_t k, float* memory, float* out) {
  const float* floats = static_cast<const float*>(in.data) + row * in.stride;
  if (in.type != ElementType::f32) to_floats(in, row, k, memory), floats = memory;
  uint8_t* const q = reinterpret_cast<uint8_t*>(memory + k);
  const RowScale of = quantize_row(scheme, fixed, floats, k, k, q);
  const vf zero = simd::broadcast(static_cast<float>(of.zero_point));
  const vf step = simd::broadcast(of.scale == of.scale ? of.scale : 0.0f);
  for (int64_t i = 0; i < k; i += lanes) {
    const int n = k - i < lanes ? static_cast<int>(k - i) : lanes;
    simd::store_f32(out + i, simd::mul(simd::sub(simd::load_u8(q + i, n), zero), step), n);
  }
  return of;
}

// NaN in the columns [from, to), as far as there are `n`, of the rows whose scale is NaN.
inline void spoil_rows(const RowScale* scales, const Matrix& out, int64_t row, int64_t rows, int64_t n,
                       int64_t from, int64_t to) {
  for (int64_t r = 0; r < rows; ++r) {
    if (scales[r].scale == scales[r].scale) continue;
    for (int64_t c = from; c < to && c < n; ++c) {
      const int64_t at = (row + r) * out.stride + c;
      if (out.type == ElementType::f32) {
        static_cast<float*>(out.data)[at] = scales[r].scale;
      } else {
        static_cast<uint16_t*>(out.data)[at] = out.type == ElementType::f16 ? 0x7e00 : 0x7fc0;
      }
    }
  }
}

// Rows [row, row + rows) of `in`, of `count` words each, become the columns of x [count][columns]; the
// columns that are left become zero.
inline void transpose_rows(const Matrix& in, int64_t row, int64_t rows, int64_t count, int64_t columns,
                           float* floats, int32_t* x) {
  for (int64_t c = 0; c < columns; c += lanes) {
    const float* from[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      from[i] = nullptr;
      if (c + i >= rows) continue;
      from[i] = static_cast<const float*>(in.data) + (row + c + i) * in.stride;
      if (in.type == ElementType::f32) continue;
      to_floats(in, row + c + i, count, floats + i * count);
      from[i] = floats + i * count;
    }
    float* to = reinterpret_cast<float*>(x) + c;
    int64_t k = 0;
    if (from[lanes - 1] != nullptr) {
      for (; k + lanes <= count; k += lanes) {
        vf square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = simd::load_f32(from[i] + k);
        simd::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) simd::store_f32(to + (k + i) * columns, square[i]);
      }
    }
    for (; k < count; k += lanes) {
      const int n = static_cast<int>(count - k < lanes ? count - k : lanes);
      vf square[lanes];
      for (int i = 0; i < lanes; ++i)
        square[i] = from[i] == nullptr ? simd::zero() : simd::load_f32(from[i] + k, n);
      simd::transpose(square);
      for (int i = 0; i < n; ++i) simd::store_f32(to + (k + i) * columns, square[i]);
    }
  }
}

}  // namespace
