// One chunk of one tensor on the CPU: load, update, store, block by block; the two sums of grad_stats; the bias alone.
// The loops are written so that the compiler vectorises them.
#pragma once

#include "../tensors.h"

// The iterations of the next loop touch different elements. (`omp simd` would keep structs such as Element in memory.)
#if defined(__clang__)
#define DRIFT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DRIFT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace drift {

// Elements prepared together: their random bits are drawn and their codes decoded.
constexpr int kPrepared = 512;

// The random bits of kPrepared elements of a tensor, if its type needs them.
template <class T>
class RandomBlock {
 public:
  DRIFT_HD void draw([[maybe_unused]] const RandomBits& random, [[maybe_unused]] Stream stream,
                     [[maybe_unused]] int64_t begin) {
    if constexpr (kStochastic<T>) {
      if (!random.place->keeps_eights()) return draw_each(random, stream, begin);
      // Word by word, so that each round is vectorised over the calls.
      uint32_t x[4][kCalls];
      for (int call = 0; call < kCalls; ++call) {
        const Philox counter = random.counter(stream, random.place->whole_index(begin + 8 * call) >> 3);
        for (int word = 0; word < 4; ++word) x[word][call] = counter.words[word];
      }
      for (int round = 0; round < kPhiloxRounds; ++round) {
        DRIFT_INDEPENDENT
        for (int call = 0; call < kCalls; ++call) {
          philox_round(round, random.key, x[0][call], x[1][call], x[2][call], x[3][call]);
        }
      }
      DRIFT_INDEPENDENT
      for (int call = 0; call < kCalls; ++call) {
        bits_.words[4 * call + 0] = x[0][call];
        bits_.words[4 * call + 1] = x[1][call];
        bits_.words[4 * call + 2] = x[2][call];
        bits_.words[4 * call + 3] = x[3][call];
      }
    }
  }

  DRIFT_HD uint32_t operator[]([[maybe_unused]] int64_t i) const {
    if constexpr (kStochastic<T>) return bits_.halves[i];
    return 0;
  }

  // Two elements per word.
  DRIFT_HD uint32_t* words() { return bits_.words; }
  DRIFT_HD const uint32_t* words_from([[maybe_unused]] int64_t word) const {
    return kStochastic<T> ? bits_.words + word : nullptr;
  }

 private:
  static constexpr int kCalls = kPrepared / 8;

  // For a shard that cuts through the whole tensor's groups of eight. (Out of line: rare, and a lot of code.)
  __attribute__((noinline)) void draw_each(const RandomBits& random, Stream stream, int64_t begin) {
    for (int i = 0; i < kPrepared; ++i) bits_.halves[i] = static_cast<uint16_t>(random.one(stream, begin + i));
  }

  alignas(64) union {
    uint32_t words[kStochastic<T> ? kPrepared / 2 : 1];
    uint16_t halves[kStochastic<T> ? kPrepared : 1];
  } bits_;
};

// Calls work(block, begin, end) for each block that shares a scale, for up to kPrepared elements.
template <class F>
DRIFT_HD void each_scale_block(int64_t count, F work) {
  int64_t begin = 0;
  for (; begin + kScaleBlock <= count; begin += kScaleBlock) work(begin / kScaleBlock, begin, begin + kScaleBlock);
  if (begin < count) work(begin / kScaleBlock, begin, count);
}

template <class T>
DRIFT_HD void decode_block(const T* tensor, const float* scales, Decoded<T>* values, int64_t count) {
  each_scale_block(count, [&](int64_t block, int64_t begin, int64_t end) {
    const float scale = scales[block];
    DRIFT_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) values[i] = decode(tensor[i], scale);
  });
}

