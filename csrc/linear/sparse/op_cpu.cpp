// Checks, threads and registration of the sparse linear operators for CPU tensors. The schemas are in
// recsys_kernels/ops/linear/sparse.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>

#include "core/pages.h"
#include "core/scratch.h"
#include "operands.h"
#include "pack.h"
#include "structure.h"

namespace {

using rk::check;
using rk::ElementType;
using rk::Epilogue;
using rk::float_type;
using rk::Matrix;
using rk::RowScale;
using rk::ScalarType;
using rk::Scheme;
using rk::SparseHeader;
using rk::SparseLayer;
using rk::SparseLinearKernels;
using rk::SparseScratch;
using rk::Structure;
using rk::Tensor;

const SparseLinearKernels& kernels() { return rk::Kernels<SparseLinearKernels>::current(); }

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- operands ----

Tensor contiguous_cpu(const Tensor& t, const char* name) {
  rk::check_cpu(t, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

std::vector<float> floats_of(const Tensor& t, const char* name, int64_t count) {
  const Tensor given = contiguous_cpu(t, name);
  rk::check_dim(given, 1, name);
  check(given.size(0) == count, name, " must have ", count, " values, but has ", given.size(0));
  std::vector<float> out(static_cast<size_t>(count));
  const Matrix all{given.data_ptr(), count, float_type(given.scalar_type(), name)};
  kernels().to_floats(all, count, out.data());
  return out;
}

// The canonical operands of a layer, checked.
class Operands {
 public:
  template <typename O>
  explicit Operands(const O& o) : Operands(rk::SparseArguments(o), o.crow_indices, o.col_indices) {}

  Operands(const rk::SparseArguments& layer, const Tensor& crow, const Tensor& col)
      : layer_(layer),
        values_(contiguous_cpu(layer.values, "values")),
        structure_(crow, col, layer.n, layer.k, layer.block_rows(), layer.block_columns()),
        group_(layer.group) {
    layer.check_count(structure_.blocks());
    header_.magic = rk::sparse_magic;
    header_.version = rk::sparse_version;
    header_.n = static_cast<int32_t>(layer.n);
    header_.k = static_cast<int32_t>(layer.k);
    header_.epilogue = layer.epilogue;
    header_.scheme = layer.scheme;
    header_.type = layer.quantizes() ? ElementType::i8x4 : layer.type;
    if (layer.scales.has_value()) {
      const float* data = static_cast<const float*>(layer.scales->data_ptr());
      scales_.assign(data, data + layer.scales->numel());
      header_.has_scales = group_ == 0;
      // One sum of integers would not do: they are multiplied as the floats that they stand for.
      if (group_ > 0) header_.type = ElementType::f32;
    }
    if (layer.bias.has_value()) bias_ = floats_of(*layer.bias, "bias", layer.n);
    header_.input = {1.0f, 0};
    if (layer.qparams.has_value()) {
      const float* pair = static_cast<const float*>(layer.qparams->data_ptr());
      header_.input = rk::checked_input(pair[0], pair[1]);
    }
  }

  int64_t n() const { return header_.n; }
  int64_t k() const { return header_.k; }

  // Below AVX-512 activations would have to be gathered, which takes longer than a panel of which little is
  // used; and where nearly nothing is kept, slabs would be mostly counts of no entries.
  bool has_slabs() const {
    const int64_t parts =
        (n() + rk::slab_rows - 1) / rk::slab_rows * ((k() + rk::chunk_cells - 1) / rk::chunk_cells);
    return parts <= values_.numel() && (structure_.rows % 4 == 0 || rk::isa() >= rk::Isa::avx512);
  }

  Tensor pack(bool few) {
    header_.few = few;
    const std::vector<float> floats = group_ > 0 ? scaled_values() : std::vector<float>();
    const rk::SparseWeights weights{structure_.n,
                                    structure_.k,
                                    structure_.rows,
                                    structure_.columns,
                                    structure_.crow.data(),
                                    structure_.col.data(),
                                    group_ > 0 ? floats.data() : values_.data_ptr(),
                                    group_ > 0 ? ElementType::f32 : layer_.type};
    const rk::SparseEntries entries(weights, header_.type == ElementType::i8x4);
    header_.group = static_cast<int32_t>(entries.group);
    return few ? written(rk::FewPacker(entries, header_), entries)
               : written(rk::ManyPacker(entries, header_), entries);
  }

 private:
  // The values times the scales of their groups of columns.
  std::vector<float> scaled_values() const {
    const Structure& s = structure_;
    const int8_t* values = static_cast<const int8_t*>(values_.data_ptr());
    std::vector<float> out(static_cast<size_t>(values_.numel()));
    const int64_t groups = (s.k + group_ - 1) / group_;
    float* to = out.data();
    for (int64_t row = 0; row + 1 < static_cast<int64_t>(s.crow.size()); ++row) {
      for (int64_t b = s.crow[row]; b < s.crow[row + 1]; ++b) {
        for (int64_t r = 0; r < s.rows; ++r) {
          // Elements past the end are no weights.
          const float* scales = scales_.data() + std::min(s.n - 1, row * s.rows + r) * groups;
          for (int64_t c = 0, column = s.col[b] * s.columns; c < s.columns; ++c, ++column)
            *to++ = static_cast<float>(*values++) * scales[std::min(s.k - 1, column) / group_];
        }
      }
    }
    return out;
  }

  template <typename Packer>
  Tensor written(const Packer& packer, const rk::SparseEntries& entries) const {
    const rk::SparseParts at(header_);
    const Tensor out = rk::empty_tensor({at.end}, ScalarType::Byte);
    uint8_t* data = static_cast<uint8_t*>(out.data_ptr());
    rk::advise_huge_pages(data, at.end);
    std::memset(data, 0, static_cast<size_t>(at.end));
    std::memcpy(data, &header_, sizeof header_);
    if (header_.has_scales)
      std::copy(scales_.begin(), scales_.end(), reinterpret_cast<float*>(data + at.scales));
    std::copy(bias_.begin(), bias_.end(), reinterpret_cast<float*>(data + at.bias));
    if (header_.type == ElementType::i8x4) {
      int32_t* sums = reinterpret_cast<int32_t*>(data + at.sums);
      const int64_t group = entries.group;
      for (int64_t g = 0; g < entries.groups(); ++g) {
        for (int64_t i = entries.starts[g] * group; i < entries.starts[g + 1] * group; ++i) {
          for (int shift = 0; shift < 32; shift += 8)
            sums[g * group + i % group] += static_cast<int8_t>(entries.words[i] >> shift & 255);
        }
      }
    }
    packer.write(data);
    return out;
  }

  rk::SparseArguments layer_;
  Tensor values_;
  Structure structure_;
  SparseHeader header_{};
  int64_t group_;  // of columns that share a scale; 0: each row has one
  std::vector<float> scales_, bias_;
};

// ---- running ----

// The smallest piece of work worth a second thread, in multiplications: about 10 us.
constexpr int64_t min_work = 1 << 19;

int64_t pieces_of(int64_t work, int64_t most) {
  if (work < 2 * min_work) return 1;
  return std::max<int64_t>(
      1, std::min({static_cast<int64_t>(torch::stable::get_num_threads()), work / min_work, most}));
}

template <typename F>
void in_pieces(int64_t pieces, const F& piece) {
  if (pieces <= 1) return piece(0);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) piece(p);
  });
}

