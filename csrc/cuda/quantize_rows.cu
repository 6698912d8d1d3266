#include "cuda/quantize_rows.cuh"

#include <algorithm>
#include <cfloat>

#include "cuda/floats.cuh"

namespace rk {

constexpr int quantize_lanes = 256;
constexpr int quantize_warps = quantize_lanes / warp_lanes;
constexpr float min_scale = 0x1p-100f;

// A block quantizes a row. Those past the last one are zero: products read eight at once.
__global__ void __launch_bounds__(quantize_lanes)
    quantize_rows_kernel(const __grid_constant__ QuantizeArguments a) {
  __shared__ float lows[quantize_warps], highs[quantize_warps];
  const int64_t row = blockIdx.x;
  uint32_t* const q = reinterpret_cast<uint32_t*>(a.q + row * a.q_stride);
  const int first = 4 * static_cast<int>(threadIdx.x), step = 4 * static_cast<int>(blockDim.x);
  if (row >= a.m) {
    for (int k = first; k < a.q_stride; k += step) q[k / 4] = 0;
    return;
  }
  const char* x = a.x + row * a.x_stride;
  float low = 0.0f, high = 0.0f, v[4];
  int wrong = 0;
  for (int k = first; k < a.k; k += step) {
    load_four(v, x, a.type, k, a.k, a.wide);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wrong |= !(fabsf(v[i]) <= FLT_MAX);
      low = fminf(low, v[i]);
      high = fmaxf(high, v[i]);
    }
  }
  wrong = __syncthreads_or(wrong);
  float scale, inverse, zero;
  if (a.qparams != nullptr) {
    scale = load_constant<float>(a.qparams);
    zero = load_constant<float>(a.qparams + 1);
    const bool valid =
        scale > 0.0f && scale <= FLT_MAX && zero >= 0.0f && zero <= 255.0f && rintf(zero) == zero;
    if (!valid) wrong = 1, scale = 1.0f, zero = 0.0f;
    inverse = __frcp_rn(scale);
  } else {
    for (int lanes = 1; lanes < warp_lanes; lanes <<= 1) {
      low = fminf(low, __shfl_xor_sync(all_lanes, low, lanes));
      high = fmaxf(high, __shfl_xor_sync(all_lanes, high, lanes));
    }
    const int warps = static_cast<int>(blockDim.x) / warp_lanes;
    if (threadIdx.x % warp_lanes == 0) {
      lows[threadIdx.x / warp_lanes] = low;
      highs[threadIdx.x / warp_lanes] = high;
    }
    __syncthreads();
    for (int w = 0; w < warps; ++w) {
      low = fminf(low, lows[w]);
      high = fmaxf(high, highs[w]);
    }
    if (wrong) low = high = 0.0f;
    constexpr float part = 1.0f / 255.0f;
    scale = fmaxf(__fsub_rn(__fmul_rn(high, part), __fmul_rn(low, part)), min_scale);
    inverse = __frcp_rn(scale);
    zero = fminf(fmaxf(rintf(__fmul_rn(-low, inverse)), 0.0f), 255.0f);
  }
  if (threadIdx.x == 0) {
    a.scale[row] = wrong ? NAN : scale;
    a.zero[row] = static_cast<int32_t>(zero);
  }
  for (int k = first; k < a.q_stride; k += step) {
    load_four(v, x, a.type, k, a.k, a.wide);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Only the scale of a row with NaN or infinity matters.
      const float steps = fminf(fmaxf(__fmul_rn(v[i], inverse), -zero), 255.0f - zero);
      word |= (static_cast<uint32_t>(static_cast<int32_t>(rintf(steps) + zero - 128.0f)) & 0xffu) << (8 * i);
    }
    q[k / 4] = word;
  }
}

void quantize_rows(const QuantizeArguments& arguments, cudaStream_t stream) {
  // A lane takes eight numbers where the row is short.
  const int lanes = std::min(quantize_lanes, (arguments.k + 255) / 256 * 32);
  const unsigned rows = (static_cast<unsigned>(arguments.m) + 7) / 8 * 8;
  RK_LAUNCH(quantize_rows_kernel, dim3(rows), dim3(static_cast<unsigned>(lanes)), 0, stream, arguments);
}

}  // namespace rk
