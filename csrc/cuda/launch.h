// What a kernel is given, and which part of it is one block's.
//
// The kernels' bodies (update.h, sums.h, bias.h) are compiled for the device by kernels.cu, and for the host by the
// tests, which run every thread of a grid and compare bit for bit.
#pragma once

#include "access.h"

namespace drift {

// As many as fit into the 32,764 bytes of a kernel's parameters (CUDA 12.1 and newer).
constexpr int64_t kMaxRows = 4080;

// What a kernel is given. Rows and coefficients are in device memory and stay there from step to step. The gradients'
// addresses may be new in any step, and so travel in the kernel's parameters: no copy, no buffer whose life to mind,
// and a captured graph keeps its own.
struct Launch {
  const Row* rows;
  const int32_t* chunk_rows;  // the row of each chunk
  const Coefficients* coefficients;
  Sums* partials;     // of each chunk
  Sums* totals;       // of each row
  uint32_t* arrived;  // of each row, how many of its chunks have their partial sums: 0 before a launch, and after it
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

// The threads of a block up to a barrier: on the device each runs as itself, on the host all of them in turn.
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

// The chunk of a block, which finds its row in a list rather than by searching.
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
