// `update_chunk` of chunk.h for AVX-512, by hand: two passes over each kPrepared elements, the square roots in one and
// the divisions in the other. Mixed, both are slower, and the processor does not look ahead far enough to find other
// work meanwhile. Each pass checks for NaN once, so rounding needs no select. Only kernels_avx512.cpp includes this.
#pragma once

#include <cstring>

#include "codes_avx512.h"
#include "philox_avx512.h"

namespace drift::avx512 {

// The coefficients, each broadcast to every lane.
struct Scalars {
  __m512 grad_coef, delta_coef, delta_step, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size,
      inv_sqrt_bc2, eps;
};

DRIFT_512 Scalars scalars(const Coefficients& c) {
  return {_mm512_set1_ps(c.grad_coef),  _mm512_set1_ps(c.delta_coef),
          _mm512_set1_ps(c.delta_step), _mm512_set1_ps(c.decay),
          _mm512_set1_ps(c.beta1),      _mm512_set1_ps(c.one_minus_beta1),
          _mm512_set1_ps(c.beta2),      _mm512_set1_ps(c.one_minus_beta2),
          _mm512_set1_ps(c.step_size),  _mm512_set1_ps(c.inv_sqrt_bc2),
          _mm512_set1_ps(c.eps)};
}

template <class Param, class State>
constexpr Order kOrderOf =
    sizeof(State) == 2 && sizeof(Param) == 2 && !std::is_same_v<Param, float16> ? Order::kEvenOdd : Order::kInOrder;

// What the first pass hands to the second, besides what it stores.
struct Between {
  alignas(64) float exp_avg[kPrepared], root[kPrepared], delta[kPrepared];
};

DRIFT_512 void keep(float* x, Floats value) { store<Order::kInOrder>(x, value, nullptr); }
DRIFT_512 Floats kept(const float* x) { return load<Order::kInOrder>(x); }

struct Moments {
  Floats exp_avg, exp_avg_sq;

