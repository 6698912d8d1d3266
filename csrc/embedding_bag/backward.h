// Gradients of the table and of the per-sample weights.
#pragma once

#include "bags.h"

namespace {

using rk::Contribution;

// Stable counting sort by row: two passes of 11 bits, or four of 8 when the range needs more than 22.
void sort_by_row(Contribution* list, Contribution* spare, int64_t n, uint64_t span) {
  const int bits = span <= (1u << 22) ? 11 : 8;
  const int passes = bits == 11 ? 2 : 4;
  const uint32_t digits = 1u << bits;
  for (int pass = 0; pass < passes; ++pass) {
    int64_t start[1 << 11] = {};
    const int shift = pass * bits;
    for (int64_t i = 0; i < n; ++i) ++start[(list[i].row >> shift) & (digits - 1)];
    int64_t sum = 0;
    for (uint32_t d = 0; d < digits; ++d) {
      const int64_t count = start[d];
      start[d] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) spare[start[(list[i].row >> shift) & (digits - 1)]++] = list[i];
    Contribution* sorted = spare;
    spare = list;
    list = sorted;
  }
}

int64_t count_padding(const Bags& b, int64_t begin, int64_t end) {
  int64_t n = 0;
  for (int64_t pos = begin; b.padding_idx >= 0 && pos < end; ++pos) n += index_at(b, pos) == b.padding_idx;
  return n;
}

int64_t collect(const Bags& b, int64_t num_rows, int64_t first_row, int64_t last_row, Contribution* list,
                Contribution* spare, Fault* fault) {
  if (!offsets_good(b, 0, b.num_bags, fault)) return 0;
  const uint64_t span = static_cast<uint64_t>(last_row - first_row);
  int64_t n = 0;
  for (int64_t bag = 0; bag < b.num_bags; ++bag) {
    const int64_t begin = offset_at(b, bag), end = offset_at(b, bag + 1);
    double mean = 1.0;
    if (b.pooling == Pooling::mean && end - begin > 1) {
      const int64_t count = end - begin - count_padding(b, begin, end);
      if (count > 1) mean = 1.0 / static_cast<double>(count);
    }
    for (int64_t pos = begin; pos < end; ++pos) {
      const int64_t index = index_at(b, pos);
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(num_rows)) {
        *fault = {FaultKind::index, pos, index};
        return 0;
      }
      const uint64_t row = static_cast<uint64_t>(index - first_row);
      if (row >= span || index == b.padding_idx) continue;
      const double w = b.weights == nullptr ? mean : mean * element(b.weights, b.weights_type, pos);
      list[n++] = {static_cast<uint32_t>(row), static_cast<uint32_t>(bag), w};
    }
  }
  sort_by_row(list, spare, n, span);
  return n;
}

// Rows without contributions are cleared and the others written once, in ascending order: the gradient is a
// stream of writes, and 16-bit rows are rounded once, not after every addition.
template <ElementType T>
void reduce_rows(const Matrix& grad, const Contribution* list, int64_t count, const Matrix& out, int64_t dim,
                 int64_t first_row, int64_t last_row, float* scratch) {
  constexpr int64_t size = row_bytes(T, 1);
  char* base = static_cast<char*>(out.data);
  const int64_t stride = out.stride * size;
  const auto clear = [&](int64_t from, int64_t to) {
    if (to > from && stride > 0)
      std::memset(base + from * stride, 0, static_cast<size_t>((to - from) * stride));
  };
  int64_t next_row = first_row;
  for (int64_t i = 0; i < count;) {
    const uint32_t key = list[i].row;
    const int64_t row = first_row + key;
    clear(next_row, row);
    next_row = row + 1;
    bool empty = true;
    for (; i < count && list[i].row == key; ++i, empty = false) {
      const char* g =
          static_cast<const char*>(grad.data) + static_cast<int64_t>(list[i].bag) * grad.stride * size;
      if constexpr (T == ElementType::f64) {
        double* acc = reinterpret_cast<double*>(base + row * stride);
        const double* x = reinterpret_cast<const double*>(g);
        for (int64_t c = 0; c < dim; ++c) acc[c] = (empty ? 0.0 : acc[c]) + list[i].weight * x[c];
      } else {
        float* acc = T == ElementType::f32 ? reinterpret_cast<float*>(base + row * stride) : scratch;
        const vf w = simd::broadcast(static_cast<float>(list[i].weight));
        for_each_vector<T>(reinterpret_cast<const uint8_t*>(g), dim, [&](int64_t c, vf x, int n) {
          const vf old = empty ? simd::zero() : simd::load_f32(acc + c, n);
          simd::store_f32(acc + c, simd::fma(x, w, old), n);
        });
      }
    }
    if (T == ElementType::f16 || T == ElementType::bf16) store_floats(out, row * out.stride, scratch, dim);
  }
  clear(next_row, last_row);
}

