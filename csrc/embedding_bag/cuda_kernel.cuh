// Lookup and pooling on GPUs: raw pointers, sizes and strides; nothing of torch.
//
// A team of lanes pools a bag. Every lane of it reads one index, checks it, and reads the row's weight, scale
// and bias; then the team goes through these rows, handed round by shuffles. Rows are read 16 bytes a lane,
// 4 or 8 rows before the first is used: 64 or 128 bytes a lane in flight. With the 768 lanes that registers
// leave on a multiprocessor that is 48 or 96 KiB; 3.35 TB/s at a latency of 1 us need 3.35 MB in flight, 26
// KB on each of 132 multiprocessors. (Rows of other alignments: 8 rows, 4 bytes a lane, 24 KiB.)
#pragma once

#include "cuda_bags.cuh"

namespace rk {

constexpr int tables_in_launch = 64;

// The arguments of a launch of the pooling kernels, within the 4 KB that arguments may take.
struct PoolArguments {
  DeviceTable tables[tables_in_launch];
  Bags bags;  // of all features: num_bags is batch * features
  Matrix out;
  int64_t* argmax;
  Bounds bounds;
  const int64_t* plan;  // [features][plan_columns]; null: one feature, which is described by what follows
  ElementType type;
  int32_t dim;
  float multiplier;
  int32_t log_split;
  uint32_t batch;  // bags of a feature
  int64_t features;
  int64_t num_tables;   // of all launches
  int64_t first_table;  // the number of tables[0]
  int32_t launch_tables;
  bool zero_start;
  bool one_row;  // most bags have one row at most
};

static_assert(sizeof(PoolArguments) <= 4096, "what a kernel may take");

// The inputs and outputs of one feature.
struct Feature {
  ElementType type;
  int32_t dim;
  Pooling pooling;
  float multiplier;
  char* out;          // row 0, first column
  int64_t first_bag;  // its bag 0 among all bags
  Origin origin;
};

// A lane's index, and what its row is multiplied with and shifted by.
template <typename Sum>
struct Looked {
  uint32_t row;
  uint32_t scale_bias;  // of the row alone, two halves
  Sum scale;
  Sum shift;
};

// What a kernel can pool: sums only (and means), sums and maxima, or maxima and the rows they came from.
// Maxima are taken of narrow shares, which halves the code.
enum class Does { sum, sum_or_max, argmax };

// Pools bags of one feature, over the columns of one tile (as many as the lanes of a group hold).
template <typename Share, Does D>
struct Pooler {
  using Sum = typename Share::Sum;
  static constexpr int elements = Share::elements;
  static constexpr int rows = Share::rows;
  static constexpr int rows_of_max = 8;
  static constexpr bool argmax = D == Does::argmax;

  const PoolArguments& a;
  const DeviceTable& table;
  const Feature& feature;
  const Team& team;
  const Share& share;
  const char* const base;  // the lane's share of row 0
  const uint32_t first;    // and where it begins in the row
  Sum sum[elements];
  Sum bias;
  uint32_t place[argmax ? elements : 1];

  __device__ __forceinline__ Pooler(const PoolArguments& a_arg, const DeviceTable& table_arg,
                                    const Feature& feature_arg, const Team& team_arg, const Share& share_arg,
                                    const char* base_arg, uint32_t first_arg)
      : a(a_arg),
        table(table_arg),
        feature(feature_arg),
        team(team_arg),
        share(share_arg),
        base(base_arg),
        first(first_arg) {}

  __device__ __forceinline__ bool is_max() const {
    return argmax || (D == Does::sum_or_max && feature.pooling == Pooling::max);
  }

  __device__ __forceinline__ Looked<Sum> look_up(int64_t index, uint32_t position, bool inside) const {
    Looked<Sum> own{absent, 0, 0, 0};
    if (inside) {
      own.row = checked_row(index, position, table.num_rows, a.bags.padding_idx, a.bounds, feature.origin);
    }
    if (own.row == absent) return own;
    own.scale = 1;
    if (share.quantized()) {
      // 2-byte loads: inside of rows they need not lie on a multiple of 4.
      const char* p = table.scale_bias + static_cast<uint64_t>(own.row) * table.scale_bias_stride;
      const uint32_t scale = load_constant<unsigned short>(p), bias = load_constant<unsigned short>(p + 2);
      own.scale_bias = scale | bias << 16;
      own.scale = f16_to_float(scale);
      own.shift = f16_to_float(bias);
    }
    if (a.bags.weights != nullptr && !is_max()) {
      const Sum weight = load_float<Sum>(a.bags.weights, a.bags.weights_type, position);
      own.scale *= weight;
      own.shift *= weight;
    }
    return own;
  }

