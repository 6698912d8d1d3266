// Checks, threads and registration of the int8 linear operators for CPU tensors. The schemas are in
// recsys_kernels/ops/linear/int8.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "core/pages.h"
#include "kernel.h"
#include "operands.h"

namespace {

using rk::block;
using rk::check;
using rk::ElementType;
using rk::Epilogue;
using rk::float_type;
using rk::Int8LinearKernels;
using rk::Layer;
using rk::LayerHeader;
using rk::Matrix;
using rk::RowScale;
using rk::ScalarType;
using rk::Scheme;
using rk::Scratch;
using rk::Tensor;

const Int8LinearKernels& kernels() { return rk::Kernels<Int8LinearKernels>::current(); }

// ---- packed layers ----

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The places of the parts of a packed layer, in bytes from its start.
struct Parts {
  int64_t padded_n, padded_k, groups, scales, bias, sums, weights, end;

  Parts(int64_t n, int64_t k, int64_t group)
      : padded_n(round_up(n, block)),
        padded_k(round_up(k, 4)),
        groups(group == 0 ? 1 : (k + group - 1) / group) {
    scales = sizeof(LayerHeader);
    bias = scales + 4 * groups * padded_n;
    sums = bias + 4 * padded_n;
    weights = sums + 4 * groups * padded_n;
    end = weights + padded_n * padded_k;
  }
};

void check_layer(const LayerHeader& h) {
  check(h.k >= 1 && h.k <= rk::max_k, "a layer must have 1 to ", rk::max_k, " inputs, but has ", h.k);
  check(h.n >= 1, "a layer must have at least one output, but has ", h.n);
  check(h.group == 0 || h.group == 32 || h.group == 64 || h.group == 128,
        "group must be 0, 32, 64 or 128, but is ", h.group);
  check(h.scheme >= 0 && h.scheme <= 2, "scheme must be 0 (dynamic), 1 (static) or 2 (weight only), but is ",
        h.scheme);
  check(h.epilogue >= 0 && h.epilogue <= 4, "activation must be 0 to 4, but is ", h.epilogue);
  if (h.scheme != static_cast<int32_t>(Scheme::fixed)) return;
  // Below, the reciprocal leaves float32.
  check(std::isfinite(h.input_scale) && h.input_scale >= 0x1p-100f,
        "the scale of static activations must be finite and at least 2^-100, but is ", h.input_scale);
  check(h.input_zero_point >= 0 && h.input_zero_point <= 255,
        "the zero point of static activations must be 0 to 255, but is ", h.input_zero_point);
}

Layer layer_at(const uint8_t* data, const LayerHeader& h) {
  const Parts at(h.n, h.k, h.group);
  return {h.k,
          h.n,
          at.groups,
          h.group == 0 ? at.padded_k : h.group,
          static_cast<Scheme>(h.scheme),
          static_cast<Epilogue>(h.epilogue),
          h.input_scale,
          h.input_zero_point,
          reinterpret_cast<const float*>(data + at.scales),
          reinterpret_cast<const float*>(data + at.bias),
          reinterpret_cast<const int32_t*>(data + at.sums),
          reinterpret_cast<const int8_t*>(data + at.weights)};
}

std::vector<Layer> parse(const uint8_t* data, int64_t bytes) {
  std::vector<Layer> layers;
  for (int64_t at = 0; at < bytes;) {
    LayerHeader h;
    check(bytes - at >= static_cast<int64_t>(sizeof h), "packed ends within the header of layer ",
          layers.size());
    std::memcpy(&h, data + at, sizeof h);
    check(h.magic == rk::layer_magic && h.version == rk::layer_version,
          "packed holds no layer of this version at byte ", at);
    check_layer(h);
    const int64_t size = Parts(h.n, h.k, h.group).end;
    check(bytes - at >= size, "packed ends within layer ", layers.size(), ": it takes ", size, " bytes, but ",
          bytes - at, " are left");
    check(layers.empty() || layers.back().n == h.k, "layer ", layers.size(), " takes ", h.k,
          " inputs, but the one before it has ", layers.empty() ? 0 : layers.back().n, " outputs");
    layers.push_back(layer_at(data + at, h));
    at += size;
  }
  check(!layers.empty(), "packed holds no layer");
  return layers;
}

// The canonical operands of a layer, as they are packed.
struct Operands {
  Tensor weight, scale;
  std::optional<Tensor> bias;
  LayerHeader header{};

  template <typename O>
  explicit Operands(const O& o) : Operands(rk::Int8Arguments(o)) {}

