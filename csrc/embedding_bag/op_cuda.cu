// Checks, launches and registration of the embedding-bag operators for CUDA tensors. The schemas are in
// recsys_kernels/ops/embedding_bag/spec.py.
//
// Nothing here waits for the device, and the forward allocates nothing but its result: calls can be captured
// in a CUDA graph. Wrong indices and offsets are found by the kernels and raised later (cuda/faults).

#include "cuda_backward.cuh"
#include "cuda_kernel.cuh"

template __global__ void rk::pool_kernel<float>(const __grid_constant__ PoolArguments);
template __global__ void rk::pool_kernel<double>(const __grid_constant__ PoolArguments);
template __global__ void rk::argmax_kernel<float>(const __grid_constant__ PoolArguments);
template __global__ void rk::argmax_kernel<double>(const __grid_constant__ PoolArguments);
template __global__ void rk::mean_kernel<float>(const __grid_constant__ MeanArguments);
template __global__ void rk::mean_kernel<double>(const __grid_constant__ MeanArguments);
template __global__ void rk::keys_kernel<float>(const __grid_constant__ KeyArguments);
template __global__ void rk::keys_kernel<double>(const __grid_constant__ KeyArguments);
template __global__ void rk::segments_kernel<float>(const __grid_constant__ SegmentArguments);
template __global__ void rk::segments_kernel<double>(const __grid_constant__ SegmentArguments);
template __global__ void rk::weights_kernel<float>(const __grid_constant__ WeightArguments);
template __global__ void rk::weights_kernel<double>(const __grid_constant__ WeightArguments);

// nvcc compiles a file for the host and again for the GPUs. For these the kernels above are all there is to
// do, and torch's headers would take longer than they.
#if !defined(__CUDA_ARCH__)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace {

using rk::BagArguments;
using rk::Bags;
using rk::check;
using rk::check_device;
using rk::DeviceTable;
using rk::ElementType;
using rk::Matrix;
using rk::Pooling;
using rk::ScalarType;
using rk::Table;
using rk::Tensor;

// ---- places and results ----

// The device of a call is the current one while it lasts, and its stream torch's current one.
struct Device {
  int32_t index;
  rk::DeviceGuard guard;
  cudaStream_t stream;
  rk::Bounds bounds;

  explicit Device(const Tensor& first)
      : index(index_of(first)),
        guard(index),
        stream(rk::cuda_stream(index)),
        bounds(rk::device_bounds(index)) {}

  static int32_t index_of(const Tensor& first) {
    if (rk::emulated) return 0;
    check(first.is_cuda(), "the CUDA kernels need CUDA tensors");
    return first.get_device_index();
  }
};

// The kernels count positions and bags in 32 bits.
void check_counts(const Bags& bags) {
  check(bags.num_indices < rk::most_indices, "a call on a GPU takes fewer than 2^32 - 64 indices, but has ",
        bags.num_indices);
  check(bags.num_bags < rk::most_indices, "a call on a GPU takes fewer than 2^32 - 64 bags, but has ",
        bags.num_bags);
}

// An uninitialized contiguous tensor on the device of `first`, of one dimension or two.
template <size_t Dims>
Tensor empty(const Tensor& first, const std::array<int64_t, Dims>& sizes, ScalarType type) {
  std::array<int64_t, Dims> strides;
  strides.fill(1);
  if (Dims == 2) strides[0] = std::max<int64_t>(1, sizes[Dims - 1]);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int32_t place = rk::emulated ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  const int32_t index = rk::emulated ? 0 : first.get_device_index();
  AtenTensorHandle handle;
  const AOTITorchError error =
      aoti_torch_empty_strided(Dims, sizes.data(), strides.data(), dtype, place, index, &handle);
  check(error == AOTI_TORCH_SUCCESS, "a result of ", sizes[0], " x ", sizes[Dims - 1],
        " could not be allocated");
  return Tensor(handle);
}

using Shape = std::array<int64_t, 2>;
using Length = std::array<int64_t, 1>;

// ---- tables and grids ----

uint32_t alignment_of(const void* rows, int64_t row_bytes, int64_t stride) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(rows) | static_cast<uint64_t>(row_bytes | stride | 16);
  return static_cast<uint32_t>(bits & (~bits + 1));
}

