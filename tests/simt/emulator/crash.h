// Turns a crash of a kernel's thread into an error of its launch.
#pragma once

#include <signal.h>

namespace simt {

// For the time of a launch. Does nothing under AddressSanitizer, which tells more about a crash.
class CatchCrashes {
 public:
  CatchCrashes();
  CatchCrashes(const CatchCrashes&) = delete;
  CatchCrashes& operator=(const CatchCrashes&) = delete;
  ~CatchCrashes();

 private:
  struct sigaction before_[2];
  stack_t stack_before_;
};

}  // namespace simt
