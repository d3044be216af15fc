// Turns a plan into launches: the host side of launch.h. It makes no CUDA calls, so the tests can run it too.
#pragma once

#include <algorithm>

#include "launch.h"

namespace drift {

// The tables of drift_kernels/kernels/plan.py for the tensors of one plan.
struct Plan {
  const Row* rows;            // on the host
  const Row* device_rows;     // the same on the device
  const int32_t* chunk_rows;  // on the device
  const uint64_t* grads;      // on the host
  int64_t count;
};

// Device memory for the sums of each chunk, the count of finished chunks of each row, and the sums of each row.
struct SumSpace {
  Sums* partials;
  Sums* totals;
  uint32_t* arrived;
};

// Calls run(launch, chunks) for all rows, kMaxRows at a time, skipping launches without elements.
template <class F>
void for_each_launch(const Plan& plan, const Coefficients* coefficients, const SumSpace& sums, F run) {
  for (int64_t first = 0; first < plan.count; first += kMaxRows) {
    const int64_t count = std::min(kMaxRows, plan.count - first);
    const Row& last = plan.rows[first + count - 1];
    const int64_t first_chunk = plan.rows[first].first_chunk;
    const int64_t chunks = last.first_chunk + chunk_count(last.numel) - first_chunk;
    if (chunks == 0) continue;
    Launch launch;  // unused addresses stay uninitialized
    launch.rows = plan.device_rows;
    launch.chunk_rows = plan.chunk_rows;
    launch.coefficients = coefficients;
    launch.partials = sums.partials;
    launch.totals = sums.totals;
    launch.arrived = sums.arrived;
    launch.first_row = first;
    launch.first_chunk = first_chunk;
    std::copy_n(plan.grads + first, count, launch.grads);
    run(launch, chunks);
  }
}

}  // namespace drift
