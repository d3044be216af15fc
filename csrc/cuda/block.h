// The bodies of the kernels: what one block's threads do with one chunk, or with one tensor's partial sums.
//
// Compiled for the device by kernels.cu, and for the host by the tests, which run every thread of a grid and compare
// bit for bit.
#pragma once

#include "blocks.h"

namespace drift {

// Elements of a thread's turn, all requested before the first is used: what is in flight. The sums and the bias ask for
// 32 to 128 bytes at once.
constexpr int kSumTurn = 16;
constexpr int kBiasTurn = 16;

// In which a thread adds up its products in float32: ten of the chunk's at most in each, so that rounding stays within
// 10 * 2^-24 = 6e-7 (of sum(g*g); of norm(g)*norm(delta) for sum(g*delta)).
constexpr int kLanes = 8;

// As many as fit into the 32,764 bytes of a kernel's parameters (CUDA 12.1 and newer).
constexpr int64_t kMaxRows = 4080;

// What a kernel is given. Rows and coefficients are in device memory and stay there from step to step. The gradients'
// addresses may be new in any step, and so travel in the kernel's parameters: no copy, no buffer whose life to mind,
// and a captured graph keeps its own.
struct Launch {
  const Row* rows;
  const int32_t* chunk_rows;  // the row of each chunk
  const Coefficients* coefficients;
  Sums* partials;     // of each chunk
  Sums* totals;       // of each row
  uint32_t* arrived;  // of each row, how many of its chunks have their partial sums: 0 before a launch, and after it
  int64_t first_row;
  int64_t first_chunk;
  uint64_t grads[kMaxRows];  // from first_row on
};
static_assert(sizeof(Launch) <= 32764, "the limit on kernel parameters");

// The threads of a block up to a barrier: on the device each runs as itself, on the host all of them in turn.
template <class F>
DRIFT_HD void each_thread(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kThreads; ++thread) f(thread);
#endif
}

struct Chunk {
  int64_t index;
  int32_t row;
  int64_t begin;
  int size;
};

// The chunk of a block, which finds its row in a list rather than by searching.
DRIFT_HD Chunk find_chunk(const Launch& launch, int64_t block) {
  Chunk chunk;
  chunk.index = launch.first_chunk + block;
  chunk.row = launch.chunk_rows[chunk.index];
  const Row& row = launch.rows[chunk.row];
  chunk.begin = (chunk.index - row.first_chunk) * kChunk;
  const int64_t left = row.numel - chunk.begin;
  chunk.size = static_cast<int>(left < kChunk ? left : kChunk);
  return chunk;
}

DRIFT_HD void add(Sums& sums, const Sums& more) {
  sums.grad_grad += more.grad_grad;
  sums.grad_delta += more.grad_delta;
}

// The sum of the threads' `sums`, into the first, by a tree: the same order in every run.
DRIFT_HD void add_up(Sums* sums) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    each_thread([&](int thread) {
      if (thread < half) add(sums[thread], sums[thread + half]);
    });
  }
}

// What other blocks have written in this launch: past a multiprocessor's own cache.
DRIFT_HD Sums read_shared(const Sums* sums) {
#if defined(__CUDA_ARCH__)
  return {__ldcg(&sums->grad_grad), __ldcg(&sums->grad_delta)};
#else
  return *sums;
#endif
}

// Counts a chunk whose partial sums are written; whether it is the last of its row. The count goes back to 0 then.
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

// The end of a block that has the sums of its chunk in sums[0]: the last of a row adds up those of the row, in an order
// that does not depend on which it is. (The chunk is looked up again: what is kept over the turns costs registers.)
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
  each_thread([&](int) {});  // all have read what is overwritten next
  each_thread([&](int thread) {
    Sums own{0.0, 0.0};
    for (int64_t chunk = begin + thread; chunk < end; chunk += kThreads) {
      add(own, read_shared(launch.partials + chunk));
    }
    sums[thread] = own;
  });
  add_up(sums);
  each_thread([&](int thread) {
    if (thread == 0) launch.totals[row] = sums[0];
  });
}

// grad_stats: sum(g*g) and sum(g*delta) of the chunk of this block, a thread's lanes in float32 and
// all beyond them in float64. `sums` is shared by the block's threads.
template <class Grad, class Delta>
DRIFT_HD void sum_block(const Launch& launch, int64_t block, Sums* sums) {
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  const Chunk chunk = find_chunk(launch, block);
  const Grad* __restrict grad = pointer<const Grad>(launch.grads[chunk.row - launch.first_row]) + chunk.begin;
  const Row& row = launch.rows[chunk.row];
  const Delta* __restrict delta = pointer<const Delta>(row.delta) + chunk.begin;
  const float* delta_scale = pointer<const float>(row.delta_scale) + chunk.begin / kScaleBlock;
  const Span span = cut<kSumTurn, kCoded<Delta> ? 1 : kPeriod>(chunk.size, grad, delta);
  each_thread([&](int thread) {
    float grad_grad[kLanes] = {};
    float grad_delta[kLanes] = {};
    for_each_turn<kSumTurn>(span, thread, [&](auto at) {
      const auto grads = at.load(grad);
      const auto deltas = fetch(at, delta, delta_scale);
      const auto g = to_floats(grads);
      DRIFT_UNROLL
      for (int j = 0; j < at.kCount; ++j) {
        const float x = g.values[j];
        grad_grad[j % kLanes] += x * x;
        if constexpr (kHasDelta) grad_delta[j % kLanes] += x * to_floats(deltas).values[j];
      }
    });
    Sums own{0.0, 0.0};
    DRIFT_UNROLL
    for (int j = 0; j < kLanes; ++j) add(own, {grad_grad[j], grad_delta[j]});
    sums[thread] = own;
  });
  add_up(sums);
  finish_sums(launch, block, sums);
}

// bias: reference.bias_ on the chunk of this block.
template <class Grad, class Delta>
DRIFT_HD void bias_block(const Launch& launch, int64_t block) {
  const Chunk chunk = find_chunk(launch, block);
  const Row& row = launch.rows[chunk.row];
  const Coefficients& c = launch.coefficients[chunk.row];
  Grad* __restrict grad = pointer<Grad>(launch.grads[chunk.row - launch.first_row]) + chunk.begin;
  const Delta* __restrict delta = pointer<const Delta>(row.delta) + chunk.begin;
  const float* delta_scale = pointer<const float>(row.delta_scale) + chunk.begin / kScaleBlock;
  const Span span = cut<kBiasTurn, kCoded<Delta> ? 1 : kPeriod>(chunk.size, grad, delta);
  each_thread([&](int thread) {
    for_each_turn<kBiasTurn>(span, thread, [&](auto at) {
      const auto grads = at.load(grad);
      const auto deltas = fetch(at, delta, delta_scale);
      auto g = to_floats(grads);
      const auto d = to_floats(deltas);
      DRIFT_UNROLL
      for (int j = 0; j < at.kCount; ++j) g.values[j] = biased(g.values[j], d.values[j], c);
      at.store(grad, rounded<Grad>(g, {}));
    });
  });
}

}  // namespace drift
