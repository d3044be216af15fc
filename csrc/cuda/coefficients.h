// Fills the coefficients of a step on the device. Matches drift_kernels/kernels/coefficients.py, which describes them,
// line by line. One block of kFillThreads threads; thread t takes rows t, t + kFillThreads, ...
//
// Compiled for the device, and for the host, where the tests run it. All arithmetic is float64; every operation rounds
// separately (nvcc: -fmad=false), and division and square root are correctly rounded.
#pragma once

#include <cmath>

#include "../filling.h"
#include "access.h"

namespace drift {

constexpr int kFillThreads = 512;  // coefficients.LANES
constexpr double kClipEpsilon = 1e-6;

// The groups are kernel parameters: a few, or as many as fit.
template <int64_t kGroups>
struct Fill {
  Filling filling;
  Group groups[kGroups];
};
constexpr int64_t kFewGroups = 8;

template <class F>
DRIFT_HD void each_fill_thread(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kFillThreads; ++thread) f(thread);
#endif
}

DRIFT_HD double scalar(double number, uint64_t address, int64_t bytes) {
  if (bytes == 0) return number;
  return bytes == 4 ? static_cast<double>(*pointer<const float>(address)) : *pointer<const double>(address);
}

// beta^count in the multiplication order of kernels/counts.py: a tree over the bits of the count. This is the factor of
// eight of those bits. `square` is beta^(2^k) for the first of them, and is advanced to that of the next eight.
DRIFT_HD double power_of_byte(double& square, uint32_t byte) {
  double leaves[8];
  DRIFT_UNROLL
  for (int bit = 0; bit < 8; ++bit) {
    leaves[bit] = (byte >> bit & 1) != 0 ? square : 1.0;
    square *= square;
  }
  return ((leaves[0] * leaves[1]) * (leaves[2] * leaves[3])) * ((leaves[4] * leaves[5]) * (leaves[6] * leaves[7]));
}

DRIFT_HD double power(double beta, uint32_t count) {
  double product[4];
  DRIFT_UNROLL
  for (int place = 0; place < 4; ++place) {
    const uint32_t rest = count >> (8 * place);
    product[place] = rest == 0 ? 1.0 : power_of_byte(beta, rest & 255);
  }
  return (product[0] * product[1]) * (product[2] * product[3]);
}

// Values shared by all rows.
struct Common {
  double inv_scale;
  bool taken;
};

// Fills a row except for the gradient's and the delta's coefficients. Returns the row's contribution to norm(g')^2.
DRIFT_HD double fill_row(const Filling& f, const Group& group, const Common& common, int64_t row) {
  Coefficients& out = pointer<Coefficients>(f.coefficients)[row];
  const double lr = scalar(group.lr, group.lr_address, group.lr_bytes);
  const double alpha = scalar(group.alpha, group.alpha_address, group.alpha_bytes) * pointer<double>(f.factor)[row];
  const double delta_norm = pointer<double>(f.delta_norm)[row];
  const double inv_delta_norm = pointer<double>(f.inv_delta_norm)[row];

  if (f.advances != 0) {
    float& steps = pointer<float>(f.steps)[row];
    if (common.taken) steps += 1.0F;
    const auto count = static_cast<uint32_t>(static_cast<int64_t>(steps));
    out.decay = static_cast<float>(1.0 - lr * group.weight_decay);
    out.beta1 = static_cast<float>(group.beta1);
    out.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
    out.beta2 = static_cast<float>(group.beta2);
    out.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
    out.step_size = static_cast<float>(lr / (1.0 - power(group.beta1, count)));
    out.inv_sqrt_bc2 = static_cast<float>(1.0 / sqrt(1.0 - power(group.beta2, count)));
    out.eps = static_cast<float>(group.eps);
    out.step = common.taken ? steps : 0.0F;
    out.delta_step = static_cast<float>(lr * alpha * group.decoupled);
  }

  double c = alpha * (group.absolute + group.normalized * pointer<double>(f.norm_ratio)[row]);
  double squared = 0.0;
  if (f.with_stats != 0) {
    const Sums sums = pointer<Sums>(f.stats)[row];
    const double grad_grad = sums.grad_grad * (common.inv_scale * common.inv_scale);
    const double grad_delta = sums.grad_delta * common.inv_scale;
    const double grad_norm = sqrt(grad_grad);
    const double ratio = (std::isfinite(grad_norm) ? grad_norm : 0.0) * inv_delta_norm;
    const double along = group.sign * grad_delta;
    double cosine = along / grad_norm * inv_delta_norm;
    cosine = std::isnan(cosine) ? 0.0 : cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine;
    c = c + alpha * ratio * (group.by_ratio + group.by_cosine * cosine);
    const double pull = fabs(c) * delta_norm;
    const double of_grad = pull / grad_norm;
    pointer<double>(f.cosine)[row] = cosine;
    pointer<double>(f.ratio)[row] = std::isnan(of_grad) ? 0.0 : of_grad;
    squared = grad_grad - 2.0 * c * along + pull * pull;
  }
  pointer<double>(f.bias)[row] = c;
  return squared;
}

// `squares` is shared by the threads.
DRIFT_HD void fill_block(const Filling& f, const Group* groups, double* squares) {
  const auto group_of = [&](int64_t row) -> const Group& { return groups[pointer<const int32_t>(f.group_of)[row]]; };
  const Common common{1.0 / scalar(f.scale, f.scale_address, f.scale_bytes),
                      scalar(f.found_inf, f.found_inf_address, f.found_inf_bytes) == 0.0};
  each_fill_thread([&](int thread) {
    double own = 0.0;
    DRIFT_KEEP_ROLLED
    for (int64_t row = thread; row < f.count; row += kFillThreads) own += fill_row(f, group_of(row), common, row);
    squares[thread] = own;
  });
  double norm = 0.0;
  double clip = 1.0;
  if (f.clips != 0) {
    for (int half = kFillThreads / 2; half > 0; half /= 2) {
      each_fill_thread([&](int thread) {
        if (thread < half) squares[thread] += squares[thread + half];
      });
    }
    // A NaN propagates to all rows.
    norm = sqrt(squares[0] < 0.0 ? 0.0 : squares[0]);
    clip = 1.0 / (norm + kClipEpsilon) * f.max_grad_norm;
    if (clip > 1.0) clip = 1.0;
  }
  each_fill_thread([&](int thread) {
    if (thread == 0 && f.clips != 0) *pointer<double>(f.grad_norm) = norm;
    DRIFT_KEEP_ROLLED
    for (int64_t row = thread; row < f.count; row += kFillThreads) {
      Coefficients& out = pointer<Coefficients>(f.coefficients)[row];
      out.grad_coef = static_cast<float>(group_of(row).sign * (clip * common.inv_scale));
      out.delta_coef = static_cast<float>(pointer<double>(f.bias)[row] * clip);
    }
  });
}

}  // namespace drift
