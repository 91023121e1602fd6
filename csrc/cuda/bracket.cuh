// How magnitude_threshold finds the k-th smallest magnitude of many 16-bit floats in one pass over them.
//
// A sample of about 8192 chunks of eight weights brackets the result between two magnitudes, six standard deviations to
// either side of its estimate if weights are independent. The pass counts what is not below the lower one, two weights
// at a time as cuda/tiles.cuh compares them, and by shared memory only the few per cent in between. Whether the result
// is one of those is then known for certain; if not, as may be where neighbours are alike, the passes of
// cuda/magnitude_threshold.cu follow. Nothing comes back to the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/round.h"
#include "cuda/tiles.cuh"

namespace engine::cuda {

constexpr int64_t kBracketFrom = int64_t{1} << 22;   // weights: of fewer, launches are what takes the time
constexpr int kSampled = 8192;                       // chunks of eight
constexpr int kSampleBins = 8192, kSampleShift = 2;  // by the upper 13 bits of a magnitude
constexpr int kBetween = 1024;                       // magnitudes that a bracket has at most
constexpr int kBracketThreads = 256, kBracketChunks = 4;

struct Bracket {
    uint32_t low, high;            // magnitudes in [low, high)
    unsigned long long not_below;  // how many there are from `low` on
    uint64_t found;                // whether the result was one of them
};

// Each thread counts a chunk of the `every` that are its own. Not the first of them: `every` is a multiple of the row
// length for many weights, and the same few columns would stand for all. Multiples of the golden section spread evenly.
template <class T>
__global__ void __launch_bounds__(kBracketThreads) sample_kernel(const T* w, int64_t chunks, int64_t every,
                                                                 unsigned* bins) {  // [kSampleBins], 0 at first
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBracketThreads + threadIdx.x;
    const uint64_t fraction = static_cast<uint32_t>(thread) * 0x9e3779b9u;  // of 2^32
    const int64_t chunk = thread * every + static_cast<int64_t>(fraction * static_cast<uint64_t>(every) >> 32);
    if (chunk >= chunks) return;
    const Chunk<T> some = reinterpret_cast<const Chunk<T>*>(w)[chunk];
    for (const uint32_t word : some.words) {
        atomicAdd(&bins[(word & 0x7fff) >> kSampleShift], 1u);
        atomicAdd(&bins[(word >> 16 & 0x7fff) >> kSampleShift], 1u);
    }
}

// One block: `bracket` from the sample, six standard deviations to either side.
__global__ void __launch_bounds__(kBracketThreads) bracket_kernel(const unsigned* bins,  // [kSampleBins]
                                                                  double fraction,       // rank / weights
                                                                  Bracket* bracket) {    // 0 at first
    constexpr int kEach = kSampleBins / kBracketThreads, kWarps = kBracketThreads / kWarp;
    ENGINE_SHARED(warp_sums, unsigned[kWarps]);
    ENGINE_SHARED(limits, unsigned[2]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    unsigned own = 0;
    for (int i = 0; i < kEach; ++i) own += bins[threadIdx.x * kEach + i];
    const unsigned through = sum_through(own);
    if (lane == kWarp - 1) warp_sums[warp] = through;
    if (threadIdx.x == 0) {
        limits[0] = 0;
        limits[1] = kSampleBins;
    }
    __syncthreads();
    unsigned sum = through - own, all = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i < warp) sum += warp_sums[i];
        all += warp_sums[i];
    }
    const float margin = 3.0f * std::sqrt(static_cast<float>(all)) + 8.0f, middle = static_cast<float>(fraction * all);
    const float ranks[2] = {middle - margin, middle + margin};
    for (int side = 0; side < 2; ++side) {
        unsigned at = sum;
        if (!(static_cast<float>(at) < ranks[side] && ranks[side] <= static_cast<float>(at + own))) continue;
        int bin = threadIdx.x * kEach;
        while (static_cast<float>(at + bins[bin]) < ranks[side]) at += bins[bin++];
        limits[side] = bin + side;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    uint32_t low = limits[0] << kSampleShift, high = limits[1] << kSampleShift;
    if (limits[1] == kSampleBins) high = std::min<uint32_t>(high, low + kBetween);  // as likely as can be
    if (high - low > kBetween) low = high - kBetween;
    bracket->low = low;
    bracket->high = high;
}

// `bracket` of all the weights' n elements, for the result that has `rank` among them.
template <class T>
void find_bracket(const std::vector<Tensor>& weights, int64_t n, unsigned long long rank,
                  unsigned* sample,  // [kSampleBins], 0 at first
                  Bracket* bracket,  // 0 at first
                  const OnDeviceOf& device) {
    const int64_t every = std::max<int64_t>(1, n / 8 / kSampled);
    for (const Tensor& weight : weights) {
        const int64_t chunks = weight.numel() / 8;
        launch(sample_kernel<T>, "magnitude_threshold: sample_kernel",
               divide_up(divide_up(chunks, every), kBracketThreads), kBracketThreads, device, data<T>(weight), chunks,
               every, sample);
    }
    launch(bracket_kernel, "magnitude_threshold: bracket_kernel", 1, kBracketThreads, device, sample,
           static_cast<double>(rank) / static_cast<double>(n), bracket);
}

template <class T>
__global__ void __launch_bounds__(kBracketThreads) between_kernel(const T* w, int64_t n, Bracket* bracket,
                                                                  unsigned long long* total) {  // [kBetween]
    ENGINE_SHARED(bins, unsigned[kBetween]);
    for (int i = threadIdx.x; i < kBetween; i += kBracketThreads) bins[i] = 0;
    const uint32_t low = bracket->low, high = bracket->high;
    __syncthreads();
    const int64_t chunks = n / 8, step = static_cast<int64_t>(gridDim.x) * (kBracketThreads * kBracketChunks);
    const auto* from = reinterpret_cast<const Chunk<T>*>(w);
    int64_t first = static_cast<int64_t>(blockIdx.x) * (kBracketThreads * kBracketChunks) + threadIdx.x;
    unsigned not_below = 0;
    for (; first < chunks; first += step) {
        Chunk<T> some[kBracketChunks];
#pragma unroll
        for (int i = 0; i < kBracketChunks; ++i) {
            some[i] = {};
            if (first + i * kBracketThreads < chunks) some[i] = from[first + i * kBracketThreads];
        }
        uint32_t signs = 0;
#pragma unroll
        for (int i = 0; i < kBracketChunks; ++i) {
            const uint32_t none = first + i * kBracketThreads < chunks ? 0 : kSigns<T>;
            uint32_t between = 0;  // of word j at bits 12 + j and 28 + j
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t from_low = kept_signs<T>(some[i].words[j], low * 0x10001u) & ~none;
                between = between >> 1 | (from_low & ~kept_signs<T>(some[i].words[j], high * 0x10001u));
                signs = signs >> 1 | from_low;
            }
            for (; between != 0; between &= between - 1) {
                const int bit = __ffs(static_cast<int>(between)) - 1, j = bit & 3;
                const uint32_t two = j < 2 ? some[i].words[0] : some[i].words[2];
                const uint32_t other = j < 2 ? some[i].words[1] : some[i].words[3];
                const uint32_t word = j % 2 ? other : two;
                atomicAdd(&bins[(word >> (bit & 16) & 0x7fff) - low], 1u);
            }
        }
        not_below += __popc(signs);
    }
    if (blockIdx.x == 0 && chunks * 8 + threadIdx.x < n) {
        const uint32_t magnitude = w[chunks * 8 + threadIdx.x].bits & 0x7fffu;
        not_below += magnitude >= low;
        if (magnitude >= low && magnitude < high) atomicAdd(&bins[magnitude - low], 1u);
    }
    not_below = sum_of_warp(not_below);
    if (threadIdx.x % kWarp == 0) atomicAdd(&bracket->not_below, static_cast<unsigned long long>(not_below));
    __syncthreads();
    for (int i = threadIdx.x; i < kBetween; i += kBracketThreads)
        if (bins[i] > 0) atomicAdd(&total[i], static_cast<unsigned long long>(bins[i]));
}

}  // namespace engine::cuda
