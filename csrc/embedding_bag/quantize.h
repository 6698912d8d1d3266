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

// Row-wise asymmetric quantization: bias = min, scale = (max - min) / levels, both rounded outwards to fp16.
void quantize_row(const float* __restrict x, int64_t dim, int bits, uint8_t* __restrict q,
                  uint8_t* scale_bias) {
  float low = x[0], high = x[0];
  for (int64_t c = 1; c < dim; ++c) {
    low = x[c] < low ? x[c] : low;
    high = x[c] > high ? x[c] : high;
  }
  const float levels = bits == 8 ? 255.0f : 15.0f;
  uint16_t half[2];
  half[1] = round_half_towards(low, -1);
  const float bias = simd::f16_to_float(half[1]);
  half[0] = round_half_towards((high - bias) / levels, +1);
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
  if (bits == 8) {
    for (int64_t c = 0; c < dim; ++c) q[c] = level(x[c]);
  } else {
    for (int64_t c = 0; c + 1 < dim; c += 2)
      q[c / 2] = static_cast<uint8_t>(level(x[c]) | level(x[c + 1]) << 4);
    if (dim % 2 != 0) q[dim / 2] = level(x[dim - 1]);
  }
}

void quantize(const Table& source, int bits, float inverse_multiplier, uint8_t* rows, int64_t row_stride,
              uint8_t* scale_bias, int64_t scale_bias_stride, int64_t first, int64_t last, float* x,
              Fault* fault) {
  for (int64_t row = first; row < last; ++row) {
    switch (source.type) {
      case RowType::f64:
        for (int64_t c = 0; c < source.dim; ++c) {
          const char* data = static_cast<const char*>(source.rows) + row * source.row_stride;
          x[c] = static_cast<float>(reinterpret_cast<const double*>(data)[c]);
        }
        break;
      case RowType::f32:
        decode<RowType::f32>(source, row, x);
        break;
      case RowType::f16:
        decode<RowType::f16>(source, row, x);
        break;
      default:
        decode<RowType::bf16>(source, row, x);
        break;
    }
    uint32_t bad = 0;
    for (int64_t c = 0; c < source.dim; ++c) {
      bad |= static_cast<uint32_t>((simd::bits_of(x[c]) & 0x7f800000u) == 0x7f800000u);
      x[c] *= inverse_multiplier;
    }
    if (bad != 0) {
      *fault = {FaultKind::value, row, 0};
      return;
    }
    quantize_row(x, source.dim, bits, rows + row * row_stride, scale_bias + row * scale_bias_stride);
  }
}

}  // namespace
