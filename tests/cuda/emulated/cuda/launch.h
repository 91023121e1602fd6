// Stands in for csrc/cuda/launch.h and the CUDA language, so that g++ compiles a .cu file and its kernels run on CPU
// tensors: slowly, and with every barrier tested (fibers.h).
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "common/tensor.h"
#include "cuda/barriers.h"
#include "cuda/fibers.h"

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

// Shared memory: each resident block has its own, by the place in the source that declares it.
#define ENGINE_SHARED(name, ...) \
    std::type_identity_t<__VA_ARGS__>& name = emulated::shared<std::type_identity_t<__VA_ARGS__>>([] {})
#define ENGINE_DYNAMIC_SHARED ENGINE_SHARED

struct uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};

inline void __syncthreads() { emulated::wait(emulated::State::at_block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::wait(emulated::State::at_warp_barrier); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulated::yield(); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return emulated::from_lane(mask, value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, unsigned width = emulated::kWarp) {
    const unsigned lane = threadIdx.x % emulated::kWarp;
    return emulated::from_lane(mask, value, lane % width >= by ? lane - by : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned by) {
    return emulated::from_lane(mask, value, threadIdx.x % emulated::kWarp ^ by);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    int theirs[emulated::kWarp];
    emulated::all_lanes(predicate, theirs);
    unsigned bits = 0;
    for (unsigned i = 0; i < emulated::kWarp; ++i) bits |= (theirs[i] != 0 ? 1u : 0u) << i;
    return bits;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

template <class T>
T atomicAdd(T* at, T value) {
    return std::exchange(*at, static_cast<T>(*at + value));
}
template <class T>
T atomicMax(T* at, T value) {
    return std::exchange(*at, std::max(*at, value));
}

namespace engine::cuda {

struct OnDeviceOf {
    explicit OnDeviceOf(const Tensor&) {}
    int processors() const { return 4; }
    bool has_wgmma() const {
        const char* capability = std::getenv("ENGINE_EMULATED_CAPABILITY");
        return capability == nullptr || std::strcmp(capability, "9.0") == 0;
    }
};

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const char*, int64_t blocks, int threads, const OnDeviceOf&, Args... args) {
    if (threads < 1 || threads > 1024 || blocks < 0 || blocks > 0x7fffffff)
        emulated::stop("a launch that a GPU would refuse");
    gridDim.x = static_cast<unsigned>(blocks);
    blockDim.x = static_cast<unsigned>(threads);
    emulated::body = [&] { kernel(args...); };
    emulated::run_grid();
}

template <class... Parameters, class... Args>
void launch_with_shared(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int shared,
                        const OnDeviceOf& device, Args... args) {
    if (shared < 0 || shared > static_cast<int>(emulated::kShared)) emulated::stop("a launch that a GPU would refuse");
    launch(kernel, what, blocks, threads, device, args...);
    if (!emulated::transfers.empty()) emulated::stop("copies that nobody has waited for");
}

template <class... Parameters, class... Args>
void launch_dependent(void (*kernel)(Parameters...), const char* what, int64_t blocks, int threads, int shared,
                      const OnDeviceOf& device, Args... args) {
    launch_with_shared(kernel, what, blocks, threads, shared, device, args...);
}

class HostWord {
  public:
    HostWord(const char* what, const OnDeviceOf&) : what_(what) { word_ = 0; }
    volatile uint64_t* on_device() const { return &word_; }
    uint64_t written() const {
        if (word_ == 0) emulated::stop(what_);
        return word_;
    }
    uint64_t after_all() const { return word_; }

  private:
    static inline uint64_t word_;
    const char* what_;
};

template <class T>
T read_back(const T* on_device, const char*, const OnDeviceOf&) {
    return *on_device;
}

inline void fill_zero(void* on_device, size_t bytes, const char*, const OnDeviceOf&) {
    std::memset(on_device, 0, bytes);
}

}  // namespace engine::cuda

#define CUDA CPU  // the key that STABLE_TORCH_LIBRARY_IMPL registers for
