// The memory traffic of a step and nothing else: the same buffers in the same order, read and written by the same
// threads, with one operation per vector. `streams.py` compiles this and calls it in place of the cpu backend.
#include <cstring>

#include "../../csrc/codes.h"
#include "../../csrc/cpu/threads.h"

namespace drift {
namespace {

// Unknown to the compiler: the values written equal those read, and depend on everything read.
volatile uint64_t zero = 0;

// Elements of one buffer before switching to the next: the fastest of several sizes, for many buffers and for two.
constexpr int64_t kTurnOfUpdate = 64, kTurnOfSums = 512;

using Vector = uint64_t __attribute__((vector_size(64)));

// The bytes per element in each buffer of a launch, and per block for scales; 0 if there is no such buffer.
struct Sizes {
  int64_t param, residual, grad, state, state_scale, delta, delta_scale;
};

struct Sweep {
  Vector seen{};
  const Vector none = Vector{} + zero;

  __attribute__((always_inline)) void over(uint64_t address, int64_t bytes, bool written) {
    char* data = reinterpret_cast<char*>(address);
    int64_t i = 0;
    if (written) {
      for (; i + 64 <= bytes; i += 64) write(data + i, 64);
    } else {
      for (; i + 64 <= bytes; i += 64) seen |= read(data + i, 64);
    }
    if (i < bytes) written ? write(data + i, bytes - i) : void(seen |= read(data + i, bytes - i));
  }

  static __attribute__((always_inline)) Vector read(const char* data, int64_t bytes) {
    Vector vector{};
    memcpy(&vector, data, bytes);
    return vector;
  }

  __attribute__((always_inline)) void write(char* data, int64_t bytes) {
    const Vector vector = read(data, bytes) ^ (seen & none);
    memcpy(data, &vector, bytes);
  }
};

void sweep_chunk(const Row& row, uint64_t grad, const Sizes& sizes, bool writes, int64_t begin, int64_t end) {
  Sweep sweep;
  const int64_t turn = writes ? kTurnOfUpdate : kTurnOfSums;
  for (int64_t i = begin; i < end; i += turn) {
    const int64_t count = std::min(turn, end - i);
    sweep.over(grad + i * sizes.grad, count * sizes.grad, false);
    sweep.over(row.delta + i * sizes.delta, count * sizes.delta, false);
    if (!writes) continue;
    sweep.over(row.param + i * sizes.param, count * sizes.param, true);
    sweep.over(row.residual + i * sizes.residual, count * sizes.residual, true);
    sweep.over(row.exp_avg + i * sizes.state, count * sizes.state, true);
    sweep.over(row.exp_avg_sq + i * sizes.state, count * sizes.state, true);
  }
  const int64_t block = begin / kScaleBlock, blocks = (end + kScaleBlock - 1) / kScaleBlock - block;
  sweep.over(row.delta_scale + block * 4, blocks * sizes.delta_scale, false);
  if (writes) {
    sweep.over(row.exp_avg_scale + block * 4, blocks * sizes.state_scale, true);
    sweep.over(row.exp_avg_sq_scale + block * 4, blocks * sizes.state_scale, true);
  }
  asm volatile("" : : "m"(sweep.seen));
}

}  // namespace
}  // namespace drift

// The traffic of an update if `writes` is set, else that of the sums over gradients and deltas.
extern "C" void sweep(const drift::Row* rows, const uint64_t* grads, int64_t count, const drift::Sizes* sizes,
                      bool writes, int threads) {
  drift::for_each_chunk(rows, count, threads, [&](int64_t tensor, int64_t, int64_t begin, int64_t end) {
    drift::sweep_chunk(rows[tensor], grads[tensor], *sizes, writes, begin, end);
  });
}