  DRIFT_512 bool has_nan() const { return avx512::has_nan(exp_avg) || avx512::has_nan(exp_avg_sq); }
};

// The new moments of the elements from i on. Keeps their square roots and, if it was decoded, the delta in `between`.
template <Order kOrder, class Param, class Grad, class State, class Delta>
DRIFT_512 Moments new_moments(const Stored<Param, Grad, State, Delta>& stored, int64_t i, Moments old, const Scalars& c,
                              Between& between) {
  Floats g = load<kOrder>(stored.grad + i) * c.grad_coef;
  if constexpr (!std::is_same_v<Delta, Nothing>) {
    const Floats delta = load_delta<kOrder>(stored.delta, stored.delta_scale, i);
    if constexpr (kCoded<Delta>) keep(between.delta + i, delta);
    g = g - delta * c.delta_coef;
  }
  const Moments now{old.exp_avg * c.beta1 + g * c.one_minus_beta1,
                    old.exp_avg_sq * c.beta2 + g * g * c.one_minus_beta2};
  keep(between.root + i, root(now.exp_avg_sq));
  return now;
}

template <Order kOrder, class Param, class Grad, class State, class Delta>
DRIFT_512 Floats new_param(const Stored<Param, Grad, State, Delta>& stored, int64_t i, const Scalars& c,
                           const Between& between) {
  Floats param = load_param<kOrder, Param>(stored.param + i, stored.residual + i) * c.decay;
  if constexpr (kCoded<Delta>) {
    param = param + kept(between.delta + i) * c.delta_step;
  } else if constexpr (!std::is_same_v<Delta, Nothing>) {
    param = param + load<kOrder>(stored.delta + i) * c.delta_step;
  }
  const Floats denominator = kept(between.root + i) * c.inv_sqrt_bc2 + c.eps;
  if constexpr (std::is_same_v<State, float>) {
    return param - load<kOrder>(stored.exp_avg + i) / denominator * c.step_size;
  } else {
    return param - kept(between.exp_avg + i) / denominator * c.step_size;
  }
}

template <Order kOrder, class Param, class Grad, class State, class Delta>
DRIFT_512 void update_params(const Stored<Param, Grad, State, Delta>& stored, const Scalars& c,
                             const Drawn<Param, State>& drawn, int64_t count, const Between& between) {
  for (int64_t i = 0; i < count; i += kTurn) {
    const Floats param = new_param<kOrder>(stored, i, c, between);
    const auto put = [&](Floats x) DRIFT_TARGET __attribute__((always_inline)) {
      store_param<kOrder>(stored.param + i, stored.residual + i, x, drawn.param.block().words_from(i / 2));
    };
    __builtin_expect(has_nan(param), 0) ? put(canonical(param)) : put(param);
  }
}

// `count` is a multiple of kTurn.
template <class Param, class Grad, class State, class Delta>
DRIFT_512 void update_turns(const Stored<Param, Grad, State, Delta>& stored, const Scalars& c,
                            const Drawn<Param, State>& drawn, int64_t count) {
  constexpr Order kOrder = kOrderOf<Param, State>;
  Between between;
  for (int64_t i = 0; i < count; i += kTurn) {
    const Moments old{load<kOrder>(stored.exp_avg + i), load<kOrder>(stored.exp_avg_sq + i)};
    const Moments now = new_moments<kOrder>(stored, i, old, c, between);
    if constexpr (!std::is_same_v<State, float>) keep(between.exp_avg + i, now.exp_avg);
    const auto put = [&](Moments x) DRIFT_TARGET __attribute__((always_inline)) {
      store<kOrder>(stored.exp_avg + i, x.exp_avg, drawn.exp_avg.block().words_from(i / 2));
      store<kOrder>(stored.exp_avg_sq + i, x.exp_avg_sq, drawn.exp_avg_sq.block().words_from(i / 2));
    };
    __builtin_expect(now.has_nan(), 0) ? put({canonical(now.exp_avg), canonical(now.exp_avg_sq)}) : put(now);
  }
  update_params<kOrder>(stored, c, drawn, count, between);
}

template <bool kLimited>
DRIFT_512 void encode_turns(moment_code* exp_avg, variance_code* exp_avg_sq, const Scales& scales, int64_t count,
                            const Between& between) {
  for (int64_t i = 0; i < count; i += kTurn) {
    const int64_t block = i / kScaleBlock;
    encode<kLimited>(exp_avg + i, kept(between.exp_avg + i), scales.inverse[block]);
    encode<kLimited>(exp_avg_sq + i, kept(between.root + i), scales.inverse[kScales + block]);
  }
}

// Out of line: the code does not depend on the other types.
inline __attribute__((noinline)) DRIFT_TARGET void encode_states(moment_code* exp_avg, variance_code* exp_avg_sq,
                                                                 const Scales& scales, int64_t count,
                                                                 const Between& between) {
  if (scales.finite) {
    encode_turns<false>(exp_avg, exp_avg_sq, scales, count, between);
  } else {
    encode_turns<true>(exp_avg, exp_avg_sq, scales, count, between);
  }
}

// States stored as codes: several scale blocks are encoded together, after the parameters, since scales take long.
template <class Param, class Grad, class Delta>
DRIFT_512 void update_turns(const Stored<Param, Grad, int8_state, Delta>& stored, const Scalars& c,
                            const Drawn<Param, int8_state>& drawn, int64_t count) {
  constexpr Order kOrder = Order::kInOrder;
  Between between;
  Largest largest;
  for (int64_t i = 0; i < count; i += kTurn) {
    const int64_t block = i / kScaleBlock;
    const Moments old{decode(stored.exp_avg + i, stored.exp_avg_scale[block]),
                      decode(stored.exp_avg_sq + i, stored.exp_avg_sq_scale[block])};
    const Moments now = new_moments<kOrder>(stored, i, old, c, between);
    keep(between.exp_avg + i, now.exp_avg);
    largest.take(block, now.exp_avg, now.exp_avg_sq);
  }
  const Scales scales = scales_of(largest);
  update_params<kOrder>(stored, c, drawn, count, between);
  const auto blocks = static_cast<__mmask8>((1 << (count + kScaleBlock - 1) / kScaleBlock) - 1);
  _mm_mask_storeu_ps(stored.exp_avg_scale, blocks, _mm_load_ps(scales.scale));
  _mm_mask_storeu_ps(stored.exp_avg_sq_scale, blocks, _mm_load_ps(scales.scale + kScales));
  encode_states(stored.exp_avg, stored.exp_avg_sq, scales, count, between);
}

// Copies of elements that do not fill a turn, padded with zeros, which change no scale.
template <class Param, class Grad, class State, class Delta>
struct Padded {
  template <class T>
  struct Room {
    alignas(64) char bytes[kPrepared * sizeof(T)];

