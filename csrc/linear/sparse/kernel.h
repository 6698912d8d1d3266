// The sparse linear kernels: raw pointers, sizes and strides; nothing of torch.
//
// kernel.cpp is compiled once per instruction-set level; each object exports one table of functions.
//
// A layer's columns are counted in cells, and so are its activations: a cell is 32 bits wide and holds one
// column as a float, or four columns of K as bytes where products are exact integers (ElementType::i8x4).
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "linear/types.h"

namespace rk {

// The bytes that the weights of one cell take: f32, f16, bf16, i8 (8-bit weights that are multiplied as
// floats) or i8x4.
constexpr int64_t cell_bytes(ElementType t) {
  return t == ElementType::f32 || t == ElementType::i8x4 ? 4 : t == ElementType::i8 ? 1 : 2;
}

// For few rows of activations: 16 rows of weights lie together, each in a lane of its own, and a chunk of
// cells stays in registers, from which every lane picks its cell.
// few_rows at a time; up to most_few_rows that is faster than a panel.
constexpr int64_t slab_rows = 16, chunk_cells = 32, few_rows = 4, most_few_rows = 8;
// For many: a block of cells times the columns of a panel of activations stays in L1 (32 KB for 32 columns).
constexpr int64_t block_cells = 256;
constexpr int64_t most_panel_columns = 64;

// What one group of rows has in a block of cells.
struct SparseItem {
  int32_t group;  // within the band
  int32_t count;  // of entries
};

// The items of one block of cells within a band, and the first of their entries.
struct SparseStream {
  int64_t first_item, items, first_entry;
};

// A packed layer: y = epilogue(x W^T * scale + bias). `group` rows of weights (1 or 4) share their cells.
struct SparseLayer {
  int64_t n, k, cells, group;
  ElementType type;
  // For f32: how rows are quantized before they become floats again. Other float types have weight_only.
  Scheme scheme;
  Epilogue epilogue;
  RowScale input;       // of a static scheme
  const float* scales;  // [padded n], or null
  const float* bias;    // [padded n]
  const int32_t* sums;  // [padded n]: of the weights of a row; i8x4
  const uint8_t*
      cell;  // of every entry: its cell within the chunk or the block; few: [steps][slab_rows / group]
  const uint8_t* value;  // many: [entries][group]; few: [steps][slab_rows]
  int64_t entries;       // few: steps

  // few
  int64_t slabs, chunks;
  const int32_t* order;        // [slabs][chunks]: a slab's chunks, those with most steps first
  const uint8_t* steps;        // [slabs][chunks], in this order: entries of the lane that has most of them
  const uint8_t* lane_counts;  // [slabs][chunks][slab_rows], in this order
  const int64_t* slab_starts;  // [slabs + 1]: steps before a slab

  // many
  int64_t bands, blocks;
  const int64_t* band_groups;   // [bands + 1]: the groups of a band, and with it its rows
  const SparseStream* streams;  // [bands][blocks]
  const SparseItem* items;
  int64_t item_count;

  int64_t padded_n() const { return (n + slab_rows - 1) / slab_rows * slab_rows; }
};

// Memory of one thread.
struct SparseScratch {
  // [cells rounded up to block_cells, and block_cells more][panel columns, or few_rows]: every value of a
  // byte is the number of a cell in this memory, so that kernels need not check the cells of a damaged pack.
  int32_t* x;
  int32_t* y;        // [rows of the largest band, a multiple of 16][panel columns]; many
  float* floats;     // [16][k]: activations of another float type, or bytes that become floats again
  uint8_t* bytes;    // [panel columns][4 * cells]: quantized activations, of f32 as floats
  RowScale* scales;  // [panel columns]
};

// What a gradient of kept weights is computed from: blocks of `rows` x `columns` weights.
struct SparseStructure {
  int64_t n, k, rows, columns;
  const int32_t* crow;  // [n / rows + 1]
  const int32_t* col;
};

struct SparseGradientScratch {
  float* x;       // [k rounded up to 16][64]
  float* g;       // [rows of weights rounded up to 16 and to whole blocks][64]
  float* floats;  // [16][k, or rows of weights]
  int32_t* next;  // [rows of blocks]
};

struct SparseLinearKernels {
  // Whether slabs or bands [first, last) refer only to entries, chunks and groups that exist. The caller has
  // checked the header and the starts of slabs and bands; everything else in the pack may be damaged.
  bool (*intact)(const SparseLayer&, bool few, int64_t first, int64_t last);
  // Up to few_rows rows of `in`, slabs [first, last) of the output.
  void (*few)(const SparseLayer&, const Matrix& in, const Matrix& out, int64_t rows, int64_t first,
              int64_t last, const SparseScratch&);
  // `rows` rows of `in` from `row` on, which fill a panel of `columns` (16, 32 or 64); bands [first, last).
  void (*many)(const SparseLayer&, const Matrix& in, const Matrix& out, int64_t row, int64_t rows,
               int64_t columns, int64_t first, int64_t last, const SparseScratch&);
  // Adds to `out` [blocks][rows][columns] the products of `rows` (up to 64) rows of `grad` [n] and `in` [k],
  // for the block rows [first, last).
  void (*gradient)(const SparseStructure&, const Matrix& grad, const Matrix& in, int64_t row, int64_t rows,
                   int64_t first, int64_t last, const SparseGradientScratch&, float* out);
  // `count` values of 16 or 32 bits to floats, and back.
  void (*to_floats)(const Matrix&, int64_t count, float* out);
  void (*from_floats)(const float*, int64_t count, const Matrix& out);
};

}  // namespace rk

RK_KERNEL_TABLES(rk::SparseLinearKernels, rk_sparse_linear)
