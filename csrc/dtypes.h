// The storage types by name, and which combinations of them have kernels: written here once, for every backend.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "chunk.h"

namespace drift {

// kNone is the delta of a launch without a prior.
enum class DType { kFloat32, kBFloat16, kFloat16, kNone };

struct DTypes {
  DType param, grad, state, delta;
};

inline DType parse_dtype(const std::optional<std::string>& name) {
  if (!name) return DType::kNone;
  if (*name == "float32") return DType::kFloat32;
  if (*name == "bfloat16") return DType::kBFloat16;
  if (*name == "float16") return DType::kFloat16;
  throw std::invalid_argument("unknown dtype " + *name);
}

// As drift_kernels/plan.py names them.
using DTypeName = std::optional<std::string>;
using DTypeNames = std::tuple<DTypeName, DTypeName, DTypeName, DTypeName>;

inline DTypes parse_dtypes(const DTypeNames& names) {
  const auto& [param, grad, state, delta] = names;
  return {parse_dtype(param), parse_dtype(grad), parse_dtype(state), parse_dtype(delta)};
}

template <class T>
struct Type {
  using type = T;
};

template <class F>
auto for_weight(DType dtype, F f) -> decltype(f(Type<float>{})) {
  switch (dtype) {
    case DType::kFloat32: return f(Type<float>{});
    case DType::kBFloat16: return f(Type<bfloat16>{});
    case DType::kFloat16: return f(Type<float16>{});
    default: return nullptr;
  }
}

template <class F>
auto for_state(DType dtype, F f) -> decltype(f(Type<float>{})) {
  switch (dtype) {
    case DType::kFloat32: return f(Type<float>{});
    case DType::kBFloat16: return f(Type<bfloat16>{});
    default: return nullptr;
  }
}

template <class F>
auto for_delta(DType dtype, F f) -> decltype(f(Type<float>{})) {
  return dtype == DType::kNone ? f(Type<NoDelta>{}) : for_state(dtype, f);
}

// f(Type<Param>, Type<Grad>, Type<State>, Type<Delta>) gives the kernel of a combination; null where there is none.
template <class F>
auto select_update(DTypes dtypes, F f) -> decltype(f(Type<float>{}, Type<float>{}, Type<float>{}, Type<float>{})) {
  using Kernel = decltype(f(Type<float>{}, Type<float>{}, Type<float>{}, Type<float>{}));
  return for_weight(dtypes.param, [&](auto param) -> Kernel {
    const auto with_grad = [&](auto grad) -> Kernel {
      return for_state(dtypes.state, [&](auto state) -> Kernel {
        return for_delta(dtypes.delta, [&](auto delta) -> Kernel { return f(param, grad, state, delta); });
      });
    };
    if (dtypes.grad == DType::kFloat32) return with_grad(Type<float>{});
    return dtypes.grad == dtypes.param ? with_grad(param) : nullptr;
  });
}

// f(Type<Grad>, Type<Delta>), likewise.
template <class F>
auto select_sum(DTypes dtypes, F f) -> decltype(f(Type<float>{}, Type<float>{})) {
  using Kernel = decltype(f(Type<float>{}, Type<float>{}));
  return for_weight(dtypes.grad, [&](auto grad) -> Kernel {
    return for_delta(dtypes.delta, [&](auto delta) -> Kernel { return f(grad, delta); });
  });
}

}  // namespace drift
