// Checks, launches and registration of int8_linear for CUDA tensors. The schema is in
// recsys_kernels/ops/int8_matmul/op.py.
//
// Nothing here waits for the device or reads what is there: calls can be captured in a CUDA graph. A static
// scale or zero point that is not valid gives NaN.

#include "cuda_kernel.cuh"

// nvcc compiles a file for the host and again for the GPUs. For these the kernels are all there is to do, and
// torch's headers would take longer than they.
#if !defined(__CUDA_ARCH__)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/linear_arguments.h"

namespace {

using rk::check;
using rk::float_type;
using rk::FloatType;
using rk::raise;
using rk::ScalarType;
using rk::Scheme;
using rk::Tensor;

std::string device_name(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

void check_device(const Tensor& t, const Tensor& weight, const char* name) {
  const bool same = t.is_cuda() == weight.is_cuda() && t.is_cpu() == weight.is_cpu() &&
                    (t.is_cpu() || t.get_device_index() == weight.get_device_index());
  if (!same) {
    raise<std::runtime_error>(name, " must be on the device of weight (", device_name(weight),
                              "), but is on ", device_name(t));
  }
}

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// The device of a call is the current one while it lasts, and its stream torch's current one.
struct Device {
  int32_t index;
  rk::DeviceGuard guard;
  cudaStream_t stream;

  explicit Device(const Tensor& first)
      : index(index_of(first)), guard(index), stream(rk::cuda_stream(index)) {}

  static int32_t index_of(const Tensor& first) {
    if (rk::emulated) return 0;
    check(first.is_cuda(), "the CUDA kernels need CUDA tensors");
    return first.get_device_index();
  }
};

// An uninitialized contiguous tensor.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Device& device) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int32_t place = rk::emulated ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), dtype, place, device.index, &handle);
  check(error == AOTI_TORCH_SUCCESS, "a result of ", stride, " elements could not be allocated");
  return Tensor(handle);
}

// The same tensor, or a copy if its rows have gaps between their elements, or are far apart: kernels count in
// 32 bits within a tile.
Tensor near_columns(const Tensor& t) {
  constexpr int64_t far = int64_t{1} << 25;
  const bool near = (t.stride(1) == 1 || t.size(1) <= 1) && t.stride(0) < far;
  return near || t.numel() == 0 ? t : torch::stable::contiguous(t);
}

// The operands of a layer, checked in the words of the reference; what is in them the kernels see.
struct Layer {
  Tensor weight, scales;
  std::optional<Tensor> bias, qparams;
  int64_t n, k, group;
  Scheme scheme;

  Layer(const Tensor& weight_arg, const Tensor& weight_scale, int64_t group_arg,
        const std::optional<Tensor>& bias_arg, const std::optional<Tensor>& input_qparams, int64_t scheme_arg,
        int64_t activation)
      : weight(weight_arg), scales(weight_scale), group(group_arg) {
    check(weight.scalar_type() == ScalarType::Char, "weight must be int8, but is ",
          rk::type_name(weight.scalar_type()));
    rk::check_dim(weight, 2, "weight");
    n = weight.size(0), k = weight.size(1);
    check(n >= 1 && k >= 1 && k <= rk::max_k, "weight must have at least one row and 1 to ", rk::max_k,
          " columns (beyond, sums overflow int32), but has shape ", shape_of(weight));
    check(n < most_columns, "weight must have fewer than ", most_columns, " rows on a GPU, but has ", n);
    check(group == 0 || group == 32 || group == 64 || group == 128,
          "group must be 0 (none), 32, 64 or 128, but is ", group);
    check(scheme_arg >= 0 && scheme_arg <= 2,
          "scheme must be 0 (dynamic), 1 (static) or 2 (weight_only), but is ", scheme_arg);
    check(activation >= 0 && activation <= 4,
          "activation must be 0 (none), 1 (relu), 2 (gelu), 3 (sigmoid) or 4 (silu), but is ", activation);
    scheme = static_cast<Scheme>(scheme_arg);
    check_floats(scales, "weight_scale");
    const int64_t groups = group == 0 ? 1 : (k + group - 1) / group;
    check(scales.dim() == 2 && scales.size(0) == n && scales.size(1) == groups,
          "weight_scale must have shape (", n, ", ", groups, ") for a weight of shape ", shape_of(weight),
          " and group ", group, ", but has ", shape_of(scales));
    if (bias_arg.has_value()) {
      check_floats(*bias_arg, "bias");
      check(bias_arg->dim() == 1 && bias_arg->size(0) == n, "bias must have shape (", n,
            ",) for a weight of shape ", shape_of(weight), ", but has ", shape_of(*bias_arg));
      bias = contiguous(*bias_arg);
    }
    check((scheme == Scheme::fixed) == input_qparams.has_value(),
          "input_qparams (scale and zero point) belong to scheme 1 (static), and to no other");
    if (input_qparams.has_value()) {
      check_floats(*input_qparams, "input_qparams");
      check(input_qparams->dim() == 1 && input_qparams->size(0) == 2,
            "input_qparams must have shape (2,), but has ", shape_of(*input_qparams));
      qparams = contiguous(*input_qparams);
    }
    weight = near_columns(weight);
    if (k <= group) group = 0;
  }

