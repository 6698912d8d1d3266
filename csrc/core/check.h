// Errors. torch turns std::out_of_range into IndexError, std::invalid_argument into ValueError and every
// other exception that crosses the operator boundary into RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace rk {

template <typename Error, typename... Args>
[[noreturn]] void raise(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw Error(message.str());
}

template <typename... Args>
void check(bool good, const Args&... args) {
  if (__builtin_expect(!good, 0)) raise<std::runtime_error>(args...);
}

}  // namespace rk
