// The kernels, launched on a stream of the current device. Each call returns before they have run.
#pragma once

#include <cuda_runtime_api.h>

#include "../dtypes.h"
#include "block.h"

namespace drift {

using ChunkKernel = void (*)(Launch);

// The kernels for a combination of dtypes, of one block a chunk; null where the combination is not supported.
ChunkKernel update_kernel(DTypes dtypes);
ChunkKernel sum_kernel(DTypes dtypes);
ChunkKernel bias_kernel(DTypes dtypes);

cudaError_t launch_chunks(ChunkKernel kernel, const Launch& launch, int64_t chunks, cudaStream_t stream);

// The second stage of grad_stats, one block a tensor.
cudaError_t launch_totals(const Row* rows, const Sums* partials, Sums* out, int64_t count, cudaStream_t stream);

// Whether the current device can run what this module was compiled for.
cudaError_t check_device();

}  // namespace drift
