// Loads, computes, rounds and packs 64 elements of a tensor in four AVX-512 registers. Bitwise identical to rounding.h.
// Only kernels_avx512.cpp includes this; every function has its DRIFT_TARGET.
//
// Each function does one operation on all four registers before the next: the processor, which looks ahead a few
// hundred instructions, then always finds four neighbouring ones that do not depend on each other.
#pragma once

#include <immintrin.h>

#include "chunk.h"

#define DRIFT_512 inline __attribute__((always_inline)) DRIFT_TARGET

namespace drift::avx512 {

constexpr int kRegisters = 4;
constexpr int kTurn = 16 * kRegisters;  // elements
constexpr __mmask32 kOddHalves = 0xAAAAAAAA;

// How elements are arranged in the registers: all in order, which needs no shuffle for 32-bit types, or the even and
// the odd ones of each 32 apart, which needs none for 16-bit types.
enum class Order { kInOrder, kEvenOdd };

struct Floats {
  __m512 r[kRegisters];
};

struct Bits {
  __m512i r[kRegisters];
};

#define DRIFT_EACH for (int k = 0; k < kRegisters; ++k)
#define DRIFT_EACH_PAIR for (int k = 0; k < kRegisters; k += 2)

DRIFT_512 __m512i bits(__m512 x) { return _mm512_castps_si512(x); }
DRIFT_512 __m512 floats(__m512i x) { return _mm512_castsi512_ps(x); }
DRIFT_512 __m512i words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
DRIFT_512 __m512i halves(uint16_t x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
DRIFT_512 __m256i low(__m512i x) { return _mm512_castsi512_si256(x); }
DRIFT_512 __m256i high(__m512i x) { return _mm512_extracti64x4_epi64(x, 1); }

DRIFT_512 __m256i load_256(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
DRIFT_512 __m128i load_128(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }

DRIFT_512 Floats operator+(Floats x, Floats y) {
  DRIFT_EACH x.r[k] = _mm512_add_ps(x.r[k], y.r[k]);
  return x;
}

DRIFT_512 Floats operator-(Floats x, Floats y) {
  DRIFT_EACH x.r[k] = _mm512_sub_ps(x.r[k], y.r[k]);
  return x;
}

DRIFT_512 Floats operator*(Floats x, Floats y) {
  DRIFT_EACH x.r[k] = _mm512_mul_ps(x.r[k], y.r[k]);
  return x;
}

DRIFT_512 Floats operator/(Floats x, Floats y) {
  DRIFT_EACH x.r[k] = _mm512_div_ps(x.r[k], y.r[k]);
  return x;
}

DRIFT_512 Floats operator+(Floats x, __m512 y) {
  DRIFT_EACH x.r[k] = _mm512_add_ps(x.r[k], y);
  return x;
}

DRIFT_512 Floats operator*(Floats x, __m512 y) {
  DRIFT_EACH x.r[k] = _mm512_mul_ps(x.r[k], y);
  return x;
}

DRIFT_512 Floats root(Floats x) {
  DRIFT_EACH x.r[k] = _mm512_sqrt_ps(x.r[k]);
  return x;
}

DRIFT_512 Floats magnitude(Floats x) {
  DRIFT_EACH x.r[k] = _mm512_abs_ps(x.r[k]);
  return x;
}

// Widens unsigned halves to words.
template <Order kOrder>
DRIFT_512 Bits widen(const uint16_t* x) {
  Bits wide;
  if constexpr (kOrder == Order::kInOrder) {
    DRIFT_EACH wide.r[k] = _mm512_cvtepu16_epi32(load_256(x + 16 * k));
  } else {
    DRIFT_EACH_PAIR {
      wide.r[k] = _mm512_and_si512(_mm512_loadu_si512(x + 16 * k), words(0xffff));
      wide.r[k + 1] = _mm512_srli_epi32(_mm512_loadu_si512(x + 16 * k), 16);
    }
  }
  return wide;
}

template <Order kOrder>
DRIFT_512 Bits widen_signed(const int16_t* x) {
  Bits wide;
  if constexpr (kOrder == Order::kInOrder) {
    DRIFT_EACH wide.r[k] = _mm512_cvtepi16_epi32(load_256(x + 16 * k));
  } else {
    DRIFT_EACH_PAIR {
      wide.r[k] = _mm512_srai_epi32(_mm512_slli_epi32(_mm512_loadu_si512(x + 16 * k), 16), 16);
      wide.r[k + 1] = _mm512_srai_epi32(_mm512_loadu_si512(x + 16 * k), 16);
    }
  }
  return wide;
}

// Widens each half to the upper half of a word.
template <Order kOrder>
DRIFT_512 Floats as_upper(const void* x) {
  const auto* from = static_cast<const uint16_t*>(x);
  Floats upper;
  if constexpr (kOrder == Order::kInOrder) {
    DRIFT_EACH upper.r[k] = floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(from + 16 * k)), 16));
  } else {
    DRIFT_EACH_PAIR {
      upper.r[k] = floats(_mm512_slli_epi32(_mm512_loadu_si512(from + 16 * k), 16));
      upper.r[k + 1] = floats(_mm512_and_si512(_mm512_loadu_si512(from + 16 * k), words(0xffff0000)));
    }
  }
  return upper;
}

