// A GPU's threads on a CPU.
//
// The threads of a block are fibers; between two barriers they run in an order that is shuffled anew each time, and
// some warps wait while others go on, so that a missing barrier shows as a wrong result. A barrier that not all its
// threads reach stops the program. A few blocks are resident at once and take turns; they start in their own order, in
// reverse or shuffled, so that a block also finds the one before it unfinished, or not begun. A copy by cp.async is
// made only when it is waited for, a product of a warpgroup then or at once. What this cannot show: speed, memory
// coalescing, weak memory order between blocks, or between what instructions and accelerators write to shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

struct Dim3 {
    unsigned x = 0;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;
namespace emulated {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kResident = 4;
constexpr size_t kStack = 64 << 10, kShown = 64, kShared = 227 << 10;
constexpr int64_t kMostYields = 10'000'000;  // without a block ending: then it never will

enum class State { ready, at_warp_barrier, at_warpgroup_barrier, at_block_barrier, done };

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    ucontext_t start;
    jmp_buf here;  // where it goes on: jumps spare the system call of a context switch
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::done;
    alignas(16) char shown[2][kShown];  // what the thread shows to its warp, this time and the next
    unsigned turn = 0;
    std::vector<std::vector<Copy>> copies;                     // groups of cp.async; the last is open
    std::vector<std::vector<std::function<void()>>> products;  // of wgmma, likewise
};

struct Block {
    unsigned index = 0;
    bool running = false;
    uint32_t held = 0;  // warps that stay behind for a while, so that others run far ahead
    std::vector<Fiber> fibers{kMostThreads};
    std::unique_ptr<char[]> memory{new char[kShared + 1024]};
    std::map<const void*, size_t> shared;  // where the variables lie in it
    size_t shared_end = 0;
    char* shared_begin() const {
        return memory.get() + (1024 - reinterpret_cast<uintptr_t>(memory.get()) % 1024) % 1024;
    }
};

inline std::vector<Block> resident(kResident);
inline Block* block;  // that runs
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mt19937 random;
inline int64_t yields;

[[noreturn]] inline void stop(const char* why) {
    std::fprintf(stderr, "emulated CUDA: %s (block %u)\n", why, blockIdx.x);
    std::abort();
}

inline Fiber& fiber() { return block->fibers[threadIdx.x]; }

inline void wait(State at) {
    Fiber& self = fiber();
    self.state = at;
    if (!_setjmp(self.here)) _longjmp(scheduler, 1);
}

inline void yield() {
    if (++yields > kMostYields) stop("a wait that never ends");
    wait(State::ready);
}

template <class Tag>
inline char place;

template <class T, class Tag>
T& shared(Tag) {
    const auto [found, fresh] = block->shared.try_emplace(&place<Tag>, 0);
    if (fresh) {
        const size_t align = std::max<size_t>(alignof(T), 128);
        found->second = (block->shared_end + align - 1) / align * align;
        block->shared_end = found->second + sizeof(T);
        if (block->shared_end > kShared) stop("more shared memory than a block has");
        std::memset(block->shared_begin() + found->second, 0xa5, sizeof(T));  // nothing may rest on what was there
    }
    return *reinterpret_cast<T*>(block->shared_begin() + found->second);
}
inline uint32_t shared_address(const void* at) {
    const auto offset = static_cast<const char*>(at) - block->shared_begin();
    if (offset < 0 || offset >= static_cast<ptrdiff_t>(kShared)) stop("not an address in shared memory");
    return static_cast<uint32_t>(offset);
}
inline char* at_shared_address(uint32_t address) {
    if (address >= kShared) stop("an address beyond shared memory");
    return block->shared_begin() + address;
}

inline void enter() {
    body();
    for (const auto& group : fiber().copies)
        if (!group.empty()) stop("a copy that its thread has not waited for: it may land on what comes after");
    fiber().state = State::done;
    _longjmp(scheduler, 1);
}

inline void resume(Fiber& next) {
    if (_setjmp(scheduler)) return;
    if (next.started) _longjmp(next.here, 1);
    next.started = true;
    setcontext(&next.start);
}

inline void begin(Block& fresh, unsigned index) {
    fresh.index = index;
    fresh.running = true;
    fresh.shared.clear();
    fresh.shared_end = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) {
        Fiber& next = fresh.fibers[i];
        getcontext(&next.start);
        next.start.uc_stack.ss_sp = next.stack.get();
        next.start.uc_stack.ss_size = kStack;
        makecontext(&next.start, enter, 0);
        next.started = false;
        next.state = State::ready;
        next.turn = 0;
        next.copies.assign(1, {});
        next.products.assign(1, {});
    }
}

