// Single instructions that C++ has no name for. On the host, where the tests run the kernels, functions give the same
// results.
#pragma once

#include <algorithm>
#include <cmath>

#include "../rounding.h"

#if defined(__CUDACC__)
#define DRIFT_UNROLL _Pragma("unroll")
#else
#define DRIFT_UNROLL
#endif

namespace drift {

// a * b + c, rounded once. (Contraction is off: no other expression compiles to this.)
DRIFT_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fmaf(a, b, c);
#endif
}

// 1 / x within 1 ulp; subnormal x counts as 0.
DRIFT_HD float near_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// 1 / sqrt(x) within a few ulp; subnormal x counts as 0.
DRIFT_HD float near_inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
#endif
}

// The smaller or larger of two numbers; given a NaN and a number, the number.
DRIFT_HD float smaller_number(float a, float b) { return fminf(a, b); }
DRIFT_HD float larger_number(float a, float b) { return fmaxf(a, b); }

// The larger; a positive NaN if either is a NaN.
DRIFT_HD float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return std::isnan(a) || std::isnan(b) ? bits_to_float(0x7fffffffu) : std::max(a, b);
#endif
}

// The bits of a result. Arithmetic on the device returns a single NaN, 0x7fffffff.
DRIFT_HD uint32_t result_bits(float x) {
#if defined(__CUDA_ARCH__)
  return float_to_bits(x);
#else
  return std::isnan(x) ? 0x7fffffffu : float_to_bits(x);
#endif
}

// Likewise, with the canonical NaN.
DRIFT_HD uint32_t canonical_bits(float x) {
  const auto bits = static_cast<int32_t>(result_bits(x));
  return static_cast<uint32_t>(bits < 0x7fc00000 ? bits : 0x7fc00000);
}

// Four of the eight bytes of a (0 to 3) and b (4 to 7): the lowest digit of kBytes selects the lowest byte.
template <uint32_t kBytes>
DRIFT_HD uint32_t pick(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, kBytes);
#else
  const uint64_t from = static_cast<uint64_t>(b) << 32 | a;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(from >> (kBytes >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return picked;
#endif
}

// 1 if x > 0 or x is NaN, else 0.
DRIFT_HD float one_if_positive_or_nan(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("set.gtu.f32.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x <= 0.0f ? 0.0f : 1.0f;
#endif
}

// A nonnegative x with the sign of `sign`, a result; a NaN counts as positive.
DRIFT_HD float with_sign(float x, float sign) {
  return bits_to_float(float_to_bits(x) | (result_bits(sign) & 0x80000000u));
}

// A word of the low halves of two words, or of their high halves.
DRIFT_HD uint32_t low_halves(uint32_t low, uint32_t high) { return pick<0x5410>(low, high); }
DRIFT_HD uint32_t high_halves(uint32_t low, uint32_t high) { return pick<0x7632>(low, high); }

// Rounds two numbers to the halves of a word, to nearest, ties to even. A NaN becomes 0x7fff.
template <class T>
DRIFT_HD uint32_t nearest_pair(float low, float high) {
  static_assert(sizeof(T) == 2);
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  const auto half = [](float x) { return std::isnan(x) ? 0x7fffu : static_cast<uint32_t>(round_to<T>(x).bits); };
  return half(low) | half(high) << 16;
#endif
}

// A word from nearest_pair, with the canonical NaN.
template <class T>
DRIFT_HD uint32_t canonical_pair(uint32_t word) {
  constexpr uint32_t kNan = std::is_same_v<T, float16> ? 0x7e00 : 0x7fc0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t canonical;
  asm("min.s16x2 %0, %1, %2;" : "=r"(canonical) : "r"(word), "r"(kNan * 0x10001u));
  return canonical;
#else
  // Adding 1 sets the sign bit of 0x7fff only.
  const uint32_t nans = (word + 0x00010001u) & ~word & 0x80008000u;
  return word - (nans >> 15) * (0x7fffu - kNan);
#endif
}

// The halves of a word as floats.
template <class T>
DRIFT_HD void widen_pair(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, float16>) {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high)
        : "r"(word));
#else
    low = to_float(float16{static_cast<uint16_t>(word)});
    high = to_float(float16{static_cast<uint16_t>(word >> 16)});
#endif
  } else {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & 0xffff0000u);
  }
}

}  // namespace drift