DRIFT_512 __m512i counting_by_two(int first) {
  const __m512i evens = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                         22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_add_epi16(evens, halves(static_cast<uint16_t>(first)));
}

// The upper halves of the words of two registers, as 32 consecutive halves; below, the lower halves.
template <Order kOrder>
DRIFT_512 __m512i upper_halves(__m512i a, __m512i b) {
  if constexpr (kOrder == Order::kInOrder) {
    return _mm512_permutex2var_epi16(a, counting_by_two(1), b);
  } else {
    return _mm512_mask_blend_epi16(kOddHalves, _mm512_srli_epi32(a, 16), b);
  }
}

template <Order kOrder>
DRIFT_512 __m512i lower_halves(__m512i a, __m512i b) {
  if constexpr (kOrder == Order::kInOrder) {
    return _mm512_permutex2var_epi16(a, counting_by_two(0), b);
  } else {
    return _mm512_mask_blend_epi16(kOddHalves, a, _mm512_slli_epi32(b, 16));
  }
}

template <Order kOrder>
DRIFT_512 Floats load(const float* x) {
  Floats value;
  if constexpr (kOrder == Order::kInOrder) {
    DRIFT_EACH value.r[k] = _mm512_loadu_ps(x + 16 * k);
  } else {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    DRIFT_EACH_PAIR {
      const __m512 a = _mm512_loadu_ps(x + 16 * k), b = _mm512_loadu_ps(x + 16 * k + 16);
      value.r[k] = _mm512_permutex2var_ps(a, even, b);
      value.r[k + 1] = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, words(1)), b);
    }
  }
  return value;
}

template <Order kOrder>
DRIFT_512 Floats load(const bfloat16* x) {
  return as_upper<kOrder>(x);
}

template <Order kOrder>
DRIFT_512 Floats load(const stochastic_bfloat16* x) {
  return as_upper<kOrder>(x);
}

template <Order kOrder>
DRIFT_512 Floats load(const float16* x) {
  static_assert(kOrder == Order::kInOrder);
  Floats value;
  DRIFT_EACH value.r[k] = _mm512_cvtph_ps(load_256(x + 16 * k));
  return value;
}

template <Order kOrder, class Param>
DRIFT_512 Floats load_param(const Param* x, [[maybe_unused]] const Residual<Param>* residual) {
  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    Floats value = as_upper<kOrder>(x);
    const Bits rest = widen_signed<kOrder>(residual);
    DRIFT_EACH value.r[k] = floats(_mm512_add_epi32(bits(value.r[k]), rest.r[k]));
    return value;
  } else {
    return load<kOrder>(x);
  }
}

// The functions below expect every NaN to be canonical, so that rounding need not check for one.

