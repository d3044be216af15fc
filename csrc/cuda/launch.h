// The parameters of a kernel, and which part of them each block processes.
//
// kernels.cu compiles the kernels' bodies (update.h, sums.h, bias.h) for the device; the tests compile them for the
// host, run every thread of a grid and compare bitwise.
#pragma once

#include "access.h"

namespace drift {

// As many as fit into the 32,764 bytes of a kernel's parameters (CUDA 12.1 and newer).
constexpr int64_t kMaxRows = 4080;

// The parameters of a kernel. Rows and coefficients stay in device memory from step to step. The gradients' addresses
// may change in any step, so they are kernel parameters: no copy, no buffer to keep alive, and a captured graph keeps
// its own.
struct Launch {
  const Row* rows;
  const int32_t* chunk_rows;  // the row of each chunk
  const Coefficients* coefficients;
  Sums* partials;     // of each chunk
  Sums* totals;       // of each row
  uint32_t* arrived;  // per row, how many chunks have stored their partial sums: 0 before and after a launch
  int64_t first_row;
  int64_t first_chunk;
  uint64_t grads[kMaxRows];  // from first_row on
};
static_assert(sizeof(Launch) <= 32764, "the limit on kernel parameters");

#if defined(__CUDA_ARCH__)
constexpr bool kIsDevice = true;
DRIFT_HD int own_thread() { return static_cast<int>(threadIdx.x); }
#else
constexpr bool kIsDevice = false;
DRIFT_HD int own_thread() { return 0; }
#endif

// Runs f for the threads of a block up to a barrier: on the device for the calling thread, on the host for all of them,
// one after another.
template <class F>
DRIFT_HD void each_thread(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kThreads; ++thread) f(thread);
#endif
}

struct Chunk {
  int64_t index;
  int32_t row;
  int64_t begin;
  int size;
};

// The chunk of a block. Its row comes from a list, not a search.
DRIFT_HD Chunk find_chunk(const Launch& launch, int64_t block) {
  Chunk chunk;
  chunk.index = launch.first_chunk + block;
  chunk.row = launch.chunk_rows[chunk.index];
  const Row& row = launch.rows[chunk.row];
  chunk.begin = (chunk.index - row.first_chunk) * kChunk;
  const int64_t left = row.numel - chunk.begin;
  chunk.size = static_cast<int>(left < kChunk ? left : kChunk);
  return chunk;
}

}  // namespace drift
