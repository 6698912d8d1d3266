// What one core can read from random rows of a table: the limit that lookups are measured against.
// Compiled at run time by probe.py for the machine it runs on.
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vec __attribute__((vector_size(32), aligned(32), may_alias));

enum { LINE = 64 };

static inline void prefetch(const char* row, size_t row_bytes, int level) {
  for (size_t b = 0; b < row_bytes; b += LINE) {
    if (level == 1)
      __builtin_prefetch(row + b, 0, 2);  // T1: into L2, which has far more miss slots than L1
    else
      __builtin_prefetch(row + b, 0, 3);  // T0
  }
}

// Inlined with constant row_bytes and level, so that a row is a straight line of loads.
static inline __attribute__((always_inline)) uint64_t gather(const char* base, const int64_t* ids, size_t n,
                                                             size_t row_bytes, int level, size_t ahead) {
  vec sum0 = {0}, sum1 = {0};
  for (size_t i = 0; i < n; ++i) {
    size_t next = i + ahead < n ? i + ahead : n - 1;
    prefetch(base + (size_t)ids[next] * row_bytes, row_bytes, level);
    const vec* row = (const vec*)(base + (size_t)ids[i] * row_bytes);
    for (size_t c = 0; c + 1 < row_bytes / sizeof(vec); c += 2) {
      sum0 += row[c];
      sum1 += row[c + 1];
    }
    if (row_bytes / sizeof(vec) % 2) sum0 += row[row_bytes / sizeof(vec) - 1];
  }
  vec sum = sum0 + sum1;
  return sum[0] + sum[1] + sum[2] + sum[3];
}

// Sum of all 64-bit words of the n rows (wrapping), so that no load can be dropped. row_bytes: a multiple
// of 32.
uint64_t gather_rows(const char* base, const int64_t* ids, size_t n, size_t row_bytes, int level,
                     size_t ahead) {
#define CASE(BYTES) \
  case BYTES:       \
    return level == 1 ? gather(base, ids, n, BYTES, 1, ahead) : gather(base, ids, n, BYTES, 0, ahead);
  switch (row_bytes) {
    CASE(32)
    CASE(64)
    CASE(128)
    CASE(256)
    CASE(512)
    default:
      return gather(base, ids, n, row_bytes, level, ahead);
  }
#undef CASE
}

// Sum of all 64-bit words of the buffer, front to back. bytes: a multiple of 128.
uint64_t read_sequentially(const char* base, size_t bytes) {
  vec sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0};
  const vec* v = (const vec*)base;
  for (size_t i = 0; i < bytes / sizeof(vec); i += 4) {
    sum0 += v[i];
    sum1 += v[i + 1];
    sum2 += v[i + 2];
    sum3 += v[i + 3];
  }
  vec sum = (sum0 + sum1) + (sum2 + sum3);
  return sum[0] + sum[1] + sum[2] + sum[3];
}
