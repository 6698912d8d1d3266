// Packing of pruned layers for the CPU kernels, of checked operands; nothing of torch.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernel.h"

namespace rk {

// What stands at the start of a packed layer. Its parts follow, each at a multiple of 64 bytes, in the order
// of SparseParts.
struct SparseHeader {
  int32_t magic, version, few, n, k, group;
  ElementType type;
  Scheme scheme;
  Epilogue epilogue;
  RowScale input;
  int32_t has_scales;
  int64_t entries;  // few: steps
  int32_t items, bands;
};
static_assert(sizeof(SparseHeader) == 64);
constexpr int32_t sparse_magic = 0x504b4352, sparse_version = 1;

struct SparseParts {
  int64_t padded_n, cells, chunks, slabs, blocks;
  int64_t scales, bias, sums, order, steps, lane_counts, slab_starts, band_groups, streams, items, cell,
      value, end;

  explicit SparseParts(const SparseHeader& h) {
    const auto blocks_of = [](int64_t x, int64_t of) { return (x + of - 1) / of; };
    const bool exact = h.type == ElementType::i8x4;
    slabs = blocks_of(h.n, slab_rows);
    padded_n = slabs * slab_rows;
    cells = exact ? blocks_of(h.k, 4) : h.k;
    chunks = blocks_of(cells, chunk_cells);
    blocks = blocks_of(cells, block_cells);
    int64_t at = sizeof(SparseHeader);
    const auto part = [&](int64_t bytes) {
      const int64_t from = at;
      at = blocks_of(at + bytes, 64) * 64;
      return from;
    };
    scales = part(h.has_scales ? 4 * padded_n : 0);
    bias = part(4 * padded_n);
    sums = part(exact ? 4 * padded_n : 0);
    order = part(h.few ? 4 * slabs * chunks : 0);
    steps = part(h.few ? slabs * chunks : 0);
    lane_counts = part(h.few ? slabs * chunks * slab_rows : 0);
    slab_starts = part(h.few ? 8 * (slabs + 1) : 0);
    band_groups = part(h.few ? 0 : 8 * (h.bands + 1));
    streams = part(h.few ? 0 : static_cast<int64_t>(sizeof(SparseStream)) * h.bands * blocks);
    items = part(h.few ? 0 : static_cast<int64_t>(sizeof(SparseItem)) * h.items);
    const int64_t lanes = h.few ? slab_rows / h.group : 1, weights = h.few ? slab_rows : h.group;
    // The kernels load four cells and four weights at a time.
    cell = part(h.entries * lanes + 16);
    value = part(h.entries * weights * cell_bytes(h.type) + 16);
    end = at;
  }
};

inline SparseLayer sparse_layer_at(const uint8_t* data, const SparseHeader& h) {
  const SparseParts at(h);
  SparseLayer layer{};
  layer.n = h.n, layer.k = h.k, layer.cells = at.cells, layer.group = h.group;
  layer.type = h.type, layer.scheme = h.scheme, layer.epilogue = h.epilogue, layer.input = h.input;
  layer.scales = h.has_scales ? reinterpret_cast<const float*>(data + at.scales) : nullptr;
  layer.bias = reinterpret_cast<const float*>(data + at.bias);
  layer.sums = reinterpret_cast<const int32_t*>(data + at.sums);
  layer.cell = data + at.cell;
  layer.value = data + at.value;
  layer.slabs = at.slabs, layer.chunks = at.chunks;
  layer.order = reinterpret_cast<const int32_t*>(data + at.order);
  layer.steps = data + at.steps;
  layer.lane_counts = data + at.lane_counts;
  layer.slab_starts = reinterpret_cast<const int64_t*>(data + at.slab_starts);
  layer.bands = h.bands, layer.blocks = at.blocks;
  layer.band_groups = reinterpret_cast<const int64_t*>(data + at.band_groups);
  layer.streams = reinterpret_cast<const SparseStream*>(data + at.streams);
  layer.items = reinterpret_cast<const SparseItem*>(data + at.items);
  layer.entries = h.entries, layer.item_count = h.items;
  return layer;
}

// The kept weights as blocks of `rows` x `columns`, in the order of their rows. Blocks may reach past n and
// k.
struct SparseWeights {
  int64_t n, k, rows, columns;
  const int32_t* crow;
  const int32_t* col;
  const void* values;
  ElementType type;  // f32, f16, bf16 or i8
};

// Lists the same entries by groups of 1 or 4 rows that share their cells: one word for each row of the group,
// with the bits of its weight.
class SparseEntries {
 public:
  SparseEntries(const SparseWeights& w, bool exact) : group(w.rows % 4 == 0 ? 4 : 1), exact_(exact) {
    const int64_t groups = (w.n + group - 1) / group;
    const int64_t weights = w.crow[(w.n + w.rows - 1) / w.rows] * w.rows * w.columns;
    starts.resize(static_cast<size_t>(groups) + 1);
    cells.resize(static_cast<size_t>(weights / group));
    words.resize(static_cast<size_t>(weights));
    if (cell_bytes(w.type) == 4) add<uint32_t>(w);
    if (cell_bytes(w.type) == 2) add<uint16_t>(w);
    if (cell_bytes(w.type) == 1) add<uint8_t>(w);
  }

