// Lookup and pooling on GPUs: raw pointers, sizes and strides; nothing of torch.
//
// A team of lanes pools a bag. Every lane of it reads one index, checks it, and reads the row's weight, scale
// and bias; then the team goes through these rows, handed round by shuffles. Rows are read 16 bytes a lane,
// up to 8 rows before the first is used: 128 bytes a lane in flight (64 of quantized rows, which need the
// registers for sums). With 768 or more lanes on a multiprocessor that is 48 to 128 KiB; 3.35 TB/s at a
// latency of 1 us need 3.35 MB in flight, 26 KB on each of 132 multiprocessors.
#pragma once

#include "cuda_bags.cuh"

namespace rk {

constexpr int blocks_at_once = 3;

// What a launch of the pooling kernels reads. `plan` is null for a single table, and `tables` then holds it.
template <int Tables>
struct PoolArguments {
  DeviceTable tables[Tables];
  Bags bags;  // of all features: num_bags is batch * features
  Matrix out;
  int64_t* argmax;
  Bounds bounds;
  const int64_t* plan;  // [features][plan_columns]
  int64_t batch;
  int64_t features;
  int64_t first_table;  // the number of tables[0]
  int64_t num_tables;   // of all launches
  int32_t launch_tables;
  int32_t log_split;
  int64_t dim;       // of a single table
  float multiplier;  // of a single table
  bool zero_start;
};

// What one feature reads and writes.
struct Feature {
  RowType type;
  int32_t dim;
  Pooling pooling;
  float multiplier;
  char* out;          // row 0, first column
  int64_t first_bag;  // its bag 0 among all bags
  int64_t num_bags;
  Origin origin;
};

// A lane's index, and what belongs to it.
template <typename Sum>
struct Looked {
  uint32_t row;
  uint32_t scale_bias;  // two halves
  Sum weight;
};

// What a kernel can pool: sums only (and means), sums and maxima, or maxima and the rows they came from.
// Maxima are taken of narrow shares: with wide ones the code would double, and 8 rows of 4 bytes a lane in
// flight fill the memory as well when 2048 lanes are there.
enum class Does { sum, sum_or_max, argmax };

// Rows in flight a lane.
template <RowType T, bool Wide>
constexpr int rows_in_flight = Wide && T == RowType::f32 ? 8 : 4;

// Pools the bags of one feature, over the columns of one tile (as many as the lanes of a group hold).
template <RowType T, bool Wide, Does D>
struct Pooler {
  using R = Row<T, Wide>;
  using Sum = typename R::Sum;
  static constexpr int elements = R::elements;
  static constexpr int most = rows_in_flight<T, Wide>;
  static constexpr bool quantized = is_quantized_row<T>;
  static constexpr bool argmax = D == Does::argmax;

  const DeviceTable& table;
  const Bags& bags;
  const Bounds& bounds;
  const Feature& feature;
  const Team& team;
  const Share& share;
  const char* base;  // the share of row 0
  Sum sum[elements];
  Sum bias;
  uint32_t place[argmax ? elements : 1];

  __device__ __forceinline__ bool is_max() const {
    return argmax || (D == Does::sum_or_max && feature.pooling == Pooling::max);
  }

  __device__ __forceinline__ Looked<Sum> look_up(int64_t index, int64_t position, bool inside) const {
    Looked<Sum> own{absent, 0, 0};
    if (inside) {
      own.row = checked_row(index, position, table.num_rows, bags.padding_idx, bounds, feature.origin);
    }
    if (own.row == absent) return own;
    if constexpr (quantized) {
      // 2-byte loads: inside of rows they need not lie on a multiple of 4.
      const char* p = table.scale_bias + static_cast<uint64_t>(own.row) * table.scale_bias_stride;
      own.scale_bias = load_constant<unsigned short>(p) |
                       static_cast<uint32_t>(load_constant<unsigned short>(p + 2)) << 16;
    }
    if (bags.weights != nullptr && !is_max()) {
      own.weight = load_float<Sum>(bags.weights, bags.weights_type, position);
    }
    return own;
  }

