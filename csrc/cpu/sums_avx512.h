// `sum_chunk` of chunk.h for AVX-512. Bitwise identical: it has the same columns and order. Only kernels_avx512.cpp
// includes this.
#pragma once

#include "codes_avx512.h"

namespace drift::avx512 {

constexpr int kColumns = 32;

// The columns, in two registers.
struct Columns {
  __m512 a, b;

  // 64 products: two per column.
  DRIFT_512 void add(Floats x) {
    static_assert(kTurn == 2 * kColumns);
    a = _mm512_add_ps(_mm512_add_ps(a, x.r[0]), x.r[2]);
    b = _mm512_add_ps(_mm512_add_ps(b, x.r[1]), x.r[3]);
  }

  template <Order kOrder>
  DRIFT_512 void store(float* x) const {
    if constexpr (kOrder == Order::kInOrder) {
      _mm512_store_ps(x, a);
      _mm512_store_ps(x + 16, b);
    } else {
      const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      _mm512_store_ps(x, _mm512_permutex2var_ps(a, first, b));
      _mm512_store_ps(x + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(first, words(8)), b));
    }
  }
};

// Adds column by column, in order.
DRIFT_512 void add_columns(double& sum, const float* columns) {
  alignas(64) double wide[kColumns];
  for (int i = 0; i < kColumns; i += 8) _mm512_store_pd(wide + i, _mm512_cvtps_pd(_mm256_load_ps(columns + i)));
  double total = sum;
  for (int column = 0; column < kColumns; ++column) total += wide[column];
  sum = total;
}

template <class Grad, class Delta>
DRIFT_512 Sums sum_chunk(const Row& row, uint64_t grad_address, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64 * kColumns;
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  constexpr Order kOrder = std::is_same_v<Grad, bfloat16> ? Order::kEvenOdd : Order::kInOrder;
  const Grad* __restrict grad = pointer<const Grad>(grad_address);
  [[maybe_unused]] const Delta* __restrict delta = pointer<const Delta>(row.delta);
  [[maybe_unused]] const float* __restrict scales = pointer<const float>(row.delta_scale);

  Sums sums{0.0, 0.0};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    Columns grad_grad{}, grad_delta{};
    int64_t i = block;
    for (; i + kTurn <= stop; i += kTurn) {
      const Floats g = load<kOrder>(grad + i);
      grad_grad.add(g * g);
      if constexpr (kHasDelta) grad_delta.add(g * load_delta<kOrder>(delta, scales, i));
    }
    alignas(64) float of_grad[kColumns], of_delta[kColumns];
    grad_grad.store<kOrder>(of_grad);
    grad_delta.store<kOrder>(of_delta);
    for (int64_t rest = i; i < stop; ++i) {
      const int64_t column = (i - rest) % kColumns;
      const float g = to_float(grad[i]);
      of_grad[column] += g * g;
      if constexpr (kHasDelta) {
        of_delta[column] += g * value(delta[i], kCoded<Delta> ? scales[i / kScaleBlock] : 1.0f);
      }
    }
    add_columns(sums.grad_grad, of_grad);
    if constexpr (kHasDelta) add_columns(sums.grad_delta, of_delta);
  }
  return sums;
}

}  // namespace drift::avx512
