// The host execution layer: a kernel's blocks run one after the other, the threads of a block as
// fibers that meet at barriers. Every access to shared memory is checked.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace latentguard::host {

// Runs `thread` once per thread of every block. Returns whether no failure was found.
bool run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& thread);

// The first failure of the last run, or an empty string.
const std::string& failure();

// Stops the run and reports `what` with the thread, block and place in the source.
[[noreturn]] void fail(const std::string& what, const char* file, int line);

// The three barriers a thread may wait at. Threads that meet must stand on the same line.
void block_barrier(const char* file, int line);
void warp_barrier(const char* file, int line);  // orders memory, as __syncwarp does
// Puts `bytes` of this lane into a slot and returns the 32 slots of the warp, kSlot bytes apart.
constexpr int kSlot = 128;
const unsigned char* warp_exchange(const void* mine, int bytes, const char* file, int line);

int thread_index();
int64_t block_index();

// Checked access to the block's shared memory. Reading what no thread wrote, leaving the block's
// memory, and touching what another thread touches without a barrier in between are failures.
unsigned char* shared_read(int64_t offset, int bytes, const char* file, int line);
unsigned char* shared_write(int64_t offset, int bytes, const char* file, int line);
unsigned char* shared_atomic(int64_t offset, int bytes, const char* file, int line);

}  // namespace latentguard::host
