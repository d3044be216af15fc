// The grad_stats kernel: one block processes one chunk; the last block of a tensor also adds up the tensor's sums.
#pragma once

#include "blocks.h"

namespace drift {

template <class Grad, class Delta, int kCount>
struct GradAndDeltaTurn {
  Values<Grad, kCount> grad;
  Fetched<Delta, kCount> delta;
};

// Elements per turn of a thread, at most 64 bytes. Each turn is loaded before the previous one is added up.
template <class Grad, class Delta>
constexpr int kSumTurn = [] {
  constexpr int kBytes = sizeof(Grad) + (std::is_same_v<Delta, Nothing> ? 0 : sizeof(Delta));
  return 32 * kBytes <= 64 ? 32 : 16 * kBytes <= 64 ? 16 : 8;
}();

// Float32 accumulators per thread. Each adds 8 or 16 of the chunk's products, and one from outside the wide turns, so
// the rounding error stays within 9 or 17 * 2^-24 (of sum(g*g); of norm(g)*norm(delta) for sum(g*delta)). With codes
// there are fewer: decoding needs the registers.
template <class Delta>
constexpr int kLanes = kCoded<Delta> ? 4 : 8;

DRIFT_HD void add(Sums& sums, const Sums& more) {
  sums.grad_grad += more.grad_grad;
  sums.grad_delta += more.grad_delta;
}

constexpr int kWarp = 32;

// Adds up own(thread) over the block's threads into sums[0], always in the same order: a tree within each warp, then
// warp by warp. `sums` has room for one entry per warp, and any thread may overwrite it afterwards.
template <class Own>
DRIFT_HD void add_up(Own own, Sums* sums) {
#if defined(__CUDA_ARCH__)
  const int thread = static_cast<int>(threadIdx.x);
  Sums x = own(thread);
  DRIFT_UNROLL
  for (int other = kWarp / 2; other > 0; other /= 2) {
    add(x, {__shfl_xor_sync(0xffffffffu, x.grad_grad, other), __shfl_xor_sync(0xffffffffu, x.grad_delta, other)});
  }
  if (thread % kWarp == 0) sums[thread / kWarp] = x;
  __syncthreads();
#else
  for (int begin = 0; begin < kThreads; begin += kWarp) {
    Sums x[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) x[lane] = own(begin + lane);
    for (int half = kWarp / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) add(x[lane], x[lane + half]);
    }
    sums[begin / kWarp] = x[0];
  }
#endif
  each_thread([&](int thread) {
    if (thread != 0) return;
    for (int warp = 1; warp < kThreads / kWarp; ++warp) add(sums[0], sums[warp]);
  });
}

// Reads what other blocks wrote in this launch, bypassing the multiprocessor's L1 cache.
DRIFT_HD Sums read_shared(const Sums* sums) {
#if defined(__CUDA_ARCH__)
  return {__ldcg(&sums->grad_grad), __ldcg(&sums->grad_delta)};
#else
  return *sums;
#endif
}

// Counts a chunk whose partial sums are written. Returns whether it is the last of its row, and then resets the count.
DRIFT_HD bool arrives_last(uint32_t* arrived, uint32_t chunks) {
#if defined(__CUDA_ARCH__)
  __threadfence();
  const bool last = atomicInc(arrived, chunks - 1) == chunks - 1;
  __threadfence();
  return last;
#else
  *arrived = *arrived + 1 == chunks ? 0 : *arrived + 1;
  return *arrived == 0;
#endif
}

// Stores the sums of a block's chunk, in sums[0]. The last block of a row adds up the row's sums, in an order that does
// not depend on which block it is. (The chunk is looked up again: keeping it across the turns costs registers.)
DRIFT_HD void finish_sums(const Launch& launch, int64_t block, Sums* sums) {
  each_thread([&](int thread) {
    if (thread != 0) return;
    const int64_t index = launch.first_chunk + block;
    const int32_t row = launch.chunk_rows[index];
    launch.partials[index] = sums[0];
    const auto chunks = static_cast<uint32_t>(chunk_count(launch.rows[row].numel));
    sums[0].grad_grad = arrives_last(launch.arrived + row, chunks) ? 1.0 : 0.0;
  });
  if (sums[0].grad_grad == 0.0) return;
  const int32_t row = launch.chunk_rows[launch.first_chunk + block];
  const int64_t begin = launch.rows[row].first_chunk;
  const int64_t end = begin + chunk_count(launch.rows[row].numel);
  each_thread([&](int) {});  // barrier: all threads have read sums[0] before it is overwritten
  const auto own = [&](int thread) {
    Sums own{0.0, 0.0};
    DRIFT_KEEP_ROLLED
    for (int64_t chunk = begin + thread; chunk < end; chunk += kThreads) {
      add(own, read_shared(launch.partials + chunk));
    }
    return own;
  };
  add_up(own, sums);
  each_thread([&](int thread) {
    if (thread == 0) launch.totals[row] = sums[0];
  });
}

// grad_stats: sum(g*g) and sum(g*delta) of this block's chunk, in float32 within a thread's lanes and in float64 from
// there on. `sums` is shared by the block's threads.
template <class Grad, class Delta>
DRIFT_HD void sum_block(const Launch& launch, int64_t block, Sums* sums) {
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  const Chunk chunk = find_chunk(launch, block);
  const auto tensors = GradAndDelta<const Grad, Delta>::of(launch.rows[chunk.row],
                                                           launch.grads[chunk.row - launch.first_row], chunk.begin);
  constexpr int kTurn = kSumTurn<Grad, Delta>;
  const Span span = cut<kTurn, kCoded<Delta> ? 1 : kPeriod>(chunk.size, tensors.grad, tensors.delta);
  const auto own = [&](int thread) {
    float grad_grad[kLanes<Delta>] = {};
    float grad_delta[kLanes<Delta>] = {};
    const auto add_turn = [&](const auto& grads, const auto& deltas) {
      const auto g = to_floats(grads);
      DRIFT_UNROLL
      for (int j = 0; j < g.kCount; ++j) {
        const float x = g.values[j];
        grad_grad[j % kLanes<Delta>] = fused(x, x, grad_grad[j % kLanes<Delta>]);
        if constexpr (kHasDelta)
          grad_delta[j % kLanes<Delta>] = fused(x, to_floats(deltas).values[j], grad_delta[j % kLanes<Delta>]);
      }
    };
    for_each_turn_ahead<kTurn, 8>(
        span, thread, tensors,
        [](auto at, const auto& there) {
          return GradAndDeltaTurn<Grad, Delta, decltype(at)::kCount>{at.load(there.grad),
                                                                     fetch(at, there.delta, there.delta_scale)};
        },
        [&](const auto& turn) { add_turn(turn.grad, turn.delta); });
    Sums own{0.0, 0.0};
    DRIFT_UNROLL
    for (int j = 0; j < kLanes<Delta>; ++j) add(own, {grad_grad[j], grad_delta[j]});
    return own;
  };
  add_up(own, sums);
  finish_sums(launch, block, sums);
}

}  // namespace drift
