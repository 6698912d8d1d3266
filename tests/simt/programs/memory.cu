// Memory that is not there, not aligned, not written yet, or that two threads use at once.

#include "cases.h"

#if defined(RK_SIMT)
#define RK_POINTER "r"
#else
#define RK_POINTER "l"
#endif

namespace {

constexpr int threads = 64;

template <bool right>
__global__ void uninitialized_shared(float* out, const float* in) {
  __shared__ float tile[threads];
  RK_DYNAMIC_SHARED(float, more);
  if (right || threadIdx.x % 2 == 0) tile[threadIdx.x] = in[threadIdx.x];
  more[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 1] + more[threadIdx.x];
}

template <bool right>
__global__ void uninitialized_dynamic_shared(float* out, const float* in) {
  RK_DYNAMIC_SHARED(float, tile);
  if (right || threadIdx.x % 2 == 0) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// What one block leaves in shared memory is not there for the next one.
template <bool right>
__global__ void shared_of_the_last_block(float* out, const float* in) {
  __shared__ float tile[threads];
  if (right || blockIdx.x == 0) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * threads + threadIdx.x] = tile[threadIdx.x ^ 1];
}

template <bool right>
__global__ void uninitialized_variable(float* out, const float* in) {
  float value;
  float* there = &value;
  if (right || threadIdx.x != 5) *there = in[threadIdx.x ^ 1];
  asm volatile("" : : RK_POINTER(there) : "memory");
  out[threadIdx.x] = *there;
}

template <bool right>
__global__ void read_too_far(float* out, const float* in) {
  out[threadIdx.x] = in[right ? threadIdx.x ^ 1 : threadIdx.x + 1];
}

template <bool right>
__global__ void write_too_far(float* out, const float* in) {
  out[right ? threadIdx.x : threadIdx.x + 1] = in[threadIdx.x ^ 1];
}

template <bool right>
__global__ void read_nowhere(float* out, const float* in) {
  const float* there = right || threadIdx.x != 9 ? in : reinterpret_cast<const float*>(uintptr_t{1} << 40);
  out[threadIdx.x] = there[threadIdx.x ^ 1];
}

__device__ __attribute__((noinline)) int deep(int n) { return n == 0 ? 0 : deep(n - 1) + n % 3; }

template <bool right>
__global__ void too_many_calls(int* out) {
  out[threadIdx.x] = deep(right ? 20 : 1 << 20);
}

template <bool right>
__global__ void dynamic_shared_too_far(float* out, const float* in) {
  RK_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + (right ? 0 : 1)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[(threadIdx.x ^ 1) + (right ? 0 : 1)];
}

template <bool right>
__global__ void static_shared_too_far(float* out, const float* in) {
  __shared__ float tile[threads][2];
  tile[threadIdx.x][right ? 1 : threadIdx.x / 32 + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 1][1];
}

template <bool right>
__global__ void misaligned_vector(float* out, const float* in) {
  const unsigned first = threadIdx.x & ~3u, off = right || first == threads - 4 ? 0 : 2;
  const float4 four = *reinterpret_cast<const float4*>(in + first + off);
  const float mine[4] = {four.x, four.y, four.z, four.w};
  out[threadIdx.x] = mine[(threadIdx.x & 3) ^ 1];
}

template <bool right>
__global__ void misaligned_ldg(float* out, const float* in) {
  const float2 two = __ldg(reinterpret_cast<const float2*>(in + (right ? threadIdx.x & ~1u : threadIdx.x)));
  out[threadIdx.x] = threadIdx.x & 1 ? two.x : two.y;
}

template <bool right>
__global__ void overflow(int* out) {
  const int step = right ? 1000 : 100000000;
  out[threadIdx.x] = static_cast<int>(threadIdx.x) * step;
}

// All threads add to one number.
template <bool right>
__global__ void lost_update(int* sum) {
  if (right) {
    atomicAdd(sum, 1);
  } else {
    *sum += 1;
  }
}

// Each block adds to one number.
template <bool right>
__global__ void race_of_blocks(int* sum) {
  if (threadIdx.x != 0) return;
  if (right) {
    atomicAdd(sum, 1);
  } else {
    sum[0] = sum[0] + 1;
  }
}

// One thread writes in its way what others add to.
template <bool right>
__global__ void plain_and_atomic(int* sum) {
  if (threadIdx.x == 0) {
    if (right) {
      atomicExch(sum + 1, 5);
    } else {
      sum[1] = 5;
    }
  } else {
    atomicMax(sum + 1, 3);
  }
  atomicAdd(sum, 1);
}

// Only shared and global memory have atomic operations.
template <bool right>
__global__ void atomic_on_a_variable(int* out) {
  __shared__ int shared[threads];
  int mine = 0;
  shared[threadIdx.x] = 0;
  int* there = right ? shared + threadIdx.x : &mine;
  atomicAdd(there, 1 + static_cast<int>(threadIdx.x));
  out[threadIdx.x] = *there;
}

// Neighbours write neighbouring bytes, which is well; the wrong ones write two.
template <bool right>
__global__ void neighbouring_bytes(unsigned char* out) {
  out[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  if (!right && threadIdx.x + 1 < blockDim.x)
    out[threadIdx.x + 1] = static_cast<unsigned char>(threadIdx.x + 1);
}

template <bool right>
__global__ void ldg_of_what_is_written(float* out, const float* in) {
  out[threadIdx.x] = in[threadIdx.x ^ 1];
  __syncthreads();
  const float mine = right ? out[threadIdx.x] : __ldg(out + threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = mine;
}

template <bool right>
__global__ void write_after_ldg(float* values) {
  const float mine = right ? values[threadIdx.x] : __ldg(values + threadIdx.x);
  __syncthreads();
  values[threadIdx.x ^ 1] = mine;
}

template <bool right>
__global__ void variable_of_another_thread(float* out, const float* in) {
  __shared__ const float* there[threads];
  const float mine = in[threadIdx.x];
  there[threadIdx.x] = right ? in + threadIdx.x : &mine;
  __syncthreads();
  out[threadIdx.x] = *there[threadIdx.x ^ 1];
  __syncthreads();
}

__global__ void copy(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x ^ 1]; }

bool run(void (*kernel)(float*, const float*), int shared_bytes = 0, int blocks = 1) {
  Buffer<float> in(threads), out(blocks * threads, -1.0f);
  for (int i = 0; i < threads; ++i) in[i] = static_cast<float>(i);
  RK_RUN(kernel, blocks, threads, shared_bytes, nullptr, out.get(), in.get());
  for (int i = 0; i < blocks * threads; ++i) {
    if (!(out[i] == static_cast<float>(i % threads ^ 1))) return false;
  }
  return true;
}

}  // namespace

RK_CASE(uninitialized_shared) {
  return run(right ? uninitialized_shared<true> : uninitialized_shared<false>, threads * sizeof(float));
}
RK_CASE(uninitialized_dynamic_shared) {
  return run(right ? uninitialized_dynamic_shared<true> : uninitialized_dynamic_shared<false>,
             threads * sizeof(float));
}
RK_CASE(shared_of_the_last_block) {
  return run(right ? shared_of_the_last_block<true> : shared_of_the_last_block<false>, 0, 3);
}
RK_CASE(uninitialized_variable) {
  return run(right ? uninitialized_variable<true> : uninitialized_variable<false>);
}
RK_CASE(read_too_far) { return run(right ? read_too_far<true> : read_too_far<false>); }
RK_CASE(write_too_far) { return run(right ? write_too_far<true> : write_too_far<false>); }
RK_CASE(read_nowhere) { return run(right ? read_nowhere<true> : read_nowhere<false>); }
RK_CASE(too_many_calls) {
  Buffer<int> out(threads);
  const auto kernel = right ? too_many_calls<true> : too_many_calls<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, out.get());
  return out[0] == 21;
}
RK_CASE(dynamic_shared_too_far) {
  return run(right ? dynamic_shared_too_far<true> : dynamic_shared_too_far<false>, threads * sizeof(float));
}
RK_CASE(static_shared_too_far) {
  return run(right ? static_shared_too_far<true> : static_shared_too_far<false>);
}
RK_CASE(misaligned_vector) { return run(right ? misaligned_vector<true> : misaligned_vector<false>); }
RK_CASE(misaligned_ldg) { return run(right ? misaligned_ldg<true> : misaligned_ldg<false>); }
RK_CASE(overflow) {
  Buffer<int> out(threads);
  const auto kernel = right ? overflow<true> : overflow<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, out.get());
  return out[2] == 2000;
}
RK_CASE(lost_update) {
  Buffer<int> sum(1, 0);
  const auto kernel = right ? lost_update<true> : lost_update<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, sum.get());
  return sum[0] == threads;
}
RK_CASE(race_of_blocks) {
  Buffer<int> sum(1, 0);
  const auto kernel = right ? race_of_blocks<true> : race_of_blocks<false>;
  RK_RUN(kernel, 5, threads, 0, nullptr, sum.get());
  return sum[0] == 5;
}
RK_CASE(plain_and_atomic) {
  Buffer<int> sum(2, 0);
  const auto kernel = right ? plain_and_atomic<true> : plain_and_atomic<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, sum.get());
  return sum[0] == threads && sum[1] == 5;
}
RK_CASE(atomic_on_a_variable) {
  Buffer<int> out(threads);
  const auto kernel = right ? atomic_on_a_variable<true> : atomic_on_a_variable<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, out.get());
  return out[7] == 8;
}
RK_CASE(neighbouring_bytes) {
  Buffer<unsigned char> out(threads);
  const auto kernel = right ? neighbouring_bytes<true> : neighbouring_bytes<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, out.get());
  return out[7] == 7;
}
RK_CASE(ldg_of_what_is_written) {
  return run(right ? ldg_of_what_is_written<true> : ldg_of_what_is_written<false>);
}
RK_CASE(write_after_ldg) {
  Buffer<float> values(threads);
  for (int i = 0; i < threads; ++i) values[i] = static_cast<float>(i);
  const auto kernel = right ? write_after_ldg<true> : write_after_ldg<false>;
  RK_RUN(kernel, 1, threads, 0, nullptr, values.get());
  return values[6] == 7;
}
RK_CASE(variable_of_another_thread) {
  return run(right ? variable_of_another_thread<true> : variable_of_another_thread<false>);
}
RK_CASE(variable_of_the_host) {
  float on_the_stack[threads];
  Buffer<float> in(threads), out(threads);
  for (int i = 0; i < threads; ++i) in[i] = on_the_stack[i] = static_cast<float>(i);
  RK_RUN(copy, 1, threads, 0, nullptr, out.get(), right ? in.get() : on_the_stack);
  return out[6] == 7;
}
RK_CASE(memory_of_the_host) {
  std::vector<float> on_the_heap(threads);
  Buffer<float> in(threads), out(threads);
  for (int i = 0; i < threads; ++i) in[i] = on_the_heap[i] = static_cast<float>(i);
  RK_RUN(copy, 1, threads, 0, nullptr, out.get(), right ? in.get() : on_the_heap.data());
  return out[6] == 7;
}
RK_CASE(host_reads_the_device) {
  float* on_the_device = nullptr;
  rk::cuda_check(cudaMalloc(&on_the_device, threads * sizeof(float)), "allocating");
  Buffer<float> out(threads);
  float first = right ? 0.0f : on_the_device[0];
  rk::cuda_check(cudaMemset(on_the_device, 0, threads * sizeof(float)), "filling");
  RK_RUN(copy, 1, threads, 0, nullptr, out.get(), on_the_device);
  rk::cuda_check(cudaMemcpy(&first, on_the_device, sizeof first, cudaMemcpyDeviceToHost), "copying");
  rk::cuda_check(cudaFree(on_the_device), "freeing");
  return out[6] == first;
}
