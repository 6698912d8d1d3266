// The gradient of kept weights: products of columns of two matrices, wherever a weight is. Compiled with
// kernel.cpp at every level.
#pragma once

#include "kernel.h"
#include "linear/quantize.h"

namespace {

using rk::SparseGradientScratch;
using rk::SparseStructure;

// x of some columns of `in`, V vectors each; g of rows of `grad`; col and out of some blocks of a row of
// them. Adds the products of one row of g with what n <= 4 pointers show.
template <int V>
inline void products(const vf (&g)[V], const float* const (&x)[4], vf (&sum)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    sum[i] = simd::mul(g[0], simd::load_f32(x[i]));
#pragma GCC unroll 8
    for (int v = 1; v < V; ++v) sum[i] = simd::fma(g[v], simd::load_f32(x[i] + v * lanes), sum[i]);
  }
}

// One row of `grad` with the blocks from `begin` on that start before column `limit`; row: its place in them.
// Gives the first block behind these.
template <int V>
inline int64_t gradient_of_row(const SparseStructure& s, const float* x, const float* g, int64_t row,
                               int64_t begin, int64_t end, int64_t limit, float* out) {
  constexpr int64_t W = V * lanes;
  vf of_row[V], sum[4];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) of_row[v] = simd::load_f32(g + v * lanes);
  const int32_t* const col = s.col;
  int64_t b = begin;
  if (s.columns == 1 && s.rows == 1) {
    for (; b + 4 <= end && col[b + 3] < limit; b += 4) {
      const float* from[4] = {x + col[b] * W, x + col[b + 1] * W, x + col[b + 2] * W, x + col[b + 3] * W};
      products(of_row, from, sum);
      simd::add_sums(sum, out + b);
    }
    const float* from[4] = {x, x, x, x};
    int n = 0;
    for (; n < 3 && b + n < end && col[b + n] < limit; ++n) from[n] = x + col[b + n] * W;
    if (n > 0) {
      products(of_row, from, sum);
      simd::add_sums(sum, out + b, n);
    }
    return b + n;
  }
  for (; b < end && col[b] * s.columns < limit; ++b) {
    const int64_t column = col[b] * s.columns, left = s.k - column;
    const int64_t columns = s.columns < left ? s.columns : left;
    for (int64_t j = 0; j < columns; j += 4) {
      const int n = static_cast<int>(columns - j < 4 ? columns - j : 4);
      const float* at = x + (column + j) * W;
      const float* from[4] = {at, n > 1 ? at + W : at, n > 2 ? at + 2 * W : at, n > 3 ? at + 3 * W : at};
      products(of_row, from, sum);
      simd::add_sums(sum, out + (b * s.rows + row) * s.columns + j, n);
    }
  }
  return b;
}

// Does the same work for four rows and blocks of one column. The first n rows are in the matrix.
template <int V>
inline int64_t gradient_of_four(const SparseStructure& s, const float* x, const float* g, int64_t row,
                                int64_t begin, int64_t end, int64_t limit, int n, float* out) {
  constexpr int64_t W = V * lanes;
  vf of_rows[4][V];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) of_rows[r][v] = simd::load_f32(g + r * W + v * lanes);
  }
  int64_t b = begin;
  for (; b < end && s.col[b] < limit; ++b) {
    const float* from = x + s.col[b] * W;
    vf sum[4];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const vf loaded = simd::load_f32(from + v * lanes);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        sum[r] = v == 0 ? simd::mul(of_rows[r][0], loaded) : simd::fma(of_rows[r][v], loaded, sum[r]);
    }
    float* const to = out + b * s.rows + row;
    n == 4 ? simd::add_sums(sum, to) : simd::add_sums(sum, to, n);
  }
  return b;
}

template <int V>
void gradient_of(const SparseStructure& s, const Matrix& grad, const Matrix& in, int64_t row, int64_t rows,
                 int64_t first, int64_t last, const SparseGradientScratch& scratch, float* out) {
  constexpr int64_t W = V * lanes, fit = rk::block_cells * 32 / W;
  float *const x = scratch.x, *const g = scratch.g;
  transpose_rows(in, row, rows, s.k, W, scratch.floats, reinterpret_cast<int32_t*>(x));
  const int64_t begin = first * s.rows, end = last * s.rows < s.n ? last * s.rows : s.n;
  const int64_t size = grad.type == ElementType::f32 ? 4 : 2;
  const Matrix part{static_cast<uint8_t*>(grad.data) + begin * size, grad.stride, grad.type};
  transpose_rows(part, row, rows, end - begin, W, scratch.floats, reinterpret_cast<int32_t*>(g));
  for (int64_t r = first; r < last; ++r) scratch.next[r - first] = s.crow[r];
  const bool four = s.columns == 1 && s.rows % 4 == 0;
  // Columns of `in` that stay in L1 with all rows of weights; twice as many where a row has few weights in
  // them, and its start and end would take longer than reads from L2.
  const int64_t kept = (s.crow[last] - s.crow[first]) * s.columns;
  const int64_t cells = kept * fit < 32 * (last - first) * s.k ? 2 * fit : fit;
  for (int64_t at = cells; at < s.k + cells; at += cells) {
    // Columns past k, as 2:4 can have them, hold no weights, as rows past n.
    const int64_t limit = at < s.k ? at : s.k;
    for (int64_t r = first; r < last; ++r) {
      const int64_t from = scratch.next[r - first], stop = s.crow[r + 1], left = s.n - r * s.rows;
      const float* of_rows = g + (r - first) * s.rows * W;
      int64_t to = from;
      for (int64_t i = 0; i < s.rows && i < left; i += four ? 4 : 1) {
        const int n = static_cast<int>(left - i < 4 ? left - i : 4);
        to = four ? gradient_of_four<V>(s, x, of_rows + i * W, i, from, stop, limit, n, out)
                  : gradient_of_row<V>(s, x, of_rows + i * W, i, from, stop, limit, out);
      }
      scratch.next[r - first] = static_cast<int32_t>(to);
    }
  }
}

void gradient(const SparseStructure& s, const Matrix& grad, const Matrix& in, int64_t row, int64_t rows,
              int64_t first, int64_t last, const SparseGradientScratch& scratch, float* out) {
  if (rows <= 16) return gradient_of<16 / lanes>(s, grad, in, row, rows, first, last, scratch, out);
  if (rows <= 32) return gradient_of<32 / lanes>(s, grad, in, row, rows, first, last, scratch, out);
  gradient_of<64 / lanes>(s, grad, in, row, rows, first, last, scratch, out);
}

}  // namespace
