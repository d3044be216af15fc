// The plain structs that cross from Python: drift_kernels/kernels/plan.py lays out the rows,
// drift_kernels/kernels/coefficients.py the coefficients, field by field. Here a struct's fields are written once, as a
// list that makes its members and its names: layout.h tells Python the names, so that no other layout is ever run.
#pragma once

#include <iterator>

#include "rounding.h"

namespace drift {

#define DRIFT_DECLARE(type, name) type name;
#define DRIFT_QUOTE(type, name) #name,

#define DRIFT_PLACE_FIELDS(FIELD) \
  FIELD(int64_t, origin)          \
  FIELD(int64_t, width)           \
  FIELD(int64_t, pitch)

// Where the elements of a shard are in the whole tensor, whose index they draw their bits by: runs of `width` elements
// begin `pitch` apart, the first at `origin`. One run, of whatever length, where width is 0.
struct Place {
  DRIFT_PLACE_FIELDS(DRIFT_DECLARE)

  DRIFT_HD int64_t whole_index(int64_t i) const {
    const uint64_t runs = width == 0 ? 0 : static_cast<uint64_t>(i) / static_cast<uint64_t>(width);
    return origin + i + static_cast<int64_t>(runs) * (pitch - width);
  }

  // Whether eight elements from a multiple of eight on are so in the whole tensor too.
  DRIFT_HD bool keeps_eights() const { return ((origin | width | pitch) & 7) == 0; }
};

// An address is 0 where the launch does not have it: a delta, a residual, scales. `first_chunk` counts the chunks of
// the tensors before this one. `random_key` and `place` are for its stochastic rounding: seed + 2^32 * index among the
// optimizer's tensors.
#define DRIFT_ROW_FIELDS(FIELD)     \
  FIELD(uint64_t, param)            \
  FIELD(uint64_t, residual)         \
  FIELD(uint64_t, exp_avg)          \
  FIELD(uint64_t, exp_avg_scale)    \
  FIELD(uint64_t, exp_avg_sq)       \
  FIELD(uint64_t, exp_avg_sq_scale) \
  FIELD(uint64_t, delta)            \
  FIELD(uint64_t, delta_scale)      \
  FIELD(int64_t, numel)             \
  FIELD(int64_t, first_chunk)       \
  FIELD(uint64_t, random_key)

// Addresses and size of one tensor of a launch: what stays from step to step. The gradients' addresses, which may
// change, are an array of their own.
struct Row {
  DRIFT_ROW_FIELDS(DRIFT_DECLARE)
  Place place;
};

inline constexpr const char* kRowNames[] = {DRIFT_ROW_FIELDS(DRIFT_QUOTE) DRIFT_PLACE_FIELDS(DRIFT_QUOTE)};
static_assert(sizeof(Row) == std::size(kRowNames) * 8, "plan.py fills 8-byte fields");

// `step` is how many this one makes; 0 if it is not taken: then nothing is written.
#define DRIFT_COEFFICIENTS(FIELD) \
  FIELD(float, grad_coef)         \
  FIELD(float, delta_coef)        \
  FIELD(float, delta_step)        \
  FIELD(float, decay)             \
  FIELD(float, beta1)             \
  FIELD(float, one_minus_beta1)   \
  FIELD(float, beta2)             \
  FIELD(float, one_minus_beta2)   \
  FIELD(float, step_size)         \
  FIELD(float, inv_sqrt_bc2)      \
  FIELD(float, eps)               \
  FIELD(float, step)

// The scalars of one tensor's step. Computed in float64 and rounded once.
struct Coefficients {
  DRIFT_COEFFICIENTS(DRIFT_DECLARE)
};

inline constexpr const char* kCoefficientNames[] = {DRIFT_COEFFICIENTS(DRIFT_QUOTE)};
static_assert(sizeof(Coefficients) == std::size(kCoefficientNames) * 4, "coefficients.py fills 4-byte fields");

#undef DRIFT_COEFFICIENTS
#undef DRIFT_ROW_FIELDS
#undef DRIFT_PLACE_FIELDS
#undef DRIFT_QUOTE
#undef DRIFT_DECLARE

// A chunk is the unit of work of one thread (cpu) or block (gpu), and of the first stage of a reduction.
constexpr int64_t kChunk = 16384;

DRIFT_HD constexpr int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

}  // namespace drift
