// The codes of 64 elements, in the registers of lanes_avx512.h. Bitwise identical to codes.h.
#pragma once

#include "lanes_avx512.h"

namespace drift::avx512 {

DRIFT_512 Floats converted(Bits x) {
  Floats value;
  DRIFT_EACH value.r[k] = _mm512_cvtepi32_ps(x.r[k]);
  return value;
}

// Converts signed bytes to floats.
template <Order kOrder>
DRIFT_512 Floats signed_bytes(const void* x) {
  const auto* bytes = static_cast<const char*>(x);
  Bits wide;
  if constexpr (kOrder == Order::kInOrder) {
    DRIFT_EACH wide.r[k] = _mm512_cvtepi8_epi32(load_128(bytes + 16 * k));
  } else {
    DRIFT_EACH_PAIR {
      const __m512i pair = _mm512_cvtepi8_epi16(load_256(bytes + 16 * k));
      wide.r[k] = _mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16);
      wide.r[k + 1] = _mm512_srai_epi32(pair, 16);
    }
  }
  return converted(wide);
}

template <Order kOrder>
DRIFT_512 Floats decode(const int8_code* x, float scale) {
  return signed_bytes<kOrder>(x) * _mm512_set1_ps(scale);
}

// Goes through float16, which represents every value times 2^-8: the processor's conversion is fast for subnormals too.
template <Order kOrder>
DRIFT_512 Floats decode(const fp8_code* x, float scale) {
  Floats value;
  DRIFT_EACH_PAIR {
    __m512i codes = _mm512_cvtepu8_epi16(load_256(x + 16 * k));
    if constexpr (kOrder == Order::kEvenOdd) {
      codes = _mm512_permutexvar_epi16(_mm512_inserti64x4(counting_by_two(0), low(counting_by_two(1)), 1), codes);
    }
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), halves(0x8000));
    const __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(codes, 7), halves(0x3f80));
    const __m512i as_float16 = _mm512_or_si512(sign, magnitude);
    value.r[k] = _mm512_cvtph_ps(low(as_float16));
    value.r[k + 1] = _mm512_cvtph_ps(high(as_float16));
  }
  return value * _mm512_set1_ps(0x1p8f) * _mm512_set1_ps(scale);
}

DRIFT_512 Floats decode(const moment_code* x, float scale) {
  const Floats code = signed_bytes<Order::kInOrder>(x);  // its square is exact
  return code * magnitude(code) * _mm512_set1_ps(scale);
}

// Returns the variance, not its square root.
DRIFT_512 Floats decode(const variance_code* x, float scale) {
  Bits codes;
  DRIFT_EACH codes.r[k] = _mm512_cvtepu8_epi32(load_128(x + 16 * k));
  const Floats root = converted(codes) * _mm512_set1_ps(scale);
  return root * root;
}

// Loads a delta of any type.
template <Order kOrder, class Delta>
DRIFT_512 Floats load_delta(const Delta* x, [[maybe_unused]] const float* scales, int64_t i) {
  if constexpr (kCoded<Delta>) {
    return decode<kOrder>(x + i, scales[i / kScaleBlock]);
  } else {
    return load<kOrder>(x + i);
  }
}

// Blocks whose scales are computed together.
constexpr int kScales = kPrepared / kScaleBlock;
static_assert(kScales == 4, "a register holds four");

// Per lane, the largest magnitudes of the moments and of the variances of kScales blocks, as float bits.
struct Largest {
  __m512i moments[kScales] = {}, variances[kScales] = {};

  DRIFT_512 void take(int64_t block, Floats exp_avg, Floats exp_avg_sq) {
    __m512i moment = moments[block], variance = variances[block];
    DRIFT_EACH {
      moment = _mm512_max_epu32(moment, bits(_mm512_abs_ps(exp_avg.r[k])));
      variance = _mm512_max_epu32(variance, bits(exp_avg_sq.r[k]));
    }
    moments[block] = moment;
    variances[block] = variance;
  }
};