  explicit Operands(const rk::Int8Arguments& layer)
      : weight(rk::contiguous_of(layer.weight)), scale(rk::contiguous_of(layer.scales)), bias(layer.bias) {
    rk::check_cpu(weight, "weight");
    header.magic = rk::layer_magic;
    header.version = rk::layer_version;
    header.n = static_cast<int32_t>(layer.n);
    header.k = static_cast<int32_t>(layer.k);
    header.group = static_cast<int32_t>(layer.group);
    header.scheme = static_cast<int32_t>(layer.scheme);
    header.epilogue = static_cast<int32_t>(layer.epilogue);
    header.has_bias = bias.has_value();
    header.input_scale = 1.0f;
    if (layer.qparams.has_value()) {
      const float* pair = static_cast<const float*>(layer.qparams->data_ptr());
      const RowScale input = rk::checked_input(pair[0], pair[1]);
      header.input_scale = input.scale, header.input_zero_point = input.zero_point;
    }
  }

  int64_t packed_bytes() const { return Parts(header.n, header.k, header.group).end; }

  void pack(uint8_t* out) const {
    const int64_t n = header.n, k = header.k, group = header.group == 0 ? k : header.group;
    const Parts at(n, k, header.group);
    std::memset(out, 0, static_cast<size_t>(at.end));
    std::memcpy(out, &header, sizeof header);
    float* scales = reinterpret_cast<float*>(out + at.scales);
    int32_t* sums = reinterpret_cast<int32_t*>(out + at.sums);
    const int8_t* w = static_cast<const int8_t*>(weight.data_ptr());
    const float* given = static_cast<const float*>(scale.data_ptr());
    for (int64_t row = 0; row < n; ++row) {
      const int8_t* from = w + row * k;
      uint8_t* to = out + at.weights + row / block * at.padded_k * block + row % block * 4;
      for (int64_t i = 0; i < k; i += 4, to += 4 * block) {
        std::memcpy(to, from + i, static_cast<size_t>(std::min<int64_t>(4, k - i)));
      }
      for (int64_t g = 0; g < at.groups; ++g) {
        int32_t sum = 0;
        for (int64_t i = g * group; i < std::min(k, (g + 1) * group); ++i) sum += from[i];
        sums[g * at.padded_n + row] = sum;
      }
      for (int64_t g = 0; g < at.groups; ++g) scales[g * at.padded_n + row] = given[row * at.groups + g];
    }
    if (bias.has_value()) std::memcpy(out + at.bias, bias->data_ptr(), static_cast<size_t>(4 * n));
  }
};

// ---- running ----

// The smallest piece of work worth a second thread, in multiplications: about 10 us.
constexpr int64_t min_work = 2 << 20;

// Rows that go through the layers together: enough to use weights several times while they are in cache, few
// enough that what lies between two layers stays in L2.
int64_t slice_rows(const std::vector<Layer>& layers) {
  int64_t widest = 0;
  for (const Layer& layer : layers) widest = std::max({widest, layer.padded_k(), layer.padded_n()});
  if (layers.size() == 1) return std::clamp<int64_t>((256 << 10) / layers[0].padded_k() / 4 * 4, 16, 512);
  return std::clamp<int64_t>((512 << 10) / (9 * widest) / 4 * 4, 16, 128);
}

// The scratch of one thread.
class Buffers {
 public:
  Buffers(const std::vector<Layer>& layers, int64_t rows, bool floats) {
    int64_t k = 0;
    for (const Layer& layer : layers) {
      k = std::max(k, layer.padded_k());
      width_ = std::max({width_, layer.padded_k(), layer.padded_n()});
    }
    width_ = round_up(width_, block);
    stride_ = round_up(std::max(2 * k, width_), 64);
    constexpr int64_t line = 64;
    const int64_t of_wide = 2 * kernels().wide_columns * k, of_floats = floats ? 8 * rows * width_ : 0;
    const int64_t of_scales = round_up(rows * static_cast<int64_t>(sizeof(RowScale)), line);
    memory_.reset(
        new char[static_cast<size_t>(of_wide + of_floats + 2 * (of_scales + rows * stride_) + line)]);
    char* p = memory_.get() + line - reinterpret_cast<uintptr_t>(memory_.get()) % line;
    scratch.wide = reinterpret_cast<int16_t*>(p);
    p += of_wide;
    if (floats)
      scratch.floats[0] = reinterpret_cast<float*>(p), scratch.floats[1] = scratch.floats[0] + rows * width_;
    scratch.width = width_;
    p += of_floats;
    for (int side = 0; side < 2; ++side, p += of_scales + rows * stride_) {
      scratch.scales[side] = reinterpret_cast<RowScale*>(p);
      scratch.bytes[side] = reinterpret_cast<uint8_t*>(p + of_scales);
    }
    scratch.bytes_stride = stride_;
  }
  Scratch scratch{};

