// Checks, threads and registration of the embedding-bag operators for CPU tensors. The schemas are in
// recsys_kernels/ops/embedding_bag/spec.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "arguments.h"

namespace {

using rk::BagArguments;
using rk::Bags;
using rk::check;
using rk::Contribution;
using rk::ElementType;
using rk::EmbeddingBagKernels;
using rk::Fault;
using rk::FaultKind;
using rk::float_table;
using rk::Matrix;
using rk::offset_at;
using rk::Pooling;
using rk::quantized_table;
using rk::raise;
using rk::row_type;
using rk::ScalarType;
using rk::Table;
using rk::Tensor;

const EmbeddingBagKernels& kernels() { return rk::Kernels<EmbeddingBagKernels>::current(); }

[[noreturn]] void raise_fault(const Fault& fault, const Bags& bags, int64_t num_rows,
                              const std::string& table) {
  if (fault.kind == FaultKind::index) {
    raise<std::out_of_range>("index ", fault.value, " at position ", fault.position,
                             " of indices is out of range for ", table, " with ", num_rows, " rows");
  }
  raise<std::runtime_error>("offsets must start at 0, never decrease and not exceed the number of indices (",
                            bags.num_indices, "), but offsets[", fault.position, "] is ", fault.value);
}

// The smallest piece of work worth a second thread: 1024 cache lines take about 10 us.
constexpr int64_t min_lines_per_thread = 1024;

int64_t threads_for(int64_t lines) {
  const int64_t most = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(most, lines / min_lines_per_thread));
}

// ---- pooling ----

struct Job {
  Table table;
  Bags bags;
  Matrix out;
  int64_t* argmax;
  int64_t offset_base;  // where this job's offsets stand in the whole offsets argument, for messages
  bool in_collection;
};

int64_t lines_of(const Table& t) { return std::max<int64_t>(1, (t.row_stride + 63) / 64); }

// Cache lines touched by the bags before `bag`; one line a bag for its output. Offsets are not checked yet,
// so the result can be nonsense, which only makes the split uneven.
int64_t lines_before(const Job& job, int64_t bag) {
  const uint64_t rows =
      static_cast<uint64_t>(offset_at(job.bags, bag)) - static_cast<uint64_t>(offset_at(job.bags, 0));
  const uint64_t bounded = std::min(rows, static_cast<uint64_t>(job.bags.num_indices));
  return static_cast<int64_t>(bounded) * lines_of(job.table) + bag;
}

void pool_range(const Job& job, int64_t first, int64_t last, float* scratch, Fault* fault) {
  const EmbeddingBagKernels& k = kernels();
  if (job.bags.pooling == Pooling::max) {
    k.pool_max(job.table, job.bags, job.out, job.argmax, first, last, scratch, fault);
  } else {
    k.pool(job.table, job.bags, job.out, first, last, scratch, fault);
  }
}

[[noreturn]] void raise_job_fault(const std::vector<Job>& jobs, size_t number, Fault fault) {
  const Job& job = jobs[number];
  if (fault.kind == FaultKind::offset) fault.position += job.offset_base;
  // A collection replaces this by the names of the table and the feature.
  const std::string table = job.in_collection ? "the table of feature #" + std::to_string(number) : "a table";
  raise_fault(fault, job.bags, job.table.num_rows, table);
}

struct Place {
  size_t job;
  int64_t bag;
};

