#include "kernel.h"

#include "common/simd.h"

#define RK_CONCAT2(a, b) a##b
#define RK_CONCAT(a, b) RK_CONCAT2(a, b)

namespace {

using rk::Bags;
using rk::Contribution;
using rk::Fault;
using rk::FaultKind;
using rk::Matrix;
using rk::Pooling;
using rk::RowType;
using rk::Table;
using simd::lanes;
using simd::vf;

// ---- rows
// ------------------------------------------------------------------------------------------------------

constexpr bool is_quantized(RowType t) { return t == RowType::u8 || t == RowType::u4; }

constexpr int64_t row_bytes(RowType t, int64_t dim) {
  switch (t) {
    case RowType::f64:
      return dim * 8;
    case RowType::f32:
      return dim * 4;
    case RowType::f16:
    case RowType::bf16:
      return dim * 2;
    case RowType::u8:
      return dim;
    default:
      return (dim + 1) / 2;
  }
}

// One vector (u4: two, even and odd elements) from byte or element `first` on; n < lanes only for the last
// one.
template <RowType T>
inline vf load(const uint8_t* row, int64_t first) {
  if constexpr (T == RowType::f32) return simd::load_f32(reinterpret_cast<const float*>(row) + first);
  if constexpr (T == RowType::f16) return simd::load_f16(row + 2 * first);
  if constexpr (T == RowType::bf16) return simd::load_bf16(row + 2 * first);
  return simd::load_u8(row + first);
}

template <RowType T>
inline vf load(const uint8_t* row, int64_t first, int n) {
  if constexpr (T == RowType::f32) return simd::load_f32(reinterpret_cast<const float*>(row) + first, n);
  if constexpr (T == RowType::f16) return simd::load_f16(row + 2 * first, n);
  if constexpr (T == RowType::bf16) return simd::load_bf16(row + 2 * first, n);
  return simd::load_u8(row + first, n);
}

// acc += w * row, the whole row in registers. Only a row whose last vector is not full needs a mask.
template <RowType T, int N, bool Full>
inline void add_row(vf (&acc)[N], const uint8_t* row, vf w, int tail) {
  if constexpr (T == RowType::u4) {
#pragma GCC unroll 16
    for (int g = 0; g < N / 2; ++g) {
      vf even, odd;
      if (Full || g < N / 2 - 1) {
        simd::load_i4(row + g * lanes, even, odd);
      } else {
        simd::load_i4(row + g * lanes, tail, even, odd);
      }
      acc[2 * g] = simd::fma(even, w, acc[2 * g]);
      acc[2 * g + 1] = simd::fma(odd, w, acc[2 * g + 1]);
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      const bool full = Full || v < N - 1;
      acc[v] = simd::fma(full ? load<T>(row, v * lanes) : load<T>(row, v * lanes, tail), w, acc[v]);
    }
  }
}

void store(const Matrix& out, int64_t offset, vf x, int n) {
  switch (out.type) {
    case RowType::f32:
      return simd::store_f32(static_cast<float*>(out.data) + offset, x, n);
    case RowType::f16:
      return simd::store_f16(static_cast<uint16_t*>(out.data) + offset, x, n);
    case RowType::bf16:
      return simd::store_bf16(static_cast<uint16_t*>(out.data) + offset, x, n);
    default: {
      float f[lanes];
      simd::store_f32(f, x);
      for (int i = 0; i < n; ++i) static_cast<double*>(out.data)[offset + i] = f[i];
    }
  }
}

__attribute__((noinline)) void store_floats(const Matrix& out, int64_t offset, const float* x, int64_t n) {
  for (int64_t c = 0; c < n; c += lanes) {
    const int rest = n - c < lanes ? static_cast<int>(n - c) : lanes;
    store(out, offset + c, simd::load_f32(x + c, rest), rest);
  }
}

// Stores a row from registers. Only floats are stored in line: the conversions would be unrolled 70 times
// over.
template <int N>
inline void store_registers(const vf (&acc)[N], const Matrix& out, int64_t offset, int64_t dim) {
  if (out.type != RowType::f32) {
    float buffer[N * lanes];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) simd::store_f32(buffer + v * lanes, acc[v]);
    return store_floats(out, offset, buffer, dim);
  }
  float* p = static_cast<float*>(out.data) + offset;
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    // The last pair of a u4 row can end in its first vector.
    const int64_t left = dim - v * lanes;
    if (left >= lanes)
      simd::store_f32(p + v * lanes, acc[v]);
    else if (left > 0)
      simd::store_f32(p + v * lanes, acc[v], static_cast<int>(left));
  }
}

