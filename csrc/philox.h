// Random bits for stochastic rounding: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011). A counter-based generator: the bits of an element follow from the seed, the step, the tensor and the element's
// index in it, whatever the backend, the chunk or the thread.
#pragma once

#include "table.h"

namespace drift {

struct Philox {
  uint32_t words[4];
};

constexpr int kPhiloxRounds = 7;

// One of the rounds on the words of a counter.
DRIFT_HD void philox_round(int round, uint64_t key, uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3) {
  const uint32_t key0 = static_cast<uint32_t>(key) + static_cast<uint32_t>(round) * 0x9E3779B9u;
  const uint32_t key1 = static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
  const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * x0;
  const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * x2;
  x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
  x1 = static_cast<uint32_t>(b);
  x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
  x3 = static_cast<uint32_t>(a);
}

// What is rounded: each has bits of its own.
enum class Stream : uint32_t { kParam = 0, kExpAvg = 1, kExpAvgSq = 2 };

// The bits of one tensor in one step. `key` is seed + 2^32 * tensor.
struct RandomBits {
  uint64_t key;
  uint32_t step;
  const Place* place;  // not a copy, which would take six registers

  // The counter of the elements 8*block .. 8*block + 7 of the whole tensor.
  DRIFT_HD Philox counter(Stream stream, int64_t block) const {
    const uint32_t high = static_cast<uint32_t>(block >> 32) | static_cast<uint32_t>(stream) << 30;
    return {{static_cast<uint32_t>(block), high, step, 0}};
  }

  // Their bits: element 8*block + j has the low (j even) or high half of word j/2.
  DRIFT_HD Philox whole_eight(Stream stream, int64_t block) const {
    Philox x = counter(stream, block);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      philox_round(round, key, x.words[0], x.words[1], x.words[2], x.words[3]);
    }
    return x;
  }

  DRIFT_HD static uint32_t half(const Philox& eight, int j) { return eight.words[j / 2] >> (16 * (j % 2)) & 0xffffu; }

  // The bits of element i.
  DRIFT_HD uint32_t one(Stream stream, int64_t i) const {
    const int64_t index = place->whole_index(i);
    const Philox eight = whole_eight(stream, index >> 3);
    const uint32_t low = index & 4 ? eight.words[2] : eight.words[0];
    const uint32_t high = index & 4 ? eight.words[3] : eight.words[1];
    return (index & 2 ? high : low) >> (index & 1 ? 16 : 0) & 0xffffu;
  }

  // The bits of elements i .. i + 7; i is a multiple of 8.
  DRIFT_HD Philox eight(Stream stream, int64_t i) const {
    if (place->keeps_eights()) return whole_eight(stream, place->whole_index(i) >> 3);
    Philox x{};
    DRIFT_KEEP_ROLLED
    for (int j = 0; j < 8; ++j) {  // a queue of 16-bit halves
      x.words[0] = x.words[0] >> 16 | x.words[1] << 16;
      x.words[1] = x.words[1] >> 16 | x.words[2] << 16;
      x.words[2] = x.words[2] >> 16 | x.words[3] << 16;
      x.words[3] = x.words[3] >> 16 | one(stream, i + j) << 16;
    }
    return x;
  }
};

}  // namespace drift
