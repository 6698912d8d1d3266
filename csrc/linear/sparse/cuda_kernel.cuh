// The sparse linear layer on GPUs. Kept weights lie in rows of units: single weights, columns of blocks
// (whose rows share what is read of the input), or, where products are of bytes, up to four columns of K.
//
// Few rows of input: a group of lanes takes a row of units, each lane some of them, with the input read where
// it lies. Many: the input is transposed first, and each lane has four of its rows, which lie together then,
// so that all lanes of a group go through the same weights.
//
// Structures have been checked on the host, by whoever made them. Should one be wrong all the same, nothing
// outside of the arguments is read: rows end with the weights, and columns that are not there are passed
// over.
#pragma once

#include <type_traits>

#include "linear/epilogue.cuh"

namespace rk {

constexpr int sparse_lanes = 256;
constexpr int sparse_warps = sparse_lanes / warp_lanes;
constexpr int few_tile = 4;     // rows of input that a group of lanes takes at once
constexpr int lane_rows = 4;    // rows of the transposed input that a lane takes
constexpr int least_group = 4;  // lanes

// The places of the kept weights and the form in which they are stored.
struct Kept {
  const void *crow, *col;  // of 2:4 a byte for every eight columns, and no crow
  const char* values;
  ElementType type;
  bool crow_64, col_64, two_of_four;
  bool wide;                    // groups of four values that begin at a multiple of four are aligned
  int32_t count;                // of blocks
  int32_t rows, columns;        // of a block
  int32_t n, k, block_columns;  // the latter: how many there are
  int32_t tiles;                // tiles of rows in a row of blocks

  // All of one type, so that all are under way before the first is needed.
  template <int Count>
  __device__ __forceinline__ void gather(float (&v)[Count], const int64_t (&at)[Count]) const {
    if (type == ElementType::i8) {
#pragma unroll
      for (int i = 0; i < Count; ++i) v[i] = static_cast<float>(byte(at[i]));
    } else if (type == ElementType::f32) {
#pragma unroll
      for (int i = 0; i < Count; ++i)
        v[i] = load_constant<float>(reinterpret_cast<const float*>(values) + at[i]);
    } else {
      uint32_t bits[Count];
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        bits[i] = load_constant<unsigned short>(reinterpret_cast<const unsigned short*>(values) + at[i]);
      }
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        v[i] = type == ElementType::f16 ? f16_to_float(bits[i]) : bf16_to_float(bits[i]);
      }
    }
  }
  __device__ __forceinline__ int byte(int64_t at) const {
    return load_constant<signed char>(reinterpret_cast<const signed char*>(values) + at);
  }
  // Four neighbours, the first of them at a multiple of four; where `wide`.
  __device__ __forceinline__ void four_values(float (&v)[4], int64_t at) const {
    if (type == ElementType::i8) {
      const uint32_t word = four_bytes(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
    } else {
      const char* from = values + at * (type == ElementType::f32 ? 4 : 2);
      load_four(v, from, type, 0, 4, true);
    }
  }
  __device__ __forceinline__ uint32_t four_bytes(int64_t at) const {
    if (wide) return load_constant<unsigned>(values + at);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= (static_cast<uint32_t>(byte(at + i)) & 0xffu) << (8 * i);
    return word;
  }
};

// The factors of a product: floats, bytes of one column at a time, or bytes of four neighbouring columns.
enum class Product { floats, bytes, fours };

// A tile of the rows of weights that lie in one row of blocks, and its units. A unit is one column, or four
// columns that begin at a multiple of four where `Four`: of a block, or those of which 2:4 keeps two.
template <int Rows, bool Four>
struct UnitRow {
  int64_t first_value;  // of the first row of the tile
  int32_t first_row;    // of the layer
  int32_t rows;         // of the tile that exist
  int32_t begin, units;
  int32_t in_block;  // units of a block's row
  int32_t shift;     // divides by it; negative: it is no power of two
  const unsigned char* codes;

  // Only which rows these are.
  __device__ __forceinline__ void place(const Kept& w, int64_t tile) {
    const int within = Rows * static_cast<int>(tile % w.tiles);
    first_row = static_cast<int32_t>(tile / w.tiles * w.rows) + within;
    rows = min(min(Rows, w.rows - within), w.n - first_row);
  }