  // Reads rows j to j + Rows - 1 of the group, all before the first is used. What is absent reads as zero.
  template <int Rows>
  __device__ __forceinline__ void load(int j, const Looked<Sum>& own, uint32_t (&row)[Rows],
                                       uint32_t (&word)[Rows][Share::words]) const {
    const int limit = first < table.row_bytes ? team.group : 0;
#pragma unroll
    for (int u = 0; u < Rows; ++u) {
      row[u] = __shfl_sync(all_lanes, own.row, team.source(j + u));
      if (j + u >= limit) row[u] = absent;
#pragma unroll
      for (int w = 0; w < Share::words; ++w) word[u][w] = 0;
      if (row[u] != absent) share.load(word[u], base + static_cast<uint64_t>(row[u]) * table.row_stride);
    }
  }

  __device__ __forceinline__ void add_rows(int j, const Looked<Sum>& own) {
    uint32_t row[rows], word[rows][Share::words];
    load(j, own, row, word);
    if constexpr (Share::one_type) {
      share.visit([&](auto type) {
#pragma unroll
        for (int u = 0; u < rows; ++u) add<decltype(type)::value>(word[u], scale_of(j + u, own));
      });
    } else {
      Sum scale[rows];
#pragma unroll
      for (int u = 0; u < rows; ++u) scale[u] = scale_of(j + u, own);
      share.visit([&](auto type) {
#pragma unroll
        for (int u = 0; u < rows; ++u) add<decltype(type)::value>(word[u], scale[u]);
      });
    }
  }

  // `first_row`: the place of the bag's first row.
  __device__ __forceinline__ void take_rows(int j, const Looked<Sum>& own, unsigned first_row) {
    uint32_t row[rows_of_max], word[rows_of_max][Share::words];
    load(j, own, row, word);
    uint32_t scale_bias[rows_of_max];
    unsigned present = 0;  // one bit a row: an array would need more registers than there are
#pragma unroll
    for (int u = 0; u < rows_of_max; ++u) {
      present |= row[u] == absent ? 0 : 1u << u;
      scale_bias[u] = share.quantized() ? __shfl_sync(all_lanes, own.scale_bias, team.source(j + u)) : 0;
    }
    share.visit([&](auto type) {
#pragma unroll
      for (int u = 0; u < rows_of_max; ++u) {
        take_greater<decltype(type)::value>(word[u], scale_bias[u], (present >> u & 1) != 0,
                                            team.place(j + u) == first_row, row[u]);
      }
    });
  }

  // Returns the factor of the group's row number `j`. Rows behind the group belong to another bag, and may
  // be infinite.
  __device__ __forceinline__ Sum scale_of(int j, const Looked<Sum>& own) const {
    const Sum scale = __shfl_sync(all_lanes, own.scale, team.source(j));
    return j < team.group ? scale : Sum{0};
  }

  template <ElementType T>
  __device__ __forceinline__ void add(const uint32_t (&word)[Share::words], Sum scale) {
#pragma unroll
    for (int e = 0; e < Share::words * 32 / element_bits(T); ++e) {
      sum[e] = fma(static_cast<Sum>(element_of<T>(word, e)), scale, sum[e]);
    }
  }

  // The first row is taken as it is and later ones only where they are greater, as torch does: of equal
  // values the first wins, and a NaN is kept only from the first row.
  template <ElementType T>
  __device__ __forceinline__ void take_greater(const uint32_t (&word)[Share::words], uint32_t scale_bias,
                                               bool is_present, bool is_first, uint32_t row) {
#pragma unroll
    for (int e = 0; e < Share::words * 32 / element_bits(T); ++e) {
      Sum x = element_of<T>(word, e);
      if (is_quantized(T))
        x = fma(x, Sum{f16_to_float(scale_bias & 0xffffu)}, Sum{f16_to_float(scale_bias >> 16)});
      if (!is_present) x = -INFINITY;
      const bool take = is_first | (x > sum[e]);
      sum[e] = take ? x : sum[e];
      if constexpr (argmax) place[e] = take ? row : place[e];
    }
  }

