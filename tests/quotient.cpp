// The quick square root and quotient of the cuda backend's kernels on the host, compared with the C library.
#include "../csrc/cuda/blocks.h"

using namespace drift;

namespace {

float with_exponent(int exponent, uint32_t mantissa) {
  return bits_to_float(static_cast<uint32_t>(exponent + 127) << 23 | mantissa);
}

bool same(float a, float b) { return float_to_bits(a) == float_to_bits(b); }

template <class T>
T of_bits(uint32_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class State>
bool usual_pair(const uint32_t* param, const uint32_t* m, const uint32_t* v) {
  return usual<State, 2>({of_bits<float>(param[0]), of_bits<float>(param[1])},
                         {of_bits<State>(m[0]), of_bits<State>(m[1])}, {of_bits<State>(v[0]), of_bits<State>(v[1])});
}

}  // namespace

// The number of mantissas, of all, whose root differs from sqrtf's.
extern "C" int64_t wrong_roots(int exponent) {
  int64_t wrong = 0;
  for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
    const float x = with_exponent(exponent, mantissa);
    wrong += !same(quick_root(x), sqrtf(x));
  }
  return wrong;
}

extern "C" float root(float x) { return quick_root(x); }

extern "C" int64_t wrong_quotients(const float* a, const float* b, int64_t count) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong += !same(quick_quotient(a[i], b[i]), a[i] / b[i]);
  return wrong;
}

// Likewise for scales and their inverses, for all mantissas of a block's largest magnitude.
extern "C" int64_t wrong_scales(int exponent) {
  int64_t wrong = 0;
  for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
    const uint32_t largest = float_to_bits(with_exponent(exponent, mantissa));
    const float moment = scale_of<moment_code>(largest), variance = scale_of<variance_code>(largest);
    wrong += !same(quick_scale<moment_code>(largest), moment) || !same(quick_inverse(moment), inverse_of(moment));
    wrong +=
        !same(quick_scale<variance_code>(largest), variance) || !same(quick_inverse(variance), inverse_of(variance));
  }
  return wrong;
}

extern "C" bool usual_float(const uint32_t* p, const uint32_t* m, const uint32_t* v) {
  return usual_pair<float>(p, m, v);
}
extern "C" bool usual_bfloat16(const uint32_t* p, const uint32_t* m, const uint32_t* v) {
  return usual_pair<bfloat16>(p, m, v);
}
extern "C" bool admissible_float(const float* p, const float* m, const float* v, float eps) {
  return admissible<2>({p[0], p[1]}, {m[0], m[1]}, {v[0], v[1]}, eps);
}
