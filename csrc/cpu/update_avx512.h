// `update_chunk` of chunk.h for AVX-512, by hand: 32 elements a turn, and one look for NaN, after which rounding needs
// no select. Included by kernels_avx512.cpp alone.
#pragma once

#include <cstring>

#include "lanes_avx512.h"

namespace drift::avx512 {

// The coefficients, each in every lane.
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

struct Elements {
  __m512 param, exp_avg, exp_avg_sq, root;
};

// adamw_update of adamw.h; the gradient is biased and the parameter decayed before.
DRIFT_512 void adamw_step(Elements& e, __m512 g, const Scalars& c) {
  e.exp_avg = _mm512_add_ps(_mm512_mul_ps(c.beta1, e.exp_avg), _mm512_mul_ps(c.one_minus_beta1, g));
  e.exp_avg_sq =
      _mm512_add_ps(_mm512_mul_ps(c.beta2, e.exp_avg_sq), _mm512_mul_ps(c.one_minus_beta2, _mm512_mul_ps(g, g)));
  e.root = _mm512_sqrt_ps(e.exp_avg_sq);
  const __m512 denominator = _mm512_add_ps(_mm512_mul_ps(e.root, c.inv_sqrt_bc2), c.eps);
  e.param = _mm512_sub_ps(e.param, _mm512_mul_ps(c.step_size, _mm512_div_ps(e.exp_avg, denominator)));
}

DRIFT_512 void adamw(Elements& e, __m512 grad, const Scalars& c) {
  e.param = _mm512_mul_ps(e.param, c.decay);
  adamw_step(e, _mm512_mul_ps(c.grad_coef, grad), c);
}

DRIFT_512 void adamw(Elements& e, __m512 grad, __m512 delta, const Scalars& c) {
  e.param = _mm512_add_ps(_mm512_mul_ps(e.param, c.decay), _mm512_mul_ps(c.delta_step, delta));
  adamw_step(e, _mm512_sub_ps(_mm512_mul_ps(c.grad_coef, grad), _mm512_mul_ps(c.delta_coef, delta)), c);
}

template <class Param, class State>
constexpr Order kOrderOf =
    sizeof(State) == 2 && sizeof(Param) == 2 && !std::is_same_v<Param, float16> ? Order::kEvenOdd : Order::kInOrder;

// The updated values of 32 elements.
struct Updated {
  Floats param, exp_avg, exp_avg_sq, root;

  DRIFT_512 bool has_nan() const { return (nan_in(param) | nan_in(exp_avg) | nan_in(exp_avg_sq)) != 0; }

  DRIFT_512 void make_canonical() {
    param = canonical(param);
    exp_avg = canonical(exp_avg);
    exp_avg_sq = canonical(exp_avg_sq);
  }
};

template <Order kOrder, class Param, class Grad, class State, class Delta>
DRIFT_512 Updated updated(const Stored<Param, Grad, State, Delta>& stored, int64_t i, Floats exp_avg, Floats exp_avg_sq,
                          const Scalars& c) {
  const Floats param = load_param<kOrder, Param>(stored.param, stored.residual, i);
  const Floats grad = load<kOrder>(stored.grad + i);
  Elements a{param.a, exp_avg.a, exp_avg_sq.a, {}}, b{param.b, exp_avg.b, exp_avg_sq.b, {}};
  if constexpr (std::is_same_v<Delta, Nothing>) {
    adamw(a, grad.a, c);
    adamw(b, grad.b, c);
  } else {
    const Floats delta = load_delta<kOrder>(stored.delta, stored.delta_scale, i);
    adamw(a, grad.a, delta.a, c);
    adamw(b, grad.b, delta.b, c);
  }
  Updated u{{a.param, b.param}, {a.exp_avg, b.exp_avg}, {a.exp_avg_sq, b.exp_avg_sq}, {a.root, b.root}};
  if (__builtin_expect(u.has_nan(), 0)) u.make_canonical();
  return u;
}

// The random bits of kPrepared elements, of each tensor that needs them.
template <class Param, class State>
struct Drawn {
  RandomBlock<Param> param;
  RandomBlock<State> exp_avg, exp_avg_sq;