SparseScratch scratch_for(const SparseLayer& layer, int64_t columns, int64_t y_rows) {
  const int64_t x = 4 * columns * (round_up(layer.cells, rk::block_cells) + rk::block_cells);
  const int64_t y = round_up(4 * columns * y_rows, 64), floats = round_up(4 * 16 * layer.k, 64);
  const int64_t bytes = round_up(4 * columns * layer.cells, 64);
  const int64_t scales = columns * static_cast<int64_t>(sizeof(RowScale));
  char* p = rk::ThreadMemory::get(x + y + floats + bytes + scales);
  SparseScratch scratch{};
  scratch.x = reinterpret_cast<int32_t*>(p);
  scratch.y = reinterpret_cast<int32_t*>(p + x);
  scratch.floats = reinterpret_cast<float*>(p + x + y);
  scratch.bytes = reinterpret_cast<uint8_t*>(p + x + y + floats);
  scratch.scales = reinterpret_cast<RowScale*>(p + x + y + floats + bytes);
  return scratch;
}

Matrix rows_from(const Matrix& m, int64_t row) {
  const int64_t size = m.type == ElementType::f32 ? 4 : 2;
  return {static_cast<uint8_t*>(m.data) + row * m.stride * size, m.stride, m.type};
}

[[noreturn]] void raise_damaged() {
  rk::raise<std::runtime_error>("packed is damaged: what it says of where its weights are does not fit them");
}

