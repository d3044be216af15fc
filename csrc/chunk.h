// One chunk of one tensor: load, update, store; or the two sums of grad_stats.
#pragma once

#include <type_traits>

#include "adamw.h"
#include "philox.h"

// Iterations of the next loop touch different elements: the host compiler may vectorise it. (Not `omp simd`, which
// keeps structs such as Element in memory.)
#if defined(__clang__)
#define DRIFT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__CUDACC__)
#define DRIFT_INDEPENDENT  // the device does not vectorise
#else
#define DRIFT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace drift {

struct Nothing {};  // stands for the type of a tensor that a launch does not have: a delta, a residual

template <class Param>
using Residual = std::conditional_t<std::is_same_v<Param, master_bfloat16>, int16_t, Nothing>;

template <class T>
constexpr bool kStochastic = std::is_same_v<T, stochastic_bfloat16>;

template <class T>
DRIFT_HD T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// An element's random bits, of which its tensors use what they need.
struct Draw {
  uint32_t param;
  uint32_t exp_avg;
  uint32_t exp_avg_sq;
};

// The tensors of one row under their types, from element `begin` on.
template <class Param, class Grad, class State, class Delta>
struct Tensors {
  Param* __restrict param;
  Residual<Param>* __restrict residual;
  const Grad* __restrict grad;
  State* __restrict exp_avg;
  State* __restrict exp_avg_sq;
  const Delta* __restrict delta;

  static DRIFT_HD Tensors of(const Row& row, uint64_t grad, int64_t begin = 0) {
    return {pointer<Param>(row.param) + begin,
            pointer<Residual<Param>>(row.residual) + begin,
            pointer<const Grad>(grad) + begin,
            pointer<State>(row.exp_avg) + begin,
            pointer<State>(row.exp_avg_sq) + begin,
            pointer<const Delta>(row.delta) + begin};
  }

  DRIFT_HD Element load(int64_t i) const { return {load_param(i), to_float(exp_avg[i]), to_float(exp_avg_sq[i])}; }

  DRIFT_HD Element update(Element e, int64_t i, const Coefficients& c) const {
    if constexpr (std::is_same_v<Delta, Nothing>) {
      return adamw_update(e, to_float(grad[i]), c);
    } else {
      return adamw_update(e, to_float(grad[i]), to_float(delta[i]), c);
    }
  }

  DRIFT_HD void store(int64_t i, Element e, Draw draw) const {
    if constexpr (std::is_same_v<Param, master_bfloat16>) {
      split(e.param, param[i], residual[i]);
    } else {
      param[i] = rounded<Param>(e.param, draw.param);
    }
    exp_avg[i] = rounded<State>(e.exp_avg, draw.exp_avg);
    exp_avg_sq[i] = rounded<State>(e.exp_avg_sq, draw.exp_avg_sq);
  }

 private:
  DRIFT_HD float load_param(int64_t i) const {
    if constexpr (std::is_same_v<Param, master_bfloat16>) {
      return join(param[i], residual[i]);
    } else {
      return to_float(param[i]);
    }
  }

  template <class T>
  static DRIFT_HD T rounded(float x, [[maybe_unused]] uint32_t random) {
    if constexpr (kStochastic<T>) {
      return round_stochastically(x, random);
    } else {
      return round_to<T>(x);
    }
  }
};

constexpr int kRandomBlock = 512;

// The random bits of kRandomBlock elements of a tensor whose type needs them.
template <class T>
class RandomBlock {
 public:
  DRIFT_HD void draw([[maybe_unused]] const RandomBits& random, [[maybe_unused]] Stream stream,
                     [[maybe_unused]] int64_t begin) {
    if constexpr (kStochastic<T>) {
      // Word by word, so that the host compiler vectorises each round over the calls.
      constexpr int kCalls = kRandomBlock / 8;
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
  union {
    uint32_t words[kStochastic<T> ? kRandomBlock / 2 : 1];
    uint16_t halves[kStochastic<T> ? kRandomBlock : 1];
  } bits_;
};

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin,
                           int64_t end) {
  constexpr int64_t kBlock = kStochastic<Param> || kStochastic<State> ? kRandomBlock : kChunk;
  const RandomBits random{row.random_key, static_cast<uint32_t>(coefficients.step)};
  RandomBlock<Param> param;
  RandomBlock<State> exp_avg, exp_avg_sq;
  const Coefficients c = coefficients;
  for (int64_t block = begin; block < end; block += kBlock) {
    param.draw(random, Stream::kParam, block);
    exp_avg.draw(random, Stream::kExpAvg, block);
    exp_avg_sq.draw(random, Stream::kExpAvgSq, block);
    const auto tensors = Tensors<Param, Grad, State, Delta>::of(row, grad, block);
    const int64_t count = block + kBlock < end ? kBlock : end - block;
    DRIFT_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      Element e = tensors.load(i);
      e = tensors.update(e, i, c);
      tensors.store(i, e, {param[i], exp_avg[i], exp_avg_sq[i]});
    }
  }
}

struct Sums {
  double grad_grad;
  double grad_delta;
};

// sum(g*g) and sum(g*delta) of one chunk: float32 in kLanes columns over short blocks, the blocks in float64. The order
// is fixed by the element's index alone, so the sums have the same bits on every instruction set.
template <class Grad, class Delta>
DRIFT_HD Sums sum_chunk(const Row& row, uint64_t grad_address, int64_t begin, int64_t end) {
  constexpr int kLanes = 32;
  constexpr int64_t kBlock = 64 * kLanes;
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  const Grad* __restrict grad = pointer<const Grad>(grad_address);
  [[maybe_unused]] const Delta* __restrict delta = pointer<const Delta>(row.delta);

  Sums sums{0.0, 0.0};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    float grad_grad[kLanes] = {};
    float grad_delta[kLanes] = {};
    auto accumulate = [&](int lane, int64_t i) {
      const float g = to_float(grad[i]);
      grad_grad[lane] += g * g;
      if constexpr (kHasDelta) grad_delta[lane] += g * to_float(delta[i]);
    };
    int64_t i = block;
    for (; i + kLanes <= stop; i += kLanes) {
      DRIFT_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) accumulate(lane, i + lane);
    }
    for (int lane = 0; i < stop; ++lane, ++i) accumulate(lane, i);
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.grad_grad += grad_grad[lane];
      sums.grad_delta += grad_delta[lane];
    }
  }
  return sums;
}

}  // namespace drift
