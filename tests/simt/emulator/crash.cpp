#include "crash.h"

#include <ucontext.h>

#include <cstdint>

#include "machine.h"

namespace simt {

#if defined(RK_SIMT_ADDRESS)

CatchCrashes::CatchCrashes() {}
CatchCrashes::~CatchCrashes() {}

#else

namespace {

constexpr int signals[2] = {SIGSEGV, SIGBUS};
alignas(16) char handler_stack[64 << 10];  // that of the thread may be what is full
const void* touched;
Place place;

// The thread goes on here, not where it crashed.
[[noreturn]] void crashed() {
  const char* bottom = machine.current().context.bottom;
  const char* p = static_cast<const char*>(touched);
  if (p >= bottom - 4096 && p < bottom)
    fail_at(place, "its local variables and calls need more stack than there is");
  char text[120];
  snprintf(text, sizeof text,
           touched == nullptr ? "crashed: a misaligned vector, or an address that cannot be"
                              : "crashed: touched memory that is not there, at %p",
           touched);
  fail_at(place, text);
}

void handle(int signal, siginfo_t* info, void* data) {
  auto& registers = static_cast<ucontext_t*>(data)->uc_mcontext.gregs;
  if (!in_kernel()) {
    // Not ours: it happens again when this returns, and ends the process.
    ::signal(signal, SIG_DFL);
    return;
  }
  touched = info->si_code > 0 && info->si_code != SI_KERNEL ? info->si_addr : nullptr;
  place = place_of_caller(reinterpret_cast<const void*>(registers[REG_RBP]));
  if (place.count == max_frames) --place.count;
  for (int i = place.count++; i > 0; --i) place.frames[i] = place.frames[i - 1];
  place.frames[0] = reinterpret_cast<const void*>(registers[REG_RIP]);
  // As if `crashed` were called on the thread's emptied stack.
  const Context& own = machine.current().context;
  uintptr_t* top = reinterpret_cast<uintptr_t*>(own.bottom + own.size) - 1;
  *top = 0;
  registers[REG_RSP] = reinterpret_cast<greg_t>(top);
  registers[REG_RBP] = 0;
  registers[REG_RIP] = reinterpret_cast<greg_t>(&crashed);
}

}  // namespace

CatchCrashes::CatchCrashes() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &stack_before_);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; ++i) sigaction(signals[i], &action, &before_[i]);
}

CatchCrashes::~CatchCrashes() {
  for (int i = 0; i < 2; ++i) sigaction(signals[i], &before_[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

#endif

}  // namespace simt
