// The plain structs that Python fills: drift_kernels/kernels/plan.py lays out the rows,
// drift_kernels/kernels/coefficients.py the coefficients, field by field. Here each struct's fields are written once,
// as a list that generates its members and their names: layout.h exports the names, so that Python rejects another
// layout.
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

// Where the elements of a shard are in the whole tensor, since their index there determines their random bits: runs of
// `width` elements begin `pitch` apart, the first at `origin`. With width 0, a single run of any length.
struct Place {
  DRIFT_PLACE_FIELDS(DRIFT_DECLARE)

  DRIFT_HD int64_t whole_index(int64_t i) const {
    const uint64_t runs = width == 0 ? 0 : static_cast<uint64_t>(i) / static_cast<uint64_t>(width);
    return origin + i + static_cast<int64_t>(runs) * (pitch - width);
  }

  // Whether each aligned group of eight elements is an aligned group of eight in the whole tensor too.
  DRIFT_HD bool keeps_eights() const { return ((origin | width | pitch) & 7) == 0; }
};

// An address is 0 if the launch has no such tensor (a delta, a residual, scales). `first_chunk` is the number of chunks
// of the tensors before this one. `random_key` and `place` are for stochastic rounding: `random_key` is seed + 2^32 *
// the tensor's index in the optimizer.
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

// Addresses and size of one tensor of a launch, which stay the same from step to step. The gradients' addresses may
// change, and are in a separate array.
struct Row {
  DRIFT_ROW_FIELDS(DRIFT_DECLARE)
  Place place;
};

inline constexpr const char* kRowNames[] = {DRIFT_ROW_FIELDS(DRIFT_QUOTE) DRIFT_PLACE_FIELDS(DRIFT_QUOTE)};
static_assert(sizeof(Row) == std::size(kRowNames) * 8, "plan.py fills 8-byte fields");

// `step` is the number of this step; 0 if the step is skipped and nothing is written.
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

// The scalars of one tensor's step, computed in float64 and rounded once.
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
