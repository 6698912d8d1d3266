// Compiled once per instruction-set level; everything but the table of functions at the end has internal
// linkage.
#include "kernel.h"

#include "backward.h"
#include "bags.h"
#include "quantize.h"

#define RK_CONCAT2(a, b) a##b
#define RK_CONCAT(a, b) RK_CONCAT2(a, b)

namespace {

// ---- sum and mean ----

// The sums of scale * q and of the biases grow with opposite signs. Put together every so many rows they stay
// small: apart, a sum over 1000 int8 rows was off by 2e-5 of the largest result, put together by 2e-7.
constexpr int64_t fold_rows = 32;  // a power of two

// The row fits into N registers: they are loaded from nothing and stored once a bag.
template <ElementType T, int N>
void pool_registers(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last,
                    Fault* fault) {
  const int64_t unit = T == ElementType::u4 ? (t.dim + 1) / 2 : t.dim;
  const int tail = static_cast<int>(unit - (T == ElementType::u4 ? N / 2 - 1 : N - 1) * lanes);
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    vf acc[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) acc[v] = simd::zero();
    simd::ScaleBias sum = simd::no_scale_bias();
    int64_t count = 0;
    ahead.template for_each_row<row_bytes(T, N * lanes)>(pos, end, [&](int64_t at, const uint8_t* row) {
      if (row == nullptr) return;
      const vf w = simd::broadcast(row_factor<T>(ahead, b, at, sum));
      // Worth a fifth where rows come from a cache.
      if (tail == lanes) {
        add_row<T, N, true>(acc, row, w, tail);
      } else {
        add_row<T, N, false>(acc, row, w, tail);
      }
      ++count;
      if (is_quantized(T) && (count & (fold_rows - 1)) == 0) {
        const vf bias = simd::broadcast(sum.bias());
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v) acc[v] = simd::add(acc[v], bias);
        sum = simd::no_scale_bias();
      }
    });
    pos = end;
    if (!ahead.ok()) break;
    if constexpr (T == ElementType::u4) {
#pragma GCC unroll 16
      for (int g = 0; g < N; g += 2) simd::interleave(acc[g], acc[g + 1]);
    }
    const float mean = mean_factor(b, count) * t.multiplier;
    const vf factor = simd::broadcast(mean), shift = simd::broadcast(sum.bias() * mean);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      acc[v] = is_quantized(T) ? simd::fma(acc[v], factor, shift) : simd::mul(acc[v], factor);
    }
    store_registers(acc, out, bag * out.stride, t.dim);
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