// Finds the place where the work reaches `target` lines; `start` holds the lines before each job.
Place place_at(const std::vector<Job>& jobs, const std::vector<int64_t>& start, int64_t target) {
  const size_t j =
      static_cast<size_t>(std::upper_bound(start.begin(), start.end(), target) - start.begin()) - 1;
  if (j >= jobs.size()) return {jobs.size(), 0};
  int64_t low = 0, high = jobs[j].bags.num_bags;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (start[j] + lines_before(jobs[j], middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return {j, low};
}

// Runs the jobs between two places; on a fault says in which job.
size_t run_between(const std::vector<Job>& jobs, Place from, Place to, int64_t max_dim, Fault* fault) {
  constexpr int64_t on_stack = 1024;  // floats; a malloc takes as long as a row
  float small[on_stack];
  std::unique_ptr<float[]> large(2 * max_dim > on_stack ? new float[static_cast<size_t>(2 * max_dim)]
                                                        : nullptr);
  float* scratch = large ? large.get() : small;
  // A request looks up a row or two in each table: their misses overlap only across tables.
  constexpr size_t jobs_ahead = 8;
  size_t warmed = from.job + 1;
  for (size_t j = from.job; j < jobs.size() && (j < to.job || (j == to.job && to.bag > 0)); ++j) {
    const int64_t first = j == from.job ? from.bag : 0;
    const int64_t last = j == to.job ? to.bag : jobs[j].bags.num_bags;
    if (first >= last) continue;
    for (; warmed < jobs.size() && warmed <= j + jobs_ahead; ++warmed) {
      kernels().warm(jobs[warmed].table, jobs[warmed].bags);
    }
    pool_range(jobs[j], first, last, scratch, fault);
    if (fault->kind != FaultKind::none) return j;
  }
  return 0;
}

// Runs every job, split over threads by the lines they touch; raises the first fault in the order of the
// bags.
void run(const std::vector<Job>& jobs) {
  int64_t lines = 0, max_dim = 0;
  for (const Job& job : jobs) {
    lines += lines_before(job, job.bags.num_bags);
    max_dim = std::max(max_dim, job.table.dim);
  }
  const int64_t pieces = threads_for(lines);
  if (pieces == 1) {
    Fault fault{FaultKind::none, 0, 0};
    const size_t job = run_between(jobs, {0, 0}, {jobs.size(), 0}, max_dim, &fault);
    if (fault.kind != FaultKind::none) raise_job_fault(jobs, job, fault);
    return;
  }
  std::vector<int64_t> start{0};
  for (const Job& job : jobs) start.push_back(start.back() + lines_before(job, job.bags.num_bags));
  std::vector<size_t> fault_jobs(static_cast<size_t>(pieces), 0);
  std::vector<Fault> faults(static_cast<size_t>(pieces), Fault{FaultKind::none, 0, 0});
  const auto bound = [&](int64_t piece) -> Place {
    if (piece == pieces) return {jobs.size(), 0};
    return place_at(jobs, start, static_cast<int64_t>(static_cast<double>(lines) * piece / pieces));
  };
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const size_t p = static_cast<size_t>(piece);
      fault_jobs[p] = run_between(jobs, bound(piece), bound(piece + 1), max_dim, &faults[p]);
    }
  });
  for (size_t p = 0; p < faults.size(); ++p) {
    if (faults[p].kind != FaultKind::none) raise_job_fault(jobs, fault_jobs[p], faults[p]);
  }
}

Job single_job(const Table& table, const Bags& bags, const Tensor& out, ElementType out_type, int64_t* argmax,
               bool zero_start = true) {
  if (zero_start && bags.offsets != nullptr && bags.num_bags > 0 && offset_at(bags, 0) != 0) {
    raise_fault({FaultKind::offset, 0, offset_at(bags, 0)}, bags, table.num_rows, "");
  }
  return {table, bags, {out.data_ptr(), table.dim, out_type}, argmax, 0, false};
}

Tensor embedding_bag(const rk::EmbeddingBag& o) {
  const BagArguments args(o.weight, o);
  const Tensor weight = rk::with_contiguous_rows(o.weight, "weight");
  const Table table = float_table(weight, "weight");
  Tensor out = rk::empty_matrix(args.bags.num_bags, table.dim, weight.scalar_type());
  run({single_job(table, args.bags, out, table.type, nullptr)});
  return out;
}

std::tuple<Tensor, Tensor> embedding_bag_max(const rk::EmbeddingBagMax& o) {
  const BagArguments args(o.weight, o.indices, o.offsets, std::nullopt, 2, o.padding_idx,
                          o.include_last_offset);
  const Tensor weight = rk::with_contiguous_rows(o.weight, "weight");
  const Table table = float_table(weight, "weight");
  Tensor out = rk::empty_matrix(args.bags.num_bags, table.dim, weight.scalar_type());
  Tensor argmax = rk::empty_matrix(args.bags.num_bags, table.dim, ScalarType::Long);
  int64_t* rows = static_cast<int64_t*>(argmax.data_ptr());
  run({single_job(table, args.bags, out, table.type, rows, o.zero_start)});
  return {out, argmax};
}

