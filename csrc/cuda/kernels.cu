#include "kernels.h"

namespace drift {
namespace {

// Blocks per multiprocessor. They leave each thread enough registers to hold a turn; together 42 to 123 KB are in
// flight.
template <class Param, class Grad, class State, class Delta>
constexpr int kUpdateBlocks = [] {
  if (sizeof(Grad) == 4 && sizeof(State) == 4) return 2;
  const bool is_plain = (std::is_same_v<Param, bfloat16> || std::is_same_v<Param, float16>) && sizeof(State) > 1;
  return is_plain && !kCoded<Delta> ? 4 : 3;
}();
constexpr int kSumBlocks = 4;
constexpr int kBiasBlocks = 4;

template <class Param, class Grad, class State, class Delta>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<Param, Grad, State, Delta>)
    update(const __grid_constant__ Launch launch) {
  update_block<Param, Grad, State, Delta>(launch, blockIdx.x);
}

template <class Grad, class Delta>
__global__ void __launch_bounds__(kThreads, kSumBlocks) sum(const __grid_constant__ Launch launch) {
  __shared__ Sums sums[kThreads / kWarp];
  sum_block<Grad, Delta>(launch, blockIdx.x, sums);
}

template <class Grad, class Delta>
__global__ void __launch_bounds__(kThreads, kBiasBlocks) bias(const __grid_constant__ Launch launch) {
  bias_block<Grad, Delta>(launch, blockIdx.x);
}

template <class T>
using Unwrap = typename T::type;

}  // namespace

ChunkKernel update_kernel(DTypes dtypes) {
  return select_update(dtypes, [](auto p, auto g, auto s, auto d) -> ChunkKernel {
    return update<Unwrap<decltype(p)>, Unwrap<decltype(g)>, Unwrap<decltype(s)>, Unwrap<decltype(d)>>;
  });
}

ChunkKernel sum_kernel(DTypes dtypes) {
  return select_sum(dtypes, [](auto grad, auto delta) -> ChunkKernel {
    return sum<Unwrap<decltype(grad)>, Unwrap<decltype(delta)>>;
  });
}

ChunkKernel bias_kernel(DTypes dtypes) {
  return select_bias(dtypes, [](auto grad, auto delta) -> ChunkKernel {
    return bias<Unwrap<decltype(grad)>, Unwrap<decltype(delta)>>;
  });
}

cudaError_t launch_chunks(ChunkKernel kernel, const Launch& launch, int64_t chunks, cudaStream_t stream) {
  kernel<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t load(ChunkKernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace drift
