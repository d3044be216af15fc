// Launches the kernels on a stream of the current device. Each call is asynchronous.
#pragma once

#include <cuda_runtime_api.h>

#include "../dtypes.h"
#include "../filling.h"
#include "bias.h"
#include "sums.h"
#include "update.h"

namespace drift {

using ChunkKernel = void (*)(Launch);

// The kernels for a combination of dtypes, with one block per chunk; null if it is not supported.
ChunkKernel update_kernel(DTypes dtypes);
ChunkKernel sum_kernel(DTypes dtypes);
ChunkKernel bias_kernel(DTypes dtypes);

cudaError_t launch_chunks(ChunkKernel kernel, const Launch& launch, int64_t chunks, cudaStream_t stream);

// Fills the coefficients of a step from the sums of grad_stats.
cudaError_t launch_fill(const Filling& filling, const Group* groups, cudaStream_t stream);

// Loads a kernel. Otherwise the driver loads it at its first launch, which fails during a graph capture.
cudaError_t load(ChunkKernel kernel);
cudaError_t load_fill();

}  // namespace drift
