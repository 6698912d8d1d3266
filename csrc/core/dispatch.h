// The tables of functions that a family of kernels has, one for each instruction-set level.
#pragma once

#include "core/isa.h"

namespace rk {

// Kernels<T>::current() is the table of the level in use. RK_KERNEL_TABLES says where the tables of T are.
template <typename T>
struct Kernels;

template <typename T>
struct KernelsOf {
  static const T& current() { return *Kernels<T>::tables[static_cast<int>(isa())]; }
};

}  // namespace rk

// RK_KERNEL_TABLES(T, name), in the global namespace: the object of each level defines `name_<level>`. No
// function and no variable comes of it where nothing asks for a table, so that a kernel.cpp may include it.
#if RK_HIGHEST_ISA > 0
#define RK_KERNEL_TABLES(T, name)                                                        \
  extern "C" {                                                                           \
  extern const T name##_generic, name##_avx2, name##_avx512, name##_avx512_vnni;         \
  }                                                                                      \
  template <>                                                                            \
  struct rk::Kernels<T> : rk::KernelsOf<T> {                                             \
    static constexpr const T* tables[] = {&name##_generic, &name##_avx2, &name##_avx512, \
                                          &name##_avx512_vnni};                          \
  };
#else
#define RK_KERNEL_TABLES(T, name)                           \
  extern "C" {                                              \
  extern const T name##_generic;                            \
  }                                                         \
  template <>                                               \
  struct rk::Kernels<T> : rk::KernelsOf<T> {                \
    static constexpr const T* tables[] = {&name##_generic}; \
  };
#endif
