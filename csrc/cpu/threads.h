// Distributes chunks over threads.
#pragma once

#include <algorithm>
#include <cfenv>

#include "../table.h"

namespace drift {

// Sets the IEEE defaults (round to nearest, no flush to zero) for the calling thread, whatever torch.set_flush_denormal
// or the host program chose.
class FloatEnvironment {
 public:
  FloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

constexpr int64_t kLongestRun = 16;  // chunks

// Calls body(row, chunk, begin, end) for every chunk of the table.
template <class Body>
void for_each_chunk(const Row* rows, int64_t count, int threads, Body body) {
  const int64_t chunks = rows[count - 1].first_chunk + chunk_count(rows[count - 1].numel);
  int64_t elements = 0;
  for (int64_t t = 0; t < count; ++t) elements += rows[t].numel;
  const bool parallel = threads > 1 && elements > 2 * kChunk;
  // A thread takes runs of consecutive chunks, since memory is faster in long runs; but each takes several runs, since
  // a thread may be delayed.
  const int64_t run = std::clamp<int64_t>(chunks / (16 * threads), 1, kLongestRun);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const FloatEnvironment environment;
    int64_t tensor = 0;
#pragma omp for schedule(monotonic : dynamic, run)  // a thread's chunks ascend, so its tensors do
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      while (tensor + 1 < count && rows[tensor + 1].first_chunk <= chunk) ++tensor;
      const int64_t begin = (chunk - rows[tensor].first_chunk) * kChunk;
      body(tensor, chunk, begin, std::min(begin + kChunk, rows[tensor].numel));
    }
  }
}

}  // namespace drift
