// Checks, launches and registration of the sparse linear operators for CUDA tensors. The schemas are in
// recsys_kernels/ops/linear/sparse.
//
// Nothing here waits for the device or reads what is there: calls can be captured in a CUDA graph. Where
// weights are is not checked, but by whoever made the layer; a static scale or zero point that is not valid
// gives NaN.

#include "cuda_kernel.cuh"

template __global__ void rk::few_rows_kernel<1, rk::Product::floats>(const __grid_constant__ Kept,
                                                                     const __grid_constant__ SparseInput);
template __global__ void rk::few_rows_kernel<1, rk::Product::bytes>(const __grid_constant__ Kept,
                                                                    const __grid_constant__ SparseInput);
template __global__ void rk::few_rows_kernel<1, rk::Product::fours>(const __grid_constant__ Kept,
                                                                    const __grid_constant__ SparseInput);
template __global__ void rk::few_rows_kernel<4, rk::Product::floats>(const __grid_constant__ Kept,
                                                                     const __grid_constant__ SparseInput);
template __global__ void rk::few_rows_kernel<4, rk::Product::bytes>(const __grid_constant__ Kept,
                                                                    const __grid_constant__ SparseInput);
template __global__ void rk::few_rows_kernel<4, rk::Product::fours>(const __grid_constant__ Kept,
                                                                    const __grid_constant__ SparseInput);
template __global__ void rk::many_rows_kernel<1, rk::Product::floats>(const __grid_constant__ Kept,
                                                                      const __grid_constant__ SparseInput);
template __global__ void rk::many_rows_kernel<1, rk::Product::bytes>(const __grid_constant__ Kept,
                                                                     const __grid_constant__ SparseInput);
template __global__ void rk::many_rows_kernel<1, rk::Product::fours>(const __grid_constant__ Kept,
                                                                     const __grid_constant__ SparseInput);
template __global__ void rk::many_rows_kernel<4, rk::Product::floats>(const __grid_constant__ Kept,
                                                                      const __grid_constant__ SparseInput);
template __global__ void rk::many_rows_kernel<4, rk::Product::bytes>(const __grid_constant__ Kept,
                                                                     const __grid_constant__ SparseInput);
template __global__ void rk::many_rows_kernel<4, rk::Product::fours>(const __grid_constant__ Kept,
                                                                     const __grid_constant__ SparseInput);
template __global__ void rk::weight_gradient_kernel<1>(const __grid_constant__ Kept,
                                                       const __grid_constant__ GradientArguments);
template __global__ void rk::weight_gradient_kernel<4>(const __grid_constant__ Kept,
                                                       const __grid_constant__ GradientArguments);

// nvcc compiles a file for the host and again for the GPUs. For these the kernels above are all there is to
// do, and torch's headers would take longer than they.
#if !defined(__CUDA_ARCH__)

#include <torch/csrc/stable/library.h>

#include "linear/device.h"
#include "operands.h"

namespace {

using rk::ceil_divide;
using rk::check;
using rk::contiguous_of;
using rk::ElementType;
using rk::float_type;
using rk::grid_of;
using rk::Kept;
using rk::Product;
using rk::ScalarType;
using rk::Scheme;
using rk::shape_of;
using rk::Tensor;
using Device = rk::LinearDevice;
using Rows = rk::InputRows;

// The places of kept weights, checked as far as shapes and types allow.
class Structure {
 public:
  Structure(const Tensor& crow, const Tensor& col, int64_t n, int64_t k, int64_t rows, int64_t columns)
      : crow_(contiguous_of(crow)), col_(contiguous_of(col)) {
    constexpr int64_t most = INT32_MAX - 64;
    check(n >= 1 && n <= most, "out_features must be 1 to ", most, ", but is ", n);
    check(k >= 1 && k <= most, "in_features must be 1 to ", most, ", but is ", k);
    kept.n = static_cast<int32_t>(n), kept.k = static_cast<int32_t>(k);
    kept.two_of_four = rows == 0;
    if (kept.two_of_four) {
      two_of_four();
    } else {
      blocks(rows, columns);
    }
    kept.crow = crow_.data_ptr(), kept.col = col_.data_ptr();
  }

  Kept kept{};

  // Rows of weights that a group of lanes takes at once.
  int tile_rows() const { return kept.rows > 1 ? 4 : 1; }
  int64_t tiles() const { return ceil_divide(kept.n, kept.rows) * kept.tiles; }
  // Units in a row of blocks, on average.
  int64_t units(bool fours) const {
    if (kept.two_of_four) return ceil_divide(kept.k, 4) * (fours ? 1 : 2);
    return ceil_divide(int64_t{kept.count} * kept.columns, ceil_divide(kept.n, kept.rows)) / (fours ? 4 : 1);
  }
  std::vector<int64_t> value_shape() const {
    if (kept.two_of_four) return {kept.n, ceil_divide(kept.k, 4) * 2};
    if (kept.rows == 1 && kept.columns == 1) return {kept.count};
    return {kept.count, kept.rows, kept.columns};
  }

