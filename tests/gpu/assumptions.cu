// What the emulation of CUDA on the CPU takes for granted, checked on a GPU. Prints a line for each, and
// returns how many do not hold.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "cuda/cuda.cuh"
#include "cuda/faults.cuh"
#include "cuda/mma.cuh"

namespace {

int failures = 0;

void say(const char* what, bool holds) {
  std::printf("%s: %s\n", what, holds ? "holds" : "DOES NOT HOLD");
  if (!holds) ++failures;
}

void need(cudaError_t error, const char* what) { rk::cuda_check(error, what); }

// Memory that the host and the GPU both write, as the record of wrong indices is.
template <typename T>
T* mapped(size_t count) {
  void* memory = nullptr;
  need(cudaHostAlloc(&memory, count * sizeof(T), cudaHostAllocMapped | cudaHostAllocPortable),
       "cudaHostAlloc");
  std::memset(memory, 0, count * sizeof(T));
  return static_cast<T*>(memory);
}

// ---- the registers of mma.sync ----

// By the table in cuda/mma.cuh: which bytes of A and B a lane holds, and which sums it gets.
__global__ void multiply(const int8_t* a, const int8_t* b, int32_t* d) {
#if RK_ARCH >= 750 || RK_ARCH == 0
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, place = lane % 4;
  uint32_t left[4] = {}, right[2] = {};
  int32_t sum[4];
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < 4; ++r) {
      const int8_t byte = a[(group + 8 * (r % 2)) * 32 + 4 * place + i + 16 * (r / 2)];
      left[r] |= static_cast<uint32_t>(static_cast<uint8_t>(byte)) << (8 * i);
    }
    for (int r = 0; r < 2; ++r) {
      const int8_t byte = b[(4 * place + i + 16 * r) * 8 + group];
      right[r] |= static_cast<uint32_t>(static_cast<uint8_t>(byte)) << (8 * i);
    }
  }
  for (int r = 0; r < 4; ++r) sum[r] = d[(group + 8 * (r / 2)) * 8 + 2 * place + r % 2];
  rk::mma_m16n8k32(sum, left, right);
  for (int r = 0; r < 4; ++r) d[(group + 8 * (r / 2)) * 8 + 2 * place + r % 2] = sum[r];
#endif
}

void check_mma(int capability) {
  if (capability < 75) return;
  std::mt19937 random(1);
  auto* a = mapped<int8_t>(16 * 32);
  auto* b = mapped<int8_t>(32 * 8);
  auto* d = mapped<int32_t>(16 * 8);
  bool holds = true;
  for (int round = 0; round < 100; ++round) {
    for (int i = 0; i < 16 * 32; ++i) a[i] = static_cast<int8_t>(random());
    for (int i = 0; i < 32 * 8; ++i) b[i] = static_cast<int8_t>(random());
    std::vector<int32_t> wanted(16 * 8);
    for (int i = 0; i < 16 * 8; ++i) {
      d[i] = static_cast<int32_t>(random());  // sums that wrap round, too
      uint32_t sum = static_cast<uint32_t>(d[i]);
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[i / 8 * 32 + k] * b[k * 8 + i % 8]);
      wanted[static_cast<size_t>(i)] = static_cast<int32_t>(sum);
    }
    multiply<<<1, 32>>>(a, b, d);
    need(cudaDeviceSynchronize(), "mma.sync");
    holds = holds && std::memcmp(d, wanted.data(), wanted.size() * sizeof(int32_t)) == 0;
  }
  say("mma.sync.m16n8k32 holds matrices in the registers that cuda/mma.cuh names", holds);
}

// ---- dp4a ----

__global__ void dot_products(const int32_t* a, const int32_t* b, int32_t* d, int count) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at < count) d[at] = __dp4a(a[at], b[at], d[at]);
}

void check_dp4a() {
  constexpr int count = 1 << 16;
  std::mt19937 random(2);
  auto* a = mapped<int32_t>(count);
  auto* b = mapped<int32_t>(count);
  auto* d = mapped<int32_t>(count);
  std::vector<int32_t> wanted(count);
  for (int i = 0; i < count; ++i) {
    a[i] = static_cast<int32_t>(random());
    b[i] = static_cast<int32_t>(random());
    d[i] = static_cast<int32_t>(random());
    uint32_t sum = static_cast<uint32_t>(d[i]);
    for (int k = 0; k < 4; ++k) {
      sum +=
          static_cast<uint32_t>(static_cast<int8_t>(a[i] >> (8 * k)) * static_cast<int8_t>(b[i] >> (8 * k)));
    }
    wanted[static_cast<size_t>(i)] = static_cast<int32_t>(sum);
  }
  dot_products<<<count / 256, 256>>>(a, b, d, count);
  need(cudaDeviceSynchronize(), "dp4a");
  say("dp4a multiplies signed bytes and wraps round", std::memcmp(d, wanted.data(), count * 4) == 0);
}

// ---- conversions ----

// The toolkit's headers do this with instructions on a GPU and with integer arithmetic on the CPU.
struct Converted {
  uint32_t from_half, from_bfloat16;
  uint16_t to_half, to_bfloat16;
};

__host__ __device__ Converted convert(uint32_t bits) {
  float number;
  memcpy(&number, &bits, 4);
  const __half half = __float2half_rn(number);
  const __nv_bfloat16 bfloat16 = __float2bfloat16_rn(number);
  const float back[2] = {__half2float(half), __bfloat162float(bfloat16)};
  Converted result;
  memcpy(&result.from_half, &back[0], 4);
  memcpy(&result.from_bfloat16, &back[1], 4);
  memcpy(&result.to_half, &half, 2);
  memcpy(&result.to_bfloat16, &bfloat16, 2);
  return result;
}

