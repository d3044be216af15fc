// The update kernel: one block processes one chunk. Bitwise identical to reference.drift_adamw_.
#pragma once

#include "blocks.h"

namespace drift {

// Elements per turn of a thread, all loaded before the first is used: 40 to 160 bytes in flight.
constexpr int kUpdateTurn = 8;

// Elements per turn outside the wide accesses: as many as the registers allow.
template <class Param, class State>
constexpr int kSideTurn = kStochastic<Param> || kStochastic<State> || std::is_same_v<Param, master_bfloat16> ? 2 : 4;

// A turn as loaded.
template <class Param, class Grad, class State, class Delta, int kCount>
struct Loaded {
  Values<Param, kCount> param;
  Values<Residual<Param>, kCount> residual;
  Values<Grad, kCount> grad;
  Fetched<ExpAvg<State>, kCount> exp_avg;
  Fetched<ExpAvgSq<State>, kCount> exp_avg_sq;
  Fetched<Delta, kCount> delta;

  DRIFT_HD Values<float, kCount> params() const {
    if constexpr (std::is_same_v<Param, master_bfloat16>) {
      return joined(param, residual);
    } else {
      return to_floats(param);
    }
  }
};

template <class At, class Param, class Grad, class State, class Delta>
DRIFT_HD Loaded<Param, Grad, State, Delta, At::kCount> load(At at, const Stored<Param, Grad, State, Delta>& stored) {
  return {at.load(stored.param),
          at.load(stored.residual),
          at.load(stored.grad),
          fetch(at, stored.exp_avg, stored.exp_avg_scale),
          fetch(at, stored.exp_avg_sq, stored.exp_avg_sq_scale),
          fetch(at, stored.delta, stored.delta_scale)};
}

// What is computed from it before the division: the new moments, and the parameter without its last term.
template <int kCount>
struct Moments {
  Values<float, kCount> exp_avg;
  Values<float, kCount> exp_avg_sq;
  Values<float, kCount> param;
};

template <class Param, class Grad, class State, class Delta, int kCount>
DRIFT_HD Moments<kCount> moments_of(const Loaded<Param, Grad, State, Delta, kCount>& loaded, const Coefficients& c) {
  const auto g = to_floats(loaded.grad);
  Moments<kCount> x{to_floats(loaded.exp_avg), to_floats(loaded.exp_avg_sq), loaded.params()};
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) {
    if constexpr (std::is_same_v<State, int8_state>) x.exp_avg_sq.values[j] *= x.exp_avg_sq.values[j];  // from its root
    if constexpr (std::is_same_v<Delta, Nothing>) {
      update_moments(x.exp_avg.values[j], x.exp_avg_sq.values[j], scaled(g.values[j], c), c);
      x.param.values[j] = decayed(x.param.values[j], c);
    } else {
      const float d = to_floats(loaded.delta).values[j];
      update_moments(x.exp_avg.values[j], x.exp_avg_sq.values[j], scaled(g.values[j], d, c), c);
      x.param.values[j] = decayed(x.param.values[j], d, c);
    }
  }
  return x;
}

// kNumbers: no result is NaN.
template <bool kNumbers, class At, class Param>
DRIFT_HD void store_param(At at, const Values<float, At::kCount>& x, const Draws<Param, At::kCount>& draws,
                          Param* param, [[maybe_unused]] Residual<Param>* residual) {
  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    Values<master_bfloat16, At::kCount> nearest;
    Values<int16_t, At::kCount> rest;
    split<kNumbers>(x, nearest, rest);
    at.store(param, nearest);
    at.store(residual, rest);
  } else {
    at.store(param, rounded<Param, kNumbers>(x, draws));
  }
}

// The states of a turn before they are encoded: their scales depend on other threads too.
template <int kCount>
struct Uncoded {
  Values<float, kCount> exp_avg;
  Values<float, kCount> root;  // of exp_avg_sq
};

