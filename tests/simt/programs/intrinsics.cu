// What shuffles, votes, reductions and atomic operations give.

#include "cases.h"

namespace {

constexpr unsigned everybody = 0xffffffffu;

// ---- shuffles ----

template <typename T>
struct Shuffled {
  T from, up, down, across;
};

template <typename T>
__global__ void shuffle_all(Shuffled<T>* out, int by, int width) {
  const T mine = static_cast<T>(static_cast<float>(threadIdx.x) + 0.5f);
  out[threadIdx.x] = {__shfl_sync(everybody, mine, by, width),
                      __shfl_up_sync(everybody, mine, static_cast<unsigned>(by), width),
                      __shfl_down_sync(everybody, mine, static_cast<unsigned>(by), width),
                      __shfl_xor_sync(everybody, mine, by, width)};
}

template <typename T>
T value_of(int lane) {
  return static_cast<T>(static_cast<float>(lane) + 0.5f);
}

template <typename T>
bool check_shuffles(int by, int width) {
  Buffer<Shuffled<T>> out(32);
  RK_RUN(shuffle_all<T>, 1, 32, 0, nullptr, out.get(), by, width);
  bool good = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int place = lane % width, segment = lane / width, partner = lane ^ by;
    const auto check = [&](const char* what, T got, int source) {
      good = same(what, lane, static_cast<float>(got), static_cast<float>(value_of<T>(source))) && good;
    };
    check("shfl", out[lane].from, segment * width + by % width);
    check("shfl_up", out[lane].up, place >= by ? lane - by : lane);
    check("shfl_down", out[lane].down, place + by < width ? lane + by : lane);
    check("shfl_xor", out[lane].across, partner / width <= segment ? partner : lane);
  }
  return good;
}

// ---- votes and reductions ----

struct Votes {
  unsigned ballot, match, match_all, match_64;
  int any, all, all_equal;
  unsigned add, lowest, highest, both, either, odd;
  int signed_add, signed_lowest, signed_highest;
};

// Lanes below 20 in two groups, 0-6 and 7-19; the others stay away.
__global__ void vote(Votes* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 20) return;
  const unsigned mask = lane < 7 ? 0x7fu : 0xfff80u;
  Votes v{};
  v.ballot = __ballot_sync(mask, lane % 3 == 0);
  v.any = __any_sync(mask, lane == 9);
  v.all = __all_sync(mask, lane < 10);
  v.match = __match_any_sync(mask, lane % 4);
  v.match_64 = __match_any_sync(mask, static_cast<long long>(lane % 2) << 40);
  v.match_all = __match_all_sync(mask, lane < 7 ? 1.5f : static_cast<float>(lane), &v.all_equal);
#if RK_ARCH >= 800
  const unsigned bits = 1u << (lane % 5) | 0x100u;
  v.add = __reduce_add_sync(mask, 0x80000000u + static_cast<unsigned>(lane));
  v.lowest = __reduce_min_sync(mask, static_cast<unsigned>(lane - 8));
  v.highest = __reduce_max_sync(mask, static_cast<unsigned>(lane - 8));
  v.both = __reduce_and_sync(mask, bits);
  v.either = __reduce_or_sync(mask, bits);
  v.odd = __reduce_xor_sync(mask, bits);
  v.signed_add = __reduce_add_sync(mask, lane - 8);
  v.signed_lowest = __reduce_min_sync(mask, lane - 8);
  v.signed_highest = __reduce_max_sync(mask, lane - 8);
#endif
  out[lane] = v;
}

bool check_votes(const Votes& v, int lane) {
  const int first = lane < 7 ? 0 : 7, last = lane < 7 ? 6 : 19;
  unsigned ballot = 0, match = 0, match_64 = 0;
  for (int l = first; l <= last; ++l) {
    ballot |= l % 3 == 0 ? 1u << l : 0;
    match |= l % 4 == lane % 4 ? 1u << l : 0;
    match_64 |= l % 2 == lane % 2 ? 1u << l : 0;
  }
  return same("ballot", lane, v.ballot, ballot) && same("match", lane, v.match, match) &&
         same("match_64", lane, v.match_64, match_64) && same("any", lane, v.any != 0, lane >= 7) &&
         same("all", lane, v.all != 0, lane < 7) &&
         same("match_all", lane, v.match_all, lane < 7 ? 0x7fu : 0u) &&
         same("all_equal", lane, v.all_equal != 0, lane < 7);
}