__global__ void convert_all(const uint32_t* from, Converted* to, int count) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at < count) to[at] = convert(from[at]);
}

void check_conversions() {
  constexpr int count = 1 << 20;
  std::mt19937 random(3);
  auto* from = mapped<uint32_t>(count);
  auto* to = mapped<Converted>(count);
  for (int i = 0; i < count; ++i) {
    from[i] = static_cast<uint32_t>(random());
    // Half of them among what fp16 can hold, with its subnormal numbers, and on ties.
    if (i % 2) from[i] = (from[i] & 0x87ffffffu) | 0x30000000u;
    if (i % 8 == 1) from[i] &= 0xfffff000u;
    if (i % 8 == 3) from[i] &= 0xffff8000u;
  }
  convert_all<<<count / 256, 256>>>(from, to, count);
  need(cudaDeviceSynchronize(), "conversions");
  int different = 0;
  for (int i = 0; i < count; ++i) {
    if ((from[i] & 0x7fffffffu) > 0x7f800000u) continue;  // which NaN it is does not matter
    const Converted wanted = convert(from[i]);
    different += to[i].from_half != wanted.from_half || to[i].from_bfloat16 != wanted.from_bfloat16 ||
                 to[i].to_half != wanted.to_half || to[i].to_bfloat16 != wanted.to_bfloat16;
  }
  if (different) std::printf("%d numbers differ\n", different);
  say("fp16 and bf16 are rounded as the toolkit's headers do on the CPU", different == 0);
}

// ---- a record that the host reads while kernels run ----

struct Record {
  int32_t claimed, ready;
  int64_t values[6];
  int32_t seen;
};

__global__ void write_record(Record* record, long long patience) {
  if (atomicCAS(&record->claimed, 0, 1) == 0) {
    for (int i = 0; i < 6; ++i) record->values[i] = 100 + i;
    __threadfence_system();
    *static_cast<volatile int32_t*>(&record->ready) = 1;
  }
  // Goes on until the host has read it, but not for ever.
  const long long begin = clock64();
  while (*static_cast<volatile int32_t*>(&record->seen) == 0 && clock64() - begin < patience) {
  }
}

void check_record() {
  auto* record = mapped<Record>(1);
  const long long patience = 4'000'000'000;  // cycles: some 2 s
  write_record<<<4, 64>>>(record, patience);
  need(cudaGetLastError(), "the kernel that writes a record");
  bool whole = false, running = false;
  const std::clock_t end = std::clock() + CLOCKS_PER_SEC;
  while (!whole && std::clock() < end) {
    if (*static_cast<volatile int32_t*>(&record->ready) == 0) continue;
    whole = true;
    for (int i = 0; i < 6; ++i) whole = whole && record->values[i] == 100 + i;
    running = cudaStreamQuery(nullptr) == cudaErrorNotReady;
  }
  *static_cast<volatile int32_t*>(&record->seen) = 1;
  need(cudaDeviceSynchronize(), "the kernel that writes a record");
  say("the host sees a record while the kernel that wrote it still runs, and all of it", whole && running);
}

// Many threads want to write down what they found all the time, as kernels do that meet many wrong indices.
__global__ void find_faults(rk::FaultRecord* record, const int* stop, long long patience) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const rk::Bounds bounds{record, rk::BoundsCheck::raise};
  const long long begin = clock64();
  for (int64_t i = 0; *static_cast<const volatile int*>(stop) == 0 && clock64() - begin < patience; ++i) {
    rk::record_fault(bounds, rk::DeviceFault::index, thread, i, thread + i, thread - i, 3 * thread);
  }
}

// As cuda/faults.cu reads it, over and over: each fault is whole, and no two are counted as one.
void check_faults() {
  constexpr uint32_t wanted = 2000;
  auto* record = mapped<rk::FaultRecord>(1);
  auto* stop = mapped<int>(1);
  find_faults<<<64, 256>>>(record, stop, 8'000'000'000);
  need(cudaGetLastError(), "the kernel that finds faults");
  const volatile uint32_t &ready = record->ready, &claimed = record->claimed;
  volatile uint32_t& taken = record->taken;
  bool whole = true;
  uint32_t number = 0;
  const std::clock_t end = std::clock() + 3 * CLOCKS_PER_SEC;
  while (number < wanted && whole && std::clock() < end) {
    if (ready == number) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    const int64_t* f = record->fault;
    whole = ready == number + 1 && claimed == number + 1 && f[0] == 1 && f[3] == f[1] + f[2] &&
            f[4] == f[1] - f[2] && f[5] == 3 * f[1];
    std::atomic_thread_fence(std::memory_order_release);
    taken = ++number;
  }
  *static_cast<volatile int*>(stop) = 1;
  need(cudaDeviceSynchronize(), "the kernel that finds faults");
  std::printf("%u faults were read\n", number);
  say("faults that many threads write and the host takes come one after the other, each of them whole",
      whole && number == wanted && claimed - number <= 1 && ready == claimed);
}

}  // namespace

int main() {
  try {
    cudaDeviceProp properties{};
    need(cudaGetDeviceProperties(&properties, 0), "looking for a GPU");
    check_mma(properties.major * 10 + properties.minor);
    check_dp4a();
    check_conversions();
    check_record();
    check_faults();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 100;
  }
  return failures;
}