// Loads, updates and stores a turn. Does not store states that are codes, but returns them.
template <class At, class Param, class Grad, class State, class Delta>
DRIFT_HD Uncoded<At::kCount> update_turn(At at, const Stored<Param, Grad, State, Delta>& stored, const Coefficients& c,
                                         const ChunkBits& bits) {
  constexpr int kCount = At::kCount;
  constexpr bool kIsInt8 = std::is_same_v<State, int8_state>;
  using Rounded = std::conditional_t<kIsInt8, float, State>;
  const auto [m, v, before] = moments_of(load(at, stored), c);
  const auto draws = draw<Param, Rounded>(at, bits);
  const auto store_states = [&](const auto& exp_avg, const auto& exp_avg_sq) {
    if constexpr (!kIsInt8) {
      at.store(stored.exp_avg, exp_avg);
      at.store(stored.exp_avg_sq, exp_avg_sq);
    }
  };
  const auto exp_avg = rounded<Rounded, At::kIsWide>(m, draws.exp_avg);
  const auto exp_avg_sq = rounded<Rounded, At::kIsWide>(v, draws.exp_avg_sq);

  Values<float, kCount> root, param;
  if (At::kIsWide && (usual(before, exp_avg, exp_avg_sq) || admissible(before, m, v, c.eps))) {
    store_states(exp_avg, exp_avg_sq);
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      root.values[j] = quick_root(v.values[j]);
      param.values[j] = stepped(before.values[j], quick_quotient(m.values[j], denominator(root.values[j], c)), c);
    }
    store_param<true>(at, param, draws.param, stored.param, stored.residual);
  } else {
    store_states(rounded<Rounded>(m, draws.exp_avg), rounded<Rounded>(v, draws.exp_avg_sq));
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      root.values[j] = sqrtf(v.values[j]);
      param.values[j] = stepped(before.values[j], m.values[j] / denominator(root.values[j], c), c);
    }
    store_param<false>(at, param, draws.param, stored.param, stored.residual);
  }
  return {m, root};
}

// The bits of the largest magnitudes of both states.
struct Largest {
  uint32_t exp_avg;
  uint32_t root;
};

DRIFT_HD Largest larger(Largest a, Largest b) {
  return {a.exp_avg > b.exp_avg ? a.exp_avg : b.exp_avg, a.root > b.root ? a.root : b.root};
}

// first(thread, held) returns a thread's Largest; second(thread, held, largest) receives the largest over the
// kScaleThreads threads that share a scale. On the device the threads of a warp run together; on the host, one after
// another.
constexpr int kScaleThreads = kScaleBlock / kUpdateTurn;

template <class Held, class First, class Second>
DRIFT_HD void with_largest(First first, Second second) {
#if defined(__CUDA_ARCH__)
  const int thread = static_cast<int>(threadIdx.x);
  Held held;
  Largest largest = first(thread, held);
  DRIFT_UNROLL
  for (int other = 1; other < kScaleThreads; other *= 2) {
    largest = larger(largest, {__shfl_xor_sync(0xffffffffu, largest.exp_avg, other),
                               __shfl_xor_sync(0xffffffffu, largest.root, other)});
  }
  __syncwarp();  // all have read the scales before they are overwritten: shuffles do not order memory accesses
  second(thread, held, largest);
#else
  for (int begin = 0; begin < kThreads; begin += kScaleThreads) {
    Held held[kScaleThreads];
    Largest largest{};
    for (int i = 0; i < kScaleThreads; ++i) largest = larger(largest, first(begin + i, held[i]));
    for (int i = 0; i < kScaleThreads; ++i) second(begin + i, held[i], largest);
  }
#endif
}

// Stores the codes of a turn; the first thread of a scale block stores the scale.
template <class T, class At>
DRIFT_HD void store_codes(At at, T* tensor, float* scale, const Values<float, At::kCount>& x, uint32_t largest) {
  const float shared = quick_scale<T>(largest);
  at.store(tensor, encoded<T>(x, quick_inverse(shared)));
  if (at.first % kScaleBlock == 0) at.store_scale(scale, shared);
}

