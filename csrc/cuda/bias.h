// The bias kernel: one block processes one chunk. Bitwise identical to reference.bias_.
#pragma once

#include "blocks.h"

namespace drift {

// Elements per turn of a thread, all loaded before the first is used.
constexpr int kBiasTurn = 16;

template <class Grad, class Delta>
DRIFT_HD void bias_block(const Launch& launch, int64_t block) {
  const Chunk chunk = find_chunk(launch, block);
  const Row& row = launch.rows[chunk.row];
  const Coefficients& c = launch.coefficients[chunk.row];
  const auto tensors = GradAndDelta<Grad, Delta>::of(row, launch.grads[chunk.row - launch.first_row], chunk.begin);
  const Span span = cut<kBiasTurn, kCoded<Delta> ? 1 : kPeriod>(chunk.size, tensors.grad, tensors.delta);
  each_thread([&](int thread) {
    for_each_turn<kBiasTurn, 8>(span, thread, tensors, [&](auto at, const auto& there) {
      const auto grads = at.load(there.grad);
      const auto deltas = fetch(at, there.delta, there.delta_scale);
      auto g = to_floats(grads);
      const auto d = to_floats(deltas);
      DRIFT_UNROLL
      for (int j = 0; j < at.kCount; ++j) g.values[j] = biased(g.values[j], d.values[j], c);
      at.store(there.grad, rounded<Grad>(g, {}));
    });
  });
}

}  // namespace drift