  int64_t groups() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t count() const { return starts.back(); }

  int64_t group;
  std::vector<int64_t> starts;  // of a group's cells
  std::vector<uint32_t> cells;
  std::vector<uint32_t> words;  // [cells][group]

 private:
  template <typename Bits>
  void add(const SparseWeights& w) {
    if (group == 1) exact_ ? add<Bits, 1, true>(w) : add<Bits, 1, false>(w);
    if (group == 4) exact_ ? add<Bits, 4, true>(w) : add<Bits, 4, false>(w);
  }

  template <typename Bits, int G, bool exact>
  void add(const SparseWeights& w) {
    const Bits* values = static_cast<const Bits*>(w.values);
    const int64_t columns = w.columns, rows = w.rows, k = w.k;
    uint32_t* const to_cells = cells.data();
    uint32_t* const to_words = words.data();
    int64_t end = 0;
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t block_row = g * G / rows, row = g * G % rows, first = end;
      for (int64_t b = w.crow[block_row], last = w.crow[block_row + 1]; b < last; ++b) {
        const Bits* of_block = values + (b * rows + row) * columns;
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t column = w.col[b] * columns + j;
          if (column >= k) break;
          const uint32_t cell = static_cast<uint32_t>(exact ? column / 4 : column);
          if (!exact || end == first || to_cells[end - 1] != cell) {
            to_cells[end] = cell;
            for (int r = 0; r < G; ++r) to_words[end * G + r] = 0;
            ++end;
          }
          const int shift = exact ? 8 * static_cast<int>(column % 4) : 0;
          for (int r = 0; r < G; ++r)
            to_words[(end - 1) * G + r] |= static_cast<uint32_t>(of_block[r * columns + j]) << shift;
        }
      }
      starts[g + 1] = end;
    }
  }

  bool exact_;
};

// Stores cells and weights where the kernels read them: `place` gives the entry of every cell of a group.
template <typename Word, int G, typename Place>
void store_entries(const SparseEntries& e, uint32_t cells_mask, uint8_t* cell, uint8_t* value,
                   const Place& place) {
  Word* values = reinterpret_cast<Word*>(value);
  const uint32_t* cells = e.cells.data();
  const uint32_t* words = e.words.data();
  for (int64_t g = 0; g < e.groups(); ++g) {
    for (int64_t i = e.starts[g], end = e.starts[g + 1]; i < end; ++i) {
      const int64_t to = place(g, cells[i]);
      cell[to] = static_cast<uint8_t>(cells[i] & cells_mask);
      for (int r = 0; r < G; ++r) values[to * G + r] = static_cast<Word>(words[i * G + r]);
    }
  }
}

