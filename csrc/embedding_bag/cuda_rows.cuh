// Rows of every type as a group of lanes reads them: each lane its share, several rows at a time.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "kernel.h"

namespace rk {

// ---- single numbers ----

template <typename Float>
__device__ __forceinline__ Float load_float(const void* data, ElementType type, int64_t at) {
  switch (type) {
    case ElementType::f64:
      return static_cast<Float>(load_constant<double>(static_cast<const double*>(data) + at));
    case ElementType::f32:
      return load_constant<float>(static_cast<const float*>(data) + at);
    case ElementType::f16:
      return f16_to_float(load_constant<unsigned short>(static_cast<const uint16_t*>(data) + at));
    default:
      return bf16_to_float(load_constant<unsigned short>(static_cast<const uint16_t*>(data) + at));
  }
}

template <typename Float>
__device__ __forceinline__ void store_float(void* data, ElementType type, int64_t at, Float x) {
  switch (type) {
    case ElementType::f64:
      static_cast<double*>(data)[at] = static_cast<double>(x);
      return;
    case ElementType::f32:
      static_cast<float*>(data)[at] = static_cast<float>(x);
      return;
    case ElementType::f16:
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(pack_f16(static_cast<float>(x), 0.0f));
      return;
    default:
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(pack_bf16(static_cast<float>(x), 0.0f));
  }
}

// ---- a lane's share of a row ----

__host__ __device__ constexpr int element_bits(ElementType type) {
  return type == ElementType::f64   ? 64
         : type == ElementType::f32 ? 32
         : type == ElementType::u8  ? 8
         : type == ElementType::u4  ? 4
                                    : 16;
}

// The columns in `bytes` bytes of a row. By shifts: the compiler does not see that element_bits are powers of
// two.
__host__ __device__ constexpr uint32_t columns_in(uint32_t bytes, ElementType type) {
  return type == ElementType::f64   ? bytes >> 3
         : type == ElementType::f32 ? bytes >> 2
         : type == ElementType::u8  ? bytes
         : type == ElementType::u4  ? bytes << 1
                                    : bytes >> 1;
}

__host__ __device__ constexpr bool is_quantized(ElementType type) {
  return type == ElementType::u8 || type == ElementType::u4;
}

// Calls f with a constant of the type, of all but float64.
template <typename F>
__device__ __forceinline__ void visit_type(ElementType type, F&& f) {
  switch (type) {
    case ElementType::f32:
      return f(std::integral_constant<ElementType, ElementType::f32>{});
    case ElementType::f16:
      return f(std::integral_constant<ElementType, ElementType::f16>{});
    case ElementType::bf16:
      return f(std::integral_constant<ElementType, ElementType::bf16>{});
    case ElementType::u8:
      return f(std::integral_constant<ElementType, ElementType::u8>{});
    default:
      return f(std::integral_constant<ElementType, ElementType::u4>{});
  }
}

// Element `e` of a share, without scale and bias.
template <ElementType T, int Words>
__device__ __forceinline__ auto element_of(const uint32_t (&word)[Words], int e) {
  if constexpr (T == ElementType::f64) {
    return bits_as<double>(static_cast<uint64_t>(word[2 * e + 1]) << 32 | word[2 * e]);
  } else if constexpr (T == ElementType::f32) {
    return bits_as<float>(word[e]);
  } else if constexpr (T == ElementType::f16) {
    return f16_to_float(word[e / 2] >> (16 * (e % 2)) & 0xffffu);
  } else if constexpr (T == ElementType::bf16) {
    return bits_as<float>(e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000u);
  } else if constexpr (T == ElementType::u8) {
    return static_cast<float>(word[e / 4] >> (8 * (e % 4)) & 255u);
  } else {
    return static_cast<float>(word[e / 8] >> (4 * (e % 8)) & 15u);
  }
}

__host__ __device__ constexpr int wide_bytes(ElementType type) { return type == ElementType::u4 ? 8 : 16; }

__host__ __device__ constexpr int log_wide_rows(ElementType type) { return type == ElementType::f32 ? 3 : 2; }

__host__ __device__ constexpr int narrow_bytes(ElementType type, uint32_t alignment) {
  if (type == ElementType::f64) return 8;
  return alignment >= 4 ? 4 : element_bits(type) == 16 ? 2 : 1;
}

// A wide share is one load of 16 bytes, the widest there is (8 bytes of int4 rows, whose 16 would be 32 sums
// a lane). Rows must be whole wide shares and aligned for them, and so must be the results.
template <ElementType T>
struct WideShare {
  using Sum = float;
  static constexpr int bytes = wide_bytes(T);
  static constexpr int words = bytes / 4;
  static constexpr int elements = bytes * 8 / element_bits(T);
  static constexpr int log_rows = log_wide_rows(T);
  static constexpr int rows = 1 << log_rows;  // at a time
  static constexpr bool one_type = true;

