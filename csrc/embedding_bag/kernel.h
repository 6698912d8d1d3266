// The embedding-bag kernels: raw pointers, sizes and strides; nothing of torch.
//
// kernel.cpp is compiled once per instruction-set level; each object exports one table of functions.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/element_type.h"

namespace rk {

enum class Pooling : int32_t { sum = 0, mean = 1, max = 2 };

// One embedding table. Quantized rows stand for scale * q + bias, times 2^exponent for the whole table.
struct Table {
  const void* rows;
  const void*
      scale_bias;  // fp16 (scale, bias) per row, in an array of their own or inside the rows; null for floats
  int64_t num_rows;
  int64_t row_stride;         // bytes
  int64_t scale_bias_stride;  // bytes
  int64_t dim;                // elements
  ElementType type;
  float multiplier;  // 2^exponent; 1 for float rows
};

// Bags of indices. Bag b holds the positions [offset(b), offset(b + 1)).
struct Bags {
  const void* indices;
  const void* offsets;  // null: every bag holds `bag_length` indices
  const void* weights;  // per-sample weights of type `weights_type`, or null
  int64_t num_indices;
  int64_t num_bags;
  int64_t bag_length;
  int64_t padding_idx;  // rows that count for nothing; -1: none
  bool indices_64;      // int64, else int32
  bool offsets_64;
  bool has_last_offset;  // offsets has num_bags + 1 entries; else the last bag ends at num_indices
  ElementType weights_type;
  Pooling pooling;
};

// Returns where bag `bag` begins and bag `bag - 1` ends. It is static, as an inline function would be a weak
// symbol.
static inline int64_t offset_at(const Bags& b, int64_t bag) {
  if (b.offsets == nullptr) return bag * b.bag_length;
  if (bag == b.num_bags && !b.has_last_offset) return b.num_indices;
  return b.offsets_64 ? static_cast<const int64_t*>(b.offsets)[bag]
                      : static_cast<const int32_t*>(b.offsets)[bag];
}

enum class FaultKind : int32_t { none, index, offset, value };

// The first thing wrong with the input: where it stands and what it is.
struct Fault {
  FaultKind kind;
  int64_t position;
  int64_t value;
};

// A gradient contribution to one row: weight * grad[bag].
struct Contribution {
  uint32_t row;  // relative to the first row of the range
  uint32_t bag;
  double weight;
};

struct EmbeddingBagKernels {
  // Pools bags [first, last) of a table into `out`. `scratch` holds dim floats (quantized or 16-bit rows).
  void (*pool)(const Table&, const Bags&, const Matrix& out, int64_t first, int64_t last, float* scratch,
               Fault*);
  // Max pooling; `argmax` (null, or [num_bags][dim]) takes the row that each column came from, -1 for an
  // empty bag. `scratch` holds 2 * dim floats.
  void (*pool_max)(const Table&, const Bags&, const Matrix& out, int64_t* argmax, int64_t first, int64_t last,
                   float* scratch, Fault*);
  // Lists the contributions to rows [first_row, last_row), sorted by row and then by position; returns how
  // many. `list` and `spare` hold num_indices entries each. Every index is checked, also those of other rows.
  int64_t (*collect)(const Bags&, int64_t num_rows, int64_t first_row, int64_t last_row, Contribution* list,
                     Contribution* spare, Fault*);
  // Writes rows [first_row, last_row) of the dense gradient, each byte once, from sorted contributions.
  void (*reduce)(const Matrix& grad, const Contribution*, int64_t count, const Matrix& out, int64_t dim,
                 int64_t first_row, int64_t last_row, float* scratch);
  // d loss / d per_sample_weights for bags [first, last): dot(row, grad[bag]), over the bag's size for mean.
  void (*weights_gradient)(const Table&, const Bags&, const Matrix& grad, const Matrix& out, int64_t first,
                           int64_t last, Fault*);
  // Quantizes rows [first, last) to `bits` bits. A row with NaN or infinity is a fault of kind value.
  void (*quantize)(const Table& source, int bits, float inverse_multiplier, uint8_t* rows, int64_t row_stride,
                   uint8_t* scale_bias, int64_t scale_bias_stride, int64_t first, int64_t last,
                   float* scratch, Fault*);
  // Reads the first rows of the first bags into L2, so that several tables' misses overlap.
  void (*warm)(const Table&, const Bags&);
};

}  // namespace rk

RK_KERNEL_TABLES(rk::EmbeddingBagKernels, rk_embedding_bag)
