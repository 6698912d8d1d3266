// Kernels that are wrong on purpose, each with its right version. The program runs one of them:
//   wrong NAME right|wrong FIRST_SEED SEEDS
// and prints a line a seed: "ok", "wrong result", or what the emulation said.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/cuda.cuh"

// Memory of exactly that size, from malloc: AddressSanitizer sees what is outside of it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, T value = T{}) : data_(static_cast<T*>(malloc(count * sizeof(T)))), count_(count) {
    std::fill(data_, data_ + count, value);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_;
  size_t count_;
};

// Runs the right or the wrong version; gives whether the result is as it should be.
using Run = bool (*)(bool right);

struct Case {
  Case(const char* name, Run run) { all().push_back({name, run}); }
  static std::vector<std::pair<std::string, Run>>& all() {
    static std::vector<std::pair<std::string, Run>> cases;
    return cases;
  }
};

#define RK_CASE(name)            \
  static bool run_##name(bool);  \
  static Case case_##name(#name, run_##name); \
  static bool run_##name(bool right)