  DRIFT_512 void draw(const RandomBits& random, int64_t begin) {
    draw(param, random, Stream::kParam, begin);
    draw(exp_avg, random, Stream::kExpAvg, begin);
    draw(exp_avg_sq, random, Stream::kExpAvgSq, begin);
  }

 private:
  template <class T>
  static DRIFT_512 void draw(RandomBlock<T>& block, const RandomBits& random, Stream stream, int64_t begin) {
    if constexpr (kStochastic<T>) {
      const Place& place = *random.place;
      const int64_t first = place.whole_index(begin), last = place.whole_index(begin + kPrepared - 8);
      if (place.keeps_eights() && last - first == kPrepared - 8 && first >> 35 == last >> 35) {
        draw_eights(random, stream, first >> 3, block.words());
      } else {
        block.draw(random, stream, begin);
      }
    }
  }
};

// `count` is a multiple of kTurn.
template <class Param, class Grad, class State, class Delta>
DRIFT_512 void update_turns(const Stored<Param, Grad, State, Delta>& stored, const Scalars& c,
                            Drawn<Param, State>& drawn, int64_t first, int64_t count) {
  constexpr Order kOrder = kOrderOf<Param, State>;
  for (int64_t i = 0; i < count; i += kTurn) {
    const int64_t word = (first + i) / 2;
    const Updated u =
        updated<kOrder>(stored, i, load<kOrder>(stored.exp_avg + i), load<kOrder>(stored.exp_avg_sq + i), c);
    store_param<kOrder>(stored.param, stored.residual, i, u.param, drawn.param.words_from(word));
    store<kOrder>(stored.exp_avg + i, u.exp_avg, drawn.exp_avg.words_from(word));
    store<kOrder>(stored.exp_avg_sq + i, u.exp_avg_sq, drawn.exp_avg_sq.words_from(word));
  }
}

// Where the states are codes: kPrepared elements at most, each step over several scale blocks before the next.
template <class Param, class Grad, class Delta>
DRIFT_512 void update_turns(const Stored<Param, Grad, int8_state, Delta>& stored, const Scalars& c,
                            Drawn<Param, int8_state>& drawn, int64_t first, int64_t count) {
  constexpr int kScales = kPrepared / kScaleBlock;
  static_assert(kScales == 4, "largest_of takes four");
  alignas(64) float exp_avg[kPrepared], root[kPrepared];
  __m512i moments[kScales] = {}, roots[kScales] = {};  // the largest in each lane
  const __m512i magnitude = words(0x7fffffff);
  for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
    const int64_t block = begin / kScaleBlock, end = begin + kScaleBlock < count ? begin + kScaleBlock : count;
    const float moment_scale = stored.exp_avg_scale[block], variance_scale = stored.exp_avg_sq_scale[block];
    __m512i largest_moment = _mm512_setzero_si512(), largest_root = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += kTurn) {
      const Updated u = updated<Order::kInOrder>(stored, i, decode(stored.exp_avg + i, moment_scale),
                                                 decode(stored.exp_avg_sq + i, variance_scale), c);
      store_param<Order::kInOrder>(stored.param, stored.residual, i, u.param, drawn.param.words_from((first + i) / 2));
      store<Order::kInOrder>(exp_avg + i, u.exp_avg, nullptr);
      store<Order::kInOrder>(root + i, u.root, nullptr);
      const Bits moment = bits(u.exp_avg), variance = bits(u.root);
      largest_moment = _mm512_max_epu32(largest_moment, _mm512_max_epu32(_mm512_and_si512(moment.a, magnitude),
                                                                         _mm512_and_si512(moment.b, magnitude)));
      largest_root = _mm512_max_epu32(largest_root, _mm512_max_epu32(variance.a, variance.b));
    }
    moments[block] = largest_moment;
    roots[block] = largest_root;
  }
  const Scales of_moments = scales_of<moment_code>(largest_of(moments));
  const Scales of_roots = scales_of<variance_code>(largest_of(roots));
  for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
    const int64_t block = begin / kScaleBlock, end = begin + kScaleBlock < count ? begin + kScaleBlock : count;
    stored.exp_avg_scale[block] = of_moments.scale[block];
    stored.exp_avg_sq_scale[block] = of_roots.scale[block];
    const __m512 moment_inverse = _mm512_set1_ps(of_moments.inverse[block]);
    const __m512 root_inverse = _mm512_set1_ps(of_roots.inverse[block]);
    for (int64_t i = begin; i < end; i += 16) {
      const __m128i moment_codes = code_of_moments(_mm512_load_ps(exp_avg + i), moment_inverse);
      const __m128i root_codes = code_of_roots(_mm512_load_ps(root + i), root_inverse);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(stored.exp_avg + i), moment_codes);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(stored.exp_avg_sq + i), root_codes);
    }
  }
}

