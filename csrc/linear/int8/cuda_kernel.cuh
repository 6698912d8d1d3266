// The int8 linear layer on GPUs: rows are quantized once, then multiplied by the tensor cores.
//
// The product needs no shared memory for its operands: a sum does not depend on the order of its terms, so
// that a lane can take 16 neighbouring bytes of a row of activations and 16 of a row of weights, and hand
// them to two instructions as the bytes that these expect of it (cuda/mma.cuh). Both come straight from
// memory in 16-byte loads.
//
// Quantized numbers are 0 to 255, but products are of signed bytes: rows are stored less 128, and what that
// and the zero point take from a sum is given back through the sum of the weights, which every warp counts as
// it reads them.
#pragma once

#include "cuda/mma.cuh"
#include "kernel.h"
#include "linear/epilogue.cuh"

namespace rk {

constexpr int int8_block_lanes = 256;
constexpr int int8_block_warps = int8_block_lanes / warp_lanes;

// ---- products ----

struct ProductArguments {
  const int8_t* q;  // there are rows up to the next multiple of 8
  const float* row_scale;
  const int32_t* row_zero;
  const int8_t* weight;
  int64_t weight_stride;
  const float* scales;
  int64_t scale_stride, group_stride;
  int32_t m, n, k, q_stride, group;  // group: k where there is one scale for all
  int32_t blocks_across;             // blocks next to each other have the same rows
  bool aligned;                      // weights can be read 16 bytes at once
  Finish finish;
};

// Bytes of a row of weights as words; those past its end are zero.
template <int Words>
__device__ __forceinline__ void load_bytes(uint32_t (&word)[Words], const int8_t* p, int left) {
#pragma unroll
  for (int i = 0; i < Words; ++i) {
    word[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * i + j < left) {
        word[i] |= static_cast<uint32_t>(load_constant<unsigned char>(p + 4 * i + j)) << (8 * j);
      }
    }
  }
}

// Tiles of 16 rows and of 8 columns that a warp multiplies: its sums so far, and those of its weights.
template <int Rows, int Columns>
struct WarpTile {
  int32_t sum[Rows][Columns][4];
  int32_t weights[Columns];
  // The places that this lane reads next: its first row, the rows 8 further each, and its columns.
  const int8_t *a, *b;
  int32_t column[Columns];
  int rows;  // that exist

  template <int Words>
  __device__ __forceinline__ void start(const ProductArguments& args, int64_t first_row, int first_column,
                                        int first_k) {
    const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
    const int at = first_k + 4 * Words * (lane % 4);
    rows = static_cast<int>(min(int64_t{16 * Rows}, args.m - first_row));
    a = args.q + (first_row + lane / 4) * args.q_stride + at;
    b = args.weight + first_column * args.weight_stride + at;
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      // Beyond the last column that one is read again, and what comes of it is not stored.
      column[c] =
          (min(8 * c + lane / 4, args.n - 1 - first_column)) * static_cast<int32_t>(args.weight_stride);
    }
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      weights[c] = 0;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][c][i] = 0;
      }
    }
  }

  // 16 * Words bytes of each row, of which this lane has 4 * Words; `left` says how many of its weights there
  // are.
  template <int Words, bool Whole>
  __device__ __forceinline__ void multiply(int q_stride, int left, int left_of_rows) {
    uint32_t of_columns[Columns][Words];
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      if constexpr (Whole) load_words(of_columns[c], b + column[c]);
    }
    uint32_t of_rows[Rows][2][Words];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (16 * r + 8 * h < rows && (Whole || left_of_rows > 0)) {
          load_words(of_rows[r][h], a + (16 * r + 8 * h) * q_stride);
        } else {
#pragma unroll
          for (int i = 0; i < Words; ++i) of_rows[r][h][i] = 0;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      // The loop takes one column after the other, since the bytes of all columns do not fit into the
      // registers.
      if constexpr (!Whole) load_bytes(of_columns[c], b + column[c], opaque(left));
#pragma unroll
      for (int i = 0; i < Words; ++i) {
        weights[c] = __dp4a(static_cast<int>(of_columns[c][i]), 0x01010101, weights[c]);
      }
#pragma unroll
      for (int i = 0; i < Words; i += 2) {
        const uint32_t right[2] = {of_columns[c][i], of_columns[c][i + 1]};
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const uint32_t left_side[4] = {of_rows[r][0][i], of_rows[r][1][i], of_rows[r][0][i + 1],
                                         of_rows[r][1][i + 1]};
          mma_m16n8k32(sum[r][c], left_side, right);
        }
      }
    }
  }

  __device__ __forceinline__ void advance(int by) { a += by, b += by; }

  // From `k` to `end` in steps that are `step` apart.
  template <int Words>
  __device__ __forceinline__ void run(const ProductArguments& args, int k, int end, int step) {
    const int mine = 4 * Words * (static_cast<int>(threadIdx.x) % 4);
    if (args.aligned) {
      for (; k + 16 * Words <= end; k += step, advance(step)) multiply<Words, true>(args.q_stride, 0, 0);
    }
#pragma unroll 1
    for (; k < end; k += step, advance(step)) {
      multiply<Words, false>(args.q_stride, end - k - mine, args.q_stride - k - mine);
    }
  }

  // The sum of the weights of column 2 * (lane % 4) + which, of a tile.
  __device__ __forceinline__ int32_t weights_of(int32_t of_tile, int which) const {
    return __shfl_sync(all_lanes, of_tile, 8 * (static_cast<int>(threadIdx.x) % 4) + 4 * which);
  }
};