DeviceTable device_table(const Table& t, const char* name) {
  constexpr int64_t most_bytes = int64_t{1} << 31;
  check(t.num_rows < rk::absent, name, " must have fewer than 2^32 - 1 rows on a GPU, but has ", t.num_rows);
  check(t.row_stride >= 0 && t.row_stride < most_bytes && t.dim < most_bytes / 8, "rows of ", name,
        " must be shorter than 2 GiB and no further apart");
  const int64_t row_bytes = (t.dim * rk::element_bits(t.type) + 7) / 8;
  return {static_cast<const char*>(t.rows),
          static_cast<const char*>(t.scale_bias),
          static_cast<uint32_t>(t.num_rows),
          static_cast<uint32_t>(t.row_stride),
          static_cast<uint32_t>(t.scale_bias_stride),
          static_cast<uint32_t>(row_bytes),
          t.type,
          alignment_of(t.rows, row_bytes, t.num_rows > 1 ? t.row_stride : 0)};
}

// How a kernel will go through rows: in which shares, the lanes of a group, and the tiles that it needs for a
// row.
struct Lanes {
  ElementType type;
  bool wide;
  int log_group;
  int64_t tiles;
};

Lanes lanes_of(const DeviceTable& t, ElementType type, bool wide) {
  const int bytes = wide ? rk::wide_bytes(type) : rk::narrow_bytes(type, t.alignment);
  const int log = rk::log_group(t.row_bytes, bytes);
  return {type, wide, log, ((int64_t{t.row_bytes} - 1) >> log) / bytes + 1};
}

// Blocks in the dimensions of a grid, and lanes that fill a GPU: 1024 on each of 128 multiprocessors. In the
// emulation few are many, so that also small calls try what large ones need.
constexpr int64_t most_x = rk::emulated ? 3 : (int64_t{1} << 31) - 1;
constexpr int64_t most_y = rk::emulated ? 2 : 65535;
constexpr int64_t many_lanes = rk::emulated ? 256 : int64_t{1} << 17;

int64_t blocks_for(int64_t bags, int bags_in_warp) {
  const int64_t in_block = int64_t{rk::block_warps} * bags_in_warp;
  return (bags + in_block - 1) / in_block;
}

dim3 grid_of(int64_t x, int64_t y, int64_t z) {
  return dim3(static_cast<unsigned>(std::min(x, most_x)), static_cast<unsigned>(std::min(y, most_y)),
              static_cast<unsigned>(std::min(z, most_y)));
}

// How bags are shared out.
struct Sharing {
  int log_split;  // log2 of the groups that share a bag
  bool one_row;   // bags have one row at most, mostly, so that a group takes several

  // If the bags fill a GPU, each bag takes one group or less. With fewer bags, groups share a bag as long as
  // each group has four rows to read at once.
  Sharing(int64_t bags, int64_t indices, int log_group) : log_split(0), one_row(false) {
    if (bags << log_group >= many_lanes) {
      one_row = indices <= bags;
      return;
    }
    while (log_group + log_split < 5 && bags << (log_group + log_split) < many_lanes &&
           indices / std::max<int64_t>(1, bags) >= int64_t{8} << log_split) {
      ++log_split;
    }
  }

  int bags_in_warp(const Lanes& lanes) const {
    const int log = 5 - std::min(5, lanes.log_group + log_split);
    return 1 << (one_row && lanes.wide ? log + std::min(lanes.log_group, rk::log_wide_rows(lanes.type))
                                       : log);
  }
};

// ---- pooling ----

