// The bodies of the kernels: what one block's threads do with one chunk, or with one tensor's partial sums.
//
// Compiled for the device by kernels.cu, and for the host by the tests, which run every thread of a grid and compare
// bit for bit.
#pragma once

#include "../chunk.h"

#if defined(__CUDACC__)
#define DRIFT_UNROLL _Pragma("unroll")
#define DRIFT_KEEP_ROLLED _Pragma("unroll 1")  // a turn is what is in flight: more of them would only take registers
#else
#define DRIFT_UNROLL
#define DRIFT_KEEP_ROLLED
#endif

namespace drift {

constexpr int kThreads = 256;

// Elements of a thread's turn, all requested before the first is used: what is in flight. An update asks for 80 to 160
// bytes at once, the sums for 32 to 128.
constexpr int kUpdateTurn = 8;
constexpr int kSumTurn = 16;

// In which a thread adds up its products in float32: ten of the chunk's at most in each, so that rounding stays within
// 10 * 2^-24 = 6e-7 (of sum(g*g); of norm(g)*norm(delta) for sum(g*delta)).
constexpr int kLanes = 8;

// As many as fit into the 32,764 bytes of a kernel's parameters (CUDA 12.1 and newer).
constexpr int64_t kMaxRows = 4080;

// What a kernel is given. Rows and coefficients are in device memory and stay there from step to step. The gradients'
// addresses may be new in any step, and so travel in the kernel's parameters: no copy, no buffer whose life to mind,
// and a captured graph keeps its own.
struct Launch {
  const Row* rows;
  const int32_t* chunk_rows;  // the row of each chunk
  const Coefficients* coefficients;
  Sums* partials;  // of each chunk
  int64_t first_row;
  int64_t first_chunk;
  uint64_t grads[kMaxRows];  // from first_row on
};
static_assert(sizeof(Launch) <= 32764, "the limit on kernel parameters");

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

// 16 bytes: the widest access.
struct __attribute__((aligned(16), may_alias)) Word {
  uint32_t bits[4];
};

#if defined(__CUDACC__)
template <int kBytes>
struct Raw;
template <>
struct Raw<2> {
  using type = unsigned short;
};
template <>
struct Raw<4> {
  using type = unsigned int;
};
template <>
struct Raw<16> {
  using type = uint4;
};
#endif

// One access to a tensor. On the device it says that the address, which came as a number, is in global memory, and that
// the line will not be needed again.
template <class T>
DRIFT_HD T read(const T* address) {
#if defined(__CUDA_ARCH__)
  const auto raw = __ldcs(reinterpret_cast<const typename Raw<sizeof(T)>::type*>(address));
  T value;
  memcpy(&value, &raw, sizeof value);
  return value;
#else
  return *address;
#endif
}

template <class T>
DRIFT_HD void write(T* address, T value) {
#if defined(__CUDA_ARCH__)
  typename Raw<sizeof(T)>::type raw;
  memcpy(&raw, &value, sizeof raw);
  __stcs(reinterpret_cast<typename Raw<sizeof(T)>::type*>(address), raw);
#else
  *address = value;
#endif
}

// What a thread holds of one tensor in one turn. All of a turn is requested before the first of it is used.
template <class T, int kCount>
struct Values {
  T values[kCount];
};

// A turn's random bits: of elements first .. first + 7, which one call of the generator serves, or one by one.
template <class T, int kCount>
struct Draws {
  uint16_t bits[kStochastic<T> ? kCount : 1];

  DRIFT_HD uint32_t operator[](int j) const { return kStochastic<T> ? bits[j] : 0; }
};

// A turn of the elements from `first` on, of tensors that are aligned to 16 bytes there.
template <int kTurn>
struct Wide {
  static constexpr int kCount = kTurn;
  int first;

  template <class T>
  DRIFT_HD Values<T, kCount> load(const T* tensor) const {
    Values<T, kCount> turn{};
    if constexpr (!std::is_same_v<T, Nothing>) {
      constexpr int kWords = sizeof turn / sizeof(Word);
      const auto* source = reinterpret_cast<const Word*>(tensor + first);
      Word words[kWords];
      DRIFT_UNROLL
      for (int w = 0; w < kWords; ++w) words[w] = read(source + w);
      memcpy(&turn, words, sizeof turn);
    }
    return turn;
  }

  template <class T>
  DRIFT_HD void store(T* tensor, const Values<T, kCount>& turn) const {
    if constexpr (!std::is_same_v<T, Nothing>) {
      constexpr int kWords = sizeof turn / sizeof(Word);
      auto* target = reinterpret_cast<Word*>(tensor + first);
      Word words[kWords];
      memcpy(words, &turn, sizeof turn);
      DRIFT_UNROLL
      for (int w = 0; w < kWords; ++w) write(target + w, words[w]);
    }
  }

