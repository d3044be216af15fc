// Accesses to memory: bounds, alignment, races.
#include <algorithm>
#include <cstdio>

#include "engine.h"

namespace simulator {
namespace {

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string access(Kind kind, uint32_t bytes) {
  const char* const names[] = {"load", "ld.global.nc", "store", "atomic operation"};
  return std::string(names[static_cast<int>(kind)]) + " of " + std::to_string(bytes) + " bytes";
}

std::string who(const Access& access) {
  if (access.block == kSeveral) return "several blocks";
  const std::string of = " of block " + std::to_string(access.block);
  return (access.thread == kSeveral ? "several threads" : "thread " + std::to_string(access.thread)) + of;
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

void Thread::fault(const std::string& what) const {
  throw Fault(what + "; block " + std::to_string(block->index) + ", thread " + std::to_string(index) + " of " +
              kernel->name + ", at `" + kernel->code[pc].text + "`");
}

Access Thread::now() const { return {block->index, block->phase, index / 32, index, turn}; }

// Whether an access is ordered before everything that this thread does from now on.
bool Thread::is_before(const Access& access) const {
  if (access.block == kNobody) return true;
  if (access.block == block->index) {
    return access.thread == index || access.phase < block->phase || (access.warp == index / 32 && access.turn < turn);
  }
  return std::any_of(block->handovers.begin(), block->handovers.end(), [&](const Handover& h) {
    return h.released.block == access.block &&
           (access.phase < h.released.phase || access.thread == h.released.thread) &&
           (h.by.thread == index || h.by.phase < block->phase);
  });
}

void Thread::check_race(Shadow& shadow, Kind kind, const char* memory, uint64_t element) const {
  if (shadow.launch != device().launch) shadow = Shadow{device().launch, false, false, {}, {}};
  if (kind == Kind::kAtomic) {  // no race with other atomic operations; races with plain accesses are not detected
    shadow.was_written = true;
    return;
  }
  const bool writes = kind == Kind::kWrite;
  const auto where = [&](const char* what) {
    return what + std::string(writes ? "write" : "read") + " of element " + std::to_string(element) + " of " + memory;
  };
  if (!is_before(shadow.writer)) fault(where("race: ") + ", which was written by " + who(shadow.writer));
  if (writes) {
    if (shadow.was_read_as_constant) fault(where("") + ", which the launch reads by ld.global.nc");
    if (!is_before(shadow.reader)) fault(where("race: ") + ", which was read by " + who(shadow.reader));
    shadow.writer = now();
    shadow.was_written = true;
    return;
  }
  if (kind == Kind::kReadConstant) {
    if (shadow.was_written) fault(where("ld.global.nc, ") + ", which the launch writes");
    shadow.was_read_as_constant = true;
  }
  Access& reader = shadow.reader;
  if (is_before(reader)) {
    reader = now();
  } else if (reader.block != block->index) {
    reader.block = kSeveral;
  } else {
    if (reader.warp != index / 32) reader.warp = kSeveral;
    reader.thread = kSeveral;
    reader.turn = std::max(reader.turn, turn);
  }
}

uint8_t* Thread::at(int space, uint64_t address, uint32_t bytes, Kind kind) {
  if (space == kGeneric) {
    space = address >= kWindow[kParam]    ? kParam
            : address >= kWindow[kLocal]  ? kLocal
            : address >= kWindow[kShared] ? kShared
                                          : kGlobal;
    address -= kWindow[space];
  }
  if (address % bytes != 0) fault("misaligned " + access(kind, bytes) + " at " + hex(address));
  if (space == kGlobal) return global_at(address, bytes, kind);
  if (space == kLocal) return local_at(address, bytes, kind);
  if (space == kParam) {
    if (address + bytes > block->params.size()) fault("out of bounds: " + access(kind, bytes) + " of the parameters");
    if (kind != Kind::kRead) fault(access(kind, bytes) + " in the parameters");
    return block->params.data() + address;
  }
  const uint64_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > block->shared.size()) {
    fault("out of bounds: " + access(kind, bytes) + " at " + std::to_string(static_cast<int64_t>(offset)) + " of " +
          std::to_string(block->shared.size()) + " bytes of shared memory");
  }
  for (uint32_t i = 0; i < bytes; ++i) {
    Shadow& shadow = block->shared_shadows[offset + i];
    check_race(shadow, kind, "shared memory", offset + i);
    if (!shadow.was_written) fault("read of shared memory that was not written");
  }
  return block->shared.data() + offset;
}

uint8_t* Thread::global_at(uint64_t address, uint32_t bytes, Kind kind) {
  auto& ranges = device().ranges;
  auto behind = std::upper_bound(ranges.begin(), ranges.end(), address,
                                 [](uint64_t value, const Range& range) { return value < range.begin; });
  if (behind == ranges.begin() || address + bytes > (behind - 1)->end) {
    std::string where = " at " + hex(address) + ", before every tensor of the launch";
    if (behind != ranges.begin()) {
      where = ", " + std::to_string(address - (behind - 1)->begin) + " bytes from the begin of " + (behind - 1)->name +
              ", which has " + std::to_string((behind - 1)->end - (behind - 1)->begin);
    }
    fault("out of bounds: " + access(kind, bytes) + where);
  }
  const Range& range = *(behind - 1);
  const bool writes = kind == Kind::kWrite || kind == Kind::kAtomic;
  if (!range.writable) {
    if (writes) fault(access(kind, bytes) + " in " + range.name + ", which is only to be read");
  } else {
    auto& shadows = device().shadows[behind - 1 - ranges.begin()];
    const uint64_t granule = range.granule;
    if (shadows.empty()) shadows.resize((range.end - range.begin) / granule + 1);
    for (uint64_t i = (address - range.begin) / granule; i <= (address - range.begin + bytes - 1) / granule; ++i) {
      check_race(shadows[i], kind, range.name, i);
    }
  }
  if (kind == Kind::kWrite) fenced = false;
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* Thread::local_at(uint64_t address, uint32_t bytes, Kind kind) {
  if (address + bytes > local.size()) fault("out of bounds: " + access(kind, bytes) + " of local memory");
  const auto begin = local_written.begin() + static_cast<int64_t>(address);
  if (kind == Kind::kWrite) {
    std::fill_n(begin, bytes, 1);
  } else if (std::count(begin, begin + bytes, 0) != 0) {
    fault("read of local memory that was not written");
  }
  return local.data() + address;
}

// An atomic operation acquires what others released at this address, and releases what came before a fence.
void Thread::hand_over(uint64_t address) {
  auto& releases = device().releases[address];
  for (const Access& released : releases) block->handovers.push_back({released, now()});
  if (fenced) releases.push_back(now());
}

}  // namespace simulator
