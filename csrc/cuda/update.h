// The kernel of the update: what one block's threads do with one chunk. reference.drift_adamw_, bit for bit.
#pragma once

#include "blocks.h"

namespace drift {

// Elements of a thread's turn, all requested before the first is used: 40 to 160 bytes in flight.
constexpr int kUpdateTurn = 8;

// What is computed of a turn before it divides: the new moments, and the parameter but for its last term.
template <int kCount>
struct Moments {
  Values<float, kCount> exp_avg;
  Values<float, kCount> exp_avg_sq;
  Values<float, kCount> param;
};

template <class At, class Param, class Grad, class State, class Delta>
DRIFT_HD Moments<At::kCount> load_and_update_moments(At at, const Stored<Param, Grad, State, Delta>& stored,
                                                     const Coefficients& c) {
  const auto param = at.load(stored.param);
  [[maybe_unused]] const auto residual = at.load(stored.residual);
  const auto grad = at.load(stored.grad);
  const auto exp_avg = fetch(at, stored.exp_avg, stored.exp_avg_scale);
  const auto exp_avg_sq = fetch(at, stored.exp_avg_sq, stored.exp_avg_sq_scale);
  const auto delta = fetch(at, stored.delta, stored.delta_scale);

  const auto g = to_floats(grad);
  Moments<At::kCount> x{to_floats(exp_avg), to_floats(exp_avg_sq), {}};
  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    x.param = joined(param, residual);
  } else {
    x.param = to_floats(param);
  }
  DRIFT_UNROLL
  for (int j = 0; j < At::kCount; ++j) {
    if constexpr (std::is_same_v<State, int8_state>) x.exp_avg_sq.values[j] *= x.exp_avg_sq.values[j];  // from its root
    if constexpr (std::is_same_v<Delta, Nothing>) {
      update_moments(x.exp_avg.values[j], x.exp_avg_sq.values[j], scaled(g.values[j], c), c);
      x.param.values[j] = decayed(x.param.values[j], c);
    } else {
      const float d = to_floats(delta).values[j];
      update_moments(x.exp_avg.values[j], x.exp_avg_sq.values[j], scaled(g.values[j], d, c), c);
      x.param.values[j] = decayed(x.param.values[j], d, c);
    }
  }
  return x;
}

// The states of a turn where they are codes, whose scales follow from those of other threads too.
template <int kCount>
struct Uncoded {
  Values<float, kCount> exp_avg;
  Values<float, kCount> root;  // of exp_avg_sq
};

// Loads, updates and stores a turn, but for states that are codes, which are returned.
template <class At, class Param, class Grad, class State, class Delta>
DRIFT_HD Uncoded<At::kCount> update_turn(At at, const Stored<Param, Grad, State, Delta>& stored, const Coefficients& c,
                                         const ChunkBits& bits) {
  constexpr int kCount = At::kCount;
  constexpr bool kIsInt8 = std::is_same_v<State, int8_state>;
  using Rounded = std::conditional_t<kIsInt8, float, State>;
  auto [m, v, param] = load_and_update_moments(at, stored, c);
  const auto draws = draw<Param, Rounded>(at, bits);
  const auto store_states = [&](const auto& exp_avg, const auto& exp_avg_sq) {
    if constexpr (!kIsInt8) {
      at.store(stored.exp_avg, exp_avg);
      at.store(stored.exp_avg_sq, exp_avg_sq);
    }
  };
  const auto exp_avg = rounded<Rounded, At::kIsWide>(m, draws.exp_avg);
  const auto exp_avg_sq = rounded<Rounded, At::kIsWide>(v, draws.exp_avg_sq);

  Values<float, kCount> root, quotient;
  if (At::kIsWide && (usual(exp_avg, exp_avg_sq) || admissible(m, v, c.eps))) {
    store_states(exp_avg, exp_avg_sq);
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      root.values[j] = quick_root(v.values[j]);
      quotient.values[j] = quick_quotient(m.values[j], denominator(root.values[j], c));
    }
  } else {
    store_states(rounded<Rounded>(m, draws.exp_avg), rounded<Rounded>(v, draws.exp_avg_sq));
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      root.values[j] = sqrtf(v.values[j]);
      quotient.values[j] = m.values[j] / denominator(root.values[j], c);
    }
  }
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) param.values[j] = stepped(param.values[j], quotient.values[j], c);

  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    Values<master_bfloat16, kCount> nearest;
    Values<int16_t, kCount> residual;
    split(param, nearest, residual);
    at.store(stored.param, nearest);
    at.store(stored.residual, residual);
  } else {
    at.store(stored.param, rounded<Param>(param, draws.param));
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

// first(thread, held) gives a thread's Largest; second(thread, held, largest) is given that of the kScaleThreads threads
// which share a scale. On the device each thread runs as itself, all of a warp together; on the host one after the
// other.
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
  __syncwarp();  // all have read the scales that are written next: shuffles order no accesses
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

// Codes of a turn, and their scale, which the first thread stores.
template <class T, class At>
DRIFT_HD void store_codes(At at, T* tensor, float* scales, const Values<float, At::kCount>& x, float scale,
                          float inverse) {
  at.store(tensor, encoded<T>(x, inverse));
  if (at.first % kScaleBlock == 0) write(scales + at.first / kScaleBlock, scale);
}

// Where states are codes: a turn for each thread, side by side.
template <class Param, class Grad, class Delta>
DRIFT_HD void update_codes(const Stored<Param, Grad, int8_state, Delta>& stored, const Span& span, const Coefficients& c,
                           const ChunkBits& bits) {
  using Turn = Uncoded<kUpdateTurn>;
  const auto at_turn = [&](int first, auto work) {
    if (first + kUpdateTurn <= span.tail) {
      work(Wide<kUpdateTurn>{{first}});
    } else if (first < span.size) {
      work(Narrow<kUpdateTurn>{{first}, span.size});
    }
  };
  DRIFT_KEEP_ROLLED
  for (int start = 0; start < span.size; start += kThreads * kUpdateTurn) {
    with_largest<Turn>(
        [&](int thread, Turn& turn) -> Largest {
          turn = {};
          at_turn(start + thread * kUpdateTurn, [&](auto at) { turn = update_turn(at, stored, c, bits); });
          return {largest_bits(turn.exp_avg), largest_bits(turn.root)};
        },
        [&](int thread, const Turn& turn, Largest largest) {
          const float exp_avg_scale = quick_scale<moment_code>(largest.exp_avg);
          const float exp_avg_sq_scale = quick_scale<variance_code>(largest.root);
          const float exp_avg_inverse = quick_inverse(exp_avg_scale);
          const float exp_avg_sq_inverse = quick_inverse(exp_avg_sq_scale);
          at_turn(start + thread * kUpdateTurn, [&](auto at) {
            store_codes(at, stored.exp_avg, stored.exp_avg_scale, turn.exp_avg, exp_avg_scale, exp_avg_inverse);
            store_codes(at, stored.exp_avg_sq, stored.exp_avg_sq_scale, turn.root, exp_avg_sq_scale,
                        exp_avg_sq_inverse);
          });
        });
  }
}

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_block(const Launch& launch, int64_t block) {
  constexpr bool kIsInt8 = std::is_same_v<State, int8_state>;
  // Random bits and scales are those of whole turns that begin at a multiple of their size.
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
    update_codes(stored, span, c, bits);
  } else {
    each_thread([&](int thread) {
      for_each_turn<kUpdateTurn>(span, thread, [&](auto at) { update_turn(at, stored, c, bits); });
    });
  }
}

}  // namespace drift
