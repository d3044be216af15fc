// exp_avg / (sqrt(exp_avg_sq) * inv_sqrt_bc2 + eps), correctly rounded, without the slow paths that a compiler adds
// to a square root and a division: one check per turn ensures that none of its values needs them.
#pragma once

#include "../adamw.h"
#include "access.h"
#include "instructions.h"

namespace drift {

// Masks are multiplied by this: they apply to the upper half of a float, or to both of a pair of bfloat16.
template <class T>
constexpr uint32_t kHalves = sizeof(T) == 4 ? 0x10000 : 0x10001;

// Whether a turn is in the range where quick_root and quick_quotient are exact and no result is NaN: |param|, without
// its last term, in [0, 2), |exp_avg| in [2^-63, 2) and exp_avg_sq in [2^-96, 2^32). (Exponents 64 to 127 are those
// whose first two bits are 01; for 31 to 158 the first two are 00 after a subtraction, which borrows from the upper
// half only if the lower one is outside.) A NaN or negative exp_avg_sq is outside too, and never rounds to a value
// inside.
template <class State, int kCount>
DRIFT_HD bool usual(const Values<float, kCount>& param, const Values<State, kCount>& exp_avg,
                    const Values<State, kCount>& exp_avg_sq) {
  constexpr uint32_t kOne = kHalves<State>;
  const auto m = words_of(exp_avg), v = words_of(exp_avg_sq);
  uint32_t outside_p = 0, outside_m = 0, outside_v = 0;
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) outside_p |= float_to_bits(param.values[j]);
  DRIFT_UNROLL
  for (int w = 0; w < m.kCount; ++w) {
    outside_m |= m.words[w] ^ 0x2000 * kOne;
    outside_v |= v.words[w] - 0x0f80 * kOne;
  }
  return ((outside_p & 0x40000000u) | (outside_m & 0x6000 * kOne) | (outside_v & 0xc000 * kOne)) == 0;
}

// The same for any finite param, |exp_avg| in [2^-96, 2^38), and zeros. Called when `usual` returns false: the gains of
// a norm can be 2 or more, embedding rows that were never seen have zeros, and rows not seen for long have small
// moments.
template <int kCount>
DRIFT_HD bool admissible(const Values<float, kCount>& param, const Values<float, kCount>& exp_avg,
                         const Values<float, kCount>& exp_avg_sq, float eps) {
  const auto inside = [](float x) { return float_to_bits(x) - 0x0f800000u < 0x43000000u; };
  bool all = true;
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const float p = param.values[j], m = exp_avg.values[j], v = exp_avg_sq.values[j];
    all =
        all && fabsf(p) < 0x1p127f && (m == 0.0f || inside(fabsf(m))) && (inside(v) || (v == 0.0f && eps >= 0x1p-58f));
  }
  return all;
}

// Whether the coefficients allow it. Then the denominator is in [2^-58, 2^30], the quotient is 0 or normal, and the
// parameter's last term is finite.
DRIFT_HD bool allows_quick(const Coefficients& c) {
  return c.inv_sqrt_bc2 >= 0x1p-10f && c.inv_sqrt_bc2 <= 0x1p9f && c.eps >= 0.0f && c.eps <= 0x1p20f &&
         fabsf(c.step_size) <= 0x1p20f;
}

// sqrt(x) for x = 0 and x >= 2^-96: one Newton step from an approximation. This is what nvcc generates for sqrtf
// without the range check, and equally exact: tests/test_quotient.py checks all mantissas. (If the approximation were
// off by one ulp more, a few in a million would be wrong.)
DRIFT_HD float quick_root(float x) {
  const float inverse = near_inverse_root(larger_number(x, 0x1p-100f));
  const float root = x * inverse;
  return fused(-fused(root, root, -x), 0.5f * inverse, root);
}

// a / b, likewise what nvcc generates for a division (Markstein, "IA-64 and elementary functions", 2000, chapter 8).
// The sign of the remainder is chosen so that -0 / b = -0.
DRIFT_HD float quick_quotient(float a, float b) {
  float inverse = near_reciprocal(b);
  inverse = fused(-fused(b, inverse, -1.0f), inverse, inverse);
  float quotient = a * inverse;
  quotient = fused(-fused(b, quotient, -a), inverse, quotient);
  return fused(-fused(b, quotient, -a), inverse, quotient);
}

}  // namespace drift
