// Row-wise quantization.
#pragma once

#include "bags.h"

namespace {

// The nearest half that is not above (direction -1) or not below (+1) x, so that no element is clipped.
inline uint16_t round_half_towards(float x, int direction) {
  uint16_t h = simd::float_to_f16(x);
  const float back = simd::f16_to_float(h);
  if (direction > 0 ? back >= x : back <= x) return h;
  if ((h & 0x7fff) == 0) return direction > 0 ? 0x0001 : 0x8001;
  const bool away = ((h & 0x8000) == 0) == (direction > 0);
  return static_cast<uint16_t>(away ? h + 1 : h - 1);
}

// Calls f(c) so that vectors at all c cover a row of at least one vector; the last two can overlap.
template <typename F>
inline void for_each_whole_vector(int64_t dim, F&& f) {
  for (int64_t c = 0; c + lanes <= dim; c += lanes) f(c);
  if (dim % lanes != 0) f(dim - lanes);
}

struct RowRange {
  float low, high;
  bool finite;
};

RowRange range_of(const float* x, int64_t dim) {
  if (dim < lanes) {
    RowRange r{x[0], x[0], true};
    for (int64_t c = 0; c < dim; ++c) {
      r.low = x[c] < r.low ? x[c] : r.low;
      r.high = x[c] > r.high ? x[c] : r.high;
      r.finite = r.finite && (simd::bits_of(x[c]) & 0x7f800000u) != 0x7f800000u;
    }
    return r;
  }
  vf low = simd::load_f32(x), high = low;
  simd::vi bits = simd::zero_i();
  for_each_whole_vector(dim, [&](int64_t c) {
    const vf v = simd::load_f32(x + c);
    low = simd::at_most(v, low);
    high = simd::at_least(v, high);
    bits = simd::max_i(bits, simd::magnitude_bits(v));
  });
  return {simd::smallest(low), simd::largest(high), simd::largest_i(bits) < 0x7f800000};
}

// Eight levels of 4 bits, a byte each, as the four bytes that hold them in pairs, the even one in the low
// half.
inline uint32_t pack_nibbles(const uint8_t* levels) {
  uint64_t w;
  std::memcpy(&w, levels, sizeof w);
  w = (w | w >> 4) & 0x00ff00ff00ff00ffull;
  w = (w | w >> 8) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(w | w >> 16);
}

// Row-wise asymmetric quantization: bias = min, scale = (max - min) / levels, both rounded outwards to fp16.
void quantize_row(const float* __restrict x, int64_t dim, RowRange range, int bits, uint8_t* __restrict q,
                  uint8_t* scale_bias) {
  const float levels = bits == 8 ? 255.0f : 15.0f;
  uint16_t half[2];
  // If a row has zeros of both signs, its minimum may be either zero. Adding zero removes the sign.
  half[1] = round_half_towards(range.low + 0.0f, -1);
  const float bias = simd::f16_to_float(half[1]);
  half[0] = round_half_towards(((range.high + 0.0f) - bias) / levels, +1);
  const float scale = simd::f16_to_float(half[0]);
  std::memcpy(scale_bias, half, sizeof half);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  // Adding 1.5 * 2^23 leaves the value, rounded to nearest even, in the low mantissa bits, on every level
  // alike.
  const auto level = [&](float v) {
    const float y = (v - bias) * inverse;
    const uint32_t u = simd::bits_of((y < levels ? y : levels) + 12582912.0f) - 0x4b400000u;
    return static_cast<uint8_t>(u);
  };
  const auto store_levels = [&](int64_t c, uint8_t* to) {
    const vf y = simd::mul(simd::sub(simd::load_f32(x + c), simd::broadcast(bias)), simd::broadcast(inverse));
    simd::store_u8(to, simd::round_i(simd::at_most(y, simd::broadcast(levels))));
  };
  if (bits == 8 && dim >= lanes) {
    for_each_whole_vector(dim, [&](int64_t c) { store_levels(c, q + c); });
  } else if (bits == 8) {
    for (int64_t c = 0; c < dim; ++c) q[c] = level(x[c]);
  } else {
    constexpr int64_t step = lanes < 8 ? 8 : lanes;
    int64_t c = 0;
    for (; c + step <= dim; c += step) {
      uint8_t each[step];
      for (int64_t v = 0; v < step; v += lanes) store_levels(c + v, each + v);
      for (int64_t v = 0; v < step; v += 8) {
        const uint32_t pairs = pack_nibbles(each + v);
        std::memcpy(q + (c + v) / 2, &pairs, sizeof pairs);
      }
    }
    for (; c + 1 < dim; c += 2) q[c / 2] = static_cast<uint8_t>(level(x[c]) | level(x[c + 1]) << 4);
    if (dim % 2 != 0) q[dim / 2] = level(x[dim - 1]);
  }
}

void quantize(const Table& source, int bits, float inverse_multiplier, uint8_t* rows, int64_t row_stride,
              uint8_t* scale_bias, int64_t scale_bias_stride, int64_t first, int64_t last, float* x,
              Fault* fault) {
  for (int64_t row = first; row < last; ++row) {
    switch (source.type) {
      case ElementType::f64:
        for (int64_t c = 0; c < source.dim; ++c) {
          const char* data = static_cast<const char*>(source.rows) + row * source.row_stride;
          x[c] = static_cast<float>(reinterpret_cast<const double*>(data)[c]);
        }
        break;
      case ElementType::f32:
        decode<ElementType::f32>(source, row, x);
        break;
      case ElementType::f16:
        decode<ElementType::f16>(source, row, x);
        break;
      default:
        decode<ElementType::bf16>(source, row, x);
        break;
    }
    const RowRange range = range_of(x, source.dim);
    if (!range.finite) {
      *fault = {FaultKind::value, row, 0};
      return;
    }
    if (inverse_multiplier != 1.0f) {
      for (int64_t c = 0; c < source.dim; ++c) x[c] *= inverse_multiplier;
    }
    // A positive factor keeps the order.
    quantize_row(x, source.dim, {range.low * inverse_multiplier, range.high * inverse_multiplier, true}, bits,
                 rows + row * row_stride, scale_bias + row * scale_bias_stride);
  }
}

}  // namespace
