// How a thread accesses its elements: a turn at a time, in accesses as wide as the tensors' alignment allows. Compiled
// for the device, and for the host, where the tests run it.
#pragma once

#include "../tensors.h"
#include "instructions.h"

namespace drift {

constexpr int kThreads = 256;

// What one access reads or writes.
template <int kBytes>
struct __attribute__((aligned(kBytes), may_alias)) Word {
  uint32_t bits[kBytes / 4];
};

#if defined(__CUDACC__)
template <int kBytes>
struct Raw;
template <>
struct Raw<1> {
  using type = unsigned char;
};
template <>
struct Raw<2> {
  using type = unsigned short;
};
template <>
struct Raw<4> {
  using type = unsigned int;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};
#endif

// The largest access in bytes. For four-byte types 32 if the device supports it: the alignment then has the same period
// in elements as that of two-byte types.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T>
constexpr int kWidest = sizeof(T) == 4 ? 32 : 16;
#else
template <class T>
constexpr int kWidest = 16;
#endif

// One access to a tensor. On the device it tells the compiler that the address, passed as a number, is in global
// memory, and the cache that the line will not be needed again.
template <class T>
DRIFT_HD T read(const T* address) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 32) {
    uint32_t w[8];
    asm volatile("ld.global.cs.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]), "=r"(w[4]), "=r"(w[5]), "=r"(w[6]), "=r"(w[7])
                 : "l"(__cvta_generic_to_global(address)));
    T value;
    memcpy(&value, w, sizeof value);
    return value;
  } else {
    const auto raw = __ldcs(reinterpret_cast<const typename Raw<sizeof(T)>::type*>(address));
    T value;
    memcpy(&value, &raw, sizeof value);
    return value;
  }
#else
  return *address;
#endif
}

template <class T>
DRIFT_HD void write(T* address, T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 32) {
    uint32_t w[8];
    memcpy(w, &value, sizeof w);
    asm volatile("st.global.cs.v8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};" ::"l"(__cvta_generic_to_global(address)),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(w[4]), "r"(w[5]), "r"(w[6]), "r"(w[7])
                 : "memory");
  } else {
    typename Raw<sizeof(T)>::type raw;
    memcpy(&raw, &value, sizeof raw);
    __stcs(reinterpret_cast<typename Raw<sizeof(T)>::type*>(address), raw);
  }
#else
  *address = value;
#endif
}

// A thread's elements of one tensor in one turn. All loads of a turn are issued before the first value is used.
template <class T, int kLength>
struct Values {
  static constexpr int kCount = kLength;
  T values[kLength];
};

template <int kCount>
DRIFT_HD Values<float, kCount> all_of(float x) {
  Values<float, kCount> all;
  DRIFT_UNROLL
  for (int j = 0; j < kCount; ++j) all.values[j] = x;
  return all;
}

// The same as four-byte words; the last one may be partial.
template <int kWords>
struct Words {
  static constexpr int kCount = kWords;
  uint32_t words[kWords];
};

template <class T, int kCount>
DRIFT_HD Words<(sizeof(T) * kCount + 3) / 4> words_of(const Values<T, kCount>& values) {
  Words<(sizeof(T) * kCount + 3) / 4> words{};
  memcpy(&words, &values, sizeof values);
  return words;
}

template <class T, int kWords>
DRIFT_HD Values<T, 4 * kWords / sizeof(T)> values_of(const Words<kWords>& words) {
  Values<T, 4 * kWords / sizeof(T)> values;
  memcpy(&values, &words, sizeof words);
  return values;
}

// How a thread accesses the elements of a turn. With random bits or scales, a turn of contiguous elements begins at a
// multiple of kCount.

// Contiguous elements in wide accesses, of aligned tensors that were moved to `first`.
template <int kTurn>
struct Wide {
  static constexpr int kCount = kTurn;
  static constexpr bool kIsWide = true;
  int first;

  template <class T>
  static constexpr int kBytes = sizeof(T) * kCount < kWidest<T> ? sizeof(T) * kCount : kWidest<T>;

  template <class T>
  DRIFT_HD Values<T, kCount> load(const T* tensor) const {
    Values<T, kCount> turn{};
    if constexpr (!std::is_same_v<T, Nothing>) {
      constexpr int kWords = sizeof turn / kBytes<T>;
      const auto* source = reinterpret_cast<const Word<kBytes<T>>*>(tensor);
      Word<kBytes<T>> words[kWords];
      DRIFT_UNROLL
      for (int w = 0; w < kWords; ++w) words[w] = read(source + w);
      memcpy(&turn, words, sizeof turn);
    }
    return turn;
  }

  template <class T>
  DRIFT_HD void store(T* tensor, const Values<T, kCount>& turn) const {
    if constexpr (!std::is_same_v<T, Nothing>) {
      constexpr int kWords = sizeof turn / kBytes<T>;
      auto* target = reinterpret_cast<Word<kBytes<T>>*>(tensor);
      Word<kBytes<T>> words[kWords];
      memcpy(words, &turn, sizeof turn);
      DRIFT_UNROLL
      for (int w = 0; w < kWords; ++w) write(target + w, words[w]);
    }
  }

  DRIFT_HD Values<float, kCount> scales(const float* scale) const {
    static_assert(kScaleBlock % kCount == 0, "a turn has one scale");
    return all_of<kCount>(read(scale));
  }
  DRIFT_HD void store_scale(float* scale, float x) const { write(scale, x); }
};