// `largest` holds the bits of each scale block's largest magnitude.
template <class T>
DRIFT_HD void encode_block(const Decoded<T>* values, const uint32_t* largest, T* tensor, float* scales, int64_t count) {
  alignas(64) int32_t codes[kPrepared];
  each_scale_block(count, [&](int64_t block, int64_t begin, int64_t end) {
    scales[block] = scale_of<T>(largest[block]);
    const float inverse = inverse_of(scales[block]);
    DRIFT_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) codes[i] = code_of(values[i], inverse);
  });
  // A separate loop: in the one above, the compiler would pack every intermediate result into bytes.
  each_scale_block(count, [&](int64_t, int64_t begin, int64_t end) {
    DRIFT_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) tensor[i] = narrow<T>(codes[i]);
  });
}

// A delta as the loop reads it: the tensor itself, or up to kPrepared floats decoded from its codes.
template <class Delta>
class DeltaBlock {
 public:
  DRIFT_HD const Decoded<Delta>* read(const Delta* tensor, [[maybe_unused]] const float* scales,
                                      [[maybe_unused]] int64_t count) {
    if constexpr (kCoded<Delta>) {
      decode_block(tensor, scales, values_, count);
      return values_;
    } else {
      return tensor;
    }
  }

 private:
  alignas(64) float values_[kCoded<Delta> ? kPrepared : 1];
};

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_block(const Stored<Param, Grad, State, Delta>& stored, const Decoded<Delta>* delta,
                           const Coefficients& c, const RandomBlock<Param>& for_param,
                           const RandomBlock<State>& for_exp_avg, const RandomBlock<State>& for_exp_avg_sq,
                           int64_t count) {
  const Tensors<Param, Grad, State, State, Decoded<Delta>> tensors{stored.param,   stored.residual,   stored.grad,
                                                                   stored.exp_avg, stored.exp_avg_sq, delta};
  DRIFT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    Element e = tensors.load(i);
    e = tensors.update(e, i, c);
    tensors.store(i, e, {for_param[i], for_exp_avg[i], for_exp_avg_sq[i]});
  }
}

// States stored as codes. Each stage covers several scale blocks before the next begins: a scale waits for the largest
// magnitude of its block and for two divisions, and would otherwise stall between any two loops.
template <class Param, class Grad, class Delta>
DRIFT_HD void update_block(const Stored<Param, Grad, int8_state, Delta>& stored, const Decoded<Delta>* delta,
                           const Coefficients& c, const RandomBlock<Param>& for_param, const RandomBlock<int8_state>&,
                           const RandomBlock<int8_state>&, int64_t count) {
  constexpr int kScales = kPrepared / kScaleBlock;
  alignas(64) float exp_avg[kPrepared];
  alignas(64) rooted exp_avg_sq[kPrepared];
  uint32_t largest_moment[kScales], largest_variance[kScales];
  decode_block(stored.exp_avg, stored.exp_avg_scale, exp_avg, count);
  decode_block(stored.exp_avg_sq, stored.exp_avg_sq_scale, exp_avg_sq, count);
  const Tensors<Param, Grad, float, rooted, Decoded<Delta>> tensors{stored.param, stored.residual, stored.grad,
                                                                    exp_avg,      exp_avg_sq,      delta};
  each_scale_block(count, [&](int64_t block, int64_t begin, int64_t end) {
    uint32_t moments = 0, variances = 0;
    DRIFT_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) {
      Element e = tensors.load(i);
      e = tensors.update(e, i, c);
      tensors.store(i, e, {for_param[i], 0, 0});
      const uint32_t moment = magnitude_bits(e.exp_avg), variance = magnitude_bits(round_to<rooted>(e.exp_avg_sq));
      moments = moment > moments ? moment : moments;
      variances = variance > variances ? variance : variances;
    }
    largest_moment[block] = moments;
    largest_variance[block] = variances;
  });
  encode_block(exp_avg, largest_moment, stored.exp_avg, stored.exp_avg_scale, count);
  encode_block(exp_avg_sq, largest_variance, stored.exp_avg_sq, stored.exp_avg_sq_scale, count);
}

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin,
                           int64_t end) {
  if (coefficients.step == 0) return;
  constexpr bool kPrepares =
      kStochastic<Param> || kStochastic<State> || kCoded<Delta> || std::is_same_v<State, int8_state>;
  constexpr int64_t kBlock = kPrepares ? kPrepared : kChunk;
  const RandomBits random = random_bits(row, coefficients);
  RandomBlock<Param> for_param;
  RandomBlock<State> for_exp_avg, for_exp_avg_sq;
  DeltaBlock<Delta> delta;
  const Coefficients c = coefficients;
  for (int64_t block = begin; block < end; block += kBlock) {
    const auto stored = Stored<Param, Grad, State, Delta>::of(row, grad, block);
    const int64_t count = block + kBlock < end ? kBlock : end - block;
    for_param.draw(random, Stream::kParam, block);
    for_exp_avg.draw(random, Stream::kExpAvg, block);
    for_exp_avg_sq.draw(random, Stream::kExpAvgSq, block);
    update_block(stored, delta.read(stored.delta, stored.delta_scale, count), c, for_param, for_exp_avg, for_exp_avg_sq,
                 count);
  }
}

