// The element update: one function for host and device, line by line that of drift_kernels/kernels/reference.py.
//
//   g          = grad_coef*grad [- delta_coef*delta]
//   exp_avg    = beta1*exp_avg + one_minus_beta1*g
//   exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*(g*g)
//   param      = param*decay [+ delta_step*delta] - step_size*(exp_avg/(sqrt(exp_avg_sq)*inv_sqrt_bc2 + eps))
//
// Every operation is rounded by itself: build with -ffp-contract=off (nvcc: -fmad=false).
#pragma once

#include <cmath>

#include "rounding.h"
#include "table.h"

namespace drift {

struct Element {
  float param;
  float exp_avg;
  float exp_avg_sq;
};

DRIFT_HD float biased(float grad, float delta, const Coefficients& c) { return grad - c.delta_coef * delta; }

DRIFT_HD Element adamw_step(Element e, float g, float param, const Coefficients& c) {
  e.exp_avg = c.beta1 * e.exp_avg + c.one_minus_beta1 * g;
  e.exp_avg_sq = c.beta2 * e.exp_avg_sq + c.one_minus_beta2 * (g * g);
  e.param = param - c.step_size * (e.exp_avg / (sqrtf(e.exp_avg_sq) * c.inv_sqrt_bc2 + c.eps));
  return e;
}

DRIFT_HD Element adamw_update(Element e, float grad, const Coefficients& c) {
  return adamw_step(e, c.grad_coef * grad, e.param * c.decay, c);
}

DRIFT_HD Element adamw_update(Element e, float grad, float delta, const Coefficients& c) {
  const float g = biased(c.grad_coef * grad, delta, c);
  return adamw_step(e, g, e.param * c.decay + c.delta_step * delta, c);
}

}  // namespace drift
