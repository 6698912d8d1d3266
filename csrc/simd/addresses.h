// Addresses of many rows at once. Unnamed namespace: see vectors.h.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
namespace simd {

// Writes the addresses of 8 rows; false when an index is not below `num_rows` or equals `excluded`.
template <typename Index>
inline bool row_addresses(const Index* indices, uint64_t num_rows, int64_t excluded, const uint8_t* rows,
                          int64_t stride, const uint8_t** out) {
#if defined(__AVX512F__)
  __m512i index;
  if constexpr (sizeof(Index) == 8) {
    index = _mm512_loadu_si512(indices);
  } else {
    index = _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)));
  }
  const __m512i first = _mm512_set1_epi64(reinterpret_cast<int64_t>(rows));
  _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_mullo_epi64(index, _mm512_set1_epi64(stride)), first));
  const __mmask8 bad = _mm512_cmpge_epu64_mask(index, _mm512_set1_epi64(static_cast<int64_t>(num_rows)));
  return (bad | _mm512_cmpeq_epi64_mask(index, _mm512_set1_epi64(excluded))) == 0;
#else
  bool good = true;
  for (int k = 0; k < 8; ++k) {
    const int64_t index = indices[k];
    good &= static_cast<uint64_t>(index) < num_rows && index != excluded;
    // The address is computed with integers: C++ allows no pointer to a row that does not exist.
    out[k] = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(rows) +
                                              static_cast<uintptr_t>(index) * static_cast<uintptr_t>(stride));
  }
  return good;
#endif
}

}  // namespace simd
}  // namespace