// sum(g*g) and sum(g*delta) of one chunk: float32 in kLanes columns within short blocks, float64 across blocks. Only
// the element's index determines the order, so the sums are bitwise identical on every instruction set.
template <class Grad, class Delta>
DRIFT_HD Sums sum_chunk(const Row& row, uint64_t grad_address, int64_t begin, int64_t end) {
  constexpr int kLanes = 32;
  constexpr int64_t kBlock = 64 * kLanes;
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  static_assert(kScaleBlock % kLanes == 0, "the lanes share a scale");
  const Grad* __restrict grad = pointer<const Grad>(grad_address);
  [[maybe_unused]] const Delta* __restrict delta = pointer<const Delta>(row.delta);
  [[maybe_unused]] const float* __restrict scales = pointer<const float>(row.delta_scale);

  Sums sums{0.0, 0.0};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    float grad_grad[kLanes] = {};
    float grad_delta[kLanes] = {};
    auto accumulate = [&](int lane, int64_t i, [[maybe_unused]] float scale) {
      const float g = to_float(grad[i]);
      grad_grad[lane] += g * g;
      if constexpr (kHasDelta) grad_delta[lane] += g * value(delta[i], scale);
    };
    auto scale_at = [&]([[maybe_unused]] int64_t i) {
      if constexpr (kCoded<Delta>) return scales[i / kScaleBlock];
      return 1.0f;
    };
    int64_t i = block;
    for (; i + kLanes <= stop; i += kLanes) {
      const float scale = scale_at(i);
      DRIFT_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) accumulate(lane, i + lane, scale);
    }
    for (int lane = 0; i < stop; ++lane, ++i) accumulate(lane, i, scale_at(i));
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.grad_grad += grad_grad[lane];
      sums.grad_delta += grad_delta[lane];
    }
  }
  return sums;
}

template <class Grad, class Delta>
DRIFT_HD void bias_block(Grad* __restrict grad, const Delta* __restrict delta, const Coefficients& c, int64_t count) {
  DRIFT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) grad[i] = round_to<Grad>(biased(to_float(grad[i]), to_float(delta[i]), c));
}

// Biases the gradient of one chunk in place.
template <class Grad, class Delta>
DRIFT_HD void bias_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kCoded<Delta> ? kPrepared : kChunk;
  DeltaBlock<Delta> delta;
  const Coefficients c = coefficients;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t count = block + kBlock < end ? kBlock : end - block;
    const float* scales = pointer<const float>(row.delta_scale) + block / kScaleBlock;
    bias_block(pointer<Grad>(grad) + block, delta.read(pointer<const Delta>(row.delta) + block, scales, count), c,
               count);
  }
}

}  // namespace drift
