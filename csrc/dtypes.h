// The storage types by name, and which combinations of them have kernels, defined once for both compiled backends.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "tensors.h"

namespace drift {

// kNone: the launch has no delta.
enum class DType { kFloat32, kBFloat16, kFloat16, kStochastic, kMaster, kInt8, kFloat8, kNone };

struct DTypes {
  DType param, grad, state, delta;
};

inline DType parse_dtype(const std::optional<std::string>& name) {
  if (!name) return DType::kNone;
  if (*name == "float32") return DType::kFloat32;
  if (*name == "bfloat16") return DType::kBFloat16;
  if (*name == "float16") return DType::kFloat16;
  if (*name == "int8") return DType::kInt8;
  if (*name == "float8_e4m3fn") return DType::kFloat8;
  if (*name == "stochastic_bfloat16") return DType::kStochastic;
  if (*name == "master_bfloat16") return DType::kMaster;
  throw std::invalid_argument("unknown dtype " + *name);
}

// As drift_kernels/kernels/plan.py names them.
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

// The types that a prior is stored in.
template <class F>
auto for_delta(DType dtype, F f) -> decltype(f(Type<float>{})) {
  switch (dtype) {
    case DType::kFloat32: return f(Type<float>{});
    case DType::kBFloat16: return f(Type<bfloat16>{});
    default: return nullptr;
  }
}

template <bool kCodes, class F>
auto for_delta_or_codes(DType dtype, F f) -> decltype(f(Type<float>{})) {
  if constexpr (kCodes) {
    if (dtype == DType::kInt8) return f(Type<int8_code>{});
    if (dtype == DType::kFloat8) return f(Type<fp8_code>{});
  }
  return for_delta(dtype, f);
}

template <bool kCodes, class F>
auto for_delta_or_none(DType dtype, F f) -> decltype(f(Type<float>{})) {
  if (dtype == DType::kNone) return f(Type<Nothing>{});
  return for_delta_or_codes<kCodes>(dtype, f);
}

template <class T>
constexpr bool kIsBfloat16 =
    std::is_same_v<T, bfloat16> || std::is_same_v<T, stochastic_bfloat16> || std::is_same_v<T, master_bfloat16>;

template <class F>
auto for_param(DType dtype, F f) -> decltype(f(Type<float>{})) {
  switch (dtype) {
    case DType::kStochastic: return f(Type<stochastic_bfloat16>{});
    case DType::kMaster: return f(Type<master_bfloat16>{});
    default: return for_weight(dtype, f);
  }
}

// States are rounded like the parameter, to nearest or stochastically; with a master, either way. One-byte states and
// one-byte deltas do not combine with float16 parameters, nor one-byte deltas with float parameters.
template <class Param, class F>
auto for_state(DType dtype, F f) -> decltype(f(Type<float>{})) {
  if (dtype == DType::kFloat32) return f(Type<float>{});
  if constexpr (!std::is_same_v<Param, float16>) {
    if (dtype == DType::kInt8) return f(Type<int8_state>{});
  }
  if constexpr (!kStochastic<Param>) {
    if (dtype == DType::kBFloat16) return f(Type<bfloat16>{});
  }
  if constexpr (kStochastic<Param> || std::is_same_v<Param, master_bfloat16>) {
    if (dtype == DType::kStochastic) return f(Type<stochastic_bfloat16>{});
  }
  return nullptr;
}

// float32, or the type of the parameter in memory.
template <class Param, class F>
auto for_grad(DType dtype, F f) -> decltype(f(Type<float>{})) {
  if (dtype == DType::kFloat32) return f(Type<float>{});
  if constexpr (std::is_same_v<Param, float16>) {
    if (dtype == DType::kFloat16) return f(Type<float16>{});
  } else if constexpr (!std::is_same_v<Param, float>) {
    if (dtype == DType::kBFloat16) return f(Type<bfloat16>{});
  }
  return nullptr;
}

// f(Type<Param>, Type<Grad>, Type<State>, Type<Delta>) returns the kernel of a combination; null if there is none.
template <class F>
auto select_update(DTypes dtypes, F f) -> decltype(f(Type<float>{}, Type<float>{}, Type<float>{}, Type<float>{})) {
  using Kernel = decltype(f(Type<float>{}, Type<float>{}, Type<float>{}, Type<float>{}));
  return for_param(dtypes.param, [&](auto param) -> Kernel {
    using Param = typename decltype(param)::type;
    return for_grad<Param>(dtypes.grad, [&](auto grad) -> Kernel {
      return for_state<Param>(dtypes.state, [&](auto state) -> Kernel {
        return for_delta_or_none<kIsBfloat16<Param>>(
            dtypes.delta, [&](auto delta) -> Kernel { return f(param, grad, state, delta); });
      });
    });
  });
}

template <class Grad>
constexpr bool kIsBesideCodes = !std::is_same_v<Grad, Type<float16>>;

// f(Type<Grad>, Type<Delta>), likewise.
template <class F>
auto select_sum(DTypes dtypes, F f) -> decltype(f(Type<float>{}, Type<float>{})) {
  using Kernel = decltype(f(Type<float>{}, Type<float>{}));
  return for_weight(dtypes.grad, [&](auto grad) -> Kernel {
    constexpr bool kCodes = kIsBesideCodes<decltype(grad)>;
    return for_delta_or_none<kCodes>(dtypes.delta, [&](auto delta) -> Kernel { return f(grad, delta); });
  });
}

// Likewise, and there is always a delta.
template <class F>
auto select_bias(DTypes dtypes, F f) -> decltype(f(Type<float>{}, Type<float>{})) {
  using Kernel = decltype(f(Type<float>{}, Type<float>{}));
  return for_weight(dtypes.grad, [&](auto grad) -> Kernel {
    constexpr bool kCodes = kIsBesideCodes<decltype(grad)>;
    return for_delta_or_codes<kCodes>(dtypes.delta, [&](auto delta) -> Kernel { return f(grad, delta); });
  });
}

}  // namespace drift
