// Types for the activations and results of the linear operators: raw pointers and numbers, without torch.
#pragma once

#include <cstdint>

#include "core/element_type.h"

namespace rk {

// How activations come in: quantized row by row, with one scale for all, or left as floats.
enum class Scheme : int32_t { dynamic, fixed, weight_only };

// The most inputs of a layer whose products are of bytes: beyond, sums of 255 * 127 would leave 32 bits.
constexpr int64_t max_k = 65536;

enum class Epilogue : int32_t { none, relu, gelu, sigmoid, silu };

// One row of quantized activations stands for scale * (q - zero_point).
struct RowScale {
  float scale;  // NaN where the row holds NaN or infinity
  int32_t zero_point;
};

}  // namespace rk
