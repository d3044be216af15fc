// Memory, branches, barriers, and collective operations of a warp.
#include <algorithm>

#include "operation.h"

namespace simulator {
namespace {

void load(Thread& t, const Instruction& in) {
  const Kind kind = in.flag != 0 ? Kind::kReadConstant : Kind::kRead;
  const u8* source = t.at(in.space, t.get<u64>(in.in[0]) + in.offset, in.bytes * in.count, kind);
  for (int i = 0; i < in.count; ++i) {
    u64 value = 0;
    std::memcpy(&value, source + i * in.bytes, in.bytes);
    const int unused = 64 - 8 * in.bytes;
    t.set<u64>(in.out[i], in.is_signed != 0 ? static_cast<u64>(static_cast<i64>(value << unused) >> unused) : value);
  }
}

void store(Thread& t, const Instruction& in) {
  u8* target = t.at(in.space, t.get<u64>(in.in[0]) + in.offset, in.bytes * in.count, Kind::kWrite);
  for (int i = 0; i < in.count; ++i) {
    const u64 value = t.get<u64>(in.in[1 + i]);
    std::memcpy(target + i * in.bytes, &value, in.bytes);
  }
}

template <class T, class F>
void define_atomic(const string& name, F) {
  define("atom." + name, [](Thread& t, const Instruction& in) {
    const u64 address = t.get<u64>(in.in[0]) + in.offset;
    u8* place = t.at(in.space, address, sizeof(T), Kind::kAtomic);
    if (in.flag != 0) t.fenced = true;
    t.hand_over(address);
    T old;
    std::memcpy(&old, place, sizeof old);
    const T now = F()(old, t.get<T>(in.in[1]), in.ins > 2 ? t.get<T>(in.in[2]) : T());
    std::memcpy(place, &now, sizeof now);
    if (in.outs != 0) t.set<T>(in.out[0], old);
  });
}
template <class T>
void define_atomics(const string& type) {
  define_atomic<T>("add." + type, [](T old, T value, T) { return T(old + value); });
  define_atomic<T>("min." + type, [](T old, T value, T) { return std::min(old, value); });
  define_atomic<T>("max." + type, [](T old, T value, T) { return std::max(old, value); });
}
template <class T>
void define_atomic_bits(const string& type) {
  define_atomic<T>("exch.b" + type, [](T, T value, T) { return value; });
  define_atomic<T>("cas.b" + type, [](T old, T compare, T value) { return old == compare ? value : old; });
  define_atomic<T>("and.b" + type, [](T old, T value, T) { return T(old & value); });
  define_atomic<T>("or.b" + type, [](T old, T value, T) { return T(old | value); });
  define_atomic<T>("xor.b" + type, [](T old, T value, T) { return T(old ^ value); });
}

// A value in several registers, the lowest bits first.
template <int kBytes>
void define_packing(const string& type) {
  define("mov.pack.b" + type, [](Thread& t, const Instruction& in) {
    const int bytes = kBytes / in.ins;
    u64 value = 0;
    for (int i = 0; i < in.ins; ++i)
      std::memcpy(reinterpret_cast<u8*>(&value) + i * bytes, t.registers + in.in[i], bytes);
    t.set<u64>(in.out[0], value);
  });
  define("mov.unpack.b" + type, [](Thread& t, const Instruction& in) {
    const int bytes = kBytes / in.outs;
    const u64 whole = t.get<u64>(in.in[0]);
    for (int i = 0; i < in.outs; ++i) {
      u64 value = 0;
      std::memcpy(&value, reinterpret_cast<const u8*>(&whole) + i * bytes, bytes);
      t.set<u64>(in.out[i], value);
    }
  });
}

template <class F>
void each(uint32_t members, F f) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((members >> lane & 1) != 0) f(lane);
  }
}

// d, inside = the values of the lane selected by `b` and `c`. All lanes are read before any is written.
template <char kMode>
void shuffle(Thread* const* lanes, uint32_t members, const Instruction& in) {
  u32 values[32];
  bool inside[32];
  each(members, [&](int lane) {
    const Thread& t = *lanes[lane];
    const int b = t.get<u32>(in.in[1]) & 31, c = t.get<u32>(in.in[2]);
    const int segment = c >> 8 & 31, clamp = c & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    int from = kMode == 'u' ? lane - b : kMode == 'd' ? lane + b : kMode == 'b' ? lane ^ b : first | (b & ~segment);
    inside[lane] = kMode == 'u' ? from >= last : from <= last;
    if (!inside[lane]) from = lane;
    if ((members >> from & 1) == 0) t.fault("a value of lane " + std::to_string(from) + ", which is absent");
    values[lane] = lanes[from]->get<u32>(in.in[0]);
  });
  each(members, [&](int lane) {
    lanes[lane]->set<u32>(in.out[0], values[lane]);
    if (in.outs > 1) lanes[lane]->set<bool>(in.out[1], inside[lane]);
  });
}