// Updates one contiguous turn per thread, with states that are codes: the turn at(thread) of tensors(thread).
template <class At, class Tensors>
DRIFT_HD void update_codes(At at, Tensors tensors, const Coefficients& c, const ChunkBits& bits) {
  using Turn = Uncoded<kUpdateTurn>;
  with_largest<Turn>(
      [&](int thread, Turn& turn) -> Largest {
        turn = update_turn(at(thread), tensors(thread), c, bits);
        return {largest_bits(turn.exp_avg), largest_bits(turn.root)};
      },
      [&](int thread, const Turn& turn, Largest largest) {
        const auto there = tensors(thread);
        store_codes(at(thread), there.exp_avg, there.exp_avg_scale, turn.exp_avg, largest.exp_avg);
        store_codes(at(thread), there.exp_avg_sq, there.exp_avg_sq_scale, turn.root, largest.root);
      });
}

// Updates a whole chunk in tiles of one turn per thread; the last tile may be partial.
template <class Tensors>
DRIFT_HD void update_tiles(const Tensors& stored, const Span& span, const Coefficients& c, const ChunkBits& bits) {
  constexpr int kTile = kThreads * kUpdateTurn;
  // On the device a thread keeps its place in the tile.
  Tensors tile = stored.moved(kIsDevice ? own_thread() * kUpdateTurn : 0);
  const auto tensors = [&](int thread) { return kIsDevice ? tile : tile.moved(thread * kUpdateTurn); };
  int start = 0;
  DRIFT_KEEP_ROLLED
  for (; start + kTile <= span.tail; start += kTile) {
    update_codes([&](int thread) { return Wide<kUpdateTurn>{start + thread * kUpdateTurn}; }, tensors, c, bits);
    tile = tile.moved(kTile);
  }
  DRIFT_KEEP_ROLLED
  for (; start < span.size; start += kTile) {
    update_codes([&](int thread) { return Narrow<kUpdateTurn>{start + thread * kUpdateTurn, span.size}; }, tensors, c,
                 bits);
    tile = tile.moved(kTile);
  }
}

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_block(const Launch& launch, int64_t block) {
  constexpr bool kIsInt8 = std::is_same_v<State, int8_state>;
  // Random bits and scales need turns that begin at a multiple of their size.
  constexpr int kHeads = kStochastic<Param> || kStochastic<State> || kIsInt8 || kCoded<Delta> ? 1 : kPeriod;
  const Chunk chunk = find_chunk(launch, block);
  const Row& row = launch.rows[chunk.row];
  const Coefficients c = launch.coefficients[chunk.row];
  if (c.step == 0) return;
  ChunkBits bits{};
  if constexpr (kStochastic<Param> || kStochastic<State>) {
    bits = ChunkBits::of(random_bits(row, c), chunk);
  }
  const auto stored =
      Stored<Param, Grad, State, Delta>::of(row, launch.grads[chunk.row - launch.first_row], chunk.begin);
  const bool may_be_wide = allows_quick(c) && (!(kStochastic<Param> || kStochastic<State>) || row.place.keeps_eights());
  const Span span = may_be_wide ? cut<kUpdateTurn, kHeads>(chunk.size, stored.param, stored.residual, stored.grad,
                                                           stored.exp_avg, stored.exp_avg_sq, stored.delta)
                                : Span{0, 0, chunk.size};
  if constexpr (kIsInt8) {
    update_tiles(stored, span, c, bits);
  } else {
    each_thread([&](int thread) {
      for_each_turn<kUpdateTurn, kSideTurn<Param, State>>(
          span, thread, stored, [&](auto at, const auto& there) { update_turn(at, there, c, bits); });
    });
  }
}

}  // namespace drift
