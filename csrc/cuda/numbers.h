// Converts a turn's stored values to floats and back.
#pragma once

#include "draws.h"

namespace drift {

template <class T, int kCount>
DRIFT_HD Values<float, kCount> to_floats(const Values<T, kCount>& stored) {
  if constexpr (std::is_same_v<T, float>) {
    return stored;
  } else {
    static_assert(sizeof(T) == 2);
    const auto words = words_of(stored);
    Values<float, kCount> floats;
    DRIFT_UNROLL
    for (int w = 0; w < words.kCount; ++w) {
      widen_pair<T>(words.words[w], floats.values[2 * w], floats.values[2 * w + 1]);
    }
    return floats;
  }
}

// With kNumbers, x must not be NaN; otherwise a NaN becomes the canonical NaN.
template <bool kNumbers>
DRIFT_HD uint32_t bits_of(float x) {
  return kNumbers ? result_bits(x) : canonical_bits(x);
}

// Joins master weights: `residuals` holds their lower halves.
template <int kCount>
DRIFT_HD Values<float, kCount> joined(const Values<master_bfloat16, kCount>& nearest,
                                      const Values<int16_t, kCount>& residuals) {
  Values<float, kCount> floats;
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) floats.values[j] = join(nearest.values[j], residuals.values[j]);
  return floats;
}

template <bool kNumbers, int kCount>
DRIFT_HD void split(const Values<float, kCount>& x, Values<master_bfloat16, kCount>& nearest,
                    Values<int16_t, kCount>& residuals) {
  Words<kCount / 2> high, low;
  DRIFT_UNROLL
  for (int w = 0; w < kCount / 2; ++w) {
    const uint32_t first = bits_of<kNumbers>(x.values[2 * w]), second = bits_of<kNumbers>(x.values[2 * w + 1]);
    high.words[w] = high_halves(first + 0x8000u, second + 0x8000u);
    low.words[w] = low_halves(first, second);
  }
  nearest = values_of<master_bfloat16>(high);
  residuals = values_of<int16_t>(low);
}

// Rounds results to T. (With kNumbers, a NaN would become another NaN or, rounded stochastically, a zero.)
template <class T, bool kNumbers = false, int kCount>
DRIFT_HD Values<T, kCount> rounded(const Values<float, kCount>& x, const Draws<T, kCount>& draws) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    Words<kCount / 2> words;
    DRIFT_UNROLL
    for (int w = 0; w < kCount / 2; ++w) {
      const float low = x.values[2 * w], high = x.values[2 * w + 1];
      if constexpr (kStochastic<T>) {
        const uint32_t random = draws.words[w];
        const uint32_t first = bits_of<kNumbers>(low), second = bits_of<kNumbers>(high);
        words.words[w] = high_halves(first + (random & 0xffffu), second + (random >> 16));
      } else {
        const uint32_t nearest = nearest_pair<T>(low, high);
        words.words[w] = kNumbers ? nearest : canonical_pair<T>(nearest);
      }
    }
    return values_of<T>(words);
  }
}

}  // namespace drift