 private:
  int64_t width_ = 0, stride_ = 0;
  std::unique_ptr<char[]> memory_;
};

void run(const std::vector<Layer>& layers, const Matrix& in, const Matrix& out, int64_t m) {
  int64_t work = 0;
  for (const Layer& layer : layers) work += m * layer.k * layer.n;
  const int64_t blocks = layers.back().padded_n() / block;
  const int64_t rows = std::min(m, slice_rows(layers));
  const bool floats = layers.size() > 1 || in.type != ElementType::f32 || out.type != ElementType::f32;
  int64_t pieces =
      work < 2 * min_work ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), work / min_work);
  // A thread takes rows, four at a time, or where there are few rows columns of the only layer.
  const bool by_rows = m >= 8 * pieces || layers.size() > 1;
  pieces = std::max<int64_t>(1, std::min(pieces, by_rows ? (m + 3) / 4 : (blocks + 3) / 4));
  const auto piece = [&](int64_t p) {
    Buffers buffers(layers, rows, floats);
    const auto bound = [&](int64_t total, int64_t q) {
      return std::min(total, (total + 3) / 4 * q / pieces * 4);
    };
    const auto layer = layers.data();
    const int64_t count = static_cast<int64_t>(layers.size());
    if (by_rows) {
      kernels().run(layer, count, in, out, bound(m, p), bound(m, p + 1), rows, 0, blocks, buffers.scratch);
    } else {
      kernels().run(layer, count, in, out, 0, m, rows, bound(blocks, p), bound(blocks, p + 1),
                    buffers.scratch);
    }
  };
  if (pieces == 1) return piece(0);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) piece(p);
  });
}

Matrix matrix(const Tensor& t, int64_t stride, const char* name) {
  return {t.data_ptr(), stride, float_type(t.scalar_type(), name)};
}

Tensor int8_chain(const rk::Int8Chain& o) {
  const Tensor& packed = o.packed;
  rk::check_cpu(packed, "packed");
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() &&
            reinterpret_cast<uintptr_t>(packed.data_ptr()) % 4 == 0,
        "packed must be a contiguous, aligned uint8 vector");
  const std::vector<Layer> layers = parse(static_cast<const uint8_t*>(packed.data_ptr()), packed.numel());
  const Tensor input = rk::with_contiguous_rows(o.input, "input");
  check(input.size(1) == layers[0].k, "input must have ", layers[0].k, " columns, but has ", input.size(1));
  check(o.out_features == layers.back().n, "the last layer has ", layers.back().n, " outputs, not ",
        o.out_features);
  const int64_t m = input.size(0);
  const Matrix in = matrix(input, m > 1 ? input.stride(0) : layers[0].k, "input");
  float_type(o.dtype, "dtype");
  Tensor out = rk::empty_matrix(m, o.out_features, o.dtype);
  if (m > 0) run(layers, in, matrix(out, o.out_features, "dtype"), m);
  return out;
}

Tensor int8_pack(const rk::Int8Pack& o) {
  const Operands operands(o);
  Tensor out = rk::empty_tensor({operands.packed_bytes()}, ScalarType::Byte);
  rk::advise_huge_pages(out.data_ptr(), out.numel());
  operands.pack(static_cast<uint8_t*>(out.data_ptr()));
  return out;
}

Tensor int8_linear(const rk::Int8Linear& o) {
  const Operands operands(o);
  const int64_t n = operands.header.n, k = operands.header.k;
  rk::check_cpu(o.input, "input");
  const std::vector<int64_t> sizes = rk::output_shape(o.input, n, k);
  const Tensor input = rk::contiguous_of(o.input);
  const int64_t m = input.numel() / k;
  const Matrix in = matrix(input, k, "input");
  float_type(o.dtype, "dtype");
  Tensor out = rk::empty_tensor(sizes, o.dtype);
  if (m == 0) return out;
  const Tensor packed = rk::empty_tensor({operands.packed_bytes()}, ScalarType::Byte);
  uint8_t* layer = static_cast<uint8_t*>(packed.data_ptr());
  operands.pack(layer);
  run(parse(layer, operands.packed_bytes()), in, matrix(out, n, "dtype"), m);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsys_kernels, CPU, m) {
  rk::implement<&int8_linear>(m);
  rk::implement<&int8_pack>(m);
  rk::implement<&int8_chain>(m);
}