  // Columns are counted in 32 bits, tiles beyond the last one as well.
  static constexpr int64_t most_columns = int64_t{1} << 30;

  static Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

  void check_floats(const Tensor& t, const char* name) const {
    check(t.scalar_type() == ScalarType::Float, name, " must be float32, but is ",
          rk::type_name(t.scalar_type()));
    check_device(t, weight, name);
  }

  int64_t row_stride() const { return n > 1 ? weight.stride(0) : k; }
  const int8_t* weights() const { return static_cast<const int8_t*>(weight.data_ptr()); }
  const float* weight_scales() const { return static_cast<const float*>(scales.data_ptr()); }
  int64_t scale_stride() const { return scales.stride(0); }
  int64_t group_stride() const { return scales.stride(1); }
  bool aligned() const {
    return ((reinterpret_cast<uintptr_t>(weight.data_ptr()) | static_cast<uint64_t>(row_stride())) & 15) == 0;
  }
};

struct Rows {
  Tensor tensor;  // [m][k], rows contiguous
  int64_t m, stride;
  FloatType type;
  bool wide;

  // Rows of a matrix may lie apart; others are copied if there are gaps.
  Rows(const Tensor& input, int64_t k)
      : tensor(input.dim() == 2 ? near_columns(input) : Layer::contiguous(input)),
        m(input.numel() / k),
        type(float_type(input.scalar_type(), "input")) {
    const int64_t size = type == FloatType::f32 ? 4 : 2;
    stride = size * (tensor.dim() == 2 && m > 1 ? tensor.stride(0) : k);
    const uint64_t bits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) | static_cast<uint64_t>(stride);
    wide = (bits & static_cast<uint64_t>(4 * size - 1)) == 0;
  }
  const char* data() const { return static_cast<const char*>(tensor.data_ptr()); }
};

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 grid_of(int64_t down, int64_t across) {
  check(down * across <= INT32_MAX, "the result is too large for one launch");
  return dim3(static_cast<unsigned>(down * across));
}

void run_weight_only(const Layer& layer, const Rows& x, const rk::Finish& finish, const Device& device) {
  const int64_t across = ceil_divide(layer.n, rk::float_columns * rk::int8_block_warps);
  const rk::FloatArguments a{x.data(),
                             x.stride,
                             x.type,
                             x.wide,
                             layer.aligned(),
                             layer.weights(),
                             layer.row_stride(),
                             layer.weight_scales(),
                             layer.scale_stride(),
                             layer.group_stride(),
                             static_cast<int32_t>(x.m),
                             static_cast<int32_t>(layer.n),
                             static_cast<int32_t>(layer.k),
                             static_cast<int32_t>(layer.group),
                             static_cast<int32_t>(across),
                             finish};
  RK_LAUNCH(rk::weight_only_kernel, grid_of(ceil_divide(x.m, rk::float_rows), across),
            dim3(rk::int8_block_lanes), 0, device.stream, a);
}

