// Gradients on GPUs: of the table, and of the per-sample weights. The same bits at every run.
#pragma once

#include "cuda_bags.cuh"

namespace rk {

// ---- bags and their positions ----

// Checks every bag's offsets, each thread of the grid some of them.
__device__ __forceinline__ void check_offsets(const Bags& b, const Bounds& bounds) {
  if (b.offsets == nullptr) return;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_lanes;
  for (int64_t bag = static_cast<int64_t>(blockIdx.x) * block_lanes + threadIdx.x; bag < b.num_bags;
       bag += threads) {
    bag_range(b, bag, false, bounds);
  }
}

constexpr uint32_t no_bag = 0xffffffffu;

// The bag that a position belongs to. Wrong offsets can make bags overlap: it still belongs to one at most.
__device__ __forceinline__ uint32_t bag_of_position(const Bags& b, uint32_t position, const Bounds& bounds) {
  if (b.offsets == nullptr) return position / static_cast<uint32_t>(b.bag_length);
  int64_t low = 0, high = b.num_bags;  // the last bag that does not begin later is one of these
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offset_on_device(b, middle) <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Range range = bag_range(b, low, false, {nullptr, bounds.mode});
  return range.begin <= position && position < range.end ? static_cast<uint32_t>(low) : no_bag;
}

// x - y, but not below 0.
__device__ __forceinline__ uint32_t less(uint32_t x, int y) { return x - min(x, static_cast<uint32_t>(y)); }

struct MeanArguments {
  Bags bags;
  Bounds bounds;
  void* factors;  // for each bag 1 over the number of its rows, of type Sum
  uint32_t num_rows;
  int32_t log_team;
};

template <typename Sum>
__global__ void __launch_bounds__(block_lanes) mean_kernel(const __grid_constant__ MeanArguments a) {
  const Team team(a.log_team, 0);
  const Bags& b = a.bags;
  const int64_t step = warps_in_grid() * team.per_warp();
  for (int64_t first = warp_number() * team.per_warp(); any_lane(first < b.num_bags); first += step) {
    const int64_t bag = first + team.in_warp();
    Range range{0, 0};
    if (bag < b.num_bags) range = bag_range(b, bag, false, a.bounds);
    uint32_t count = 0;
    // The loop counts the remaining rows down: the position of a finished team could wrap around at 2^32.
    uint32_t position = range.begin + static_cast<uint32_t>(team.in_group);
    for (uint32_t left = range.end - range.begin; any_lane(left > 0);
         left = less(left, team.team), position += static_cast<uint32_t>(team.team)) {
      bool present = static_cast<uint32_t>(team.in_group) < left;
      if (present) {
        const int64_t index = load_integer(b.indices, b.indices_64, position);
        present = checked_row(index, position, a.num_rows, b.padding_idx, a.bounds, {-1, 0}) != absent;
      }
      count += __popc(__ballot_sync(all_lanes, present) & team.mask());
    }
    if (bag < b.num_bags && team.in_group == 0) {
      static_cast<Sum*>(a.factors)[bag] = Sum{1} / static_cast<Sum>(max(count, 1u));
    }
  }
}

struct KeyArguments {
  Bags bags;
  Bounds bounds;
  void* keys;  // for each position its row, or num_rows for none; int64 if keys_64, else int32
  uint32_t* bag_of;
  void* factors;             // what the bag's gradient is multiplied with, of type Sum; or null
  const void* mean_factors;  // the bags' share of it; or null
  bool keys_64;
  uint32_t num_rows;
};

// A thread a position.
template <typename Sum>
__global__ void __launch_bounds__(block_lanes) keys_kernel(const __grid_constant__ KeyArguments a) {
  const Bags& b = a.bags;
  check_offsets(b, a.bounds);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_lanes;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * block_lanes + threadIdx.x; i < b.num_indices;
       i += threads) {
    const uint32_t position = static_cast<uint32_t>(i), bag = bag_of_position(b, position, a.bounds);
    uint32_t row = absent;
    if (bag != no_bag) {
      const int64_t index = load_integer(b.indices, b.indices_64, i);
      row = checked_row(index, position, a.num_rows, b.padding_idx, a.bounds, {-1, 0});
    }
    const uint32_t key = row == absent ? a.num_rows : row;
    if (a.keys_64) {
      static_cast<int64_t*>(a.keys)[i] = key;
    } else {
      static_cast<int32_t*>(a.keys)[i] = static_cast<int32_t>(key);
    }
    if (row == absent) continue;  // nobody asks for the rest
    a.bag_of[i] = bag;
    if (a.factors == nullptr) continue;
    Sum factor = 1;
    if (b.weights != nullptr) factor = load_float<Sum>(b.weights, b.weights_type, i);
    if (a.mean_factors != nullptr)
      factor *= load_constant<Sum>(static_cast<const Sum*>(a.mean_factors) + bag);
    static_cast<Sum*>(a.factors)[i] = factor;
  }
}

