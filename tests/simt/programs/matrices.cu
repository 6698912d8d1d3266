#include "cases.h"
#include "cuda/mma.cuh"

namespace {

constexpr int M = 16, N = 8, K = 32;

// Rows of A and columns of B lie together: a lane's four bytes of a register are neighbours.
template <bool right>
__global__ void multiply(const int8_t* a, const int8_t* b_columns, int32_t* d) {
  const int group = static_cast<int>(threadIdx.x) / 4, place = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_part[4], b_part[2];
  for (int r = 0; r < 4; ++r) {
    a_part[r] = *reinterpret_cast<const uint32_t*>(a + (group + 8 * (r % 2)) * K + 4 * place + 16 * (r / 2));
  }
  for (int r = 0; r < 2; ++r) {
    b_part[r] = *reinterpret_cast<const uint32_t*>(b_columns + group * K + 4 * place + 16 * r);
  }
  int32_t d_part[4];
  for (int r = 0; r < 4; ++r) d_part[r] = d[(group + 8 * (r / 2)) * N + 2 * place + r % 2];
  if (right || threadIdx.x != 7) rk::mma_m16n8k32(d_part, a_part, b_part);
  for (int r = 0; r < 4; ++r) d[(group + 8 * (r / 2)) * N + 2 * place + r % 2] = d_part[r];
}

bool run(bool right, int8_t (*value)(int)) {
  Buffer<int8_t> a(M * K), b_columns(N * K);
  Buffer<int32_t> d(M * N);
  for (int i = 0; i < M * K; ++i) a[i] = value(i);
  for (int i = 0; i < N * K; ++i) b_columns[i] = value(3 * i + 1);
  for (int i = 0; i < M * N; ++i) d[i] = 1000 * i;
  const auto kernel = right ? multiply<true> : multiply<false>;
  RK_RUN(kernel, 1, 32, 0, nullptr, a.get(), b_columns.get(), d.get());
  bool good = true;
  for (int row = 0; row < M; ++row) {
    for (int column = 0; column < N; ++column) {
      int32_t expected = 1000 * (row * N + column);
      for (int k = 0; k < K; ++k) expected += a[row * K + k] * b_columns[column * K + k];
      good = same("element", row * N + column, d[row * N + column], expected) && good;
    }
  }
  return good;
}

}  // namespace

RK_CASE(mma) {
  return run(right, [](int i) { return static_cast<int8_t>(i * 7919 % 256 - 128); });
}
RK_RIGHT(mma_of_the_lowest) {
  return run(true, [](int) { return static_cast<int8_t>(-128); });
}