  __device__ __forceinline__ void start(const Kept& w, int64_t tile) {
    place(w, tile);
    const int64_t row = tile / w.tiles;
    const int within = Rows * static_cast<int>(tile % w.tiles);
    if (w.two_of_four) {
      const int fours = (w.k + 3) / 4;
      begin = 0, in_block = 1, shift = 0;
      units = Four ? fours : 2 * fours;
      codes = static_cast<const unsigned char*>(w.col) + row * ((w.k + 7) / 8);
      first_value = row * 2 * fours;
    } else {
      const int64_t from = load_integer(w.crow, w.crow_64, row),
                    to = load_integer(w.crow, w.crow_64, row + 1);
      begin = static_cast<int32_t>(max(int64_t{0}, min(from, int64_t{w.count})));
      in_block = Four ? w.columns / 4 : w.columns;
      units = max(0, static_cast<int32_t>(min(to, int64_t{w.count})) - begin) * in_block;
      shift = (in_block & (in_block - 1)) == 0 ? __ffs(in_block) - 1 : -1;
      codes = nullptr;
      first_value = (static_cast<int64_t>(begin) * w.rows + within) * w.columns;
    }
  }

  // The first column of a unit, and where its value in the first row is. Negative: it is out of range.
  __device__ __forceinline__ int column(const Kept& w, int unit, int64_t& at) const {
    if (w.two_of_four) {
      at = first_value + unit;
      const int code = load_constant<unsigned char>(codes + unit / 4) >> (2 * (unit % 4)) & 3;
      const int column = unit / 2 * 4 + code;
      return column < w.k ? column : -1;
    }
    const int block = shift >= 0 ? unit >> shift : unit / in_block;
    const int within = (unit - block * in_block) * (Four ? 4 : 1);
    at = first_value + static_cast<int64_t>(block) * w.rows * w.columns + within;
    const int64_t column = load_integer(w.col, w.col_64, begin + block);
    if (column < 0 || column >= w.block_columns) return -1;
    const int first = static_cast<int>(column) * w.columns + within;
    return first < w.k ? first : -1;
  }

  // The values of some units. For rows that do not exist, those of the last row are read again.
  template <int Batch>
  __device__ __forceinline__ void load(float (&v)[Batch][Rows], const Kept& w,
                                       const int64_t (&at)[Batch]) const {
    if constexpr (Rows == 4) {
      if (w.wide && w.columns == 1 && w.rows % 4 == 0) {
#pragma unroll
        for (int u = 0; u < Batch; ++u) w.four_values(v[u], at[u]);
        return;
      }
    }
    int64_t each[Batch * Rows];
    float all[Batch * Rows];
#pragma unroll
    for (int i = 0; i < Batch * Rows; ++i) {
      each[i] = at[i / Rows] + static_cast<int64_t>(min(i % Rows, rows - 1)) * w.columns;
    }
    w.gather(all, each);
#pragma unroll
    for (int i = 0; i < Batch * Rows; ++i) v[i / Rows][i % Rows] = all[i];
  }

  // The weights of a unit as bytes of four columns that begin at a multiple of four, and which four that are;
  // negative: they are out of range.
  __device__ __forceinline__ int load_bytes(uint32_t (&word)[Rows], const Kept& w, int unit) const {
    if (Four && w.two_of_four) {
      const int code = load_constant<unsigned char>(codes + unit / 2) >> (4 * (unit % 2)), low = code & 3,
                high = code >> 2 & 3, left = w.k - 4 * unit;
      const int first = w.byte(first_value + 2 * unit), second = w.byte(first_value + 2 * unit + 1);
      word[0] = (low < left ? at_place(first, low) : 0u) | (high < left ? at_place(second, high) : 0u);
      return unit;
    }
    int64_t at;
    const int first = column(w, unit, at), left = w.k - first;
    const uint32_t kept = Four && left < 4 ? (1u << (8 * left)) - 1 : ~0u;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int64_t from = at + static_cast<int64_t>(min(r, rows - 1)) * w.columns;
      word[r] = Four ? w.four_bytes(from) & kept : at_place(w.byte(from), first & 3);
    }
    return first < 0 ? -1 : first / 4;
  }

  static __device__ __forceinline__ uint32_t at_place(int byte, int place) {
    return (static_cast<uint32_t>(byte) & 0xffu) << (8 * place);
  }
};

