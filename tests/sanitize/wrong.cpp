// Deliberately wrong: shows that the sanitizers of the instrumented build report what they are there for.
#include <cstddef>
#include <cstdint>
#include <vector>

extern "C" int past_the_end(int n) {
  std::vector<int> values(static_cast<std::size_t>(n), 1);
  return values.data()[n];
}

extern "C" int overflow(int n) { return INT32_MAX - 1 + n; }

extern "C" int misaligned(const char* p) { return *reinterpret_cast<const int*>(p + 1); }
