// Fibers by ucontext, with the annotations that AddressSanitizer needs to follow the stacks.
#include "testing/host_runtime.h"

#include <ucontext.h>

#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LG_ASAN 1
#else
#define LG_ASAN 0
#endif

namespace latentguard::host {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
// Shared memory is tracked in units of the smallest element type.
constexpr int kUnit = 2;

struct Stop : std::exception {};

enum class State { ready, at_block, at_warp, done };

struct Place {
  const char* file = "";
  int line = 0;
  bool operator==(const Place& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = State::ready;
  Place place;
};

struct Warp {
  int epoch = 0;      // __syncwarp barriers passed
  int exchanges = 0;  // collectives passed; their slots alternate
  bool orders_memory = false;
  std::vector<unsigned char> slots = std::vector<unsigned char>(2 * kWarp * kSlot);
};

struct Access {
  int thread = -1, block_epoch = 0, warp_epoch = 0;
};

struct Unit {
  Access writer, reader;
};

struct Block {
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Unit> units;
  int64_t shared_bytes = 0, index = 0;
  int current = 0, epoch = 0;
  ucontext_t scheduler{};
  void* scheduler_stack_bottom = nullptr;
  size_t scheduler_stack_size = 0;
};

Block* block = nullptr;
std::string failure_text;

void leave_for(ucontext_t& from, ucontext_t& to, void** save, const void* bottom, size_t size) {
#if LG_ASAN
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
  swapcontext(&from, &to);
}

void to_scheduler(bool finished) {
  Fiber& fiber = block->fibers[block->current];
  leave_for(fiber.context, block->scheduler, finished ? nullptr : &fiber.fake_stack,
            block->scheduler_stack_bottom, block->scheduler_stack_size);
#if LG_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void enter_fiber() {
#if LG_ASAN
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &block->scheduler_stack_size);
  block->scheduler_stack_bottom = const_cast<void*>(bottom);
#endif
  try {
    (*block->body)();
  } catch (const Stop&) {
  }
  block->fibers[block->current].state = State::done;
  to_scheduler(true);
}

void resume(int index) {
  block->current = index;
  Fiber& fiber = block->fibers[index];
#if LG_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#if LG_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void wait(State state, const Place& place) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = state;
  fiber.place = place;
  to_scheduler(false);
}

// Lets the threads [from, to) go on if all of them wait in `state`; they must agree on the place.
bool release(int from, int to, State state) {
  for (int i = from; i < to; ++i) {
    if (block->fibers[i].state != state) return false;
  }
  for (int i = from; i < to; ++i) {
    if (!(block->fibers[i].place == block->fibers[from].place)) {
      failure_text = "divergent barrier: thread " + std::to_string(from) + " waits at " +
                     block->fibers[from].place.text() + ", thread " + std::to_string(i) + " at " +
                     block->fibers[i].place.text() + " (block " + std::to_string(block->index) +
                     ")";
      return false;
    }
  }
  for (int i = from; i < to; ++i) block->fibers[i].state = State::ready;
  return true;
}

std::string stuck() {
  int waiting = 0, done = 0, example = 0;
  for (int i = 0; i < static_cast<int>(block->fibers.size()); ++i) {
    const State state = block->fibers[i].state;
    if (state == State::done) {
      ++done;
    } else {
      ++waiting;
      example = i;
    }
  }
  return "divergent barrier: " + std::to_string(waiting) + " threads wait (thread " +
         std::to_string(example) + " at " + block->fibers[example].place.text() + "), " +
         std::to_string(done) + " have ended, nobody can go on (block " +
         std::to_string(block->index) + ")";
}

void run_block() {
  const int threads = static_cast<int>(block->fibers.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
#if LG_ASAN
    __asan_unpoison_memory_region(fiber.stack.get(), kStack);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  while (true) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      if (block->fibers[i].state != State::ready) continue;
      moved = true;
      resume(i);
      if (!failure_text.empty()) return;
    }
    for (int w = 0; w < threads / kWarp; ++w) {
      if (!release(w * kWarp, (w + 1) * kWarp, State::at_warp)) continue;
      moved = true;
      Warp& warp = block->warps[w];
      if (warp.orders_memory) {
        ++warp.epoch;
      } else {
        ++warp.exchanges;
      }
    }
    if (release(0, threads, State::at_block)) {
      moved = true;
      ++block->epoch;
    }
    if (!failure_text.empty()) return;
    bool all_done = true;
    for (const Fiber& fiber : block->fibers) all_done = all_done && fiber.state == State::done;
    if (all_done) return;
    if (!moved) {
      failure_text = stuck();
      return;
    }
  }
}

