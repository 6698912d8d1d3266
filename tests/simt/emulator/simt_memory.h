// Loads and stores with a cache hint, fences, time.
#pragma once

namespace simt {

template <typename T>
__attribute__((always_inline)) inline T load(const char* what, const T* address) {
  check_aligned(what, address);
  return *address;
}

template <typename T>
__attribute__((always_inline)) inline void store(const char* what, T* address, T value) {
  check_aligned(what, address);
  *address = value;
}

}  // namespace simt

// Through the cache for constants: nobody may write there during the launch.
template <typename T>
__attribute__((always_inline)) inline T __ldg(const T* address) {
  simt::check_aligned("__ldg", address);
  simt::read_only(address, sizeof(T));
  return simt::load("__ldg", address);
}

#define RK_SIMT_LOAD(name)                                         \
  template <typename T>                                            \
  __attribute__((always_inline)) inline T name(const T* address) { \
    return simt::load(#name, address);                             \
  }
RK_SIMT_LOAD(__ldca)
RK_SIMT_LOAD(__ldcg)
RK_SIMT_LOAD(__ldcs)
RK_SIMT_LOAD(__ldlu)
RK_SIMT_LOAD(__ldcv)
#undef RK_SIMT_LOAD

#define RK_SIMT_STORE(name)                                              \
  template <typename T>                                                  \
  __attribute__((always_inline)) inline void name(T* address, T value) { \
    simt::store(#name, address, value);                                  \
  }
RK_SIMT_STORE(__stwb)
RK_SIMT_STORE(__stcg)
RK_SIMT_STORE(__stcs)
RK_SIMT_STORE(__stwt)
#undef RK_SIMT_STORE

inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }

inline void __nanosleep(unsigned) { simt::must_switch(); }
[[noreturn]] inline void __trap() { simt::fail("__trap"); }
inline long long clock64() { return static_cast<long long>(__builtin_ia32_rdtsc()); }
