// One chunk of one tensor: load, update, store; or the two sums of grad_stats.
#pragma once

#include <type_traits>

#include "adamw.h"

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

struct NoDelta {};  // stands for the delta's type in a launch without a prior

template <class T>
DRIFT_HD T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// The tensors of one row under their types, from element `begin` on.
template <class Param, class Grad, class State, class Delta>
struct Tensors {
  Param* __restrict param;
  const Grad* __restrict grad;
  State* __restrict exp_avg;
  State* __restrict exp_avg_sq;
  const Delta* __restrict delta;

  static DRIFT_HD Tensors of(const Row& row, uint64_t grad, int64_t begin = 0) {
    return {pointer<Param>(row.param) + begin, pointer<const Grad>(grad) + begin, pointer<State>(row.exp_avg) + begin,
            pointer<State>(row.exp_avg_sq) + begin, pointer<const Delta>(row.delta) + begin};
  }

  DRIFT_HD Element load(int64_t i) const { return {to_float(param[i]), to_float(exp_avg[i]), to_float(exp_avg_sq[i])}; }

  DRIFT_HD Element update(Element e, int64_t i, const Coefficients& c) const {
    if constexpr (std::is_same_v<Delta, NoDelta>) {
      return adamw_update(e, to_float(grad[i]), c);
    } else {
      return adamw_update(e, to_float(grad[i]), to_float(delta[i]), c);
    }
  }

  DRIFT_HD void store(int64_t i, Element e) const {
    param[i] = round_to<Param>(e.param);
    exp_avg[i] = round_to<State>(e.exp_avg);
    exp_avg_sq[i] = round_to<State>(e.exp_avg_sq);
  }
};

template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_chunk(const Row& row, uint64_t grad, const Coefficients& coefficients, int64_t begin,
                           int64_t end) {
  const auto tensors = Tensors<Param, Grad, State, Delta>::of(row, grad);
  const Coefficients c = coefficients;
  DRIFT_INDEPENDENT
  for (int64_t i = begin; i < end; ++i) {
    Element e = tensors.load(i);
    e = tensors.update(e, i, c);
    tensors.store(i, e);
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
  constexpr bool kHasDelta = !std::is_same_v<Delta, NoDelta>;
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