// ---- sums of runs of equal keys ----

// Entries are the positions, sorted by row; then, launch by launch, the sums that chunks left unfinished.
struct SegmentArguments {
  DeviceTable source;  // rows to add up
  int32_t dim;
  const void* keys;  // ascending. ~key: an entry that holds nothing, between others of this key
  bool keys_64;
  const int64_t* order;    // of the first launch: the position of each entry, else null
  const uint32_t* bag_of;  // for positions
  const void* factors;     // for positions, in the type of sums; or null
  int64_t count;
  int32_t log_chunk;   // log2 of the entries in a chunk
  uint32_t sentinel;   // the key of entries that belong to no row
  Matrix out;          // a row for each key; contiguous
  int64_t* next_keys;  // two for each chunk
  Matrix partial;      // and two rows of sums; contiguous
};

// A group of lanes sums the entries of a chunk over the columns of a tile. A run of equal keys that lies in
// one chunk is a finished row. The others leave sums, at most two a chunk (of the run that came in, and of
// the one that goes on), which the next launch adds up in the same way: a row that is looked up a million
// times costs five launches, and no lane adds more than a chunk.
template <typename Share>
struct Segments {
  using Sum = typename Share::Sum;
  static constexpr int elements = Share::elements;
  static constexpr int rows = 4;  // at a time

  const SegmentArguments& a;
  const Team& team;
  const Share& share;
  const char* const base;  // the lane's share of row 0
  const uint32_t first;    // and where it begins in the row
  const int64_t chunk;
  Sum sum[elements];
  uint32_t key;                // of the run that is being summed
  bool came_in;                // it began in an earlier chunk
  bool holds;                  // it has entries
  bool used_first, used_last;  // sums left to the next launch

  __device__ __forceinline__ Segments(const SegmentArguments& a_arg, const Team& team_arg,
                                      const Share& share_arg, const char* base_arg, uint32_t first_arg,
                                      int64_t chunk_arg)
      : a(a_arg), team(team_arg), share(share_arg), base(base_arg), first(first_arg), chunk(chunk_arg) {}

  static __device__ __forceinline__ uint32_t real_key(int64_t key) {
    return static_cast<uint32_t>(key < 0 ? ~key : key);
  }

  __device__ __forceinline__ int64_t key_at(int64_t entry) const {
    return load_integer(a.keys, a.keys_64, entry);
  }

  __device__ __forceinline__ void begin_run(uint32_t new_key, bool from_before) {
    key = new_key;
    came_in = from_before;
    holds = false;
#pragma unroll
    for (int e = 0; e < elements; ++e) sum[e] = 0;
  }

  __device__ __forceinline__ void end_run(bool goes_on) {
    if (!holds) return;
    const bool finished = !came_in && !goes_on;
    used_first |= came_in;
    used_last |= goes_on && !came_in;
    if (first >= a.source.row_bytes) return;
    const int64_t row = finished ? static_cast<int64_t>(key) : 2 * chunk + (came_in ? 0 : 1);
    char* to = static_cast<char*>(finished ? a.out.data : a.partial.data);
    const ElementType type = finished ? a.out.type : a.partial.type;
    share.store(to + row * a.dim * (element_bits(type) / 8), type, first, a.dim, sum);
  }

  // Entries j to j + rows - 1 of the group; the first `inside` of them exist.
  __device__ __forceinline__ void batch(int j, uint32_t own_key, uint32_t own_row, Sum own_factor,
                                        int inside) {
    uint32_t word[rows][Share::words], row[rows];
    const int limit = first < a.source.row_bytes ? team.group : 0;
#pragma unroll
    for (int u = 0; u < rows; ++u) {
      row[u] = __shfl_sync(all_lanes, own_row, team.source(j + u));
#pragma unroll
      for (int w = 0; w < Share::words; ++w) word[u][w] = 0;
      if (row[u] != absent && j + u < limit) {
        share.load(word[u], base + static_cast<uint64_t>(row[u]) * a.source.row_stride);
      }
    }
    uint32_t new_key[rows];
    Sum factor[rows];
#pragma unroll
    for (int u = 0; u < rows; ++u) {
      new_key[u] = __shfl_sync(all_lanes, own_key, team.source(j + u));
      factor[u] = __shfl_sync(all_lanes, own_factor, team.source(j + u));
    }
#pragma unroll
    for (int u = 0; u < rows; ++u) {
      if (j + u >= inside) break;
      if (new_key[u] != key) {
        end_run(false);
        begin_run(new_key[u], false);
      }
      if (row[u] == absent) continue;
      holds = true;
      share.visit([&](auto type) {
        constexpr ElementType T = decltype(type)::value;
#pragma unroll
        for (int e = 0; e < Share::words * 32 / element_bits(T); ++e) {
          sum[e] = fma(static_cast<Sum>(element_of<T>(word[u], e)), factor[u], sum[e]);
        }
      });
    }
  }