void run_integers(const Layer& layer, const Rows& x, const rk::Finish& finish, const Device& device) {
  const int64_t q_stride = ceil_divide(layer.k, 16) * 16;
  // torch hands out memory again in the order of the stream, so that this may go while it is still read.
  const int64_t rows_of_q = ceil_divide(x.m, 8) * 8;
  const Tensor scratch = empty({rows_of_q * q_stride + 8 * x.m}, ScalarType::Byte, device);
  char* const memory = static_cast<char*>(scratch.data_ptr());
  int8_t* const q = reinterpret_cast<int8_t*>(memory);
  float* const row_scale = reinterpret_cast<float*>(memory + rows_of_q * q_stride);
  int32_t* const row_zero = reinterpret_cast<int32_t*>(memory + rows_of_q * q_stride + 4 * x.m);
  const rk::QuantizeArguments quantize{
      x.data(),
      x.stride,
      x.type,
      x.wide,
      static_cast<int32_t>(x.m),
      static_cast<int32_t>(layer.k),
      static_cast<int32_t>(q_stride),
      layer.qparams.has_value() ? static_cast<const float*>(layer.qparams->data_ptr()) : nullptr,
      q,
      row_scale,
      row_zero};
  const int64_t lanes = std::min<int64_t>(rk::int8_block_lanes, ceil_divide(layer.k, 8 * 32) * 32);
  RK_LAUNCH(rk::quantize_rows_kernel, grid_of(rows_of_q, 1), dim3(static_cast<unsigned>(lanes)), 0,
            device.stream, quantize);
  rk::ProductArguments a{q,
                         row_scale,
                         row_zero,
                         layer.weights(),
                         layer.row_stride(),
                         layer.weight_scales(),
                         layer.scale_stride(),
                         layer.group_stride(),
                         static_cast<int32_t>(x.m),
                         static_cast<int32_t>(layer.n),
                         static_cast<int32_t>(layer.k),
                         static_cast<int32_t>(q_stride),
                         static_cast<int32_t>(layer.group == 0 ? layer.k : layer.group),
                         0,
                         layer.aligned(),
                         finish};
  // Up to here rows fit into two tiles, and reading weights is all the work: shared out by pieces of K.
  constexpr int64_t few_rows = 32;
  if (layer.group == 0 && x.m <= few_rows) {
    const int64_t across = ceil_divide(layer.n, rk::split_columns);
    a.blocks_across = static_cast<int32_t>(across);
    RK_LAUNCH(rk::split_product_kernel, grid_of(ceil_divide(x.m, 16), across), dim3(rk::int8_block_lanes), 0,
              device.stream, a);
    return;
  }
  const int64_t rows = layer.group == 0 ? rk::tile_rows : rk::group_rows;
  const int64_t columns = layer.group == 0 ? rk::tile_columns : rk::group_columns;
  const int warps_down = x.m > rows ? 2 : 1;
  const int64_t across = ceil_divide(layer.n, columns * (rk::int8_block_warps / warps_down));
  const dim3 grid = grid_of(ceil_divide(x.m, rows * warps_down), across);
  a.blocks_across = static_cast<int32_t>(across);
  if (layer.group == 0) {
    RK_LAUNCH(rk::tile_product_kernel, grid, dim3(rk::int8_block_lanes), 0, device.stream, a, warps_down);
  } else {
    RK_LAUNCH(rk::group_product_kernel, grid, dim3(rk::int8_block_lanes), 0, device.stream, a, warps_down);
  }
}

Tensor int8_linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, int64_t group,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& input_qparams,
                   int64_t scheme, int64_t activation, ScalarType dtype) {
  float_type(input.scalar_type(), "input");
  const FloatType out_type = float_type(dtype, "dtype");
  const Layer layer(weight, weight_scale, group, bias, input_qparams, scheme, activation);
  const int64_t dim = input.dim();
  check(dim >= 1, "input must have at least 1 dimension, but has 0");
  check_device(input, weight, "input");
  check(input.size(dim - 1) == layer.k, "input of shape ", shape_of(input),
        " does not fit a weight of shape ", shape_of(weight), ": its last dimension must be ", layer.k,
        ", but is ", input.size(dim - 1));
  const Device device(input);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < dim; ++d) sizes.push_back(input.size(d));
  sizes.push_back(layer.n);
  const Tensor out = empty(sizes, dtype, device);
  if (out.numel() == 0) return out;
  const Rows x(input, layer.k);
  check(x.m <= INT32_MAX, "a call on a GPU takes fewer than 2^31 rows, but has ", x.m);
  const rk::Finish finish{bias.has_value() ? static_cast<const float*>(layer.bias->data_ptr()) : nullptr,
                          out.data_ptr(), out_type, static_cast<rk::Epilogue>(activation),
                          static_cast<int32_t>(layer.n)};
  if (layer.scheme == Scheme::weight_only) {
    run_weight_only(layer, x, finish, device);
  } else {
    run_integers(layer, x, finish, device);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RK_LIBRARY, RK_DEVICE_KEY, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear)); }

#endif
