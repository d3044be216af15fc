// One chunk of one tensor on the CPU: load, update, store, block by block; or the two sums of grad_stats. Loops are
// written so that the compiler vectorises them.
#pragma once

#include "../tensors.h"

// Iterations of the next loop touch different elements. (Not `omp simd`, which keeps structs such as Element in
// memory.)
#if defined(__clang__)
#define DRIFT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DRIFT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace drift {

// Elements that are prepared together: random bits drawn, codes decoded.
constexpr int kPrepared = 512;

// The random bits of kPrepared elements of a tensor whose type needs them.
template <class T>
class RandomBlock {
 public:
  DRIFT_HD void draw([[maybe_unused]] const RandomBits& random, [[maybe_unused]] Stream stream,
                     [[maybe_unused]] int64_t begin) {
    if constexpr (kStochastic<T>) {
      // Word by word, so that each round is vectorised over the calls.
      constexpr int kCalls = kPrepared / 8;
      uint32_t x[4][kCalls];
      for (int call = 0; call < kCalls; ++call) {
        const Philox counter = random.counter(stream, begin / 8 + call);
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

 private:
  alignas(64) union {
    uint32_t words[kStochastic<T> ? kPrepared / 2 : 1];
    uint16_t halves[kStochastic<T> ? kPrepared : 1];
  } bits_;
};

// A delta as the loop reads it: the tensor itself, or kPrepared floats decoded from its codes.
template <class Delta>
class DeltaBlock {
 public:
  DRIFT_HD const Decoded<Delta>* read(const Delta* tensor, [[maybe_unused]] const float* scales,
                                      [[maybe_unused]] int64_t count) {
    if constexpr (kCoded<Delta>) {
      for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
        const float scale = scales[begin / kScaleBlock];
        const int64_t end = begin + kScaleBlock < count ? begin + kScaleBlock : count;
        DRIFT_INDEPENDENT
        for (int64_t i = begin; i < end; ++i) values_[i] = decode(tensor[i], scale);
      }
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

// Where the states are codes: decoded, updated and measured in one loop over the elements that share a scale, and
// encoded in the next.
template <class Param, class Grad, class Delta>
DRIFT_HD void update_block(const Stored<Param, Grad, int8_state, Delta>& stored, const Decoded<Delta>* delta,
                           const Coefficients& c, const RandomBlock<Param>& for_param, const RandomBlock<int8_state>&,
                           const RandomBlock<int8_state>&, int64_t count) {
  alignas(64) float exp_avg[kScaleBlock];
  alignas(64) rooted exp_avg_sq[kScaleBlock];
  for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
    const int64_t block = begin / kScaleBlock;
    const int size = static_cast<int>(begin + kScaleBlock < count ? kScaleBlock : count - begin);
    const float moment_scale = stored.exp_avg_scale[block], variance_scale = stored.exp_avg_sq_scale[block];
    moment_code* moments = stored.exp_avg + begin;
    variance_code* variances = stored.exp_avg_sq + begin;
    const Tensors<Param, Grad, float, rooted, Decoded<Delta>> tensors{
        stored.param + begin, stored.residual + begin, stored.grad + begin, exp_avg, exp_avg_sq, delta + begin};
    // Loops of their own: the compiler would unroll the next one to a vector of bytes, and run out of registers.
    DRIFT_INDEPENDENT
    for (int i = 0; i < size; ++i) exp_avg[i] = decode(moments[i], moment_scale);
    DRIFT_INDEPENDENT
    for (int i = 0; i < size; ++i) exp_avg_sq[i] = decode(variances[i], variance_scale);
    uint32_t largest_moment = 0, largest_variance = 0;
    DRIFT_INDEPENDENT
    for (int i = 0; i < size; ++i) {
      Element e = tensors.load(i);
      e = tensors.update(e, i, c);
      tensors.store(i, e, {for_param[begin + i], 0, 0});
      const uint32_t moment = magnitude_bits(e.exp_avg), variance = magnitude_bits(round_to<rooted>(e.exp_avg_sq));
      largest_moment = moment > largest_moment ? moment : largest_moment;
      largest_variance = variance > largest_variance ? variance : largest_variance;
    }
    const float new_moment_scale = scale_of<moment_code>(largest_moment);
    const float new_variance_scale = scale_of<variance_code>(largest_variance);
    const float moment_inverse = inverse_of(new_moment_scale), variance_inverse = inverse_of(new_variance_scale);
    DRIFT_INDEPENDENT
    for (int i = 0; i < size; ++i) moments[i] = encode<moment_code>(exp_avg[i], moment_inverse);
    DRIFT_INDEPENDENT
    for (int i = 0; i < size; ++i) variances[i] = encode<variance_code>(exp_avg_sq[i], variance_inverse);
    stored.exp_avg_scale[block] = new_moment_scale;
    stored.exp_avg_sq_scale[block] = new_variance_scale;
  }
}

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin,
                           int64_t end) {
  constexpr int64_t kBlock = kStochastic<Param> || kStochastic<State> || kCoded<Delta> ? kPrepared : kChunk;
  const RandomBits random{row.random_key, static_cast<uint32_t>(coefficients.step)};
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

// sum(g*g) and sum(g*delta) of one chunk: float32 in kLanes columns over short blocks, the blocks in float64. The order
// is fixed by the element's index alone, so the sums have the same bits on every instruction set.
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

}  // namespace drift
