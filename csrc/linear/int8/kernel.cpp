// Compiled once per instruction-set level; everything but the table of functions at the end has internal
// linkage.
#include "kernel.h"

#include "linear/epilogue.h"
#include "linear/quantize.h"

#define RK_CONCAT2(a, b) a##b
#define RK_CONCAT(a, b) RK_CONCAT2(a, b)

namespace {

using rk::block;
using rk::Layer;
using rk::Scratch;

constexpr int64_t block_bytes = 4 * block;  // of one block of columns and 4 of k
constexpr int vectors_a_block = block / simd::lanes;
// Columns of a tile: 4 x 4 accumulators are enough to reach 97 % of the multipliers' rate with 32 registers.
constexpr int most_blocks = simd::lanes == 16 ? 4 : 1;
constexpr int most_rows = 4;

// The bytes of four quantized activations.
constexpr int64_t bytes_for_four = simd::splits_bytes ? 8 : 4;

// If products have 16 bits, weights are widened once for many rows: each row then has two products and two
// sums for 4 of k, and no shifts, which leaves registers for taller tiles.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#define RK_INT8_WIDENS 1
#endif
constexpr int wide_rows = 6;
constexpr int64_t wide_columns = simd::splits_bytes ? most_blocks * block : 0;

// ---- tiles ----

// What a tile reads and writes: rows of activations (bytes or floats) and the first of its columns.
struct Tile {
  const uint8_t* bytes;
  int64_t bytes_stride;
  const RowScale* rows;
  const float* floats;
  int64_t floats_stride;
  float* out;
  int64_t out_stride;
  int64_t column;
  const int16_t* wide;  // the tile's weights as widen() leaves them, or null
  // If a layer with static activations follows, the output is quantized for that layer and goes to it.
  const Layer* next;
  uint8_t* next_bytes;
  RowScale* next_rows;
};

template <int M, int V>
using Sums = vf[M][V];

// Vector v of a tile's columns at 4 * k4 of k.
inline const int8_t* weights_at(const Layer& layer, int64_t column, int v, int64_t k4) {
  const int64_t first = column + v * lanes;
  return layer.weights + (first / block * (layer.padded_k() / 4) + k4) * block_bytes + first % block * 4;
}

template <int M, int V>
inline void dot_bytes(const Layer& layer, const Tile& t, int64_t begin4, int64_t end4, vi (&out)[M][V]) {
  const int8_t* w = weights_at(layer, t.column, 0, begin4);
  const uint8_t* x = t.bytes + bytes_for_four * begin4;
  const int64_t panel = layer.padded_k() / 4 * block_bytes, stride = t.bytes_stride;
  // Sums of its own: gcc copies those of the caller around in every step.
  vi acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = simd::zero_i();
  }
  for (int64_t n = end4 - begin4; n > 0; --n, w += block_bytes, x += bytes_for_four) {
    simd::Weights4 b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      b[v] = simd::load_weights(w + v / vectors_a_block * panel + v % vectors_a_block * 4 * lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const simd::Bytes4 a = simd::broadcast_bytes(x + i * stride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] = simd::dot(acc[i][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) out[i][v] = acc[i][v];
  }
}

#if RK_INT8_WIDENS
// [padded k / 4][even, odd][V vectors]: what dot() makes of the packed weights each time.
template <int V>
__attribute__((noinline)) void widen(const Layer& layer, int64_t column, int16_t* out) {
  constexpr int64_t values = 2 * lanes;
  for (int64_t k4 = 0; k4 < layer.padded_k() / 4; ++k4, out += 2 * V * values) {
    for (int v = 0; v < V; ++v) {
      const simd::Weights4 w = simd::load_weights(weights_at(layer, column, v, k4));
      simd::store_i16(out + v * values, w.even);
      simd::store_i16(out + (V + v) * values, w.odd);
    }
  }
}

template <int M, int V>
inline void dot_wide(const Tile& t, int64_t begin4, int64_t end4, vi (&out)[M][V]) {
  constexpr int64_t values = 2 * lanes;
  const int16_t* w = t.wide + begin4 * 2 * V * values;
  const uint8_t* x = t.bytes + bytes_for_four * begin4;
  const int64_t stride = t.bytes_stride;
  vi acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = simd::zero_i();
  }
  for (int64_t n = 2 * (end4 - begin4); n > 0; --n, w += V * values, x += 4) {
    vi b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = simd::load_i16(w + v * values);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const vi a = simd::broadcast_word(x + i * stride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] = simd::add_pairs(acc[i][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) out[i][v] = acc[i][v];
  }
}
#endif

// A block of columns and one row. A sum waits for the one before it, so that there are four, of every fourth
// product.
inline vi dot_row(const Layer& layer, const Tile& t) {
  constexpr int parts = 4;
  const int8_t* w = weights_at(layer, t.column, 0, 0);
  const uint8_t* x = t.bytes;
  vi acc[parts] = {simd::zero_i(), simd::zero_i(), simd::zero_i(), simd::zero_i()};
  int64_t n = layer.padded_k() / 4;
  for (; n >= parts; n -= parts, w += parts * block_bytes, x += parts * bytes_for_four) {
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      const simd::Bytes4 a = simd::broadcast_bytes(x + p * bytes_for_four);
      acc[p] = simd::dot(acc[p], a, simd::load_weights(w + p * block_bytes));
    }
  }
  for (; n > 0; --n, w += block_bytes, x += bytes_for_four)
    acc[0] = simd::dot(acc[0], simd::broadcast_bytes(x), simd::load_weights(w));
  return simd::add_i(simd::add_i(acc[0], acc[1]), simd::add_i(acc[2], acc[3]));
}

template <int M, int V>
inline void dot(const Layer& layer, const Tile& t, int64_t begin4, int64_t end4, vi (&out)[M][V]) {
#if RK_INT8_WIDENS
  if constexpr (M == wide_rows) return dot_wide<M, V>(t, begin4, end4, out);
#endif
  dot_bytes<M, V>(layer, t, begin4, end4, out);
}

template <int J, int M, int V>
inline void add_products(const Layer& layer, const Tile& t, int64_t k4, const float (&x)[M],
                         Sums<M, V>& acc) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vf w = simd::weight_as_float<J>(weights_at(layer, t.column, v, k4));
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[i][v] = simd::fma(simd::broadcast(x[i]), w, acc[i][v]);
  }
}

