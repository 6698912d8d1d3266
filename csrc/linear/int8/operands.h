// The operands of the int8 linear operators, for every device.
#pragma once

#include "linear/operands.h"

namespace rk {

// ---- the operand lists, in the order of the schemas in recsys_kernels/ops/linear/int8 ----

#define RK_INT8_WEIGHT(X) X(Tensor, weight) X(Tensor, weight_scale) X(int64_t, group)

#define RK_INT8_LINEAR(X) X(Tensor, input) RK_INT8_WEIGHT(X) RK_LAYER(X) X(ScalarType, dtype)
RK_OPERANDS(Int8Linear, "int8_linear", RK_INT8_LINEAR)

#define RK_INT8_PACK(X) RK_INT8_WEIGHT(X) RK_LAYER(X)
RK_OPERANDS(Int8Pack, "int8_pack", RK_INT8_PACK)

#define RK_INT8_CHAIN(X) X(Tensor, input) X(Tensor, packed) X(int64_t, out_features) X(ScalarType, dtype)
RK_OPERANDS(Int8Chain, "int8_chain", RK_INT8_CHAIN)

// ---- checks ----

// The operands of a layer, checked in the words of the reference but for what is in them.
struct Int8Arguments : LayerArguments {
  Tensor weight, scales;
  int64_t n, k, group;

  template <typename Operands>
  explicit Int8Arguments(const Operands& o)
      : LayerArguments(o), weight(o.weight), scales(o.weight_scale), group(o.group) {
    check(weight.scalar_type() == ScalarType::Char, "weight must be int8, but is ",
          type_name(weight.scalar_type()));
    check_dim(weight, 2, "weight");
    n = weight.size(0), k = weight.size(1);
    check(n >= 1 && n <= INT32_MAX && k >= 1 && k <= max_k, "weight must have at least one row and 1 to ",
          max_k, " columns (beyond, sums overflow int32), but has shape ", shape_of(weight));
    check(group == 0 || group == 32 || group == 64 || group == 128,
          "group must be 0 (none), 32, 64 or 128, but is ", group);
    check_floats(scales, "weight_scale");
    const int64_t groups = group == 0 ? 1 : (k + group - 1) / group;
    check(scales.dim() == 2 && scales.size(0) == n && scales.size(1) == groups,
          "weight_scale must have shape (", n, ", ", groups, ") for a weight of shape ", shape_of(weight),
          " and group ", group, ", but has ", shape_of(scales));
    if (bias.has_value()) {
      check_floats(*bias, "bias");
      check(bias->dim() == 1 && bias->size(0) == n, "bias must have shape (", n, ",) for a weight of shape ",
            shape_of(weight), ", but has ", shape_of(*bias));
    }
    if (qparams.has_value()) {
      check_floats(*qparams, "input_qparams");
      check(qparams->dim() == 1 && qparams->size(0) == 2, "input_qparams must have shape (2,), but has ",
            shape_of(*qparams));
    }
  }

 private:
  void check_floats(const Tensor& t, const char* name) const {
    check(t.scalar_type() == ScalarType::Float, name, " must be float32, but is ",
          type_name(t.scalar_type()));
    check_device(t, weight, name, "weight");
  }
};

}  // namespace rk
