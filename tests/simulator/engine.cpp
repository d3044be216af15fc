// Grids, blocks, warps: which thread runs, and the barriers that all must reach.
#include "engine.h"

#include <algorithm>
#include <cfenv>

namespace simulator {
namespace {

constexpr uint64_t kMostSteps = 100'000'000;  // per thread; beyond that, it is taken not to end

void run_thread(Thread& thread) {
  const Kernel& kernel = *thread.kernel;
  uint64_t steps = 0;
  while (thread.state == State::kRunning) {
    if (thread.pc >= kernel.length) {
      thread.pc = kernel.length - 1;
      thread.fault("ran past the end");
    }
    const Instruction& in = kernel.code[thread.pc];
    if (++steps > kMostSteps) thread.fault("does not end");
    if (in.guard >= 0) {
      if (!thread.written[in.guard]) thread.fault("the guard was not written");
      if (thread.get<bool>(in.guard) == (in.negated != 0)) {
        ++thread.pc;
        continue;
      }
    }
    for (int i = 0; i < in.ins; ++i) {
      if (!thread.written[in.in[i]]) thread.fault("operand " + std::to_string(i + 1) + " was not written");
    }
    const Operation& operation = operations()[in.operation];
    if (operation.collective != nullptr) {
      thread.state = State::kAtCollective;
      break;
    }
    operation.step(thread, in);
    for (int i = 0; i < in.outs; ++i) thread.written[in.out[i]] = 1;
    if (thread.state == State::kRunning) ++thread.pc;
  }
  device().steps += steps;
}

// The last operand of a collective instruction is the mask of its members.
uint32_t members_of(const Thread& thread) {
  const Instruction& in = thread.kernel->code[thread.pc];
  return thread.get<uint32_t>(in.in[in.ins - 1]);
}

// Runs each collective instruction that all its members have reached, except those that have ended. Returns whether any
// ran.
bool run_collectives(Thread* const* lanes, int count) {
  bool any = false;
  uint32_t alive = 0;
  for (int lane = 0; lane < count; ++lane) alive |= (lanes[lane]->state != State::kDone ? 1u : 0u) << lane;
  for (int first = 0; first < count; ++first) {
    Thread& thread = *lanes[first];
    if (thread.state != State::kAtCollective) continue;
    const uint32_t mask = members_of(thread);
    if ((mask >> first & 1) == 0) thread.fault("the thread's own lane is absent from its mask");
    uint32_t here = 0;
    for (int lane = 0; lane < count; ++lane) {
      const Thread& other = *lanes[lane];
      const bool same = other.state == State::kAtCollective && other.pc == thread.pc && members_of(other) == mask;
      here |= (same ? 1u : 0u) << lane;
    }
    if (here != (mask & alive)) continue;
    const Instruction& in = thread.kernel->code[thread.pc];
    operations()[in.operation].collective(lanes, here, in);
    for (int lane = 0; lane < count; ++lane) {
      if ((here >> lane & 1) == 0) continue;
      for (int i = 0; i < in.outs; ++i) lanes[lane]->written[in.out[i]] = 1;
      lanes[lane]->state = State::kRunning;
      ++lanes[lane]->pc;
    }
    any = true;
  }
  return any;
}

// Runs until each thread of a warp has ended or waits at a barrier of the block.
void run_warp(Thread* const* lanes, int count) {
  do {
    for (int i = 0; i < count; ++i) run_thread(*lanes[device().options.backward ? count - 1 - i : i]);
  } while (run_collectives(lanes, count));
  for (int lane = 0; lane < count; ++lane) {
    if (lanes[lane]->state == State::kAtCollective) lanes[lane]->fault("a lane that the mask names is absent");
  }
}

void start(Thread& thread, const Block& block, int64_t threads, int64_t blocks) {
  const Kernel& kernel = *thread.kernel;
  const auto lane = static_cast<uint32_t>(thread.index % 32);
  const uint32_t bit = 1u << lane;
  const uint64_t specials[kSpecials] = {static_cast<uint64_t>(thread.index),
                                        static_cast<uint64_t>(block.index),
                                        static_cast<uint64_t>(threads),
                                        static_cast<uint64_t>(blocks),
                                        lane,
                                        static_cast<uint64_t>(thread.index / 32),
                                        bit,
                                        bit - 1,
                                        bit | (bit - 1),
                                        ~(bit | (bit - 1)),
                                        ~(bit - 1)};
  std::copy_n(specials, +kSpecials, thread.registers);
  std::fill_n(thread.written, kernel.registers, 0);
  std::fill_n(thread.written, +kSpecials, 1);
  thread.pc = thread.turn = 0;
  thread.state = State::kRunning;
  thread.fenced = false;
  thread.local.assign(kernel.local_bytes, 0xcd);
  thread.local_written.assign(kernel.local_bytes, 0);
}

// Passes a barrier, which all threads of a block must reach. Returns false if the block has ended.
bool pass_barrier(Block& block) {
  std::vector<Thread*> waiting;
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtBarrier) waiting.push_back(&thread);
  }
  if (waiting.empty()) return false;
  Thread& first = *waiting.front();
  if (waiting.size() != block.threads.size()) first.fault("a barrier that some threads miss: they have ended");
  for (Thread* thread : waiting) {
    if (thread->pc != first.pc) thread->fault("a barrier that some threads miss: they wait at another");
  }
  ++block.phase;
  for (Thread* thread : waiting) {
    thread->state = State::kRunning;
    ++thread->pc;
  }
  return true;
}

}  // namespace

void run(const Kernel& kernel, int64_t blocks, int64_t threads, void** arguments) {
  if (threads > kernel.max_threads) throw Fault(std::string("more threads than .maxntid of ") + kernel.name);
  ++device().launch;
  device().releases.clear();

  Block block;
  block.params.assign(kernel.param_bytes, 0xcd);
  for (int i = 0; i < kernel.param_count; ++i) {
    std::memcpy(block.params.data() + kernel.params[2 * i], arguments[i], kernel.params[2 * i + 1]);
  }
  const size_t width = kernel.registers + kernel.constant_count;
  std::vector<uint64_t> registers(width * threads);
  std::vector<uint8_t> written(width * threads, 1);
  block.threads.resize(threads);
  for (int64_t i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.kernel = &kernel;
    thread.block = &block;
    thread.index = static_cast<int32_t>(i);
    thread.registers = registers.data() + i * width;
    thread.written = written.data() + i * width;
    std::copy_n(kernel.constants, kernel.constant_count, thread.registers + kernel.registers);
  }
  const bool backward = device().options.backward != 0;
  const int64_t warps = (threads + 31) / 32;
  for (int64_t i = 0; i < blocks; ++i) {
    block.index = static_cast<int32_t>(backward ? blocks - 1 - i : i);
    block.phase = 0;
    block.handovers.clear();
    block.shared.assign(kernel.shared_bytes, 0xcd);
    block.shared_shadows.assign(kernel.shared_bytes, {});
    for (Thread& thread : block.threads) start(thread, block, threads, blocks);
    do {
      for (int64_t w = 0; w < warps; ++w) {
        const int64_t first = 32 * (backward ? warps - 1 - w : w);
        Thread* lanes[32];
        const int count = static_cast<int>(std::min<int64_t>(32, threads - first));
        for (int lane = 0; lane < count; ++lane) lanes[lane] = &block.threads[first + lane];
        run_warp(lanes, count);
      }
    } while (pass_barrier(block));
  }
}

}  // namespace simulator