void run_few(const SparseLayer& layer, const Matrix& in, const Matrix& out, int64_t m) {
  const int64_t* starts = layer.slab_starts;
  const int64_t steps = starts[layer.slabs];
  const int64_t pieces = pieces_of(steps * rk::slab_rows * m, layer.slabs);
  const auto bound = [&](int64_t p) {
    return p == pieces ? layer.slabs
                       : std::lower_bound(starts, starts + layer.slabs, steps * p / pieces) - starts;
  };
  std::atomic<bool> damaged{false};
  in_pieces(pieces, [&](int64_t p) {
    if (!kernels().intact(layer, true, bound(p), bound(p + 1))) {
      damaged = true;
      return;
    }
    const SparseScratch scratch = scratch_for(layer, rk::few_rows, 0);
    for (int64_t row = 0; row < m; row += rk::few_rows) {
      kernels().few(layer, rows_from(in, row), rows_from(out, row), std::min(rk::few_rows, m - row), bound(p),
                    bound(p + 1), scratch);
    }
  });
  if (damaged) raise_damaged();
}

struct Panel {
  int64_t row, rows, columns;
};

// Panels of 32 columns, of 64 where four rows share what is loaded and there are enough for all threads
// (those that share one fill it each); for what is left the narrowest that hold it.
std::vector<Panel> panels_of(const SparseLayer& layer, int64_t m, int64_t threads) {
  std::vector<Panel> panels;
  const bool wide = layer.group == 4 && m > rk::most_panel_columns * (threads - 1);
  const int64_t most = wide ? rk::most_panel_columns : 32;
  for (int64_t row = 0; row < m;) {
    int64_t columns = most;
    while (columns > 16 && m - row <= columns / 2) columns /= 2;
    panels.push_back({row, std::min(columns, m - row), columns});
    row += columns;
  }
  return panels;
}

void run_many(const SparseLayer& layer, const Matrix& in, const Matrix& out, int64_t m) {
  // The cost of all bands before each band.
  std::vector<int64_t> costs{0};
  int64_t y_rows = 0;
  for (int64_t b = 0; b < layer.bands; ++b) {
    const int64_t rows = (layer.band_groups[b + 1] - layer.band_groups[b]) * layer.group;
    const int64_t next =
        b + 1 < layer.bands ? layer.streams[(b + 1) * layer.blocks].first_entry : layer.entries;
    costs.push_back(costs.back() + (next - layer.streams[b * layer.blocks].first_entry) * layer.group +
                    8 * rows);
    y_rows = std::max(y_rows, round_up(rows, rk::slab_rows));
  }
  const int64_t work = costs.back() * m;
  const std::vector<Panel> panels = panels_of(layer, m, pieces_of(work, INT64_MAX));
  const int64_t all = static_cast<int64_t>(panels.size()) * layer.bands;
  const int64_t total = costs.back() * static_cast<int64_t>(panels.size());
  const int64_t pieces = pieces_of(work, all);
  const auto bound = [&](int64_t p) -> int64_t {
    if (p == pieces) return all;
    const int64_t cost = total / pieces * p, panel = cost / costs.back(), part = cost % costs.back();
    int64_t band = std::lower_bound(costs.begin(), costs.end(), part) - costs.begin();
    // The nearest bound, not the next: two bands of nearly the same cost are one for each of two threads.
    if (band > 0 && part - costs[band - 1] < costs[band] - part) --band;
    return panel * layer.bands + band;
  };
  std::atomic<bool> damaged{false};
  in_pieces(pieces, [&](int64_t p) {
    const SparseScratch scratch = scratch_for(layer, panels[0].columns, y_rows);
    int64_t checked = layer.bands;  // bands [checked, bands) have been checked
    for (int64_t at = bound(p), end = bound(p + 1); at < end;) {
      const Panel& panel = panels[at / layer.bands];
      const int64_t first = at % layer.bands, last = std::min(layer.bands, first + end - at);
      if (!kernels().intact(layer, false, first, std::min(last, checked))) {
        damaged = true;
        return;
      }
      checked = std::min(checked, first);
      kernels().many(layer, in, out, panel.row, panel.rows, panel.columns, first, last, scratch);
      at += last - first;
    }
  });
  if (damaged) raise_damaged();
}

