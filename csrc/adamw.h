// The element update: one function for host and device, matching drift_kernels/kernels/reference.py line by line.
//
//   g          = grad_coef*grad [- delta_coef*delta]
//   exp_avg    = beta1*exp_avg + one_minus_beta1*g
//   exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*(g*g)
//   param      = param*decay [+ delta_step*delta] - step_size*(exp_avg/(sqrt(exp_avg_sq)*inv_sqrt_bc2 + eps))
//
// Every operation rounds separately: build with -ffp-contract=off (nvcc: -fmad=false).
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

DRIFT_HD float scaled(float grad, const Coefficients& c) { return c.grad_coef * grad; }
DRIFT_HD float scaled(float grad, float delta, const Coefficients& c) { return biased(c.grad_coef * grad, delta, c); }

DRIFT_HD void update_moments(float& exp_avg, float& exp_avg_sq, float g, const Coefficients& c) {
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * g;
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * (g * g);
}

DRIFT_HD float decayed(float param, const Coefficients& c) { return param * c.decay; }
DRIFT_HD float decayed(float param, float delta, const Coefficients& c) {
  return param * c.decay + c.delta_step * delta;
}

DRIFT_HD float denominator(float root, const Coefficients& c) { return root * c.inv_sqrt_bc2 + c.eps; }

DRIFT_HD float stepped(float param, float quotient, const Coefficients& c) { return param - c.step_size * quotient; }

DRIFT_HD Element adamw_step(Element e, float g, float param, const Coefficients& c) {
  update_moments(e.exp_avg, e.exp_avg_sq, g, c);
  e.param = stepped(param, e.exp_avg / denominator(sqrtf(e.exp_avg_sq), c), c);
  return e;
}

DRIFT_HD Element adamw_update(Element e, float grad, const Coefficients& c) {
  return adamw_step(e, scaled(grad, c), decayed(e.param, c), c);
}

DRIFT_HD Element adamw_update(Element e, float grad, float delta, const Coefficients& c) {
  return adamw_step(e, scaled(grad, delta, c), decayed(e.param, delta, c), c);
}

}  // namespace drift
