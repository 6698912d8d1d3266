// The arguments of the embedding-bag operators, checked once for every device: types, shapes, places.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "core/device.h"
#include "core/operands.h"
#include "kernel.h"

namespace rk {

// ---- the operand lists, in the order of the schemas in recsys_kernels/ops/embedding_bag ----

#define RK_INDICES(X) X(Tensor, indices) X(OptionalTensor, offsets)

#define RK_BAGS(X) \
  RK_INDICES(X)    \
  X(OptionalTensor, per_sample_weights) X(int64_t, mode) X(int64_t, padding_idx) X(bool, include_last_offset)

#define RK_EMBEDDING_BAG(X) X(Tensor, weight) RK_BAGS(X)
RK_OPERANDS(EmbeddingBag, "embedding_bag", RK_EMBEDDING_BAG)

#define RK_EMBEDDING_BAG_MAX(X) \
  X(Tensor, weight) RK_INDICES(X) X(int64_t, padding_idx) X(bool, include_last_offset) X(bool, zero_start)
RK_OPERANDS(EmbeddingBagMax, "embedding_bag_max", RK_EMBEDDING_BAG_MAX)

#define RK_QUANTIZED_EMBEDDING_BAG(X) \
  X(Tensor, weight)                   \
  X(Tensor, scale_bias)               \
  X(int64_t, exponent) X(int64_t, embedding_dim) X(int64_t, bits) RK_BAGS(X) X(ScalarType, dtype)
RK_OPERANDS(QuantizedEmbeddingBag, "quantized_embedding_bag", RK_QUANTIZED_EMBEDDING_BAG)

#define RK_EMBEDDING_BAG_COLLECTION(X) \
  X(Tensors, weights)                  \
  X(Tensors, scale_bias)               \
  X(Tensor, plan)                      \
  X(Tensor, indices)                   \
  X(Tensor, offsets) X(OptionalTensor, per_sample_weights) X(int64_t, total_dim) X(ScalarType, dtype)
RK_OPERANDS(EmbeddingBagCollection, "embedding_bag_collection", RK_EMBEDDING_BAG_COLLECTION)

#define RK_EMBEDDING_BAG_BACKWARD(X) X(Tensor, grad) RK_BAGS(X) X(int64_t, num_embeddings)
RK_OPERANDS(EmbeddingBagBackward, "embedding_bag_backward", RK_EMBEDDING_BAG_BACKWARD)

#define RK_EMBEDDING_BAG_WEIGHTS_BACKWARD(X) \
  X(Tensor, grad)                            \
  X(Tensor, weight) RK_INDICES(X) X(int64_t, mode) X(int64_t, padding_idx) X(bool, include_last_offset)
RK_OPERANDS(EmbeddingBagWeightsBackward, "embedding_bag_weights_backward", RK_EMBEDDING_BAG_WEIGHTS_BACKWARD)

#define RK_QUANTIZE_ROWWISE(X) \
  X(Tensor, weight) X(int64_t, bits) X(int64_t, exponent) X(Tensor, rows) X(Tensor, scale_bias)
RK_OPERANDS(QuantizeRowwise, "quantize_rowwise", RK_QUANTIZE_ROWWISE)

// ---- checks ----

constexpr const char* no_max_gradient =
    "the gradient of max pooling is not a weighted sum: use embedding_bag_max";

inline ElementType row_type(ScalarType t, const char* name) {
  switch (t) {
    case ScalarType::Double:
      return ElementType::f64;
    case ScalarType::Float:
      return ElementType::f32;
    case ScalarType::Half:
      return ElementType::f16;
    case ScalarType::BFloat16:
      return ElementType::bf16;
    default:
      raise<std::runtime_error>(name, " must be a floating point tensor, but is ", type_name(t));
  }
}

// int32 or int64, contiguous.
struct IntegerArgument {
  Tensor tensor;  // keeps a contiguous copy alive
  bool is_64;

  IntegerArgument(const Tensor& t, const Tensor& first, const char* name)
      : tensor(t.is_contiguous() ? t : torch::stable::contiguous(t)) {
    check_device(t, first, name);
    const ScalarType type = t.scalar_type();
    check(type == ScalarType::Long || type == ScalarType::Int, name, " must be int32 or int64, but is ",
          type_name(type));
    is_64 = type == ScalarType::Long;
  }
};

// The bags of a call: everything that the operators share.
struct BagArguments {
  IntegerArgument indices;
  std::optional<IntegerArgument> offsets;
  std::optional<Tensor> weights;
  Bags bags;

  // All operands are where `first` is.
  template <typename Operands>
  BagArguments(const Tensor& first, const Operands& o)
      : BagArguments(first, o.indices, o.offsets, o.per_sample_weights, o.mode, o.padding_idx,
                     o.include_last_offset) {}

