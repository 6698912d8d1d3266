// Products of int8 that one core can sum in a second: the limit that int8 layers are measured against.
// Compiled at run time by probe.py for the machine it runs on. MAX_LEVEL: 1 for AVX2, 2 for AVX-512, 3 with
// VNNI.
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Enough sums that an instruction needn't wait for the one before it (2 a cycle that take 5), and few enough
// for 16 registers. Variables and not an array, which compilers keep in memory.
#define EACH_SUM(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9)
enum { SUMS = 10 };

#if defined(__AVX512VNNI__) && MAX_LEVEL >= 3
#define INSTRUCTION "vpdpbusd, 512 bits"
typedef __m512i vec;
#define SPREAD(word) _mm512_set1_epi32(word)
#define MULTIPLY_ADD(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#elif defined(__AVX512BW__) && MAX_LEVEL >= 2
#define INSTRUCTION "vpmaddubsw (which saturates) + vpmaddwd + vpaddd, 512 bits"
typedef __m512i vec;
#define SPREAD(word) _mm512_set1_epi32(word)
#define MULTIPLY_ADD(sum, a, b) \
  _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)))
#elif defined(__AVX2__)
#define INSTRUCTION "vpmaddubsw (which saturates) + vpmaddwd + vpaddd, 256 bits"
typedef __m256i vec;
#define SPREAD(word) _mm256_set1_epi32(word)
#define MULTIPLY_ADD(sum, a, b) \
  _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
#endif

#if defined(MULTIPLY_ADD)
// The compiler has to take a register for one that changes here: a sum for never to be replaced by a product
// with `rounds`, an operand for never to be multiplied once for all rounds.
#if defined(__AVX512F__)
#define CHANGES(register) __asm__("" : "+v"(register))
#else
#define CHANGES(register) __asm__("" : "+x"(register))
#endif

const char* instruction(void) { return INSTRUCTION; }
int64_t products_per_round(void) { return SUMS * (int64_t)sizeof(vec); }

// Sum over all lanes of all sums (wrapping), so that no product can be dropped: rounds * products_per_round()
// * a * b. a: 0 to 127, b: -128 to 127.
uint32_t multiply_add(int64_t rounds, int32_t a, int32_t b) {
  vec left = SPREAD(a * 0x01010101), right = SPREAD((b & 0xff) * 0x01010101);
#define START(n) vec sum##n = SPREAD(0);
  EACH_SUM(START)
  for (int64_t i = 0; i < rounds; ++i) {
#define STEP(n)                               \
  CHANGES(left);                              \
  sum##n = MULTIPLY_ADD(sum##n, left, right); \
  CHANGES(sum##n);
    EACH_SUM(STEP)
  }
  uint32_t lanes[sizeof(vec) / sizeof(uint32_t)], total = 0;
#define FINISH(n)                                 \
  __builtin_memcpy(lanes, &sum##n, sizeof lanes); \
  for (unsigned lane = 0; lane < sizeof lanes / sizeof *lanes; ++lane) total += lanes[lane];
  EACH_SUM(FINISH)
  return total;
}
#else
const char* instruction(void) { return ""; }
int64_t products_per_round(void) { return 0; }  // no such instructions
uint32_t multiply_add(int64_t rounds, int32_t a, int32_t b) { return (uint32_t)(rounds * a * b); }
#endif
