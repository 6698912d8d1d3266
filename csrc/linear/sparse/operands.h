// The operands of the sparse linear operators, for every device.
#pragma once

#include "linear/operands.h"

namespace rk {

// ---- the operand lists, in the order of the schemas in recsys_kernels/ops/linear/sparse ----

#define RK_KEPT(X) X(Tensor, crow_indices) X(Tensor, col_indices)

#define RK_SPARSE_WEIGHT(X) \
  X(Tensor, values)         \
  RK_KEPT(X) X(int64_t, out_features) X(int64_t, in_features) X(OptionalTensor, weight_scale)

#define RK_SPARSE_LINEAR(X) X(Tensor, input) RK_SPARSE_WEIGHT(X) RK_LAYER(X) X(ScalarType, dtype)
RK_OPERANDS(SparseLinear, "sparse_linear", RK_SPARSE_LINEAR)

#define RK_SPARSE_PACK(X) RK_SPARSE_WEIGHT(X) RK_LAYER(X) X(int64_t, kind)
RK_OPERANDS(SparsePack, "sparse_pack", RK_SPARSE_PACK)

#define RK_SPARSE_PACKED(X) X(Tensor, input) X(Tensor, packed) X(int64_t, out_features) X(ScalarType, dtype)
RK_OPERANDS(SparsePacked, "sparse_packed", RK_SPARSE_PACKED)

#define RK_SPARSE_REPACK(X) X(Tensor, places) X(Tensor, values) X(OptionalTensor, bias)
RK_OPERANDS(SparseRepack, "sparse_repack", RK_SPARSE_REPACK)

#define RK_SPARSE_WEIGHT_GRADIENT(X) \
  X(Tensor, grad_output)             \
  X(Tensor, input) RK_KEPT(X) X(int64_t, block_rows) X(int64_t, block_columns) X(ScalarType, dtype)
RK_OPERANDS(SparseWeightGradient, "sparse_weight_gradient", RK_SPARSE_WEIGHT_GRADIENT)

// ---- checks ----

// The operands of a layer, checked but for what is in them and for where weights are.
struct SparseArguments : LayerArguments {
  Tensor values;
  OptionalTensor scales;
  ElementType type;  // of the values
  int64_t n, k;
  int64_t group = 0;  // of columns that share a scale; 0: a row has one

  template <typename Operands>
  explicit SparseArguments(const Operands& o)
      : LayerArguments(o), values(contiguous_of(o.values)), n(o.out_features), k(o.in_features) {
    constexpr int64_t most = INT32_MAX - 64;
    check(n >= 1 && n <= most, "out_features must be 1 to ", most, ", but is ", n);
    check(k >= 1 && k <= most, "in_features must be 1 to ", most, ", but is ", k);
    type = type_of(values.scalar_type());
    check(values.dim() >= 1 && values.dim() <= 3, "values must have 1, 2 or 3 dimensions, but has ",
          values.dim());
    check(values.dim() < 3 || (values.size(1) > 0 && values.size(2) > 0),
          "blocks of values must not be empty, but "
          "values has shape ",
          shape_of(values));
    check_device(o.crow_indices, values, "crow_indices", "values");
    check_device(o.col_indices, values, "col_indices", "values");
    const bool quantized = type == ElementType::i8;
    check(quantized == o.weight_scale.has_value(), "weight_scale belongs to int8 values, and to no other");
    check(quantized || scheme == Scheme::weight_only,
          "float values take scheme 2 (weight only), but scheme is ", o.scheme);
    check(!quantizes() || k <= max_k, "int8 products take at most ", max_k,
          " inputs (beyond, sums overflow int32), but in_features is ", k);
    if (quantized) {
      check(o.weight_scale->scalar_type() == ScalarType::Float, "weight_scale must be float32, but is ",
            type_name(o.weight_scale->scalar_type()));
      check_device(*o.weight_scale, values, "weight_scale", "values");
      group = scale_group(*o.weight_scale, n, k);
      scales = contiguous_of(*o.weight_scale);
    }
    if (bias.has_value()) check_vector(*bias, "bias", n);
    if (qparams.has_value()) {
      check(qparams->scalar_type() == ScalarType::Float, "input_qparams must be float32, but is ",
            type_name(qparams->scalar_type()));
      check_vector(*qparams, "input_qparams", 2);
    }
  }

  // 0 where two of four are kept.
  int64_t block_rows() const { return values.dim() == 3 ? values.size(1) : values.dim() == 1; }
  int64_t block_columns() const { return values.dim() == 3 ? values.size(2) : values.dim() == 1; }
  // Whether rows are quantized.
  bool quantizes() const { return scheme != Scheme::weight_only; }

  // Whether there are as many values as places for them.
  void check_count(int64_t blocks) const {
    if (values.dim() == 2) {
      const int64_t kept = (k + 3) / 4 * 2;
      check(values.size(0) == n && values.size(1) == kept, "values of a 2:4 layer must have shape [", n, ", ",
            kept, "], but has [", values.size(0), ", ", values.size(1), "]");
    } else {
      check(values.size(0) == blocks, "values must have as many ", values.dim() == 3 ? "blocks" : "elements",
            " as col_indices, ", blocks, ", but has ", values.size(0));
    }
  }

 private:
  static ElementType type_of(ScalarType t) {
    if (t == ScalarType::Char) return ElementType::i8;
    check(t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16,
          "values must be float32, float16, bfloat16 or int8, but is ", type_name(t));
    return float_type(t, "values");
  }

  void check_vector(const Tensor& t, const char* name, int64_t count) const {
    float_type(t.scalar_type(), name);
    check_device(t, values, name, "values");
    check(t.dim() == 1 && t.size(0) == count, name, " must have ", count, " values, but has shape ",
          shape_of(t));
  }
};

}  // namespace rk
