// 32 elements of a tensor in two registers of AVX-512: loaded, decoded, rounded and packed, with the bits of
// rounding.h, codes.h and philox.h. Included by kernels_avx512.cpp alone, whose DRIFT_TARGET every function has.
#pragma once

#include <immintrin.h>

#include "chunk.h"

#define DRIFT_512 inline __attribute__((always_inline)) DRIFT_TARGET

namespace drift::avx512 {

constexpr int kTurn = 32;  // elements
constexpr __mmask32 kOddHalves = 0xAAAAAAAA;

// How 32 elements lie in two registers. In order they come from 32 bits without a shuffle; even and odd, from 16 bits.
enum class Order { kInOrder, kEvenOdd };

struct Floats {
  __m512 a, b;
};

struct Bits {
  __m512i a, b;
};

DRIFT_512 __m512i bits(__m512 x) { return _mm512_castps_si512(x); }
DRIFT_512 __m512 floats(__m512i x) { return _mm512_castsi512_ps(x); }
DRIFT_512 Bits bits(Floats x) { return {bits(x.a), bits(x.b)}; }
DRIFT_512 Floats floats(Bits x) { return {floats(x.a), floats(x.b)}; }
DRIFT_512 __m512i words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
DRIFT_512 __m256i low(__m512i x) { return _mm512_castsi512_si256(x); }
DRIFT_512 __m256i high(__m512i x) { return _mm512_extracti64x4_epi64(x, 1); }

DRIFT_512 __m256i load_256(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
DRIFT_512 __m128i load_128(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
DRIFT_512 const char* after(const void* x, int bytes) { return static_cast<const char*>(x) + bytes; }

// 32 unsigned halves, each in a word.
template <Order kOrder>
DRIFT_512 Bits widen(const void* halves) {
  if constexpr (kOrder == Order::kInOrder) {
    return {_mm512_cvtepu16_epi32(load_256(halves)), _mm512_cvtepu16_epi32(load_256(after(halves, 32)))};
  } else {
    const __m512i x = _mm512_loadu_si512(halves);
    return {_mm512_and_si512(x, words(0xffff)), _mm512_srli_epi32(x, 16)};
  }
}

// The even and the odd of 32 signed halves, each in a word.
DRIFT_512 Bits split_signed(__m512i halves) {
  return {_mm512_srai_epi32(_mm512_slli_epi32(halves, 16), 16), _mm512_srai_epi32(halves, 16)};
}

template <Order kOrder>
DRIFT_512 Bits widen_signed(const void* halves) {
  if constexpr (kOrder == Order::kInOrder) {
    return {_mm512_cvtepi16_epi32(load_256(halves)), _mm512_cvtepi16_epi32(load_256(after(halves, 32)))};
  } else {
    return split_signed(_mm512_loadu_si512(halves));
  }
}

// 32 signed bytes, each in a word.
template <Order kOrder>
DRIFT_512 Bits widen_signed_bytes(const void* bytes) {
  if constexpr (kOrder == Order::kInOrder) {
    return {_mm512_cvtepi8_epi32(load_128(bytes)), _mm512_cvtepi8_epi32(load_128(after(bytes, 16)))};
  } else {
    return split_signed(_mm512_cvtepi8_epi16(load_256(bytes)));
  }
}

// Each half as the upper one of a word.
template <Order kOrder>
DRIFT_512 Bits as_upper(const void* halves) {
  if constexpr (kOrder == Order::kInOrder) {
    const Bits x = widen<kOrder>(halves);
    return {_mm512_slli_epi32(x.a, 16), _mm512_slli_epi32(x.b, 16)};
  } else {
    const __m512i x = _mm512_loadu_si512(halves);
    return {_mm512_slli_epi32(x, 16), _mm512_and_si512(x, words(0xffff0000))};
  }
}

DRIFT_512 __m512i counting_by_two(int first) {
  const __m512i halves = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_add_epi16(halves, _mm512_set1_epi16(static_cast<int16_t>(first)));
}

// The upper halves of the words, as 32 halves that follow one another; and the lower ones.
template <Order kOrder>
DRIFT_512 __m512i upper_halves(Bits x) {
  if constexpr (kOrder == Order::kInOrder) {
    return _mm512_permutex2var_epi16(x.a, counting_by_two(1), x.b);
  } else {
    return _mm512_mask_blend_epi16(kOddHalves, _mm512_srli_epi32(x.a, 16), x.b);
  }
}

template <Order kOrder>
DRIFT_512 __m512i lower_halves(Bits x) {
  if constexpr (kOrder == Order::kInOrder) {
    return _mm512_permutex2var_epi16(x.a, counting_by_two(0), x.b);
  } else {
    return _mm512_mask_blend_epi16(kOddHalves, x.a, _mm512_slli_epi32(x.b, 16));
  }
}

template <Order kOrder>
DRIFT_512 Floats load(const float* x) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  if constexpr (kOrder == Order::kInOrder) return {a, b};
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, _mm512_add_epi32(even, words(1)), b)};
}

