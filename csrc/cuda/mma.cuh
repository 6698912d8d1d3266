// The tensor cores' product of 8-bit matrices, for sm_75 and newer: linear/int8/cuda_kernel.cuh multiplies
// with it. That the emulation does what the instruction does is what tests/gpu/assumptions.cu checks on a
// GPU.
#pragma once

#include "cuda/cuda.cuh"

namespace rk {

#if RK_ARCH >= 750 || RK_ARCH == 0

// D += A * B by the 32 lanes of a warp together: A of 16 x 32 and B of 32 x 8 signed bytes, D of 16 x 8
// integers, which wrap round. With group = lane / 4 and place = lane % 4, a lane holds (byte 0 of a register
// is its lowest one)
//
//   byte i of a[r]:  A[group + 8 * (r % 2)][4 * place + i + 16 * (r / 2)], four neighbours in a row
//   byte i of b[r]:  B[4 * place + i + 16 * r][group], four neighbours in a column
//   d[r]:            D[group + 8 * (r / 2)][2 * place + r % 2]

#if !defined(RK_SIMT)

__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if RK_ARCH == 750
  // Products of 8 x 16 by 16 x 8, whose registers are those of a quarter of the above.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+r"(d[2 * half]), "+r"(d[2 * half + 1])
                   : "r"(a[half + 2 * part]), "r"(b[part]));
    }
  }
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#else

struct MmaLane {
  int32_t* d;
  const uint32_t *a, *b;
};

// What the instruction computes, from the registers of all lanes.
inline void mma_of_all_lanes(void* const* lanes, unsigned) {
  int8_t a[16][32], b[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& from = *static_cast<const MmaLane*>(lanes[lane]);
    const int group = lane / 4, place = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[group + 8 * (r % 2)][4 * place + i + 16 * (r / 2)] = static_cast<int8_t>(from.a[r] >> (8 * i));
      }
      for (int r = 0; r < 2; ++r)
        b[4 * place + i + 16 * r][group] = static_cast<int8_t>(from.b[r] >> (8 * i));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& to = *static_cast<const MmaLane*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      uint32_t sum = static_cast<uint32_t>(to.d[r]);
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * b[k][column]);
      to.d[r] = static_cast<int32_t>(sum);
    }
  }
}

inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane lane{d, a, b};
  ::simt::collective("mma.sync", 0xffffffffu, &lane, mma_of_all_lanes);
}

#endif

#endif

}  // namespace rk
