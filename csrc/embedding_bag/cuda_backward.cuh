// Gradients on GPUs: of the table, and of the per-sample weights. The same bits at every run.
#pragma once

#include "cuda_bags.cuh"

namespace rk {

// ---- which row a position adds to ----

struct KeyArguments {
  Bags bags;
  Bounds bounds;
  void* keys;  // for each position its row, or num_rows for none; int64 if keys_64, else int32
  uint32_t* bag_of;
  void* factors;  // what the bag's gradient is multiplied with, of type `factor_type`; or null
  RowType factor_type;
  bool keys_64;
  uint32_t num_rows;
  int32_t log_team;
};

// Positions of a bag that count.
__device__ __forceinline__ int64_t count_present(const Bags& b, const Range& range, const Team& team,
                                                 uint32_t num_rows, const Bounds& bounds) {
  int64_t count = 0;
  for (int64_t at = range.begin; __any_sync(all_lanes, at < range.end); at += team.team) {
    const int64_t position = at + team.in_group;
    bool present = position < range.end;
    if (present) {
      const int64_t index = load_integer(b.indices, b.indices_64, position);
      present = checked_row(index, position, num_rows, b.padding_idx, bounds, {-1, 0}) != absent;
    }
    count += __popc(__ballot_sync(all_lanes, present) & team.mask());
  }
  return count;
}

// Teams of one group each.
__global__ void __launch_bounds__(block_lanes) keys_kernel(const __grid_constant__ KeyArguments a) {
  const Team team(a.log_team, 0);
  const Bags& b = a.bags;
  const int64_t step = warps_in_grid() * team.per_warp();
  for (int64_t first = warp_number() * team.per_warp(); first < b.num_bags; first += step) {
    const int64_t bag = first + team.in_warp();
    Range range{0, 0};
    if (bag < b.num_bags) range = bag_range(b, bag, false, a.bounds);
    double one = 1.0;
    if (b.pooling == Pooling::mean) {
      const int64_t count = count_present(b, range, team, a.num_rows, a.bounds);
      if (count > 1) one = 1.0 / static_cast<double>(count);
    }
    for (int64_t position = range.begin + team.in_group; position < range.end; position += team.team) {
      const int64_t index = load_integer(b.indices, b.indices_64, position);
      const uint32_t row = checked_row(index, position, a.num_rows, b.padding_idx, a.bounds, {-1, 0});
      const uint32_t key = row == absent ? a.num_rows : row;
      if (a.keys_64) {
        static_cast<int64_t*>(a.keys)[position] = key;
      } else {
        static_cast<int32_t*>(a.keys)[position] = static_cast<int32_t>(key);
      }
      a.bag_of[position] = static_cast<uint32_t>(bag);
      if (a.factors == nullptr) continue;
      double factor = one;
      if (b.weights != nullptr) factor *= load_float<double>(b.weights, b.weights_type, position);
      store_float(a.factors, a.factor_type, position, factor);
    }
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
// times costs four launches, and no lane adds more than a chunk.
template <RowType T, bool Wide>
struct Segments {
  using R = Row<T, Wide>;
  using Sum = typename R::Sum;
  static constexpr int elements = R::elements;
  static constexpr int most = 4;

  const SegmentArguments& a;
  const Team& team;
  const Share& share;
  const char* base;
  int64_t chunk;
  Sum sum[elements];
  uint32_t key;                // of the run that is being summed
  bool came_in;                // it began in an earlier chunk
  bool holds;                  // it has entries
  bool used_first, used_last;  // sums left to the next launch

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
    const Columns<T, Wide> columns(share, a.dim);
    const bool finished = !came_in && !goes_on;
    used_first |= came_in;
    used_last |= goes_on && !came_in;
    const int64_t row = finished ? static_cast<int64_t>(key) : 2 * chunk + (came_in ? 0 : 1);
    char* to = static_cast<char*>(finished ? a.out.data : a.partial.data);
    const RowType type = finished ? a.out.type : a.partial.type;
    columns.store(to + row * int64_t{a.dim} * float_bytes(type), type, sum);
  }

  // Entries j to j + most - 1 of the group; `inside`: those that there are.
  __device__ __forceinline__ void batch(int j, uint32_t own_key, uint32_t own_row, Sum own_factor,
                                        int inside) {
    uint32_t word[most][R::words];
    uint32_t row[most];
    const int limit = share.first < share.row_bytes ? team.group : 0;
#pragma unroll
    for (int u = 0; u < most; ++u) {
      row[u] = __shfl_sync(all_lanes, own_row, team.source(j + u));
#pragma unroll
      for (int w = 0; w < R::words; ++w) word[u][w] = 0;
      if (row[u] != absent && j + u < limit) {
        load_share<T, Wide>(word[u], base + static_cast<uint64_t>(row[u]) * a.source.row_stride, share);
      }
    }
#pragma unroll
    for (int u = 0; u < most; ++u) {
      const uint32_t new_key = __shfl_sync(all_lanes, own_key, team.source(j + u));
      Sum factor = 1;
      if (opaque(a.factors != nullptr)) factor = __shfl_sync(all_lanes, own_factor, team.source(j + u));
      if (j + u >= inside) continue;
      if (new_key != key) {
        end_run(false);
        begin_run(new_key, false);
      }
      if (row[u] == absent) continue;
      holds = true;
      Sum x[elements];
      unpack<T, Wide>(word[u], x);
#pragma unroll
      for (int e = 0; e < elements; ++e) sum[e] = fma(x[e], factor, sum[e]);
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
    for (int64_t at = begin; __any_sync(all_lanes, at < end); at += team.group) {
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
      for (int j = 0; j < team.group && __any_sync(all_lanes, j < inside); j += most) {
        batch(j, own_key, own_row, own_factor, inside);
      }
    }
    if (!exists) return;
    end_run(end < a.count && real_key(key_at(end)) == key);
    if (writes_keys && team.in_group == 0) {
      const int64_t first = first_key, last = key;
      a.next_keys[2 * chunk] = used_first ? first : ~first;
      a.next_keys[2 * chunk + 1] = used_last ? last : ~last;
    }
  }
};

template <RowType T, bool Wide>
__device__ __forceinline__ void sum_segments(const SegmentArguments& a) {
  using R = Row<T, Wide>;
  const int log_lanes = log_group<T, Wide>(a.source.row_bytes);
  const Team team(log_lanes, 0);
  const uint32_t tile_bytes = static_cast<uint32_t>(R::bytes) << log_lanes;
  const int64_t chunks = ((a.count - 1) >> a.log_chunk) + 1;
  const int64_t step = warps_in_grid() * team.per_warp();
  for (uint32_t tile = blockIdx.z * tile_bytes; tile < a.source.row_bytes; tile += gridDim.z * tile_bytes) {
    const Share share = share_of<T, Wide>(a.source, team.in_group, team.group, tile);
    const char* base = opaque(a.source.rows + share.first);
    for (int64_t chunk = warp_number() * team.per_warp(); chunk < chunks; chunk += step) {
      Segments<T, Wide> segments{a, team, share, base, chunk + team.in_warp()};
      segments.run(tile == 0);
    }
  }
}

template <RowType T>
__global__ void __launch_bounds__(block_lanes) segments_kernel(const __grid_constant__ SegmentArguments a) {
  if (is_wide<T>(a.source, a.dim)) {
    sum_segments<T, true>(a);
  } else {
    sum_segments<T, false>(a);
  }
}

// ---- per-sample weights ----

struct WeightArguments {
  DeviceTable table;  // aligned as both it and the gradient are
  Bags bags;
  Bounds bounds;
  const char* grad;
  int64_t grad_stride;  // bytes
  Matrix out;           // one value a position
};

// A group of lanes takes a bag; each of its rows is multiplied with the bag's gradient and summed up.
template <RowType T, bool Wide>
struct Dots {
  using R = Row<T, Wide>;
  using Sum = typename R::Sum;
  static constexpr int most = 4;

  const WeightArguments& a;
  const Team& team;

  __device__ __forceinline__ void batch(int j, uint32_t own_row, const char* grad, Sum& result) const {
    uint32_t row[most];
    Sum dot[most];
#pragma unroll
    for (int u = 0; u < most; ++u) {
      row[u] = __shfl_sync(all_lanes, own_row, team.source(j + u));
      if (j + u >= team.group) row[u] = absent;
      dot[u] = 0;
    }
    const uint32_t tile_bytes = static_cast<uint32_t>(R::bytes) * team.group;
    for (uint32_t tile = 0; tile < a.table.row_bytes; tile += tile_bytes) {
      const Share share = share_of<T, Wide>(a.table, team.in_group, team.group, tile);
      if (share.first >= share.row_bytes) break;
      uint32_t word[most][R::words], grad_word[R::words];
      load_share<T, Wide>(grad_word, grad + share.first, share);
#pragma unroll
      for (int u = 0; u < most; ++u) {
#pragma unroll
        for (int w = 0; w < R::words; ++w) word[u][w] = 0;
        if (row[u] == absent) continue;
        const char* p = a.table.rows + static_cast<uint64_t>(row[u]) * a.table.row_stride + share.first;
        load_share<T, Wide>(word[u], p, share);
      }
      Sum g[R::elements];
      unpack<T, Wide>(grad_word, g);
#pragma unroll
      for (int u = 0; u < most; ++u) {
        Sum x[R::elements];
        unpack<T, Wide>(word[u], x);
#pragma unroll
        for (int e = 0; e < R::elements; ++e) dot[u] = fma(x[e], g[e], dot[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < most; ++u) {
      dot[u] = sum_over(dot[u], 1, team.group);
      // A row that does not count is zero, but zero times infinity is not.
      if (team.in_group == j + u) result = row[u] == absent ? Sum{0} : dot[u];
    }
  }

  __device__ __forceinline__ void run(int64_t bag) const {
    const Bags& b = a.bags;
    bag += team.in_warp();
    const bool exists = bag < b.num_bags;
    Range range{0, 0};
    if (exists) range = bag_range(b, bag, false, a.bounds);
    Sum factor = 1;
    if (b.pooling == Pooling::mean) {
      const int64_t count = count_present(b, range, team, a.table.num_rows, a.bounds);
      if (count > 1) factor = Sum{1} / static_cast<Sum>(count);
    }
    const char* grad = a.grad + (exists ? bag : 0) * a.grad_stride;
    for (int64_t at = range.begin; __any_sync(all_lanes, at < range.end); at += team.group) {
      const int64_t position = at + team.in_group;
      uint32_t own_row = absent;
      if (position < range.end) {
        const int64_t index = load_integer(b.indices, b.indices_64, position);
        own_row = checked_row(index, position, a.table.num_rows, b.padding_idx, a.bounds, {-1, 0});
      }
      Sum result = 0;
      for (int j = 0; j < team.group && __any_sync(all_lanes, at + j < range.end); j += most) {
        batch(j, own_row, grad, result);
      }
      if (position < range.end) store_float(a.out.data, a.out.type, position, result * factor);
    }
  }
};

template <RowType T, bool Wide>
__device__ __forceinline__ void dot_bags(const WeightArguments& a) {
  const Team team(log_group<T, Wide>(a.table.row_bytes), 0);
  const int64_t step = warps_in_grid() * team.per_warp();
  for (int64_t bag = warp_number() * team.per_warp(); bag < a.bags.num_bags; bag += step) {
    Dots<T, Wide>{a, team}.run(bag);
  }
}

template <RowType T>
__global__ void __launch_bounds__(block_lanes) weights_kernel(const __grid_constant__ WeightArguments a) {
  if (is_wide<T>(a.table, a.table.row_bytes / float_bytes(T))) {
    dot_bags<T, true>(a);
  } else {
    dot_bags<T, false>(a);
  }
}

}  // namespace rk
