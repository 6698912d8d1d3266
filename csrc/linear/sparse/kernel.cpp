// Compiled once per instruction-set level; everything but the table of functions at the end has internal
// linkage.
#include "kernel.h"

#include "gradient.h"
#include "linear/epilogue.h"
#include "linear/quantize.h"

#define RK_CONCAT2(a, b) a##b
#define RK_CONCAT(a, b) RK_CONCAT2(a, b)

namespace {

using rk::block_cells;
using rk::cell_bytes;
using rk::chunk_cells;
using rk::ElementType;
using rk::slab_rows;
using rk::SparseItem;
using rk::SparseLayer;
using rk::SparseScratch;
using rk::SparseStream;
using simd::tile_columns;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- damaged packs ----

// The chunks exist, and the slabs together have as many steps as lie between the start of the first and the
// end of the last. Kernels go on from one slab to the next and do not read where it starts.
bool slabs_intact(const SparseLayer& layer, int64_t first, int64_t last) {
  constexpr int64_t most_parts = 1 << 16;  // so that sums fit into 32 bits: these loops become vectors
  const uint32_t chunks = static_cast<uint32_t>(layer.chunks);
  int64_t all_steps = 0;
  for (int64_t part = first * layer.chunks, end = last * layer.chunks; part < end; part += most_parts) {
    const int64_t parts = end - part < most_parts ? end - part : most_parts;
    const uint8_t* steps = layer.steps + part;
    const int32_t* order = layer.order + part;
    uint32_t sum = 0, outside = 0;
    for (int64_t p = 0; p < parts; ++p) sum += steps[p];
    for (int64_t p = 0; p < parts; ++p) outside |= static_cast<uint32_t>(order[p]) >= chunks;
    if (outside != 0) return false;
    all_steps += sum;
  }
  return all_steps == layer.slab_starts[last] - layer.slab_starts[first];
}

// The groups exist in their band, and the items of a block have as many entries as lie between its start and
// the start of the next block. Every group has an item in the first block, because that item begins the sums
// of the group.
bool bands_intact(const SparseLayer& layer, int64_t first, int64_t last) {
  for (int64_t band = first; band < last; ++band) {
    const uint32_t groups = static_cast<uint32_t>(layer.band_groups[band + 1] - layer.band_groups[band]);
    for (int64_t block = 0; block < layer.blocks; ++block) {
      const SparseStream& s = layer.streams[band * layer.blocks + block];
      const bool is_last = band + 1 == layer.bands && block + 1 == layer.blocks;
      const int64_t next_item = is_last ? layer.item_count : (&s)[1].first_item;
      const int64_t next_entry = is_last ? layer.entries : (&s)[1].first_entry;
      if (s.first_item < 0 || s.items < 0 || s.items > groups || s.first_item > layer.item_count - s.items ||
          s.first_item + s.items != next_item || s.first_entry < 0 || s.first_entry > layer.entries) {
        return false;
      }
      const SparseItem* items = layer.items + s.first_item;
      uint32_t sum = 0, outside = 0;  // at most 2^31 groups of 2^8 cells
      uint64_t all_groups = 0;
      for (int64_t i = 0; i < s.items; ++i) {
        const uint32_t group = static_cast<uint32_t>(items[i].group),
                       count = static_cast<uint32_t>(items[i].count);
        outside |= (group >= groups) | (count > block_cells);
        sum += count;
        all_groups += group;
      }
      if (outside != 0 || sum != next_entry - s.first_entry) return false;
      if (block == 0 && (s.items != groups || all_groups != uint64_t{groups} * (groups - 1) / 2))
        return false;
    }
  }
  return true;
}

bool intact(const SparseLayer& layer, bool few, int64_t first, int64_t last) {
  return few ? slabs_intact(layer, first, last) : bands_intact(layer, first, last);
}

// ---- results ----

// Floats of the rows [row, row + rows) of the output, from `column` on.
template <int R>
inline void store_rows(const SparseLayer& layer, const vf (&y)[R], const Matrix& out, int64_t row, int rows,
                       int64_t column) {
  const int n = static_cast<int>(layer.n - column < lanes ? layer.n - column : lanes);
  // A copy: the compiler must take what is stored for something that overlaps the arguments.
  const int64_t stride = out.stride, at = row * stride + column;
  if (out.type == ElementType::f32) {
    float* p = static_cast<float*>(out.data) + at;
    if (n == lanes && rows == R) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) simd::store_f32(p + r * stride, y[r]);
      return;
    }
    for (int r = 0; r < rows; ++r) simd::store_f32(p + r * stride, y[r], n);
  } else {
    uint16_t* p = static_cast<uint16_t*>(out.data) + at;
    for (int r = 0; r < rows; ++r) {
      out.type == ElementType::f16 ? simd::store_f16(p + r * stride, y[r], n)
                                   : simd::store_bf16(p + r * stride, y[r], n);
    }
  }
}