// Loads the elements of a turn one by one: element j at index `at(j)` if that is below `end`.
template <class T, int kCount, class Index>
DRIFT_HD Values<T, kCount> load_each(const T* tensor, Index at, int end) {
  Values<T, kCount> turn{};
  if constexpr (!std::is_same_v<T, Nothing>) {
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (at(j) < end) turn.values[j] = read(tensor + at(j));
    }
  }
  return turn;
}

template <class T, int kCount, class Index>
DRIFT_HD void store_each(T* tensor, const Values<T, kCount>& turn, Index at, int end) {
  if constexpr (!std::is_same_v<T, Nothing>) {
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (at(j) < end) write(tensor + at(j), turn.values[j]);
    }
  }
}

// Contiguous elements one by one, of tensors that were moved to `first`.
template <int kTurn>
struct Narrow {
  static constexpr int kCount = kTurn;
  static constexpr bool kIsWide = false;
  int first;
  int end;

  DRIFT_HD int index(int j) const { return first + j; }

  template <class T>
  DRIFT_HD Values<T, kCount> load(const T* tensor) const {
    return load_each<T, kCount>(tensor, [](int j) { return j; }, end - first);
  }

  template <class T>
  DRIFT_HD void store(T* tensor, const Values<T, kCount>& turn) const {
    store_each(tensor, turn, [](int j) { return j; }, end - first);
  }

  DRIFT_HD Values<float, kCount> scales(const float* scale) const {
    static_assert(kScaleBlock % kCount == 0, "a turn has one scale");
    return all_of<kCount>(first < end ? read(scale) : 0.0f);
  }
  DRIFT_HD void store_scale(float* scale, float x) const {
    if (first < end) write(scale, x);
  }
};

// Elements first, first + kThreads, ...: those of a warp are contiguous.
template <int kTurn>
struct Striped {
  static constexpr int kCount = kTurn;
  static constexpr bool kIsWide = false;
  int first;
  int end;

  DRIFT_HD int index(int j) const { return first + j * kThreads; }

  template <class T>
  DRIFT_HD Values<T, kCount> load(const T* tensor) const {
    return load_each<T, kCount>(tensor, [this](int j) { return index(j); }, end);
  }

  template <class T>
  DRIFT_HD void store(T* tensor, const Values<T, kCount>& turn) const {
    store_each(tensor, turn, [this](int j) { return index(j); }, end);
  }

  DRIFT_HD Values<float, kCount> scales(const float* scale) const {
    Values<float, kCount> all{};
    DRIFT_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (index(j) < end) all.values[j] = read(scale + index(j) / kScaleBlock);
    }
    return all;
  }
};

// A chunk's elements 0 .. size, cut where wide accesses begin (`body`) and end (`tail`).
struct Span {
  int body;
  int tail;
  int size;
};

// Elements per period of the alignment of two-byte types; twice that of float.
constexpr int kPeriod = 8;

template <int kTurn, class T>
DRIFT_HD bool aligned(const T* element) {
  return std::is_same_v<T, Nothing> || reinterpret_cast<uintptr_t>(element) % Wide<kTurn>::template kBytes<T> == 0;
}

// Wide accesses need all tensors aligned at the same one of the first kHeads elements. If there is none, the body is
// empty.
template <int kTurn, int kHeads, class... T>
DRIFT_HD Span cut(int size, const T*... tensors) {
  for (int head = 0; head < kHeads && head < size; ++head) {
    if ((aligned<kTurn>(tensors + head) && ...)) return {head, head + (size - head) / kTurn * kTurn, size};
  }
  return {0, 0, size};
}

// Calls turn(Striped) for a thread's turns of kSide elements before and after the body.
template <int kSide, class F>
DRIFT_HD void for_each_side_turn(const Span& span, int thread, F turn) {
  DRIFT_KEEP_ROLLED
  for (int side = 0; side < 2; ++side) {
    const int begin = side == 0 ? 0 : span.tail;
    const int end = side == 0 ? span.body : span.size;
    DRIFT_KEEP_ROLLED
    for (int first = begin + thread; first < end; first += kThreads * kSide) turn(Striped<kSide>{first, end});
  }
}

// Calls turn(Wide, tensors moved to it) for a thread's turns in the body, turn(Striped, tensors) outside it.
template <int kTurn, int kSide, class Tensors, class F>
DRIFT_HD void for_each_turn(const Span& span, int thread, const Tensors& tensors, F turn) {
  int first = span.body + thread * kTurn;
  Tensors there = tensors.moved(first);
  DRIFT_KEEP_ROLLED
  for (; first < span.tail; first += kThreads * kTurn) {
    turn(Wide<kTurn>{first}, there);
    there = there.moved(kThreads * kTurn);
  }
  for_each_side_turn<kSide>(span, thread, [&](auto at) { turn(at, tensors); });
}

// Calls use(load(at, tensors)) for each turn; the next turn is loaded before the current one is used.
template <int kTurn, int kSide, class Tensors, class Load, class Use>
DRIFT_HD void for_each_turn_ahead(const Span& span, int thread, const Tensors& tensors, Load load, Use use) {
  constexpr int kStride = kThreads * kTurn;
  int first = span.body + thread * kTurn;
  if (first < span.tail) {
    Tensors there = tensors.moved(first);
    auto next = load(Wide<kTurn>{first}, there);
    DRIFT_KEEP_ROLLED
    for (; first + kStride < span.tail; first += kStride) {
      const auto turn = next;
      there = there.moved(kStride);
      next = load(Wide<kTurn>{first + kStride}, there);
      use(turn);
    }
    use(next);
  }
  for_each_side_turn<kSide>(span, thread, [&](auto at) { use(load(at, tensors)); });
}

}  // namespace drift
