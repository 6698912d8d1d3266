// The instruction-set level of the kernels. It is detected once; it may be lowered, but never raised above
// the machine.
#pragma once

namespace rk {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3 };

// The level in use.
Isa isa();

}  // namespace rk

extern "C" {
// The highest level that this machine can run and this library was built with.
__attribute__((visibility("default"))) int rk_isa_supported();
// The level in use.
__attribute__((visibility("default"))) int rk_isa_current();
// Chooses a level; returns 0, or -1 (and changes nothing) when the machine or the build lacks it.
__attribute__((visibility("default"))) int rk_isa_select(int level);
}
