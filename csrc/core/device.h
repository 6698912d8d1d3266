// Checks of the devices of tensors.
#pragma once

#include <string>

#include "core/tensor_view.h"

namespace rk {

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() &&
         (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

// All tensors of a call are where its first one is.
inline void check_device(const Tensor& t, const Tensor& first, const char* name) {
  if (first.is_cpu()) return check_cpu(t, name);
  if (!same_device(t, first)) {
    raise<std::runtime_error>(name, " must be on ", device_name(first),
                              " like the other arguments, but is on ", device_name(t));
  }
}

// Makes the same check, with a message that names the first tensor.
inline void check_device(const Tensor& t, const Tensor& first, const char* name, const char* name_of_first) {
  if (!same_device(t, first)) {
    raise<std::runtime_error>(name, " must be on the device of ", name_of_first, " (", device_name(first),
                              "), but is on ", device_name(t));
  }
}

}  // namespace rk