  BagArguments(const Tensor& first, const Tensor& indices_arg, const OptionalTensor& offsets_arg,
               const OptionalTensor& weights_arg, int64_t mode, int64_t padding_idx, bool include_last_offset)
      : indices(indices_arg, first, "indices"), bags{} {
    check(mode >= 0 && mode <= 2, "mode must be 0 (sum), 1 (mean) or 2 (max), but is ", mode);
    bags.indices = indices.tensor.data_ptr();
    bags.indices_64 = indices.is_64;
    bags.num_indices = indices.tensor.numel();
    bags.padding_idx = padding_idx;
    bags.pooling = static_cast<Pooling>(mode);
    if (offsets_arg.has_value()) {
      check_dim(indices_arg, 1, "indices (with offsets)");
      check_dim(*offsets_arg, 1, "offsets");
      offsets.emplace(*offsets_arg, first, "offsets");
      bags.offsets = offsets->tensor.data_ptr();
      bags.offsets_64 = offsets->is_64;
      bags.has_last_offset = include_last_offset;
      bags.num_bags = offsets->tensor.numel() - (include_last_offset ? 1 : 0);
      check(bags.num_bags >= 0, "include_last_offset needs at least one offset, but offsets is empty");
      // An empty tensor's null pointer would read as "every bag has the same length"; nothing reads this
      // stand-in.
      if (offsets->tensor.numel() == 0) bags.offsets = &bags;
    } else {
      check_dim(indices_arg, 2, "indices (without offsets)");
      bags.num_bags = indices_arg.size(0);
      bags.bag_length = indices_arg.size(1);
    }
    if (weights_arg.has_value()) {
      check_device(*weights_arg, first, "per_sample_weights");
      check(weights_arg->numel() == bags.num_indices,
            "per_sample_weights must have one value for each of the ", bags.num_indices, " indices, but has ",
            weights_arg->numel());
      weights = weights_arg->is_contiguous() ? *weights_arg : torch::stable::contiguous(*weights_arg);
      bags.weights = weights->data_ptr();
      bags.weights_type = row_type(weights->scalar_type(), "per_sample_weights");
    }
  }
};

// A matrix whose rows are contiguous; a copy where the columns are strided.
inline Tensor contiguous_rows(const Tensor& t, const Tensor& first, const char* name) {
  check_device(t, first, name);
  check_dim(t, 2, name);
  return t.stride(1) == 1 || t.size(1) <= 1 || t.numel() == 0 ? t : torch::stable::contiguous(t);
}

inline Table float_table(const Tensor& weight, const char* name) {
  const ElementType type = row_type(weight.scalar_type(), name);
  const int64_t size = weight.element_size();
  // A single row can have any stride.
  const int64_t stride = weight.size(0) > 1 ? weight.stride(0) * size : weight.size(1) * size;
  return {weight.data_ptr(), nullptr, weight.size(0), stride, 0, weight.size(1), type, 1.0f};
}

// A table of uint8 rows with their scales and biases; `first` is where they must be.
inline Table quantized_table(const Tensor& weight, const Tensor& scale_bias, const Tensor& first,
                             int64_t exponent, int64_t dim, int64_t bits) {
  check(bits == 8 || bits == 4, "bits must be 8 or 4, but is ", bits);
  check(weight.scalar_type() == ScalarType::Byte, "a quantized weight must be uint8, but is ",
        type_name(weight.scalar_type()));
  const int64_t bytes = bits == 8 ? dim : (dim + 1) / 2;
  check(dim > 0 && weight.size(1) == bytes, "a quantized weight of ", dim, " elements and ", bits,
        " bits must have ", bytes, " columns, but has ", weight.size(1));
  check_device(scale_bias, first, "scale_bias");
  check_dim(scale_bias, 2, "scale_bias");
  check(scale_bias.scalar_type() == ScalarType::Half && scale_bias.size(0) == weight.size(0) &&
            scale_bias.size(1) == 2 && scale_bias.stride(1) == 1,
        "scale_bias must be a float16 tensor of shape [", weight.size(0), ", 2] with contiguous rows");
  check(exponent >= -126 && exponent <= 126, "exponent must be between -126 and 126, but is ", exponent);
  const int64_t stride = weight.size(0) > 1 ? weight.stride(0) : bytes;
  return {weight.data_ptr(),
          scale_bias.data_ptr(),
          weight.size(0),
          stride,
          scale_bias.stride(0) * 2,
          dim,
          bits == 8 ? ElementType::u8 : ElementType::u4,
          std::ldexp(1.0f, static_cast<int>(exponent))};
}

}  // namespace rk