Warp& this_warp() { return block->warps[block->current / kWarp]; }

bool unordered(const Access& other) {
  if (other.thread < 0 || other.thread == block->current || other.block_epoch != block->epoch) {
    return false;
  }
  const bool same_warp = other.thread / kWarp == block->current / kWarp;
  return !same_warp || other.warp_epoch == this_warp().epoch;
}

void bounds(int64_t offset, int bytes, const char* file, int line) {
  if (offset < 0 || offset + bytes > block->shared_bytes) {
    fail("out-of-bounds access to shared memory: bytes " + std::to_string(offset) + " to " +
             std::to_string(offset + bytes) + " of " + std::to_string(block->shared_bytes),
         file, line);
  }
}

std::string race(const char* what, int64_t offset, const Access& other) {
  return std::string("race in shared memory: ") + what + " byte " + std::to_string(offset) +
         " that thread " + std::to_string(other.thread) + " touched since the last barrier";
}

}  // namespace

const std::string& failure() { return failure_text; }
int thread_index() { return block->current; }
int64_t block_index() { return block->index; }

void fail(const std::string& what, const char* file, int line) {
  failure_text = what + " (thread " + std::to_string(block->current) + ", block " +
                 std::to_string(block->index) + ", " + Place{file, line}.text() + ")";
  throw Stop();
}

bool run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& thread) {
  failure_text.clear();
  Block state;
  block = &state;
  state.body = &thread;
  state.fibers.resize(threads);
  for (Fiber& fiber : state.fibers) fiber.stack.reset(new char[kStack]);
  state.shared_bytes = shared_bytes;
  for (state.index = 0; state.index < blocks && failure_text.empty(); ++state.index) {
    state.warps.assign(threads / kWarp, Warp());
    state.units.assign(shared_bytes / kUnit + 1, Unit());
    state.shared.reset(new unsigned char[shared_bytes > 0 ? shared_bytes : 1]);
    std::memset(state.shared.get(), 0xff, shared_bytes);  // NaN in every float type
    state.epoch = 0;
    run_block();
  }
  block = nullptr;
  return failure_text.empty();
}

void block_barrier(const char* file, int line) { wait(State::at_block, {file, line}); }

void warp_barrier(const char* file, int line) {
  this_warp().orders_memory = true;
  wait(State::at_warp, {file, line});
}

const unsigned char* warp_exchange(const void* mine, int bytes, const char* file, int line) {
  Warp& warp = this_warp();
  // Slots alternate: a lane can only come back to this half once all lanes have read it.
  unsigned char* half = warp.slots.data() + (warp.exchanges & 1) * kWarp * kSlot;
  std::memcpy(half + block->current % kWarp * kSlot, mine, bytes);
  warp.orders_memory = false;
  wait(State::at_warp, {file, line});
  return half;
}

unsigned char* shared_read(int64_t offset, int bytes, const char* file, int line) {
  bounds(offset, bytes, file, line);
  for (int64_t i = offset / kUnit; i < (offset + bytes + kUnit - 1) / kUnit; ++i) {
    Unit& unit = block->units[i];
    if (unit.writer.thread < 0) {
      fail("uninitialized read of shared memory: nobody wrote byte " + std::to_string(i * kUnit),
           file, line);
    }
    if (unordered(unit.writer)) fail(race("reads", i * kUnit, unit.writer), file, line);
    unit.reader = {block->current, block->epoch, this_warp().epoch};
  }
  return block->shared.get() + offset;
}

unsigned char* shared_write(int64_t offset, int bytes, const char* file, int line) {
  bounds(offset, bytes, file, line);
  for (int64_t i = offset / kUnit; i < (offset + bytes + kUnit - 1) / kUnit; ++i) {
    Unit& unit = block->units[i];
    if (unordered(unit.writer)) fail(race("writes", i * kUnit, unit.writer), file, line);
    if (unordered(unit.reader)) fail(race("overwrites", i * kUnit, unit.reader), file, line);
    unit.writer = {block->current, block->epoch, this_warp().epoch};
  }
  return block->shared.get() + offset;
}

unsigned char* shared_atomic(int64_t offset, int bytes, const char* file, int line) {
  bounds(offset, bytes, file, line);
  for (int64_t i = offset / kUnit; i < (offset + bytes + kUnit - 1) / kUnit; ++i) {
    if (block->units[i].writer.thread < 0) {
      fail("uninitialized atomic in shared memory, byte " + std::to_string(i * kUnit), file, line);
    }
  }
  return block->shared.get() + offset;
}

}  // namespace latentguard::host
