// Random bits for stochastic rounding: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011). A counter-based generator: an element's bits depend only on the seed, the step, the tensor and the element's
// index in it, not on the backend, the chunk or the thread.
#pragma once

#include "table.h"

namespace drift {

struct Philox {
  uint32_t words[4];
};

constexpr int kPhiloxRounds = 7;

DRIFT_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // from the other form nvcc generates a 64-bit product
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// One round on the words of a counter.
DRIFT_HD void philox_round(int round, uint64_t key, uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3) {
  const uint32_t key0 = static_cast<uint32_t>(key) + static_cast<uint32_t>(round) * 0x9E3779B9u;
  const uint32_t key1 = static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
  const uint64_t a = wide_product(0xD2511F53u, x0);
  const uint64_t b = wide_product(0xCD9E8D57u, x2);
  x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
  x1 = static_cast<uint32_t>(b);
  x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
  x3 = static_cast<uint32_t>(a);
}

// What is rounded: each stream has its own bits.
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

  // The bits of these elements: element 8*block + j has the low (j even) or high (j odd) half of word j/2.
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
};

}  // namespace drift
