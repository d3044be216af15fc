// The bodies of the kernels: what one block's threads do with one chunk, or with one tensor's partial sums.
//
// Compiled for the device by kernels.cu, and for the host by the tests, which run every thread of a grid and compare
// bit for bit.
#pragma once

#include "access.h"

namespace drift {

// Elements of a thread's turn, all requested before the first is used: what is in flight. An update asks for 40 to 160
// bytes at once, the sums and the bias for 32 to 128.
constexpr int kUpdateTurn = 8;
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

template <class State, int kCount>
struct States {
  Values<Decoded<ExpAvg<State>>, kCount> exp_avg;
  Values<Decoded<ExpAvgSq<State>>, kCount> exp_avg_sq;
};

// Load, update and store a turn, but for the states, which are returned.
template <class At, class Param, class Grad, class State, class Delta>
DRIFT_HD States<State, At::kCount> update_turn(At at, const Stored<Param, Grad, State, Delta>& stored,
                                               const Coefficients& c, const RandomBits& random, int64_t begin) {
  auto param = at.load(stored.param);
  auto residual = at.load(stored.residual);
  const auto grad = at.load(stored.grad);
  States<State, At::kCount> states{load_decoded(at, stored.exp_avg, stored.exp_avg_scale),
                                   load_decoded(at, stored.exp_avg_sq, stored.exp_avg_sq_scale)};
  const auto delta = load_decoded(at, stored.delta, stored.delta_scale);
  const auto for_param = at.template draw<Param>(random, Stream::kParam, begin);
  const auto for_exp_avg = at.template draw<State>(random, Stream::kExpAvg, begin);
  const auto for_exp_avg_sq = at.template draw<State>(random, Stream::kExpAvgSq, begin);

  const Tensors<Param, Grad, Decoded<ExpAvg<State>>, Decoded<ExpAvgSq<State>>, Decoded<Delta>> turn{
      param.values, residual.values, grad.values, states.exp_avg.values, states.exp_avg_sq.values, delta.values};
  DRIFT_UNROLL
  for (int j = 0; j < At::kCount; ++j) {
    Element e = turn.load(j);
    e = turn.update(e, j, c);
    turn.store(j, e, {for_param[j], for_exp_avg[j], for_exp_avg_sq[j]});
  }
  at.store(stored.param, param);
  at.store(stored.residual, residual);
  return states;
}

// What threads share where states are codes, whose scales follow from 128 elements: a turn's states of each thread, and
// the bits of the largest magnitudes among them.
template <class State>
struct Tile {};

template <>
struct Tile<int8_state> {
  States<int8_state, kUpdateTurn> states[kThreads];
  uint32_t exp_avg[kThreads];
  uint32_t exp_avg_sq[kThreads];
};

DRIFT_HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <class T, int kCount>
DRIFT_HD uint32_t largest(const Values<T, kCount>& turn) {
  uint32_t bits = 0;
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) bits = larger(bits, magnitude_bits(turn.values[j]));
  return bits;
}

// A thread's codes, under the scale of the threads of its block of 128 elements, the first of which stores it.
template <class T, class At>
DRIFT_HD void store_codes(At at, T* tensor, float* scale, const Values<Decoded<T>, At::kCount>& values,
                          const uint32_t* largest_of, int thread) {
  constexpr int kGroup = kScaleBlock / At::kCount;
  const int begin = thread / kGroup * kGroup;
  uint32_t bits = 0;
  for (int member = begin; member < begin + kGroup; ++member) bits = larger(bits, largest_of[member]);
  const float shared = scale_of<T>(bits);
  const float inverse = inverse_of(shared);
  Values<T, At::kCount> codes;
  DRIFT_UNROLL
  for (int j = 0; j < At::kCount; ++j) codes.values[j] = narrow<T>(code_of(values.values[j], inverse));
  at.store(tensor, codes);
  if (thread == begin) write(scale + at.first / kScaleBlock, shared);
}

