// Conversions between float32 and the storage types, for host and device, in integer arithmetic: bitwise identical with
// every compiler. Rounding is to nearest, ties to even, except for two types, stochastic_bfloat16 and master_bfloat16.
// A NaN becomes the canonical quiet NaN of the narrow type.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DRIFT_HD __host__ __device__ __forceinline__
#define DRIFT_KEEP_ROLLED _Pragma("unroll 1")  // unrolling would only use more registers
#else
#define DRIFT_HD inline __attribute__((always_inline))
#define DRIFT_KEEP_ROLLED
#endif

namespace drift {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// A bfloat16 that is rounded up or down at random, so that its expectation is the value.
struct stochastic_bfloat16 {
  uint16_t bits;
};

// A bfloat16 with the other half of a float32 beside it: the residual that rounding left.
struct master_bfloat16 {
  uint16_t bits;
};

DRIFT_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DRIFT_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DRIFT_HD float to_float(float x) { return x; }

DRIFT_HD float to_float(bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

DRIFT_HD float to_float(stochastic_bfloat16 x) { return to_float(bfloat16{x.bits}); }

DRIFT_HD float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // The exponent moves by an exact multiplication, which also normalises subnormals.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t inf_or_nan = (magnitude << 13) | 0x7f800000u;
  return bits_to_float(sign | (magnitude >= 0x7c00u ? inf_or_nan : finite));
}

template <class T>
DRIFT_HD T round_to(float x);

template <>
DRIFT_HD float round_to<float>(float x) {
  return x;
}

template <>
DRIFT_HD bfloat16 round_to<bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : nearest)};
}

template <>
DRIFT_HD float16 round_to<float16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Below 2^-14 the spacing is 2^-24, which is the spacing of float32 at 0.5: the addition rounds.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half |= (bits >> 16) & 0x8000u;
  return {static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7e00u : half)};
}

// Rounds with 16 random bits. The probability of rounding away from zero is the distance of |x| from the bfloat16
// toward zero, in units of the spacing.
DRIFT_HD stochastic_bfloat16 round_stochastically(float x, uint32_t random) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude < 0x7f800000u ? bits + random : bits) >> 16;
  return {static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fc0u : rounded)};
}

// Splits a float32 into the nearest bfloat16 and a 16-bit offset from it, without loss. Ties round away from zero: with
// ties to even, an even value would need 2^16 + 1 residuals.
DRIFT_HD void split(float x, master_bfloat16& nearest, int16_t& residual) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
  nearest.bits = static_cast<uint16_t>((kept + 0x8000u) >> 16);
  residual = static_cast<int16_t>(kept);  // kept - nearest * 2^16
}

DRIFT_HD float join(master_bfloat16 nearest, int16_t residual) {
  const uint32_t high = static_cast<uint32_t>(nearest.bits) << 16;
  return bits_to_float(high + static_cast<uint32_t>(static_cast<int32_t>(residual)));
}

}  // namespace drift
