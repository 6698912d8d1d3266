// Wrong indices and offsets on a GPU: kernels write the first one down in memory of the host, and the next
// call, or whoever asks, raises it. No kernel waits for the host nor the host for a kernel.
#pragma once

#include "cuda/cuda.cuh"

namespace rk {

// The ways in which kernels treat a wrong index. No mode reads memory outside the arguments.
enum class BoundsCheck : int32_t {
  raise,   // count it as absent and write it down
  clamp,   // take the nearest row
  ignore,  // count it as absent
};

enum class DeviceFault : int64_t { index = 1, offset = 2, plan = 3 };

// In page-locked memory of the host, one for each device. Atomic operations on such memory are atomic for the
// kernels of a device, but not for the host: it writes to none of the words that kernels write to, nor to
// their lines. Faults are counted, from 0.
struct FaultRecord {
  uint32_t claimed;  // by kernels: so many were claimed by a thread that writes them down
  uint32_t apart[31];
  uint32_t taken;  // by the host: so many were read; with a fault claimed and not taken, no other is written
  uint32_t apart_too[31];
  uint32_t ready;  // by kernels: so many are complete
  // kind, feature (-1: a single table), position, value, bound (rows, or indices), table
  int64_t fault[6];
};

// The values that a kernel needs to check bounds. `record` is null unless the mode is raise.
struct Bounds {
  FaultRecord* record;
  BoundsCheck mode;
};

// The mode in use and the device's record. Raises a fault that an earlier call left there.
Bounds device_bounds(int32_t device_index);

#if defined(__CUDACC__) || defined(RK_SIMT)

__device__ inline void record_fault(const Bounds& bounds, DeviceFault kind, int64_t feature, int64_t position,
                                    int64_t value, int64_t bound, int64_t table) {
  FaultRecord* record = bounds.record;
  if (record == nullptr) return;
  // Lanes of a warp read this together, in one access; to choose one of them would take registers from the
  // rows.
  const uint32_t number = *static_cast<volatile uint32_t*>(&record->taken);
  if (*static_cast<volatile uint32_t*>(&record->claimed) != number) return;
  if (atomicCAS(&record->claimed, number, number + 1) != number) return;
  const int64_t fault[6] = {static_cast<int64_t>(kind), feature, position, value, bound, table};
  for (int i = 0; i < 6; ++i) record->fault[i] = fault[i];
  __threadfence_system();  // the host must not see `ready` before the rest
  // Nobody else writes it now. Kept until here, the number would take a register from the rows.
  *static_cast<volatile uint32_t*>(&record->ready) = *static_cast<volatile uint32_t*>(&record->claimed);
}

#endif

}  // namespace rk