template <Order kOrder>
DRIFT_512 Floats load(const bfloat16* x) {
  return floats(as_upper<kOrder>(x));
}

template <Order kOrder>
DRIFT_512 Floats load(const stochastic_bfloat16* x) {
  return floats(as_upper<kOrder>(x));
}

template <Order kOrder>
DRIFT_512 Floats load(const float16* x) {
  static_assert(kOrder == Order::kInOrder);
  return {_mm512_cvtph_ps(load_256(x)), _mm512_cvtph_ps(load_256(x + 16))};
}

DRIFT_512 Floats scaled(Bits codes, float scale) {
  const __m512 s = _mm512_set1_ps(scale);
  return {_mm512_mul_ps(_mm512_cvtepi32_ps(codes.a), s), _mm512_mul_ps(_mm512_cvtepi32_ps(codes.b), s)};
}

template <Order kOrder>
DRIFT_512 Floats decode(const int8_code* x, float scale) {
  return scaled(widen_signed_bytes<kOrder>(x), scale);
}

// By way of float16, which has all its numbers, 2^-8 of them: the processor's conversion is not slow where those are
// subnormal.
template <Order kOrder>
DRIFT_512 Floats decode(const fp8_code* x, float scale) {
  __m512i codes = _mm512_cvtepu8_epi16(load_256(x));
  if constexpr (kOrder == Order::kEvenOdd) {
    const __m512i even = counting_by_two(0), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    codes = _mm512_permutexvar_epi16(_mm512_inserti64x4(even, low(odd), 1), codes);
  }
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16(-0x8000));
  const __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(codes, 7), _mm512_set1_epi16(0x3f80));
  const __m512i halves = _mm512_or_si512(sign, magnitude);
  const __m512 back = _mm512_set1_ps(0x1p8f), s = _mm512_set1_ps(scale);
  return {_mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(low(halves)), back), s),
          _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(high(halves)), back), s)};
}

DRIFT_512 __m512 decode_moment(__m512i code, float scale) {
  const __m512 x = _mm512_cvtepi32_ps(code);  // its square is exact
  return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_abs_ps(x)), _mm512_set1_ps(scale));
}

DRIFT_512 Floats decode(const moment_code* x, float scale) {
  const Bits codes = widen_signed_bytes<Order::kInOrder>(x);
  return {decode_moment(codes.a, scale), decode_moment(codes.b, scale)};
}

// As the variance, not its root.
DRIFT_512 Floats decode(const variance_code* x, float scale) {
  const Bits codes{_mm512_cvtepu8_epi32(load_128(x)), _mm512_cvtepu8_epi32(load_128(x + 16))};
  const Floats root = scaled(codes, scale);
  return {_mm512_mul_ps(root.a, root.a), _mm512_mul_ps(root.b, root.b)};
}

// A delta, of whatever type.
template <Order kOrder, class Delta>
DRIFT_512 Floats load_delta(const Delta* x, const float* scales, int64_t i) {
  if constexpr (kCoded<Delta>) {
    return decode<kOrder>(x + i, scales[i / kScaleBlock]);
  } else {
    return load<kOrder>(x + i);
  }
}

template <Order kOrder, class Param>
DRIFT_512 Floats load_param(const Param* x, const Residual<Param>* residual, int64_t i) {
  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    const Bits upper = as_upper<kOrder>(x + i);
    const Bits rest = widen_signed<kOrder>(residual + i);
    return floats(Bits{_mm512_add_epi32(upper.a, rest.a), _mm512_add_epi32(upper.b, rest.b)});
  } else {
    return load<kOrder>(x + i);
  }
}

