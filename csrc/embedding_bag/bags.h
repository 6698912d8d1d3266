// Indices and offsets: checked, and read ahead of the rows.
#pragma once

#include "rows.h"

namespace {

using rk::Bags;
using rk::Fault;
using rk::FaultKind;
using rk::offset_at;
using rk::Pooling;

inline int64_t index_at(const Bags& b, int64_t pos) {
  return b.indices_64 ? static_cast<const int64_t*>(b.indices)[pos]
                      : static_cast<const int32_t*>(b.indices)[pos];
}

// Offsets of the bags [first, last) must lie in [0, num_indices] and not decrease.
inline bool offsets_good(const Bags& b, int64_t first, int64_t last, Fault* fault) {
  if (b.offsets == nullptr || first >= last) return true;
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
// the rows on the way into L2. Works on groups of positions, so that the choices between types are made once
// a group: with 64 bytes a row the lookup is bound by instructions as much as by memory.
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
    if (bytes_ < 1) bytes_ = 1;  // a table without columns
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

  // Starts a row that is up soon on its way from L2 into L1: 4-8 % for rows of up to 4 lines on a Xeon core;
  // for longer ones the instructions cost more.
  template <int Lines>
  void approach(int64_t pos) const {
    // An address, not a pointer: that of padding is null.
    const uintptr_t p = reinterpret_cast<uintptr_t>(row_[(pos + near_rows) & (capacity - 1)]);
#pragma GCC unroll 4
    for (int l = 0; l < Lines; ++l)
      simd::prefetch_l1(reinterpret_cast<const void*>(p + 64 * static_cast<uintptr_t>(l)));
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
  static constexpr int64_t index_distance = 256, near_rows = 8;

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
  const uint8_t* row_[capacity] = {};
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
