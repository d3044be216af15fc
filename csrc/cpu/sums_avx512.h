// `sum_chunk` of chunk.h for AVX-512, with its columns and its order: the same bits. Included by kernels_avx512.cpp
// alone.
#pragma once

#include "lanes_avx512.h"

namespace drift::avx512 {

DRIFT_512 Floats plus_products(Floats sum, Floats x, Floats y) {
  return {_mm512_add_ps(sum.a, _mm512_mul_ps(x.a, y.a)), _mm512_add_ps(sum.b, _mm512_mul_ps(x.b, y.b))};
}

// Lane by lane, in this order.
DRIFT_512 void add_lanes(double& sum, const float* lanes) {
  alignas(64) double wide[kTurn];
  for (int i = 0; i < kTurn; i += 8) _mm512_store_pd(wide + i, _mm512_cvtps_pd(_mm256_load_ps(lanes + i)));
  double total = sum;
  for (int lane = 0; lane < kTurn; ++lane) total += wide[lane];
  sum = total;
}

template <class Grad, class Delta>
DRIFT_512 Sums sum_chunk(const Row& row, uint64_t grad_address, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64 * kTurn;
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  constexpr Order kOrder = std::is_same_v<Grad, bfloat16> ? Order::kEvenOdd : Order::kInOrder;
  const Grad* __restrict grad = pointer<const Grad>(grad_address);
  [[maybe_unused]] const Delta* __restrict delta = pointer<const Delta>(row.delta);
  [[maybe_unused]] const float* __restrict scales = pointer<const float>(row.delta_scale);

  Sums sums{0.0, 0.0};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    Floats grad_grad{}, grad_delta{};
    int64_t i = block;
    for (; i + kTurn <= stop; i += kTurn) {
      const Floats g = load<kOrder>(grad + i);
      grad_grad = plus_products(grad_grad, g, g);
      if constexpr (kHasDelta) grad_delta = plus_products(grad_delta, g, load_delta<kOrder>(delta, scales, i));
    }
    alignas(64) float of_grad[kTurn], of_delta[kTurn];
    store<kOrder>(of_grad, grad_grad, nullptr);
    store<kOrder>(of_delta, grad_delta, nullptr);
    for (int lane = 0; i < stop; ++lane, ++i) {
      const float g = to_float(grad[i]);
      of_grad[lane] += g * g;
      if constexpr (kHasDelta) {
        of_delta[lane] += g * value(delta[i], kCoded<Delta> ? scales[i / kScaleBlock] : 1.0f);
      }
    }
    add_lanes(sums.grad_grad, of_grad);
    if constexpr (kHasDelta) add_lanes(sums.grad_delta, of_delta);
  }
  return sums;
}

}  // namespace drift::avx512