  // Reads rows j to j + Rows - 1 of the group, all loads before the first use. What is absent reads as zero.
  template <int Rows>
  __device__ __forceinline__ void load(int j, const Looked<Sum>& own, uint32_t (&row)[Rows],
                                       uint32_t (&word)[Rows][R::words]) const {
    const int limit = share.first < share.row_bytes ? team.group : 0;
#pragma unroll
    for (int u = 0; u < Rows; ++u) {
      row[u] = __shfl_sync(all_lanes, own.row, team.source(j + u));
      if (j + u >= limit) row[u] = absent;
#pragma unroll
      for (int w = 0; w < R::words; ++w) word[u][w] = 0;
      if (row[u] != absent) {
        load_share<T, Wide>(word[u], base + static_cast<uint64_t>(row[u]) * table.row_stride, share);
      }
    }
  }

  // Scale and bias of the group's row number `j`; of what lies behind the group, which may be infinite, zero.
  __device__ __forceinline__ void scale_of(int j, const Looked<Sum>& own, Sum& scale, Sum& shift) const {
    if constexpr (quantized) {
      const uint32_t both = __shfl_sync(all_lanes, own.scale_bias, team.source(j));
      scale = f16_to_float(both & 0xffffu);
      shift = f16_to_float(both >> 16);
    }
    if (!is_max() && opaque(bags.weights != nullptr)) {
      const Sum weight = __shfl_sync(all_lanes, own.weight, team.source(j));
      scale *= weight;
      shift *= weight;
    }
    if (j >= team.group) scale = shift = 0;
  }

  __device__ __forceinline__ void add(int j, const Looked<Sum>& own) {
    uint32_t row[most], word[most][R::words];
    load(j, own, row, word);
#pragma unroll
    for (int u = 0; u < most; ++u) {
      Sum scale = 1, shift = 0, x[elements];
      scale_of(j + u, own, scale, shift);
      unpack<T, Wide>(word[u], x);
#pragma unroll
      for (int e = 0; e < elements; ++e) sum[e] = fma(x[e], scale, sum[e]);
      if constexpr (quantized) bias += shift;
    }
  }

  // The first row is taken as it is and later ones only where they are greater, as torch does: of equal
  // values the first wins, and a NaN is kept only from the first row.
  __device__ __forceinline__ void take_greater(int j, const Looked<Sum>& own, int first) {
    uint32_t row[most], word[most][R::words];
    load(j, own, row, word);
#pragma unroll
    for (int u = 0; u < most; ++u) {
      Sum scale = 1, shift = 0, x[elements];
      if constexpr (quantized) scale_of(j + u, own, scale, shift);
      unpack<T, Wide>(word[u], x);
      const bool is_first = team.place(j + u) == first;
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        if constexpr (quantized) x[e] = fma(x[e], scale, shift);
        const bool take = row[u] != absent && (is_first || x[e] > sum[e]);
        sum[e] = take ? x[e] : sum[e];
        if constexpr (argmax) place[e] = take ? row[u] : place[e];
      }
    }
  }

  // Where the first of the team's lanes with `found` has its index, behind the team's first.
  __device__ __forceinline__ int first_place(bool found) const {
    int at = found ? team.place(team.in_group) : warp_lanes;
    for (int lanes = 1; lanes < team.team; lanes <<= 1) {
      at = min(at, __shfl_xor_sync(all_lanes, at, lanes));
    }
    return at;
  }