Tensor quantized_embedding_bag(const rk::QuantizedEmbeddingBag& o) {
  const BagArguments args(o.weight, o);
  const Tensor weight = rk::with_contiguous_rows(o.weight, "weight");
  const Table table = quantized_table(weight, o.scale_bias, o.weight, o.exponent, o.embedding_dim, o.bits);
  Tensor out = rk::empty_matrix(args.bags.num_bags, o.embedding_dim, o.dtype);
  run({single_job(table, args.bags, out, row_type(o.dtype, "dtype"), nullptr)});
  return out;
}

// ---- many tables ----

// The columns of `plan`, one row a feature.
enum PlanColumn : int64_t {
  plan_table,
  plan_dim,
  plan_column,
  plan_pooling,
  plan_bits,
  plan_exponent,
  plan_columns
};

Tensor embedding_bag_collection(const rk::EmbeddingBagCollection& o) {
  const rk::IntegerArgument plan(o.plan, o.indices, "plan");
  check(o.plan.dim() == 2 && o.plan.size(1) == plan_columns && plan.is_64, "plan must be int64 of shape [F, ",
        static_cast<int64_t>(plan_columns), "]");
  // Every tensor in a list costs 0.2 us a call, so that float collections pass none.
  check(o.scale_bias.empty() || o.weights.size() == o.scale_bias.size(),
        "scale_bias must be empty or have one entry for each table");
  const int64_t features = o.plan.size(0);
  const BagArguments args(o.indices, o.indices, o.offsets, o.per_sample_weights, 0, -1, true);
  const int64_t all_bags = args.bags.num_bags;
  check(features > 0 && all_bags % features == 0, "offsets must have F*B+1 entries for F = ", features,
        " features, but has ", all_bags + 1);
  const int64_t batch = all_bags / features;
  const ElementType out_type = row_type(o.dtype, "dtype");
  Tensor out = rk::empty_matrix(batch, o.total_dim, o.dtype);
  if (batch == 0) return out;
  char* data = static_cast<char*>(out.data_ptr());
  std::vector<Tensor> rows;  // keeps contiguous copies alive
  rows.reserve(o.weights.size());
  for (const Tensor& w : o.weights) rows.push_back(rk::with_contiguous_rows(w, "weights"));
  const int64_t* const plan_rows = static_cast<const int64_t*>(plan.tensor.data_ptr());
  std::vector<Job> jobs(static_cast<size_t>(features));
  for (int64_t f = 0; f < features; ++f) {
    const int64_t* p = plan_rows + f * plan_columns;
    check(p[plan_table] >= 0 && p[plan_table] < static_cast<int64_t>(rows.size()) && p[plan_dim] >= 0 &&
              p[plan_dim] <= o.total_dim && p[plan_column] >= 0 &&
              p[plan_column] <= o.total_dim - p[plan_dim] && p[plan_pooling] >= 0 && p[plan_pooling] <= 2,
          "plan row ", f, " does not fit the tables or total_dim");
    const Tensor& weight = rows[static_cast<size_t>(p[plan_table])];
    check(p[plan_bits] == 0 || !o.scale_bias.empty(), "plan row ", f,
          " is quantized, but scale_bias is empty");
    Job& job = jobs[static_cast<size_t>(f)];
    job.table = p[plan_bits] == 0 ? float_table(weight, "weights")
                                  : quantized_table(weight, o.scale_bias[static_cast<size_t>(p[plan_table])],
                                                    o.indices, p[plan_exponent], p[plan_dim], p[plan_bits]);
    check(job.table.dim == p[plan_dim], "plan row ", f, " says ", p[plan_dim], " columns, but the table has ",
          job.table.dim);
    check((job.table.type == ElementType::f64) == (out_type == ElementType::f64),
          "float64 tables need a float64 output and can't be mixed with others");
    job.bags = args.bags;
    job.bags.num_bags = batch;
    job.bags.pooling = static_cast<Pooling>(p[plan_pooling]);
    job.bags.offsets =
        static_cast<const char*>(args.bags.offsets) + f * batch * (args.bags.offsets_64 ? 8 : 4);
    job.out = {data + p[plan_column] * out.element_size(), o.total_dim, out_type};
    job.argmax = nullptr;
    job.offset_base = f * batch;
    job.in_collection = true;
  }
  if (offset_at(jobs[0].bags, 0) != 0) {
    raise_fault({FaultKind::offset, 0, offset_at(jobs[0].bags, 0)}, args.bags, 0, "");
  }
  run(jobs);
  return out;
}