// What follows stores floats of which a NaN is canonical: then no rounding below needs to look for one.

DRIFT_512 __mmask16 nan_in(Floats x) { return _mm512_cmp_ps_mask(x.a, x.b, _CMP_UNORD_Q); }

DRIFT_512 __m512 canonical(__m512 x) {
  return floats(_mm512_mask_mov_epi32(bits(x), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), words(0x7fc00000)));
}

DRIFT_512 Floats canonical(Floats x) { return {canonical(x.a), canonical(x.b)}; }

DRIFT_512 __m512i plus(__m512i x, uint32_t y) { return _mm512_add_epi32(x, words(y)); }

// Half a unit of a bfloat16 is added, but a bit less where the value below is even.
DRIFT_512 __m512i rounded_to_even(__m512i x) {
  const __mmask16 odd = _mm512_test_epi32_mask(x, words(0x10000));
  return _mm512_add_epi32(x, _mm512_mask_blend_epi32(odd, words(0x7fff), words(0x8000)));
}

template <Order kOrder>
DRIFT_512 void store(float* x, Floats value, const uint32_t*) {
  if constexpr (kOrder == Order::kInOrder) {
    _mm512_storeu_ps(x, value.a);
    _mm512_storeu_ps(x + 16, value.b);
  } else {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_ps(x, _mm512_permutex2var_ps(value.a, first, value.b));
    _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps(value.a, plus(first, 8), value.b));
  }
}

template <Order kOrder>
DRIFT_512 void store(bfloat16* x, Floats value, const uint32_t*) {
  const Bits nearest{rounded_to_even(bits(value.a)), rounded_to_even(bits(value.b))};
  _mm512_storeu_si512(x, upper_halves<kOrder>(nearest));
}

template <Order kOrder>
DRIFT_512 void store(float16* x, Floats value, const uint32_t*) {
  static_assert(kOrder == Order::kInOrder);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i a = _mm512_castsi256_si512(_mm512_cvtps_ph(value.a, kNearest));
  _mm512_storeu_si512(x, _mm512_inserti64x4(a, _mm512_cvtps_ph(value.b, kNearest), 1));
}

// `random`: of these 32 elements.
template <Order kOrder>
DRIFT_512 void store(stochastic_bfloat16* x, Floats value, const uint32_t* random) {
  const Bits more = widen<kOrder>(random);
  const Bits sum{_mm512_add_epi32(bits(value.a), more.a), _mm512_add_epi32(bits(value.b), more.b)};
  _mm512_storeu_si512(x, upper_halves<kOrder>(sum));
}

template <Order kOrder, class Param>
DRIFT_512 void store_param(Param* x, Residual<Param>* residual, int64_t i, Floats value, const uint32_t* random) {
  if constexpr (std::is_same_v<Param, master_bfloat16>) {
    const Bits nearest{plus(bits(value.a), 0x8000), plus(bits(value.b), 0x8000)};
    _mm512_storeu_si512(x + i, upper_halves<kOrder>(nearest));
    _mm512_storeu_si512(residual + i, lower_halves<kOrder>(bits(value)));
  } else {
    store<kOrder>(x + i, value, random);
  }
}