// Whether a header is that of a layer of `bytes` bytes. Each number is bounded before it is multiplied, so
// that no product overflows.
bool fits(const SparseHeader& h, int64_t bytes) {
  const auto is_one_of = [](auto x, auto... values) { return ((x == values) || ...); };
  if (h.magic != rk::sparse_magic || h.version != rk::sparse_version) return false;
  if (h.n < 1 || h.n > bytes / 4 || h.k < 1 || h.k > INT32_MAX - 64) return false;
  if (!is_one_of(h.few, 0, 1) || !is_one_of(h.group, 1, 4)) return false;
  if (h.entries < 0 || h.entries > bytes || h.items < 0 || h.items > bytes) return false;
  if (h.bands < (h.few ? 0 : 1) || h.bands > h.n) return false;
  if (static_cast<int32_t>(h.epilogue) < 0 || h.epilogue > Epilogue::silu) return false;
  const bool exact = h.type == ElementType::i8x4;
  if (h.has_scales != (exact || h.type == ElementType::i8)) return false;
  if (exact && h.k > 65536) return false;
  if (h.type == ElementType::f32 || exact) {
    if (!is_one_of(h.scheme, Scheme::dynamic, Scheme::fixed, Scheme::weight_only)) return false;
    if (exact && h.scheme == Scheme::weight_only) return false;
  } else {
    if (!is_one_of(h.type, ElementType::f16, ElementType::bf16, ElementType::i8)) return false;
    if (h.scheme != Scheme::weight_only) return false;
  }
  if (!(std::isfinite(h.input.scale) && h.input.scale >= 0x1p-100f)) return false;
  if (h.input.zero_point < 0 || h.input.zero_point > 255) return false;
  return rk::SparseParts(h).end == bytes;
}

// Whether the starts of slabs or bands rise from zero to the end. The division of the work among threads
// reads them.
bool places_fit(const SparseLayer& layer, const SparseHeader& h) {
  if (h.few) {
    const int64_t* starts = layer.slab_starts;
    bool rising = starts[0] == 0 && starts[layer.slabs] == h.entries;
    for (int64_t s = 0; s < layer.slabs; ++s) rising &= starts[s] <= starts[s + 1];
    return rising;
  }
  const int64_t* groups = layer.band_groups;
  const int64_t step = rk::slab_rows / layer.group;
  if (groups[0] != 0 || groups[layer.bands] != (layer.n + layer.group - 1) / layer.group) return false;
  int64_t entry = 0;
  for (int64_t b = 0; b < layer.bands; ++b) {
    if (groups[b] >= groups[b + 1] || groups[b] % step != 0) return false;
    const int64_t next = layer.streams[b * layer.blocks].first_entry;
    if (next < entry || next > layer.entries) return false;
    entry = next;
  }
  return layer.streams[0].first_item == 0 && layer.streams[0].first_entry == 0;
}