  static __device__ __forceinline__ constexpr bool quantized() { return is_quantized(T); }

  __device__ __forceinline__ void load(uint32_t (&word)[words], const char* p) const { load_words(word, p); }

  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
    f(std::integral_constant<ElementType, T>{});
  }

  // Writes the share whose first byte in its row is `first`.
  __device__ __forceinline__ void store(char* row, ElementType type, uint32_t first, int32_t,
                                        const float (&x)[elements]) const {
    const uint32_t column = columns_in(first, T);
    if (type == ElementType::f32) {
      uint32_t word[elements];
#pragma unroll
      for (int e = 0; e < elements; ++e) word[e] = bits_as<uint32_t>(x[e]);
      store_words(row + column * 4, word);
    } else {
      uint32_t word[elements / 2];
#pragma unroll
      for (int w = 0; w < elements / 2; ++w) {
        word[w] =
            type == ElementType::f16 ? pack_f16(x[2 * w], x[2 * w + 1]) : pack_bf16(x[2 * w], x[2 * w + 1]);
      }
      store_words(row + column * 2, word);
    }
  }
};

// A narrow share serves rows of any type and alignment: 4 bytes by one load where rows are aligned to 4, else
// one element (two of int4); one element of float64. One copy of the code for all types: the type is tested
// once for several rows.
template <typename SumType, int Elements>
struct NarrowShare {
  using Sum = SumType;
  static constexpr bool is_double = std::is_same_v<Sum, double>;
  static constexpr int words = is_double ? 2 : 1;
  static constexpr int elements = Elements;
  static constexpr int log_rows = is_double ? 2 : 3;
  static constexpr int rows = 1 << log_rows;
  static constexpr bool one_type = is_double;
  ElementType type;
  int bytes;

  __device__ __forceinline__ NarrowShare(ElementType type_arg, uint32_t alignment)
      : type(type_arg), bytes(narrow_bytes(type_arg, alignment)) {}

  __device__ __forceinline__ bool quantized() const { return elements == 8 && is_quantized(type); }

  __device__ __forceinline__ void load(uint32_t (&word)[words], const char* p) const {
    if constexpr (is_double) {
      load_words(word, p);
    } else if (bytes == 4) {
      load_words(word, p);
    } else {
      word[0] = bytes == 2 ? load_constant<unsigned short>(p) : load_constant<unsigned char>(p);
    }
  }

  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
    if constexpr (is_double) {
      f(std::integral_constant<ElementType, ElementType::f64>{});
    } else if constexpr (elements < 8) {
      if (type == ElementType::f32) {
        f(std::integral_constant<ElementType, ElementType::f32>{});
      } else if (type == ElementType::f16) {
        f(std::integral_constant<ElementType, ElementType::f16>{});
      } else {
        f(std::integral_constant<ElementType, ElementType::bf16>{});
      }
    } else {
      visit_type(static_cast<ElementType>(opaque(static_cast<int>(type))), f);
    }
  }

  // Calls f(e, column) for the share's elements.
  template <typename F>
  __device__ __forceinline__ void for_each_column(uint32_t first, int32_t dim, F&& f) const {
    const int32_t column = static_cast<int32_t>(columns_in(first, type));
    const int count = min(static_cast<int>(columns_in(bytes, type)), dim - column);
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      if (e < count) f(e, column + e);
    }
  }

  __device__ __forceinline__ void store(char* row, ElementType to, uint32_t first, int32_t dim,
                                        const Sum (&x)[elements]) const {
    const auto store_as = [&](auto constant) {
      for_each_column(first, dim, [&](int e, int32_t column) {
        store_float(row, decltype(constant)::value, column, x[e]);
      });
    };
    if (is_double || to == ElementType::f64) {
      store_as(std::integral_constant<ElementType, ElementType::f64>{});
    } else if (to == ElementType::f32) {
      store_as(std::integral_constant<ElementType, ElementType::f32>{});
    } else if (to == ElementType::f16) {
      store_as(std::integral_constant<ElementType, ElementType::f16>{});
    } else {
      store_as(std::integral_constant<ElementType, ElementType::bf16>{});
    }
  }
};

}  // namespace rk