// Sums of rows of activations with the rows of weights from `column` on, which become a part of the output.
template <int R>
inline void finish(const SparseLayer& layer, vf (&y)[R], const Matrix& out, int64_t row, int rows,
                   int64_t column) {
  const Epilogue epilogue = layer.epilogue;
  const vf bias = simd::load_f32(layer.bias + column);
  const vf scale = layer.scales == nullptr ? simd::broadcast(1.0f) : simd::load_f32(layer.scales + column);
  if (epilogue == Epilogue::none || epilogue == Epilogue::relu) {
    const vf least = simd::broadcast(epilogue == Epilogue::relu ? 0.0f : -__builtin_inff());
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) y[r] = simd::at_least(simd::add(simd::mul(y[r], scale), bias), least);
  } else {
    for (int r = 0; r < rows; ++r) y[r] = apply(epilogue, simd::add(simd::mul(y[r], scale), bias));
  }
  store_rows(layer, y, out, row, rows, column);
}

// Finishes sums of bytes in the same way; the rows of activations have the scales x.
template <int R>
inline void finish_bytes(const SparseLayer& layer, const vi (&sum)[R], const Matrix& out, int64_t row,
                         int rows, int64_t column, const RowScale* x) {
  const vi sums = simd::load_i32(layer.sums + column);
  const vf bias = simd::load_f32(layer.bias + column), scale = simd::load_f32(layer.scales + column);
  vf y[R];
  for (int r = 0; r < rows; ++r) {
    const vi correction = simd::mul_i(simd::broadcast_i(x[r].zero_point), sums);
    const vf exact = simd::to_float(simd::sub_i(sum[r], correction));
    y[r] = apply(layer.epilogue,
                 simd::add(simd::mul(exact, simd::mul(simd::broadcast(x[r].scale), scale)), bias));
  }
  store_rows(layer, y, out, row, rows, column);
}

// ---- one cell ----

// How a vector of cells is multiplied with weights and summed. Sums take 32 bits of memory, whatever they
// are.
template <ElementType T>
struct Cells {
  using Sum = vf;
  static Sum zero() { return simd::zero(); }
  static Sum add(Sum a, Sum b) { return simd::add(a, b); }
  static Sum load(const int32_t* p) { return simd::load_f32(reinterpret_cast<const float*>(p)); }
  static void store(int32_t* p, Sum x) { simd::store_f32(reinterpret_cast<float*>(p), x); }
  static Sum multiply(Sum sum, Sum x, Sum weight) { return simd::fma(weight, x, sum); }
  static Sum picked(vi x) { return simd::float_i(x); }
  template <int J>
  static Sum weight(simd::Quad q) {
    return simd::spread<J>(q);
  }
  static simd::Quad quad(const uint8_t* p) {
    if constexpr (T == ElementType::f32) return simd::quad_words(p);
    if constexpr (T == ElementType::f16) return simd::quad_f16(p);
    if constexpr (T == ElementType::bf16) return simd::quad_bf16(p);
    if constexpr (T == ElementType::i8) return simd::quad_i8(p);
  }
  static Sum weights(const uint8_t* p) {
    if constexpr (T == ElementType::f32) return simd::load_f32(reinterpret_cast<const float*>(p));
    if constexpr (T == ElementType::f16) return simd::load_f16(p);
    if constexpr (T == ElementType::bf16) return simd::load_bf16(p);
    if constexpr (T == ElementType::i8) return simd::load_i8(p);
  }
  template <int R>
  static void finish(const SparseLayer& layer, Sum (&sum)[R], const Matrix& out, int64_t row, int rows,
                     int64_t column, const RowScale*) {
    ::finish(layer, sum, out, row, rows, column);
  }
};