// Where states are codes: tiles of a turn for each thread, side by side.
template <class Param, class Grad, class Delta>
DRIFT_HD void update_tiles(const Stored<Param, Grad, int8_state, Delta>& stored, const Span& span,
                           const Coefficients& c, const RandomBits& random, int64_t begin, Tile<int8_state>* tile) {
  const auto at_turn = [&](int first, auto work) {
    if (first + kUpdateTurn <= span.tail) {
      work(Wide<kUpdateTurn>{{first}});
    } else if (first < span.size) {
      work(Narrow<kUpdateTurn>{{first}, span.size});
    }
  };
  DRIFT_KEEP_ROLLED
  for (int start = 0; start < span.size; start += kThreads * kUpdateTurn) {
    each_thread([&](int thread) {
      auto& states = tile->states[thread];
      states = {};
      at_turn(start + thread * kUpdateTurn, [&](auto at) { states = update_turn(at, stored, c, random, begin); });
      tile->exp_avg[thread] = largest(states.exp_avg);
      tile->exp_avg_sq[thread] = largest(states.exp_avg_sq);
    });
    each_thread([&](int thread) {
      const auto& states = tile->states[thread];
      at_turn(start + thread * kUpdateTurn, [&](auto at) {
        store_codes(at, stored.exp_avg, stored.exp_avg_scale, states.exp_avg, tile->exp_avg, thread);
        store_codes(at, stored.exp_avg_sq, stored.exp_avg_sq_scale, states.exp_avg_sq, tile->exp_avg_sq, thread);
      });
    });
  }
}

// update: reference.drift_adamw_ on the chunk of this block. `tile` is shared by the block's threads.
template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_block(const Launch& launch, int64_t block, [[maybe_unused]] Tile<State>* tile) {
  constexpr bool kIsInt8 = std::is_same_v<State, int8_state>;
  // Random bits and scales are those of whole turns that begin at a multiple of their size.
  constexpr int kHeads = kStochastic<Param> || kStochastic<State> || kIsInt8 || kCoded<Delta> ? 1 : kPeriod;
  const Chunk chunk = find_chunk(launch, block);
  const Row& row = launch.rows[chunk.row];
  const Coefficients c = launch.coefficients[chunk.row];
  if (c.step == 0) return;
  const RandomBits random = random_bits(row, c);
  const auto stored =
      Stored<Param, Grad, State, Delta>::of(row, launch.grads[chunk.row - launch.first_row], chunk.begin);
  const Span span = cut<kUpdateTurn, kHeads>(chunk.size, stored.param, stored.residual, stored.grad, stored.exp_avg,
                                             stored.exp_avg_sq, stored.delta);
  if constexpr (kIsInt8) {
    update_tiles(stored, span, c, random, chunk.begin, tile);
  } else {
    each_thread([&](int thread) {
      for_each_turn<kUpdateTurn>(span, thread, [&](auto at) {
        const auto states = update_turn(at, stored, c, random, chunk.begin);
        at.store(stored.exp_avg, states.exp_avg);
        at.store(stored.exp_avg_sq, states.exp_avg_sq);
      });
    });
  }
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
      const auto g = at.load(grad);
      const auto d = load_decoded(at, delta, delta_scale);
      DRIFT_UNROLL
      for (int j = 0; j < at.kCount; ++j) {
        const float x = to_float(g.values[j]);
        grad_grad[j % kLanes] += x * x;
        if constexpr (kHasDelta) grad_delta[j % kLanes] += x * to_float(d.values[j]);
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
      auto g = at.load(grad);
      const auto d = load_decoded(at, delta, delta_scale);
      DRIFT_UNROLL
      for (int j = 0; j < at.kCount; ++j) {
        g.values[j] = round_to<Grad>(biased(to_float(g.values[j]), to_float(d.values[j]), c));
      }
      at.store(grad, g);
    });
  });
}

}  // namespace drift