  // The sums of scale * q and of the biases grow with opposite signs: put together from time to time they
  // stay small.
  __device__ __forceinline__ void fold() {
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

  // Pools the bags of a warp: those from `bag` on that its teams take.
  __device__ __forceinline__ void run(int64_t bag, bool zero_start, const Matrix& out, int64_t* rows) {
    bag += team.in_warp();
    const bool exists = bag < feature.num_bags;
    Range range{0, 0};
    if (exists) range = bag_range(bags, feature.first_bag + bag, zero_start, bounds);
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      sum[e] = is_max() ? -INFINITY : 0.0f;
      if constexpr (argmax) place[e] = absent;
    }
    bias = 0;
    int64_t count = 0;
    int since_fold = 0;
    int64_t left = range.end - range.begin;  // indices of the bag from the team's first on
    int64_t position = range.begin + team.place(team.in_group);
    int64_t index =
        team.place(team.in_group) < left ? load_integer(bags.indices, bags.indices_64, position) : 0;
    for (; __any_sync(all_lanes, left > 0); left -= team.team) {
      const Looked<Sum> own = look_up(index, position, team.place(team.in_group) < left);
      // The next indices come while these rows do.
      position += team.team;
      if (team.place(team.in_group) + team.team < left) {
        index = load_integer(bags.indices, bags.indices_64, position);
      }
      const bool present = own.row != absent;
      int first = warp_lanes;
      if (is_max() && __any_sync(all_lanes, count == 0)) first = first_place(present && count == 0);
      count += __popc(__ballot_sync(all_lanes, present) & team.mask());
      for (int j = 0; j < team.group && __any_sync(all_lanes, team.place(j) < left); j += most) {
        if (is_max()) {
          take_greater(j, own, first);
        } else {
          add(j, own);
        }
      }
      if constexpr (quantized) {
        since_fold += team.group;
        if (since_fold >= warp_lanes) {
          fold();
          since_fold = 0;
        }
      }
    }
    if constexpr (quantized) fold();
    combine();
    if (exists && team.split == 0) store(bag, count, out, rows);
  }

  __device__ __forceinline__ void store(int64_t bag, int64_t count, const Matrix& out, int64_t* rows) {
    Sum factor = feature.multiplier;
    if (count > 1 && feature.pooling == Pooling::mean) factor /= static_cast<Sum>(count);
#pragma unroll
    for (int e = 0; e < elements; ++e) sum[e] = count == 0 ? Sum{0} : sum[e] * factor;
    const Columns<T, Wide> columns(share, feature.dim);
    columns.store(feature.out + bag * out.stride * float_bytes(out.type), out.type, sum);
    if constexpr (argmax) {
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        if (columns.at(e) < feature.dim) {
          rows[bag * feature.dim + columns.at(e)] = place[e] == absent ? -1 : static_cast<int64_t>(place[e]);
        }
      }
    }
  }
};

template <RowType T, bool Wide, Does D, typename Arguments>
__device__ __forceinline__ void pool_tiles(const Arguments& a, const DeviceTable& table,
                                           const Feature& feature) {
  using R = Row<T, Wide>;
  const int log_lanes = log_group<T, Wide>(table.row_bytes);
  const Team team(log_lanes, min(a.log_split, 5 - log_lanes));
  const uint32_t tile_bytes = static_cast<uint32_t>(R::bytes) << log_lanes;
  const int64_t step = warps_in_grid() * team.per_warp();
  for (uint32_t tile = blockIdx.z * tile_bytes; tile < table.row_bytes; tile += gridDim.z * tile_bytes) {
    const Share share = share_of<T, Wide>(table, team.in_group, team.group, tile);
    const char* base = opaque(table.rows + share.first);
    for (int64_t bag = warp_number() * team.per_warp(); bag < feature.num_bags; bag += step) {
      Pooler<T, Wide, D> pooler{table, a.bags, a.bounds, feature, team, share, base};
      pooler.run(bag, a.zero_start, a.out, a.argmax);
    }
  }
}

// Everything that a warp does for a feature.
template <RowType T, typename Arguments>
__device__ __forceinline__ void pool_feature(const Arguments& a, const DeviceTable& table,
                                             const Feature& feature) {
  const bool aligned = is_aligned(feature.out, 16) && (a.out.stride * float_bytes(a.out.type) & 15) == 0;
  if (is_wide<T>(table, feature.dim) && aligned && feature.pooling != Pooling::max &&
      (T == RowType::f64 || a.out.type != RowType::f64)) {
    pool_tiles<T, true, Does::sum>(a, table, feature);
  } else {
    pool_tiles<T, false, Does::sum_or_max>(a, table, feature);
  }
}