template <int M, int V>
inline void dot_floats(const Layer& layer, const Tile& t, int64_t begin4, int64_t end4, Sums<M, V>& acc) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = simd::zero();
  }
  for (int64_t k4 = begin4; k4 < end4; ++k4) {
    float x[4][M];
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < 4; ++j)
        x[j][i] = 4 * k4 + j < layer.k ? t.floats[i * t.floats_stride + 4 * k4 + j] : 0.0f;
    }
    add_products<0, M, V>(layer, t, k4, x[0], acc);
    add_products<1, M, V>(layer, t, k4, x[1], acc);
    add_products<2, M, V>(layer, t, k4, x[2], acc);
    add_products<3, M, V>(layer, t, k4, x[3], acc);
  }
}

// The sums of one group of k, of bytes less the zero point, as floats.
template <int M, int V>
inline void group_sums(const Layer& layer, const Tile& t, int64_t group, Sums<M, V>& sums) {
  const int64_t begin4 = group * layer.group / 4, all = layer.padded_k() / 4;
  const int64_t end4 = group + 1 == layer.groups ? all : begin4 + layer.group / 4;
  if (layer.scheme == Scheme::weight_only) return dot_floats<M, V>(layer, t, begin4, end4, sums);
  vi acc[M][V];
  dot<M, V>(layer, t, begin4, end4, acc);
  const int32_t* of_weights = layer.sums + group * layer.padded_n() + t.column;
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    const vi zero = simd::broadcast_i(t.rows[i].zero_point);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vi correction = simd::mul_i(zero, simd::load_i32(of_weights + v * lanes));
      sums[i][v] = simd::to_float(simd::sub_i(acc[i][v], correction));
    }
  }
}

// Bias and activation function of a vector of columns, for all rows of a tile.
template <int M, int V>
inline void finish(const Layer& layer, const Tile& t, int v, vf (&y)[M]) {
  // Copies: the compiler must take the output for something that overlaps the layer.
  const Epilogue epilogue = layer.epilogue;
  const int64_t column = t.column + v * lanes, left = layer.n - column, stride = t.out_stride;
  if (left <= 0) return;
  float* out = t.out + column;
  const vf bias = simd::load_f32(layer.bias + column);
  if (epilogue == Epilogue::none || epilogue == Epilogue::relu) {
    const vf least = simd::broadcast(epilogue == Epilogue::relu ? 0.0f : -__builtin_inff());
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) y[i] = simd::at_least(simd::add(y[i], bias), least);
  } else {
    for (int i = 0; i < M; ++i) y[i] = apply(epilogue, simd::add(y[i], bias));
  }
  if (t.next != nullptr) {
    const Quantizer quantize({t.next->input_scale, t.next->input_zero_point});
    for (int i = 0; i < M; ++i) {
      // A whole vector: columns past the last have weights of zero in the next layer.
      simd::store_u8(t.next_bytes + i * t.bytes_stride + column, quantize(y[i]));
      if (!simd::all_finite(y[i])) t.next_rows[i].scale = simd::float_of(0x7fc00000);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    if (left >= lanes) {
      simd::store_f32(out + i * stride, y[i]);
    } else {
      simd::store_f32(out + i * stride, y[i], static_cast<int>(left));
    }
  }
}

