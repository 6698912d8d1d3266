// What the linear operators share on GPUs: rows of floats, and what becomes of a product.
#pragma once

#include "device.cuh"
#include "linear.h"

namespace rk {

__device__ __forceinline__ float float_at(const void* p, FloatType type, int64_t i) {
  if (type == FloatType::f32) return load_constant<float>(static_cast<const float*>(p) + i);
  const uint32_t bits = load_constant<unsigned short>(static_cast<const unsigned short*>(p) + i);
  return type == FloatType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
}

// Four neighbours; where `wide` they are read at once. Those past the end of the row are zero.
__device__ __forceinline__ void load_four(float (&v)[4], const void* row, FloatType type, int at, int end,
                                          bool wide) {
  if (!wide || at + 4 > end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = at + i < end ? float_at(row, type, at + i) : 0.0f;
  } else if (type == FloatType::f32) {
    uint32_t word[4];
    load_words(word, static_cast<const float*>(row) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = bits_as<float>(word[i]);
  } else {
    uint32_t word[2];
    load_words(word, static_cast<const unsigned short*>(row) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = word[i / 2] >> (16 * (i % 2)) & 0xffffu;
      v[i] = type == FloatType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
  }
}

__device__ __forceinline__ void store_float(void* to, FloatType type, int64_t at, float y) {
  if (type == FloatType::f32) {
    static_cast<float*>(to)[at] = y;
  } else if (type == FloatType::f16) {
    static_cast<__half*>(to)[at] = __float2half_rn(y);
  } else {
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(y);
  }
}

// NaN stays NaN in each of them.
__device__ __forceinline__ float activated(float y, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::relu:
      return y < 0.0f ? 0.0f : y;
    case Epilogue::gelu:
      return y * 0.5f * erfcf(y * -0.70710678f);
    case Epilogue::sigmoid:
      return 1.0f / (1.0f + expf(-y));
    case Epilogue::silu:
      return y / (1.0f + expf(-y));
    default:
      return y;
  }
}

// What becomes of a product, and where it goes.
struct Finish {
  const void* bias;  // null: none
  FloatType bias_type;
  void* out;  // [m][n]
  FloatType type;
  Epilogue epilogue;
  int32_t n;

  __device__ __forceinline__ void operator()(int64_t row, int column, float y) const {
    if (bias != nullptr) y = __fadd_rn(y, float_at(bias, bias_type, column));
    store_float(out, type, row * n + column, activated(y, epilogue));
  }
};

}  // namespace rk
