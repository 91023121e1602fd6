// What stands in the shared segment of one rank, and the waking and waiting on its counters. Only the sources of
// SharedMemory include it.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "ring/shared_memory.h"

namespace engine::ring {

using Clock = std::chrono::steady_clock;

// Progress of one rank, on a cache line of its own.
struct alignas(64) Counter {
    std::atomic<uint32_t> steps;
    std::atomic<uint32_t> sleepers;  // how many wait on `steps` in the kernel: nobody needs waking at 0
};

// What a rank was called with, in a ring of four: when a rank begins exchange n, every peer has finished reading its
// entry n - 2.
struct Operation {
    uint64_t sequence;
    Call call;
    uint64_t streams;  // of rank 0: the size classes that stream in the operation after this
};

struct Header {
    char token[64];
    Counter published, reduced;
    Operation operations[4];
    std::atomic<int32_t> core;     // that the rank was last seen on
    std::atomic<uint32_t> failed;  // `error` is there to read
    char error[512];
};

constexpr size_t kHeaderBytes = 4096;
constexpr size_t kSegmentBytes = kHeaderBytes + 2 * SharedMemory::kSlots * SharedMemory::kChunk;
constexpr long kSleepNanoseconds = 50'000'000;  // how often a sleeper looks whether its peers are alive
static_assert(sizeof(Header) <= kHeaderBytes && kSegmentBytes < (8 << 20));

struct SharedMemory::Wait {
    double seconds;
    Clock::time_point begun;
    const std::function<void(const std::string&)>& poll;
    bool warned = false;
    Clock::time_point together = {};  // when all ranks were found to have begun
};

inline void advance(Counter& counter, uint32_t steps) {
    counter.steps.store(steps);
    if (counter.sleepers.load()) syscall(SYS_futex, &counter.steps, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline bool reached(const Counter& counter, uint32_t steps) {  // by their difference, because counters wrap around
    return static_cast<int32_t>(counter.steps.load(std::memory_order_acquire) - steps) >= 0;
}

inline void sleep_on(Counter& counter, uint32_t steps) {
    const timespec time{0, kSleepNanoseconds};
    counter.sleepers.fetch_add(1);
    const uint32_t seen = counter.steps.load();
    if (static_cast<int32_t>(seen - steps) < 0) syscall(SYS_futex, &counter.steps, FUTEX_WAIT, seen, &time, nullptr, 0);
    counter.sleepers.fetch_sub(1);
}

inline void relax() {
#if ENGINE_X86
    __builtin_ia32_pause();
#endif
}

}  // namespace engine::ring