// Longer rows: accumulators in memory (L1). Such rows stream, so the extra traffic is hidden behind theirs.
template <ElementType T>
void pool_memory(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last, float* acc,
                 Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    simd::ScaleBias sum = simd::no_scale_bias();
    int64_t count = 0;
    std::memset(acc, 0, static_cast<size_t>(t.dim) * sizeof(float));
    ahead.for_each_row(pos, end, [&](int64_t at, const uint8_t* row) {
      if (row == nullptr) return;
      const vf factor = simd::broadcast(row_factor<T>(ahead, b, at, sum));
      for_each_vector<T>(row, t.dim, [&](int64_t c, vf x, int n) {
        simd::store_f32(acc + c, simd::fma(x, factor, simd::load_f32(acc + c, n)), n);
      });
      ++count;
      if (is_quantized(T) && (count & (fold_rows - 1)) == 0) {
        for (int64_t c = 0; c < t.dim; ++c) acc[c] += sum.bias();
        sum = simd::no_scale_bias();
      }
    });
    pos = end;
    if (!ahead.ok()) break;
    const float mean = mean_factor(b, count) * t.multiplier, bias = sum.bias();
    for (int64_t c = 0; c < t.dim; ++c) acc[c] = (acc[c] + bias) * mean;
    store_floats(out, bag * out.stride, acc, t.dim);
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

void pool_f64(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last, Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    double* __restrict acc = static_cast<double*>(out.data) + bag * out.stride;
    int64_t count = 0;
    for (int64_t c = 0; c < t.dim; ++c) acc[c] = 0.0;
    ahead.for_each_row(pos, end, [&](int64_t at, const uint8_t* row) {
      if (row == nullptr) return;
      const double* __restrict x = reinterpret_cast<const double*>(row);
      const double w = b.weights == nullptr ? 1.0 : element(b.weights, b.weights_type, at);
      for (int64_t c = 0; c < t.dim; ++c) acc[c] += w * x[c];
      ++count;
    });
    pos = end;
    if (!ahead.ok()) break;
    if (b.pooling == Pooling::mean && count > 1) {
      for (int64_t c = 0; c < t.dim; ++c) acc[c] /= static_cast<double>(count);
    }
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

// Picks the instance with as many registers as the row has vectors.
template <ElementType T, int N = (T == ElementType::u4 ? 2 : 1)>
void pool_rows(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last, float* scratch,
               Fault* fault) {
  if (t.dim <= N * lanes) return pool_registers<T, N>(t, b, out, first, last, fault);
  constexpr int step = T == ElementType::u4 ? 2 : 1;
  if constexpr (N + step <= simd::max_vectors) {
    return pool_rows<T, N + step>(t, b, out, first, last, scratch, fault);
  } else {
    return pool_memory<T>(t, b, out, first, last, scratch, fault);
  }
}

void pool(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last, float* scratch,
          Fault* fault) {
  if (!offsets_good(b, first, last, fault)) return;
  switch (t.type) {
    case ElementType::f64:
      return pool_f64(t, b, out, first, last, fault);
    case ElementType::f32:
      return pool_rows<ElementType::f32>(t, b, out, first, last, scratch, fault);
    case ElementType::f16:
      return pool_rows<ElementType::f16>(t, b, out, first, last, scratch, fault);
    case ElementType::bf16:
      return pool_rows<ElementType::bf16>(t, b, out, first, last, scratch, fault);
    case ElementType::u8:
      return pool_rows<ElementType::u8>(t, b, out, first, last, scratch, fault);
    case ElementType::u4:
      return pool_rows<ElementType::u4>(t, b, out, first, last, scratch, fault);
    default:  // no table has it
      return;
  }
}

// ---- max ----

// The first row of a bag is taken as it is and later ones only where they are greater, as torch does: of
// equal values the first wins, and a NaN is kept only from the first row.
template <typename F>
inline void keep_greater(F* __restrict best, const F* __restrict x, int64_t* __restrict argmax, int64_t row,
                         int64_t dim, bool first) {
  if (argmax == nullptr) {
    for (int64_t c = 0; c < dim; ++c) best[c] = first || x[c] > best[c] ? x[c] : best[c];
    return;
  }
  for (int64_t c = 0; c < dim; ++c) {
    const bool take = first || x[c] > best[c];
    best[c] = take ? x[c] : best[c];
    argmax[c] = take ? row : argmax[c];
  }
}

template <ElementType T>
void pool_max_rows(const Table& t, const Bags& b, const Matrix& out, int64_t* argmax, int64_t first,
                   int64_t last, float* scratch, Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  float* best = scratch;
  float* x = scratch + t.dim;
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    int64_t* from = argmax == nullptr ? nullptr : argmax + bag * t.dim;
    double* wide = T == ElementType::f64 ? static_cast<double*>(out.data) + bag * out.stride : nullptr;
    bool empty = true;
    ahead.for_each_row(pos, end, [&](int64_t at, const uint8_t* data) {
      if (data == nullptr) return;
      const int64_t row = index_at(b, at);
      if constexpr (T == ElementType::f64) {
        keep_greater(wide, reinterpret_cast<const double*>(data), from, row, t.dim, empty);
      } else {
        decode<T>(t, row, x);
        keep_greater(best, x, from, row, t.dim, empty);
      }
      empty = false;
    });
    pos = end;
    if (!ahead.ok()) break;
    for (int64_t c = 0; empty && c < t.dim; ++c) {
      if (T == ElementType::f64)
        wide[c] = 0.0;
      else
        best[c] = 0.0f;
      if (from != nullptr) from[c] = -1;
    }
    if (T != ElementType::f64) store_floats(out, bag * out.stride, best, t.dim);
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

void pool_max(const Table& t, const Bags& b, const Matrix& out, int64_t* argmax, int64_t first, int64_t last,
              float* scratch, Fault* fault) {
  if (!offsets_good(b, first, last, fault)) return;
  switch (t.type) {
    case ElementType::f64:
      return pool_max_rows<ElementType::f64>(t, b, out, argmax, first, last, scratch, fault);
    case ElementType::f32:
      return pool_max_rows<ElementType::f32>(t, b, out, argmax, first, last, scratch, fault);
    case ElementType::f16:
      return pool_max_rows<ElementType::f16>(t, b, out, argmax, first, last, scratch, fault);
    case ElementType::bf16:
      return pool_max_rows<ElementType::bf16>(t, b, out, argmax, first, last, scratch, fault);
    case ElementType::u8:
      return pool_max_rows<ElementType::u8>(t, b, out, argmax, first, last, scratch, fault);
    case ElementType::u4:
      return pool_max_rows<ElementType::u4>(t, b, out, argmax, first, last, scratch, fault);
    default:  // no table has it
      return;
  }
}

}  // namespace

extern "C" const rk::EmbeddingBagKernels RK_CONCAT(rk_embedding_bag_, RK_ISA) = {
    pool, pool_max, collect, reduce, weights_gradient, quantize, warm,
};