// Fewer elements than a turn has, or than a block of codes: copied, with zeros behind them, which change no scale.
template <class Param, class Grad, class State, class Delta, int kRoom>
struct Padded {
  template <class T>
  struct Room {
    alignas(64) char bytes[kRoom * sizeof(T)] = {};

    DRIFT_HD T* data() { return reinterpret_cast<T*>(bytes); }
    DRIFT_HD T* of(const T* from, int64_t count) {
      memcpy(bytes, from, count * sizeof(T));
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

  DRIFT_HD Tensors of(const Tensors& from, int64_t i, int64_t count) {
    Tensors padded = from;
    padded.param = param.of(from.param + i, count);
    if constexpr (std::is_same_v<Param, master_bfloat16>) padded.residual = residual.of(from.residual + i, count);
    padded.grad = grad.of(from.grad + i, count);
    padded.exp_avg = exp_avg.of(from.exp_avg + i, count);
    padded.exp_avg_sq = exp_avg_sq.of(from.exp_avg_sq + i, count);
    if constexpr (!std::is_same_v<Delta, Nothing>) padded.delta = delta.of(from.delta + i, count);
    padded.delta_scale += i / kScaleBlock;
    return padded;
  }

  DRIFT_HD void back(const Tensors& to, int64_t i, int64_t count) {
    param.back(to.param + i, count);
    if constexpr (std::is_same_v<Param, master_bfloat16>) residual.back(to.residual + i, count);
    exp_avg.back(to.exp_avg + i, count);
    exp_avg_sq.back(to.exp_avg_sq + i, count);
  }
};

template <class Param, class Grad, class State, class Delta>
DRIFT_512 void update_block(const Stored<Param, Grad, State, Delta>& stored, const Coefficients& coefficients,
                            const Scalars& c, Drawn<Param, State>& drawn, int64_t count) {
  constexpr bool kWhole = std::is_same_v<State, int8_state>;  // a scale is of all its block
  const int64_t whole = kWhole ? (count % kTurn == 0 ? count : 0) : count / kTurn * kTurn;
  if (whole != 0) update_turns(stored, c, drawn, 0, whole);
  const int64_t rest = count - whole;
  if (rest == 0) return;
  if constexpr (!kWhole && !kStochastic<Param> && !kStochastic<State> && !kCoded<Delta>) {
    // Without copies: a model has many small tensors.
    Stored<Param, Grad, State, Delta> last = stored;
    last.param += whole;
    last.residual += whole;
    last.grad += whole;
    last.exp_avg += whole;
    last.exp_avg_sq += whole;
    last.delta += whole;
    return drift::update_block(last, last.delta, coefficients, drawn.param, drawn.exp_avg, drawn.exp_avg_sq, rest);
  }
  Padded<Param, Grad, State, Delta, kWhole ? kPrepared : kTurn> padded;
  update_turns(padded.of(stored, whole, rest), c, drawn, whole, (rest + kTurn - 1) / kTurn * kTurn);
  padded.back(stored, whole, rest);
}

template <class Param, class Grad, class State, class Delta>
DRIFT_512 void update_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin,
                            int64_t end) {
  if (coefficients.step == 0) return;
  constexpr bool kPrepares = kStochastic<Param> || kStochastic<State> || std::is_same_v<State, int8_state>;
  constexpr int64_t kBlock = kPrepares ? kPrepared : kChunk;
  const RandomBits random = random_bits(row, coefficients);
  const Scalars c = scalars(coefficients);
  Drawn<Param, State> drawn;
  for (int64_t block = begin; block < end; block += kBlock) {
    drawn.draw(random, block);
    update_block(Stored<Param, Grad, State, Delta>::of(row, grad, block), coefficients, c, drawn,
                 block + kBlock < end ? kBlock : end - block);
  }
}

}  // namespace drift::avx512
