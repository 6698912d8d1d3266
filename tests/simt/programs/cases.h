// Kernels on which the emulation is tried: those that are wrong on purpose, each with its right version, and
// those that compute what is known. A GPU can run all that is right, too: `nvcc -std=c++17 -arch=native
// -Icsrc tests/simt/programs/*.cu -o programs && ./programs all`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/cuda.cuh"

// Memory of exactly that size, which the host may use, too.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, T value = T{}) : count_(count) {
    void* memory = nullptr;
    rk::cuda_check(cudaMallocManaged(&memory, count * sizeof(T)), "allocating");
    data_ = static_cast<T*>(memory);
    std::fill(data_, data_ + count, value);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// RK_LAUNCH, and waits for the kernel.
#define RK_RUN(kernel, grid, block, shared_bytes, stream, ...)           \
  do {                                                                   \
    RK_LAUNCH(kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__); \
    rk::cuda_check(cudaDeviceSynchronize(), "running " #kernel);         \
  } while (false)

struct Case {
  std::string name;
  bool can_be_wrong;
  bool (*run)(bool right);  // gives whether the result is as it should be

  static std::vector<Case>& all() {
    static std::vector<Case> cases;
    return cases;
  }
};

struct AddCase {
  AddCase(const char* name, bool can_be_wrong, bool (*run)(bool)) {
    Case::all().push_back({name, can_be_wrong, run});
  }
};

// The body sees `bool right`: which version to run.
#define RK_CASE(name)                                  \
  static bool run_##name(bool right);                  \
  static AddCase case_##name(#name, true, run_##name); \
  static bool run_##name(bool right)

// A kernel with a known result; the body says whether it has it.
#define RK_RIGHT(name)                                                         \
  static bool run_##name();                                                    \
  static AddCase case_##name(#name, false, [](bool) { return run_##name(); }); \
  static bool run_##name()

// Says what was got where, and gives false, unless two values are the same.
template <typename T>
bool same(const char* what, int at, T got, T expected) {
  if (got == expected) return true;
  printf("%s #%d is %.17g, expected %.17g; ", what, at, static_cast<double>(got),
         static_cast<double>(expected));
  return false;
}
