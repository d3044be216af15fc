// One-byte codes with a float32 scale per block of 128 elements, in the tensor's flat order. The arithmetic matches
// drift_kernels/formats/blocks.py, operation by operation.
#pragma once

#include <cmath>
#include <type_traits>

#include "rounding.h"

namespace drift {

constexpr int kScaleBlock = 128;

// A delta: code * scale.
struct int8_code {
  int8_t code;
};

// A delta: an e4m3 number * scale.
struct fp8_code {
  uint8_t code;
};

// exp_avg: code * |code| * scale, finer toward zero.
struct moment_code {
  int8_t code;
};

// The square root of exp_avg_sq: code * scale.
struct variance_code {
  uint8_t code;
};

// A float represented by its square root, which a step computes anyway.
struct rooted {
  float root;
};

DRIFT_HD float to_float(rooted x) { return x.root * x.root; }

template <>
DRIFT_HD rooted round_to<rooted>(float x) {
  return {sqrtf(x)};
}

template <class T>
constexpr bool kCoded = std::is_same_v<T, int8_code> || std::is_same_v<T, fp8_code> || std::is_same_v<T, moment_code> ||
                        std::is_same_v<T, variance_code>;

// The type that a code is decoded to for computing.
template <class T>
using Decoded = std::conditional_t<std::is_same_v<T, variance_code>, rooted, std::conditional_t<kCoded<T>, float, T>>;

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

DRIFT_HD rooted decode(variance_code x, float scale) { return {static_cast<float>(x.code) * scale}; }

DRIFT_HD uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7fffffffu; }

DRIFT_HD uint32_t magnitude_bits(rooted x) { return float_to_bits(x.root); }

// The scale that maps a block's largest magnitude, given by its bits, to the largest code. It is a normal number unless
// the whole block is zero. A NaN or Inf in the block makes the scale NaN, and so, in the next step, the whole block.
template <class T>
DRIFT_HD float scale_of(uint32_t largest) {
  constexpr float kLargest = std::is_same_v<T, moment_code> ? 127.0f * 127.0f : 255.0f;
  const float scale = bits_to_float(largest) / kLargest;
  const float normal = largest != 0 && scale < 0x1p-126f ? 0x1p-126f : scale;
  return largest >= 0x7f800000u ? bits_to_float(0x7fc00000u) : normal;
}

DRIFT_HD float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// Rounds to the nearest integer, ties to even, and clamps to at most `limit`; NaN gives `limit`.
DRIFT_HD int32_t nearest_code(float x, float limit) {
  const float nearest = (x + 0x1.8p23f) - 0x1.8p23f;
  return static_cast<int32_t>(nearest < limit ? nearest : limit);
}

DRIFT_HD int32_t code_of(float x, float inverse) {
  const int32_t code = nearest_code(sqrtf(bits_to_float(magnitude_bits(x)) * inverse), 127.0f);
  return x < 0.0f ? -code : code;
}

// A nonzero variance never gets code 0: the update would divide by it.
DRIFT_HD int32_t code_of(rooted x, float inverse) {
  const int32_t code = nearest_code(x.root * inverse, 255.0f);
  const int32_t least = magnitude_bits(x) != 0 ? 1 : 0;
  return code > least ? code : least;
}

template <class T>
DRIFT_HD T narrow(int32_t code) {
  return {static_cast<decltype(T::code)>(code)};
}

}  // namespace drift
