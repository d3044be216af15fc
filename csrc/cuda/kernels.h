// The kernels, launched on a stream of the current device. Each call returns before they have run.
#pragma once

#include <cuda_runtime_api.h>

#include "../dtypes.h"
#include "../filling.h"
#include "bias.h"
#include "sums.h"
#include "update.h"

namespace drift {

using ChunkKernel = void (*)(Launch);

// The kernels for a combination of dtypes, of one block a chunk; null where the combination is not supported.
ChunkKernel update_kernel(DTypes dtypes);
ChunkKernel sum_kernel(DTypes dtypes);
ChunkKernel bias_kernel(DTypes dtypes);

cudaError_t launch_chunks(ChunkKernel kernel, const Launch& launch, int64_t chunks, cudaStream_t stream);

// The coefficients of a step, from the sums of grad_stats.
cudaError_t launch_fill(const Filling& filling, const Group* groups, cudaStream_t stream);

// Loads a kernel, which the driver otherwise does when it is first launched: in a capture, that fails.
cudaError_t load(ChunkKernel kernel);
cudaError_t load_fill();

}  // namespace drift
