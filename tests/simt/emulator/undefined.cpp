// The checked build looks for undefined behaviour, too: the compiler (-fsanitize=alignment and more, without
// its library) calls what is below where a check has failed. In a kernel that is an error of its launch.
#if defined(RK_SIMT_CHECKED)

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace {

// What every check hands over first.
struct Location {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  Location location;
  const void* type;
  unsigned char log_alignment;
};

[[noreturn]] void report(const std::string& what, const void* data, const void* frame) {
  const Location& location = *static_cast<const Location*>(data);
  if (simt::in_kernel()) simt::fail_at(simt::place_of_caller(frame), what);
  fprintf(stderr, "%s:%u: %s\n", location.file, location.line, what.c_str());
  abort();
}

}  // namespace

#define RK_SIMT_CHECK(name, what)                                                    \
  extern "C" __attribute__((visibility("hidden"), noinline)) void name(void* data) { \
    report(what, data, __builtin_frame_address(0));                                  \
  }

RK_SIMT_CHECK(__ubsan_handle_add_overflow_abort, "a sum of signed integers overflows")
RK_SIMT_CHECK(__ubsan_handle_sub_overflow_abort, "a difference of signed integers overflows")
RK_SIMT_CHECK(__ubsan_handle_mul_overflow_abort, "a product of signed integers overflows")
RK_SIMT_CHECK(__ubsan_handle_negate_overflow_abort, "the negative of a signed integer overflows")
RK_SIMT_CHECK(__ubsan_handle_divrem_overflow_abort, "a division by zero, or one that overflows")
RK_SIMT_CHECK(__ubsan_handle_shift_out_of_bounds_abort, "a shift by too much, or of a negative number")
RK_SIMT_CHECK(__ubsan_handle_out_of_bounds_abort, "an index past the end of an array")

extern "C" __attribute__((visibility("hidden"), noinline)) void __ubsan_handle_type_mismatch_v1_abort(
    void* data, void* address) {
  const unsigned alignment = 1u << static_cast<const TypeMismatch*>(data)->log_alignment;
  const std::string what =
      simt::describe_memory(address) + " is not a multiple of " + std::to_string(alignment);
  report("misaligned: " + what, data, __builtin_frame_address(0));
}

#endif
