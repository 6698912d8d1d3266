#include "core/isa.h"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#ifndef RK_HIGHEST_ISA
#error "setup.py defines RK_HIGHEST_ISA, the highest level it compiled"
#endif

namespace {

#if defined(__x86_64__)
// gcc before 11 and older clang have no __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}
#endif

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        has_f16c()))
    return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return 1;
  return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
  return 0;
#endif
}

int supported() {
  static const int level = detect() < RK_HIGHEST_ISA ? detect() : RK_HIGHEST_ISA;
  return level;
}

std::atomic<int>& current() {
  static std::atomic<int> level{supported()};
  return level;
}

}  // namespace

namespace rk {
Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }
}  // namespace rk

extern "C" {
int rk_isa_supported() { return supported(); }
int rk_isa_current() { return current().load(std::memory_order_relaxed); }
int rk_isa_select(int level) {
  if (level < 0 || level > supported()) return -1;
  current().store(level, std::memory_order_relaxed);
  return 0;
}
}