// Few rows: the warps of a block share a tile of 16 x 16, each takes every eighth piece of K.
constexpr int split_columns = 16;

__global__ void __launch_bounds__(int8_block_lanes)
    split_product_kernel(const __grid_constant__ ProductArguments a) {
  constexpr int words = 4, tiles = split_columns / 8, piece = 16 * words;
  __shared__ int32_t sums[int8_block_warps][16][split_columns + 1];  // one more: other banks
  __shared__ int32_t weights[int8_block_warps][split_columns];
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int64_t first_row = int64_t{16} * (static_cast<int>(blockIdx.x) / a.blocks_across);
  const int first_column = split_columns * (static_cast<int>(blockIdx.x) % a.blocks_across);
  WarpTile<1, tiles> tile;
  tile.template start<words>(a, first_row, first_column, warp * piece);
  tile.template run<words>(a, warp * piece, a.k, int8_block_warps * piece);
#pragma unroll
  for (int c = 0; c < tiles; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][lane / 4 + 8 * (i / 2)][8 * c + 2 * (lane % 4) + i % 2] = tile.sum[0][c][i];
    }
    const int32_t all = sum_over(tile.weights[c], 1, 4);
    if (lane % 4 == 0) weights[warp][8 * c + lane / 4] = all;
  }
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x) / split_columns,
            c = static_cast<int>(threadIdx.x) % split_columns;
  const int64_t row = first_row + r;
  const int column = first_column + c;
  if (row >= a.m || column >= a.n) return;
  int32_t sum = 0, of_weights = 0;
#pragma unroll
  for (int w = 0; w < int8_block_warps; ++w) {
    sum += sums[w][r][c];
    of_weights += weights[w][c];
  }
  sum += (128 - a.row_zero[row]) * of_weights;
  const float scale = __fmul_rn(a.row_scale[row], load_constant<float>(a.scales + column * a.scale_stride));
  a.finish(row, column, __fmul_rn(static_cast<float>(sum), scale));
}

// Many rows, or groups: every warp has a tile of its own, `warps_down` of them one below the other in a
// block.
template <int Rows, int Columns, bool Grouped>
__device__ __forceinline__ void product(const ProductArguments& a, int warps_down) {
  // With groups of 32 an instruction must not see more of K than one group.
  constexpr int words = Grouped ? 2 : 4;
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int warps_across = int8_block_warps / warps_down;
  const int64_t first_row =
      (static_cast<int64_t>(static_cast<int>(blockIdx.x) / a.blocks_across) * warps_down +
       warp / warps_across) *
      (16 * Rows);
  const int first_column =
      (static_cast<int>(blockIdx.x) % a.blocks_across * warps_across + warp % warps_across) * (8 * Columns);
  if (first_row >= a.m || first_column >= a.n) return;
  WarpTile<Rows, Columns> tile;
  tile.template start<words>(a, first_row, first_column, 0);
  int32_t shift[Rows][2];
  float row_scale[Rows][2];
  const auto load_rows = [&] {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = min(first_row + 16 * r + 8 * h + lane / 4, static_cast<int64_t>(a.m - 1));
        shift[r][h] = 128 - a.row_zero[row];
        row_scale[r][h] = a.row_scale[row];
      }
    }
  };
  float y[Rows][Columns][4] = {};
  const auto take = [&](int g) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      const int32_t of_tile = sum_over(tile.weights[c], 1, 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t of_weights = tile.weights_of(of_tile, e);
        const int column = min(first_column + 8 * c + 2 * (lane % 4) + e, a.n - 1);
        const float scale = load_constant<float>(a.scales + column * a.scale_stride + g * a.group_stride);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float sum = static_cast<float>(tile.sum[r][c][2 * h + e] + shift[r][h] * of_weights);
            float& to = y[r][c][2 * h + e];
            to = Grouped ? __fadd_rn(to, __fmul_rn(sum, scale))
                         : __fmul_rn(sum, __fmul_rn(row_scale[r][h], scale));
          }
        }
      }
    }
  };
  if constexpr (Grouped) {
    load_rows();
#pragma unroll 1
    for (int k = 0, g = 0; k < a.k; k += a.group, ++g, tile.clear()) {
      tile.template run<words>(a, k, min(a.k, k + a.group), 16 * words);
      take(g);
    }
  } else {
    tile.template run<words>(a, 0, a.k, 16 * words);
    load_rows();  // not before: they would take registers from the products
    take(0);
  }
  // Through shared memory, so that a warp stores neighbours, and one copy of the functions is enough.
  __shared__ float results[int8_block_warps][16 * Rows][8 * Columns + 1];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = Grouped ? __fmul_rn(y[r][c][i], row_scale[r][i / 2]) : y[r][c][i];
        results[warp][16 * r + 8 * (i / 2) + lane / 4][8 * c + 2 * (lane % 4) + i % 2] = value;
      }
    }
  }
  __syncwarp();
  constexpr int at_once = warp_lanes / (8 * Columns);
  const int column = lane % (8 * Columns);
  if (first_column + column >= a.n) return;
  const int rows = static_cast<int>(min(int64_t{16 * Rows}, a.m - first_row));
