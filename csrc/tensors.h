// Shared by the kernels of every device: the tensors of a row, and an element's load, update, store.
#pragma once

#include <type_traits>

#include "adamw.h"
#include "codes.h"
#include "philox.h"

namespace drift {

struct Nothing {};  // the type of a tensor that a launch does not have: a delta, a residual

template <class Param>
using Residual = std::conditional_t<std::is_same_v<Param, master_bfloat16>, int16_t, Nothing>;

// One-byte states: each of the two has its own kind of code.
struct int8_state {};

template <class State>
using ExpAvg = std::conditional_t<std::is_same_v<State, int8_state>, moment_code, State>;

template <class State>
using ExpAvgSq = std::conditional_t<std::is_same_v<State, int8_state>, variance_code, State>;

template <class T>
constexpr bool kStochastic = std::is_same_v<T, stochastic_bfloat16>;

template <class T>
DRIFT_HD T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

DRIFT_HD RandomBits random_bits(const Row& row, const Coefficients& c) {
  return {row.random_key, static_cast<uint32_t>(c.step), &row.place};
}

// An element's random bits; its tensors use those that they need.
struct Draw {
  uint32_t param;
  uint32_t exp_avg;
  uint32_t exp_avg_sq;
};

// The tensors of one row as stored. `moved` advances them by elements; with codes, the current start or the number of
// elements must be a multiple of kScaleBlock.
template <class Param, class Grad, class State, class Delta>
struct Stored {
  Param* __restrict param;
  Residual<Param>* __restrict residual;
  const Grad* __restrict grad;
  ExpAvg<State>* __restrict exp_avg;
  float* __restrict exp_avg_scale;
  ExpAvgSq<State>* __restrict exp_avg_sq;
  float* __restrict exp_avg_sq_scale;
  const Delta* __restrict delta;
  const float* __restrict delta_scale;

  static DRIFT_HD Stored of(const Row& row, uint64_t grad, int64_t begin) {
    return Stored{pointer<Param>(row.param),
                  pointer<Residual<Param>>(row.residual),
                  pointer<const Grad>(grad),
                  pointer<ExpAvg<State>>(row.exp_avg),
                  pointer<float>(row.exp_avg_scale),
                  pointer<ExpAvgSq<State>>(row.exp_avg_sq),
                  pointer<float>(row.exp_avg_sq_scale),
                  pointer<const Delta>(row.delta),
                  pointer<const float>(row.delta_scale)}
        .moved(begin);
  }

  DRIFT_HD Stored moved(int64_t elements) const {
    const int64_t scales = elements / kScaleBlock;
    return {param + elements,          residual + elements,    grad + elements,
            exp_avg + elements,        exp_avg_scale + scales, exp_avg_sq + elements,
            exp_avg_sq_scale + scales, delta + elements,       delta_scale + scales};
  }
};

// A gradient and its delta, likewise.
template <class Grad, class Delta>
struct GradAndDelta {
  Grad* __restrict grad;
  const Delta* __restrict delta;
  const float* __restrict delta_scale;

  static DRIFT_HD GradAndDelta of(const Row& row, uint64_t grad, int64_t begin) {
    return GradAndDelta{pointer<Grad>(grad), pointer<const Delta>(row.delta), pointer<const float>(row.delta_scale)}
        .moved(begin);
  }

  DRIFT_HD GradAndDelta moved(int64_t elements) const {
    return {grad + elements, delta + elements, delta_scale + elements / kScaleBlock};
  }
};

// The elements to compute on: tensors, or values loaded and decoded from them.
template <class Param, class Grad, class M, class V, class Delta>
struct Tensors {
  Param* __restrict param;
  Residual<Param>* __restrict residual;
  const Grad* __restrict grad;
  M* __restrict exp_avg;
  V* __restrict exp_avg_sq;
  const Delta* __restrict delta;

  DRIFT_HD float load_param(int64_t i) const {
    if constexpr (std::is_same_v<Param, master_bfloat16>) {
      return join(param[i], residual[i]);
    } else {
      return to_float(param[i]);
    }
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
    exp_avg[i] = rounded<M>(e.exp_avg, draw.exp_avg);
    exp_avg_sq[i] = rounded<V>(e.exp_avg_sq, draw.exp_avg_sq);
  }

 private:
  template <class T>
  static DRIFT_HD T rounded(float x, [[maybe_unused]] uint32_t random) {
    if constexpr (kStochastic<T>) {
      return round_stochastically(x, random);
    } else {
      return round_to<T>(x);
    }
  }
};

// An element of any type as a float; only a code has a scale.
template <class T>
DRIFT_HD float value(T x, [[maybe_unused]] float scale) {
  if constexpr (kCoded<T>) {
    return decode(x, scale);
  } else {
    return to_float(x);
  }
}

struct Sums {
  double grad_grad;
  double grad_delta;
};

}  // namespace drift