  __device__ __forceinline__ void run(bool writes_keys) {
    const int64_t begin = chunk << a.log_chunk;
    const int64_t most_end = (chunk + 1) << a.log_chunk;
    const int64_t end = most_end < a.count ? most_end : a.count;  // less than begin: no such chunk
    const bool exists = begin < end;
    const uint32_t first_key = exists ? real_key(key_at(begin)) : 0;
    used_first = used_last = false;
    begin_run(first_key, exists && begin > 0 && real_key(key_at(begin - 1)) == first_key);
    for (int64_t at = begin; any_lane(at < end); at += team.group) {
      const int64_t entry = at + team.in_group;
      uint32_t own_key = 0, own_row = absent;
      Sum own_factor = 1;
      if (entry < end) {
        const int64_t stored = key_at(entry);
        own_key = real_key(stored);
        if (stored >= 0 && own_key < a.sentinel) {
          own_row = static_cast<uint32_t>(entry);
          if (a.order != nullptr) {
            const int64_t position = load_constant<long long>(a.order + entry);
            own_row = load_constant<unsigned>(a.bag_of + position);
            if (a.factors != nullptr)
              own_factor = load_constant<Sum>(static_cast<const Sum*>(a.factors) + position);
          }
        }
      }
      const int64_t left = end - at;
      const int inside = left < team.group ? static_cast<int>(left) : team.group;  // can be negative
      for (int j = 0; j < team.group && any_lane(j < inside); j += rows) {
        batch(j, own_key, own_row, own_factor, inside);
      }
    }
    if (!exists) return;
    end_run(end < a.count && real_key(key_at(end)) == key);
    if (writes_keys && team.in_group == 0) {
      const int64_t front = first_key, back = key;
      a.next_keys[2 * chunk] = used_first ? front : ~front;
      a.next_keys[2 * chunk + 1] = used_last ? back : ~back;
    }
  }
};

template <typename Share>
__device__ __forceinline__ void sum_segments(const SegmentArguments& a, const Share& share) {
  const int log_lanes = log_group(a.source.row_bytes, share.bytes);
  const Team team(log_lanes, 0);
  const uint32_t tile_bytes = static_cast<uint32_t>(share.bytes) << log_lanes;
  const int64_t chunks = ((a.count - 1) >> a.log_chunk) + 1;
  const int64_t step = warps_in_grid() * team.per_warp();
  for (uint32_t tile = blockIdx.z * tile_bytes; tile < a.source.row_bytes; tile += gridDim.z * tile_bytes) {
    const uint32_t first = tile + static_cast<uint32_t>(team.in_group * share.bytes);
    const char* base = opaque(a.source.rows + first);
    for (int64_t chunk = warp_number() * team.per_warp(); any_lane(chunk < chunks); chunk += step) {
      Segments<Share> segments(a, team, share, base, first, chunk + team.in_warp());
      segments.run(tile == 0);
    }
  }
}

// Gradients of any type but float64, or of float64.
template <typename Sum>
__global__ void __launch_bounds__(block_lanes, blocks_at_once)
    segments_kernel(const __grid_constant__ SegmentArguments a) {
  if constexpr (std::is_same_v<Sum, float>) {
    if (is_wide(a.source, a.source.type, a.dim)) {
      switch (a.source.type) {
        case ElementType::f32:
          return sum_segments(a, WideShare<ElementType::f32>{});
        case ElementType::f16:
          return sum_segments(a, WideShare<ElementType::f16>{});
        default:
          return sum_segments(a, WideShare<ElementType::bf16>{});
      }
    }
  }
  sum_segments(a, NarrowShare<Sum, std::is_same_v<Sum, double> ? 1 : 2>(a.source.type, a.source.alignment));
}