 private:
  void two_of_four() {
    check(crow_.numel() == 0, "crow_indices of a 2:4 layer must be empty, but has ", crow_.numel(),
          " values");
    check(col_.scalar_type() == ScalarType::Byte && col_.dim() == 2,
          "col_indices of a 2:4 layer must be a uint8 matrix, but is ", rk::type_name(col_.scalar_type()),
          " with ", col_.dim(), " dimension(s)");
    const int64_t bytes = ceil_divide(kept.k, 8);
    check(col_.size(0) == kept.n && col_.size(1) == bytes, "col_indices of a 2:4 layer must have shape [",
          kept.n, ", ", bytes, "], but has ", shape_of(col_));
    kept.rows = kept.columns = kept.tiles = 1;
    kept.block_columns = kept.k;
  }

  void blocks(int64_t rows, int64_t columns) {
    constexpr int64_t most = INT32_MAX;
    check(rows > 0 && columns > 0, "blocks must not be empty, but are ", rows, " x ", columns);
    kept.crow_64 = is_64(crow_, "crow_indices"), kept.col_64 = is_64(col_, "col_indices");
    const int64_t block_rows = ceil_divide(kept.n, rows), count = col_.numel();
    check(crow_.numel() == block_rows + 1, "crow_indices must have ", block_rows + 1, " values, but has ",
          crow_.numel());
    check(rows <= most && columns <= most && rows * columns <= most && count <= most / (rows * columns),
          "a layer can keep at most ", most, " weights, but has ", count, " blocks of ", rows, " x ",
          columns);
    kept.count = static_cast<int32_t>(count);
    kept.rows = static_cast<int32_t>(rows), kept.columns = static_cast<int32_t>(columns);
    kept.block_columns = static_cast<int32_t>(ceil_divide(kept.k, columns));
    kept.tiles = static_cast<int32_t>(ceil_divide(rows, tile_rows()));
  }

  static bool is_64(const Tensor& t, const char* name) {
    const ScalarType type = t.scalar_type();
    check(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64, but is ",
          rk::type_name(type));
    rk::check_dim(t, 1, name);
    return type == ScalarType::Long;
  }

  Tensor crow_, col_;
};

// The operands of a layer, and where its weights are.
class Layer : public rk::SparseArguments {
 public:
  explicit Layer(const rk::SparseLinear& o)
      : SparseArguments(o), structure(o.crow_indices, o.col_indices, n, k, block_rows(), block_columns()) {
    check_count(structure.kept.count);
    set_values(values);
  }

  // Makes floats of values whose groups of columns have scales of their own.
  void scale_values(const Device& device) {
    Kept of_rows = structure.kept;
    of_rows.tiles = of_rows.rows;
    const Tensor out = device.empty(structure.value_shape(), ScalarType::Float);
    const int64_t tiles = ceil_divide(of_rows.n, of_rows.rows) * of_rows.rows;
    const rk::ScaleArguments a{data(scales), static_cast<int32_t>(ceil_divide(of_rows.k, group)),
                               group == 32   ? 5
                               : group == 64 ? 6
                                             : 7,
                               tiles, static_cast<float*>(out.data_ptr())};
    RK_LAUNCH(rk::scale_values_kernel, grid_of(ceil_divide(tiles, rk::sparse_warps), 1),
              dim3(rk::sparse_lanes), 0, device.stream, of_rows, a);
    set_values(out);
    values = out;
  }

  // Whether rows are multiplied as bytes.
  bool integers() const { return quantizes() && group == 0; }
  Product product() const {
    if (!integers()) return Product::floats;
    return structure.kept.two_of_four || structure.kept.columns % 4 == 0 ? Product::fours : Product::bytes;
  }
  const float* row_scales() const { return group == 0 ? data(scales) : nullptr; }
  const float* input_qparams() const { return data(qparams); }
  rk::Finish finish(const Tensor& out, ElementType type) const {
    return {bias.has_value() ? bias->data_ptr() : nullptr,
            bias.has_value() ? float_type(bias->scalar_type(), "bias") : ElementType::f32,
            out.data_ptr(),
            type,
            epilogue,
            structure.kept.n};
  }