void reduce(const Matrix& grad, const Contribution* list, int64_t count, const Matrix& out, int64_t dim,
            int64_t first_row, int64_t last_row, float* scratch) {
  switch (out.type) {
    case ElementType::f64:
      return reduce_rows<ElementType::f64>(grad, list, count, out, dim, first_row, last_row, scratch);
    case ElementType::f32:
      return reduce_rows<ElementType::f32>(grad, list, count, out, dim, first_row, last_row, scratch);
    case ElementType::f16:
      return reduce_rows<ElementType::f16>(grad, list, count, out, dim, first_row, last_row, scratch);
    default:
      return reduce_rows<ElementType::bf16>(grad, list, count, out, dim, first_row, last_row, scratch);
  }
}

template <ElementType T>
double dot(const uint8_t* row, const char* grad, int64_t dim) {
  if constexpr (T == ElementType::f64) {
    const double* x = reinterpret_cast<const double*>(row);
    const double* g = reinterpret_cast<const double*>(grad);
    double total = 0.0;
    for (int64_t c = 0; c < dim; ++c) total += x[c] * g[c];
    return total;
  } else {
    const uint8_t* g = reinterpret_cast<const uint8_t*>(grad);
    vf total = simd::zero();
    for_each_vector<T>(row, dim,
                       [&](int64_t c, vf x, int n) { total = simd::fma(x, load<T>(g, c, n), total); });
    return simd::sum(total);
  }
}

template <ElementType T>
void weights_gradient_rows(const Table& t, const Bags& b, const Matrix& grad, const Matrix& out,
                           int64_t first, int64_t last, Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  const auto put = [&](int64_t at, double x) {
    if (out.type == ElementType::f64)
      static_cast<double*>(out.data)[at] = x;
    else
      store(out, at, simd::broadcast(static_cast<float>(x)), 1);
  };
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    const int64_t count = b.pooling == Pooling::mean ? end - pos - count_padding(b, pos, end) : 1;
    const double factor = count > 1 ? 1.0 / static_cast<double>(count) : 1.0;
    const char* g = static_cast<const char*>(grad.data) + bag * grad.stride * row_bytes(T, 1);
    ahead.for_each_row(pos, end, [&](int64_t at, const uint8_t* row) {
      put(at, row == nullptr ? 0.0 : factor * dot<T>(row, g, t.dim));
    });
    pos = end;
    if (!ahead.ok()) break;
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

void weights_gradient(const Table& t, const Bags& b, const Matrix& grad, const Matrix& out, int64_t first,
                      int64_t last, Fault* fault) {
  if (first >= last || !offsets_good(b, first, last, fault)) return;
  switch (t.type) {
    case ElementType::f64:
      return weights_gradient_rows<ElementType::f64>(t, b, grad, out, first, last, fault);
    case ElementType::f32:
      return weights_gradient_rows<ElementType::f32>(t, b, grad, out, first, last, fault);
    case ElementType::f16:
      return weights_gradient_rows<ElementType::f16>(t, b, grad, out, first, last, fault);
    default:
      return weights_gradient_rows<ElementType::bf16>(t, b, grad, out, first, last, fault);
  }
}

}  // namespace