// ---- per-sample weights ----

struct WeightArguments {
  DeviceTable table;  // aligned as both it and the gradient are
  Bags bags;
  Bounds bounds;
  const char* grad;
  int64_t grad_stride;       // bytes
  const void* mean_factors;  // for each bag, of type Sum; or null
  Matrix out;                // one value a position
};

// A group of lanes takes as many positions as it has lanes: each one's row times the gradient of its bag. In
// narrow shares only: 4 rows and 4 gradients of 4 bytes a lane in flight, with the 1024 lanes that fit 32
// KiB.
template <typename Share>
struct Dots {
  using Sum = typename Share::Sum;
  static constexpr int rows = 4;

  const WeightArguments& a;
  const Team& team;
  const Share& share;

  __device__ __forceinline__ void batch(int j, uint32_t own_row, uint32_t own_bag, Sum& result) const {
    uint32_t row[rows], bag[rows];
    Sum dot[rows];
#pragma unroll
    for (int u = 0; u < rows; ++u) {
      row[u] = __shfl_sync(all_lanes, own_row, team.source(j + u));
      bag[u] = __shfl_sync(all_lanes, own_bag, team.source(j + u));
      if (j + u >= team.group) row[u] = absent;
      dot[u] = 0;
    }
    const uint32_t between = static_cast<uint32_t>(team.group * share.bytes);
    for (uint32_t tile = 0; tile < a.table.row_bytes; tile += between) {
      const uint32_t at = tile + static_cast<uint32_t>(team.in_group * share.bytes);
      uint32_t word[rows][Share::words], grad[rows][Share::words];
#pragma unroll
      for (int u = 0; u < rows; ++u) {
#pragma unroll
        for (int w = 0; w < Share::words; ++w) word[u][w] = grad[u][w] = 0;
        if (row[u] != absent && at < a.table.row_bytes) {
          share.load(word[u], a.table.rows + static_cast<uint64_t>(row[u]) * a.table.row_stride + at);
          share.load(grad[u], a.grad + bag[u] * a.grad_stride + at);
        }
      }
      share.visit([&](auto type) {
        constexpr ElementType T = decltype(type)::value;
#pragma unroll
        for (int u = 0; u < rows; ++u) {
#pragma unroll
          for (int e = 0; e < Share::words * 32 / element_bits(T); ++e) {
            const Sum x = element_of<T>(word[u], e), g = element_of<T>(grad[u], e);
            dot[u] = fma(x, g, dot[u]);
          }
        }
      });
    }
#pragma unroll
    for (int u = 0; u < rows; ++u) {
      dot[u] = sum_over(dot[u], 1, team.group);
      if (team.in_group == j + u) result = dot[u];
    }
  }

  // The positions from `begin` on.
  __device__ __forceinline__ void run(int64_t begin) const {
    const Bags& b = a.bags;
    const int64_t position = begin + team.in_group;
    uint32_t own_row = absent, own_bag = no_bag;
    if (position < b.num_indices) {
      own_bag = bag_of_position(b, static_cast<uint32_t>(position), a.bounds);
      if (own_bag != no_bag) {
        const int64_t index = load_integer(b.indices, b.indices_64, position);
        own_row = checked_row(index, position, a.table.num_rows, b.padding_idx, a.bounds, {-1, 0});
      }
    }
    Sum result = 0;
    for (int j = 0; j < team.group && any_lane(begin + j < b.num_indices); j += rows) {
      batch(j, own_row, own_bag, result);
    }
    if (position >= b.num_indices) return;
    if (a.mean_factors != nullptr && own_row != absent) {
      result *= load_constant<Sum>(static_cast<const Sum*>(a.mean_factors) + own_bag);
    }
    store_float(a.out.data, a.out.type, position, own_row == absent ? Sum{0} : result);
  }
};

template <typename Sum>
__global__ void __launch_bounds__(block_lanes, 4) weights_kernel(const __grid_constant__ WeightArguments a) {
  using Share = NarrowShare<Sum, std::is_same_v<Sum, double> ? 1 : 2>;
  const Share share(a.table.type, a.table.alignment);
  const Team team(log_group(a.table.row_bytes, share.bytes), 0);
  const int64_t step = warps_in_grid() * warp_lanes;
  for (int64_t at = warp_number() * warp_lanes; any_lane(at < a.bags.num_indices); at += step) {
    Dots<Share>{a, team, share}.run(at + team.in_warp() * team.group);
  }
  check_offsets(a.bags, a.bounds);
}

}  // namespace rk
