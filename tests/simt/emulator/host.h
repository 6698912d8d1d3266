// The emulated CUDA runtime (host.cpp).
#pragma once

#include "runtime.h"

namespace simt {

// Throws the error that a GPU would give for a launch that is impossible.
void check_launch(const Launch& launch);

}  // namespace simt
