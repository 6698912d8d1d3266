// Shuffles and votes whose lanes do not come together, and threads that wait for ever.

#include "cases.h"

namespace {

constexpr unsigned everybody = 0xffffffffu;

// The sum of 16 lanes each; the wrong one names half of the lanes that it reads.
template <bool right>
__global__ void shuffle_outside_of_the_mask(int* values) {
  int sum = values[threadIdx.x];
  if (threadIdx.x < 16) {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(right ? 0xffffu : 0x00ffu, sum, step);
  }
  values[threadIdx.x] = sum;
}

template <bool right>
__global__ void shuffle_reads_outside_of_the_mask(int* values) {
  int sum = values[threadIdx.x];
  if (threadIdx.x < 16) {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_down_sync(0xffffu, sum, step, right ? 16 : 32);
  }
  values[threadIdx.x] = sum;
}

template <bool right>
__global__ void shuffle_with_ended_lanes(int* values) {
  if (threadIdx.x >= 16) return;
  values[threadIdx.x] = __shfl_xor_sync(right ? 0xffffu : everybody, values[threadIdx.x], 1);
}

// The last warp has 8 lanes.
template <bool right>
__global__ void shuffle_with_lanes_that_do_not_exist(int* values) {
  values[threadIdx.x] = __shfl_xor_sync(right ? 0xffu : everybody, values[threadIdx.x], 1);
}

template <bool right>
__global__ void shuffle_at_two_places(int* values) {
  const int mine = values[threadIdx.x];
  int other;
  if (right || threadIdx.x < 16) {
    other = __shfl_xor_sync(everybody, mine, 1);
  } else {
    other = __shfl_xor_sync(everybody, mine, 1);
  }
  values[threadIdx.x] = other;
}

__device__ __attribute__((noinline)) int neighbour(int value) { return __shfl_xor_sync(everybody, value, 1); }
__device__ __forceinline__ int near_neighbour(int value) { return __shfl_xor_sync(everybody, value, 1); }

template <bool right, bool inlined>
__global__ void shuffle_of_a_function(int* values) {
  const int mine = values[threadIdx.x];
  int other;
  if (right) {
    other = inlined ? near_neighbour(mine) : neighbour(mine);
  } else if (threadIdx.x < 16) {
    other = inlined ? near_neighbour(mine) : neighbour(mine);
  } else {
    other = inlined ? near_neighbour(mine + 0) : neighbour(mine + 0);
    other += 0;
  }
  values[threadIdx.x] = other;
}

template <bool right>
__global__ void different_masks(int* values) {
  const unsigned mask = right || threadIdx.x < 16 ? everybody : 0xffff0000u;
  values[threadIdx.x] = __shfl_xor_sync(mask, values[threadIdx.x], 1);
}

template <bool right>
__global__ void shuffle_and_barrier(int* values) {
  const int mine = values[threadIdx.x];
  int other = mine ^ 1;
  if (right) {
    other = __shfl_xor_sync(everybody, mine, 1);
    __syncthreads();
  } else if (threadIdx.x < 16) {
    other = __shfl_xor_sync(everybody, mine, 1);
  } else {
    __syncthreads();
  }
  values[threadIdx.x] = other;
}

template <bool right>
__global__ void shuffle_by_32(int* values) {
  values[threadIdx.x] += 0 * __shfl_down_sync(everybody, values[threadIdx.x], right ? 31 : 32);
  values[threadIdx.x] ^= 1;
}

template <bool right>
__global__ void width_of_12(int* values) {
  values[threadIdx.x] = __shfl_xor_sync(everybody, values[threadIdx.x], 1, right ? 8 : 12);
}

// Three lanes wait for each other in a ring.
template <bool right>
__global__ void ring(int* values) {
  const unsigned lane = threadIdx.x;
  unsigned mask = 1u << lane;
  if (!right && lane < 3) mask |= 1u << (lane + 1) % 3;
  __syncwarp(mask);
  values[lane] ^= 1;
}

// Waits for a flag that the last thread sets; in the wrong version nobody does.
template <bool right>
__global__ void wait_for_a_flag(int* values, int* flag) {
  if (right && threadIdx.x == 31) atomicExch(flag, 1);
  if (threadIdx.x < 31) {
    while (atomicAdd(flag, 0) == 0) {
    }
  }
  values[threadIdx.x] ^= 1;
}

// Lanes exchange values through shared memory.
template <bool right>
__global__ void missing_warp_barrier(int* values) {
  __shared__ int shared[32];
  shared[threadIdx.x] = values[threadIdx.x];
  if (right) __syncwarp();
  values[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// As above, but all are together in a shuffle, which orders nothing.
template <bool right>
__global__ void shuffle_for_a_barrier(int* values) {
  __shared__ int shared[32];
  shared[threadIdx.x] = values[threadIdx.x];
  if (right) {
    __syncwarp();
  } else {
    __shfl_sync(everybody, 0, 0);
  }
  values[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Groups of 8 lanes, of which one leaves the others out.
template <bool right>
__global__ void warp_barrier_of_a_part(int* values) {
  __shared__ int shared[32];
  const unsigned group = 0xffu << (threadIdx.x & ~7u);
  shared[threadIdx.x] = values[threadIdx.x];
  __syncwarp(right || threadIdx.x < 24 ? group : 1u << threadIdx.x);
  values[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Counts on all lanes being together where nothing says so.
template <bool right>
__global__ void active_lanes(int* values) {
  int mine = values[threadIdx.x];
  const unsigned together = right ? everybody : __activemask();
  if (together != everybody) mine += 100;
  values[threadIdx.x] = __shfl_xor_sync(everybody, mine, 1);
}

bool neighbours(const Buffer<int>& values) {
  for (int i = 0; i < static_cast<int>(values.size()); ++i) {
    if (values[i] != (i ^ 1)) return false;
  }
  return true;
}

bool run(void (*kernel)(int*), int threads = 32) {
  Buffer<int> values(threads);
  for (int i = 0; i < threads; ++i) values[i] = i;
  RK_RUN(kernel, 1, threads, 0, nullptr, values.get());
  return neighbours(values);
}

bool run_sums(void (*kernel)(int*)) {
  Buffer<int> values(32);
  for (int i = 0; i < 32; ++i) values[i] = i;
  RK_RUN(kernel, 1, 32, 0, nullptr, values.get());
  return values[0] == 120 && values[20] == 20;
}

}  // namespace

RK_CASE(shuffle_outside_of_the_mask) {
  return run_sums(right ? shuffle_outside_of_the_mask<true> : shuffle_outside_of_the_mask<false>);
}
RK_CASE(shuffle_reads_outside_of_the_mask) {
  return run_sums(right ? shuffle_reads_outside_of_the_mask<true> : shuffle_reads_outside_of_the_mask<false>);
}
RK_CASE(shuffle_with_ended_lanes) {
  Buffer<int> values(32);
  for (int i = 0; i < 32; ++i) values[i] = i < 16 ? i : i ^ 1;
  const auto kernel = right ? shuffle_with_ended_lanes<true> : shuffle_with_ended_lanes<false>;
  RK_RUN(kernel, 1, 32, 0, nullptr, values.get());
  return neighbours(values);
}
RK_CASE(shuffle_with_lanes_that_do_not_exist) {
  return run(right ? shuffle_with_lanes_that_do_not_exist<true> : shuffle_with_lanes_that_do_not_exist<false>,
             8);
}
RK_CASE(shuffle_at_two_places) {
  return run(right ? shuffle_at_two_places<true> : shuffle_at_two_places<false>);
}
RK_CASE(shuffle_of_a_function) {
  return run(right ? shuffle_of_a_function<true, false> : shuffle_of_a_function<false, false>);
}
RK_CASE(shuffle_of_an_inlined_function) {
  return run(right ? shuffle_of_a_function<true, true> : shuffle_of_a_function<false, true>);
}
RK_CASE(different_masks) { return run(right ? different_masks<true> : different_masks<false>); }
RK_CASE(shuffle_and_barrier) { return run(right ? shuffle_and_barrier<true> : shuffle_and_barrier<false>); }
RK_CASE(shuffle_by_32) { return run(right ? shuffle_by_32<true> : shuffle_by_32<false>); }
RK_CASE(width_of_12) { return run(right ? width_of_12<true> : width_of_12<false>); }
RK_CASE(ring) { return run(right ? ring<true> : ring<false>); }
RK_CASE(wait_for_a_flag) {
  Buffer<int> values(32), flag(1, 0);
  for (int i = 0; i < 32; ++i) values[i] = i;
  const auto kernel = right ? wait_for_a_flag<true> : wait_for_a_flag<false>;
  RK_RUN(kernel, 1, 32, 0, nullptr, values.get(), flag.get());
  return neighbours(values);
}
RK_CASE(missing_warp_barrier) {
  return run(right ? missing_warp_barrier<true> : missing_warp_barrier<false>);
}
RK_CASE(shuffle_for_a_barrier) {
  return run(right ? shuffle_for_a_barrier<true> : shuffle_for_a_barrier<false>);
}
RK_CASE(warp_barrier_of_a_part) {
  return run(right ? warp_barrier_of_a_part<true> : warp_barrier_of_a_part<false>);
}
RK_CASE(active_lanes) { return run(right ? active_lanes<true> : active_lanes<false>); }
