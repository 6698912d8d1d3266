// Rows of activations to bytes on GPUs. The arithmetic is that of the reference, bit for bit.
//
// Quantized numbers are 0 to 255, but products are of signed bytes: rows are stored less 128, and what that
// and the zero point take from a sum is given back through the sum of the weights.
#pragma once

#include "core/element_type.h"
#include "cuda/cuda.cuh"

namespace rk {

struct QuantizeArguments {
  const char* x;
  int64_t x_stride;  // bytes
  ElementType type;
  bool wide;  // groups of four are aligned
  int32_t m, k, q_stride;
  const float* qparams;  // scale and zero point; null: those of each row
  int8_t* q;             // [m, up to the next multiple of 8][q_stride], less 128
  float* scale;          // [m]; NaN where a row holds NaN or infinity
  int32_t* zero;         // [m]
};

// Rows up to the next multiple of 8 are written: those past the last one are zero.
void quantize_rows(const QuantizeArguments& arguments, cudaStream_t stream);

}  // namespace rk