  // Returns the position, from the team's first index, of the first index whose lane has `found`.
  __device__ __forceinline__ unsigned first_place(bool found) const {
    unsigned at = found ? team.place(team.in_group) : unsigned{warp_lanes};
    for (int lanes = 1; lanes < team.team; lanes <<= 1) {
      at = min(at, __shfl_xor_sync(all_lanes, at, lanes));
    }
    return at;
  }

  // Adds the biases of the rows, each lane having those of its own. The sums of scale * q and of the biases
  // grow with opposite signs: put together from time to time they stay small.
  __device__ __forceinline__ void fold() {
    bias = sum_over(bias, 1, team.group);
#pragma unroll
    for (int e = 0; e < elements; ++e) sum[e] += bias;
    bias = 0;
  }

  // Puts the groups of a team together.
  __device__ __forceinline__ void combine() {
    for (int lanes = team.group; lanes < team.team; lanes <<= 1) {
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        const Sum other = __shfl_xor_sync(all_lanes, sum[e], lanes);
        const Sum greater = other > sum[e] || other != other ? other : sum[e];
        sum[e] = is_max() ? greater : sum[e] + other;
      }
    }
  }

  // The bags that a warp takes at once, from `bag` on: each team takes 2^log_each bags, and each of its lanes
  // holds one. If none has more than one row they can be done together, and the rows of a group's bags come
  // together: one after the other, a lane would wait for offsets, index and row of each. Else team by team.
  __device__ __forceinline__ void run_all(uint32_t bag, int log_each) {
    const int each = 1 << log_each, first_own = team.in_warp() << log_each;
    const uint32_t own = bag + first_own + team.in_group;
    Range range{0, 0};
    if (team.split == 0 && team.in_group < each && own < a.batch) {
      range = bag_range(a.bags, feature.first_bag + own, a.zero_start, a.bounds);
    }
    const bool single = D == Does::sum && a.one_row && !any_lane(range.end - range.begin > 1);
    for (int i = 0; i < each; ++i) {
      // Bag number i * teams + k is team k's.
      const int number = i * team.per_warp() + team.in_warp();
      const int holder = ((number >> log_each) << team.log_team) + (number & (each - 1));
      const uint32_t begin = __shfl_sync(all_lanes, range.begin, single ? team.lane : holder);
      const uint32_t end = __shfl_sync(all_lanes, range.end, single ? team.lane : holder);
      run({begin, end}, bag + (single ? first_own : number), single);
      if (single) return;
    }
  }