  // The chunk begins at element `begin` of its tensor; `first` is a multiple of eight.
  template <class T>
  DRIFT_HD Draws<T, kCount> draw(const RandomBits& random, Stream stream, int64_t begin) const {
    Draws<T, kCount> draws{};
    if constexpr (kStochastic<T>) {
      static_assert(kCount == 8, "one call of the generator");
      const Philox eight = random.eight(stream, (begin + first) / 8);
      DRIFT_UNROLL
      for (int j = 0; j < kCount; ++j) draws.bits[j] = static_cast<uint16_t>(RandomBits::half(eight, j));
    }
    return draws;
  }
};

// A turn of the elements first, first + kThreads, ..., below end: element by element, a warp's side by side.
template <int kTurn>
struct Striped {
  static constexpr int kCount = kTurn;
  int first;
  int end;

  template <class T>
  DRIFT_HD Values<T, kCount> load(const T* tensor) const {
    Values<T, kCount> turn{};
    if constexpr (!std::is_same_v<T, Nothing>) {
      DRIFT_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (first + j * kThreads < end) turn.values[j] = read(tensor + first + j * kThreads);
      }
    }
    return turn;
  }

  template <class T>
  DRIFT_HD void store(T* tensor, const Values<T, kCount>& turn) const {
    if constexpr (!std::is_same_v<T, Nothing>) {
      DRIFT_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (first + j * kThreads < end) write(tensor + first + j * kThreads, turn.values[j]);
      }
    }
  }

  template <class T>
  DRIFT_HD Draws<T, kCount> draw(const RandomBits& random, Stream stream, int64_t begin) const {
    Draws<T, kCount> draws{};
    if constexpr (kStochastic<T>) {
      DRIFT_UNROLL
      for (int j = 0; j < kCount; ++j) {
        draws.bits[j] = static_cast<uint16_t>(random.one(stream, begin + first + j * kThreads));
      }
    }
    return draws;
  }
};

// A chunk's elements 0 .. size, cut where wide accesses begin (`body`) and end (`tail`).
struct Span {
  int body;
  int tail;
  int size;
};

// The period of the alignment of two-byte types, and twice that of float.
constexpr int kPeriod = sizeof(Word) / 2;

template <class T>
DRIFT_HD bool aligned(const T* element) {
  return std::is_same_v<T, Nothing> || reinterpret_cast<uintptr_t>(element) % sizeof(Word) == 0;
}

// Wide accesses take all tensors to be aligned at the same of the first kHeads elements. Where that is not to be had,
// there is no body.
template <int kTurn, int kHeads, class... T>
DRIFT_HD Span cut(int size, const T*... tensors) {
  for (int head = 0; head < kHeads && head < size; ++head) {
    if ((aligned(tensors + head) && ...)) return {head, head + (size - head) / kTurn * kTurn, size};
  }
  return {0, 0, size};
}