template <>
struct Cells<ElementType::i8x4> {
  using Sum = vi;
  static Sum zero() { return simd::zero_i(); }
  static Sum add(Sum a, Sum b) { return simd::add_i(a, b); }
  static Sum load(const int32_t* p) { return simd::load_i32(p); }
  static void store(int32_t* p, Sum x) { simd::store_f32(reinterpret_cast<float*>(p), simd::float_i(x)); }
  static Sum multiply(Sum sum, Sum x, Sum weight) { return simd::dot_bytes(sum, x, weight); }
  static Sum picked(vi x) { return x; }
  template <int J>
  static Sum weight(simd::Quad q) {
    return simd::spread_i<J>(q);
  }
  static simd::Quad quad(const uint8_t* p) { return simd::quad_words(p); }
  static Sum weights(const uint8_t* p) { return simd::load_i32(reinterpret_cast<const int32_t*>(p)); }
  template <int R>
  static void finish(const SparseLayer& layer, Sum (&sum)[R], const Matrix& out, int64_t row, int rows,
                     int64_t column, const RowScale* x) {
    finish_bytes(layer, sum, out, row, rows, column, x);
  }
};

// ---- few rows of activations ----

// M rows of activations x [M][stride] with the slabs of weights from `first` on.
// The cells of a step: one for each lane, or for G lanes.
template <int G>
inline vi picked_words(const simd::Words32& words, const uint8_t* cell, int lane) {
  return G == 1 ? simd::pick(words, cell + lane) : simd::pick_shared(words, cell + lane / G);
}

template <ElementType T, int M, int G>
void multiply_slabs(const SparseLayer& layer, const int32_t* x, int64_t stride, const Matrix& out,
                    int64_t row, int64_t first, int64_t last, const RowScale* scales) {
  using C = Cells<T>;
  constexpr int V = slab_rows / lanes;
  // A second set of sums where one would wait for itself: a product takes 4 cycles.
  constexpr int S = M * V <= 2 ? 2 : 1;
  constexpr int64_t bytes = slab_rows * cell_bytes(T), vector_bytes = lanes * cell_bytes(T);
  const int64_t before = layer.slab_starts[first];
  const uint8_t* cell = layer.cell + before * (slab_rows / G);
  const uint8_t* value = layer.value + before * bytes;
  const uint8_t* steps = layer.steps + first * layer.chunks;
  const int32_t* order = layer.order + first * layer.chunks;
  const int64_t chunks = layer.chunks;
  for (int64_t slab = first; slab < last; ++slab) {
    typename C::Sum sum[S][M][V];
    for (int s = 0; s < S; ++s)
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) sum[s][m][v] = C::zero();
    for (int64_t c = 0; c < chunks; ++c) {
      int n = *steps++;
      const int32_t* of_chunk = x + *order++ * chunk_cells;
      if (n == 0) {
        // The remaining chunks are empty, too.
        steps += chunks - c - 1, order += chunks - c - 1;
        break;
      }
      simd::Words32 words[M];
      for (int m = 0; m < M; ++m) words[m] = simd::load_words32(of_chunk + m * stride);
      const auto step = [&](int s) {
        for (int v = 0; v < V; ++v) {
          const typename C::Sum weight = C::weights(value + v * vector_bytes);
          for (int m = 0; m < M; ++m) {
            const typename C::Sum picked = C::picked(picked_words<G>(words[m], cell, v * lanes));
            sum[s][m][v] = C::multiply(sum[s][m][v], picked, weight);
          }
        }
        cell += slab_rows / G;
        value += bytes;
      };
      for (; n >= 2; n -= 2) step(0), step(S - 1);
      if (n > 0) step(0);
    }
    for (int v = 0; v < V && slab * slab_rows + v * lanes < layer.n; ++v) {
      typename C::Sum all[M];
      for (int m = 0; m < M; ++m) all[m] = S == 2 ? C::add(sum[0][m][v], sum[S - 1][m][v]) : sum[0][m][v];
      C::finish(layer, all, out, row, M, slab * slab_rows + v * lanes, scales);
    }
  }
}

