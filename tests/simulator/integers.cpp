// Integers, bits and predicates.
#include <algorithm>

#include "operation.h"

namespace simulator {
namespace {

template <class T>
void define_bits(const string& type) {
  constexpr u32 kBits = sizeof(T) * 8;
  op("and.b" + type, [](T a, T b) { return T(a & b); });
  op("or.b" + type, [](T a, T b) { return T(a | b); });
  op("xor.b" + type, [](T a, T b) { return T(a ^ b); });
  op("not.b" + type, [](T a) { return T(~a); });
  op("shl.b" + type, [](T a, u32 n) { return n >= kBits ? T(0) : T(a << n); });
  op("shr.b" + type, [](T a, u32 n) { return n >= kBits ? T(0) : T(a >> n); });
  for (const char kind : {'b', 'u', 's', 'f'}) {
    op(string("mov.") + kind + type, [](T a) { return a; });
    op(string("selp.") + kind + type, [](T a, T b, bool which) { return which ? a : b; });
  }
  op("setp.eq.b" + type, [](T a, T b) { return a == b; });
  op("setp.ne.b" + type, [](T a, T b) { return a != b; });
}

// W holds a product.
template <class T, class W>
void define_typed(const string& type) {
  using U = std::make_unsigned_t<T>;
  constexpr u32 kBits = sizeof(T) * 8;
  op("add." + type, [](T a, T b) { return T(U(a) + U(b)); });
  op("sub." + type, [](T a, T b) { return T(U(a) - U(b)); });
  op("mul.lo." + type, [](T a, T b) { return T(W(a) * W(b)); });
  op("mul.hi." + type, [](T a, T b) { return T(W(a) * W(b) >> kBits); });
  op("mad.lo." + type, [](T a, T b, T c) { return T(U(W(a) * W(b)) + U(c)); });
  op("mad.hi." + type, [](T a, T b, T c) { return T(U(W(a) * W(b) >> kBits) + U(c)); });
  op("min." + type, [](T a, T b) { return b < a ? b : a; });
  op("max." + type, [](T a, T b) { return a < b ? b : a; });
  op("shr." + type, [](T a, u32 n) { return T(n >= kBits ? (a < T(0) ? T(-1) : T(0)) : T(a >> n)); });
  op("neg." + type, [](T a) { return T(U(0) - U(a)); });
  op("abs." + type, [](T a) { return a < T(0) ? T(U(0) - U(a)) : a; });
  for (const bool is_division : {true, false}) {
    const auto step = is_division ? [](Thread& t, const Instruction& in) {
      if (t.get<T>(in.in[1]) == 0) t.fault("division by zero");
      t.set<T>(in.out[0], T(W(t.get<T>(in.in[0])) / W(t.get<T>(in.in[1]))));
    } : Step([](Thread& t, const Instruction& in) {
      if (t.get<T>(in.in[1]) == 0) t.fault("division by zero");
      t.set<T>(in.out[0], T(W(t.get<T>(in.in[0])) % W(t.get<T>(in.in[1]))));
    });
    define((is_division ? "div." : "rem.") + type, step);
  }
  op("setp.eq." + type, [](T a, T b) { return a == b; });
  op("setp.ne." + type, [](T a, T b) { return a != b; });
  op("setp.lt." + type, [](T a, T b) { return a < b; });
  op("setp.le." + type, [](T a, T b) { return a <= b; });
  op("setp.gt." + type, [](T a, T b) { return a > b; });
  op("setp.ge." + type, [](T a, T b) { return a >= b; });
  if constexpr (sizeof(T) < 8) {
    op("mul.wide." + type, [](T a, T b) { return W(W(a) * W(b)); });
    op("mad.wide." + type,
       [](T a, T b, W c) { return W(std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c)); });
  }
}

// Lanes of 16 bits.
template <class T, class F>
void define_halves(const string& name, F) {
  op(name, [](u32 a, u32 b) {
    const u32 low = u16(F()(T(a), T(b))), high = u16(F()(T(a >> 16), T(b >> 16)));
    return high << 16 | low;
  });
}

u32 permuted(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 value = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 nibble = selector >> 4 * i & 15;
    u32 byte = bytes >> 8 * (nibble & 7) & 255;
    if ((nibble & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    value |= byte << 8 * i;
  }
  return value;
}
u32 looked_up(u32 a, u32 b, u32 c, u32 truth) {
  u32 value = 0;
  for (u32 i = 0; i < 8; ++i) {
    if ((truth >> i & 1) != 0) value |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
  }
  return value;
}
template <class T>
T field(T a, u32 position, u32 length) {
  constexpr u32 kBits = sizeof(T) * 8;
  position &= 255;
  length &= 255;
  T value = 0;
  const bool sign = length != 0 && a < T(0) && std::is_signed_v<T> && position + length > kBits;
  for (u32 i = 0; i < kBits; ++i) {
    const u32 from = std::is_signed_v<T> && length != 0 && i >= length ? position + length - 1 : position + i;
    const bool inside = i < length || (std::is_signed_v<T> && length != 0);
    const bool bit = inside && (from < kBits ? (u64(a) >> from & 1) != 0 : sign);
    value |= T(u64(bit) << i);
  }
  return value;
}

void define_bit_fields() {
  op("prmt.b32", [](u32 a, u32 b, u32 c) { return permuted(a, b, c); });
  op("lop3.b32", [](u32 a, u32 b, u32 c, u32 truth) { return looked_up(a, b, c, truth); });
  op("shf.l.wrap.b32", [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (n & 31) >> 32); });
  op("shf.r.wrap.b32", [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); });
  op("shf.l.clamp.b32", [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << std::min(n, 32u) >> 32); });
  op("shf.r.clamp.b32", [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> std::min(n, 32u)); });
  op("bfe.u32", [](u32 a, u32 position, u32 length) { return field(a, position, length); });
  op("bfe.s32", [](i32 a, u32 position, u32 length) { return field(a, position, length); });
  op("bfe.u64", [](u64 a, u32 position, u32 length) { return field(a, position, length); });
  op("bfe.s64", [](i64 a, u32 position, u32 length) { return field(a, position, length); });
  op("bfi.b32", [](u32 a, u32 b, u32 position, u32 length) {
    const u32 at = position & 255, bits = length & 255;
    const u64 mask = at > 31 ? 0 : ((bits > 31 ? ~0ull : (1ull << bits) - 1) << at);
    return u32((b & ~mask) | (at > 31 ? 0 : u64(a) << at & mask));
  });
  op("popc.b32", [](u32 a) { return u32(__builtin_popcount(a)); });
  op("popc.b64", [](u64 a) { return u32(__builtin_popcountll(a)); });
  op("clz.b32", [](u32 a) { return u32(a == 0 ? 32 : __builtin_clz(a)); });
  op("clz.b64", [](u64 a) { return u32(a == 0 ? 64 : __builtin_clzll(a)); });
  op("brev.b32", [](u32 a) {
    u32 value = 0;
    for (int i = 0; i < 32; ++i) value |= (a >> i & 1) << (31 - i);
    return value;
  });
  define_halves<i16>("min.s16x2", [](i16 a, i16 b) { return std::min(a, b); });
  define_halves<i16>("max.s16x2", [](i16 a, i16 b) { return std::max(a, b); });
  define_halves<u16>("min.u16x2", [](u16 a, u16 b) { return std::min(a, b); });
  define_halves<u16>("max.u16x2", [](u16 a, u16 b) { return std::max(a, b); });
  define_halves<u16>("add.u16x2", [](u16 a, u16 b) { return u16(a + b); });
  define_halves<i16>("add.s16x2", [](i16 a, i16 b) { return i16(a + b); });
}

void define_predicates() {
  op("mov.pred", [](bool a) { return a; });
  op("and.pred", [](bool a, bool b) { return a && b; });
  op("or.pred", [](bool a, bool b) { return a || b; });
  op("xor.pred", [](bool a, bool b) { return a != b; });
  op("not.pred", [](bool a) { return !a; });
}

}  // namespace

void define_integers() {
  define_bits<u8>("8");
  define_bits<u16>("16");
  define_bits<u32>("32");
  define_bits<u64>("64");
  define_typed<i16, i32>("s16");
  define_typed<u16, u32>("u16");
  define_typed<i32, i64>("s32");
  define_typed<u32, u64>("u32");
  define_typed<i64, __int128>("s64");
  define_typed<u64, unsigned __int128>("u64");
  define_bit_fields();
  define_predicates();
}

}  // namespace simulator
