// One-byte codes with a float32 scale for each block of 128 elements, in the flat order of the tensor. The arithmetic
// is that of drift_kernels/lossless.py and quantized.py, operation by operation.
#pragma once

#include <cmath>
#include <type_traits>

#include "rounding.h"

namespace drift {

constexpr int kScaleBlock = 128;

// Of a delta: code * scale.
struct int8_code {
  int8_t code;
};

// Of a delta: an e4m3 number * scale.
struct fp8_code {
  uint8_t code;
};

// Of exp_avg: code * |code| * scale, finer toward zero.
struct moment_code {
  int8_t code;
};

// Of exp_avg_sq: code^2 * scale.
struct variance_code {
  uint8_t code;
};

template <class T>
constexpr bool kCoded = std::is_same_v<T, int8_code> || std::is_same_v<T, fp8_code> || std::is_same_v<T, moment_code> ||
                        std::is_same_v<T, variance_code>;

// What a code is worked on as.
template <class T>
using Decoded = std::conditional_t<kCoded<T>, float, T>;

DRIFT_HD float decode(int8_code x, float scale) { return static_cast<float>(x.code) * scale; }

DRIFT_HD float decode(fp8_code x, float scale) {
  // The exponent moves by an exact multiplication, which also normalises subnormals. (No delta has a NaN.)
  const float magnitude = bits_to_float((x.code & 0x7fu) << 20) * 0x1p120f;
  return bits_to_float(float_to_bits(magnitude) | (x.code & 0x80u) << 24) * scale;
}

DRIFT_HD float decode(moment_code x, float scale) {
  const int32_t code = x.code;
  return static_cast<float>(code < 0 ? -(code * code) : code * code) * scale;
}

DRIFT_HD float decode(variance_code x, float scale) {
  const int32_t code = x.code;
  return static_cast<float>(code * code) * scale;
}

// The largest code, and the scale of a block whose largest magnitude has these bits. One NaN or Inf makes it NaN, and
// so, in the next step, the whole block. It is not 0 unless all of the block is.
template <class T>
constexpr float kLargestCode = std::is_same_v<T, moment_code> ? 127.0f : 255.0f;

template <class T>
DRIFT_HD float scale_of(uint32_t largest) {
  const float scale = bits_to_float(largest) / (kLargestCode<T> * kLargestCode<T>);
  const float at_least = largest != 0 && scale == 0.0f ? bits_to_float(1u) : scale;
  return largest >= 0x7f800000u ? bits_to_float(0x7fc00000u) : at_least;
}

DRIFT_HD uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7fffffffu; }

// What to divide the block's magnitudes by: the scale, or infinity where there is none (0) or it is NaN.
DRIFT_HD float divisor_of(float scale) { return scale > 0.0f ? scale : bits_to_float(0x7f800000u); }

// The nearest code (ties to even) on the scale of square roots; for a variance that is not zero, not the code of zero,
// by whose root the update would be divided.
template <class T>
DRIFT_HD T encode(float x, float divisor) {
  const float root = sqrtf(bits_to_float(magnitude_bits(x)) / divisor);
  const float nearest = (root + 0x1.8p23f) - 0x1.8p23f;
  const int32_t code = static_cast<int32_t>(nearest < kLargestCode<T> ? nearest : kLargestCode<T>);
  if constexpr (std::is_same_v<T, moment_code>) {
    return {static_cast<int8_t>(x < 0.0f ? -code : code)};
  } else {
    return {static_cast<uint8_t>((code == 0) & (x > 0.0f) ? 1 : code)};
  }
}

}  // namespace drift
