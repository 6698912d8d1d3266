// Checks, launches and registration of int8_linear for CUDA tensors. The schema is in
// recsys_kernels/ops/linear/int8.
//
// Nothing here waits for the device or reads what is there: calls can be captured in a CUDA graph. A static
// scale or zero point that is not valid gives NaN.

#include "cuda_kernel.cuh"

// nvcc compiles a file for the host and again for the GPUs. For these the kernels are all there is to do, and
// torch's headers would take longer than they.
#if !defined(__CUDA_ARCH__)

#include <torch/csrc/stable/library.h>

#include "linear/device.h"

namespace {

using rk::ceil_divide;
using rk::check;
using rk::contiguous_of;
using rk::ElementType;
using rk::float_type;
using rk::grid_of;
using rk::near_columns;
using rk::ScalarType;
using rk::Scheme;
using rk::shape_of;
using rk::Tensor;
using Device = rk::LinearDevice;
using Rows = rk::InputRows;

void check_device(const Tensor& t, const Tensor& weight, const char* name) {
  rk::check_device(t, weight, name, "weight");
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
      bias = contiguous_of(*bias_arg);
    }
    check((scheme == Scheme::fixed) == input_qparams.has_value(),
          "input_qparams (scale and zero point) belong to scheme 1 (static), and to no other");
    if (input_qparams.has_value()) {
      check_floats(*input_qparams, "input_qparams");
      check(input_qparams->dim() == 1 && input_qparams->size(0) == 2,
            "input_qparams must have shape (2,), but has ", shape_of(*input_qparams));
      qparams = contiguous_of(*input_qparams);
    }
    weight = near_columns(weight);
    if (k <= group) group = 0;
  }

  // Columns are counted in 32 bits, tiles beyond the last one as well.
  static constexpr int64_t most_columns = int64_t{1} << 30;

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
  const float* qparams =
      layer.qparams.has_value() ? static_cast<const float*>(layer.qparams->data_ptr()) : nullptr;
  const rk::QuantizedRows rows(x, 0, x.m, layer.k, qparams, device);
  rk::ProductArguments a{rows.q,
                         rows.scale,
                         rows.zero,
                         layer.weights(),
                         layer.row_stride(),
                         layer.weight_scales(),
                         layer.scale_stride(),
                         layer.group_stride(),
                         static_cast<int32_t>(x.m),
                         static_cast<int32_t>(layer.n),
                         static_cast<int32_t>(layer.k),
                         static_cast<int32_t>(rows.stride),
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
  const int64_t tile_rows = layer.group == 0 ? rk::tile_rows : rk::group_rows;
  const int64_t columns = layer.group == 0 ? rk::tile_columns : rk::group_columns;
  const int warps_down = x.m > tile_rows ? 2 : 1;
  const int64_t across = ceil_divide(layer.n, columns * (rk::int8_block_warps / warps_down));
  const dim3 grid = grid_of(ceil_divide(x.m, tile_rows * warps_down), across);
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
  const ElementType out_type = float_type(dtype, "dtype");
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
  const Tensor out = device.empty(sizes, dtype);
  if (out.numel() == 0) return out;
  const Rows x(input, layer.k, "input");
  check(x.m <= INT32_MAX, "a call on a GPU takes fewer than 2^31 rows, but has ", x.m);
  const rk::Finish finish{bias.has_value() ? layer.bias->data_ptr() : nullptr,
                          ElementType::f32,
                          out.data_ptr(),
                          out_type,
                          static_cast<rk::Epilogue>(activation),
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
