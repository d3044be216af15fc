// Defines instructions as functions of values. The PTX ISA specifies what they do.
#pragma once

#include <cfenv>
#include <cmath>
#include <string>
#include <utility>

#include "engine.h"

namespace simulator {

using std::string;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

void define(const string& name, Step step);
void define(const string& name, Collective collective);
void define_integers();
void define_floats();
void define_control();

// A function of values becomes an instruction of registers.
enum Form { kPlain, kArithmetic, kFlushed };  // arithmetic: NaNs are canonical; flushed: subnormals are zeros

template <Form kForm, class T>
T formed(T value) {
  if constexpr (kForm != kPlain && std::is_floating_point_v<T>) {
    if (kForm == kFlushed && std::fpclassify(value) == FP_SUBNORMAL) return std::copysign(T(0), value);
  }
  return value;
}
template <Form kForm, class T>
T result(T value) {
  if constexpr (kForm != kPlain && std::is_same_v<T, float>) {
    if (std::isnan(value)) {
      const u32 bits = 0x7fffffff;
      std::memcpy(&value, &bits, sizeof value);
    }
  }
  return formed<kForm>(value);
}
template <Form kForm, class F, class R, class... A, size_t... I>
void apply(Thread& t, const Instruction& in, R (F::*)(A...) const, std::index_sequence<I...>) {
  t.set<R>(in.out[0], result<kForm>(F()(formed<kForm>(t.get<A>(in.in[I]))...)));
}
template <class F, class R, class... A>
constexpr size_t count_of(R (F::*)(A...) const) {
  return sizeof...(A);
}
template <Form kForm = kPlain, int kRounding = FE_TONEAREST, class F>
void op(const string& name, F) {
  define(name, Step([](Thread& t, const Instruction& in) {
           if constexpr (kRounding != FE_TONEAREST) std::fesetround(kRounding);
           apply<kForm, F>(t, in, &F::operator(), std::make_index_sequence<count_of(&F::operator())>());
           if constexpr (kRounding != FE_TONEAREST) std::fesetround(FE_TONEAREST);
         }));
}
template <Form kForm = kArithmetic, class F>
void rounded(const string& before, const string& after, F f) {
  op<kForm, FE_TONEAREST>(before + ".rn" + after, f);
  op<kForm, FE_TOWARDZERO>(before + ".rz" + after, f);
  op<kForm, FE_DOWNWARD>(before + ".rm" + after, f);
  op<kForm, FE_UPWARD>(before + ".rp" + after, f);
}

}  // namespace simulator
