// The types that elements in memory have, for every kernel. Nothing of torch.
#pragma once

#include <cstdint>

namespace rk {

// u4: a byte holds two elements, the even one in its low half. i8x4: four bytes hold four columns of weights,
// which are multiplied together.
enum class ElementType : int32_t { f64, f32, f16, bf16, u8, u4, i8, i8x4 };

// A matrix whose rows begin `stride` elements apart.
struct Matrix {
  void* data;
  int64_t stride;
  ElementType type;
};

}  // namespace rk
