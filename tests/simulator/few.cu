// Some of the project's kernels, which compile in seconds.
#define select_update select_every_update
#include "../../csrc/dtypes.h"
#undef select_update

namespace drift {

// Replaces the selection of all combinations.
template <class F>
auto select_update(DTypes dtypes, F f) -> decltype(f(Type<float>{}, Type<float>{}, Type<float>{}, Type<float>{})) {
  const auto is = [&](DType param, DType grad, DType state, DType delta) {
    return dtypes.param == param && dtypes.grad == grad && dtypes.state == state && dtypes.delta == delta;
  };
  if (is(DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16)) {
    return f(Type<bfloat16>{}, Type<bfloat16>{}, Type<bfloat16>{}, Type<bfloat16>{});
  }
  if (is(DType::kStochastic, DType::kBFloat16, DType::kInt8, DType::kInt8)) {
    return f(Type<stochastic_bfloat16>{}, Type<bfloat16>{}, Type<int8_state>{}, Type<int8_code>{});
  }
  if (is(DType::kMaster, DType::kFloat32, DType::kFloat32, DType::kFloat8)) {
    return f(Type<master_bfloat16>{}, Type<float>{}, Type<float>{}, Type<fp8_code>{});
  }
  return nullptr;
}

}  // namespace drift

#include "../../csrc/cuda/kernels.cu"
