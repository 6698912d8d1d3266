// Memory that a thread keeps from one call to the next: a fresh page costs more than a kernel spends on it.
#pragma once

#include <cstdint>
#include <memory>

namespace rk {

class ThreadMemory {
 public:
  // `bytes` bytes at a multiple of 64, uninitialized; until the thread's next call. What is more than `kept`
  // is given back with the next smaller call.
  static char* get(int64_t bytes) {
    constexpr int64_t line = 64, kept = 8 << 20;
    thread_local std::unique_ptr<char[]> memory;
    thread_local int64_t size = 0;
    if (bytes > size || (size > kept && bytes <= kept)) {
      memory.reset();
      size = 0;
      memory.reset(new char[static_cast<size_t>(bytes + line)]);
      size = bytes;
    }
    return memory.get() + (line - reinterpret_cast<uintptr_t>(memory.get()) % line) % line;
  }
};

}  // namespace rk