// The inputs of the kernels beside the weights.
struct SparseInput {
  const char* x;   // few: [m][k] floats or bytes less 128; many: transposed, [k] or [k / 4 words][x_stride]
  int64_t stride;  // bytes
  ElementType type;
  int32_t m;
  int64_t tiles;           // of rows of weights
  int32_t across;          // blocks next to each other have the same rows of input
  int32_t lanes;           // of a group
  const float* scales;     // [n] of the weights, or null
  const float* row_scale;  // [m] of bytes, or null; NaN where a row has NaN or infinity
  const int32_t* row_zero;
  Finish finish;

  // A result of the product; of bytes it is an integer.
  __device__ __forceinline__ void store(int64_t row, int column, float y, bool integers) const {
    if (integers) {
      const float scale = __fmul_rn(row_scale[row], load_constant<float>(scales + column));
      y = __fmul_rn(static_cast<float>(bits_as<int32_t>(y)), scale);
    } else {
      if (scales != nullptr) y *= load_constant<float>(scales + column);
      // A NaN scale makes the result NaN even if the row keeps no weight that would spread the NaN.
      if (row_scale != nullptr && row_scale[row] != row_scale[row]) y = NAN;
    }
    finish(row, column, y);
  }
};

// Units that a lane reads at once.
template <int Rows>
constexpr int batch = Rows == 1 ? 4 : 2;

// The sums of a lane: of `Rows` rows of weights and four rows of the input.
template <int Rows, Product P>
struct LaneSums {
  static constexpr bool floats = P == Product::floats;
  static constexpr int count = batch<Rows>;
  using Number = std::conditional_t<floats, float, int32_t>;
  using Bits = std::conditional_t<floats, float, uint32_t>;
  Number sum[Rows][4] = {};
  int32_t weights[Rows] = {};  // of bytes: what is taken from the input's comes back through it

  // Units from `unit` on that are `step` apart. `load(x, column)` reads four rows of the input in columns, or
  // in words of four.
  template <typename Load>
  __device__ __forceinline__ void add(const Kept& w, const UnitRow<Rows, P == Product::fours>& row, int unit,
                                      int step, const Load& load) {
    Bits v[count][Rows], x[count][4];
    int column[count];
    bool there[count];
    // A missing element is read from a valid place and then counts as zero, so that no load waits for a
    // branch.
    if constexpr (floats) {
      int64_t at[count];
#pragma unroll
      for (int u = 0; u < count; ++u) column[u] = row.column(w, min(unit + u * step, row.units - 1), at[u]);
      row.load(v, w, at);
    } else {
#pragma unroll
      for (int u = 0; u < count; ++u)
        column[u] = row.load_bytes(v[u], w, min(unit + u * step, row.units - 1));
    }
#pragma unroll
    for (int u = 0; u < count; ++u) {
      there[u] = column[u] >= 0 && unit + u * step < row.units;
      column[u] = max(column[u], 0);
    }
    load(x, column);
#pragma unroll
    for (int u = 0; u < count; ++u) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) v[u][r] = there[u] ? v[u][r] : 0;
#pragma unroll
      for (int m = 0; m < 4 && floats; ++m) x[u][m] = there[u] ? x[u][m] : 0;
      multiply(v[u], x[u]);
    }
  }

  __device__ __forceinline__ void multiply(const Bits (&v)[Rows], const Bits (&x)[4]) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      if constexpr (!floats) weights[r] = __dp4a(static_cast<int>(v[r]), 0x01010101, weights[r]);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        if constexpr (floats) {
          sum[r][m] += v[r] * x[m];
        } else {
          sum[r][m] = __dp4a(static_cast<int>(v[r]), static_cast<int>(x[m]), sum[r][m]);
        }
      }
    }
  }

  // Returns the result for row `m` of four, whose zero point is at `zero`. An integer is returned by its
  // bits.
  __device__ __forceinline__ float result(int r, int m, const int32_t* zero) const {
    if constexpr (floats) {
      return sum[r][m];
    } else {
      return bits_as<float>(sum[r][m] + (128 - *zero) * weights[r]);
    }
  }
};

// ---- few rows of input ----

