// Indices and offsets: checked, and read ahead of the rows.
#pragma once

#include "rows.h"
#include "simd/addresses.h"
#include "simd/prefetch.h"

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
// the rows on the way into L2 and, when they are nearly up, into L1.
//
// The order in which lines are asked for decides as much as how far ahead. Random rows of 4 lines on Zen 4:
// the lines of a row after each other 13 GB/s; line 0 of 16 rows, then line 1 of them, and so on, 22 GB/s.
// (The hardware's prefetchers take lines that follow each other for a stream, and read on behind the row.)
// Rows of up to 3 lines are too short for that: theirs are asked for evenly, with every row that is added,
// since the sums wait while a burst fills the queue of misses (int8, 128 columns: 13.0 ns a row in bursts of
// 8, 9.9 ns evenly).
class Lookahead {
  static constexpr int64_t capacity = 128;  // of the ring of rows
  static constexpr int64_t most_even_bytes = 128, even_group = 8;
  static constexpr int64_t max_bytes = 48 << 10, min_rows = 16, max_rows = 64, max_row_bytes = 4096;
  static constexpr int64_t most_near_bytes = 512, near_rows = 16;
  static constexpr int64_t index_distance = 256;
  // A table of this size lives in L2 and what is next to it, from where asking into L1 is enough: rows of 256
  // bytes take 2.7 instead of 4.2 ns from 256 KiB, 4.4 instead of 5.0 from 2 MiB (Zen 4); from 8 MiB it is
  // the other way.
  static constexpr int64_t cached_bytes = 2 << 20;

