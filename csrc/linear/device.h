// What the operators of linear layers share on the host of a GPU: checks, temporaries, quantized rows.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/device.h"
#include "cuda/quantize_rows.cuh"
#include "linear/operands.h"

namespace rk {

// The device of a call is the current one while it lasts, and its stream torch's current one.
struct LinearDevice {
  int32_t index;
  DeviceGuard guard;
  cudaStream_t stream;

  explicit LinearDevice(const Tensor& first)
      : index(index_of(first)), guard(index), stream(cuda_stream(index)) {}

  static int32_t index_of(const Tensor& first) {
    if (emulated) return 0;
    check(first.is_cuda(), "the CUDA kernels need CUDA tensors");
    return first.get_device_index();
  }

  // An uninitialized contiguous tensor.
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = stride;
      stride *= std::max<int64_t>(1, sizes[d]);
    }
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    const int32_t place = emulated ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
    AtenTensorHandle handle;
    const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                          strides.data(), dtype, place, index, &handle);
    check(error == AOTI_TORCH_SUCCESS, "a result of ", stride, " elements could not be allocated");
    return Tensor(handle);
  }
};

// Returns the matrix, or a copy if its rows have gaps between their elements or are far apart: kernels count
// in 32 bits within a tile.
inline Tensor near_columns(const Tensor& t) {
  constexpr int64_t far = int64_t{1} << 25;
  const bool near = (t.stride(1) == 1 || t.size(1) <= 1) && t.stride(0) < far;
  return near || t.numel() == 0 ? t : torch::stable::contiguous(t);
}

struct InputRows {
  Tensor tensor;  // [m][k], rows contiguous
  int64_t m, stride;
  ElementType type;
  bool wide;  // groups of four are aligned

  // Rows of a matrix may lie apart; others are copied if there are gaps.
  InputRows(const Tensor& input, int64_t k, const char* name)
      : tensor(input.dim() == 2 ? near_columns(input) : contiguous_of(input)),
        m(input.numel() / k),
        type(float_type(input.scalar_type(), name)) {
    const int64_t size = type == ElementType::f32 ? 4 : 2;
    stride = size * (tensor.dim() == 2 && m > 1 ? tensor.stride(0) : k);
    const uint64_t bits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) | static_cast<uint64_t>(stride);
    wide = (bits & static_cast<uint64_t>(4 * size - 1)) == 0;
  }
  const char* data() const { return static_cast<const char*>(tensor.data_ptr()); }
};

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t down, int64_t across) {
  check(down * across <= INT32_MAX, "the result is too large for one launch");
  return dim3(static_cast<unsigned>(down * across));
}

// Rows [first, first + m) of the input as bytes, on the device.
struct QuantizedRows {
  // torch hands out memory again in the order of the stream, so that this may go while it is still read.
  Tensor memory;
  int8_t* q;  // [m, up to the next multiple of 8][stride]
  float* scale;
  int32_t* zero;
  int64_t stride;

  QuantizedRows(const InputRows& x, int64_t first, int64_t m, int64_t k, const float* qparams,
                const LinearDevice& device)
      : QuantizedRows(ceil_divide(m, 8) * 8, m, ceil_divide(k, 16) * 16, device) {
    grid_of(ceil_divide(m, 8) * 8, 1);
    quantize_rows({x.data() + first * x.stride, x.stride, x.type, x.wide, static_cast<int32_t>(m),
                   static_cast<int32_t>(k), static_cast<int32_t>(stride), qparams, q, scale, zero},
                  device.stream);
  }

 private:
  QuantizedRows(int64_t rows, int64_t m, int64_t stride_arg, const LinearDevice& device)
      : memory(device.empty({rows * stride_arg + 8 * m}, ScalarType::Byte)), stride(stride_arg) {
    char* const data = static_cast<char*>(memory.data_ptr());
    q = reinterpret_cast<int8_t*>(data);
    scale = reinterpret_cast<float*>(data + rows * stride);
    zero = reinterpret_cast<int32_t*>(data + rows * stride + 4 * m);
  }
};

}  // namespace rk
