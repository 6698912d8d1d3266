// The facts about a tensor that the operators need, checked once, with messages that name the argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "core/check.h"

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* type_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another type";
  }
}

inline void check_dim(const Tensor& t, int64_t dim, const char* name) {
  check(t.dim() == dim, name, " must have ", dim, " dimension(s), but has ", t.dim());
}

inline void check_cpu(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU like the other arguments");
}

// A 1-D or 2-D tensor of int32 or int64, contiguous.
struct Integers {
  Tensor tensor;  // keeps a contiguous copy alive
  const void* data;
  int64_t count;
  bool is_64;

  Integers(const Tensor& t, const char* name) : tensor(t.is_contiguous() ? t : torch::stable::contiguous(t)) {
    check_cpu(t, name);
    const ScalarType type = t.scalar_type();
    check(type == ScalarType::Long || type == ScalarType::Int, name, " must be int32 or int64, but is ",
          type_name(type));
    data = tensor.data_ptr();
    count = tensor.numel();
    is_64 = type == ScalarType::Long;
  }
};

// A matrix whose rows are contiguous; a copy where the columns are strided.
inline Tensor with_contiguous_rows(const Tensor& t, const char* name) {
  check_cpu(t, name);
  check_dim(t, 2, name);
  return t.stride(1) == 1 || t.size(1) <= 1 || t.numel() == 0 ? t : torch::stable::contiguous(t);
}

// An uninitialized contiguous tensor on the CPU. Through the C interface: the dispatcher's aten::empty takes
// 0.7 us, a fifth of a small lookup.
inline Tensor empty_tensor(const int64_t* sizes, int64_t dim, ScalarType type) {
  constexpr int64_t most = 64;
  int64_t strides[most];
  check(dim <= most, "a result can't have ", dim, " dimensions");
  int64_t stride = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  const AOTITorchError error =
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle);
  check(error == AOTI_TORCH_SUCCESS, "a result of ", stride, " elements could not be allocated");
  return Tensor(handle);
}

inline Tensor empty_tensor(const std::vector<int64_t>& sizes, ScalarType type) {
  return empty_tensor(sizes.data(), static_cast<int64_t>(sizes.size()), type);
}

inline Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[2] = {rows, columns};
  return empty_tensor(sizes, 2, type);
}

}  // namespace rk
