#include <algorithm>

#include "coefficients.h"
#include "kernels.h"

namespace drift {
namespace {

template <int64_t kGroups>
__global__ void __launch_bounds__(kFillThreads, 1) fill(const __grid_constant__ Fill<kGroups> given) {
  __shared__ double squares[kFillThreads];
  fill_block(given.filling, given.groups, squares);
}

template <int64_t kGroups>
cudaError_t launch(const Filling& filling, const Group* groups, cudaStream_t stream) {
  Fill<kGroups> given;  // unused groups stay uninitialized
  given.filling = filling;
  std::copy_n(groups, filling.groups, given.groups);
  fill<kGroups><<<1, kFillThreads, 0, stream>>>(given);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fill(const Filling& filling, const Group* groups, cudaStream_t stream) {
  return filling.groups <= kFewGroups ? launch<kFewGroups>(filling, groups, stream)
                                      : launch<kMaxGroups>(filling, groups, stream);
}

cudaError_t load_fill() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, fill<kFewGroups>);
  return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, fill<kMaxGroups>);
}

}  // namespace drift