  // Pools each team's bag. `single`: each lane's, the bags of a group beginning with `bag`.
  __device__ __forceinline__ void run(Range range, uint32_t bag, bool single) {
    const bool exists = bag < a.batch;
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      sum[e] = is_max() ? -INFINITY : 0.0f;
      if constexpr (argmax) place[e] = absent;
    }
    bias = 0;
    const unsigned own_place = single ? 0 : team.place(team.in_group),
                   size = static_cast<unsigned>(team.team);
    uint32_t count = 0;
    int since_fold = 0;
    uint32_t left = range.end - range.begin;  // indices of the bag from the team's first on
    uint32_t position = range.begin + own_place;
    int64_t index = own_place < left ? load_integer(a.bags.indices, a.bags.indices_64, position) : 0;
    while (single || any_lane(left > 0)) {
      const Looked<Sum> own = look_up(index, position, own_place < left);
      if constexpr (D == Does::sum) {
        if (single) return store_single(own, bag);
      }
      // The next indices come while these rows do.
      position += size;
      if (own_place + size < left) index = load_integer(a.bags.indices, a.bags.indices_64, position);
      const bool present = own.row != absent;
      const bool is_begin = count == 0;
      count += __popc(__ballot_sync(all_lanes, present) & team.mask());
      if (is_max()) {
        const unsigned first_row =
            any_lane(is_begin) ? first_place(present && is_begin) : unsigned{warp_lanes};
        for (int j = 0; j < team.group && any_lane(team.place(j) < left); j += rows_of_max) {
          take_rows(j, own, first_row);
        }
      } else {
        for (int j = 0; j < team.group && any_lane(team.place(j) < left); j += rows) add_rows(j, own);
        if (share.quantized()) {
          bias += own.shift;
          since_fold += team.group;
          if (since_fold >= warp_lanes) {
            fold();
            since_fold = 0;
          }
        }
      }
      left = left > size ? left - size : 0;
    }
    if (!is_max() && share.quantized()) fold();
    combine();
    if (exists && team.split == 0 && first < table.row_bytes) store(bag, count);
  }

  // One row, or none, for each of a group's bags from `bag` on.
  __device__ __forceinline__ void store_single(const Looked<Sum>& own, uint32_t bag) {
    uint32_t row[rows], word[rows][Share::words];
    load(0, own, row, word);
    const uint32_t bags = first < table.row_bytes && bag < a.batch ? a.batch - bag : 0;
    char* out = row_of(bag);
#pragma unroll
    for (int u = 0; u < rows; ++u) {
      const Sum scale = scale_of(u, own);
      const Sum shift = share.quantized() ? __shfl_sync(all_lanes, own.shift, team.source(u)) : Sum{0};
#pragma unroll
      for (int e = 0; e < elements; ++e) sum[e] = 0;
      share.visit([&](auto type) { add<decltype(type)::value>(word[u], scale); });
#pragma unroll
      for (int e = 0; e < elements; ++e) sum[e] = (sum[e] + shift) * feature.multiplier;
      if (u < team.group && u < bags) share.store(out, a.out.type, first, feature.dim, sum);
      out += a.out.stride * (element_bits(a.out.type) / 8);
    }
  }

  __device__ __forceinline__ char* row_of(uint32_t bag) const {
    return in_global(feature.out + bag * a.out.stride * (element_bits(a.out.type) / 8));
  }

  __device__ __forceinline__ void store(uint32_t bag, uint32_t count) {
    Sum factor = feature.multiplier;
    if (count > 1 && feature.pooling == Pooling::mean) factor /= static_cast<Sum>(count);
#pragma unroll
    for (int e = 0; e < elements; ++e) sum[e] = count == 0 ? Sum{0} : sum[e] * factor;
    share.store(row_of(bag), a.out.type, first, feature.dim, sum);
    if constexpr (argmax) {
      share.for_each_column(first, feature.dim, [&](int e, int32_t column) {
        a.argmax[int64_t{bag} * feature.dim + column] =
            place[e] == absent ? -1 : static_cast<int64_t>(place[e]);
      });
    }
  }
};

// Pools the bags of one feature in a warp.
template <Does D, typename Share>
__device__ __forceinline__ void pool_tiles(const PoolArguments& a, const DeviceTable& table,
                                           const Feature& feature, const Share& share) {
  const int log_lanes = log_group(table.row_bytes, share.bytes);
  // The first of equal maxima wins, because one group compares them in order.
  const Team team(log_lanes, D == Does::argmax ? 0 : min(a.log_split, 5 - log_lanes));
  const uint32_t tile_bytes = static_cast<uint32_t>(share.bytes) << log_lanes;
  // Bags that a team takes at once: as many as a lane can have rows in flight, if they have a row each.
  const int log_each = D == Does::sum && a.one_row ? min(log_lanes, Share::log_rows) : 0;
  const int at_once = team.per_warp() << log_each;
  const uint32_t step = low_word(warps_in_grid() * at_once);
  for (uint32_t tile = blockIdx.z * tile_bytes; tile < table.row_bytes; tile += gridDim.z * tile_bytes) {
    const uint32_t first = tile + static_cast<uint32_t>(team.in_group * share.bytes);
    const char* base = opaque(table.rows + first);
    for (uint32_t bag = low_word(warp_number() * at_once); any_lane(bag < a.batch);
         bag = step < a.batch - bag ? bag + step : a.batch) {
      Pooler<Share, D> pooler(a, table, feature, team, share, base, first);
      pooler.run_all(bag, log_each);
    }
  }
}

template <typename Sum>
__device__ __forceinline__ void pool_feature(const PoolArguments& a, const DeviceTable& table,
                                             const Feature& feature) {
  if constexpr (std::is_same_v<Sum, float>) {
    const bool aligned =
        is_aligned(feature.out, 16) && (a.out.stride * (element_bits(a.out.type) / 8) & 15) == 0;
    if (feature.pooling != Pooling::max && a.out.type != ElementType::f64 && aligned &&
        is_wide(table, feature.type, feature.dim)) {
      visit_type(feature.type, [&](auto type) {
        pool_tiles<Does::sum>(a, table, feature, WideShare<decltype(type)::value>{});
      });
      return;
    }
  }
  const NarrowShare<Sum, std::is_same_v<Sum, double> ? 1 : 8> share(feature.type, table.alignment);
  pool_tiles<Does::sum_or_max>(a, table, feature, share);
}