// Multiplies one row that holds NaN or infinity. It leaves out the places of a step that hold no weight,
// whose zero would make NaN of them.
template <ElementType T>
void multiply_slabs_apart(const SparseLayer& layer, const int32_t* x, const Matrix& out, int64_t row,
                          int64_t first, int64_t last) {
  constexpr int64_t bytes = slab_rows * cell_bytes(T);
  int64_t at = layer.slab_starts[first];
  for (int64_t slab = first; slab < last; ++slab) {
    float sum[slab_rows] = {};
    for (int64_t c = 0; c < layer.chunks; ++c) {
      const int64_t part = slab * layer.chunks + c;
      for (int step = 0; step < layer.steps[part]; ++step, ++at) {
        float weight[slab_rows];
        for (int64_t i = 0; i < slab_rows; i += lanes)
          simd::store_f32(weight + i, Cells<T>::weights(layer.value + at * bytes + i * cell_bytes(T)));
        for (int64_t i = 0; i < slab_rows; ++i) {
          if (step >= layer.lane_counts[part * slab_rows + i]) continue;
          const int32_t word =
              x[layer.order[part] * chunk_cells + layer.cell[(at * slab_rows + i) / layer.group]];
          sum[i] += weight[i] * simd::float_of(static_cast<uint32_t>(word));
        }
      }
    }
    for (int64_t i = 0; i < slab_rows && slab * slab_rows + i < layer.n; i += lanes) {
      vf all[1] = {simd::load_f32(sum + i)};
      finish(layer, all, out, row, 1, slab * slab_rows + i);
    }
  }
}

bool all_finite(const int32_t* x, int64_t n) {
  vi most = simd::zero_i();
  for (int64_t i = 0; i < n; i += lanes)
    most = simd::max_i(most, simd::magnitude_bits(simd::float_i(simd::load_i32(x + i))));
  return simd::largest_i(most) < 0x7f800000;
}

template <ElementType T, int M>
void multiply_few(const SparseLayer& layer, const int32_t* x, int64_t stride, const Matrix& out, int64_t row,
                  int64_t first, int64_t last, const RowScale* scales) {
  if (layer.group == 1) return multiply_slabs<T, M, 1>(layer, x, stride, out, row, first, last, scales);
  multiply_slabs<T, M, 4>(layer, x, stride, out, row, first, last, scales);
}

template <ElementType T>
void few_of(const SparseLayer& layer, const Matrix& out, int64_t rows, int64_t first, int64_t last,
            const SparseScratch& scratch) {
  const int64_t stride = layer.chunks * chunk_cells;
  const int32_t* x = scratch.x;
  const RowScale* scales = scratch.scales;
  if constexpr (T != ElementType::i8x4) {
    if (!all_finite(x, rows * stride)) {
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* row = x + r * stride;
        if (all_finite(row, stride)) {
          multiply_few<T, 1>(layer, row, stride, out, r, first, last, scales);
        } else {
          multiply_slabs_apart<T>(layer, row, out, r, first, last);
        }
      }
      return;
    }
  }
  if (rows == 1) return multiply_few<T, 1>(layer, x, stride, out, 0, first, last, scales);
  if (rows == 2) return multiply_few<T, 2>(layer, x, stride, out, 0, first, last, scales);
  if (rows == 3) return multiply_few<T, 3>(layer, x, stride, out, 0, first, last, scales);
  multiply_few<T, 4>(layer, x, stride, out, 0, first, last, scales);
}

// Whether rows are quantized and multiplied as floats.
bool quantizes_floats(const SparseLayer& layer) {
  return layer.type == ElementType::f32 && layer.scheme != Scheme::weight_only;
}