// The largest word of each of four registers.
DRIFT_512 __m128i largest_of(const __m512i x[4]) {
  const __m512i ab = _mm512_max_epu32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  const __m512i cd = _mm512_max_epu32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  const __m512i abcd = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_max_epu32(low(abcd), high(abcd));
  return _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// The scales of kScales blocks, as scale_of in codes.h computes them for one, and their inverses: first of the moments,
// then of the square roots of the variances.
struct Scales {
  alignas(32) float scale[2 * kScales], inverse[2 * kScales];
  bool finite;
};

DRIFT_512 Scales scales_of(const Largest& largest) {
  const __m128i roots = _mm_castps_si128(_mm_sqrt_ps(_mm_castsi128_ps(largest_of(largest.variances))));
  const __m256i most = _mm256_inserti128_si256(_mm256_castsi128_si256(largest_of(largest.moments)), roots, 1);
  constexpr float kMoment = 127.0f * 127.0f, kRoot = 255.0f;
  const __m256 limit = _mm256_setr_ps(kMoment, kMoment, kMoment, kMoment, kRoot, kRoot, kRoot, kRoot);
  const __m256 least = _mm256_set1_ps(0x1p-126f);
  __m256 scale = _mm256_div_ps(_mm256_castsi256_ps(most), limit);
  const __mmask8 small = _mm256_cmp_ps_mask(scale, least, _CMP_LT_OQ) & _mm256_test_epi32_mask(most, most);
  scale = _mm256_mask_mov_ps(scale, small, least);
  const __mmask8 not_finite = _mm256_cmpge_epu32_mask(most, _mm256_set1_epi32(0x7f800000));
  scale = _mm256_mask_mov_ps(scale, not_finite, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __mmask8 positive = _mm256_cmp_ps_mask(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
  Scales scales;
  _mm256_store_ps(scales.scale, scale);
  _mm256_store_ps(scales.inverse, _mm256_maskz_div_ps(positive, _mm256_set1_ps(1.0f), scale));
  scales.finite = not_finite == 0;
  return scales;
}

// Stores the codes of four registers, whose bytes were packed side by side in 128-bit lanes.
DRIFT_512 void store_packed(void* x, __m512i packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(x, _mm512_permutexvar_epi32(order, packed));
}

// Conversions round to nearest, ties to even. With finite scales no code exceeds the limit; otherwise `kLimited`
// clamps, and a NaN gets the limit too.
template <bool kLimited>
DRIFT_512 void encode(moment_code* x, Floats value, float inverse) {
  Floats size = root(magnitude(value) * _mm512_set1_ps(inverse));
  Bits code;
  DRIFT_EACH {
    const __m512i sign_bit = words(0x80000000);
    if constexpr (kLimited) {
      size.r[k] = _mm512_min_ps(size.r[k], _mm512_set1_ps(127.0f));
      value.r[k] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value.r[k], _mm512_setzero_ps(), _CMP_LT_OQ), value.r[k]);
    }
    constexpr int kSelect = 0xCA;
    code.r[k] =
        _mm512_cvtps_epi32(floats(_mm512_ternarylogic_epi32(sign_bit, bits(value.r[k]), bits(size.r[k]), kSelect)));
  }
  store_packed(x,
               _mm512_packs_epi16(_mm512_packs_epi32(code.r[0], code.r[1]), _mm512_packs_epi32(code.r[2], code.r[3])));
}

template <bool kLimited>
DRIFT_512 void encode(variance_code* x, Floats root, float inverse) {
  const Floats size = root * _mm512_set1_ps(inverse);
  Bits code;
  DRIFT_EACH {
    const __m512 limited = kLimited ? _mm512_min_ps(size.r[k], _mm512_set1_ps(255.0f)) : size.r[k];
    const __m512i least = _mm512_min_epu32(bits(root.r[k]), words(1));
    code.r[k] = _mm512_max_epu32(_mm512_cvtps_epi32(limited), least);
  }
  store_packed(
      x, _mm512_packus_epi16(_mm512_packus_epi32(code.r[0], code.r[1]), _mm512_packus_epi32(code.r[2], code.r[3])));
}

}  // namespace drift::avx512
