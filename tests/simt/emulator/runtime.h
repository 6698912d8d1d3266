// What the emulated device code (simt*.h) asks of the emulation (machine.cpp, races.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.h"  // the toolkit's own

// The compute capability that the code is compiled for, times 100.
#if !defined(RK_SIMT_ARCH)
#define RK_SIMT_ARCH 900
#endif

// threadIdx and its like lie side by side, so that the checked build can tell them from other memory.
#define RK_SIMT_BUILTIN __attribute__((visibility("hidden"), section("rk_simt_builtin")))

namespace simt {

struct Launch {
  const char* name;    // as the source has it
  const void* kernel;  // its address, for its whole name
  dim3 grid, block;
  size_t shared_bytes;
  void (*thread)(const void* closure);  // runs one thread: the kernel with its arguments
  const void* closure;
  size_t closure_size;
};

// Runs all threads of all blocks. Throws std::runtime_error for what is wrong with the launch or with the
// kernel.
void run(const Launch& launch);

void* dynamic_shared();
unsigned lane();

// What is wrong with the thread that runs now; its kernel ends here.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A warp's collective operation: waits until all lanes of `mask` are here, at the same place of the code. The
// last one then computes for all of them: slots[lane] is what each lane brought.
using Finish = void (*)(void* const* slots, unsigned mask);
void collective(const char* what, unsigned mask, void* slot, Finish finish);
// __syncwarp: a collective operation that orders memory.
void sync_warp(unsigned mask);
// Some lanes that are here together: never more than the caller may count on.
unsigned active_mask();

// A block's barrier; gives the number of threads whose predicate held.
unsigned barrier(const char* what, bool predicate);

// A shuffle's result for this lane: the value of lane `source`.
uint64_t shuffle(const char* what, unsigned mask, uint64_t value, unsigned source);
unsigned ballot(const char* what, unsigned mask, bool predicate);
unsigned match_any(unsigned mask, uint64_t value);

// Other threads may run before an atomic operation. A variable of a thread has none.
void before_atomic(const char* what, const void* address);

// Other threads may run here; in the second, they do.
void may_switch();
void must_switch();

void fence();  // __threadfence and its kind: others may run here, too

// Memory that the whole launch only reads (__ldg): nobody may write there. Only the checked build looks.
void read_only(const void* address, size_t size);

}  // namespace simt
