// What a library was built with and Python relies on. drift_kernels/kernels/layout.py compares it with what Python has:
// one built from other sources would take a column of a table for another, an integer for an address.
#pragma once

#include "codes.h"
#include "filling.h"

namespace drift {

static_assert(kChunk % kScaleBlock == 0, "a chunk begins with a block of codes");

// Calls names(key, array of names) and number(key, value) for the parts, whose keys are those of layout.LAYOUT.
template <class Names, class Number>
void for_each_part(Names names, Number number) {
  names("row", kRowNames);
  names("coefficients", kCoefficientNames);
  names("filling", kFillingNames);
  names("group", kGroupNames);
  number("groups", kMaxGroups);
  number("chunk", kChunk);
  number("block", int64_t{kScaleBlock});
}

}  // namespace drift
