// Exports shared by the modules of both compiled backends.
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>

#include "layout.h"

namespace drift {

// LAYOUT: a dict whose values are tuples of str, or ints.
inline void export_layout(pybind11::module_& m) {
  pybind11::dict layout;
  for_each_part(
      [&](const char* key, const auto& names) {
        pybind11::tuple all(std::size(names));
        for (size_t i = 0; i < std::size(names); ++i) all[i] = names[i];
        layout[key] = all;
      },
      [&](const char* key, int64_t value) { layout[key] = value; });
  m.attr("LAYOUT") = layout;
}

}  // namespace drift
