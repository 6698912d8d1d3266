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
#include "operands.h"

namespace {

using rk::ceil_divide;
using rk::check;
using rk::ElementType;
using rk::float_type;
using rk::grid_of;
using rk::near_columns;
using rk::ScalarType;
using rk::Scheme;
using rk::Tensor;
using Device = rk::LinearDevice;
using Rows = rk::InputRows;

struct Layer : rk::Int8Arguments {
  explicit Layer(const rk::Int8Linear& o) : Int8Arguments(o) {
    check(n < most_columns, "weight must have fewer than ", most_columns, " rows on a GPU, but has ", n);
    weight = near_columns(weight);
    if (k <= group) group = 0;
  }

  // Columns are counted in 32 bits, including those of tiles past the end.
  static constexpr int64_t most_columns = int64_t{1} << 30;

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

Tensor int8_linear(const rk::Int8Linear& o) {
  float_type(o.input.scalar_type(), "input");
  const ElementType out_type = float_type(o.dtype, "dtype");
  const Layer layer(o);
  const std::vector<int64_t> sizes = rk::output_shape(o.input, layer.n, layer.k);
  rk::check_device(o.input, o.weight, "input", "weight");
  const Device device(o.input);
  const Tensor out = device.empty(sizes, o.dtype);
  if (out.numel() == 0) return out;
  const Rows x(o.input, layer.k, "input");
  check(x.m <= INT32_MAX, "a call on a GPU takes fewer than 2^31 rows, but has ", x.m);
  const rk::Finish finish{layer.bias.has_value() ? layer.bias->data_ptr() : nullptr,
                          ElementType::f32,
                          out.data_ptr(),
                          out_type,
                          layer.epilogue,
                          static_cast<int32_t>(layer.n)};
  if (layer.scheme == Scheme::weight_only) {
    run_weight_only(layer, x, finish, device);
  } else {
    run_integers(layer, x, finish, device);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RK_LIBRARY, RK_DEVICE_KEY, m) { rk::implement<&int8_linear>(m); }

#endif