// A tile of quantized activations whose weights have one scale a column: by far the most.
template <int M, int V>
inline void tile_of_columns(const Layer& layer, const Tile& t) {
  vi acc[M][V];
  if constexpr (M == 1 && V == 1 && lanes == 16) {
    acc[0][0] = dot_row(layer, t);
  } else {
    dot<M, V>(layer, t, 0, layer.padded_k() / 4, acc);
  }
  const int32_t* sums = layer.sums + t.column;
  const float* scales = layer.scales + t.column;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vi of_weights = simd::load_i32(sums + v * lanes);
    const vf scale = simd::load_f32(scales + v * lanes);
    vf y[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const vi sum = simd::sub_i(acc[i][v], simd::mul_i(simd::broadcast_i(t.rows[i].zero_point), of_weights));
      y[i] = simd::mul(simd::to_float(sum), simd::mul(simd::broadcast(t.rows[i].scale), scale));
    }
    finish<M, V>(layer, t, v, y);
  }
}

template <int M, int V>
__attribute__((noinline)) void tile_of_groups(const Layer& layer, const Tile& t) {
  const bool bytes = layer.scheme != Scheme::weight_only;
  Sums<M, V> y, part;
  for (int64_t group = 0; group < layer.groups; ++group) {
    group_sums<M, V>(layer, t, group, part);
    const float* scales = layer.scales + group * layer.padded_n() + t.column;
    for (int i = 0; i < M; ++i) {
      for (int v = 0; v < V; ++v) {
        const vf scaled = simd::mul(part[i][v], simd::load_f32(scales + v * lanes));
        y[i][v] = group == 0 ? scaled : simd::add(y[i][v], scaled);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    vf column[M];
    for (int i = 0; i < M; ++i) {
      column[i] = bytes ? simd::mul(y[i][v], simd::broadcast(t.rows[i].scale)) : y[i][v];
    }
    finish<M, V>(layer, t, v, column);
  }
}

template <int M, int B>
void tile(const Layer& layer, const Tile& t) {
  constexpr int V = B * vectors_a_block;
  if (layer.groups == 1 && layer.scheme != Scheme::weight_only) return tile_of_columns<M, V>(layer, t);
  tile_of_groups<M, V>(layer, t);
}

template <int B>
void tile_rows(const Layer& layer, Tile t, int64_t rows, [[maybe_unused]] int16_t* wide) {
  const auto advance = [&](int64_t by) {
    if (t.bytes != nullptr) t.bytes += by * t.bytes_stride, t.rows += by;
    if (t.floats != nullptr) t.floats += by * t.floats_stride;
    if (t.next != nullptr) t.next_bytes += by * t.bytes_stride, t.next_rows += by;
    t.out += by * t.out_stride;
  };
#if RK_INT8_WIDENS
  if (t.bytes != nullptr && rows >= 2 * wide_rows) {
    widen<B * vectors_a_block>(layer, t.column, wide);
    t.wide = wide;
    for (; rows >= wide_rows; rows -= wide_rows) {
      tile<wide_rows, B>(layer, t);
      advance(wide_rows);
    }
  }
#endif
  for (; rows >= most_rows; rows -= most_rows) {
    tile<most_rows, B>(layer, t);
    advance(most_rows);
  }
  if (rows == 1) return tile<1, B>(layer, t);
  if (rows == 2) return tile<2, B>(layer, t);
  if (rows == 3) return tile<3, B>(layer, t);
}

// ---- layers ----

// The time of a single row is the time to load its weights. From L3, one stream is faster than the four
// streams of a tile of four blocks: 24.4 us against 25.8 for four layers of 2.1 MB in all (Zen 4). For layers
// larger than this limit one stream is slower: 4096 x 4096 took 1.16 times as long. Where products have 16
// bits both take the same time.
constexpr int64_t most_bytes_of_row = lanes == 16 && !simd::splits_bytes ? 2 << 20 : 0;

__attribute__((noinline)) void multiply_row(const Layer& layer, Tile t, int64_t first_block,
                                            int64_t last_block) {
  for (int64_t b = first_block; b < last_block; ++b) {
    t.column = b * block;
    tile_of_columns<1, 1>(layer, t);
  }
}

void multiply(const Layer& layer, Tile t, int64_t rows, int64_t first_block, int64_t last_block,
              int16_t* wide) {
  if constexpr (most_bytes_of_row > 0) {
    const bool small = layer.padded_k() * layer.padded_n() <= most_bytes_of_row;
    if (rows == 1 && t.bytes != nullptr && layer.groups == 1 && small)
      return multiply_row(layer, t, first_block, last_block);
  }
  for (int64_t b = first_block; b < last_block;) {
    t.column = b * block;
    const int64_t left = last_block - b;
    if constexpr (most_blocks == 4) {
      if (left >= 4) {
        tile_rows<4>(layer, t, rows, wide);
        b += 4;
        continue;
      }
      if (left >= 2) {
        tile_rows<2>(layer, t, rows, wide);
        b += 2;
        continue;
      }
    }
    tile_rows<1>(layer, t, rows, wide);
    ++b;
  }
}

// `rows` rows from `row` on through all layers. The output of a layer stays in the scratch, in cache.
void run_slice(const Layer* layers, int64_t count, const Matrix& in, const Matrix& out, int64_t row,
               int64_t rows, int64_t first_block, int64_t last_block, const Scratch& scratch) {
  const float* x = static_cast<const float*>(in.data) + row * in.stride;
  int64_t x_stride = in.stride;
  int next = 0;
  if (in.type != ElementType::f32) {
    for (int64_t r = 0; r < rows; ++r)
      to_floats(in, row + r, layers[0].k, scratch.floats[0] + r * scratch.width);
    x = scratch.floats[0];
    x_stride = scratch.width;
    next = 1;
  }
  const bool narrow = out.type != ElementType::f32;
  bool quantized = false;  // by the layer before
  int side = 0;            // of the scratch's bytes
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    Tile t{};
    if (layer.scheme == Scheme::weight_only) {
      t.floats = x;
      t.floats_stride = x_stride;
    } else {
      t.bytes = scratch.bytes[side];
      t.rows = scratch.scales[side];
      for (int64_t r = 0; r < rows; ++r) {
        uint8_t* q = scratch.bytes[side] + r * scratch.bytes_stride;
        if (!quantized) {
          scratch.scales[side][r] = quantize_row(layer.scheme, {layer.input_scale, layer.input_zero_point},
                                                 x + r * x_stride, layer.k, layer.padded_k(), q);
        }
        if (simd::splits_bytes) simd::split_bytes(q, layer.padded_k());
      }
    }
    t.bytes_stride = scratch.bytes_stride;
    quantized = l + 1 < count && layers[l + 1].scheme == Scheme::fixed;
    if (quantized) {
      side ^= 1;
      t.next = &layers[l + 1];
      t.next_bytes = scratch.bytes[side];
      t.next_rows = scratch.scales[side];
      for (int64_t r = 0; r < rows; ++r) t.next_rows[r] = {t.next->input_scale, t.next->input_zero_point};
    } else {
      const bool direct = l + 1 == count && !narrow;
      t.out = direct ? static_cast<float*>(out.data) + row * out.stride : scratch.floats[next];
      t.out_stride = direct ? out.stride : scratch.width;
      x = t.out;
      x_stride = t.out_stride;
      next ^= 1;
    }
    const bool one = count == 1;
    multiply(layer, t, rows, one ? first_block : 0, one ? last_block : layer.padded_n() / block,
             scratch.wide);
  }
  if (!narrow) return;
  const Layer& last = layers[count - 1];
  const int64_t first = count == 1 ? first_block * block : 0;
  const int64_t end = count == 1 && last_block * block < last.n ? last_block * block : last.n;
  const Matrix part{static_cast<uint16_t*>(out.data) + first, out.stride, out.type};
  for (int64_t r = 0; r < rows; ++r) from_floats(x + r * x_stride + first, end - first, part, row + r);
}

void run(const Layer* layers, int64_t count, const Matrix& in, const Matrix& out, int64_t first, int64_t last,
         int64_t rows, int64_t first_block, int64_t last_block, const Scratch& scratch) {
  for (int64_t row = first; row < last; row += rows) {
    const int64_t n = last - row < rows ? last - row : rows;
    run_slice(layers, count, in, out, row, n, first_block, last_block, scratch);
  }
}

}  // namespace

extern "C" const rk::Int8LinearKernels RK_CONCAT(rk_int8_linear_, RK_ISA) = {run, wide_columns};