bool check_reductions(const Votes& v, int lane) {
  const int first = lane < 7 ? 0 : 7, last = lane < 7 ? 6 : 19;
  unsigned add = 0, both = ~0u, either = 0, odd = 0, lowest = ~0u, highest = 0;
  int signed_add = 0;
  for (int l = first; l <= last; ++l) {
    const unsigned bits = 1u << (l % 5) | 0x100u, shifted = static_cast<unsigned>(l - 8);
    add += 0x80000000u + static_cast<unsigned>(l);
    both &= bits, either |= bits, odd ^= bits;
    lowest = std::min(lowest, shifted), highest = std::max(highest, shifted);
    signed_add += l - 8;
  }
  return same("add", lane, v.add, add) && same("and", lane, v.both, both) &&
         same("or", lane, v.either, either) && same("xor", lane, v.odd, odd) &&
         same("min", lane, v.lowest, lowest) && same("max", lane, v.highest, highest) &&
         same("signed add", lane, v.signed_add, signed_add) &&
         same("signed min", lane, v.signed_lowest, first - 8) &&
         same("signed max", lane, v.signed_highest, last - 8);
}

// The oldest GPUs that are served have no reductions.
bool has_reductions() {
#if defined(RK_SIMT)
  return RK_ARCH >= 800;
#else
  int major = 0;
  rk::cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0),
                 "asking for the architecture");
  return major >= 8;
#endif
}

// ---- blocks ----

__global__ void count_in_block(int* out) {
  const int me = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int count = __syncthreads_count(me % 3 == 0);
  const int any = __syncthreads_or(me == 5), none = __syncthreads_or(me == 1000);
  const int all = __syncthreads_and(me < 1000), most = __syncthreads_and(me != 7);
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  out[block * 120 + me] =
      count * 10000 + (any != 0) * 1000 + (none != 0) * 100 + (all != 0) * 10 + (most != 0);
}

// The sum of 1000 numbers by warps, then by one.
__global__ void sum_in_block(const float* in, float* out) {
  __shared__ float of_warp[32];
  RK_DYNAMIC_SHARED(float, staged);
  const unsigned me = threadIdx.x, lane = me % 32;
  staged[me] = me < 1000 ? in[me] : 0;
  __syncthreads();
  float sum = staged[blockDim.x - 1 - me];
  for (int step = 16; step > 0; step /= 2)
    sum += __shfl_down_sync(everybody, sum, static_cast<unsigned>(step));
  if (lane == 0) of_warp[me / 32] = sum;
  __syncthreads();
  if (me >= 32) return;
  sum = of_warp[me];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(everybody, sum, step);
  if (me == 0) *out = sum;
}

// Lanes that want the same counter add to it once together.
__global__ void add_together(int* counters, const int* wanted) {
  const int mine = wanted[threadIdx.x];
  const unsigned together = __match_any_sync(__activemask(), mine);
  const int leader = __ffs(static_cast<int>(together)) - 1;
  if (static_cast<int>(threadIdx.x % 32) == leader) atomicAdd(counters + mine, __popc(together));
}

}  // namespace

RK_RIGHT(shuffles) {
  bool good = true;
  for (int width = 1; width <= 32; width *= 2) {
    for (int by : {0, 1, 2, 3, 5, 8, 16, 31}) good = check_shuffles<float>(by, width) && good;
  }
  return good;
}
RK_RIGHT(shuffles_of_all_types) {
  return check_shuffles<int>(3, 16) && check_shuffles<unsigned>(3, 16) && check_shuffles<long>(3, 16) &&
         check_shuffles<unsigned long>(3, 16) && check_shuffles<long long>(3, 16) &&
         check_shuffles<unsigned long long>(3, 16) && check_shuffles<double>(3, 16) &&
         check_shuffles<__half>(3, 16) && check_shuffles<__nv_bfloat16>(3, 16);
}
RK_RIGHT(votes) {
  Buffer<Votes> out(20, Votes{});
  RK_RUN(vote, 1, 32, 0, nullptr, out.get());
  bool good = true;
  for (int lane = 0; lane < 20; ++lane) {
    good = check_votes(out[lane], lane) && (!has_reductions() || check_reductions(out[lane], lane)) && good;
  }
  return good;
}
RK_RIGHT(counts_of_blocks) {
  Buffer<int> out(6 * 120, 0);
  RK_RUN(count_in_block, dim3(1, 2, 3), dim3(4, 5, 6), 0, nullptr, out.get());
  bool good = true;
  for (int i = 0; i < 6 * 120; ++i) good = same("thread", i, out[i], 40 * 10000 + 1010) && good;
  return good;
}
RK_RIGHT(sum_of_a_block) {
  Buffer<float> in(1000), out(1, 0.0f);
  for (int i = 0; i < 1000; ++i) in[i] = static_cast<float>(i);
  RK_RUN(sum_in_block, 1, 1024, 1024 * sizeof(float), nullptr, in.get(), out.get());
  return same("sum", 0, out[0], 499500.0f);
}
RK_RIGHT(lanes_that_are_together) {
  Buffer<int> counters(10, 0), wanted(256);
  for (int i = 0; i < 256; ++i) wanted[i] = i * i % 10;
  RK_RUN(add_together, 1, 256, 0, nullptr, counters.get(), wanted.get());
  bool good = true;
  for (int c = 0; c < 10; ++c) {
    good =
        same("counter", c, counters[c], static_cast<int>(std::count(wanted.get(), wanted.get() + 256, c))) &&
        good;
  }
  return good;
}
