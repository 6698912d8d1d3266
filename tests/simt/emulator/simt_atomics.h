// Atomic operations. One thread runs at a time, so each is atomic by itself; but other threads may run before
// it.
#pragma once

namespace simt {

// Reads what is there, writes what `change` makes of it, gives what was there. Through the compiler's atomic
// accesses, by which the sanitizers (and the checked build) know what they are.
template <typename T, typename Change>
__attribute__((always_inline)) inline T atomic(const char* what, T* address, Change change) {
  using Bits =
      std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  check_aligned(what, address);
  before_atomic(what, address);
  Bits* place = reinterpret_cast<Bits*>(address);
  const T old = bits<T>(__atomic_load_n(place, __ATOMIC_RELAXED));
  __atomic_store_n(place, bits<Bits>(change(old)), __ATOMIC_RELAXED);
  return old;
}

}  // namespace simt

#define RK_SIMT_ATOMIC_SCOPE(name, suffix, T, expression)                             \
  __attribute__((always_inline)) inline T name##suffix(T* address, T value) {         \
    return simt::atomic(#name #suffix, address,                                       \
                        [value]([[maybe_unused]] T old) -> T { return expression; }); \
  }
#define RK_SIMT_ATOMIC(name, T, expression)         \
  RK_SIMT_ATOMIC_SCOPE(name, , T, expression)       \
  RK_SIMT_ATOMIC_SCOPE(name, _block, T, expression) \
  RK_SIMT_ATOMIC_SCOPE(name, _system, T, expression)

RK_SIMT_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
RK_SIMT_ATOMIC(atomicAdd, unsigned, old + value)
RK_SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
RK_SIMT_ATOMIC(atomicAdd, float, old + value)
RK_SIMT_ATOMIC(atomicAdd, double, old + value)
RK_SIMT_ATOMIC(atomicAdd, __half2, __hadd2(old, value))
RK_SIMT_ATOMIC(atomicAdd, __half, __hadd(old, value))
RK_SIMT_ATOMIC(atomicAdd, __nv_bfloat162, __hadd2(old, value))
RK_SIMT_ATOMIC(atomicAdd, __nv_bfloat16, __hadd(old, value))
RK_SIMT_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
RK_SIMT_ATOMIC(atomicSub, unsigned, old - value)
RK_SIMT_ATOMIC(atomicExch, int, value)
RK_SIMT_ATOMIC(atomicExch, unsigned, value)
RK_SIMT_ATOMIC(atomicExch, unsigned long long, value)
RK_SIMT_ATOMIC(atomicExch, float, value)
RK_SIMT_ATOMIC(atomicMin, int, value < old ? value : old)
RK_SIMT_ATOMIC(atomicMin, unsigned, value < old ? value : old)
RK_SIMT_ATOMIC(atomicMin, long long, value < old ? value : old)
RK_SIMT_ATOMIC(atomicMin, unsigned long long, value < old ? value : old)
RK_SIMT_ATOMIC(atomicMax, int, value > old ? value : old)
RK_SIMT_ATOMIC(atomicMax, unsigned, value > old ? value : old)
RK_SIMT_ATOMIC(atomicMax, long long, value > old ? value : old)
RK_SIMT_ATOMIC(atomicMax, unsigned long long, value > old ? value : old)
RK_SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1)
RK_SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
RK_SIMT_ATOMIC(atomicAnd, int, old& value)
RK_SIMT_ATOMIC(atomicAnd, unsigned, old& value)
RK_SIMT_ATOMIC(atomicAnd, unsigned long long, old& value)
RK_SIMT_ATOMIC(atomicOr, int, old | value)
RK_SIMT_ATOMIC(atomicOr, unsigned, old | value)
RK_SIMT_ATOMIC(atomicOr, unsigned long long, old | value)
RK_SIMT_ATOMIC(atomicXor, int, old ^ value)
RK_SIMT_ATOMIC(atomicXor, unsigned, old ^ value)
RK_SIMT_ATOMIC(atomicXor, unsigned long long, old ^ value)
#undef RK_SIMT_ATOMIC
#undef RK_SIMT_ATOMIC_SCOPE

#define RK_SIMT_CAS_SCOPE(suffix, T)                                                              \
  __attribute__((always_inline)) inline T atomicCAS##suffix(T* address, T expected, T value) {    \
    return simt::atomic("atomicCAS" #suffix, address,                                             \
                        [expected, value](T old) -> T { return old == expected ? value : old; }); \
  }
#define RK_SIMT_CAS(T)         \
  RK_SIMT_CAS_SCOPE(, T)       \
  RK_SIMT_CAS_SCOPE(_block, T) \
  RK_SIMT_CAS_SCOPE(_system, T)
RK_SIMT_CAS(int)
RK_SIMT_CAS(unsigned)
RK_SIMT_CAS(unsigned long long)
RK_SIMT_CAS(unsigned short)
#undef RK_SIMT_CAS
#undef RK_SIMT_CAS_SCOPE
