// Rows of floats whose type is known at run time only.
#pragma once

#include "core/element_type.h"
#include "cuda/device.cuh"

namespace rk {

__device__ __forceinline__ float float_at(const void* p, ElementType type, int64_t i) {
  if (type == ElementType::f32) return load_constant<float>(static_cast<const float*>(p) + i);
  const uint32_t bits = load_constant<unsigned short>(static_cast<const unsigned short*>(p) + i);
  return type == ElementType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
}

// Four neighbours; where `wide` they are read at once. Those past the end of the row are zero.
__device__ __forceinline__ void load_four(float (&v)[4], const void* row, ElementType type, int at, int end,
                                          bool wide) {
  if (!wide || at + 4 > end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = at + i < end ? float_at(row, type, at + i) : 0.0f;
  } else if (type == ElementType::f32) {
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
      v[i] = type == ElementType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
  }
}

__device__ __forceinline__ void store_float(void* to, ElementType type, int64_t at, float y) {
  if (type == ElementType::f32) {
    static_cast<float*>(to)[at] = y;
  } else if (type == ElementType::f16) {
    static_cast<__half*>(to)[at] = __float2half_rn(y);
  } else {
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(y);
  }
}

}  // namespace rk
