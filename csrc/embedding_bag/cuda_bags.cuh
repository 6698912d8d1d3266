// Indices and offsets on the device: checked, and read by a team of lanes a bag.
#pragma once

#include "cuda/faults.cuh"
#include "cuda_rows.cuh"

namespace rk {

constexpr int block_warps = 8;
constexpr int block_lanes = block_warps * warp_lanes;
constexpr int blocks_at_once = 3;  // on a multiprocessor, which leaves 80 registers a lane
// In place of a row: an index that is wrong, padding, or outside of its bag.
constexpr uint32_t absent = 0xffffffffu;

// A table as kernels read it.
struct DeviceTable {
  const char* rows;
  const char* scale_bias;  // fp16 (scale, bias) a row, or null
  uint32_t num_rows;
  uint32_t row_stride;         // bytes
  uint32_t scale_bias_stride;  // bytes
  uint32_t row_bytes;
  ElementType type;
  uint32_t alignment;  // bytes, at most 16: the begin, length and distance of rows are multiples of it
};

// Whether rows can be read in wide shares.
__host__ __device__ constexpr bool is_wide(const DeviceTable& table, ElementType type, int64_t dim) {
  return type != ElementType::f64 && table.alignment >= static_cast<uint32_t>(wide_bytes(type)) &&
         int64_t{table.row_bytes} * 8 == dim * element_bits(type);
}

// log2 of the lanes that share a row: as many as it has shares, a warp at most.
__host__ __device__ constexpr int log_group(uint32_t row_bytes, int share_bytes) {
  int log = 0;
  while (log < 5 && (static_cast<uint32_t>(share_bytes) << log) < row_bytes) ++log;
  return log;
}

// The division of a warp's lanes. 2^log_split groups of 2^log_group lanes make the team of a bag: each group
// adds up rows of its own, and the groups' sums are added last.
struct Team {
  int lane;      // of the warp
  int group;     // lanes
  int team;      // lanes
  int in_group;  // this lane's number in its group
  int split;     // this lane's group in its team
  int log_split;
  int log_team;

  __device__ __forceinline__ Team(int log_group, int log_split_arg)
      : lane(static_cast<int>(threadIdx.x) & (warp_lanes - 1)),
        group(1 << log_group),
        team(group << log_split_arg),
        in_group(lane & (group - 1)),
        split((lane & (team - 1)) >> log_group),
        log_split(log_split_arg),
        log_team(log_group + log_split_arg) {}

  // The lane whose index is the group's row number `j`.
  __device__ __forceinline__ int source(int j) const { return lane - in_group + j; }
  // Returns the position of the index of row number `j`, from the first index of the team's lanes. The groups
  // take turns, so that short bags keep all of them busy.
  __device__ __forceinline__ unsigned place(int j) const {
    return static_cast<unsigned>((j << log_split) + split);
  }
  __device__ __forceinline__ unsigned mask() const {
    return (all_lanes >> (warp_lanes - team)) << (lane & ~(team - 1));
  }
  __device__ __forceinline__ int per_warp() const { return warp_lanes >> log_team; }
  __device__ __forceinline__ int in_warp() const { return lane >> log_team; }
};

// Computed anew where it is needed: kept, it would take a register from the rows.
__device__ __forceinline__ int64_t warp_number() {
  return static_cast<int64_t>(blockIdx.x) * block_warps + opaque(static_cast<int>(threadIdx.x)) / warp_lanes;
}

__device__ __forceinline__ int64_t warps_in_grid() { return static_cast<int64_t>(gridDim.x) * block_warps; }

// In 32 bits, which are fewer registers: the largest number stands for all that are larger.
__device__ __forceinline__ uint32_t low_word(int64_t x) {
  return x > 0xffffffff ? 0xffffffffu : static_cast<uint32_t>(x);
}

// Positions in the indices. A call has fewer than 2^32 of them, and a lane has few registers.
struct Range {
  uint32_t begin;
  uint32_t end;
};

constexpr int64_t most_indices = (int64_t{1} << 32) - 64;

__device__ __forceinline__ int64_t offset_on_device(const Bags& b, int64_t bag) {
  if (bag == b.num_bags && !b.has_last_offset) return b.num_indices;
  return load_integer(b.offsets, b.offsets_64, bag);
}

// The positions of a bag, within those that there are. `zero_start`: the first bag must begin at 0.
__device__ __forceinline__ Range bag_range(const Bags& b, int64_t bag, bool zero_start,
                                           const Bounds& bounds) {
  if (b.offsets == nullptr) {
    return {static_cast<uint32_t>(bag * b.bag_length), static_cast<uint32_t>((bag + 1) * b.bag_length)};
  }
  const int64_t total = b.num_indices;
  int64_t begin = offset_on_device(b, bag), end = offset_on_device(b, bag + 1);
  const bool bad_begin = begin < 0 || begin > total;
  const bool bad_end = end < begin || end > total;
  const bool bad_first = bag == 0 && (bad_begin || (zero_start && begin != 0));
  if (bad_first || bad_end) {  // a later bag's beginning is the end of the bag before it, which reports it
    record_fault(bounds, DeviceFault::offset, -1, bad_first ? 0 : bag + 1, bad_first ? begin : end, total,
                 -1);
  }
  if (bad_begin || bad_end) {
    if (bounds.mode != BoundsCheck::clamp) return {0, 0};
    begin = begin < 0 ? 0 : begin > total ? total : begin;
    end = end < begin ? begin : end > total ? total : end;
  }
  return {static_cast<uint32_t>(begin), static_cast<uint32_t>(end)};
}

// The feature that a wrong index belongs to, for the message.
struct Origin {
  int32_t feature;  // -1: a single table
  int32_t table;
};

// The row at a position, or `absent`.
__device__ __forceinline__ uint32_t checked_row(int64_t index, int64_t position, uint32_t num_rows,
                                                int64_t padding_idx, const Bounds& bounds,
                                                const Origin& origin) {
  if (static_cast<uint64_t>(index) >= num_rows) {
    if (bounds.mode == BoundsCheck::clamp && num_rows > 0) {
      index = index < 0 ? 0 : static_cast<int64_t>(num_rows) - 1;
    } else {
      record_fault(bounds, DeviceFault::index, origin.feature, position, index, num_rows, origin.table);
      return absent;
    }
  }
  return index == padding_idx ? absent : static_cast<uint32_t>(index);
}

}  // namespace rk
