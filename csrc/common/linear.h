// What the linear operators say of activations and results: raw pointers and numbers; nothing of torch.
#pragma once

#include <cstdint>

namespace rk {

enum class FloatType : int32_t { f32, f16, bf16 };

// How activations come in: quantized row by row, with one scale for all, or left as floats.
enum class Scheme : int32_t { dynamic, fixed, weight_only };

enum class Epilogue : int32_t { none, relu, gelu, sigmoid, silu };

// A matrix of floats whose rows stand `stride` elements apart.
struct FloatMatrix {
  void* data;
  int64_t stride;
  FloatType type;
};

// One row of quantized activations stands for scale * (q - zero_point).
struct RowScale {
  float scale;  // NaN where the row holds NaN or infinity
  int32_t zero_point;
};

}  // namespace rk