template <typename Word, typename Place>
void store_entries(const SparseEntries& e, uint32_t cells_mask, uint8_t* cell, uint8_t* value,
                   const Place& place) {
  if (e.group == 1) store_entries<Word, 1>(e, cells_mask, cell, value, place);
  if (e.group == 4) store_entries<Word, 4>(e, cells_mask, cell, value, place);
}

template <typename Place>
void store_entries(const SparseEntries& e, ElementType type, uint32_t cells_mask, uint8_t* cell,
                   uint8_t* value, const Place& place) {
  if (cell_bytes(type) == 4) store_entries<uint32_t>(e, cells_mask, cell, value, place);
  if (cell_bytes(type) == 2) store_entries<uint16_t>(e, cells_mask, cell, value, place);
  if (cell_bytes(type) == 1) store_entries<uint8_t>(e, cells_mask, cell, value, place);
}

// ---- for few rows of activations ----

class FewPacker {
 public:
  FewPacker(const SparseEntries& e, SparseHeader& header) : e_(e), header_(header) {
    const SparseParts at(header);
    counts_.assign(static_cast<size_t>(at.slabs * at.chunks * slab_rows), 0);
    for (int64_t g = 0; g < e.groups(); ++g) {
      for (int64_t i = e.starts[g]; i < e.starts[g + 1]; ++i) {
        for (int64_t r = 0; r < e.group; ++r) {
          const int64_t row = g * e.group + r;
          ++counts_[part(row, e.cells[i], at.chunks) * slab_rows + row % slab_rows];
        }
      }
    }
    steps_.resize(static_cast<size_t>(at.slabs * at.chunks));
    header.entries = 0;
    for (size_t p = 0; p < steps_.size(); ++p) {
      steps_[p] = *std::max_element(counts_.begin() + p * slab_rows, counts_.begin() + (p + 1) * slab_rows);
      header.entries += steps_[p];
    }
  }

  void write(uint8_t* out) const {
    const SparseParts at(header_);
    int32_t* order = reinterpret_cast<int32_t*>(out + at.order);
    int64_t* slab_starts = reinterpret_cast<int64_t*>(out + at.slab_starts);
    std::vector<int64_t> starts(steps_.size());
    int64_t start = 0;
    for (int64_t slab = 0; slab < at.slabs; ++slab, order += at.chunks) {
      const int64_t first = slab * at.chunks;
      // Loops of equal length one after the other: their ends are foreseen.
      std::iota(order, order + at.chunks, 0);
      std::stable_sort(order, order + at.chunks,
                       [&](int32_t x, int32_t y) { return steps_[first + x] > steps_[first + y]; });
      slab_starts[slab] = start;
      for (int64_t c = 0; c < at.chunks; ++c) {
        const int64_t from = first + order[c];
        out[at.steps + first + c] = steps_[from];
        std::copy_n(counts_.begin() + from * slab_rows, slab_rows,
                    out + at.lane_counts + (first + c) * slab_rows);
        starts[from] = start;
        start += steps_[from];
      }
    }
    slab_starts[at.slabs] = start;
    write_entries(out, starts);
  }

 private:
  static int64_t part(int64_t row, int64_t cell, int64_t chunks) {
    return row / slab_rows * chunks + cell / chunk_cells;
  }

  void write_entries(uint8_t* out, const std::vector<int64_t>& starts) const {
    const SparseParts at(header_);
    int64_t group = -1, chunk = -1, step = 0;
    const int64_t chunks = at.chunks, rows = e_.group;
    store_entries(e_, header_.type, chunk_cells - 1, out + at.cell, out + at.value,
                  [&](int64_t g, uint32_t cell) {
                    const int64_t now = cell / chunk_cells, row = g * rows;
                    step = g == group && now == chunk ? step + 1 : 0;
                    group = g, chunk = now;
                    // Lanes of a step are rows, or groups of rows.
                    return ((starts[part(row, cell, chunks)] + step) * slab_rows + row % slab_rows) / rows;
                  });
  }

