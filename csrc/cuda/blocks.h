// Converts a turn's codes to floats and back: codes.h in instructions that the device runs at full rate.
#pragma once

#include "numbers.h"
#include "quotient.h"

namespace drift {

// 2^23 plus byte k of a word of codes: the byte becomes the low bits of the mantissa.
template <int kByte>
DRIFT_HD float byte_as_float(uint32_t word) {
  return bits_to_float(pick<0x7440 | kByte>(word, 0x4b000000u));
}

// Puts the integer x into the low byte of a word, in two's complement if it is negative.
DRIFT_HD uint32_t float_as_byte(float x) { return float_to_bits(x + 0x1.8p23f); }

// Packs the low bytes of four words.
DRIFT_HD uint32_t pack_bytes(uint32_t first, uint32_t second, uint32_t third, uint32_t fourth) {
  return pick<0x5410>(pick<0x0040>(first, second), pick<0x0040>(third, fourth));
}

// The elements loaded from a tensor, with their scales if they are codes.
template <class T, int kCount>
struct Fetched {
  Values<T, kCount> stored;
  Values<float, kCoded<T> ? kCount : 1> scales;
};

template <class At, class T>
DRIFT_HD Fetched<T, At::kCount> fetch(At at, const T* tensor, [[maybe_unused]] const float* scale) {
  if constexpr (kCoded<T>) {
    return {at.load(tensor), at.scales(scale)};
  } else {
    return {at.load(tensor), {}};
  }
}

template <class T>
DRIFT_HD float decoded(uint32_t word, int byte, float scale) {
  const auto as_float = [&](uint32_t bytes) {
    const float bytes_as_floats[] = {byte_as_float<0>(bytes), byte_as_float<1>(bytes), byte_as_float<2>(bytes),
                                     byte_as_float<3>(bytes)};
    return bytes_as_floats[byte];
  };
  if constexpr (std::is_same_v<T, variance_code>) {
    return (as_float(word) - 0x1p23f) * scale;
  } else if constexpr (std::is_same_v<T, fp8_code>) {
    // The sign, and the magnitude times 2^-120.
    const auto top = static_cast<int32_t>(word << (24 - 8 * byte) & 0xff000000u);
    return bits_to_float(static_cast<uint32_t>(top >> 4) & 0x87f00000u) * 0x1p120f * scale;
  } else {
    const float code = as_float(word ^ 0x80808080u) - (0x1p23f + 128.0f);
    return (std::is_same_v<T, moment_code> ? code * fabsf(code) : code) * scale;
  }
}

// For variance_code, returns the square root.
template <class T, int kCount>
DRIFT_HD Values<float, kCount> to_floats(const Fetched<T, kCount>& fetched) {
  if constexpr (kCoded<T>) {
    const auto words = words_of(fetched.stored);
    Values<float, kCount> floats;
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      floats.values[j] = decoded<T>(words.words[j / 4], j % 4, fetched.scales.values[j]);
    }
    return floats;
  } else {
    return to_floats(fetched.stored);
  }
}

// scale_of: when dividing by a constant, one remainder step makes the quotient exact.
template <class T>
DRIFT_HD float quick_scale(uint32_t largest) {
  constexpr float kLargest = std::is_same_v<T, moment_code> ? 127.0f * 127.0f : 255.0f;
  constexpr float kInverse = 1.0f / kLargest;
  const float x = bits_to_float(largest);
  const float quotient = x * kInverse;
  const float scale = fused(-fused(kLargest, quotient, -x), kInverse, quotient);
  const float normal = largest != 0 && scale < 0x1p-126f ? 0x1p-126f : scale;
  return largest >= 0x7f800000u ? bits_to_float(0x7fc00000u) : normal;
}

DRIFT_HD float quick_inverse(float scale) { return scale > 0.0f ? quick_quotient(1.0f, scale) : 0.0f; }

// code_of, as a float. Where quick_root is not exact, the root is below 2^-48: the code is 0 whatever it returns.
DRIFT_HD float quick_code(moment_code, float x, float inverse) {
  return with_sign(smaller_number(quick_root(fabsf(x) * inverse), 127.0f), x);
}

// A nonzero root never gets code 0.
DRIFT_HD float quick_code(variance_code, float root, float inverse) {
  const float least = one_if_positive_or_nan(root);
  return larger_number(smaller_number(root * inverse, 255.0f), least);
}

template <class T, int kCount>
DRIFT_HD Values<T, kCount> encoded(const Values<float, kCount>& x, float inverse) {
  Words<kCount / 4> words;
  DRIFT_UNROLL
  for (int w = 0; w < kCount / 4; ++w) {
    uint32_t bytes[4];
    DRIFT_UNROLL
    for (int k = 0; k < 4; ++k) bytes[k] = float_as_byte(quick_code(T{}, x.values[4 * w + k], inverse));
    words.words[w] = pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]);
  }
  return values_of<T>(words);
}

// The bits of the largest magnitude; those of a NaN compare greater than those of any number.
template <int kCount>
DRIFT_HD uint32_t largest_bits(const Values<float, kCount>& x) {
  float largest = 0.0f;
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) largest = larger_or_nan(largest, fabsf(x.values[j]));
  return float_to_bits(largest);
}

}  // namespace drift