template <char kMode>
void vote(Thread* const* lanes, uint32_t members, const Instruction& in) {
  u32 ballot = 0;
  each(members, [&](int lane) { ballot |= u32(lanes[lane]->get<bool>(in.in[0])) << lane; });
  each(members, [&](int lane) {
    Thread& t = *lanes[lane];
    if (kMode == 'b') t.set<u32>(in.out[0], ballot);
    if (kMode == 'a') t.set<bool>(in.out[0], ballot == members);
    if (kMode == 'o') t.set<bool>(in.out[0], ballot != 0);
    if (kMode == 'u') t.set<bool>(in.out[0], ballot == 0 || ballot == members);
  });
}

template <class T, class F>
void define_reduction(const string& name, F) {
  define("redux.sync." + name, Collective([](Thread* const* lanes, uint32_t members, const Instruction& in) {
           T all = lanes[__builtin_ctz(members)]->get<T>(in.in[0]);
           each(members & (members - 1), [&](int lane) { all = F()(all, lanes[lane]->get<T>(in.in[0])); });
           each(members, [&](int lane) { lanes[lane]->set<T>(in.out[0], all); });
         }));
}
template <class T>
void define_reductions(const string& type) {
  define_reduction<T>("add." + type, [](T a, T b) { return T(a + b); });
  define_reduction<T>("min." + type, [](T a, T b) { return std::min(a, b); });
  define_reduction<T>("max." + type, [](T a, T b) { return std::max(a, b); });
}

// Orders the accesses of a warp's threads if all of them reach it; a partial barrier is not assumed to order anything.
void warp_barrier(Thread* const* lanes, uint32_t members, const Instruction&) {
  const auto& threads = lanes[__builtin_ctz(members)]->block->threads;
  const int first = lanes[__builtin_ctz(members)]->index / 32 * 32;
  for (int lane = 0; lane < 32 && first + lane < static_cast<int>(threads.size()); ++lane) {
    if ((members >> lane & 1) == 0 && threads[first + lane].state != State::kDone) return;
  }
  each(members, [&](int lane) { ++lanes[lane]->turn; });
}

std::vector<Operation>& table() {
  static std::vector<Operation> table;
  return table;
}

}  // namespace

void define(const string& name, Step step) { table().push_back({name, step, nullptr}); }
void define(const string& name, Collective collective) { table().push_back({name, nullptr, collective}); }

const std::vector<Operation>& operations() {
  static const bool once = [] {
    define_integers();
    define_floats();
    define_control();
    return true;
  }();
  static_cast<void>(once);
  return table();
}

void define_control() {
  define("ld", load);
  define("st", store);
  define("cvta", [](Thread& t, const Instruction& in) { t.set(in.out[0], t.get<u64>(in.in[0]) + kWindow[in.space]); });
  define("cvta.to",
         [](Thread& t, const Instruction& in) { t.set(in.out[0], t.get<u64>(in.in[0]) - kWindow[in.space]); });
  define("bra", [](Thread& t, const Instruction& in) { t.pc = in.target - 1; });
  define("ret", [](Thread& t, const Instruction&) { t.state = State::kDone; });
  define("bar.sync", [](Thread& t, const Instruction&) { t.state = State::kAtBarrier; });
  define("fence", [](Thread& t, const Instruction&) { t.fenced = true; });
  define("trap", [](Thread& t, const Instruction&) { t.fault("a trap"); });
  define_packing<2>("16");
  define_packing<4>("32");
  define_packing<8>("64");
  define_atomics<u32>("u32");
  define_atomics<i32>("s32");
  define_atomics<u64>("u64");
  define_atomics<i64>("s64");
  define_atomics<float>("f32");
  define_atomics<double>("f64");
  define_atomic_bits<u32>("32");
  define_atomic_bits<u64>("64");
  define_atomic<u32>("inc.u32", [](u32 old, u32 end, u32) { return old >= end ? 0 : old + 1; });
  define_atomic<u32>("dec.u32", [](u32 old, u32 end, u32) { return old == 0 || old > end ? end : old - 1; });
  define("shfl.sync.up.b32", shuffle<'u'>);
  define("shfl.sync.down.b32", shuffle<'d'>);
  define("shfl.sync.bfly.b32", shuffle<'b'>);
  define("shfl.sync.idx.b32", shuffle<'i'>);
  define("vote.sync.ballot.b32", vote<'b'>);
  define("vote.sync.all.pred", vote<'a'>);
  define("vote.sync.any.pred", vote<'o'>);
  define("vote.sync.uni.pred", vote<'u'>);
  define("bar.warp.sync", warp_barrier);
  define_reductions<u32>("u32");
  define_reductions<i32>("s32");
  define_reduction<u32>("and.b32", [](u32 a, u32 b) { return a & b; });
  define_reduction<u32>("or.b32", [](u32 a, u32 b) { return a | b; });
  define_reduction<u32>("xor.b32", [](u32 a, u32 b) { return a ^ b; });
}

}  // namespace simulator
