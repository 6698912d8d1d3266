// Products of float32 that one core can sum in a second: the limit that sparse layers are measured against.
// Compiled at run time by probe.py for the machine it runs on. MAX_LEVEL: 1 for AVX2, 2 and more for AVX-512.
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Enough sums that an instruction needn't wait for the one before it (2 a cycle that take 4 or 5), and few
// enough for 16 registers. Variables and not an array, which compilers keep in memory.
#define EACH_SUM(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9)
enum { SUMS = 10 };

#if defined(__AVX512F__) && MAX_LEVEL >= 2
#define INSTRUCTION "vfmadd231ps, 512 bits"
typedef __m512 vec;
#define SPREAD(number) _mm512_set1_ps(number)
#define MULTIPLY_ADD(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define CHANGES(register) __asm__("" : "+v"(register))
#elif defined(__AVX2__) && defined(__FMA__)
#define INSTRUCTION "vfmadd231ps, 256 bits"
typedef __m256 vec;
#define SPREAD(number) _mm256_set1_ps(number)
#define MULTIPLY_ADD(sum, a, b) _mm256_fmadd_ps(a, b, sum)
#define CHANGES(register) __asm__("" : "+x"(register))
#endif

#if defined(MULTIPLY_ADD)
const char* instruction(void) { return INSTRUCTION; }
int64_t products_per_round(void) { return SUMS * (int64_t)(sizeof(vec) / sizeof(float)); }

// Sum over all lanes of all sums, so that no product can be dropped: rounds * products_per_round() * a * b,
// as long as rounds * a * b is at most 2^24, up to which every integer is a float32.
int64_t multiply_add(int64_t rounds, int32_t a, int32_t b) {
  vec left = SPREAD((float)a), right = SPREAD((float)b);
#define START(n) vec sum##n = SPREAD(0);
  EACH_SUM(START)
  for (int64_t i = 0; i < rounds; ++i) {
// CHANGES: or the compiler may sum all rounds at once.
#define STEP(n)                               \
  CHANGES(left);                              \
  sum##n = MULTIPLY_ADD(sum##n, left, right); \
  CHANGES(sum##n);
    EACH_SUM(STEP)
  }
  float lanes[sizeof(vec) / sizeof(float)];
  int64_t total = 0;
#define FINISH(n)                                 \
  __builtin_memcpy(lanes, &sum##n, sizeof lanes); \
  for (unsigned lane = 0; lane < sizeof lanes / sizeof *lanes; ++lane) total += (int64_t)lanes[lane];
  EACH_SUM(FINISH)
  return total;
}
#else
const char* instruction(void) { return ""; }
int64_t products_per_round(void) { return 0; }  // no such instructions
int64_t multiply_add(int64_t rounds, int32_t a, int32_t b) { return rounds * a * b; }
#endif