// Groups of lanes take a tile of rows of weights each, and every lane of a group some of its units.
template <int Rows, Product P>
__global__ void __launch_bounds__(sparse_lanes, Rows == 1 && P != Product::floats ? 4 : 3)
    few_rows_kernel(const __grid_constant__ Kept w, const __grid_constant__ SparseInput a) {
  __shared__ float results[sparse_warps][few_tile * Rows * (warp_lanes / least_group)];
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int groups = warp_lanes / a.lanes, group = lane / a.lanes;
  const int64_t first_row = int64_t{few_tile} * (static_cast<int>(blockIdx.x) / a.across);
  const int64_t first_tile =
      (int64_t{sparse_warps} * (static_cast<int>(blockIdx.x) % a.across) + warp) * groups;
  if (first_tile >= a.tiles) return;
  const int rows = static_cast<int>(min(int64_t{few_tile}, a.m - first_row));
  const char* const x = a.x + first_row * a.stride;
  using Sums = LaneSums<Rows, P>;
  const auto load = [&](typename Sums::Bits(&v)[Sums::count][4], const int (&column)[Sums::count]) {
    if constexpr (P != Product::floats) {
#pragma unroll
      for (int i = 0; i < 4 * Sums::count; ++i) {
        // Rows of bytes are padded to a multiple of eight.
        v[i / 4][i % 4] = load_constant<unsigned>(x + i % 4 * a.stride + 4 * column[i / 4]);
      }
    } else if (a.type == ElementType::f32) {
#pragma unroll
      for (int i = 0; i < 4 * Sums::count; ++i) {
        v[i / 4][i % 4] =
            i % 4 < rows ? float_at(x + i % 4 * a.stride, ElementType::f32, column[i / 4]) : 0.0f;
      }
    } else {
      uint32_t bits[4 * Sums::count];
#pragma unroll
      for (int i = 0; i < 4 * Sums::count; ++i) {
        const char* from = x + i % 4 * a.stride + 2 * static_cast<int64_t>(column[i / 4]);
        bits[i] = i % 4 < rows ? load_constant<unsigned short>(from) : 0;
      }
#pragma unroll
      for (int i = 0; i < 4 * Sums::count; ++i) {
        v[i / 4][i % 4] = a.type == ElementType::f16 ? f16_to_float(bits[i]) : bf16_to_float(bits[i]);
      }
    }
  };
  UnitRow<Rows, P == Product::fours> row;
  Sums sums;
  if (first_tile + group < a.tiles) {
    row.start(w, first_tile + group);
#pragma unroll 1
    for (int unit = lane % a.lanes; unit < row.units; unit += Sums::count * a.lanes) {
      sums.add(w, row, unit, a.lanes, load);
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    sums.weights[r] = P == Product::floats ? 0 : sum_over(sums.weights[r], 1, a.lanes);
#pragma unroll
    for (int m = 0; m < few_tile; ++m) {
      if (m >= rows) break;
      sums.sum[r][m] = sum_over(sums.sum[r][m], 1, a.lanes);
      if (lane % a.lanes == 0) {
        results[warp][(m * groups + group) * Rows + r] = sums.result(r, m, a.row_zero + first_row + m);
      }
    }
  }
  // Through shared memory, so that a warp stores neighbours, and one copy of the functions is enough.
  __syncwarp();
  const int columns = groups * Rows;
#pragma unroll 1
  for (int i = lane; i < rows * columns; i += warp_lanes) {
    const int m = i / columns, g = i % columns / Rows, r = i % Rows;
    if (first_tile + g >= a.tiles) continue;
    row.place(w, first_tile + g);
    if (r < row.rows) a.store(first_row + m, row.first_row + r, results[warp][i], P != Product::floats);
  }
}

// ---- many ----

struct TransposeArguments {
  const char* from;                // [m][columns]
  char* to;                        // [columns][padded_m], zero beyond m
  int64_t from_stride, to_stride;  // bytes
  int32_t m, padded_m, columns, across;
  bool words;  // elements of four bytes, else of two
};

__global__ void __launch_bounds__(sparse_lanes)
    transpose_kernel(const __grid_constant__ TransposeArguments a) {
  __shared__ uint32_t tile[warp_lanes][warp_lanes + 1];  // one more: other banks
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
  const int64_t first_row = int64_t{warp_lanes} * (static_cast<int>(blockIdx.x) / a.across);
  const int64_t first_column = int64_t{warp_lanes} * (static_cast<int>(blockIdx.x) % a.across);
#pragma unroll
  for (int i = warp; i < warp_lanes; i += sparse_warps) {
    const int64_t row = first_row + i, column = first_column + lane;
    uint32_t bits = 0;
    if (row < a.m && column < a.columns) {
      const char* from = a.from + row * a.from_stride;
      bits = a.words ? load_constant<unsigned>(from + 4 * column)
                     : load_constant<unsigned short>(from + 2 * column);
    }
    tile[i][lane] = bits;
  }
  __syncthreads();
#pragma unroll
  for (int i = warp; i < warp_lanes; i += sparse_warps) {
    const int64_t row = first_row + lane, column = first_column + i;
    if (row >= a.padded_m || column >= a.columns) continue;
    char* to = a.to + column * a.to_stride;
    if (a.words) {
      reinterpret_cast<uint32_t*>(to)[row] = tile[lane][i];
    } else {
      reinterpret_cast<unsigned short*>(to)[row] = static_cast<unsigned short>(tile[lane][i]);
    }
  }
}

// Groups of lanes take a tile of rows of weights each, and every lane of a group four rows of the input.
template <int Rows, Product P>
__global__ void __launch_bounds__(sparse_lanes, Rows == 1 ? 4 : 3)
    many_rows_kernel(const __grid_constant__ Kept w, const __grid_constant__ SparseInput a) {
  __shared__ float results[sparse_lanes * lane_rows * Rows + lane_rows * warp_lanes];
  const int thread = static_cast<int>(threadIdx.x);
  const int groups = sparse_lanes / a.lanes, group = thread / a.lanes, place = lane_rows * (thread % a.lanes);
  const int64_t first_row = int64_t{lane_rows} * a.lanes * (static_cast<int>(blockIdx.x) / a.across);
  const int64_t first_tile = int64_t{groups} * (static_cast<int>(blockIdx.x) % a.across);
  const int columns = groups * Rows;
  UnitRow<Rows, P == Product::fours> row;
  if (first_tile + group < a.tiles && first_row + place < a.m) {
    const char* const x =
        a.x + (first_row + place) * (P == Product::floats && a.type != ElementType::f32 ? 2 : 4);
    using Sums = LaneSums<Rows, P>;
    const auto load = [&](typename Sums::Bits(&v)[Sums::count][4], const int (&column)[Sums::count]) {
      if constexpr (P != Product::floats) {
#pragma unroll
        for (int u = 0; u < Sums::count; ++u) load_words(v[u], x + column[u] * a.stride);
      } else if (a.type == ElementType::f32) {
#pragma unroll
        for (int u = 0; u < Sums::count; ++u) {
          load_four(v[u], x + column[u] * a.stride, ElementType::f32, 0, lane_rows, true);
        }
      } else {
        uint32_t word[Sums::count][2];
#pragma unroll
        for (int u = 0; u < Sums::count; ++u) load_words(word[u], x + column[u] * a.stride);
#pragma unroll
        for (int i = 0; i < 4 * Sums::count; ++i) {
          const uint32_t bits = word[i / 4][i % 4 / 2] >> (16 * (i % 2)) & 0xffffu;
          v[i / 4][i % 4] = a.type == ElementType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
        }
      }
    };
    Sums sums;
    row.start(w, first_tile + group);
#pragma unroll 1
    for (int unit = 0; unit < row.units; unit += Sums::count) sums.add(w, row, unit, 1, load);
#pragma unroll
    for (int m = 0; m < lane_rows; ++m) {
      const int64_t at = min(first_row + place + m, static_cast<int64_t>(a.m - 1));
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        // The stride is one more than the columns, so that rows start in different banks.
        results[(place + m) * (columns + 1) + group * Rows + r] = sums.result(r, m, a.row_zero + at);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < lane_rows * a.lanes * columns; i += sparse_lanes) {
    const int m = i / columns, c = i % columns, r = c % Rows;
    if (first_row + m >= a.m || first_tile + c / Rows >= a.tiles) continue;
    row.place(w, first_tile + c / Rows);
    if (r < row.rows) {
      a.store(first_row + m, row.first_row + r, results[m * (columns + 1) + c], P != Product::floats);
    }
  }
}

// ---- scales of groups of columns ----

// Weights and quantized rows become the floats that they stand for, and are multiplied as such.

struct ScaleArguments {
  const float* scales;    // [n][groups]
  int32_t groups, shift;  // of a column, to its group
  int64_t tiles;          // rows of weights, also those past the last one
  float* out;             // like the values
};

// A warp takes a row of weights. Those past the end become zero.
__global__ void __launch_bounds__(sparse_lanes)
    scale_values_kernel(const __grid_constant__ Kept w, const __grid_constant__ ScaleArguments a) {
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int64_t tile = int64_t{sparse_warps} * blockIdx.x + static_cast<int>(threadIdx.x) / warp_lanes;
  if (tile >= a.tiles) return;
  UnitRow<1, false> row;
  row.start(w, tile);
  const float* const scales = a.scales + static_cast<int64_t>(row.first_row) * a.groups;
  for (int unit = lane; unit < row.units; unit += warp_lanes) {
    int64_t at;
    const int column = row.column(w, unit, at);
    const bool there = column >= 0 && row.rows > 0;
    a.out[at] =
        there ? static_cast<float>(w.byte(at)) * load_constant<float>(scales + (column >> a.shift)) : 0.0f;
  }
}

struct DequantizeArguments {
  const int8_t* q;  // [m][stride], less 128
  int64_t stride;
  const float* scale;  // [m]
  const int32_t* zero;
  float* out;  // [m][k]
  int32_t k;
};

// A block takes a row.
__global__ void __launch_bounds__(sparse_lanes)
    dequantize_rows_kernel(const __grid_constant__ DequantizeArguments a) {
  const int64_t row = blockIdx.x;
  const float scale = load_constant<float>(a.scale + row);
  const int shift = 128 - a.zero[row];
  for (int k = static_cast<int>(threadIdx.x); k < a.k; k += sparse_lanes) {
    const int q = load_constant<signed char>(reinterpret_cast<const signed char*>(a.q) + row * a.stride + k);
    a.out[row * a.k + k] = __fmul_rn(static_cast<float>(q + shift), scale);
  }
}

// ---- the gradient of kept weights ----

// Rows of the output's gradient and of the input, both transposed: a weight's gradient is the product of a
// row of each.
struct GradientArguments {
  const char *grad, *x;           // [n], [k] [padded_m], aligned to four elements
  int64_t grad_stride, x_stride;  // bytes
  ElementType grad_type, x_type, type;
  int32_t padded_m, lanes;
  int64_t tiles;
  void* out;
};

// A warp has a tile of rows of weights; its groups of lanes take a unit each.
template <int Rows>
__global__ void __launch_bounds__(sparse_lanes, 3)
    weight_gradient_kernel(const __grid_constant__ Kept w, const __grid_constant__ GradientArguments a) {
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes, place = lane % a.lanes;
  const int64_t tile = int64_t{sparse_warps} * blockIdx.x + static_cast<int>(threadIdx.x) / warp_lanes;
  if (tile >= a.tiles) return;
  UnitRow<Rows, false> row;
  row.start(w, tile);
  const int stored = w.two_of_four ? 1 : min(Rows, w.rows - Rows * static_cast<int>(tile % w.tiles));
  const char* const grad = a.grad + row.first_row * a.grad_stride;
  const int groups = warp_lanes / a.lanes;
  for (int first = 0; any_lane(first < row.units); first += groups) {
    const int unit = first + lane / a.lanes;
    int64_t at = 0;
    float sum[Rows] = {};
    const int column = unit < row.units ? row.column(w, unit, at) : -1;
    if (column >= 0) {
      const char* const x = a.x + column * a.x_stride;
      for (int m = lane_rows * place; m < a.padded_m; m += lane_rows * a.lanes) {
        float of_x[4], of_grad[4];
        load_four(of_x, x, a.x_type, m, a.padded_m, true);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          if (r >= row.rows) break;
          load_four(of_grad, grad + r * a.grad_stride, a.grad_type, m, a.padded_m, true);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r] += of_grad[i] * of_x[i];
        }
      }
    }
    float y = 0.0f;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const float all = sum_over(sum[r], 1, a.lanes);
      if (place == r) y = all;
    }
    if (unit < row.units && place < stored)
      store_float(a.out, a.type, at + static_cast<int64_t>(place) * w.columns, y);
  }
}

}  // namespace rk
