#include "fibers.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#if defined(RK_SIMT_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulation's context switch is written for x86-64 Linux"
#endif

// The registers that a called function has to keep, then the address to go on at, lie on the saved stack.
asm(R"(
.text
.p2align 4
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

extern "C" void simt_switch(void** save, void* load);

namespace simt {

void Stacks::start(Context& context, void (*entry)()) {
  if (memory_ == nullptr) {
    const size_t bytes = max_threads * (size + guard);
    void* all = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::runtime_error("simt: no address space for the threads' stacks");
    memory_ = static_cast<char*>(all);
  }
  if (free_count_ > 0) {
    context.bottom = free_[--free_count_];
  } else {
    context.bottom = memory_ + mapped_ * (size + guard) + guard;
    if (mprotect(context.bottom, size, PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("simt: no memory for a thread's stack");
    }
    ++mapped_;
  }
  context.size = size;
  context.shadow = nullptr;
  // As if `entry` had been called from address 0 by a function whose frame pointer was 0: walks up the stack
  // end there.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(context.bottom + size) - 8;
  for (int i = 0; i < 8; ++i) top[i] = 0;
  top[6] = reinterpret_cast<uintptr_t>(entry);
  context.sp = top;
}

void Stacks::release(Context& context) {
  free_[free_count_++] = context.bottom;
  context.bottom = nullptr;
}

void Stacks::reset() {
#if defined(RK_SIMT_ADDRESS)
  // The frames that were left behind have red zones.
  if (memory_ != nullptr) __asan_unpoison_memory_region(memory_, mapped_ * (size + guard));
#endif
  free_count_ = 0;
  for (int i = mapped_; i-- > 0;) free_[free_count_++] = memory_ + i * (size + guard) + guard;
}

Context host_context() {
  // Of the main thread the library reads it from a list of all mappings: 2 ms beside torch.
  static const void* known_thread;
  static Context known;
  if (known_thread == __builtin_thread_pointer()) return known;
  pthread_attr_t attributes;
  void* bottom = nullptr;
  size_t size = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
  }
  known.bottom = static_cast<char*>(bottom);
  known.size = size;
  known_thread = __builtin_thread_pointer();
  return known;
}

void switch_context(Context& from, Context& to, bool for_ever) {
#if defined(RK_SIMT_ADDRESS)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.shadow, to.bottom, to.size);
#else
  static_cast<void>(for_ever);
#endif
  simt_switch(&from.sp, to.sp);
#if defined(RK_SIMT_ADDRESS)
  __sanitizer_finish_switch_fiber(from.shadow, nullptr, nullptr);
#endif
}

void arrived_on_new_stack() {
#if defined(RK_SIMT_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace simt
