// Checks of arguments that the linear operators of every device share.
#pragma once

#include "linear.h"
#include "tensor_view.h"

namespace rk {

inline FloatType float_type(ScalarType t, const char* name) {
  switch (t) {
    case ScalarType::Float:
      return FloatType::f32;
    case ScalarType::Half:
      return FloatType::f16;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    default:
      raise<std::runtime_error>(name, " must be float32, float16 or bfloat16, but is ", type_name(t));
  }
}

}  // namespace rk
