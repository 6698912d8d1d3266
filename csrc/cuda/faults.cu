#include "cuda/faults.cuh"

#include <array>
#include <atomic>
#include <mutex>
#include <new>

#include "core/check.h"

namespace {

using rk::BoundsCheck;
using rk::DeviceFault;
using rk::FaultRecord;

constexpr int32_t most_devices = 64;

std::atomic<int32_t> bounds_check{static_cast<int32_t>(BoundsCheck::raise)};
std::array<std::atomic<FaultRecord*>, most_devices> records{};
std::mutex allocation, taking;

FaultRecord* new_record() {
  // The first call may be one that a graph captures. Page-locking is refused then, unless this thread says
  // that it may run now and not as part of the graph.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  rk::cuda_check(cudaThreadExchangeStreamCaptureMode(&mode), "allocating the fault record");
  void* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&memory, sizeof(FaultRecord), cudaHostAllocMapped | cudaHostAllocPortable);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // else the next launch would report it
  rk::cuda_check(cudaThreadExchangeStreamCaptureMode(&mode), "allocating the fault record");
  rk::cuda_check(error, "allocating the fault record");
  return new (memory) FaultRecord{};
}

FaultRecord* record_of(int32_t device) {
  rk::check(device >= 0 && device < most_devices, "CUDA devices above ", most_devices - 1, " are not served");
  std::atomic<FaultRecord*>& slot = records[static_cast<size_t>(device)];
  FaultRecord* record = slot.load(std::memory_order_acquire);
  if (record != nullptr) return record;
  const std::lock_guard<std::mutex> lock(allocation);
  if (slot.load() == nullptr) slot.store(new_record());  // lives as long as the process, like the kernels
  return slot.load();
}

// Copies a complete fault out and frees the record; false when there is none.
bool take(FaultRecord* record, int64_t (&fault)[6]) {
  const volatile uint32_t& ready = record->ready;
  volatile uint32_t& taken = record->taken;
  if (ready == taken) return false;
  const std::lock_guard<std::mutex> lock(taking);
  const uint32_t number = ready;
  if (number == taken) return false;  // another thread took it
  std::atomic_thread_fence(std::memory_order_acquire);
  for (int i = 0; i < 6; ++i) fault[i] = record->fault[i];
  std::atomic_thread_fence(std::memory_order_release);
  taken = number;  // from here on kernels may write the next one
  return true;
}

// In the words of the operators on the CPU.
[[noreturn]] void raise_fault(const int64_t (&fault)[6]) {
  constexpr const char* when = " (found by an earlier call)";
  const auto [kind, feature, position, value, bound, table] = fault;
  static_cast<void>(table);
  switch (static_cast<DeviceFault>(kind)) {
    case DeviceFault::index: {
      const std::string name = feature < 0 ? "a table" : "the table of feature #" + std::to_string(feature);
      rk::raise<std::out_of_range>("index ", value, " at position ", position,
                                   " of indices is out of range for ", name, " with ", bound, " rows", when);
    }
    case DeviceFault::offset:
      rk::raise<std::runtime_error>(
          "offsets must start at 0, never decrease and not exceed the number of indices (", bound,
          "), but offsets[", position, "] is ", value, when);
    default:
      rk::raise<std::runtime_error>("plan row ", position, " does not fit the tables or total_dim", when);
  }
}

}  // namespace

rk::Bounds rk::device_bounds(int32_t device_index) {
  FaultRecord* record = record_of(device_index);
  int64_t fault[6];
  if (take(record, fault)) raise_fault(fault);
  const BoundsCheck mode = static_cast<BoundsCheck>(bounds_check.load(std::memory_order_relaxed));
  return {mode == BoundsCheck::raise ? record : nullptr, mode};
}

extern "C" {

// Returns 0, or 1 for a mode that does not exist.
__attribute__((visibility("default"))) int rk_cuda_select_bounds_check(int mode) {
  if (mode < 0 || mode > static_cast<int>(BoundsCheck::ignore)) return 1;
  bounds_check.store(mode);
  return 0;
}

// Does not wait: the caller does, for the calls whose faults it wants to see.
__attribute__((visibility("default"))) int rk_cuda_take_fault(int device, int64_t* fault) {
  if (device < 0 || device >= most_devices) return 0;
  FaultRecord* record = records[static_cast<size_t>(device)].load(std::memory_order_acquire);
  int64_t found[6];
  if (record == nullptr || !take(record, found)) return 0;
  for (int i = 0; i < 6; ++i) fault[i] = found[i];
  return 1;
}

}  // extern "C"
