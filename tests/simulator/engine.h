// A simulated device: its memory is host memory, with every access checked; its kernels are lists of decoded
// instructions, which a thread runs one by one.
//
// A thread runs until it ends or reaches a barrier or a collective instruction of its warp; then the next thread runs.
// The order matters only if there is a race, and races are detected separately: of two unordered accesses to the same
// byte, neither may be a write.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace simulator {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Filled by Python: device.py has the same fields.
struct Instruction {
  int32_t operation, guard, negated, outs, ins, out[8], in[10], target, space, bytes, count, is_signed, flag;
  int64_t offset;
  const char* text;
};
struct Kernel {
  const char* name;
  const Instruction* code;
  const uint64_t* constants;  // of the registers after the others
  const int32_t* params;      // offset and size of each
  int32_t length, registers, constant_count, param_count, param_bytes, shared_bytes, local_bytes, max_threads;
};
struct Range {
  uint64_t begin, end;
  const char* name;
  int32_t granule;  // bytes per element, the unit of race detection
  int32_t writable;
};

// The first registers of a thread, which hold its position.
enum Special { kTid, kCtaid, kNtid, kNctaid, kLane, kWarp, kMaskEq, kMaskLt, kMaskLe, kMaskGt, kMaskGe, kSpecials };

enum Space { kGeneric, kGlobal, kShared, kLocal, kParam };
// Where the other spaces begin in the generic space, and shared memory in its own: no address is 0.
constexpr uint64_t kWindow[] = {0, 0, 1ull << 60, 1ull << 61, 1ull << 62};
constexpr uint64_t kSharedBase = 1024;

enum class Kind { kRead, kReadConstant, kWrite, kAtomic };

// Who accessed, and when: `phase` counts the barriers of the block, `turn` those of the warp.
constexpr int kNobody = -1, kSeveral = -2;
struct Access {
  int32_t block = kNobody, phase = 0, warp = 0, thread = 0, turn = 0;
};

struct Shadow {
  uint32_t launch = 0;
  bool was_written = false, was_read_as_constant = false;
  Access writer, reader;
};

struct Options {
  int backward = 0;  // the order of blocks and threads
  int nudge = 0;     // offset added to approximations, in ulps
};

// A handover by atomic operations: everything before `released` is ordered before everything after `by`.
struct Handover {
  Access released, by;
};

struct Block;

struct Device {
  Options options;
  std::vector<Range> ranges;  // in order
  std::vector<std::vector<Shadow>> shadows;
  std::map<uint64_t, std::vector<Access>> releases;  // of this launch, by the address of the atomic operation
  uint32_t launch = 0;
  uint64_t steps = 0;
};
Device& device();

enum class State { kRunning, kAtBarrier, kAtCollective, kDone };

struct Thread {
  const Kernel* kernel;
  Block* block;
  uint64_t* registers;
  uint8_t* written;  // of each register
  int32_t pc, index, turn;
  State state;
  bool fenced;  // since it last wrote
  std::vector<uint8_t> local, local_written;

  template <class T>
  T get(int32_t slot) const {
    T value;
    std::memcpy(&value, registers + slot, sizeof value);
    return value;
  }
  // Signed values are sign-extended to the register's width.
  template <class T>
  void set(int32_t slot, T value) {
    if constexpr (std::is_same_v<T, bool>) {
      registers[slot] = value;
    } else if constexpr (std::is_signed_v<T> && std::is_integral_v<T>) {
      registers[slot] = static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
      registers[slot] = 0;
      std::memcpy(registers + slot, &value, sizeof value);
    }
  }
  Access now() const;
  // The host address of this many bytes of a space; a fault if this access is not allowed.
  uint8_t* at(int space, uint64_t address, uint32_t bytes, Kind kind);
  void hand_over(uint64_t address);
  [[noreturn]] void fault(const std::string& what) const;

 private:
  uint8_t* global_at(uint64_t address, uint32_t bytes, Kind kind);
  uint8_t* local_at(uint64_t address, uint32_t bytes, Kind kind);
  void check_race(Shadow& shadow, Kind kind, const char* memory, uint64_t element) const;
  bool is_before(const Access& access) const;
};

struct Block {
  int32_t index, phase;
  std::vector<Thread> threads;
  std::vector<uint8_t> shared, params;
  std::vector<Shadow> shared_shadows;
  std::vector<Handover> handovers;
};

using Step = void (*)(Thread&, const Instruction&);
// A collective instruction of the lanes of a warp in `members`.
using Collective = void (*)(Thread* const* lanes, uint32_t members, const Instruction&);
struct Operation {
  std::string name;
  Step step;
  Collective collective;
};
// Operations by the numbers in the instructions.
const std::vector<Operation>& operations();

// Runs a kernel; `arguments` are pointers to its parameters.
void run(const Kernel& kernel, int64_t blocks, int64_t threads, void** arguments);

}  // namespace simulator