__device__ __forceinline__ Feature only_feature(const PoolArguments& a) {
  return {a.type, a.dim, a.bags.pooling, a.multiplier, static_cast<char*>(a.out.data), 0, {-1, 0}};
}

// The columns of `plan`, one row a feature.
enum PlanColumn : int {
  plan_table,
  plan_dim,
  plan_column,
  plan_pooling,
  plan_bits,
  plan_exponent,
  plan_columns
};

// Reads a feature's row of the plan. Gives the number of its table in this launch, or -1: if the table is of
// another launch, or if the row does not fit, which is written down.
__device__ __forceinline__ int read_plan(const PoolArguments& a, int64_t number, Feature& feature) {
  int64_t p[plan_columns];
#pragma unroll
  for (int i = 0; i < plan_columns; ++i) {
    p[i] = load_constant<long long>(a.plan + number * plan_columns + i);
  }
  const int64_t total = a.out.stride;
  bool fits = p[plan_table] >= 0 && p[plan_table] < a.num_tables && p[plan_dim] >= 0 &&
              p[plan_dim] <= total && p[plan_column] >= 0 && p[plan_column] <= total - p[plan_dim] &&
              p[plan_pooling] >= 0 && p[plan_pooling] <= 2 && p[plan_exponent] >= -126 &&
              p[plan_exponent] <= 126;
  const int64_t of_launch = p[plan_table] - a.first_table;
  const bool here = fits && of_launch >= 0 && of_launch < a.launch_tables;
  const int table = here ? static_cast<int>(of_launch) : -1;
  if (here) {
    const DeviceTable& t = a.tables[table];
    const bool quantized = t.type == ElementType::u8;  // or u4: only the plan says it
    feature.type = quantized && p[plan_bits] == 4 ? ElementType::u4 : t.type;
    const int bits = element_bits(feature.type);
    fits = (p[plan_dim] * bits + 7) / 8 == t.row_bytes && p[plan_bits] == (quantized ? bits : 0);
  }
  if (!fits) {
    record_fault(a.bounds, DeviceFault::plan, number, number, 0, 0, -1);
    return -1;
  }
  feature.dim = static_cast<int32_t>(p[plan_dim]);
  feature.pooling = static_cast<Pooling>(p[plan_pooling]);
  feature.multiplier = p[plan_bits] == 0 ? 1.0f : power_of_two(static_cast<int>(p[plan_exponent]));
  feature.out = static_cast<char*>(a.out.data) + p[plan_column] * (element_bits(a.out.type) / 8);
  feature.first_bag = number * int64_t{a.batch};
  feature.origin = {static_cast<int32_t>(number), static_cast<int32_t>(p[plan_table])};
  return table;
}

// One table or many. Blocks are numbered by feature first: the rows that one table needs again and again are
// expected to stay in L2 while it is at work, which no GPU has been asked yet. `Sum`: double for float64
// tables, which share nothing with the others.
template <typename Sum>
__global__ void __launch_bounds__(block_lanes, blocks_at_once)
    pool_kernel(const __grid_constant__ PoolArguments a) {
  for (int64_t number = blockIdx.y; number < a.features; number += gridDim.y) {
    Feature feature;
    int table = 0;
    if (a.plan == nullptr) {
      feature = only_feature(a);
    } else {
      table = read_plan(a, number, feature);
    }
    if (table >= 0) pool_feature<Sum>(a, a.tables[table], feature);
  }
}

#if RK_ARCH >= 800
constexpr int argmax_blocks = 5;  // at once, of 48 registers a lane
#else
constexpr int argmax_blocks = 4;  // Turing's multiprocessors run 1024 lanes at most
#endif

// Max pooling of one table, and the row that each column came from; -1 for an empty bag.
template <typename Sum>
__global__ void __launch_bounds__(block_lanes, argmax_blocks)
    argmax_kernel(const __grid_constant__ PoolArguments a) {
  const Feature feature = only_feature(a);
  const NarrowShare<Sum, std::is_same_v<Sum, double> ? 1 : 2> share(feature.type, a.tables[0].alignment);
  pool_tiles<Does::argmax>(a, a.tables[0], feature, share);
}

}  // namespace rk
