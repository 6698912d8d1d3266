// What one core can read from random rows of a table: the limit that lookups are measured against.
// Compiled at run time by probe.py for the machine it runs on.
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vec __attribute__((vector_size(32), aligned(32), may_alias));

enum { LINE = 64 };

enum { GROUP = 16, NEAR = 16 };

static inline __attribute__((always_inline)) void prefetch(const char* line, int level) {
  if (level == 1)
    __builtin_prefetch(line, 0, 2);  // T1: into L2, which has far more miss slots than L1
  else
    __builtin_prefetch(line, 0, 3);  // T0
}

// Asks for rows i to i + count of ids: line 0 of all of them, then line 1, ... The lines of a row asked for
// one right after the other look like a stream to some CPUs, which then fetch what nobody wants.
static inline __attribute__((always_inline)) void prefetch_rows(const char* base, const int64_t* ids,
                                                                size_t n, size_t row_bytes, int level,
                                                                size_t i, size_t count) {
  for (size_t b = 0; b < row_bytes; b += LINE)
    for (size_t r = i; r < i + count; ++r)
      prefetch(base + (size_t)ids[r < n ? r : n - 1] * row_bytes + b, level);
}

// Inlined with all constants but the distance, so that a row is a straight line of loads.
static inline __attribute__((always_inline)) uint64_t gather(const char* base, const int64_t* ids, size_t n,
                                                             size_t row_bytes, int level, size_t group,
                                                             int near, size_t ahead) {
  vec sum0 = {0}, sum1 = {0};
  for (size_t i = 0; i < n; ++i) {
    if (i % group == 0) prefetch_rows(base, ids, n, row_bytes, level, i + ahead, group);
    if (near) prefetch_rows(base, ids, n, row_bytes, 0, i + NEAR, 1);
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
// of 32. order 0: rows are asked for one at a time; 1: 16 at a time, line by line; 2: so, and once more, into
// L1, shortly before they are read.
uint64_t gather_rows(const char* base, const int64_t* ids, size_t n, size_t row_bytes, int level, int order,
                     size_t ahead) {
#define ORDER(BYTES, LEVEL)                                           \
  (order == 0   ? gather(base, ids, n, BYTES, LEVEL, 1, 0, ahead)     \
   : order == 1 ? gather(base, ids, n, BYTES, LEVEL, GROUP, 0, ahead) \
                : gather(base, ids, n, BYTES, LEVEL, GROUP, 1, ahead))
#define CASE(BYTES) \
  case BYTES:       \
    return level == 1 ? ORDER(BYTES, 1) : ORDER(BYTES, 0);
  switch (row_bytes) {
    CASE(32)
    CASE(64)
    CASE(128)
    CASE(256)
    CASE(512)
    default:
      return level == 1 ? ORDER(row_bytes, 1) : ORDER(row_bytes, 0);
  }
#undef CASE
#undef ORDER
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