// Calls f with a value of the type in which rows are summed.
template <typename F>
void with_sum(ElementType type, F&& f) {
  if (type == ElementType::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

struct PoolLaunch {
  rk::PoolArguments arguments;
  dim3 grid;
};

// One table.
PoolLaunch pool_launch(const Table& table, const Bags& bags, const Matrix& out, const Device& device) {
  rk::PoolArguments a{};
  a.tables[0] = device_table(table, "weight");
  // The kernel decides in the same way.
  const bool wide = bags.pooling != Pooling::max && out.type != ElementType::f64 &&
                    rk::is_wide(a.tables[0], table.type, table.dim) &&
                    table.dim * rk::element_bits(out.type) % 128 == 0;
  const Lanes lanes = lanes_of(a.tables[0], table.type, wide);
  const Sharing sharing(bags.num_bags, bags.num_indices, lanes.log_group);
  a.bags = bags;
  a.out = out;
  a.bounds = device.bounds;
  a.type = table.type;
  a.dim = static_cast<int32_t>(table.dim);
  a.multiplier = table.multiplier;
  a.log_split = sharing.log_split;
  a.one_row = sharing.one_row;
  a.batch = static_cast<uint32_t>(bags.num_bags);
  a.features = a.num_tables = a.launch_tables = 1;
  a.zero_start = true;
  return {a, grid_of(blocks_for(bags.num_bags, sharing.bags_in_warp(lanes)), 1, lanes.tiles)};
}

void pool(const Table& table, const Bags& bags, const Matrix& out, const Device& device) {
  if (bags.num_bags == 0 || table.dim == 0) return;
  const PoolLaunch launch = pool_launch(table, bags, out, device);
  with_sum(table.type, [&](auto sum) {
    RK_LAUNCH(rk::pool_kernel<decltype(sum)>, launch.grid, dim3(rk::block_lanes), 0, device.stream,
              launch.arguments);
  });
}

Tensor embedding_bag(const rk::EmbeddingBag& o) {
  const BagArguments args(o.weight, o);
  check_counts(args.bags);
  const Device device(o.weight);
  const Tensor weight = rk::contiguous_rows(o.weight, o.weight, "weight");
  const Table table = rk::float_table(weight, "weight");
  Tensor out = empty(weight, Shape{args.bags.num_bags, table.dim}, weight.scalar_type());
  pool(table, args.bags, {out.data_ptr(), table.dim, table.type}, device);
  return out;
}

Tensor quantized_embedding_bag(const rk::QuantizedEmbeddingBag& o) {
  const BagArguments args(o.weight, o);
  check_counts(args.bags);
  const Device device(o.weight);
  const Tensor weight = rk::contiguous_rows(o.weight, o.weight, "weight");
  const Table table =
      rk::quantized_table(weight, o.scale_bias, o.weight, o.exponent, o.embedding_dim, o.bits);
  const ElementType type = rk::row_type(o.dtype, "dtype");
  Tensor out = empty(weight, Shape{args.bags.num_bags, o.embedding_dim}, o.dtype);
  pool(table, args.bags, {out.data_ptr(), table.dim, type}, device);
  return out;
}

std::tuple<Tensor, Tensor> embedding_bag_max(const rk::EmbeddingBagMax& o) {
  const BagArguments args(o.weight, o.indices, o.offsets, std::nullopt, 2, o.padding_idx,
                          o.include_last_offset);
  check_counts(args.bags);
  const Device device(o.weight);
  const Tensor weight = rk::contiguous_rows(o.weight, o.weight, "weight");
  const Table table = rk::float_table(weight, "weight");
  const int64_t num_bags = args.bags.num_bags;
  Tensor out = empty(weight, Shape{num_bags, table.dim}, weight.scalar_type());
  Tensor argmax = empty(weight, Shape{num_bags, table.dim}, ScalarType::Long);
  if (num_bags == 0 || table.dim == 0) return {out, argmax};
  const Matrix result{out.data_ptr(), table.dim, table.type};
  PoolLaunch launch = pool_launch(table, args.bags, result, device);
  launch.arguments.argmax = static_cast<int64_t*>(argmax.data_ptr());
  launch.arguments.zero_start = o.zero_start;
  with_sum(table.type, [&](auto sum) {
    RK_LAUNCH(rk::argmax_kernel<decltype(sum)>, launch.grid, dim3(rk::block_lanes), 0, device.stream,
              launch.arguments);
  });
  return {out, argmax};
}

// ---- many tables ----

// Only the device knows the plan's values for the tables, so the kernels find features that do not fit.
std::vector<DeviceTable> collection_tables(const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& scale_bias, const Tensor& first,
                                           ElementType out_type, std::vector<Tensor>& rows) {
  std::vector<DeviceTable> tables;
  for (size_t i = 0; i < weights.size(); ++i) {
    rows.push_back(rk::contiguous_rows(weights[i], first, "weights"));
    const Tensor& weight = rows.back();
    if (weight.scalar_type() != ScalarType::Byte) {
      tables.push_back(device_table(rk::float_table(weight, "weights"), "weights"));
    } else {
      check(!scale_bias.empty(), "weights has tables of uint8, but scale_bias is empty");
      // 8 or 4 bits? A row of as many elements as bytes serves until the plan is read.
      const int64_t bytes = std::max<int64_t>(1, weight.size(1));
      tables.push_back(
          device_table(rk::quantized_table(weight, scale_bias[i], first, 0, bytes, 8), "weights"));
    }
    check((tables.back().type == ElementType::f64) == (out_type == ElementType::f64),
          "float64 tables need a float64 output and can't be mixed with others");
  }
  return tables;
}

// A grid for features of any of the tables. Where tables need different numbers of blocks, which feature
// needs how many is not known here, and blocks that find nothing to do cost time as well: enough to fill a
// GPU go round until every bag is done.
dim3 collection_grid(const std::vector<DeviceTable>& tables, int64_t batch, int64_t features,
                     const Sharing& sharing) {
  constexpr int64_t enough = 16384;
  int64_t fewest = INT64_MAX, most = 1, tiles = 1;
  for (const DeviceTable& t : tables) {
    for (const ElementType type : {t.type, t.type == ElementType::u8 ? ElementType::u4 : t.type}) {
      const bool wide = rk::is_wide(t, type, rk::columns_in(t.row_bytes, type));
      const Lanes lanes = lanes_of(t, type, wide);
      const int64_t blocks = blocks_for(batch, sharing.bags_in_warp(lanes));
      fewest = std::min(fewest, blocks);
      most = std::max(most, blocks);
      tiles = std::max(tiles, lanes.tiles);
    }
  }
  return grid_of(std::min(most, std::max(fewest, enough / features)), features, tiles);
}

Tensor embedding_bag_collection(const rk::EmbeddingBagCollection& o) {
  const rk::IntegerArgument plan(o.plan, o.indices, "plan");
  check(o.plan.dim() == 2 && o.plan.size(1) == rk::plan_columns && plan.is_64,
        "plan must be int64 of shape [F, ", static_cast<int64_t>(rk::plan_columns), "]");
  check(o.scale_bias.empty() || o.weights.size() == o.scale_bias.size(),
        "scale_bias must be empty or have one entry for each table");
  const int64_t features = o.plan.size(0);
  const BagArguments args(o.indices, o.indices, o.offsets, o.per_sample_weights, 0, -1, true);
  const int64_t all_bags = args.bags.num_bags;
  check(features > 0 && all_bags % features == 0, "offsets must have F*B+1 entries for F = ", features,
        " features, but has ", all_bags + 1);
  const ElementType out_type = rk::row_type(o.dtype, "dtype");
  check_counts(args.bags);
  const Device device(o.indices);
  std::vector<Tensor> rows;  // keeps contiguous copies alive
  const std::vector<DeviceTable> tables =
      collection_tables(o.weights, o.scale_bias, o.indices, out_type, rows);
  Tensor out = empty(o.indices, Shape{all_bags / features, o.total_dim}, o.dtype);
  if (all_bags == 0 || o.total_dim == 0) return out;
  rk::PoolArguments a{};
  a.bags = args.bags;
  a.out = {out.data_ptr(), o.total_dim, out_type};
  a.bounds = device.bounds;
  a.plan = static_cast<const int64_t*>(plan.tensor.data_ptr());
  a.batch = static_cast<uint32_t>(all_bags / features);
  a.features = features;
  a.num_tables = static_cast<int64_t>(tables.size());
  // A group of the usual 16 lanes, for want of a better guess before the plan is read.
  const Sharing sharing(all_bags, args.bags.num_indices, 4);
  a.log_split = sharing.log_split;
  a.one_row = sharing.one_row;
  a.zero_start = true;
  const dim3 grid = collection_grid(tables, a.batch, features, sharing);
  do {  // once also without tables, to find the features that want one
    const int64_t count = std::min<int64_t>(a.num_tables - a.first_table, rk::tables_in_launch);
    std::copy_n(tables.begin() + a.first_table, count, a.tables);
    a.launch_tables = static_cast<int32_t>(count);
    with_sum(out_type, [&](auto sum) {
      RK_LAUNCH(rk::pool_kernel<decltype(sum)>, grid, dim3(rk::block_lanes), 0, device.stream, a);
    });
    a.first_table += count;
  } while (a.first_table < a.num_tables);
  return out;
}

// ---- backward ----

// Sorts stably, ascending; also says where each value was.
std::tuple<Tensor, Tensor> sort(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  check(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "sorting ", keys.numel(), " indices failed");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

ScalarType sum_type(ElementType type) {
  return type == ElementType::f64 ? ScalarType::Double : ScalarType::Float;
}

// log2 of the entries that a group sums one after the other: 32, or, where that leaves most of a GPU without
// work, as many as the group has lanes (8 at least), which then read all their numbers at once.
constexpr int most_log_chunk = 5;

int log_chunk(int64_t entries, int log_group) {
  int log = most_log_chunk;
  while (log > std::max(3, log_group) && (entries >> log) << log_group < many_lanes / 2) --log;
  return log;
}

// Adds up the gradients that belong to one row: by chunks, then the sums of the rows that chunks share.
void sum_by_row(rk::SegmentArguments a, const Table& grad, const Tensor& like, const Device& device) {
  Table source = grad;
  Tensor partial, next_keys;
  while (true) {
    a.source = device_table(source, "grad");
    a.dim = static_cast<int32_t>(source.dim);
    const Lanes lanes = lanes_of(a.source, source.type, rk::is_wide(a.source, source.type, source.dim));
    // Later there are few entries, and few launches are better.
    a.log_chunk = a.order != nullptr ? log_chunk(a.count, lanes.log_group) : most_log_chunk;
    const int64_t chunks = ((a.count - 1) >> a.log_chunk) + 1;
    const ScalarType type = sum_type(source.type);
    const Tensor sums = empty(like, Shape{chunks > 1 ? 2 * chunks : 0, source.dim}, type);
    const Tensor keys = empty(like, Length{2 * chunks}, ScalarType::Long);
    a.partial = {sums.data_ptr(), source.dim, rk::row_type(type, "grad")};
    a.next_keys = static_cast<int64_t*>(keys.data_ptr());
    const dim3 grid = grid_of(blocks_for(chunks, 32 >> lanes.log_group), 1, lanes.tiles);
    with_sum(source.type, [&](auto sum) {
      RK_LAUNCH(rk::segments_kernel<decltype(sum)>, grid, dim3(rk::block_lanes), 0, device.stream, a);
    });
    if (chunks == 1) return;
    // torch hands out memory again in the order of the stream, so what was here may go while it is still
    // read.
    partial = sums, next_keys = keys;
    source = rk::float_table(partial, "grad");
    a.keys = next_keys.data_ptr();
    a.keys_64 = true;
    a.order = nullptr;
    a.bag_of = nullptr;
    a.factors = nullptr;
    a.count = 2 * chunks;
  }
}

// For each bag 1 over the number of its rows.
Tensor mean_factors(const Bags& bags, uint32_t num_rows, ElementType type, const Tensor& like,
                    const Device& device) {
  const Tensor factors = empty(like, Length{bags.num_bags}, sum_type(type));
  rk::MeanArguments a{};
  a.bags = bags;
  a.bounds = device.bounds;
  a.factors = factors.data_ptr();
  a.num_rows = num_rows;
  while (a.log_team < 5 && bags.num_indices > (bags.num_bags << a.log_team)) ++a.log_team;
  const dim3 grid = grid_of(blocks_for(bags.num_bags, 32 >> a.log_team), 1, 1);
  with_sum(type, [&](auto sum) {
    RK_LAUNCH(rk::mean_kernel<decltype(sum)>, grid, dim3(rk::block_lanes), 0, device.stream, a);
  });
  return factors;
}

Tensor embedding_bag_backward(const rk::EmbeddingBagBackward& o) {
  const BagArguments args(o.grad, o);
  check(o.mode != 2, rk::no_max_gradient);
  check_counts(args.bags);
  const Device device(o.grad);
  const Tensor grad = rk::contiguous_rows(o.grad, o.grad, "grad");
  const Table source = rk::float_table(grad, "grad");
  const Bags& bags = args.bags;
  check(grad.size(0) == bags.num_bags, "grad must have one row for each of the ", bags.num_bags,
        " bags, but has ", grad.size(0));
  check(o.num_embeddings >= 0 && o.num_embeddings < rk::absent, "num_embeddings must be below 2^32 - 1");
  Tensor out = torch::stable::new_zeros(grad, Shape{o.num_embeddings, source.dim});
  const int64_t count = bags.num_indices;
  if (bags.num_bags == 0 || source.dim == 0) return out;

  rk::KeyArguments k{};
  k.bags = bags;
  k.bounds = device.bounds;
  k.num_rows = static_cast<uint32_t>(o.num_embeddings);
  k.keys_64 = o.num_embeddings > INT32_MAX;
  std::optional<Tensor> means, factors;
  if (o.mode == 1 && count > 0) {
    means = mean_factors(bags, k.num_rows, source.type, grad, device);
    k.mean_factors = means->data_ptr();
  }
  if (o.mode == 1 || bags.weights != nullptr) {
    factors = empty(grad, Length{count}, sum_type(source.type));
    k.factors = factors->data_ptr();
  }
  const Tensor keys = empty(grad, Length{count}, k.keys_64 ? ScalarType::Long : ScalarType::Int);
  const Tensor bag_of = empty(grad, Length{count}, ScalarType::Int);
  k.keys = keys.data_ptr();
  k.bag_of = static_cast<uint32_t*>(bag_of.data_ptr());
  with_sum(source.type, [&](auto sum) {
    // The kernel runs even without indices, since it checks the offsets.
    RK_LAUNCH(rk::keys_kernel<decltype(sum)>, grid_of(blocks_for(std::max<int64_t>(count, 1), 32), 1, 1),
              dim3(rk::block_lanes), 0, device.stream, k);
  });
  if (count == 0 || o.num_embeddings == 0) return out;

  const auto [sorted, order] = sort(keys);
  rk::SegmentArguments a{};
  a.keys = sorted.data_ptr();
  a.keys_64 = k.keys_64;
  a.order = static_cast<const int64_t*>(order.data_ptr());
  a.bag_of = k.bag_of;
  a.factors = k.factors;
  a.count = count;
  a.sentinel = k.num_rows;
  a.out = {out.data_ptr(), source.dim, source.type};
  sum_by_row(a, source, grad, device);
  return out;
}

Tensor embedding_bag_weights_backward(const rk::EmbeddingBagWeightsBackward& o) {
  const BagArguments args(o.weight, o.indices, o.offsets, std::nullopt, o.mode, o.padding_idx,
                          o.include_last_offset);
  check(o.mode != 2, rk::no_max_gradient);
  check_counts(args.bags);
  const Device device(o.weight);
  const Tensor weight = rk::contiguous_rows(o.weight, o.weight, "weight");
  const Tensor grad = rk::contiguous_rows(o.grad, o.weight, "grad");
  const Table table = rk::float_table(weight, "weight"), source = rk::float_table(grad, "grad");
  const Bags& bags = args.bags;
  check(source.type == table.type, "grad must have the type of weight");
  check(grad.size(0) == bags.num_bags && source.dim == table.dim, "grad must have shape [", bags.num_bags,
        ", ", table.dim, "]");
  if (bags.num_bags == 0 || table.dim == 0) return torch::stable::new_zeros(grad, o.indices.sizes());
  Tensor out = torch::stable::new_empty(grad, o.indices.sizes());
  rk::WeightArguments a{};
  a.table = device_table(table, "weight");
  a.table.alignment = std::min(a.table.alignment, device_table(source, "grad").alignment);
  a.bags = bags;
  a.bounds = device.bounds;
  a.grad = static_cast<const char*>(source.rows);
  a.grad_stride = source.row_stride;
  a.out = {out.data_ptr(), 1, table.type};
  std::optional<Tensor> means;
  if (o.mode == 1) {
    means = mean_factors(bags, a.table.num_rows, table.type, grad, device);
    a.mean_factors = means->data_ptr();
  }
  const int64_t blocks = blocks_for(std::max<int64_t>(bags.num_indices, 1), 32);  // it checks the offsets
  with_sum(table.type, [&](auto sum) {
    RK_LAUNCH(rk::weights_kernel<decltype(sum)>, grid_of(blocks, 1, 1), dim3(rk::block_lanes), 0,
              device.stream, a);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RK_LIBRARY, RK_DEVICE_KEY, m) {
  rk::implement<&embedding_bag>(m);
  rk::implement<&embedding_bag_max>(m);
  rk::implement<&embedding_bag_backward>(m);
  rk::implement<&embedding_bag_weights_backward>(m);
  rk::implement<&quantized_embedding_bag>(m);
  rk::implement<&embedding_bag_collection>(m);
}

#endif
