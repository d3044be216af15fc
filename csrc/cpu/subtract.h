// The arithmetic of building a prior: one piece of a delta and the inner products that describe it, in one pass.
#pragma once

#include "chunk.h"

namespace drift {

struct Products {
  double expert_expert;
  double expert_base;
  double base_base;
  double delta_delta;  // of the delta as stored
};

// delta = expert - origin in float32, rounded to Delta. Products of float32 values are exact in float64, so large
// weights do not overflow and small ones do not vanish in the sums.
template <class Weight, class Delta>
DRIFT_HD Products subtract_piece(const Weight* __restrict expert, const Weight* __restrict base, const Weight* origin,
                                 Delta* __restrict delta, int64_t count) {
  constexpr int kLanes = 16;
  double expert_expert[kLanes] = {}, expert_base[kLanes] = {}, base_base[kLanes] = {}, delta_delta[kLanes] = {};
  auto accumulate = [&](int lane, int64_t i) {
    const float e = to_float(expert[i]);
    const float b = to_float(base[i]);
    delta[i] = round_to<Delta>(e - to_float(origin[i]));
    const double wide_e = e, wide_b = b, wide_d = to_float(delta[i]);
    expert_expert[lane] += wide_e * wide_e;
    expert_base[lane] += wide_e * wide_b;
    base_base[lane] += wide_b * wide_b;
    delta_delta[lane] += wide_d * wide_d;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    DRIFT_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) accumulate(lane, i + lane);
  }
  for (int lane = 0; i < count; ++lane, ++i) accumulate(lane, i);
  Products products{0.0, 0.0, 0.0, 0.0};
  for (int lane = 0; lane < kLanes; ++lane) {
    products.expert_expert += expert_expert[lane];
    products.expert_base += expert_base[lane];
    products.base_base += base_base[lane];
    products.delta_delta += delta_delta[lane];
  }
  return products;
}

// The sums modulo 2^64 of every row and column of a matrix of 64-bit words. `columns` must be zero on entry.
DRIFT_HD void add_words(const uint64_t* __restrict words, int64_t rows, int64_t width, uint64_t* __restrict row_sums,
                        uint64_t* __restrict columns) {
  for (int64_t row = 0; row < rows; ++row) {
    uint64_t sum = 0;
    for (int64_t column = 0; column < width; ++column) {
      const uint64_t word = words[row * width + column];
      sum += word;
      columns[column] += word;
    }
    row_sums[row] = sum;
  }
}

}  // namespace drift