 public:
  Lookahead(const Table& t, const Bags& b, int64_t begin, int64_t end)
      : rows_(static_cast<const uint8_t*>(t.rows)),
        row_stride_(t.row_stride),
        num_rows_(static_cast<uint64_t>(t.num_rows)),
        bags_(b),
        front_(begin),
        end_(end),
        next_advance_(begin) {
    int64_t bytes = row_bytes(t.type, t.dim);
    even_ = bytes <= most_even_bytes;
    if (t.scale_bias != nullptr) {
      // Inside the rows they lie on the row's last line or the next; else on a line of their own.
      const int64_t inside = static_cast<const uint8_t*>(t.scale_bias) - rows_;
      pairs_apart_ = t.scale_bias_stride != t.row_stride || inside < bytes || inside + 4 > t.row_stride;
      if (!pairs_apart_) bytes = inside + 4;
      pair_at_ = pairs_apart_ ? bytes - 1 : inside;
      pairs_ = static_cast<const uint8_t*>(t.scale_bias);
      pair_stride_ = t.scale_bias_stride;
    } else {
      pair_at_ = bytes < 1 ? 0 : bytes - 1;
    }
    // The most lines that a row can touch, given how its address is aligned.
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.rows) | static_cast<uintptr_t>(t.row_stride) | 64;
    const int64_t alignment = static_cast<int64_t>(address & (~address + 1));
    // The rest of a long row is a stream that the hardware sees; a table without columns has one byte to look
    // at.
    bytes = bytes < 1 ? 1 : bytes > max_row_bytes ? max_row_bytes : bytes;
    last_byte_ = static_cast<uintptr_t>(bytes - 1);
    lines_ = (64 - alignment + bytes + 63) / 64;
    asked_lines_ = t.num_rows * t.row_stride > cached_bytes ? lines_ : 0;
    more_ = lines_ == 1 ? 0 : lines_ - 2 + pairs_apart_;
    // Bursts of 64 to 128 lines: with fewer rows in one, lines of a row follow each other too closely; with
    // more, the queue of misses overflows (rows of 16 lines: 81 ns in groups of 16, 60 in groups of 8).
    group_ = even_ ? even_group : lines_ <= 8 ? 16 : lines_ <= 16 ? 8 : 4;
    // Positions that are not known yet are only prefetched.
    for (const uint8_t*& row : row_) row = rows_;
    if (even_) {
      const int64_t ahead = begin + max_rows;
      for (const uint8_t*& pair : pair_) pair = rows_;
      while (front_ < ahead + even_group && front_ < end) resolve_group();
      for (int64_t pos = begin; pos < ahead && pos < end; ++pos) ask_for(slot(pos));
    } else {
      // Far enough that a row has arrived when it is needed, near enough that L2 still holds it.
      const int64_t by_bytes = max_bytes / (lines_ * 64);
      const int64_t distance = by_bytes < min_rows ? min_rows : by_bytes > max_rows ? max_rows : by_bytes;
      while (front_ < begin + distance && front_ < end) resolve_group();
    }
  }

  bool ok() const { return fault_.kind == FaultKind::none; }
  const Fault& fault() const { return fault_; }

  // The scale and bias of the row at a position that for_each_row has reached.
  const uint8_t* scale_bias(int64_t pos) const { return pair_[slot(pos)]; }

  // Calls f(position, row) for every position from `pos` to `end`; the row is null for padding. Positions are
  // asked for one after the other. `MostBytes`: the bytes of a row rounded up to full vectors, where they are
  // known.
  template <int64_t MostBytes = 0, typename F>
  __attribute__((always_inline)) void for_each_row(int64_t pos, int64_t end, F&& f) {
    while (pos < end) {
      if (pos == next_advance_) advance();
      // Until the next advance nothing is called, and what the loop reads of this object stays in registers.
      const int64_t stop = next_advance_ < end ? next_advance_ : end;
      for (; pos < stop; ++pos) {
        if (MostBytes == 0 ? even_ : MostBytes <= most_even_bytes) {
          // Near the end of the range these are older rows: asking for them again costs less than a test.
          // Asking once more, into L1, before the row is up gained nothing, and cost rows of two full lines a
          // quarter.
          ask_for(slot(pos + max_rows));
        } else if constexpr (MostBytes != 0 && MostBytes <= most_near_bytes) {
          const uintptr_t p = reinterpret_cast<uintptr_t>(row_[slot(pos + near_rows)]);
#pragma GCC unroll 8
          for (unsigned l = 0; l < (MostBytes + 63) / 64; ++l) prefetch_near(p + 64 * l);
        }
        f(pos, row_[slot(pos)]);
      }
    }
  }

 private:
  static int64_t slot(int64_t pos) { return pos & (capacity - 1); }
  // Integers, as padding has no address.
  static void prefetch(uintptr_t p) { simd::prefetch_l2(reinterpret_cast<const void*>(p)); }
  static void prefetch_near(uintptr_t p) { simd::prefetch_l1(reinterpret_cast<const void*>(p)); }

  // A row of up to 3 lines, and its scale and bias.
  __attribute__((always_inline)) void ask_for(int64_t slot) const {
    const uintptr_t p = reinterpret_cast<uintptr_t>(row_[slot]);
    prefetch(p);
    prefetch(reinterpret_cast<uintptr_t>(pair_[slot]));
    if (more_ == 0) return;
    prefetch(p + 64);
    if (more_ == 2) prefetch(p + last_byte_);
  }

  __attribute__((noinline)) void advance() {
    next_advance_ = (next_advance_ & -group_) + group_;
    resolve_group();
  }

  // The positions up to the next multiple of the group's size.
  void resolve_group() {
    if (front_ >= end_) return;
    const int64_t full = (front_ & -group_) + group_, stop = full < end_ ? full : end_;
    if (bags_.indices_64) {
      resolve(static_cast<const int64_t*>(bags_.indices), stop);
    } else {
      resolve(static_cast<const int32_t*>(bags_.indices), stop);
    }
    if (!even_) prefetch_group(stop);
    front_ = stop;
  }

  template <typename Index>
  void resolve(const Index* indices, int64_t stop) {
    // The hardware's own stream prefetcher gives way to the misses of the rows.
    simd::prefetch_l1(reinterpret_cast<const char*>(indices) + (front_ + index_distance) * sizeof(Index));
    const uint8_t* const pairs = pairs_apart_ ? pairs_ : rows_ + pair_at_;
    const int64_t pair_stride = pairs_apart_ ? pair_stride_ : row_stride_;
    for (int64_t pos = front_; pos < stop; pos += 8) {
      if (stop - pos < 8) return resolve_checked(indices, pos, stop);
      const Index* const next = indices + pos;
      // One test for all: nearly always every index is good and none is padding.
      if (simd::row_addresses(next, num_rows_, bags_.padding_idx, rows_, row_stride_, row_ + slot(pos))) {
        simd::row_addresses(next, num_rows_, -1, pairs, pair_stride, pair_ + slot(pos));
      } else {
        resolve_checked(indices, pos, pos + 8);
      }
    }
  }

  template <typename Index>
  __attribute__((noinline)) void resolve_checked(const Index* indices, int64_t begin, int64_t end) {
    for (int64_t pos = begin; pos < end; ++pos) {
      const int64_t index = indices[pos];
      const bool good = static_cast<uint64_t>(index) < num_rows_;
      if (!good && ok()) fault_ = {FaultKind::index, pos, index};
      const bool taken = good && index != bags_.padding_idx;
      const uint8_t* const row = taken ? rows_ + index * row_stride_ : nullptr;
      row_[slot(pos)] = row;
      pair_[slot(pos)] = !taken ? nullptr : pairs_apart_ ? pairs_ + index * pair_stride_ : row + pair_at_;
    }
  }

  // Line by line through the rows from front_ to `stop`, the last line by its last byte.
  void prefetch_group(int64_t stop) const {
    for (int64_t l = 0; l < asked_lines_; ++l) {
      const uintptr_t offset = l < lines_ - 1 ? 64 * static_cast<uintptr_t>(l) : last_byte_;
      for (int64_t pos = front_; pos < stop; ++pos) {
        prefetch(reinterpret_cast<uintptr_t>(row_[slot(pos)]) + offset);
      }
    }
    for (int64_t pos = front_; pairs_apart_ && pos < stop; ++pos) {
      prefetch(reinterpret_cast<uintptr_t>(pair_[slot(pos)]));
    }
  }

  const uint8_t* rows_;
  int64_t row_stride_;
  const uint8_t* pairs_ = nullptr;  // scales and biases
  int64_t pair_stride_ = 0, pair_at_;
  uint64_t num_rows_;
  const Bags& bags_;
  int64_t lines_, asked_lines_, more_, group_, front_, end_, next_advance_;
  uintptr_t last_byte_;
  bool even_, pairs_apart_ = false;
  Fault fault_{FaultKind::none, 0, 0};
  alignas(64) const uint8_t* row_[capacity];
  // The scale and bias of a quantized row; the last byte of any other row.
  alignas(64) const uint8_t* pair_[capacity];
};

// Returns the factor for the stored elements of the row at `pos`; adds the row's weighted scale and bias to
// `sum`.
template <ElementType T>
inline float row_factor(const Lookahead& ahead, const Bags& b, int64_t pos, simd::ScaleBias& sum) {
  const bool weighted = b.weights != nullptr;
  const float w = weighted ? static_cast<float>(element(b.weights, b.weights_type, pos)) : 1.0f;
  if constexpr (is_quantized(T)) {
    simd::ScaleBias pair = simd::load_scale_bias(ahead.scale_bias(pos));
    if (weighted) pair.multiply(w);
    sum.add(pair);
    return pair.scale();
  }
  return w;
}

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