#pragma unroll 1
  for (int r = lane / (8 * Columns); r < rows; r += at_once) {
    a.finish(first_row + r, first_column + column, results[warp][r][column]);
  }
}

constexpr int tile_rows = 32, tile_columns = 32, group_rows = 32, group_columns = 16;

__global__ void __launch_bounds__(int8_block_lanes, 2)
    tile_product_kernel(const __grid_constant__ ProductArguments a, int warps_down) {
  product<tile_rows / 16, tile_columns / 8, false>(a, warps_down);
}

__global__ void __launch_bounds__(int8_block_lanes, 2)
    group_product_kernel(const __grid_constant__ ProductArguments a, int warps_down) {
  product<group_rows / 16, group_columns / 8, true>(a, warps_down);
}

// ---- weights only ----

struct FloatArguments {
  const char* x;
  int64_t x_stride;  // bytes
  ElementType type;
  bool wide, aligned;  // groups of four floats are aligned; 16 weights are
  const int8_t* weight;
  int64_t weight_stride;
  const float* scales;
  int64_t scale_stride, group_stride;
  int32_t m, n, k, group;  // group: 0 where there is one scale for all
  int32_t blocks_across;
  Finish finish;
};

constexpr int float_rows = 4, float_columns = 2;

// A warp multiplies four rows of floats by two rows of weights; a lane has 16 neighbours of each at a time.
__global__ void __launch_bounds__(int8_block_lanes, 2)
    weight_only_kernel(const __grid_constant__ FloatArguments a) {
  constexpr int piece = 16;
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int64_t first_row = int64_t{float_rows} * (static_cast<int>(blockIdx.x) / a.blocks_across);
  const int first_column =
      (static_cast<int>(blockIdx.x) % a.blocks_across * int8_block_warps + warp) * float_columns;
  if (first_column >= a.n) return;
  const int rows = static_cast<int>(min(int64_t{float_rows}, a.m - first_row));
  const int8_t* weight[float_columns];
  const float* scales[float_columns];
#pragma unroll
  for (int c = 0; c < float_columns; ++c) {
    const int column = min(first_column + c, a.n - 1);
    weight[c] = a.weight + column * a.weight_stride;
    scales[c] = a.scales + column * a.scale_stride;
  }
  float sum[float_rows][float_columns] = {};
  for (int k = piece * lane; k < a.k; k += piece * warp_lanes) {
    uint32_t word[float_columns][4];
    float scale[float_columns];
#pragma unroll
    for (int c = 0; c < float_columns; ++c) {
      if (a.aligned && k + piece <= a.k) {
        load_words(word[c], weight[c] + k);
      } else {
        load_bytes(word[c], weight[c] + k, a.k - k);
      }
      scale[c] = a.group == 0 ? 1.0f : load_constant<float>(scales[c] + k / a.group * a.group_stride);
    }
#pragma unroll
    for (int r = 0; r < float_rows; ++r) {
      if (r >= rows) break;
      const char* x = a.x + (first_row + r) * a.x_stride;
      float part[float_columns] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v[4];
        load_four(v, x, a.type, k + 4 * i, a.k, a.wide);
#pragma unroll
        for (int c = 0; c < float_columns; ++c) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            part[c] += v[j] * static_cast<float>(static_cast<int8_t>(word[c][i] >> (8 * j)));
          }
        }
      }
#pragma unroll
      for (int c = 0; c < float_columns; ++c) sum[r][c] += part[c] * scale[c];
    }
  }
  float y = 0.0f;  // of row lane / float_columns and column lane % float_columns
#pragma unroll
  for (int r = 0; r < float_rows; ++r) {
#pragma unroll
    for (int c = 0; c < float_columns; ++c) {
      const float all = sum_over(sum[r][c], 1, warp_lanes);
      if (lane == r * float_columns + c) y = a.group == 0 ? all * load_constant<float>(scales[c]) : all;
    }
  }
  const int r = lane / float_columns, column = first_column + lane % float_columns;
  if (r < rows && column < a.n) a.finish(first_row + r, column, y);
}

}  // namespace rk
