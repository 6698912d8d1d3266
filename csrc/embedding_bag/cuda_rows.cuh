// Rows of every type as a group of lanes reads them: loads of 16 bytes a lane, several rows at a time.
#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "kernel.h"

namespace rk {

// ---- single numbers ----

template <typename Float>
__device__ __forceinline__ Float load_float(const void* data, RowType type, int64_t at) {
  switch (type) {
    case RowType::f64:
      return static_cast<Float>(load_constant<double>(static_cast<const double*>(data) + at));
    case RowType::f32:
      return load_constant<float>(static_cast<const float*>(data) + at);
    case RowType::f16:
      return f16_to_float(load_constant<unsigned short>(static_cast<const uint16_t*>(data) + at));
    default:
      return bf16_to_float(load_constant<unsigned short>(static_cast<const uint16_t*>(data) + at));
  }
}

template <typename Float>
__device__ __forceinline__ void store_float(void* data, RowType type, int64_t at, Float x) {
  switch (type) {
    case RowType::f64:
      static_cast<double*>(data)[at] = static_cast<double>(x);
      return;
    case RowType::f32:
      static_cast<float*>(data)[at] = static_cast<float>(x);
      return;
    case RowType::f16:
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(pack_f16(static_cast<float>(x), 0.0f));
      return;
    default:
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(pack_bf16(static_cast<float>(x), 0.0f));
  }
}

// ---- a lane's share of a row ----

// Rows are read by groups of lanes, each lane its share. A wide share is one load of 16 bytes, the widest
// there is (8 bytes of int4 rows, whose 16 bytes would be 32 sums a lane), and of as many rows at a time as
// the registers hold. Tables whose rows are not aligned for that are read in narrow shares of 4 bytes, by one
// load, or by one an element where rows are not even aligned to 4.
template <RowType T, bool Wide>
struct Row {
  using Sum = std::conditional_t<T == RowType::f64, double, float>;
  static constexpr int element_bits = T == RowType::f64   ? 64
                                      : T == RowType::f32 ? 32
                                      : T == RowType::u8  ? 8
                                      : T == RowType::u4  ? 4
                                                          : 16;
  static constexpr int bytes = !Wide ? (T == RowType::f64 ? 8 : 4) : T == RowType::u4 ? 8 : 16;
  static constexpr int elements = bytes * 8 / element_bits;
  static constexpr int words = bytes / 4;
  // Bytes of the narrowest load.
  static constexpr int unit = element_bits < 8 ? 1 : element_bits / 8;
};

template <RowType T>
constexpr bool is_quantized_row = T == RowType::u8 || T == RowType::u4;

// Which bytes of every row a lane holds: `bytes` of them from `first` on; or, if `step` is not 0, one unit
// each `step` bytes, which puts the lanes of a group side by side in every load.
struct Share {
  uint32_t first;
  uint32_t step;
  uint32_t row_bytes;
};

template <RowType T, bool Wide>
__device__ __forceinline__ void load_share(uint32_t (&word)[Row<T, Wide>::words], const char* p,
                                           const Share& share) {
  using R = Row<T, Wide>;
  if (Wide || R::unit >= 4 || share.step == 0) {
    load_words(word, p);
    return;
  }
  if constexpr (!Wide && R::unit < 4) {
    word[0] = 0;
#pragma unroll
    for (int i = 0; i < 4 / R::unit; ++i) {
      if (share.first + i * share.step < share.row_bytes) {
        const uint32_t v = load_constant<typename VectorOf<R::unit>::type>(p + i * share.step);
        word[0] |= v << (8 * R::unit * i);
      }
    }
  }
}

// A share's elements, in the order of its bytes; of quantized rows without scale and bias.
template <RowType T, bool Wide>
__device__ __forceinline__ void unpack(const uint32_t (&word)[Row<T, Wide>::words],
                                       typename Row<T, Wide>::Sum (&x)[Row<T, Wide>::elements]) {
#pragma unroll
  for (int e = 0; e < Row<T, Wide>::elements; ++e) {
    if constexpr (T == RowType::f64) {
      x[e] = bits_as<double>(static_cast<uint64_t>(word[2 * e + 1]) << 32 | word[2 * e]);
    } else if constexpr (T == RowType::f32) {
      x[e] = bits_as<float>(word[e]);
    } else if constexpr (T == RowType::f16) {
      x[e] = f16_to_float(word[e / 2] >> (16 * (e % 2)));
    } else if constexpr (T == RowType::bf16) {
      x[e] = bits_as<float>(e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000u);
    } else if constexpr (T == RowType::u8) {
      x[e] = static_cast<float>(word[e / 4] >> (8 * (e % 4)) & 255u);
    } else {
      x[e] = static_cast<float>(word[e / 8] >> (4 * (e % 8)) & 15u);
    }
  }
}

// ---- results ----

// Not of quantized types, which are no results.
__host__ __device__ constexpr int float_bytes(RowType type) {
  return type == RowType::f64 ? 8 : type == RowType::f32 ? 4 : 2;
}

// The columns of a lane's share.
template <RowType T, bool Wide>
struct Columns {
  using R = Row<T, Wide>;
  static constexpr int elements = R::elements;
  static constexpr int unit_elements = R::unit * 8 / R::element_bits;
  int32_t first;
  int32_t step;  // 0: the share is contiguous
  int32_t dim;

  __device__ __forceinline__ Columns(const Share& share, int32_t dim_arg)
      : first(static_cast<int32_t>(share.first / R::unit) * unit_elements),
        step(static_cast<int32_t>(share.step / R::unit) * unit_elements),
        dim(dim_arg) {}

  // The column of the share's element `e`; not of the row if it is not below `dim`.
  __device__ __forceinline__ int32_t at(int e) const {
    if (Wide || R::unit >= 4 || step == 0) return first + e;
    return first + e / unit_elements * step + e % unit_elements;
  }

  // Writes the share to a row of results. Wide shares are in rows of whole shares whose results are aligned
  // to 16 bytes, and of type float64 only if the table is.
  template <typename Sum>
  __device__ __forceinline__ void store(char* row, RowType type, const Sum (&x)[elements]) const {
    if constexpr (!Wide) {
      if (type == RowType::f64) {
        store_each<RowType::f64>(row, x);
      } else if (T == RowType::f64) {
        return;
      } else if (type == RowType::f32) {
        store_each<RowType::f32>(row, x);
      } else if (type == RowType::f16) {
        store_each<RowType::f16>(row, x);
      } else {
        store_each<RowType::bf16>(row, x);
      }
    } else if (first >= dim) {
      return;
    } else if constexpr (T == RowType::f64) {
      const uint64_t low = bits_as<uint64_t>(x[0]), high = bits_as<uint64_t>(x[1]);
      store_words(row + first * 8, {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                                    static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)});
    } else if (type == RowType::f32) {
      uint32_t word[elements];
#pragma unroll
      for (int e = 0; e < elements; ++e) word[e] = bits_as<uint32_t>(x[e]);
      store_words(row + first * 4, word);
    } else {
      uint32_t word[elements / 2];
#pragma unroll
      for (int w = 0; w < elements / 2; ++w) {
        const float low = x[2 * w], high = x[2 * w + 1];
        word[w] = type == RowType::f16 ? pack_f16(low, high) : pack_bf16(low, high);
      }
      store_words(row + first * 2, word);
    }
  }

 private:
  template <RowType Out, typename Sum>
  __device__ __forceinline__ void store_each(char* row, const Sum (&x)[elements]) const {
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      if (at(e) < dim) store_float(row, Out, at(e), x[e]);
    }
  }
};

}  // namespace rk
