// The int8 linear kernels: raw pointers, sizes and strides; nothing of torch.
//
// kernel.cpp is compiled once per instruction-set level; each object exports one table of functions.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "linear/types.h"

namespace rk {

constexpr int64_t block = 16;  // output columns that lie together in a packed layer

// What stands at the start of a packed layer.
struct LayerHeader {
  int32_t magic, version, k, n, group, scheme, epilogue, has_bias;
  float input_scale;
  int32_t input_zero_point;
  int32_t reserved[6];
};
static_assert(sizeof(LayerHeader) == 64);
constexpr int32_t layer_magic = 0x384b4352, layer_version = 1;

// A packed layer: y = epilogue(x W^T + bias) for W [n][k].
struct Layer {
  int64_t k, n, groups, group;  // `group`: how many of k share a scale; all of them where groups is 1
  Scheme scheme;
  Epilogue epilogue;
  float input_scale;
  int32_t input_zero_point;
  const float* scales;    // [groups][padded n]
  const float* bias;      // [padded n]
  const int32_t* sums;    // [groups][padded n]: of the weights of a column
  const int8_t* weights;  // [padded n / 16][padded k / 4][16][4]

  int64_t padded_k() const { return (k + 3) / 4 * 4; }
  int64_t padded_n() const { return (n + block - 1) / block * block; }
};

// Memory for `rows` rows of every layer's input and output.
struct Scratch {
  float* floats[2];  // [rows][widest padded n, or k]
  int64_t width;
  // The quantized input of a layer and that of the next one.
  uint8_t* bytes[2];  // [rows][twice the largest padded k, and at least the largest padded n]
  int64_t bytes_stride;
  RowScale* scales[2];  // [rows]
  int16_t* wide;        // [wide_columns][largest padded k], aligned to 64 bytes
};

struct Int8LinearKernels {
  // Sends rows [first, last) of `in` through all layers into `out`, `rows` at a time. With a single layer
  // only the columns of the blocks [first_block, last_block) are computed.
  void (*run)(const Layer*, int64_t layers, const Matrix& in, const Matrix& out, int64_t first, int64_t last,
              int64_t rows, int64_t first_block, int64_t last_block, const Scratch&);
  int64_t wide_columns;  // of which the kernels keep a copy with 16 bits a weight; 0 where they need none
};

}  // namespace rk

RK_KERNEL_TABLES(rk::Int8LinearKernels, rk_int8_linear)