DRIFT_512 bool has_nan(Floats x) {
  static_assert(kRegisters == 4);
  return !_mm512_kortestz(_mm512_cmp_ps_mask(x.r[0], x.r[1], _CMP_UNORD_Q),
                          _mm512_cmp_ps_mask(x.r[2], x.r[3], _CMP_UNORD_Q));
}

DRIFT_512 Floats canonical(Floats x) {
  DRIFT_EACH {
    const __mmask16 nan = _mm512_cmp_ps_mask(x.r[k], x.r[k], _CMP_UNORD_Q);
    x.r[k] = floats(_mm512_mask_mov_epi32(bits(x.r[k]), nan, words(0x7fc00000)));
  }
  return x;
}

// `random`: the random bits of these 64 elements, if the type needs them.

template <Order kOrder>
DRIFT_512 void store(float* x, Floats value, const uint32_t*) {
  if constexpr (kOrder == Order::kInOrder) {
    DRIFT_EACH _mm512_storeu_ps(x + 16 * k, value.r[k]);
  } else {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    DRIFT_EACH_PAIR {
      _mm512_storeu_ps(x + 16 * k, _mm512_permutex2var_ps(value.r[k], first, value.r[k + 1]));
      _mm512_storeu_ps(x + 16 * k + 16,
                       _mm512_permutex2var_ps(value.r[k], _mm512_add_epi32(first, words(8)), value.r[k + 1]));
    }
  }
}

// Rounds to nearest even: (lower + 0x7fff + (upper & 1)) >> 16 is the 0 or 1 to add to the upper half. The sum needs 17
// bits, which the average instruction has internally.
template <Order kOrder>
DRIFT_512 void store(bfloat16* x, Floats value, const uint32_t*) {
  DRIFT_EACH_PAIR {
    const __m512i a = bits(value.r[k]), b = bits(value.r[k + 1]);
    const __m512i upper = upper_halves<kOrder>(a, b), lower = lower_halves<kOrder>(a, b);
    constexpr int kAndOr = 0xEA;
    const __m512i almost_half = _mm512_ternarylogic_epi32(upper, halves(1), halves(0x7ffe), kAndOr);
    const __m512i more = _mm512_srli_epi16(_mm512_avg_epu16(lower, almost_half), 15);
    _mm512_storeu_si512(x + 16 * k, _mm512_add_epi16(upper, more));
  }
}

template <Order kOrder>
DRIFT_512 void store(float16* x, Floats value, const uint32_t*) {
  static_assert(kOrder == Order::kInOrder);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  DRIFT_EACH_PAIR {
    const __m512i a = _mm512_castsi256_si512(_mm512_cvtps_ph(value.r[k], kNearest));
    _mm512_storeu_si512(x + 16 * k, _mm512_inserti64x4(a, _mm512_cvtps_ph(value.r[k + 1], kNearest), 1));
  }
}

template <Order kOrder>
DRIFT_512 void store(stochastic_bfloat16* x, Floats value, const uint32_t* random) {
  const Bits more = widen<kOrder>(reinterpret_cast<const uint16_t*>(random));
  DRIFT_EACH value.r[k] = floats(_mm512_add_epi32(bits(value.r[k]), more.r[k]));
  DRIFT_EACH_PAIR { _mm512_storeu_si512(x + 16 * k, upper_halves<kOrder>(bits(value.r[k]), bits(value.r[k + 1]))); }
}

template <Order kOrder, class Param>
DRIFT_512 void store_param(Param* x, [[maybe_unused]] Residual<Param>* residual, Floats value, const uint32_t* random) {
  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    DRIFT_EACH_PAIR {
      const __m512i a = bits(value.r[k]), b = bits(value.r[k + 1]), half = words(0x8000);
      _mm512_storeu_si512(x + 16 * k, upper_halves<kOrder>(_mm512_add_epi32(a, half), _mm512_add_epi32(b, half)));
      _mm512_storeu_si512(residual + 16 * k, lower_halves<kOrder>(a, b));
    }
  } else {
    store<kOrder>(x, value, random);
  }
}

}  // namespace drift::avx512