 private:
  void set_values(const Tensor& given) {
    Kept& kept = structure.kept;
    kept.values = static_cast<const char*>(given.data_ptr());
    kept.type =
        given.scalar_type() == ScalarType::Char ? ElementType::i8 : float_type(given.scalar_type(), "values");
    const uintptr_t alignment = kept.type == ElementType::i8 ? 4 : kept.type == ElementType::f32 ? 16 : 8;
    kept.wide = reinterpret_cast<uintptr_t>(kept.values) % alignment == 0;
  }

  static const float* data(const std::optional<Tensor>& t) {
    return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr;
  }

 public:
  Structure structure;
};

// Returns the number of lanes for the work, a power of two.
int32_t lanes_for(int64_t work, int32_t least) {
  int32_t lanes = least;
  while (lanes < rk::warp_lanes && lanes < work) lanes *= 2;
  return lanes;
}

// A matrix of rows with the other dimension first, whose rows are aligned to four elements and end with
// zeros.
struct Transposed {
  Tensor memory;
  const char* data;
  int64_t stride;  // bytes
  int32_t padded_m;

  Transposed(const char* from, int64_t from_stride, int64_t size, int64_t m, int64_t columns,
             const Device& device)
      : memory(device.empty({columns * ceil_divide(m, 4) * 4 * size}, ScalarType::Byte)),
        data(static_cast<const char*>(memory.data_ptr())),
        stride(ceil_divide(m, 4) * 4 * size),
        padded_m(static_cast<int32_t>(ceil_divide(m, 4) * 4)) {
    const int64_t across = ceil_divide(columns, rk::warp_lanes);
    const rk::TransposeArguments a{from,
                                   static_cast<char*>(memory.data_ptr()),
                                   from_stride,
                                   stride,
                                   static_cast<int32_t>(m),
                                   padded_m,
                                   static_cast<int32_t>(columns),
                                   static_cast<int32_t>(across),
                                   size == 4};
    if (m == 0) return;
    RK_LAUNCH(rk::transpose_kernel, grid_of(ceil_divide(m, rk::warp_lanes), across), dim3(rk::sparse_lanes),
              0, device.stream, a);
  }
};

int64_t size_of(ElementType type) { return type == ElementType::f32 ? 4 : 2; }

template <int TileRows, Product P>
void launch(const Kept& kept, rk::SparseInput& a, bool few, const Device& device) {
  const dim3 block(rk::sparse_lanes);
  const int64_t across = ceil_divide(a.tiles, rk::sparse_lanes / a.lanes);
  const int64_t down = ceil_divide(a.m, few ? rk::few_tile : rk::lane_rows * a.lanes);
  const dim3 grid = grid_of(down, across);
  a.across = static_cast<int32_t>(across);
  if (few) {
    RK_LAUNCH((rk::few_rows_kernel<TileRows, P>), grid, block, 0, device.stream, kept, a);
  } else {
    RK_LAUNCH((rk::many_rows_kernel<TileRows, P>), grid, block, 0, device.stream, kept, a);
  }
}

template <int TileRows>
void launch(const Layer& layer, rk::SparseInput& a, bool few, const Device& device) {
  const Kept& kept = layer.structure.kept;
  switch (layer.product()) {
    case Product::floats:
      return launch<TileRows, Product::floats>(kept, a, few, device);
    case Product::bytes:
      return launch<TileRows, Product::bytes>(kept, a, few, device);
    case Product::fours:
      return launch<TileRows, Product::fours>(kept, a, few, device);
  }
}

// Up to here units are shared out among lanes. Beyond, a lane has rows of the input of its own.
constexpr int64_t few_rows = 16;
// Elements of the input that are transposed at a time, 16 MB, unless 128 rows are more: temporaries stay
// small, however many rows there are.
constexpr int64_t at_once = int64_t{1} << 22;

// Rows [first, first + m) of the input.
void run(const Layer& layer, const Rows& x, int64_t first, int64_t m, const rk::Finish& finish,
         const Device& device) {
  const bool few = m <= few_rows;
  const int64_t k = layer.structure.kept.k;
  rk::SparseInput a{};
  a.x = x.data() + first * x.stride, a.stride = x.stride, a.type = x.type;
  a.m = static_cast<int32_t>(m);
  a.tiles = layer.structure.tiles();
  // Eight units a lane, and four rows of the input.
  a.lanes = few ? lanes_for(ceil_divide(layer.structure.units(layer.product() == Product::fours), 8),
                            rk::least_group)
                : lanes_for(ceil_divide(m, rk::lane_rows), 8);
  a.scales = layer.row_scales();
  a.finish = finish;
  std::optional<rk::QuantizedRows> quantized;
  std::optional<Transposed> transposed;
  int64_t size = size_of(x.type), columns = k;
  std::optional<Tensor> floats;
  if (layer.quantizes()) {
    quantized.emplace(x, first, m, k, layer.input_qparams(), device);
    a.row_scale = quantized->scale, a.row_zero = quantized->zero;
    size = 4;
  }
  if (layer.integers()) {
    a.x = reinterpret_cast<const char*>(quantized->q), a.stride = quantized->stride;
    columns = ceil_divide(k, 4);
  } else if (layer.quantizes()) {
    floats = device.empty({m * k}, ScalarType::Float);
    a.x = static_cast<const char*>(floats->data_ptr()), a.stride = 4 * k, a.type = ElementType::f32;
    const rk::DequantizeArguments of{quantized->q,
                                     quantized->stride,
                                     quantized->scale,
                                     quantized->zero,
                                     static_cast<float*>(floats->data_ptr()),
                                     static_cast<int32_t>(k)};
    RK_LAUNCH(rk::dequantize_rows_kernel, grid_of(m, 1), dim3(rk::sparse_lanes), 0, device.stream, of);
  }
  if (!few) {
    transposed.emplace(a.x, a.stride, size, m, columns, device);
    a.x = transposed->data, a.stride = transposed->stride;
  }
  layer.structure.tile_rows() == 4 ? launch<4>(layer, a, few, device) : launch<1>(layer, a, few, device);
}

Tensor sparse_linear(const rk::SparseLinear& o) {
  float_type(o.input.scalar_type(), "input");
  const ElementType out_type = float_type(o.dtype, "dtype");
  Layer layer(o);
  const int64_t n = layer.n, k = layer.k;
  const std::vector<int64_t> sizes = rk::output_shape(o.input, n, k);
  rk::check_device(o.input, layer.values, "input", "values");
  const Device device(o.input);
  const Tensor out = device.empty(sizes, o.dtype);
  if (out.numel() == 0) return out;
  if (layer.group > 0) layer.scale_values(device);
  const Rows x(o.input, k, "input");
  const int64_t step = std::max<int64_t>(128, at_once / k / 128 * 128);
  for (int64_t first = 0; first < x.m; first += step) {
    rk::Finish finish = layer.finish(out, out_type);
    finish.out = static_cast<char*>(finish.out) + first * n * size_of(out_type);
    run(layer, x, first, std::min(step, x.m - first), finish, device);
  }
  return out;
}

Tensor sparse_weight_gradient(const rk::SparseWeightGradient& o) {
  for (const auto& [t, name] : {std::pair{&o.grad_output, "grad_output"}, std::pair{&o.input, "input"}}) {
    float_type(t->scalar_type(), name);
    rk::check_dim(*t, 2, name);
    rk::check_device(*t, o.col_indices, name, "col_indices");
  }
  rk::check_device(o.crow_indices, o.col_indices, "crow_indices", "col_indices");
  const ElementType type = float_type(o.dtype, "dtype");
  const int64_t m = o.input.size(0), n = o.grad_output.size(1), k = o.input.size(1);
  check(o.grad_output.size(0) == m, "grad_output must have as many rows as input, ", m, ", but has ",
        o.grad_output.size(0));
  check(m <= INT32_MAX - 64, "a call on a GPU takes fewer than 2^31 rows, but has ", m);
  const Structure structure(o.crow_indices, o.col_indices, n, k, o.block_rows, o.block_columns);
  const Device device(o.col_indices);
  const Tensor out = device.empty(structure.value_shape(), o.dtype);
  if (out.numel() == 0) return out;
  const Rows grads(o.grad_output, n, "grad_output"), rows(o.input, k, "input");
  const Transposed grad(grads.data(), grads.stride, size_of(grads.type), m, n, device);
  const Transposed x(rows.data(), rows.stride, size_of(rows.type), m, k, device);
  const rk::GradientArguments a{grad.data,
                                x.data,
                                grad.stride,
                                x.stride,
                                grads.type,
                                rows.type,
                                type,
                                x.padded_m,
                                lanes_for(ceil_divide(m, rk::lane_rows), rk::least_group),
                                structure.tiles(),
                                out.data_ptr()};
  const dim3 grid = grid_of(ceil_divide(a.tiles, rk::sparse_warps), 1), block(rk::sparse_lanes);
  if (structure.tile_rows() == 4) {
    RK_LAUNCH(rk::weight_gradient_kernel<4>, grid, block, 0, device.stream, structure.kept, a);
  } else {
    RK_LAUNCH(rk::weight_gradient_kernel<1>, grid, block, 0, device.stream, structure.kept, a);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RK_LIBRARY, RK_DEVICE_KEY, m) {
  rk::implement<&sparse_linear>(m);
  rk::implement<&sparse_linear>(m, "sparse_layer");
  rk::implement<&sparse_weight_gradient>(m);
}

#endif