// The largest unsigned word of each of four registers.
DRIFT_512 __m128i largest_of(const __m512i x[4]) {
  const __m512i ab = _mm512_max_epu32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  const __m512i cd = _mm512_max_epu32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  const __m512i abcd = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_max_epu32(low(abcd), high(abcd));
  return _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// The scales of blocks whose largest magnitudes have these bits, as scale_of of codes.h has them for one; and what
// their elements are multiplied by.
struct Scales {
  alignas(16) float scale[4], inverse[4];
};

template <class T>
DRIFT_512 Scales scales_of(__m128i largest) {
  const __m128 limit = _mm_set1_ps(std::is_same_v<T, moment_code> ? 127.0f * 127.0f : 255.0f);
  const __m128 least = _mm_set1_ps(0x1p-126f);
  __m128 scale = _mm_div_ps(_mm_castsi128_ps(largest), limit);
  const __mmask8 small = _mm_cmp_ps_mask(scale, least, _CMP_LT_OQ) & _mm_test_epi32_mask(largest, largest);
  scale = _mm_mask_mov_ps(scale, small, least);
  const __mmask8 not_finite = _mm_cmpge_epu32_mask(largest, _mm_set1_epi32(0x7f800000));
  scale = _mm_mask_mov_ps(scale, not_finite, _mm_castsi128_ps(_mm_set1_epi32(0x7fc00000)));
  const __mmask8 positive = _mm_cmp_ps_mask(scale, _mm_setzero_ps(), _CMP_GT_OQ);
  Scales scales;
  _mm_store_ps(scales.scale, scale);
  _mm_store_ps(scales.inverse, _mm_maskz_div_ps(positive, _mm_set1_ps(1.0f), scale));
  return scales;
}

// The codes of 16 moments, or of 16 roots; conversions round to nearest, ties to even.
DRIFT_512 __m128i code_of_moments(__m512 x, __m512 inverse) {
  const __m512 root = _mm512_sqrt_ps(_mm512_mul_ps(_mm512_abs_ps(x), inverse));
  const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(root, _mm512_set1_ps(127.0f)));  // the limit, of a NaN
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_cvtepi32_epi8(_mm512_mask_sub_epi32(code, negative, _mm512_setzero_si512(), code));
}

DRIFT_512 __m128i code_of_roots(__m512 x, __m512 inverse) {
  const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(255.0f)));
  const __mmask16 above_zero = _mm512_test_epi32_mask(bits(x), words(0xffffffff));
  return _mm512_cvtepi32_epi8(_mm512_mask_max_epi32(code, above_zero, code, words(1)));
}

// The random bits of kPrepared elements whose eights follow one another from `first` on, without a carry to their upper
// words (what is the same in all calls is then left to be computed once): eight calls of Philox at a
// time, a word of each in 64 bits, of which the upper half is not looked at.
DRIFT_512 void draw_eights(const RandomBits& random, Stream stream, int64_t first, uint32_t* out) {
  __m512i keys[kPhiloxRounds][2];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys[round][0] = words(static_cast<uint32_t>(random.key) + static_cast<uint32_t>(round) * 0x9E3779B9u);
    keys[round][1] = words(static_cast<uint32_t>(random.key >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u);
  }
  constexpr int kXor = 0x96, kTogether = 2;
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // that the words come out in theirs
  const __m512i high_word = words(static_cast<uint32_t>(first >> 32) | static_cast<uint32_t>(stream) << 30);
  __m512i index = _mm512_add_epi64(_mm512_set1_epi64(first), order);
  for (int64_t i = 0; i < kPrepared / 2; i += kTogether * kTurn) {
    __m512i x0[kTogether], x1[kTogether], x2[kTogether], x3[kTogether];
    for (int k = 0; k < kTogether; ++k, index = _mm512_add_epi64(index, _mm512_set1_epi64(8))) {
      x0[k] = index;
      x1[k] = high_word;
      x2[k] = words(random.step);
      x3[k] = _mm512_setzero_si512();
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int k = 0; k < kTogether; ++k) {
        const __m512i a = _mm512_mul_epu32(x0[k], words(0xD2511F53u)), b = _mm512_mul_epu32(x2[k], words(0xCD9E8D57u));
        x0[k] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), x1[k], keys[round][0], kXor);
        x2[k] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), x3[k], keys[round][1], kXor);
        x1[k] = b;
        x3[k] = a;
      }
    }
    for (int k = 0; k < kTogether; ++k) {
      const __m512i first_words = _mm512_mask_blend_epi32(0xAAAA, x0[k], _mm512_slli_epi64(x1[k], 32));
      const __m512i last_words = _mm512_mask_blend_epi32(0xAAAA, x2[k], _mm512_slli_epi64(x3[k], 32));
      _mm512_storeu_si512(out + i + k * kTurn, _mm512_unpacklo_epi64(first_words, last_words));
      _mm512_storeu_si512(out + i + k * kTurn + 16, _mm512_unpackhi_epi64(first_words, last_words));
    }
  }
}

}  // namespace drift::avx512