// Releases threads [begin, end) if all of them wait at this barrier; threads that have ended do not count.
inline bool release(unsigned begin, unsigned end, State barrier) {
    bool any = false;
    for (unsigned i = begin; i < end; ++i) {
        const State state = block->fibers[i].state;
        if (state != barrier && state != State::done) return false;
        any |= state == barrier;
    }
    for (unsigned i = begin; i < end; ++i)
        if (block->fibers[i].state == barrier) block->fibers[i].state = State::ready;
    return any;
}

// Every ready thread of `block` once. False when all of them have ended.
inline bool step(const std::vector<unsigned>& order) {
    const unsigned threads = blockDim.x;
    if (random() % 16 == 0) block->held = random();
    bool running = false;
    for (const unsigned i : order) {
        if (block->fibers[i].state != State::ready) continue;
        running = true;
        if (block->held >> (i / kWarp) & 1 && threads > kWarp) continue;
        threadIdx.x = i;
        resume(block->fibers[i]);
    }
    bool released = release(0, threads, State::at_block_barrier);
    for (unsigned warp = 0; warp < threads; warp += kWarp)
        released |= release(warp, std::min(warp + kWarp, threads), State::at_warp_barrier);
    for (unsigned group = 0; group < threads; group += 4 * kWarp)
        released |= release(group, std::min(group + 4 * kWarp, threads), State::at_warpgroup_barrier);
    if (released || running) return true;
    for (unsigned i = 0; i < threads; ++i)
        if (block->fibers[i].state != State::done) stop("a barrier that not all its threads reach");
    return false;
}

inline void run_grid() {
    std::vector<unsigned> blocks(gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::vector<std::vector<unsigned>> orders(64, std::vector<unsigned>(blockDim.x));
    for (auto& order : orders) {
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), random);
    }
    const unsigned how = random() % 3;
    if (how == 1) std::reverse(blocks.begin(), blocks.end());
    if (how == 2) std::shuffle(blocks.begin(), blocks.end(), random);
    size_t next = 0;
    unsigned running = 0;
    yields = 0;
    for (Block& slot : resident) slot.running = false;
    while (next < blocks.size() || running > 0) {
        block = &resident[random() % kResident];
        if (!block->running) {
            if (next == blocks.size()) continue;
            begin(*block, blocks[next++]);
            ++running;
        }
        blockIdx.x = block->index;
        for (unsigned turns = 1 + random() % 8; turns > 0 && block->running; --turns) {
            if (step(orders[random() % orders.size()])) continue;
            block->running = false;
            --running;
            yields = 0;
        }
    }
}

// Shows `mine` to the warp; all 32 lanes must take part. What each shows is then to be had from `shown_by`, until this
// thread shows something again: the others may be one turn ahead, which is why there are two places, but no more.
template <class T>
void show(const T& mine) {
    static_assert(sizeof(T) <= kShown);
    std::memcpy(fiber().shown[++fiber().turn % 2], &mine, sizeof(T));
    wait(State::at_warp_barrier);
}
template <class T>
T shown_by(unsigned lane) {
    const unsigned which = threadIdx.x / kWarp * kWarp + lane;
    Fiber& other = block->fibers[which];
    if (which >= blockDim.x || (other.turn != fiber().turn && other.turn != fiber().turn + 1))
        stop("a warp operation that a thread has left");
    T theirs;
    std::memcpy(&theirs, other.shown[fiber().turn % 2], sizeof(T));
    return theirs;
}
template <class T>
void all_lanes(const T& mine, T (&theirs)[kWarp]) {
    show(mine);
    for (unsigned i = 0; i < kWarp; ++i) theirs[i] = shown_by<T>(i);
}
template <class T>
T from_lane(unsigned mask, T mine, unsigned from) {
    if (mask != 0xffffffffu) stop("a warp operation of less than the warp");
    show(mine);
    return shown_by<T>(from % kWarp);
}

inline void copy_later(void* to, const void* from, size_t bytes) { fiber().copies.back().push_back({to, from, bytes}); }
inline void commit_copies() { fiber().copies.push_back({}); }
// Makes all but the last `pending` committed groups of copies.
inline void wait_for_copies(size_t pending) {
    auto& groups = fiber().copies;
    while (groups.size() > pending + 1) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

// A product of wgmma: made at once or when it is waited for, one as allowed as the other.
inline void begin_product(std::function<void()> product) {
    if (random() % 2) return product();
    fiber().products.back().push_back(std::move(product));
}
inline void commit_products() { fiber().products.push_back({}); }
inline void wait_for_products(size_t pending) {
    auto& groups = fiber().products;
    while (groups.size() > pending + 1) {
        for (const auto& product : groups.front()) product();
        groups.erase(groups.begin());
    }
}

}  // namespace emulated
