// The parameters of the kernel that fills coefficients. drift_kernels/kernels/filling.py lays them out in 8-byte words.
// As in table.h, each field is written once, and layout.h exports the names to Python.
#pragma once

#include <iterator>

#include "table.h"

namespace drift {

#define DRIFT_DECLARE(type, name) type name;
#define DRIFT_QUOTE(type, name) #name,

// A number, or a one-element tensor that is read on the device: then `name_bytes` is 4 (float32) or 8 (float64), else
// 0.
#define DRIFT_SCALAR(FIELD, name) FIELD(double, name) FIELD(uint64_t, name##_address) FIELD(int64_t, name##_bytes)

// A param group's hyperparameters for a step: the fields of coefficients.Row, and eps. The terms of a scaling are those
// of scalings.py.
#define DRIFT_GROUP_FIELDS(FIELD) \
  DRIFT_SCALAR(FIELD, lr)         \
  FIELD(double, weight_decay)     \
  FIELD(double, beta1)            \
  FIELD(double, beta2)            \
  FIELD(double, sign)             \
  DRIFT_SCALAR(FIELD, alpha)      \
  FIELD(double, absolute)         \
  FIELD(double, normalized)       \
  FIELD(double, by_ratio)         \
  FIELD(double, by_cosine)        \
  FIELD(double, decoupled)        \
  FIELD(double, eps)

struct Group {
  DRIFT_GROUP_FIELDS(DRIFT_DECLARE)
};

inline constexpr const char* kGroupNames[] = {DRIFT_GROUP_FIELDS(DRIFT_QUOTE)};
static_assert(sizeof(Group) == std::size(kGroupNames) * 8, "filling.py fills 8-byte words");

// n rows, each with one entry in the arrays at these addresses: float64, except `stats` (Sums), `group_of` (int32),
// `steps` (float32) and `coefficients`. `bias`, `cosine`, `ratio` and `grad_norm` are written. `with_stats`: uses the
// sums. `clips`: clips the gradients' norm to max_grad_norm. `advances`: counts the step, unless found_inf is nonzero.
#define DRIFT_FILLING_FIELDS(FIELD) \
  FIELD(int64_t, count)             \
  FIELD(int64_t, groups)            \
  FIELD(int64_t, advances)          \
  FIELD(int64_t, with_stats)        \
  FIELD(int64_t, clips)             \
  FIELD(double, max_grad_norm)      \
  DRIFT_SCALAR(FIELD, scale)        \
  DRIFT_SCALAR(FIELD, found_inf)    \
  FIELD(uint64_t, stats)            \
  FIELD(uint64_t, delta_norm)       \
  FIELD(uint64_t, inv_delta_norm)   \
  FIELD(uint64_t, norm_ratio)       \
  FIELD(uint64_t, factor)           \
  FIELD(uint64_t, group_of)         \
  FIELD(uint64_t, steps)            \
  FIELD(uint64_t, coefficients)     \
  FIELD(uint64_t, bias)             \
  FIELD(uint64_t, cosine)           \
  FIELD(uint64_t, ratio)            \
  FIELD(uint64_t, grad_norm)

struct Filling {
  DRIFT_FILLING_FIELDS(DRIFT_DECLARE)
};

inline constexpr const char* kFillingNames[] = {DRIFT_FILLING_FIELDS(DRIFT_QUOTE)};
static_assert(sizeof(Filling) == std::size(kFillingNames) * 8, "filling.py fills 8-byte words");

#undef DRIFT_FILLING_FIELDS
#undef DRIFT_GROUP_FIELDS
#undef DRIFT_SCALAR
#undef DRIFT_QUOTE
#undef DRIFT_DECLARE

// As many as fit into a kernel's parameters.
constexpr int64_t kMaxGroups = 240;
static_assert(sizeof(Filling) + kMaxGroups * sizeof(Group) <= 32764, "the limit on kernel parameters");

}  // namespace drift
