// Checks of arguments that the linear operators of every device share.
#pragma once

#include <string>

#include "core/tensor_view.h"
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
