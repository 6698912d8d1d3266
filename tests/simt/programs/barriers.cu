// Barriers that are missing, or that not all threads reach.

#include "cases.h"

namespace {

constexpr int threads = 128;

bool all_are(const Buffer<float>& values, float (*expected)(int)) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(values[i] == expected(static_cast<int>(i)))) return false;
  }
  return true;
}

// Reverses a block's values through shared memory.
template <bool right>
__global__ void reverse(float* values) {
  __shared__ float tile[threads];
  tile[threadIdx.x] = values[threadIdx.x];
  if (right) __syncthreads();
  values[threadIdx.x] = tile[threads - 1 - threadIdx.x];
}

// Uses the shared memory again: nobody may write the second values before everybody has read the first.
template <bool right>
__global__ void reverse_twice(float* values) {
  RK_DYNAMIC_SHARED(float, tile);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = values[threadIdx.x] + static_cast<float>(round);
    __syncthreads();
    sum += tile[threads - 1 - threadIdx.x];
    if (right) __syncthreads();
  }
  values[threadIdx.x] = sum;
}

template <bool right>
__global__ void two_barriers(float* values) {
  if (right || threadIdx.x < threads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  values[threadIdx.x] += 1;
}

__device__ float summed(float value) {
  __shared__ float sum[threads];
  sum[threadIdx.x] = value;
  __syncthreads();
  float all = 0;
  for (int i = 0; i < threads; ++i) all += sum[i];
  __syncthreads();
  return all;
}

// The barrier is one line of one function, which threads enter from two places.
template <bool right>
__global__ void barrier_of_a_function(float* values) {
  const float mine = values[threadIdx.x];
  if (right) {
    values[threadIdx.x] = mine + summed(mine) - mine;
  } else if (threadIdx.x % 2 == 0) {
    values[threadIdx.x] = summed(mine);
  } else {
    values[threadIdx.x] = summed(mine) + 0.0f * mine;
  }
}

template <bool right>
__global__ void barrier_after_the_end(float* values) {
  if (!right && threadIdx.x >= threads - 7) return;
  __syncthreads();
  values[threadIdx.x] += 1;
}

template <bool right>
__global__ void barrier_for_some(float* values) {
  if (right || threadIdx.x < 32) __syncthreads();
  values[threadIdx.x] += 1;
}

template <bool right>
__global__ void different_barriers(float* values) {
  const float mine = values[threadIdx.x];
  bool found;
  if (right) {
    found = __syncthreads_or(mine == 3) != 0;
  } else {
    found = threadIdx.x == 3 ? __syncthreads_or(mine == 3) != 0 : __syncthreads_count(mine == 3) != 0;
  }
  values[threadIdx.x] = found ? mine + 1 : mine;
}

float next(int i) { return static_cast<float>(i + 1); }
float reversed(int i) { return static_cast<float>(threads - 1 - i); }

bool run(void (*kernel)(float*), float (*expected)(int), int shared_bytes = 0) {
  Buffer<float> values(threads);
  for (int i = 0; i < threads; ++i) values[i] = static_cast<float>(i);
  RK_RUN(kernel, 1, threads, shared_bytes, nullptr, values.get());
  return all_are(values, expected);
}

}  // namespace

RK_CASE(missing_barrier) { return run(right ? reverse<true> : reverse<false>, reversed); }
RK_CASE(missing_second_barrier) {
  return run(
      right ? reverse_twice<true> : reverse_twice<false>, [](int i) { return 2 * reversed(i) + 1; },
      threads * sizeof(float));
}
RK_CASE(two_barriers) { return run(right ? two_barriers<true> : two_barriers<false>, next); }
RK_CASE(barrier_of_a_function) {
  return run(right ? barrier_of_a_function<true> : barrier_of_a_function<false>,
             [](int) { return static_cast<float>(threads * (threads - 1) / 2); });
}
RK_CASE(barrier_after_the_end) {
  return run(right ? barrier_after_the_end<true> : barrier_after_the_end<false>, next);
}
RK_CASE(barrier_for_some) { return run(right ? barrier_for_some<true> : barrier_for_some<false>, next); }
RK_CASE(different_barriers) {
  return run(right ? different_barriers<true> : different_barriers<false>, next);
}