  const SparseEntries& e_;
  const SparseHeader& header_;
  std::vector<uint8_t> counts_;  // [slabs][chunks][slab_rows]
  std::vector<uint8_t> steps_;   // [slabs][chunks]
};

// ---- for many ----

class ManyPacker {
 public:
  ManyPacker(const SparseEntries& e, SparseHeader& header) : e_(e), header_(header) {
    blocks_ = SparseParts(header).blocks;
    counts_.assign(static_cast<size_t>(e.groups() * blocks_), 0);
    for (int64_t g = 0; g < e.groups(); ++g) {
      for (int64_t i = e.starts[g]; i < e.starts[g + 1]; ++i)
        ++counts_[g * blocks_ + e.cells[i] / block_cells];
    }
    // Bands hold about as many entries each, so that threads can share them, and no more rows than stay in
    // L2.
    const int64_t most_groups = 512 / e.group, bands = (e.groups() + most_groups - 1) / most_groups;
    const int64_t share = e.count() / bands + 1;
    band_groups_.push_back(0);
    for (int64_t g = 1; g < e.groups(); ++g) {
      const int64_t first = band_groups_.back(), step = slab_rows / e.group;
      // A band has whole slabs, because kernels read scales and biases in vectors.
      const bool full = e.starts[g] - e.starts[first] >= share || g - first >= most_groups;
      if (full && g % step == 0) band_groups_.push_back(g);
    }
    band_groups_.push_back(e.groups());
    header.bands = static_cast<int32_t>(band_groups_.size() - 1);
    header.entries = e.count();
    header.items = 0;
    for (int64_t g = 0; g < e.groups(); ++g) {
      for (int64_t b = 0; b < blocks_; ++b) header.items += is_item(g, b);
    }
  }

  void write(uint8_t* out) const {
    const SparseParts at(header_);
    std::copy(band_groups_.begin(), band_groups_.end(), reinterpret_cast<int64_t*>(out + at.band_groups));
    SparseStream* streams = reinterpret_cast<SparseStream*>(out + at.streams);
    SparseItem* items = reinterpret_cast<SparseItem*>(out + at.items);
    std::vector<int64_t> entry_at(static_cast<size_t>(e_.groups() * blocks_));
    std::vector<int64_t> order;
    int64_t item = 0, entry = 0;
    for (int64_t band = 0; band < header_.bands; ++band) {
      for (int64_t b = 0; b < blocks_; ++b) {
        order.clear();
        for (int64_t g = band_groups_[band]; g < band_groups_[band + 1]; ++g) {
          if (is_item(g, b)) order.push_back(g);
        }
        // Loops of equal length one after the other: their ends are foreseen.
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t x, int64_t y) { return count(x, b) > count(y, b); });
        *streams++ = {item, static_cast<int64_t>(order.size()), entry};
        for (const int64_t g : order) {
          items[item++] = {static_cast<int32_t>(g - band_groups_[band]), static_cast<int32_t>(count(g, b))};
          entry_at[g * blocks_ + b] = entry;
          entry += count(g, b);
        }
      }
    }
    const int64_t blocks = blocks_;
    int64_t* const next = entry_at.data();
    store_entries(e_, header_.type, block_cells - 1, out + at.cell, out + at.value,
                  [=](int64_t g, uint32_t cell) { return next[g * blocks + cell / block_cells]++; });
  }

 private:
  int64_t count(int64_t g, int64_t b) const { return counts_[g * blocks_ + b]; }
  // The first block begins the sums of every row.
  bool is_item(int64_t g, int64_t b) const { return b == 0 || count(g, b) > 0; }

  const SparseEntries& e_;
  const SparseHeader& header_;
  int64_t blocks_;
  std::vector<int32_t> counts_;  // [groups][blocks]
  std::vector<int64_t> band_groups_;
};

}  // namespace rk
