// The layout that a library was built with. drift_kernels/kernels/layout.py compares it with Python's: a library built
// from other sources could mistake one column of a table for another, or an integer for an address.
#pragma once

#include "codes.h"
#include "filling.h"

namespace drift {

static_assert(kChunk % kScaleBlock == 0, "a chunk begins with a block of codes");

// Calls names(key, array of names) or number(key, value) for each part, with the keys of layout.LAYOUT.
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