// ---- backward ----

// Boundaries of row ranges with about equal work (rows written and contributions added), from a coarse
// histogram.
std::vector<int64_t> split_rows(const Bags& bags, int64_t num_rows, int64_t pieces) {
  constexpr int64_t buckets = 1024;
  int shift = 0;
  while ((num_rows - 1) >> shift >= buckets) ++shift;
  const int64_t width = int64_t{1} << shift;
  const int64_t used = ((num_rows - 1) >> shift) + 1;
  std::vector<int64_t> cost(static_cast<size_t>(used), width);
  for (int64_t i = 0; i < bags.num_indices; ++i) {
    const int64_t index = bags.indices_64 ? static_cast<const int64_t*>(bags.indices)[i]
                                          : static_cast<const int32_t*>(bags.indices)[i];
    if (index >= 0 && index < num_rows) cost[static_cast<size_t>(index >> shift)] += 4;
  }
  int64_t total = 0, sum = 0;
  for (int64_t c : cost) total += c;
  std::vector<int64_t> bounds{0};
  for (int64_t b = 0; b < used && static_cast<int64_t>(bounds.size()) < pieces; ++b) {
    sum += cost[static_cast<size_t>(b)];
    if (sum * pieces >= total * static_cast<int64_t>(bounds.size()))
      bounds.push_back(std::min(num_rows, (b + 1) * width));
  }
  bounds.push_back(num_rows);
  return bounds;
}

Tensor embedding_bag_backward(const rk::EmbeddingBagBackward& o) {
  const BagArguments args(o.grad, o);
  check(o.mode != 2, rk::no_max_gradient);
  const Tensor grad = rk::with_contiguous_rows(o.grad, "grad");
  check(grad.size(0) == args.bags.num_bags, "grad must have one row for each of the ", args.bags.num_bags,
        " bags, but has ", grad.size(0));
  check(o.num_embeddings >= 0 && o.num_embeddings <= UINT32_MAX, "num_embeddings must be below 2^32");
  check(args.bags.num_bags <= UINT32_MAX, "there must be fewer than 2^32 bags");
  const ElementType type = row_type(grad.scalar_type(), "grad");
  const int64_t dim = grad.size(1);
  Tensor out = rk::empty_matrix(o.num_embeddings, dim, grad.scalar_type());
  const Matrix source{grad.data_ptr(), grad.stride(0), type}, target{out.data_ptr(), dim, type};
  const int64_t row_lines = (dim * grad.element_size() + 63) / 64;
  // Every piece reads all indices for its own rows, so that more than a few pieces only add to that reading:
  // with 410 k indices it is 0.5 ms a piece, as much as the work of one piece of 32.
  constexpr int64_t most_pieces = 16;
  const int64_t lines = (o.num_embeddings + args.bags.num_indices) * row_lines;
  const int64_t pieces = std::min(most_pieces, threads_for(lines));
  const std::vector<int64_t> bounds = pieces > 1 ? split_rows(args.bags, o.num_embeddings, pieces)
                                                 : std::vector<int64_t>{0, o.num_embeddings};
  std::vector<Fault> faults(bounds.size() - 1, Fault{FaultKind::none, 0, 0});
  const auto work = [&](int64_t piece) {
    const size_t entries = static_cast<size_t>(args.bags.num_indices);
    std::unique_ptr<Contribution[]> list(new Contribution[2 * entries]);
    std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(dim)]);
    const int64_t first = bounds[static_cast<size_t>(piece)], last = bounds[static_cast<size_t>(piece) + 1];
    Fault* fault = &faults[static_cast<size_t>(piece)];
    const int64_t count =
        kernels().collect(args.bags, o.num_embeddings, first, last, list.get(), list.get() + entries, fault);
    if (fault->kind != FaultKind::none) return;
    kernels().reduce(source, list.get(), count, target, dim, first, last, scratch.get());
  };
  torch::stable::parallel_for(0, static_cast<int64_t>(faults.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) work(piece);
  });
  // Every piece checks every index, so all of them found the same fault.
  if (faults[0].kind != FaultKind::none) raise_fault(faults[0], args.bags, o.num_embeddings, "a table");
  return out;
}

