// The plain structs that cross from Python. drift_kernels/plan.py and drift_kernels/coefficients.py lay them out field
// by field.
#pragma once

#include "rounding.h"

namespace drift {

// Where the elements of a shard are in the whole tensor, whose index they draw their bits by: runs of `width` elements
// begin `pitch` apart, the first at `origin`. One run, of whatever length, where width is 0.
struct Place {
  int64_t origin;
  int64_t width;
  int64_t pitch;

  DRIFT_HD int64_t whole_index(int64_t i) const {
    const uint64_t runs = width == 0 ? 0 : static_cast<uint64_t>(i) / static_cast<uint64_t>(width);
    return origin + i + static_cast<int64_t>(runs) * (pitch - width);
  }

  // Whether eight elements from a multiple of eight on are so in the whole tensor too.
  DRIFT_HD bool keeps_eights() const { return ((origin | width | pitch) & 7) == 0; }
};

// Addresses and size of one tensor of a launch: what stays from step to step. An address is 0 where the launch does not
// have it: a delta, a residual, scales. The gradients' addresses, which may change, are an array of their own.
struct Row {
  uint64_t param;
  uint64_t residual;
  uint64_t exp_avg;
  uint64_t exp_avg_scale;
  uint64_t exp_avg_sq;
  uint64_t exp_avg_sq_scale;
  uint64_t delta;
  uint64_t delta_scale;
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before this one
  uint64_t random_key;  // of its stochastic rounding: seed + 2^32 * index among the optimizer's tensors
  Place place;          // for the same
};
static_assert(sizeof(Row) == 14 * 8, "plan.py fills fourteen 8-byte fields");

// The scalars of one tensor's step. Computed in float64 and rounded once.
struct Coefficients {
  float grad_coef;
  float delta_coef;
  float delta_step;
  float decay;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;
  float inv_sqrt_bc2;
  float eps;
  float step;  // how many this one makes; 0 if it is not taken: then nothing is written
};
static_assert(sizeof(Coefficients) == 12 * 4, "coefficients.py fills twelve 4-byte fields");

// A chunk is the unit of work of one thread (cpu) or block (gpu), and of the first stage of a reduction.
constexpr int64_t kChunk = 16384;

DRIFT_HD constexpr int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

}  // namespace drift
