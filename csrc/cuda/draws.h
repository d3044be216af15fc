// Random bits of a thread's turn.
#pragma once

#include "launch.h"

namespace drift {

// Random bits of a turn, 16 per element that is rounded stochastically.
template <class T, int kCount>
using Draws = Words<kStochastic<T> ? kCount / 2 : 1>;

template <class Param, class State, int kCount>
struct TurnDraws {
  Draws<Param, kCount> param;
  Draws<State, kCount> exp_avg;
  Draws<State, kCount> exp_avg_sq;
};

// Calls draw(stream) for each tensor of a turn that is rounded stochastically.
template <class Param, class State, int kCount, class F>
DRIFT_HD TurnDraws<Param, State, kCount> draw_for(F draw) {
  TurnDraws<Param, State, kCount> draws{};
  if constexpr (kStochastic<Param>) draws.param = draw(Stream::kParam);
  if constexpr (kStochastic<State>) {
    draws.exp_avg = draw(Stream::kExpAvg);
    draws.exp_avg_sq = draw(Stream::kExpAvgSq);
  }
  return draws;
}

// The random bits of a chunk, which begins at element `begin` of its tensor. One call of the generator serves a group
// of eight: elements 8*k to 8*k + 7 of the whole tensor. (If the place does not keep eights, elements draw one by one.)
struct ChunkBits {
  RandomBits random;
  int64_t begin;
  int64_t first_eight;  // of the chunk, if it is contiguous in the whole tensor; else -1

  static DRIFT_HD ChunkBits of(const RandomBits& random, const Chunk& chunk) {
    const Place& place = *random.place;
    const int64_t first = place.whole_index(chunk.begin), last = place.whole_index(chunk.begin + chunk.size - 1);
    return {random, chunk.begin, last - first == chunk.size - 1 ? first / 8 : -1};
  }

  // The group of eight that holds the chunk's elements first .. first + 7.
  DRIFT_HD int64_t eight(int first) const {
    if (first_eight >= 0) return first_eight + static_cast<uint32_t>(first) / 8;
    return random.place->whole_index(begin + first) / 8;
  }
};

// The random bits of a turn, for the tensors that are rounded stochastically.
template <class Param, class State, class At>
DRIFT_HD TurnDraws<Param, State, At::kCount> draw(At at, const ChunkBits& bits) {
  if constexpr (!kStochastic<Param> && !kStochastic<State>) {
    return {};
  } else if constexpr (At::kIsWide) {
    static_assert(At::kCount == 8, "one call of the generator");
    const int64_t eight = bits.eight(at.first);
    return draw_for<Param, State, 8>([&](Stream stream) {
      const Philox x = bits.random.whole_eight(stream, eight);
      return Words<4>{{x.words[0], x.words[1], x.words[2], x.words[3]}};
    });
  } else {
    return draw_for<Param, State, At::kCount>([&](Stream stream) {
      Words<At::kCount / 2> queue{};
      DRIFT_KEEP_ROLLED
      for (int j = 0; j < At::kCount; ++j) {
        uint32_t next = bits.random.one(stream, bits.begin + at.index(j));
        DRIFT_UNROLL
        for (int w = At::kCount / 2 - 1; w >= 0; --w) {
          const uint32_t leaves = queue.words[w] & 0xffffu;
          queue.words[w] = queue.words[w] >> 16 | next << 16;
          next = leaves;
        }
      }
      return queue;
    });
  }
}

}  // namespace drift
