// The random bits of kPrepared elements at a time. Bitwise identical to philox.h.
#pragma once

#include "lanes_avx512.h"

namespace drift::avx512 {

// Random bits of elements in consecutive groups of eight. A register holds one word of kCalls Philox calls, each in 64
// bits with the upper half ignored. Each round runs on kTogether registers before the next round. Values shared by all
// calls are computed once.
class Eights {
 public:
  DRIFT_512 Eights(const RandomBits& random, Stream stream) : stream_(stream), step_(random.step), key_(random.key) {
    for (int round = 2; round < kPhiloxRounds; ++round) {
      keys_[round][0] = words(key(0, round));
      keys_[round][1] = words(key(1, round));
    }
  }

  // Draws from the group of eight with index `first` on; the index must not carry into its upper word. (Out of line, so
  // that keys_ stays in memory and instructions read it from there.)
  __attribute__((noinline)) DRIFT_TARGET void draw(int64_t first, uint32_t* out) const {
    // The counters differ only in word 0, so one of the products is shared in round 0, and the other in round 1.
    const uint32_t counter1 = static_cast<uint32_t>(first >> 32) | static_cast<uint32_t>(stream_) << 30;
    const uint64_t b0 = uint64_t{kB} * step_;
    const uint64_t a1 = uint64_t{kA} * (static_cast<uint32_t>(b0 >> 32) ^ counter1 ^ key(0, 0));
    const __m512i round0_key1 = words(key(1, 0));
    const __m512i round1_key0 = words(static_cast<uint32_t>(b0) ^ key(0, 1));
    const __m512i round1_key1 = words(static_cast<uint32_t>(a1 >> 32) ^ key(1, 1));
    const __m512i round2_key1 = words(static_cast<uint32_t>(a1) ^ key(1, 2));

    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // puts the output words in order
    __m512i a0 = times<kA>(_mm512_add_epi32(words(static_cast<uint32_t>(first)), order));
    for (int64_t drawn = 0; drawn < kPrepared; drawn += 8 * kCalls * kTogether) {
      __m512i x0[kTogether], x1[kTogether], x2[kTogether], x3[kTogether];
      for (int k = 0; k < kTogether; ++k) {
        x0[k] = _mm512_xor_si512(high_words(a0), round0_key1);
        x2[k] = _mm512_xor_si512(a0, round1_key1);
        a0 = _mm512_add_epi64(a0, _mm512_set1_epi64(int64_t{kCalls} * kA));
      }
      for (int k = 0; k < kTogether; ++k) {
        x1[k] = times<kB>(x0[k]);
        x0[k] = _mm512_xor_si512(high_words(x1[k]), round1_key0);
      }
      for (int k = 0; k < kTogether; ++k) {
        const __m512i a = times<kA>(x0[k]), b = times<kB>(x2[k]);
        x0[k] = _mm512_ternarylogic_epi64(high_words(b), x1[k], keys_[2][0], kXor);
        x2[k] = _mm512_xor_si512(high_words(a), round2_key1);
        x1[k] = b;
        x3[k] = a;
      }
      for (int round = 3; round < kPhiloxRounds - 1; ++round) {
        for (int k = 0; k < kTogether; ++k) {
          const __m512i a = times<kA>(x0[k]), b = times<kB>(x2[k]);
          x0[k] = _mm512_ternarylogic_epi64(high_words(b), x1[k], keys_[round][0], kXor);
          x2[k] = _mm512_ternarylogic_epi64(high_words(a), x3[k], keys_[round][1], kXor);
          x1[k] = b;
          x3[k] = a;
        }
      }
      for (int k = 0; k < kTogether; ++k) {  // the last round also interleaves pairs of words
        const __m512i a = times<kA>(x0[k]), b = times<kB>(x2[k]), *keys = keys_[kPhiloxRounds - 1];
        const __m512i x01 = _mm512_mask_ternarylogic_epi32(swapped_words(b), kLowWords, x1[k], keys[0], kXor);
        const __m512i x23 = _mm512_mask_ternarylogic_epi32(swapped_words(a), kLowWords, x3[k], keys[1], kXor);
        uint32_t* eights = out + drawn / 2 + 4 * kCalls * k;
        _mm512_storeu_si512(eights, _mm512_unpacklo_epi64(x01, x23));
        _mm512_storeu_si512(eights + 16, _mm512_unpackhi_epi64(x01, x23));
      }
    }
  }

 private:
  static constexpr int kCalls = 8, kTogether = 4;
  static_assert(kPrepared % (8 * kCalls * kTogether) == 0, "eights are drawn together");
  static constexpr uint32_t kA = 0xD2511F53u, kB = 0xCD9E8D57u;
  static constexpr int kXor = 0x96;
  static constexpr __mmask16 kLowWords = 0x5555;

  DRIFT_512 uint32_t key(int half, int round) const {
    return static_cast<uint32_t>(key_ >> 32 * half) + static_cast<uint32_t>(round) * (half ? 0xBB67AE85u : 0x9E3779B9u);
  }

  template <uint32_t kFactor>
  static DRIFT_512 __m512i times(__m512i x) {
    return _mm512_mul_epu32(x, words(kFactor));
  }

  // Shuffles have a higher throughput than shifts.
  static DRIFT_512 __m512i high_words(__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDBB); }
  static DRIFT_512 __m512i swapped_words(__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_CDAB); }

  __m512i keys_[kPhiloxRounds][2];
  Stream stream_;
  uint32_t step_;
  uint64_t key_;
};

// The random bits of a tensor, if it needs them.
template <class T, bool = kStochastic<T>>
class Randoms {
 public:
  DRIFT_512 Randoms(const RandomBits& random, Stream stream)
      : random_(random), stream_(stream), eights_(random, stream) {}

  // Draws the random bits of the elements from `begin` on.
  DRIFT_512 void draw(int64_t begin) {
    const Place& place = *random_.place;
    const int64_t first = place.whole_index(begin), last = place.whole_index(begin + kPrepared - 8);
    if (place.keeps_eights() && last - first == kPrepared - 8 && first >> 35 == last >> 35) {
      eights_.draw(first >> 3, block_.words());
    } else {
      block_.draw(random_, stream_, begin);
    }
  }

  DRIFT_HD const RandomBlock<T>& block() const { return block_; }

 private:
  RandomBlock<T> block_;
  RandomBits random_;
  Stream stream_;
  Eights eights_;
};

template <class T>
class Randoms<T, false> {
 public:
  DRIFT_512 Randoms(const RandomBits&, Stream) {}
  DRIFT_512 void draw(int64_t) {}
  DRIFT_HD const RandomBlock<T>& block() const { return block_; }

 private:
  RandomBlock<T> block_;
};

// The random bits of a parameter and its states.
template <class Param, class State>
struct Drawn {
  Randoms<Param> param;
  Randoms<State> exp_avg, exp_avg_sq;

  DRIFT_512 explicit Drawn(const RandomBits& random)
      : param(random, Stream::kParam), exp_avg(random, Stream::kExpAvg), exp_avg_sq(random, Stream::kExpAvgSq) {}

  DRIFT_512 void draw(int64_t begin) {
    param.draw(begin);
    exp_avg.draw(begin);
    exp_avg_sq.draw(begin);
  }
};

}  // namespace drift::avx512
