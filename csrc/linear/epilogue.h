// Activation functions on vectors, in float32.
#pragma once

#include "linear/types.h"
#include "simd/vectors.h"

namespace {

using rk::Epilogue;
using simd::vf;

// Cephes' expf: 2^n times a polynomial over [-ln 2 / 2, ln 2 / 2]; error below 2 units in the last place.
// Below -87 the result would be subnormal: e^-87 stands for all of it.
inline vf exp(vf x) {
  x = simd::at_least(simd::at_most(x, simd::broadcast(88.0f)), simd::broadcast(-87.0f));
  const simd::vi n = simd::round_i(simd::mul(x, simd::broadcast(1.44269504f)));
  const vf turns = simd::to_float(n);
  const vf r =
      simd::fma(turns, simd::broadcast(2.12194440e-4f), simd::fma(turns, simd::broadcast(-0.693359375f), x));
  vf p = simd::broadcast(1.9875691500e-4f);
  p = simd::fma(p, r, simd::broadcast(1.3981999507e-3f));
  p = simd::fma(p, r, simd::broadcast(8.3334519073e-3f));
  p = simd::fma(p, r, simd::broadcast(4.1665795894e-2f));
  p = simd::fma(p, r, simd::broadcast(1.6666665459e-1f));
  p = simd::fma(p, r, simd::broadcast(5.0000001201e-1f));
  p = simd::add(simd::fma(p, simd::mul(r, r), r), simd::broadcast(1.0f));
  return simd::mul(p, simd::float_i(simd::shift_left_23(simd::add_i(n, simd::broadcast_i(127)))));
}

inline vf sigmoid(vf x) {
  const vf one = simd::broadcast(1.0f);
  return simd::div(one, simd::add(one, exp(simd::sub(simd::zero(), x))));
}

// x * Phi(x), with the tail Q(|x|) = 1 - Phi(|x|) from Abramowitz and Stegun 7.1.26 (error 1.5e-7 of erf).
inline vf gelu(vf x) {
  const vf magnitude = simd::float_i(simd::magnitude_bits(x)), one = simd::broadcast(1.0f);
  const vf t = simd::div(one, simd::fma(magnitude, simd::broadcast(0.3275911f * 0.70710678f), one));
  vf p = simd::broadcast(1.061405429f);
  p = simd::fma(p, t, simd::broadcast(-1.453152027f));
  p = simd::fma(p, t, simd::broadcast(1.421413741f));
  p = simd::fma(p, t, simd::broadcast(-0.284496736f));
  p = simd::fma(p, t, simd::broadcast(0.254829592f));
  const vf square = simd::mul(simd::mul(x, x), simd::broadcast(-0.5f));
  const vf tail =
      simd::mul(simd::mul(simd::mul(p, t), exp(square)), simd::mul(magnitude, simd::broadcast(0.5f)));
  // x > 0: x - x Q(x); x < 0: -|x| Q(|x|).
  return simd::sub(simd::at_least(x, simd::zero()), tail);
}

inline vf apply(Epilogue e, vf x) {
  switch (e) {
    case Epilogue::none:
      return x;
    case Epilogue::relu:
      return simd::at_least(x, simd::zero());
    case Epilogue::gelu:
      return gelu(x);
    case Epilogue::sigmoid:
      return sigmoid(x);
    default:
      // Below -104 the true result is zero in float32, but that of the bounded exponential times a large x is
      // not.
      return simd::mul(simd::at_least(x, simd::broadcast(-104.0f)), sigmoid(x));
  }
}

}  // namespace