// A thread's turns: turn(Wide) over the body, turn(Striped), of half the size, over what is before and after it.
template <int kTurn, class F>
DRIFT_HD void for_each_turn(const Span& span, int thread, F turn) {
  DRIFT_KEEP_ROLLED
  for (int first = span.body + thread * kTurn; first < span.tail; first += kThreads * kTurn) turn(Wide<kTurn>{first});
  DRIFT_KEEP_ROLLED
  for (int side = 0; side < 2; ++side) {
    const int begin = side == 0 ? 0 : span.tail;
    const int end = side == 0 ? span.body : span.size;
    DRIFT_KEEP_ROLLED
    for (int first = begin + thread; first < end; first += kThreads * kTurn / 2) turn(Striped<kTurn / 2>{first, end});
  }
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

// Load, update, store, a turn at a time.
template <class At, class Param, class Grad, class State, class Delta>
DRIFT_HD void update_turn(At at, const Tensors<Param, Grad, State, Delta>& tensors, const Coefficients& c,
                          const RandomBits& random, int64_t begin) {
  auto param = at.load(tensors.param);
  auto residual = at.load(tensors.residual);
  const auto grad = at.load(tensors.grad);
  auto exp_avg = at.load(tensors.exp_avg);
  auto exp_avg_sq = at.load(tensors.exp_avg_sq);
  const auto delta = at.load(tensors.delta);
  const auto for_param = at.template draw<Param>(random, Stream::kParam, begin);
  const auto for_exp_avg = at.template draw<State>(random, Stream::kExpAvg, begin);
  const auto for_exp_avg_sq = at.template draw<State>(random, Stream::kExpAvgSq, begin);

  const Tensors<Param, Grad, State, Delta> turn{param.values,   residual.values,   grad.values,
                                                exp_avg.values, exp_avg_sq.values, delta.values};
  DRIFT_UNROLL
  for (int j = 0; j < At::kCount; ++j) {
    Element e = turn.load(j);
    e = turn.update(e, j, c);
    turn.store(j, e, {for_param[j], for_exp_avg[j], for_exp_avg_sq[j]});
  }

  at.store(tensors.param, param);
  at.store(tensors.residual, residual);
  at.store(tensors.exp_avg, exp_avg);
  at.store(tensors.exp_avg_sq, exp_avg_sq);
}

// update: reference.drift_adamw_ on the chunk of this block.
template <class Param, class Grad, class State, class Delta>
DRIFT_HD void update_block(const Launch& launch, int64_t block) {
  // Random bits come for eight elements at once, the first of which has a multiple of eight for its index.
  constexpr int kHeads = kStochastic<Param> || kStochastic<State> ? 1 : kPeriod;
  const Chunk chunk = find_chunk(launch, block);
  const Row& row = launch.rows[chunk.row];
  const Coefficients c = launch.coefficients[chunk.row];
  const RandomBits random{row.random_key, static_cast<uint32_t>(c.step)};
  const auto tensors =
      Tensors<Param, Grad, State, Delta>::of(row, launch.grads[chunk.row - launch.first_row], chunk.begin);
  const Span span = cut<kUpdateTurn, kHeads>(chunk.size, tensors.param, tensors.residual, tensors.grad, tensors.exp_avg,
                                             tensors.exp_avg_sq, tensors.delta);
  each_thread([&](int thread) {
    for_each_turn<kUpdateTurn>(span, thread, [&](auto at) { update_turn(at, tensors, c, random, chunk.begin); });
  });
}

DRIFT_HD void add(Sums& sums, const Sums& more) {
  sums.grad_grad += more.grad_grad;
  sums.grad_delta += more.grad_delta;
}

// The sum of the threads' `sums`, into the first, by a tree: the same order in every run.
DRIFT_HD void add_up(Sums* sums) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    each_thread([&](int thread) {
      if (thread < half) add(sums[thread], sums[thread + half]);
    });
  }
}

// The first stage of grad_stats: sum(g*g) and sum(g*delta) of the chunk of this block, a thread's lanes in float32 and
// all beyond them in float64. `sums` is shared by the block's threads.
template <class Grad, class Delta>
DRIFT_HD void sum_block(const Launch& launch, int64_t block, Sums* sums) {
  constexpr bool kHasDelta = !std::is_same_v<Delta, Nothing>;
  const Chunk chunk = find_chunk(launch, block);
  const Grad* __restrict grad = pointer<const Grad>(launch.grads[chunk.row - launch.first_row]) + chunk.begin;
  const Delta* __restrict delta = pointer<const Delta>(launch.rows[chunk.row].delta) + chunk.begin;
  const Span span = cut<kSumTurn, kPeriod>(chunk.size, grad, delta);
  each_thread([&](int thread) {
    float grad_grad[kLanes] = {};
    float grad_delta[kLanes] = {};
    for_each_turn<kSumTurn>(span, thread, [&](auto at) {
      const auto g = at.load(grad);
      const auto d = at.load(delta);
      DRIFT_UNROLL
      for (int j = 0; j < at.kCount; ++j) {
        const float x = to_float(g.values[j]);
        grad_grad[j % kLanes] += x * x;
        if constexpr (kHasDelta) grad_delta[j % kLanes] += x * to_float(d.values[j]);
      }
    });
    Sums own{0.0, 0.0};
    DRIFT_UNROLL
    for (int j = 0; j < kLanes; ++j) add(own, {grad_grad[j], grad_delta[j]});
    sums[thread] = own;
  });
  add_up(sums);
  each_thread([&](int thread) {
    if (thread == 0) launch.partials[chunk.index] = sums[0];
  });
}

// The second stage: the sums of one tensor over its chunks.
DRIFT_HD void total_block(const Row* rows, const Sums* partials, Sums* out, int64_t block, Sums* sums) {
  const Row row = rows[block];
  const int64_t end = row.first_chunk + chunk_count(row.numel);
  each_thread([&](int thread) {
    Sums own{0.0, 0.0};
    for (int64_t chunk = row.first_chunk + thread; chunk < end; chunk += kThreads) add(own, partials[chunk]);
    sums[thread] = own;
  });
  add_up(sums);
  each_thread([&](int thread) {
    if (thread == 0) out[block] = sums[0];
  });
}

}  // namespace drift