void few(const SparseLayer& layer, const Matrix& in, const Matrix& out, int64_t rows, int64_t first,
         int64_t last, const SparseScratch& scratch) {
  const int64_t stride = layer.chunks * chunk_cells;
  for (int64_t r = 0; r < rows; ++r) {
    float* x = reinterpret_cast<float*>(scratch.x + r * stride);
    const float* floats = static_cast<const float*>(in.data) + r * in.stride;
    if (quantizes_floats(layer)) {
      scratch.scales[r] = quantize_floats(layer.scheme, layer.input, in, r, layer.k, scratch.floats, x);
      std::memset(x + layer.k, 0, sizeof(float) * static_cast<size_t>(stride - layer.k));
      continue;
    }
    if (in.type != ElementType::f32) {
      float* converted = layer.type == ElementType::i8x4 ? scratch.floats : x;
      to_floats(in, r, layer.k, converted);
      floats = converted;
    }
    if (layer.type == ElementType::i8x4) {
      scratch.scales[r] =
          quantize_row(layer.scheme, layer.input, floats, layer.k, 4 * stride, reinterpret_cast<uint8_t*>(x));
      continue;
    }
    if (in.type == ElementType::f32) std::memcpy(x, floats, sizeof(float) * static_cast<size_t>(layer.k));
    std::memset(x + layer.k, 0, sizeof(float) * static_cast<size_t>(stride - layer.k));
  }
  switch (layer.type) {
    case ElementType::f32:
      few_of<ElementType::f32>(layer, out, rows, first, last, scratch);
      if (quantizes_floats(layer))
        spoil_rows(scratch.scales, out, 0, rows, layer.n, first * slab_rows, last * slab_rows);
      return;
    case ElementType::f16:
      return few_of<ElementType::f16>(layer, out, rows, first, last, scratch);
    case ElementType::bf16:
      return few_of<ElementType::bf16>(layer, out, rows, first, last, scratch);
    case ElementType::i8:
      return few_of<ElementType::i8>(layer, out, rows, first, last, scratch);
    default:  // i8x4
      return few_of<ElementType::i8x4>(layer, out, rows, first, last, scratch);
  }
}

// ---- panels of activations ----

void fill_panel(const SparseLayer& layer, const Matrix& in, int64_t row, int64_t rows, int64_t columns,
                const SparseScratch& scratch) {
  if (quantizes_floats(layer)) {
    float* const x = reinterpret_cast<float*>(scratch.bytes);
    for (int64_t r = 0; r < rows; ++r)
      scratch.scales[r] =
          quantize_floats(layer.scheme, layer.input, in, row + r, layer.k, scratch.floats, x + r * layer.k);
    return transpose_rows({x, layer.k, ElementType::f32}, 0, rows, layer.k, columns, nullptr, scratch.x);
  }
  if (layer.type != ElementType::i8x4)
    return transpose_rows(in, row, rows, layer.k, columns, scratch.floats, scratch.x);
  const int64_t stride = 4 * layer.cells;
  for (int64_t r = 0; r < rows; ++r) {
    const float* floats = static_cast<const float*>(in.data) + (row + r) * in.stride;
    if (in.type != ElementType::f32) {
      to_floats(in, row + r, layer.k, scratch.floats);
      floats = scratch.floats;
    }
    scratch.scales[r] =
        quantize_row(layer.scheme, layer.input, floats, layer.k, stride, scratch.bytes + r * stride);
  }
  const Matrix words{scratch.bytes, layer.cells, ElementType::f32};
  transpose_rows(words, 0, rows, layer.cells, columns, nullptr, scratch.x);
}

// The items of one block: V vectors of a panel of W columns.
template <ElementType T, int V, int W>
void multiply_rows(const SparseLayer& layer, const SparseStream& s, bool first, const int32_t* x,
                   int32_t* y) {
  using C = Cells<T>;
  constexpr int S = V <= 2 ? 2 : 1;  // as above
  constexpr int64_t bytes = cell_bytes(T);
  const SparseItem* item = layer.items + s.first_item;
  const uint8_t* cell = layer.cell + s.first_entry;
  const uint8_t* value = layer.value + s.first_entry * bytes;
  for (int64_t i = 0; i < s.items; ++i, ++item) {
    int32_t* sums = y + static_cast<int64_t>(item->group) * W;
    typename C::Sum sum[S][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sum[0][v] = first ? C::zero() : C::load(sums + v * lanes);
      sum[S - 1][v] = S == 2 ? C::zero() : sum[0][v];
    }
    const auto add = [&](int s, const int32_t* from, typename C::Sum weight) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[s][v] = C::multiply(sum[s][v], C::load(from + v * lanes), weight);
    };
    int n = item->count;
    for (; n >= 4; n -= 4, cell += 4, value += 4 * bytes) {
      const uint32_t cells = static_cast<uint32_t>(simd::load_word(cell));
      const simd::Quad q = C::quad(value);
      add(0, x + (cells & 255) * W, C::template weight<0>(q));
      add(S - 1, x + (cells >> 8 & 255) * W, C::template weight<1>(q));
      add(0, x + (cells >> 16 & 255) * W, C::template weight<2>(q));
      add(S - 1, x + (cells >> 24) * W, C::template weight<3>(q));
    }
    if (n > 0) {
      const uint32_t cells = static_cast<uint32_t>(simd::load_word(cell));
      const simd::Quad q = C::quad(value);
      add(0, x + (cells & 255) * W, C::template weight<0>(q));
      if (n > 1) add(S - 1, x + (cells >> 8 & 255) * W, C::template weight<1>(q));
      if (n > 2) add(0, x + (cells >> 16 & 255) * W, C::template weight<2>(q));
      cell += n, value += n * bytes;
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      C::store(sums + v * lanes, S == 2 ? C::add(sum[0][v], sum[S - 1][v]) : sum[0][v]);
  }
}

