// Floating point: arithmetic, comparisons, conversions, approximations.
#include <algorithm>
#include <limits>

#include "operation.h"

namespace simulator {
namespace {

// Correctly rounded, then offset: results that must not depend on an approximation do not depend on the offset.
template <class F>
F approximately(F x) {
  const int nudge = device().options.nudge;
  if (!std::isfinite(x) || x == 0) return x;
  const F towards = std::copysign(std::numeric_limits<F>::infinity(), F(nudge));
  for (int i = std::abs(nudge); i > 0; --i) x = std::nextafter(x, towards);
  return x;
}

// For a number and a NaN, returns the number; +0 is larger than -0.
template <class F>
F smaller(F a, F b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class F>
F larger(F a, F b) {
  return -smaller<F>(-a, -b);
}

template <class F, Form kForm>
void define_arithmetic(const string& type) {
  const string ftz = kForm == kFlushed ? ".ftz" : "";
  const string after = ftz + "." + type;
  rounded<kForm>("add", after, [](F a, F b) { return a + b; });
  rounded<kForm>("sub", after, [](F a, F b) { return a - b; });
  rounded<kForm>("mul", after, [](F a, F b) { return a * b; });
  rounded<kForm>("div", after, [](F a, F b) { return a / b; });
  rounded<kForm>("fma", after, [](F a, F b, F c) { return std::fma(a, b, c); });
  rounded<kForm>("mad", after, [](F a, F b, F c) { return std::fma(a, b, c); });
  rounded<kForm>("sqrt", after, [](F a) { return std::sqrt(a); });
  rounded<kForm>("rcp", after, [](F a) { return F(1) / a; });
  op<kForm>("add" + after, [](F a, F b) { return a + b; });
  op<kForm>("sub" + after, [](F a, F b) { return a - b; });
  op<kForm>("mul" + after, [](F a, F b) { return a * b; });
  op<kForm>("min" + after, [](F a, F b) { return smaller(a, b); });
  op<kForm>("max" + after, [](F a, F b) { return larger(a, b); });
  op<kForm>("min" + ftz + ".NaN." + type,
            [](F a, F b) { return std::isnan(a + b) && !(std::isinf(a) && std::isinf(b)) ? a + b : smaller(a, b); });
  op<kForm>("max" + ftz + ".NaN." + type,
            [](F a, F b) { return std::isnan(a + b) && !(std::isinf(a) && std::isinf(b)) ? a + b : larger(a, b); });
  // Only the sign changes: a NaN keeps its payload, except in the flushed form.
  constexpr Form kSign = kForm == kFlushed ? kFlushed : kPlain;
  op<kSign>("abs" + after, [](F a) { return std::fabs(a); });
  op<kSign>("neg" + after, [](F a) { return -a; });
  op<kForm>("rcp.approx" + after, [](F a) { return approximately(F(1) / a); });
  op<kForm>("sqrt.approx" + after, [](F a) { return approximately(std::sqrt(a)); });
  // Not offset: for a few roots in a million, the sequence that nvcc generates for sqrt.rn, also used by the kernels,
  // is exact only with an approximation as good as the hardware's.
  op<kForm>("rsqrt.approx" + after, [](F a) { return F(1 / std::sqrt(static_cast<long double>(a))); });
  op<kForm>("ex2.approx" + after, [](F a) { return approximately(std::exp2(a)); });
  op<kForm>("lg2.approx" + after, [](F a) { return approximately(std::log2(a)); });
  op<kForm>("div.approx" + after, [](F a, F b) { return approximately(a / b); });
  op<kForm>("div.full" + after, [](F a, F b) { return approximately(a / b); });
  op<kForm>("set.gtu.f32" + after, [](F a, F b) { return a <= b ? 0.0f : 1.0f; });
  op<kForm>("setp.eq" + after, [](F a, F b) { return a == b; });
  op<kForm>("setp.ne" + after, [](F a, F b) { return a < b || a > b; });
  op<kForm>("setp.lt" + after, [](F a, F b) { return a < b; });
  op<kForm>("setp.le" + after, [](F a, F b) { return a <= b; });
  op<kForm>("setp.gt" + after, [](F a, F b) { return a > b; });
  op<kForm>("setp.ge" + after, [](F a, F b) { return a >= b; });
  op<kForm>("setp.equ" + after, [](F a, F b) { return !(a < b || a > b); });
  op<kForm>("setp.neu" + after, [](F a, F b) { return a != b; });
  op<kForm>("setp.ltu" + after, [](F a, F b) { return !(a >= b); });
  op<kForm>("setp.leu" + after, [](F a, F b) { return !(a > b); });
  op<kForm>("setp.gtu" + after, [](F a, F b) { return !(a <= b); });
  op<kForm>("setp.geu" + after, [](F a, F b) { return !(a < b); });
  op<kForm>("setp.num" + after, [](F a, F b) { return !std::isnan(a) && !std::isnan(b); });
  op<kForm>("setp.nan" + after, [](F a, F b) { return std::isnan(a) || std::isnan(b); });
}

template <class F>
void define_tests(const string& type) {
  op("copysign." + type, [](F a, F b) { return std::copysign(b, a); });
  op("testp.finite." + type, [](F a) { return std::isfinite(a); });
  op("testp.infinite." + type, [](F a) { return std::isinf(a); });
  op("testp.notanumber." + type, [](F a) { return std::isnan(a); });
  op("testp.number." + type, [](F a) { return !std::isnan(a); });
  op("testp.normal." + type, [](F a) { return std::isnormal(a); });
  op("testp.subnormal." + type, [](F a) { return std::fpclassify(a) == FP_SUBNORMAL; });
  const auto whole = "." + type + "." + type;
  op<kArithmetic>("cvt.rni" + whole, [](F a) { return std::nearbyint(a); });
  op<kArithmetic>("cvt.rzi" + whole, [](F a) { return std::trunc(a); });
  op<kArithmetic>("cvt.rmi" + whole, [](F a) { return std::floor(a); });
  op<kArithmetic>("cvt.rpi" + whole, [](F a) { return std::ceil(a); });
  op("cvt.sat" + whole, [](F a) { return std::isnan(a) ? F(0) : std::clamp(a, F(0), F(1)); });
}

// Converts to the nearest value of T; NaN gives 0, or for 64 bits the sign bit.
template <class T, class F>
T saturated(F x) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(x)) return sizeof(T) == 8 || sizeof(F) == 8 ? T(T(1) << (sizeof(T) * 8 - 1)) : T(0);
  const F end = std::ldexp(F(1), Limits::digits);
  return x >= end ? Limits::max() : x < (Limits::is_signed ? -end : F(0)) ? Limits::min() : static_cast<T>(x);
}

// Two floats in a register.
struct Pair {
  float low, high;
};
template <class F>
Pair of_each(F f, Pair a, Pair b, Pair c = {}) {
  const auto one = [&](float x, float y, float z) { return result<kArithmetic>(f(x, y, z)); };
  return {one(a.low, b.low, c.low), one(a.high, b.high, c.high)};
}
void define_pairs() {
  rounded<kPlain>("add", ".f32x2",
                  [](Pair a, Pair b) { return of_each([](float x, float y, float) { return x + y; }, a, b); });
  rounded<kPlain>("mul", ".f32x2",
                  [](Pair a, Pair b) { return of_each([](float x, float y, float) { return x * y; }, a, b); });
  rounded<kPlain>("fma", ".f32x2", [](Pair a, Pair b, Pair c) {
    return of_each([](float x, float y, float z) { return std::fma(x, y, z); }, a, b, c);
  });
}

template <class T, class F>
void convert_between(const string& integer, const string& floating) {
  rounded("cvt", "." + floating + "." + integer, [](T a) { return static_cast<F>(a); });
  const string types = "." + integer + "." + floating;
  op("cvt.rni" + types, [](F a) { return saturated<T>(std::nearbyint(a)); });
  op("cvt.rzi" + types, [](F a) { return saturated<T>(std::trunc(a)); });
  op("cvt.rmi" + types, [](F a) { return saturated<T>(std::floor(a)); });
  op("cvt.rpi" + types, [](F a) { return saturated<T>(std::ceil(a)); });
}

template <class D, class S>
void convert_integer(const string& to, const string& from) {
  op("cvt." + to + "." + from, [](S a) { return static_cast<D>(a); });
  op("cvt.sat." + to + "." + from, [](S a) {
    using Limits = std::numeric_limits<D>;
    const auto x = static_cast<__int128>(a);
    return static_cast<D>(std::clamp<__int128>(x, Limits::min(), Limits::max()));
  });
}

template <class T>
void convert_from(const string& from) {
  convert_integer<i8, T>("s8", from);
  convert_integer<u8, T>("u8", from);
  convert_integer<i16, T>("s16", from);
  convert_integer<u16, T>("u16", from);
  convert_integer<i32, T>("s32", from);
  convert_integer<u32, T>("u32", from);
  convert_integer<i64, T>("s64", from);
  convert_integer<u64, T>("u64", from);
  convert_between<T, float>(from, "f32");
  convert_between<T, double>(from, "f64");
}

// Two-byte formats with kExponent exponent bits, in the current rounding mode.
template <int kExponent>
u16 narrowed(float x) {
  constexpr int kMantissa = 15 - kExponent, kBias = (1 << (kExponent - 1)) - 1;
  if (std::isnan(x)) return 0x7fff;
  const u16 sign = std::signbit(x) ? 0x8000 : 0;
  constexpr u16 kInfinity = ((1 << kExponent) - 1) << kMantissa;
  if (std::isinf(x)) return sign | kInfinity;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), 1 - kBias);
  const double whole = std::fabs(std::nearbyint(std::ldexp(static_cast<double>(x), kMantissa - exponent)));
  const double largest = (2 << kMantissa) - 1;
  if (exponent > kBias || (exponent == kBias && whole > largest)) {
    const int rounding = std::fegetround();
    const bool outward = rounding == FE_TONEAREST || rounding == (sign != 0 ? FE_DOWNWARD : FE_UPWARD);
    return sign | (outward ? kInfinity : kInfinity - 1);
  }
  return sign | static_cast<u16>(static_cast<int>(whole) + ((exponent + kBias - 1) << kMantissa));
}
template <int kExponent>
float widened(u16 x) {
  constexpr int kMantissa = 15 - kExponent, kBias = (1 << (kExponent - 1)) - 1;
  const int exponent = x >> kMantissa & ((1 << kExponent) - 1), fraction = x & ((1 << kMantissa) - 1);
  float value = std::ldexp(static_cast<float>(fraction + (exponent != 0 ? 1 << kMantissa : 0)),
                           std::max(exponent, 1) - kBias - kMantissa);
  if (exponent == (1 << kExponent) - 1) value = fraction != 0 ? NAN : HUGE_VALF;
  return (x & 0x8000) != 0 ? -value : value;
}
template <int kExponent>
void convert_halves(const string& type) {
  rounded("cvt", "." + type + ".f32", [](float a) { return narrowed<kExponent>(a); });
  rounded("cvt", "." + type + "x2.f32",
          [](float high, float low) { return u32(narrowed<kExponent>(high)) << 16 | narrowed<kExponent>(low); });
  op<kArithmetic>("cvt.f32." + type, [](u16 a) { return widened<kExponent>(a); });
  for (const char* opcode : {"mov.", "mov.b16."}) op(opcode + type, [](u16 a) { return a; });
}

}  // namespace

void define_floats() {
  define_arithmetic<float, kArithmetic>("f32");
  define_arithmetic<float, kFlushed>("f32");
  define_arithmetic<double, kArithmetic>("f64");
  define_pairs();
  define_tests<float>("f32");
  define_tests<double>("f64");
  convert_from<i8>("s8");
  convert_from<u8>("u8");
  convert_from<i16>("s16");
  convert_from<u16>("u16");
  convert_from<i32>("s32");
  convert_from<u32>("u32");
  convert_from<i64>("s64");
  convert_from<u64>("u64");
  convert_halves<5>("f16");
  convert_halves<8>("bf16");
  op("cvt.f64.f32", [](float a) { return static_cast<double>(a); });
  rounded("cvt", ".f32.f64", [](double a) { return static_cast<float>(a); });
}

}  // namespace simulator