inline double element(const void* data, RowType type, int64_t i) {
  switch (type) {
    case RowType::f64:
      return static_cast<const double*>(data)[i];
    case RowType::f32:
      return static_cast<const float*>(data)[i];
    case RowType::f16:
      return simd::f16_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return simd::bf16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

// Calls f(first, vector, n) over a row as floats, without scale and bias.
template <RowType T, typename F>
inline void for_each_vector(const uint8_t* row, int64_t dim, F&& f) {
  if constexpr (T == RowType::u4) {
    const int64_t bytes = (dim + 1) / 2;
    for (int64_t b = 0; b < bytes; b += lanes) {
      vf even, odd;
      simd::load_i4(row + b, bytes - b < lanes ? static_cast<int>(bytes - b) : lanes, even, odd);
      simd::interleave(even, odd);
      const int64_t left = dim - 2 * b;
      f(2 * b, even, left < lanes ? static_cast<int>(left) : lanes);
      if (left > lanes) f(2 * b + lanes, odd, left < 2 * lanes ? static_cast<int>(left - lanes) : lanes);
    }
  } else {
    int64_t c = 0;
    for (; c + lanes <= dim; c += lanes) f(c, load<T>(row, c), lanes);
    if (c < dim) f(c, load<T>(row, c, static_cast<int>(dim - c)), static_cast<int>(dim - c));
  }
}

inline const uint8_t* scale_bias_of(const Table& t, int64_t row) {
  return static_cast<const uint8_t*>(t.scale_bias) + row * t.scale_bias_stride;
}

// ---- bags
// ------------------------------------------------------------------------------------------------------

inline int64_t index_at(const Bags& b, int64_t pos) {
  return b.indices_64 ? static_cast<const int64_t*>(b.indices)[pos]
                      : static_cast<const int32_t*>(b.indices)[pos];
}

inline int64_t offset_at(const Bags& b, int64_t bag) {
  if (b.offsets == nullptr) return bag * b.bag_length;
  if (bag == b.num_bags && !b.has_last_offset) return b.num_indices;
  return b.offsets_64 ? static_cast<const int64_t*>(b.offsets)[bag]
                      : static_cast<const int32_t*>(b.offsets)[bag];
}

// Offsets of the bags [first, last) must lie in [0, num_indices] and not decrease.
inline bool offsets_good(const Bags& b, int64_t first, int64_t last, Fault* fault) {
  if (b.offsets == nullptr) return true;
  int64_t previous = 0;
  for (int64_t bag = first; bag <= last; ++bag) {
    const int64_t o = offset_at(b, bag);
    if (o < previous || o > b.num_indices) {
      *fault = {FaultKind::offset, bag, o};
      return false;
    }
    previous = o;
  }
  return true;
}

// Reads indices ahead of the rows that are being added: checks them, finds the rows' addresses, and starts
// the rows on the way into L2. (A second prefetch into L1 shortly before a row's turn cost more instructions
// than it saved: 84 against 96 million 68-byte rows a second on a Xeon core.) Works on groups of positions,
// so that the choices between types are made once a group: with 64 bytes a row the lookup is bound by
// instructions as much as by memory.
class Lookahead {
 public:
  Lookahead(const Table& t, const Bags& b, int64_t begin, int64_t end)
      : rows_(static_cast<const uint8_t*>(t.rows)),
        row_stride_(t.row_stride),
        num_rows_(static_cast<uint64_t>(t.num_rows)),
        bags_(b),
        bytes_(row_bytes(t.type, t.dim)),
        front_(begin),
        end_(end),
        next_advance_(begin) {
    if (t.scale_bias != nullptr) {
      // Inside the rows they lie on the row's lines or the next; else they need a prefetch of their own.
      const int64_t inside = static_cast<const uint8_t*>(t.scale_bias) - rows_;
      if (t.scale_bias_stride == t.row_stride && inside >= 0 && inside + 4 <= t.row_stride) {
        bytes_ = inside + 4;
      } else {
        scale_bias_ = static_cast<const uint8_t*>(t.scale_bias);
        scale_bias_stride_ = t.scale_bias_stride;
      }
    }
    // The rest of a long row is a stream that the hardware sees.
    if (bytes_ > max_row_bytes) bytes_ = max_row_bytes;
    // The most lines that a row can touch, given how its address is aligned: all but the last are prefetched
    // in steps from the first byte on, and the last by the last byte, so that no line is asked for twice.
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.rows) | static_cast<uintptr_t>(t.row_stride) | 64;
    const int64_t alignment = static_cast<int64_t>(address & (~address + 1));
    lines_ = (64 - alignment + bytes_ + 63) / 64;
    // Far enough that a row has arrived when it is needed, near enough that L2 still holds it.
    const int64_t by_bytes = max_bytes / (lines_ * 64);
    const int64_t distance = by_bytes < min_rows ? min_rows : by_bytes > max_rows ? max_rows : by_bytes;
    while (front_ < begin + distance && front_ < end) resolve_group();
  }

  bool ok() const { return fault_.kind == FaultKind::none; }
  const Fault& fault() const { return fault_; }

  // The row at a position, or null for padding. Positions are asked for one after the other.
  const uint8_t* row(int64_t pos) {
    if (pos == next_advance_) advance();
    return row_[pos & (capacity - 1)];
  }

 private:
  static constexpr int64_t group = 8, capacity = 128;  // powers of two
  static constexpr int64_t max_bytes = 24 << 10, min_rows = 16, max_rows = 64, max_row_bytes = 4096;
  static constexpr int64_t index_distance = 256;

  __attribute__((noinline)) void advance() {
    next_advance_ += group;
    resolve_group();
  }

  void resolve_group() {
    if (front_ >= end_) return;
    const int64_t stop = front_ + group < end_ ? front_ + group : end_;
    if (bags_.indices_64) {
      resolve_as(static_cast<const int64_t*>(bags_.indices), stop);
    } else {
      resolve_as(static_cast<const int32_t*>(bags_.indices), stop);
    }
    front_ = stop;
  }

  template <typename Index>
  void resolve_as(const Index* indices, int64_t stop) {
    // The hardware's own stream prefetcher gives way to the misses of the rows.
    simd::prefetch_l1(reinterpret_cast<const char*>(indices) + (front_ + index_distance) * sizeof(Index));
    // One test for the whole group: nearly always every index is good and none is padding.
    bool special = false;
    for (int64_t pos = front_; pos < stop; ++pos) {
      const int64_t index = indices[pos];
      special |= static_cast<uint64_t>(index) >= num_rows_ || index == bags_.padding_idx;
    }
    if (__builtin_expect(special, 0)) return resolve_checked(indices, stop);
    if (lines_ == 1) return resolve_rows<1>(indices, stop);
    if (lines_ == 2) return resolve_rows<2>(indices, stop);
    return resolve_rows<0>(indices, stop);
  }

  template <int Lines, typename Index>
  void resolve_rows(const Index* indices, int64_t stop) {
    const uint8_t* const rows = rows_;
    const int64_t stride = row_stride_, bytes = bytes_, lines = Lines == 0 ? lines_ : Lines;
    for (int64_t pos = front_; pos < stop; ++pos) {
      const uint8_t* p = rows + static_cast<int64_t>(indices[pos]) * stride;
      row_[pos & (capacity - 1)] = p;
      for (int64_t l = 0; l < lines - 1; ++l) simd::prefetch_l2(p + 64 * l);
      simd::prefetch_l2(p + bytes - 1);
    }
    if (scale_bias_ == nullptr) return;
    for (int64_t pos = front_; pos < stop; ++pos) {
      simd::prefetch_l2(scale_bias_ + static_cast<int64_t>(indices[pos]) * scale_bias_stride_);
    }
  }

  template <typename Index>
  __attribute__((noinline)) void resolve_checked(const Index* indices, int64_t stop) {
    for (int64_t pos = front_; pos < stop; ++pos) {
      const int64_t index = indices[pos];
      const bool good = static_cast<uint64_t>(index) < num_rows_;
      if (!good && ok()) fault_ = {FaultKind::index, pos, index};
      const uint8_t* p = good && index != bags_.padding_idx ? rows_ + index * row_stride_ : nullptr;
      row_[pos & (capacity - 1)] = p;
      for (int64_t l = 0; p != nullptr && l < lines_; ++l) simd::prefetch_l2(p + 64 * l);
    }
  }

  const uint8_t* rows_;
  int64_t row_stride_;
  const uint8_t* scale_bias_ = nullptr;  // where they are an array of their own
  int64_t scale_bias_stride_ = 0;
  uint64_t num_rows_;
  const Bags& bags_;
  int64_t bytes_, lines_ = 0, front_, end_, next_advance_;
  Fault fault_{FaultKind::none, 0, 0};
  const uint8_t* row_[capacity];
};

// Weights, scales and biases of the rows that are being added.
template <RowType T>
class Factors {
 public:
  Factors(const Table& t, const Bags& b)
      : weights_(b.weights), weights_type_(b.weights_type), bags_(b), table_(t) {
    if constexpr (is_quantized(T)) {
      inside_ = static_cast<const uint8_t*>(t.scale_bias) - static_cast<const uint8_t*>(t.rows);
      separate_ = t.scale_bias_stride != t.row_stride;
    }
  }

  // What the row's stored elements are multiplied with; adds to `sum` what all its elements get.
  float operator()(const uint8_t* row, int64_t pos, simd::ScaleBias& sum) const {
    const bool weighted = weights_ != nullptr;
    const float w = weighted ? static_cast<float>(element(weights_, weights_type_, pos)) : 1.0f;
    if constexpr (is_quantized(T)) {
      const uint8_t* p = separate_ ? scale_bias_of(table_, index_at(bags_, pos)) : row + inside_;
      simd::ScaleBias sb = simd::load_scale_bias(p);
      if (weighted) sb.multiply(w);
      sum.add(sb);
      return sb.scale();
    }
    return w;
  }

 private:
  const void* weights_;
  RowType weights_type_;
  const Bags& bags_;
  const Table& table_;
  int64_t inside_ = 0;
  bool separate_ = false;
};

inline float mean_factor(const Bags& b, int64_t count) {
  return b.pooling == Pooling::mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
}

// ---- sum and mean
// ----------------------------------------------------------------------------------------------

// The row fits into N registers: they are loaded from nothing and stored once a bag.
template <RowType T, int N>
void pool_registers(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last,
                    Fault* fault) {
  const int64_t unit = T == RowType::u4 ? (t.dim + 1) / 2 : t.dim;
  const int tail = static_cast<int>(unit - (T == RowType::u4 ? N / 2 - 1 : N - 1) * lanes);
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  const Factors<T> factors(t, b);
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    vf acc[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) acc[v] = simd::zero();
    simd::ScaleBias sum = simd::no_scale_bias();
    int64_t count = 0;
    for (; pos < end; ++pos) {
      const uint8_t* row = ahead.row(pos);
      if (row == nullptr) continue;
      const vf w = simd::broadcast(factors(row, pos, sum));
      // Worth a fifth where rows come from a cache.
      if (tail == lanes) {
        add_row<T, N, true>(acc, row, w, tail);
      } else {
        add_row<T, N, false>(acc, row, w, tail);
      }
      ++count;
    }
    if (!ahead.ok()) break;
    if constexpr (T == RowType::u4) {
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
template <RowType T>
void pool_memory(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last, float* acc,
                 Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  const Factors<T> factors(t, b);
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    simd::ScaleBias sum = simd::no_scale_bias();
    int64_t count = 0;
    std::memset(acc, 0, static_cast<size_t>(t.dim) * sizeof(float));
    for (; pos < end; ++pos) {
      const uint8_t* row = ahead.row(pos);
      if (row == nullptr) continue;
      const vf factor = simd::broadcast(factors(row, pos, sum));
      for_each_vector<T>(row, t.dim, [&](int64_t c, vf x, int n) {
        simd::store_f32(acc + c, simd::fma(x, factor, simd::load_f32(acc + c, n)), n);
      });
      ++count;
    }
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
    for (; pos < end; ++pos) {
      const double* __restrict x = reinterpret_cast<const double*>(ahead.row(pos));
      if (x == nullptr) continue;
      const double w = b.weights == nullptr ? 1.0 : element(b.weights, b.weights_type, pos);
      for (int64_t c = 0; c < t.dim; ++c) acc[c] += w * x[c];
      ++count;
    }
    if (!ahead.ok()) break;
    if (b.pooling == Pooling::mean && count > 1) {
      for (int64_t c = 0; c < t.dim; ++c) acc[c] /= static_cast<double>(count);
    }
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

// Picks the instance with as many registers as the row has vectors.
template <RowType T, int N = (T == RowType::u4 ? 2 : 1)>
void pool_rows(const Table& t, const Bags& b, const Matrix& out, int64_t first, int64_t last, float* scratch,
               Fault* fault) {
  if (t.dim <= N * lanes) return pool_registers<T, N>(t, b, out, first, last, fault);
  constexpr int step = T == RowType::u4 ? 2 : 1;
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
    case RowType::f64:
      return pool_f64(t, b, out, first, last, fault);
    case RowType::f32:
      return pool_rows<RowType::f32>(t, b, out, first, last, scratch, fault);
    case RowType::f16:
      return pool_rows<RowType::f16>(t, b, out, first, last, scratch, fault);
    case RowType::bf16:
      return pool_rows<RowType::bf16>(t, b, out, first, last, scratch, fault);
    case RowType::u8:
      return pool_rows<RowType::u8>(t, b, out, first, last, scratch, fault);
    case RowType::u4:
      return pool_rows<RowType::u4>(t, b, out, first, last, scratch, fault);
  }
}

// ---- max
// -------------------------------------------------------------------------------------------------------

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

// Writes a row's values (scaled) to `x`.
template <RowType T>
void decode(const Table& t, int64_t row, float* x) {
  simd::ScaleBias sb = simd::no_scale_bias();
  if constexpr (is_quantized(T)) sb = simd::load_scale_bias(scale_bias_of(t, row));
  const vf scale = simd::broadcast(sb.scale() * t.multiplier),
           bias = simd::broadcast(sb.bias() * t.multiplier);
  const uint8_t* data = static_cast<const uint8_t*>(t.rows) + row * t.row_stride;
  for_each_vector<T>(data, t.dim, [&](int64_t c, vf v, int n) {
    simd::store_f32(x + c, is_quantized(T) ? simd::fma(v, scale, bias) : v, n);
  });
}

template <RowType T>
void pool_max_rows(const Table& t, const Bags& b, const Matrix& out, int64_t* argmax, int64_t first,
                   int64_t last, float* scratch, Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  float* best = scratch;
  float* x = scratch + t.dim;
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    int64_t* from = argmax == nullptr ? nullptr : argmax + bag * t.dim;
    double* wide = T == RowType::f64 ? static_cast<double*>(out.data) + bag * out.stride : nullptr;
    bool empty = true;
    for (; pos < end; ++pos) {
      const uint8_t* data = ahead.row(pos);
      if (data == nullptr) continue;
      const int64_t row = index_at(b, pos);
      if constexpr (T == RowType::f64) {
        keep_greater(wide, reinterpret_cast<const double*>(data), from, row, t.dim, empty);
      } else {
        decode<T>(t, row, x);
        keep_greater(best, x, from, row, t.dim, empty);
      }
      empty = false;
    }
    if (!ahead.ok()) break;
    for (int64_t c = 0; empty && c < t.dim; ++c) {
      if (T == RowType::f64)
        wide[c] = 0.0;
      else
        best[c] = 0.0f;
      if (from != nullptr) from[c] = -1;
    }
    if (T != RowType::f64) store_floats(out, bag * out.stride, best, t.dim);
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

void pool_max(const Table& t, const Bags& b, const Matrix& out, int64_t* argmax, int64_t first, int64_t last,
              float* scratch, Fault* fault) {
  if (!offsets_good(b, first, last, fault)) return;
  switch (t.type) {
    case RowType::f64:
      return pool_max_rows<RowType::f64>(t, b, out, argmax, first, last, scratch, fault);
    case RowType::f32:
      return pool_max_rows<RowType::f32>(t, b, out, argmax, first, last, scratch, fault);
    case RowType::f16:
      return pool_max_rows<RowType::f16>(t, b, out, argmax, first, last, scratch, fault);
    case RowType::bf16:
      return pool_max_rows<RowType::bf16>(t, b, out, argmax, first, last, scratch, fault);
    case RowType::u8:
      return pool_max_rows<RowType::u8>(t, b, out, argmax, first, last, scratch, fault);
    case RowType::u4:
      return pool_max_rows<RowType::u4>(t, b, out, argmax, first, last, scratch, fault);
  }
}

// ---- backward
// --------------------------------------------------------------------------------------------------

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
template <RowType T>
void reduce_rows(const Matrix& grad, const Contribution* list, int64_t count, const Matrix& out, int64_t dim,
                 int64_t first_row, int64_t last_row, float* scratch) {
  constexpr int64_t size = row_bytes(T, 1);
  char* base = static_cast<char*>(out.data);
  const int64_t stride = out.stride * size;
  const auto clear = [&](int64_t from, int64_t to) {
    if (to > from) std::memset(base + from * stride, 0, static_cast<size_t>((to - from) * stride));
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
      if constexpr (T == RowType::f64) {
        double* acc = reinterpret_cast<double*>(base + row * stride);
        const double* x = reinterpret_cast<const double*>(g);
        for (int64_t c = 0; c < dim; ++c) acc[c] = (empty ? 0.0 : acc[c]) + list[i].weight * x[c];
      } else {
        float* acc = T == RowType::f32 ? reinterpret_cast<float*>(base + row * stride) : scratch;
        const vf w = simd::broadcast(static_cast<float>(list[i].weight));
        for_each_vector<T>(reinterpret_cast<const uint8_t*>(g), dim, [&](int64_t c, vf x, int n) {
          const vf old = empty ? simd::zero() : simd::load_f32(acc + c, n);
          simd::store_f32(acc + c, simd::fma(x, w, old), n);
        });
      }
    }
    if (T == RowType::f16 || T == RowType::bf16) store_floats(out, row * out.stride, scratch, dim);
  }
  clear(next_row, last_row);
}

void reduce(const Matrix& grad, const Contribution* list, int64_t count, const Matrix& out, int64_t dim,
            int64_t first_row, int64_t last_row, float* scratch) {
  switch (out.type) {
    case RowType::f64:
      return reduce_rows<RowType::f64>(grad, list, count, out, dim, first_row, last_row, scratch);
    case RowType::f32:
      return reduce_rows<RowType::f32>(grad, list, count, out, dim, first_row, last_row, scratch);
    case RowType::f16:
      return reduce_rows<RowType::f16>(grad, list, count, out, dim, first_row, last_row, scratch);
    default:
      return reduce_rows<RowType::bf16>(grad, list, count, out, dim, first_row, last_row, scratch);
  }
}

template <RowType T>
double dot(const uint8_t* row, const char* grad, int64_t dim) {
  if constexpr (T == RowType::f64) {
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

template <RowType T>
void weights_gradient_rows(const Table& t, const Bags& b, const Matrix& grad, const Matrix& out,
                           int64_t first, int64_t last, Fault* fault) {
  int64_t pos = offset_at(b, first);
  Lookahead ahead(t, b, pos, offset_at(b, last));
  const auto put = [&](int64_t at, double x) {
    if (out.type == RowType::f64)
      static_cast<double*>(out.data)[at] = x;
    else
      store(out, at, simd::broadcast(static_cast<float>(x)), 1);
  };
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t end = offset_at(b, bag + 1);
    const int64_t count = b.pooling == Pooling::mean ? end - pos - count_padding(b, pos, end) : 1;
    const double factor = count > 1 ? 1.0 / static_cast<double>(count) : 1.0;
    const char* g = static_cast<const char*>(grad.data) + bag * grad.stride * row_bytes(T, 1);
    for (; pos < end; ++pos) {
      const uint8_t* row = ahead.row(pos);
      put(pos, row == nullptr ? 0.0 : factor * dot<T>(row, g, t.dim));
    }
    if (!ahead.ok()) break;
  }
  if (!ahead.ok()) *fault = ahead.fault();
}

void weights_gradient(const Table& t, const Bags& b, const Matrix& grad, const Matrix& out, int64_t first,
                      int64_t last, Fault* fault) {
  if (!offsets_good(b, first, last, fault)) return;
  switch (t.type) {
    case RowType::f64:
      return weights_gradient_rows<RowType::f64>(t, b, grad, out, first, last, fault);
    case RowType::f32:
      return weights_gradient_rows<RowType::f32>(t, b, grad, out, first, last, fault);
    case RowType::f16:
      return weights_gradient_rows<RowType::f16>(t, b, grad, out, first, last, fault);
    default:
      return weights_gradient_rows<RowType::bf16>(t, b, grad, out, first, last, fault);
  }
}

// ---- quantize
// --------------------------------------------------------------------------------------------------

// The nearest half that is not above (direction -1) or not below (+1) x, so that no element is clipped.
inline uint16_t round_half_towards(float x, int direction) {
  uint16_t h = simd::float_to_f16(x);
  const float back = simd::f16_to_float(h);
  if (direction > 0 ? back >= x : back <= x) return h;
  if ((h & 0x7fff) == 0) return direction > 0 ? 0x0001 : 0x8001;
  const bool away = ((h & 0x8000) == 0) == (direction > 0);
  return static_cast<uint16_t>(away ? h + 1 : h - 1);
}

// Row-wise asymmetric quantization: bias = min, scale = (max - min) / levels, both rounded outwards to fp16.
void quantize_row(const float* __restrict x, int64_t dim, int bits, uint8_t* __restrict q,
                  uint8_t* scale_bias) {
  float low = x[0], high = x[0];
  for (int64_t c = 1; c < dim; ++c) {
    low = x[c] < low ? x[c] : low;
    high = x[c] > high ? x[c] : high;
  }
  const float levels = bits == 8 ? 255.0f : 15.0f;
  uint16_t half[2];
  half[1] = round_half_towards(low, -1);
  const float bias = simd::f16_to_float(half[1]);
  half[0] = round_half_towards((high - bias) / levels, +1);
  const float scale = simd::f16_to_float(half[0]);
  std::memcpy(scale_bias, half, sizeof half);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  // Adding 1.5 * 2^23 leaves the value, rounded to nearest even, in the low mantissa bits, on every level
  // alike.
  const auto level = [&](float v) {
    const float y = (v - bias) * inverse;
    const uint32_t u = simd::bits_of((y < levels ? y : levels) + 12582912.0f) - 0x4b400000u;
    return static_cast<uint8_t>(u);
  };
  if (bits == 8) {
    for (int64_t c = 0; c < dim; ++c) q[c] = level(x[c]);
  } else {
    for (int64_t c = 0; c + 1 < dim; c += 2)
      q[c / 2] = static_cast<uint8_t>(level(x[c]) | level(x[c + 1]) << 4);
    if (dim % 2 != 0) q[dim / 2] = level(x[dim - 1]);
  }
}

void quantize(const Table& source, int bits, float inverse_multiplier, uint8_t* rows, int64_t row_stride,
              uint8_t* scale_bias, int64_t scale_bias_stride, int64_t first, int64_t last, float* x,
              Fault* fault) {
  for (int64_t row = first; row < last; ++row) {
    switch (source.type) {
      case RowType::f64:
        for (int64_t c = 0; c < source.dim; ++c) {
          const char* data = static_cast<const char*>(source.rows) + row * source.row_stride;
          x[c] = static_cast<float>(reinterpret_cast<const double*>(data)[c]);
        }
        break;
      case RowType::f32:
        decode<RowType::f32>(source, row, x);
        break;
      case RowType::f16:
        decode<RowType::f16>(source, row, x);
        break;
      default:
        decode<RowType::bf16>(source, row, x);
        break;
    }
    uint32_t bad = 0;
    for (int64_t c = 0; c < source.dim; ++c) {
      bad |= static_cast<uint32_t>((simd::bits_of(x[c]) & 0x7f800000u) == 0x7f800000u);
      x[c] *= inverse_multiplier;
    }
    if (bad != 0) {
      *fault = {FaultKind::value, row, 0};
      return;
    }
    quantize_row(x, source.dim, bits, rows + row * row_stride, scale_bias + row * scale_bias_stride);
  }
}

// ---- warm
// ------------------------------------------------------------------------------------------------------

// Only a hint: indices are checked when the bags are pooled, and a prefetch of a wrong address does nothing.
void warm(const Table& t, const Bags& b) {
  const int64_t begin = offset_at(b, 0);
  if (begin < 0 || begin >= b.num_indices) return;
  const int64_t end = begin + 4 < b.num_indices ? begin + 4 : b.num_indices;
  const int64_t lines = (row_bytes(t.type, t.dim) + 63) / 64;
  for (int64_t pos = begin; pos < end; ++pos) {
    const uint64_t index = static_cast<uint64_t>(index_at(b, pos));
    if (index >= static_cast<uint64_t>(t.num_rows)) continue;
    const char* p = static_cast<const char*>(t.rows) + static_cast<int64_t>(index) * t.row_stride;
    for (int64_t l = 0; l < lines && l < 8; ++l) simd::prefetch_l2(p + 64 * l);
    if (t.scale_bias != nullptr) simd::prefetch_l2(scale_bias_of(t, static_cast<int64_t>(index)));
  }
}

}  // namespace

extern "C" const rk::EmbeddingBagKernels RK_CONCAT(rk_embedding_bag_, RK_ISA) = {
    pool, pool_max, collect, reduce, weights_gradient, quantize, warm,
};
