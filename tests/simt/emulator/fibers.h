// Stacks and the switch between them: what the threads of a block run on.
#pragma once

#include <cstddef>

namespace simt {

constexpr int max_threads = 1024;  // of a block

// A place in some code where execution can go on: that of the host, or of a thread.
struct Context {
  void* sp = nullptr;  // what is saved there: the callee-saved registers and the address to go on at
  char* bottom = nullptr;
  size_t size = 0;
  void* shadow = nullptr;  // AddressSanitizer's own
};

// The memory of all stacks, each above a page that nobody may touch.
class Stacks {
 public:
  static constexpr size_t size = 256 << 10;  // frames are large under AddressSanitizer

  // Gives a context a stack on which `entry` will start. It must never return.
  void start(Context& context, void (*entry)());
  void release(Context& context);
  // Takes all stacks back, from threads that will never end.
  void reset();

  bool holds(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= memory_ && p < memory_ + max_threads * (size + guard);
  }

 private:
  static constexpr size_t guard = 4096;
  char* memory_ = nullptr;
  int mapped_ = 0;  // stacks that have been handed out at least once
  int free_count_ = 0;
  char* free_[max_threads];
};

// The context of the calling operating system's thread.
Context host_context();

// Saves where this is in `from` and goes on at `to`. With `for_ever`, nobody will come back.
void switch_context(Context& from, Context& to, bool for_ever);

// The first thing that code on a new stack has to call.
void arrived_on_new_stack();

}  // namespace simt
