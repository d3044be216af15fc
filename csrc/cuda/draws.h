// Random bits for a thread's turn.
#pragma once

#include "access.h"

namespace drift {

// Random bits of a turn, 16 for each element of what is rounded with them.
template <class T, int kCount>
using Draws = Words<kStochastic<T> ? kCount / 2 : 1>;

template <class Param, class State, int kCount>
struct TurnDraws {
  Draws<Param, kCount> param;
  Draws<State, kCount> exp_avg;
  Draws<State, kCount> exp_avg_sq;
};

// draw(stream) for each tensor of a turn that is rounded at random.
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

// The random bits of a chunk, which begins at element `begin` of its tensor.
struct ChunkBits {
  RandomBits random;
  int64_t begin;
  // Where the chunk's eights are side by side in the whole tensor: the first. All have the same upper half.
  bool side_by_side;
  int64_t first_eight;

  static DRIFT_HD ChunkBits of(const RandomBits& random, int64_t begin, int size) {
    const Place& place = *random.place;
    const int64_t first = place.whole_index(begin), last = place.whole_index(begin + size - 1);
    const bool side_by_side = place.keeps_eights() && last - first == size - 1 && first >> 35 == last >> 35;
    return {random, begin, side_by_side, first >> 3};
  }

  // Of eight elements from `first` of the chunk on, which is a multiple of 8.
  DRIFT_HD Philox near_eight(Stream stream, int first) const {
    const auto low = static_cast<uint32_t>(first_eight) + static_cast<uint32_t>(first) / 8;
    return random.whole_eight(stream, first_eight >> 32 << 32 | low);
  }
  DRIFT_HD Philox far_eight(Stream stream, int first) const { return random.eight(stream, begin + first); }
};

// The random bits of a turn, for what is rounded with them.
template <class Param, class State, class At>
DRIFT_HD TurnDraws<Param, State, At::kCount> draw(At at, const ChunkBits& bits) {
  const auto words = [](const Philox& x) { return Words<4>{{x.words[0], x.words[1], x.words[2], x.words[3]}}; };
  if constexpr (!kStochastic<Param> && !kStochastic<State>) {
    return {};
  } else if constexpr (At::kIsSideBySide) {
    static_assert(At::kCount == 8, "one call of the generator");
    if (!bits.side_by_side) {
      return draw_for<Param, State, 8>([&](Stream stream) { return words(bits.far_eight(stream, at.first)); });
    }
    return draw_for<Param, State, 8>([&](Stream stream) { return words(bits.near_eight(stream, at.first)); });
  } else {
    return draw_for<Param, State, At::kCount>([&](Stream stream) {
      Words<At::kCount / 2> words{};
      DRIFT_UNROLL
      for (int j = 0; j < At::kCount; ++j) {
        words.words[j / 2] |= bits.random.one(stream, bits.begin + at.index(j)) << (16 * (j % 2));
      }
      return words;
    });
  }
}

}  // namespace drift
