// The steps after a product of a linear layer on GPUs: bias, activation function, result.
#pragma once

#include "cuda/floats.cuh"
#include "linear/types.h"

namespace rk {

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

// The steps after a product, and the place of the result.
struct Finish {
  const void* bias;  // null: none
  ElementType bias_type;
  void* out;  // [m][n]
  ElementType type;
  Epilogue epilogue;
  int32_t n;

  __device__ __forceinline__ void operator()(int64_t row, int column, float y) const {
    if (bias != nullptr) y = __fadd_rn(y, float_at(bias, bias_type, column));
    store_float(out, type, row * n + column, activated(y, epilogue));
  }
};

}  // namespace rk