// The header of a packed layer, checked.
SparseHeader header_of(const Tensor& packed, const char* name) {
  rk::check_cpu(packed, name);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() &&
            reinterpret_cast<uintptr_t>(packed.data_ptr()) % 8 == 0,
        name, " must be a contiguous, aligned uint8 vector");
  SparseHeader h;
  check(packed.numel() >= static_cast<int64_t>(sizeof h), name, " holds no layer");
  std::memcpy(&h, packed.data_ptr(), sizeof h);
  check(fits(h, packed.numel()), name, " holds no layer of this version");
  return h;
}

Tensor run(const Tensor& packed, const Matrix& in, int64_t m, const std::vector<int64_t>& sizes,
           ScalarType dtype) {
  const uint8_t* data = static_cast<const uint8_t*>(packed.data_ptr());
  SparseHeader h;
  std::memcpy(&h, data, sizeof h);
  const SparseLayer layer = rk::sparse_layer_at(data, h);
  if (!places_fit(layer, h)) raise_damaged();
  Tensor out = rk::empty_tensor(sizes, dtype);
  const Matrix to{out.data_ptr(), h.n, float_type(dtype, "dtype")};
  if (m > 0) h.few ? run_few(layer, in, to, m) : run_many(layer, in, to, m);
  return out;
}

Tensor sparse_packed(const rk::SparsePacked& o) {
  const SparseHeader h = header_of(o.packed, "packed");
  const Tensor input = rk::with_contiguous_rows(o.input, "input");
  check(input.size(1) == h.k, "input must have ", h.k, " columns, but has ", input.size(1));
  check(o.out_features == h.n, "the layer has ", h.n, " outputs, not ", o.out_features);
  const int64_t m = input.size(0);
  const Matrix in{input.data_ptr(), m > 1 ? input.stride(0) : h.k, float_type(input.scalar_type(), "input")};
  return run(o.packed, in, m, {m, o.out_features}, o.dtype);
}

// `places` is a pack that holds, in the place of each weight, the number of its value, from 1 on.
Tensor sparse_repack(const rk::SparseRepack& o) {
  const Tensor& places = o.places;
  const SparseHeader h = header_of(places, "places");
  check(h.type == ElementType::f32, "places must be packed from float32 values");
  const Tensor values = contiguous_cpu(o.values, "values");
  check(values.scalar_type() == ScalarType::Float, "values must be float32, but is ",
        rk::type_name(values.scalar_type()));
  const rk::SparseParts at(h);
  const Tensor out = rk::empty_tensor({at.end}, ScalarType::Byte);
  const uint8_t* from = static_cast<const uint8_t*>(places.data_ptr());
  uint8_t* data = static_cast<uint8_t*>(out.data_ptr());
  rk::advise_huge_pages(data, at.end);
  std::memcpy(data, from, static_cast<size_t>(at.value));
  float* to_bias = reinterpret_cast<float*>(data + at.bias);
  std::fill(to_bias, to_bias + at.padded_n, 0.0f);
  if (o.bias.has_value()) {
    const std::vector<float> floats = floats_of(*o.bias, "bias", h.n);
    std::copy(floats.begin(), floats.end(), to_bias);
  }
  const int64_t count = values.numel(), slots = (at.end - at.value) / 4;
  const int32_t* numbers = reinterpret_cast<const int32_t*>(from + at.value);
  const float* value = static_cast<const float*>(values.data_ptr());
  float* to = reinterpret_cast<float*>(data + at.value);
  for (int64_t i = 0; i < slots; ++i) {
    const uint32_t number = static_cast<uint32_t>(numbers[i]);
    check(number <= count, "places name value ", number, ", but there are ", count);
    to[i] = number == 0 ? 0.0f : value[number - 1];
  }
  return out;
}

Tensor sparse_pack(const rk::SparsePack& o) {
  check(o.kind == 0 || o.kind == 1, "kind must be 0 (few rows of input) or 1 (many), but is ", o.kind);
  return Operands(o).pack(o.kind == 0);
}

