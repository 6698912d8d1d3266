// Operands that all linear layers have, and their checks, for every device.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/operands.h"
#include "linear/types.h"

namespace rk {

inline ElementType float_type(ScalarType t, const char* name) {
  switch (t) {
    case ScalarType::Float:
      return ElementType::f32;
    case ScalarType::Half:
      return ElementType::f16;
    case ScalarType::BFloat16:
      return ElementType::bf16;
    default:
      raise<std::runtime_error>(name, " must be float32, float16 or bfloat16, but is ", type_name(t));
  }
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline Tensor contiguous_of(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

#define RK_LAYER(X) \
  X(OptionalTensor, bias) X(OptionalTensor, input_qparams) X(int64_t, scheme) X(int64_t, activation)

// The operands of RK_LAYER. Everything is checked except the tensors' values, which may be on a GPU.
struct LayerArguments {
  OptionalTensor bias, qparams;
  Scheme scheme;
  Epilogue epilogue;

  template <typename Operands>
  explicit LayerArguments(const Operands& o)
      : scheme(static_cast<Scheme>(o.scheme)), epilogue(static_cast<Epilogue>(o.activation)) {
    check(o.scheme >= 0 && o.scheme <= 2,
          "scheme must be 0 (dynamic), 1 (static) or 2 (weight_only), but is ", o.scheme);
    check(o.activation >= 0 && o.activation <= 4,
          "activation must be 0 (none), 1 (relu), 2 (gelu), 3 (sigmoid) or 4 (silu), but is ", o.activation);
    check((scheme == Scheme::fixed) == o.input_qparams.has_value(),
          "input_qparams (scale and zero point) belong to scheme 1 (static), and to no other");
    if (o.bias.has_value()) bias = contiguous_of(*o.bias);
    if (o.input_qparams.has_value()) qparams = contiguous_of(*o.input_qparams);
  }
};

// The scale and zero point of a layer that quantizes its input by fixed ones; of tensors on the CPU.
inline RowScale checked_input(float scale, float zero_point) {
  // Below, the reciprocal leaves float32.
  check(std::isfinite(scale) && scale >= 0x1p-100f,
        "the scale of static activations must be finite and at least 2^-100, but is ", scale);
  check(zero_point >= 0.0f && zero_point <= 255.0f && zero_point == std::nearbyint(zero_point),
        "the zero point of static activations must be an integer from 0 to 255, but is ", zero_point);
  return {scale, static_cast<int32_t>(zero_point)};
}

// The shape of an output: that of the input with another last dimension, which has to be `k` before.
inline std::vector<int64_t> output_shape(const Tensor& input, int64_t n, int64_t k) {
  const int64_t dim = input.dim();
  check(dim >= 1, "input must have at least 1 dimension, but has 0");
  check(input.size(dim - 1) == k, "input of shape ", shape_of(input), " does not fit a weight of shape (", n,
        ", ", k, "): its last dimension must be ", k, ", but is ", input.size(dim - 1));
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < dim; ++d) sizes.push_back(input.size(d));
  sizes.push_back(n);
  return sizes;
}

// How many columns of K share a scale of the weights [n][k]; 0: a row has one.
inline int64_t scale_group(const Tensor& scale, int64_t n, int64_t k) {
  const int64_t count = scale.dim() == 2 ? scale.size(1) : 1;
  const bool rows = scale.dim() >= 1 && scale.dim() <= 2 && scale.size(0) == n;
  if (rows && count == 1) return 0;
  std::string groups;
  int64_t before = 1;
  for (const int64_t group : {128, 64, 32}) {
    const int64_t of_group = (k + group - 1) / group;
    if (of_group == before) continue;
    if (rows && count == of_group) return group;
    groups = std::to_string(n) + " x " + std::to_string(of_group) + (groups.empty() ? "" : " or ") + groups;
    before = of_group;
  }
  if (!groups.empty()) groups = ", or " + groups + " of groups of columns";
  raise<std::runtime_error>("weight_scale must have ", n, " values", groups, ", but has shape ",
                            shape_of(scale));
}

}  // namespace rk