    DRIFT_HD T* data() { return reinterpret_cast<T*>(bytes); }
    DRIFT_HD T* of(const T* from, int64_t count) {
      memcpy(bytes, from, count * sizeof(T));
      memset(bytes + count * sizeof(T), 0, (kTurn - count % kTurn) * sizeof(T));
      return data();
    }
    DRIFT_HD void back(T* to, int64_t count) { memcpy(static_cast<void*>(to), bytes, count * sizeof(T)); }
  };

  Room<Param> param;
  Room<Residual<Param>> residual;
  Room<Grad> grad;
  Room<ExpAvg<State>> exp_avg;
  Room<ExpAvgSq<State>> exp_avg_sq;
  Room<Delta> delta;

  using Tensors = Stored<Param, Grad, State, Delta>;

  DRIFT_HD Tensors of(const Tensors& from, int64_t count) {
    Tensors padded = from;
    padded.param = param.of(from.param, count);
    if constexpr (std::is_same_v<Param, master_bfloat16>) padded.residual = residual.of(from.residual, count);
    padded.grad = grad.of(from.grad, count);
    padded.exp_avg = exp_avg.of(from.exp_avg, count);
    padded.exp_avg_sq = exp_avg_sq.of(from.exp_avg_sq, count);
    if constexpr (!std::is_same_v<Delta, Nothing>) padded.delta = delta.of(from.delta, count);
    return padded;
  }

  DRIFT_HD void back(const Tensors& to, int64_t count) {
    param.back(to.param, count);
    if constexpr (std::is_same_v<Param, master_bfloat16>) residual.back(to.residual, count);
    exp_avg.back(to.exp_avg, count);
    exp_avg_sq.back(to.exp_avg_sq, count);
  }
};

// At most kPrepared elements.
template <class Param, class Grad, class State, class Delta>
DRIFT_512 void update_block(const Stored<Param, Grad, State, Delta>& stored, const Coefficients& coefficients,
                            const Scalars& c, const Drawn<Param, State>& drawn, int64_t count) {
  const int64_t turns = count / kTurn * kTurn, rest = count - turns;
  if constexpr (std::is_same_v<State, int8_state> || kStochastic<Param> || kStochastic<State> || kCoded<Delta>) {
    Padded<Param, Grad, State, Delta> padded;
    update_turns(rest == 0 ? stored : padded.of(stored, count), c, drawn, rest == 0 ? turns : turns + kTurn);
    if (rest != 0) padded.back(stored, count);
  } else {  // no copies: a model has many small tensors
    if (turns != 0) update_turns(stored, c, drawn, turns);
    if (rest == 0) return;
    Stored<Param, Grad, State, Delta> last = stored;
    last.param += turns;
    last.residual += turns;
    last.grad += turns;
    last.exp_avg += turns;
    last.exp_avg_sq += turns;
    last.delta += turns;
    drift::update_block(last, last.delta, coefficients, drawn.param.block(), drawn.exp_avg.block(),
                        drawn.exp_avg_sq.block(), rest);
  }
}

template <class Param, class Grad, class State, class Delta>
DRIFT_512 void update_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin,
                            int64_t end) {
  if (coefficients.step == 0) return;
  const Scalars c = scalars(coefficients);
  Drawn<Param, State> drawn(random_bits(row, coefficients));
  for (int64_t block = begin; block < end; block += kPrepared) {
    drawn.draw(block);
    update_block(Stored<Param, Grad, State, Delta>::of(row, grad, block), coefficients, c, drawn,
                 block + kPrepared < end ? kPrepared : end - block);
  }
}

}  // namespace drift::avx512
