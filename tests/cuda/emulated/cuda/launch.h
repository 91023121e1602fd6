// Stands in for csrc/cuda/launch.h and the CUDA language, so that g++ compiles a .cu file and its kernels run on CPU
// tensors: slowly, and with every barrier tested.
//
// Blocks run one after another. The threads of a block are fibers; between two barriers they run in an order that is
// shuffled anew each time, and some warps wait while others go on, so that a missing barrier shows as a wrong result. A
// barrier that not all its threads reach stops the program. What this cannot show: speed, memory coalescing, races
// between blocks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "common/tensor.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct Dim3 {
    unsigned x = 0;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Fiber {
    ucontext_t start;
    jmp_buf here;  // where it goes on: jumps spare the system call of a context switch
    bool started = false;
    std::vector<char> stack = std::vector<char>(kStack);
    State state = State::done;
};

inline std::vector<Fiber> fibers(1024);
inline jmp_buf scheduler;
inline std::function<void()> body;
inline uint64_t exchange[1024];  // what a thread shows to its warp
inline std::mt19937 random;

[[noreturn]] inline void stop(const char* why) {
    std::fprintf(stderr, "emulated CUDA: %s (block %u)\n", why, blockIdx.x);
    std::abort();
}

inline void wait(State at) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.state = at;
    if (!_setjmp(fiber.here)) _longjmp(scheduler, 1);
}

inline void enter() {
    body();
    fibers[threadIdx.x].state = State::done;
    _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Releases threads [begin, end) if all of them wait at this barrier; threads that have ended do not count.
inline bool release(unsigned begin, unsigned end, State barrier) {
    bool any = false;
    for (unsigned i = begin; i < end; ++i) {
        if (fibers[i].state != barrier && fibers[i].state != State::done) return false;
        any |= fibers[i].state == barrier;
    }
    for (unsigned i = begin; i < end; ++i)
        if (fibers[i].state == barrier) fibers[i].state = State::ready;
    return any;
}

inline void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.start, enter, 0);
        fiber.started = false;
        fiber.state = State::ready;
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    uint32_t held = random();
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        if (random() % 16 == 0) held = random();  // warps that stay behind for a while, so that others run far ahead
        bool running = false;
        for (const unsigned i : order) {
            if (fibers[i].state != State::ready) continue;
            running = true;
            if (held >> (i / kWarp) & 1 && threads > kWarp) continue;
            threadIdx.x = i;
            resume(fibers[i]);
        }
        bool released = release(0, threads, State::at_block_barrier);
        for (unsigned warp = 0; warp < threads; warp += kWarp)
            released |= release(warp, std::min(warp + kWarp, threads), State::at_warp_barrier);
        if (released || running) continue;
        for (unsigned i = 0; i < threads; ++i)
            if (fibers[i].state != State::done) stop("a barrier that not all its threads reach");
        return;
    }
}

// Every lane of the warp shows `mine` and gets what lane `from` shows; all 32 must take part.
template <class T>
T from_lane(unsigned mask, T mine, unsigned from) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffffu) stop("a warp operation of less than the warp");
    const unsigned warp = threadIdx.x / kWarp * kWarp, self = threadIdx.x;
    std::memcpy(&exchange[self], &mine, sizeof(T));
    wait(State::at_warp_barrier);
    for (unsigned i = warp; i < warp + kWarp; ++i)
        if (fibers[i].state == State::done) stop("a warp operation that a thread has left");
    T theirs;
    std::memcpy(&theirs, &exchange[warp + from % kWarp], sizeof(T));
    wait(State::at_warp_barrier);
    return theirs;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::at_block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::wait(emulated::State::at_warp_barrier); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return emulated::from_lane(mask, value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = threadIdx.x % emulated::kWarp;
    return emulated::from_lane(mask, value, lane >= by ? lane - by : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = threadIdx.x % emulated::kWarp;
    return emulated::from_lane(mask, value, lane + by < emulated::kWarp ? lane + by : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned by) {
    return emulated::from_lane(mask, value, threadIdx.x % emulated::kWarp ^ by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned bits = predicate ? 1u << threadIdx.x % emulated::kWarp : 0;
    for (unsigned by = 1; by < emulated::kWarp; by *= 2) bits |= __shfl_xor_sync(mask, bits, by);
    return bits;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

namespace engine {

struct OnDeviceOf {
    explicit OnDeviceOf(const Tensor&) {}
};

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const char*, int64_t blocks, int threads, const OnDeviceOf&, Args... args) {
    if (threads < 1 || threads > 1024 || blocks > 0x7fffffff) emulated::stop("a launch that a GPU would refuse");
    gridDim.x = static_cast<unsigned>(blocks);
    blockDim.x = static_cast<unsigned>(threads);
    emulated::body = [&] { kernel(args...); };
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) emulated::run_block(blockDim.x);
}

template <class T>
T read_back(const T* on_device, const char*, const OnDeviceOf&) {
    return *on_device;
}

}  // namespace engine

#define CUDA CPU  // the key that STABLE_TORCH_LIBRARY_IMPL registers for