__device__ __forceinline__ Feature only_feature(const PoolArguments<1>& a) {
  return {a.tables[0].type,
          static_cast<int32_t>(a.dim),
          a.bags.pooling,
          a.multiplier,
          static_cast<char*>(a.out.data),
          0,
          a.batch,
          {-1, 0}};
}

// One table.
template <RowType T>
__global__ void __launch_bounds__(block_lanes, blocks_at_once)
    pool_kernel(const __grid_constant__ PoolArguments<1> a) {
  const Feature feature = only_feature(a);
  pool_feature<T>(a, a.tables[0], feature);
}

// Max pooling of one table, and the row that each column came from; -1 for an empty bag.
template <RowType T>
__global__ void __launch_bounds__(block_lanes, blocks_at_once)
    argmax_kernel(const __grid_constant__ PoolArguments<1> a) {
  const Feature feature = only_feature(a);
  pool_tiles<T, false, Does::argmax>(a, a.tables[0], feature);
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

// Reads a feature's row of the plan; false if it does not fit, which is written down, or if its table is not
// of this launch.
template <int Tables>
__device__ __forceinline__ bool read_plan(const PoolArguments<Tables>& a, int64_t number, Feature& feature,
                                          int& table) {
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
  table = static_cast<int>(here ? of_launch : 0);
  if (here) {
    const DeviceTable& t = a.tables[table];
    const bool quantized = t.type == RowType::u8;  // or u4: only the plan says it
    const bool halves = quantized && p[plan_bits] == 4;
    feature.type = halves ? RowType::u4 : t.type;
    const int64_t bytes =
        halves ? (p[plan_dim] + 1) / 2 : p[plan_dim] * (quantized ? 1 : float_bytes(t.type));
    fits = bytes == t.row_bytes && (halves || p[plan_bits] == (quantized ? 8 : 0));
  }
  if (!fits) {
    record_fault(a.bounds, DeviceFault::plan, number, number, 0, 0, -1);
    return false;
  }
  feature.dim = static_cast<int32_t>(p[plan_dim]);
  feature.pooling = static_cast<Pooling>(p[plan_pooling]);
  feature.multiplier = p[plan_bits] == 0 ? 1.0f : power_of_two(static_cast<int>(p[plan_exponent]));
  feature.out = static_cast<char*>(a.out.data) + p[plan_column] * float_bytes(a.out.type);
  feature.first_bag = number * a.batch;
  feature.num_bags = a.batch;
  feature.origin = {number, p[plan_table]};
  return here;
}

// Many tables. Blocks are numbered by feature first, so that the rows that one table needs again and again
// stay in L2 while it is at work. `Doubles`: float64 tables, which share nothing with the others.
template <int Tables, bool Doubles>
__global__ void __launch_bounds__(block_lanes, blocks_at_once)
    collection_kernel(const __grid_constant__ PoolArguments<Tables> a) {
  for (int64_t number = blockIdx.y; number < a.features; number += gridDim.y) {
    Feature feature;
    int at;
    if (!read_plan(a, number, feature, at)) continue;
    const DeviceTable& table = a.tables[at];
    const auto pool = [&](auto type) { pool_feature<decltype(type)::value>(a, table, feature); };
    if constexpr (Doubles) {
      pool(std::integral_constant<RowType, RowType::f64>{});
    } else {
      switch (feature.type) {
        case RowType::f32:
          pool(std::integral_constant<RowType, RowType::f32>{});
          break;
        case RowType::f16:
          pool(std::integral_constant<RowType, RowType::f16>{});
          break;
        case RowType::bf16:
          pool(std::integral_constant<RowType, RowType::bf16>{});
          break;
        case RowType::u8:
          pool(std::integral_constant<RowType, RowType::u8>{});
          break;
        default:
          pool(std::integral_constant<RowType, RowType::u4>{});
      }
    }
  }
}

}  // namespace rk