// Does the same work for layers in which four rows share their cells.
template <ElementType T, int V, int W>
void multiply_four(const SparseLayer& layer, const SparseStream& s, bool first, const int32_t* x,
                   int32_t* y) {
  using C = Cells<T>;
  constexpr int64_t bytes = 4 * cell_bytes(T);
  const SparseItem* item = layer.items + s.first_item;
  const uint8_t* cell = layer.cell + s.first_entry;
  const uint8_t* value = layer.value + s.first_entry * bytes;
  for (int64_t i = 0; i < s.items; ++i, ++item) {
    int32_t* sums = y + static_cast<int64_t>(item->group) * 4 * W;
    typename C::Sum sum[4][V];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = first ? C::zero() : C::load(sums + r * W + v * lanes);
    }
    for (int n = item->count; n > 0; --n, ++cell, value += bytes) {
      const int32_t* from = x + *cell * W;
      const simd::Quad q = C::quad(value);
      typename C::Sum loaded[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) loaded[v] = C::load(from + v * lanes);
      const auto add = [&](int r, typename C::Sum weight) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = C::multiply(sum[r][v], loaded[v], weight);
      };
      add(0, C::template weight<0>(q));
      add(1, C::template weight<1>(q));
      add(2, C::template weight<2>(q));
      add(3, C::template weight<3>(q));
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) C::store(sums + r * W + v * lanes, sum[r][v]);
    }
  }
}

// The sums must fit into the registers: 32 registers hold 4 x 4 sums, fewer hold 4 x 2.
constexpr int vectors_of_four = lanes == 16 ? 4 : 2;

template <ElementType T, int W>
void multiply_block(const SparseLayer& layer, const SparseStream& s, bool first, const int32_t* x,
                    int32_t* y) {
  if (layer.group == 1) {
    if constexpr (W <= 32) multiply_rows<T, W / lanes, W>(layer, s, first, x, y);
  } else {
    constexpr int V = W / lanes < vectors_of_four ? W / lanes : vectors_of_four;
    for (int c = 0; c < W; c += V * lanes) multiply_four<T, V, W>(layer, s, first, x + c, y + c);
  }
}

// A tile of sums, to floats without an activation function or with relu. `value` makes a float of a sum and
// its column of the panel. Everything stays in registers, which takes half the time of the general case.
template <typename F>
inline void finish_tile(const int32_t* y, int64_t columns, float* to, int64_t stride, const F& value) {
  vf sums[tile_columns];
  simd::load_columns(y, columns, sums);
#pragma GCC unroll 8
  for (int i = 0; i < tile_columns; ++i) simd::store_f32(to + i * stride, value(sums[i], i));
}

template <ElementType T>
inline void finish_plain(const SparseLayer& layer, const int32_t* y, int64_t columns, float* to,
                         int64_t stride, int64_t column, const RowScale* x) {
  const vf bias = simd::load_f32(layer.bias + column);
  const vf least = simd::broadcast(layer.epilogue == Epilogue::relu ? 0.0f : -__builtin_inff());
  if constexpr (T == ElementType::i8x4) {
    const vf scale = simd::load_f32(layer.scales + column);
    const vi sums = simd::load_i32(layer.sums + column);
    finish_tile(y, columns, to, stride, [&](vf sum, int i) {
      const vi exact = simd::sub_i(simd::bits_i(sum), simd::mul_i(simd::broadcast_i(x[i].zero_point), sums));
      const vf y = simd::mul(simd::to_float(exact), simd::mul(simd::broadcast(x[i].scale), scale));
      return simd::at_least(simd::add(y, bias), least);
    });
  } else if constexpr (T == ElementType::i8) {
    const vf scale = simd::load_f32(layer.scales + column);
    finish_tile(y, columns, to, stride,
                [&](vf sum, int) { return simd::at_least(simd::add(simd::mul(sum, scale), bias), least); });
  } else {
    finish_tile(y, columns, to, stride,
                [&](vf sum, int) { return simd::at_least(simd::add(sum, bias), least); });
  }
}

