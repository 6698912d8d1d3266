// Barriers, shuffles, votes and reductions of a warp or block.
#pragma once

#define RK_SIMT_INLINE __attribute__((always_inline)) inline

RK_SIMT_INLINE void __syncthreads() { simt::barrier("__syncthreads", false); }
RK_SIMT_INLINE int __syncthreads_count(int predicate) {
  return static_cast<int>(simt::barrier("__syncthreads_count", predicate != 0));
}
RK_SIMT_INLINE int __syncthreads_or(int predicate) {
  return simt::barrier("__syncthreads_or", predicate != 0) > 0;
}
RK_SIMT_INLINE int __syncthreads_and(int predicate) {
  return simt::barrier("__syncthreads_and", predicate == 0) == 0;
}
RK_SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }

RK_SIMT_INLINE unsigned __activemask() { return simt::active_mask(); }
RK_SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::ballot("__ballot_sync", mask, predicate != 0);
}
RK_SIMT_INLINE int __any_sync(unsigned mask, int predicate) {
  return simt::ballot("__any_sync", mask, predicate != 0) != 0;
}
RK_SIMT_INLINE int __all_sync(unsigned mask, int predicate) {
  return simt::ballot("__all_sync", mask, predicate == 0) == 0;
}

namespace simt {

enum class Shuffle { from, up, down, across };

// The lane that a shuffle reads, as PTX has it: shfl.sync with segments of `width` lanes.
RK_SIMT_INLINE unsigned shuffle_source(const char* what, Shuffle kind, int by, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s with width %d, which is not 1, 2, 4, 8, 16 or 32", what, width);
  }
  if (kind != Shuffle::from && (by < 0 || by > 31)) fail("%s by %d lanes", what, by);
  const int me = static_cast<int>(lane()), first = me & ~(width - 1), last = first + width - 1;
  int source = me;
  switch (kind) {
    case Shuffle::from:
      source = first + (by & (width - 1));
      break;
    case Shuffle::up:
      source = me - by >= first ? me - by : me;
      break;
    case Shuffle::down:
      source = me + by <= last ? me + by : me;
      break;
    case Shuffle::across:
      source = (me ^ by) <= last ? me ^ by : me;
      break;
  }
  return static_cast<unsigned>(source);
}

template <typename T>
RK_SIMT_INLINE T shuffle_value(const char* what, Shuffle kind, unsigned mask, T value, int by, int width) {
  return unpack<T>(shuffle(what, mask, pack(value), shuffle_source(what, kind, by, width)));
}

}  // namespace simt

// The overloads that CUDA has, so that the same calls are ambiguous here and there.
#define RK_SIMT_SHUFFLES(T)                                                                               \
  RK_SIMT_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {                      \
    return simt::shuffle_value("__shfl_sync", simt::Shuffle::from, mask, value, source, width);           \
  }                                                                                                       \
  RK_SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {               \
    return simt::shuffle_value("__shfl_up_sync", simt::Shuffle::up, mask, value, static_cast<int>(delta), \
                               width);                                                                    \
  }                                                                                                       \
  RK_SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {             \
    return simt::shuffle_value("__shfl_down_sync", simt::Shuffle::down, mask, value,                      \
                               static_cast<int>(delta), width);                                           \
  }                                                                                                       \
  RK_SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {                   \
    return simt::shuffle_value("__shfl_xor_sync", simt::Shuffle::across, mask, value, lanes, width);      \
  }
RK_SIMT_SHUFFLES(int)
RK_SIMT_SHUFFLES(unsigned)
RK_SIMT_SHUFFLES(long)
RK_SIMT_SHUFFLES(unsigned long)
RK_SIMT_SHUFFLES(long long)
RK_SIMT_SHUFFLES(unsigned long long)
RK_SIMT_SHUFFLES(float)
RK_SIMT_SHUFFLES(double)
RK_SIMT_SHUFFLES(__half)
RK_SIMT_SHUFFLES(__half2)
RK_SIMT_SHUFFLES(__nv_bfloat16)
RK_SIMT_SHUFFLES(__nv_bfloat162)
#undef RK_SIMT_SHUFFLES

#define RK_SIMT_MATCH(T)                                                       \
  RK_SIMT_INLINE unsigned __match_any_sync(unsigned mask, T value) {           \
    return simt::match_any(mask, simt::pack(value));                           \
  }                                                                            \
  RK_SIMT_INLINE unsigned __match_all_sync(unsigned mask, T value, int* all) { \
    *all = simt::match_any(mask, simt::pack(value)) == mask;                   \
    return *all ? mask : 0;                                                    \
  }
RK_SIMT_MATCH(int)
RK_SIMT_MATCH(unsigned)
RK_SIMT_MATCH(long)
RK_SIMT_MATCH(unsigned long)
RK_SIMT_MATCH(long long)
RK_SIMT_MATCH(unsigned long long)
RK_SIMT_MATCH(float)
RK_SIMT_MATCH(double)
#undef RK_SIMT_MATCH

// A GPU older than sm_80 has none of these.
#if RK_SIMT_ARCH >= 800
namespace simt {

template <typename T>
struct ReduceSlot {
  T value;
};

// Every lane gets the values of all lanes of the mask, combined.
template <typename T, typename Combine>
RK_SIMT_INLINE T reduce(const char* what, unsigned mask, T value, Combine) {
  ReduceSlot<T> slot{value};
  collective(what, mask, &slot, [](void* const* slots, unsigned lanes) {
    T all = static_cast<ReduceSlot<T>*>(slots[__builtin_ctz(lanes)])->value;
    for (unsigned l = __builtin_ctz(lanes) + 1; l < 32; ++l) {
      if (lanes >> l & 1) all = Combine{}(all, static_cast<ReduceSlot<T>*>(slots[l])->value);
    }
    for (unsigned l = 0; l < 32; ++l) {
      if (lanes >> l & 1) static_cast<ReduceSlot<T>*>(slots[l])->value = all;
    }
  });
  return slot.value;
}

}  // namespace simt

#define RK_SIMT_REDUCE(name, T, expression)               \
  RK_SIMT_INLINE T name(unsigned mask, T value) {         \
    struct Combine {                                      \
      T operator()(T a, T b) const { return expression; } \
    };                                                    \
    return simt::reduce(#name, mask, value, Combine{});   \
  }
RK_SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
RK_SIMT_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
RK_SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
RK_SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
RK_SIMT_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
RK_SIMT_REDUCE(__reduce_max_sync, int, a > b ? a : b)
RK_SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
RK_SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
RK_SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef RK_SIMT_REDUCE
#endif