Tensor embedding_bag_weights_backward(const rk::EmbeddingBagWeightsBackward& o) {
  const BagArguments args(o.weight, o.indices, o.offsets, std::nullopt, o.mode, o.padding_idx,
                          o.include_last_offset);
  check(o.mode != 2, rk::no_max_gradient);
  const Tensor weight = rk::with_contiguous_rows(o.weight, "weight");
  const Tensor grad = rk::with_contiguous_rows(o.grad, "grad");
  const Table table = float_table(weight, "weight");
  const ElementType type = row_type(grad.scalar_type(), "grad");
  check(type == table.type, "grad must have the type of weight");
  check(grad.size(0) == args.bags.num_bags && grad.size(1) == table.dim, "grad must have shape [",
        args.bags.num_bags, ", ", table.dim, "]");
  Tensor out = torch::stable::new_zeros(grad, o.indices.sizes());
  const Matrix source{grad.data_ptr(), grad.stride(0), type}, target{out.data_ptr(), 1, type};
  const Job job{table, args.bags, target, nullptr, 0, false};
  const int64_t pieces = threads_for(lines_before(job, args.bags.num_bags));
  std::vector<Fault> faults(static_cast<size_t>(pieces), Fault{FaultKind::none, 0, 0});
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = args.bags.num_bags * piece / pieces,
                    last = args.bags.num_bags * (piece + 1) / pieces;
      kernels().weights_gradient(table, args.bags, source, target, first, last,
                                 &faults[static_cast<size_t>(piece)]);
    }
  });
  for (const Fault& fault : faults) {
    if (fault.kind != FaultKind::none) raise_fault(fault, args.bags, table.num_rows, "a table");
  }
  return out;
}

// ---- quantization ----

// Writes into tensors of the caller, who decides where the table lives (huge pages, aligned rows).
void quantize_rowwise(const rk::QuantizeRowwise& o) {
  const Tensor weight = rk::with_contiguous_rows(o.weight, "weight");
  const Table source = float_table(weight, "weight");
  if (source.dim == 0 || source.num_rows == 0) return;
  rk::check_cpu(o.rows, "rows");
  rk::check_dim(o.rows, 2, "rows");
  const Table target = quantized_table(o.rows, o.scale_bias, o.weight, o.exponent, source.dim, o.bits);
  check(target.num_rows == source.num_rows && o.rows.stride(1) == 1, "rows must have ", source.num_rows,
        " contiguous rows");
  const float inverse = std::ldexp(1.0f, static_cast<int>(-o.exponent));
  const int64_t pieces = threads_for(source.num_rows * lines_of(source));
  std::vector<Fault> faults(static_cast<size_t>(pieces), Fault{FaultKind::none, 0, 0});
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(source.dim)]);
      kernels().quantize(source, static_cast<int>(o.bits), inverse, static_cast<uint8_t*>(o.rows.data_ptr()),
                         target.row_stride, static_cast<uint8_t*>(o.scale_bias.data_ptr()),
                         target.scale_bias_stride, source.num_rows * piece / pieces,
                         source.num_rows * (piece + 1) / pieces, scratch.get(),
                         &faults[static_cast<size_t>(piece)]);
    }
  });
  for (const Fault& fault : faults) {
    if (fault.kind != FaultKind::none) {
      raise<std::invalid_argument>("row ", fault.position,
                                   " of weight holds NaN or infinity and can't be quantized");
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsys_kernels, CPU, m) {
  rk::implement<&embedding_bag>(m);
  rk::implement<&embedding_bag_max>(m);
  rk::implement<&embedding_bag_backward>(m);
  rk::implement<&embedding_bag_weights_backward>(m);
  rk::implement<&quantized_embedding_bag>(m);
  rk::implement<&embedding_bag_collection>(m);
  rk::implement<&quantize_rowwise>(m);
}