// The sums of a band become its part of the output.
template <ElementType T>
__attribute__((noinline)) void finish_band(const SparseLayer& layer, int64_t band, const Matrix& out,
                                           int64_t row, int64_t rows, int64_t columns,
                                           const SparseScratch& scratch) {
  using C = Cells<T>;
  const int64_t from = layer.band_groups[band] * layer.group, stride = out.stride;
  const int64_t end = layer.band_groups[band + 1] * layer.group, to = end < layer.n ? end : layer.n;
  const bool plain =
      out.type == ElementType::f32 && (layer.epilogue == Epilogue::none || layer.epilogue == Epilogue::relu);
  for (int64_t c = 0; c < rows; c += tile_columns) {
    const int32_t* y = scratch.y + c;
    const RowScale* x = scratch.scales + c;
    int64_t n = from;
    if (plain && c + tile_columns <= rows) {
      float* p = static_cast<float*>(out.data) + (row + c) * stride;
      for (; n + lanes <= to; n += lanes, y += lanes * columns)
        finish_plain<T>(layer, y, columns, p + n, stride, n, x);
    }
    const int filled = static_cast<int>(rows - c < tile_columns ? rows - c : tile_columns);
    for (; n < to; n += lanes, y += lanes * columns) {
      vf columns_of_sums[tile_columns];
      simd::load_columns(y, columns, columns_of_sums);
      typename C::Sum sum[tile_columns];
      for (int i = 0; i < tile_columns; ++i) sum[i] = C::picked(simd::bits_i(columns_of_sums[i]));
      C::finish(layer, sum, out, row + c, filled, n, x);
    }
  }
}

template <ElementType T>
void many_of(const SparseLayer& layer, const Matrix& out, int64_t row, int64_t rows, int64_t columns,
             int64_t first, int64_t last, const SparseScratch& scratch) {
  for (int64_t band = first; band < last; ++band) {
    for (int64_t block = 0; block < layer.blocks; ++block) {
      const SparseStream& s = layer.streams[band * layer.blocks + block];
      const int32_t* x = scratch.x + block * block_cells * columns;
      if (columns == 16) multiply_block<T, 16>(layer, s, block == 0, x, scratch.y);
      if (columns == 32) multiply_block<T, 32>(layer, s, block == 0, x, scratch.y);
      if (columns == 64) multiply_block<T, 64>(layer, s, block == 0, x, scratch.y);
    }
    finish_band<T>(layer, band, out, row, rows, columns, scratch);
  }
}

void many(const SparseLayer& layer, const Matrix& in, const Matrix& out, int64_t row, int64_t rows,
          int64_t columns, int64_t first, int64_t last, const SparseScratch& scratch) {
  fill_panel(layer, in, row, rows, columns, scratch);
  switch (layer.type) {
    case ElementType::f32:
      many_of<ElementType::f32>(layer, out, row, rows, columns, first, last, scratch);
      if (quantizes_floats(layer))
        spoil_rows(scratch.scales, out, row, rows, layer.n, layer.band_groups[first] * layer.group,
                   layer.band_groups[last] * layer.group);
      return;
    case ElementType::f16:
      return many_of<ElementType::f16>(layer, out, row, rows, columns, first, last, scratch);
    case ElementType::bf16:
      return many_of<ElementType::bf16>(layer, out, row, rows, columns, first, last, scratch);
    case ElementType::i8:
      return many_of<ElementType::i8>(layer, out, row, rows, columns, first, last, scratch);
    default:  // i8x4
      return many_of<ElementType::i8x4>(layer, out, row, rows, columns, first, last, scratch);
  }
}

void all_to_floats(const Matrix& m, int64_t count, float* out) {
  if (m.type != ElementType::f32) return to_floats(m, 0, count, out);
  std::memcpy(out, m.data, sizeof(float) * static_cast<size_t>(count));
}

void all_from_floats(const float* x, int64_t count, const Matrix& m) { from_floats(x, count, m, 0); }

}  // namespace

extern "C" const rk::SparseLinearKernels RK_CONCAT(rk_sparse_linear_, RK_ISA) = {
    intact, few, many, gradient, all_to_floats, all_from_floats};