Tensor sparse_linear(const rk::SparseLinear& o) {
  Operands operands(o);
  rk::check_cpu(o.input, "input");
  const int64_t k = operands.k();
  const std::vector<int64_t> sizes = rk::output_shape(o.input, operands.n(), k);
  const Tensor input = rk::contiguous_of(o.input);
  const int64_t m = input.numel() / k;
  const Matrix in{input.data_ptr(), k, float_type(input.scalar_type(), "input")};
  return run(operands.pack(m <= rk::most_few_rows && operands.has_slabs()), in, m, sizes, o.dtype);
}

// ---- the gradient of kept weights ----

Tensor sparse_weight_gradient(const rk::SparseWeightGradient& o) {
  const Tensor grad = rk::with_contiguous_rows(o.grad_output, "grad_output");
  const Tensor input = rk::with_contiguous_rows(o.input, "input");
  const int64_t m = input.size(0), n = grad.size(1), k = input.size(1);
  check(grad.size(0) == m, "grad_output must have as many rows as input, ", m, ", but has ", grad.size(0));
  const Structure s(o.crow_indices, o.col_indices, n, k, o.block_rows, o.block_columns);
  const Matrix g_rows{grad.data_ptr(), m > 1 ? grad.stride(0) : n,
                      float_type(grad.scalar_type(), "grad_output")};
  const Matrix x_rows{input.data_ptr(), m > 1 ? input.stride(0) : k,
                      float_type(input.scalar_type(), "input")};
  const ElementType type = float_type(o.dtype, "dtype");
  std::vector<int64_t> sizes{s.blocks()};
  if (o.block_rows == 0) sizes = {n, (k + 3) / 4 * 2};
  if (o.block_rows > 0 && (o.block_rows > 1 || o.block_columns > 1)) sizes = {s.blocks(), s.rows, s.columns};
  const int64_t values = s.blocks() * s.rows * s.columns, rows = static_cast<int64_t>(s.crow.size()) - 1;
  Tensor out = rk::empty_tensor(sizes, o.dtype);
  const bool direct = type == ElementType::f32;
  std::vector<float> sums(direct ? 0 : static_cast<size_t>(values), 0.0f);
  float* to = direct ? static_cast<float*>(out.data_ptr()) : sums.data();
  if (direct) std::fill(to, to + values, 0.0f);
  const rk::SparseStructure structure{n, k, s.rows, s.columns, s.crow.data(), s.col.data()};
  const int64_t pieces = pieces_of(values * m, rows);
  const auto bound = [&](int64_t p) {
    const int64_t least = s.blocks() * p / pieces;
    return p == pieces ? rows : std::lower_bound(s.crow.begin(), s.crow.end() - 1, least) - s.crow.begin();
  };
  constexpr int64_t columns = rk::most_panel_columns;
  in_pieces(pieces, [&](int64_t p) {
    const int64_t first = bound(p), last = bound(p + 1), own = (last - first) * s.rows;
    if (own <= 0) return;
    const int64_t x = columns * round_up(k, 16), g = columns * round_up(own, 16);
    const int64_t floats = 16 * std::max(k, own);
    float* memory = reinterpret_cast<float*>(rk::ThreadMemory::get(4 * (x + g + floats + last - first)));
    const rk::SparseGradientScratch scratch{memory, memory + x, memory + x + g,
                                            reinterpret_cast<int32_t*>(memory + x + g + floats)};
    for (int64_t row = 0; row < m; row += columns) {
      kernels().gradient(structure, g_rows, x_rows, row, std::min(columns, m - row), first, last, scratch,
                         to);
    }
  });
  if (!direct) kernels().from_floats(to, values, {out.data_ptr(), values, type});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsys_kernels, CPU, m) {
  rk::implement<&sparse_linear>(m);
  rk::implement<&sparse_pack>(m);
  rk::implement<&sparse_packed>(m);
  rk::implement<&sparse_repack>(m);
  rk::implement<&sparse_weight_gradient>(m);
}
