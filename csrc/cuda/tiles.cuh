// A matrix whose rows begin on 16 bytes as tiles of its memory, whatever the length of rows; how weights of it are
// compared with a threshold, and where those that are kept go.
#pragma once

#include "cuda/prune.cuh"

namespace engine::cuda {

// A chunk is the eight weights under one byte of the mask. A lane has kLaneChunks of them, 32 apart from each other, a
// warp 32 times as many without a gap, a tile those of a block's warps.
template <class T>
struct alignas(16) Chunk {
    uint32_t words[2 * sizeof(T)];
};
template <class T>
constexpr int kLaneChunks = 8 / sizeof(T);
template <class T>
constexpr int kTileChunks = kPruneThreads * kLaneChunks<T>;
template <class T>
constexpr uint32_t kSigns = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;  // of a word's weights

// Division of numbers below 2^31 by one known to the host, of at least 2.
struct Divisor {
    uint32_t by, magic;
    int shift;
    ENGINE_INLINE uint32_t quotient(uint32_t n) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> 32) >> shift;
    }
};
inline Divisor divisor(uint32_t by) {
    const int bits = std::bit_width(by - 1);
    return {by, static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + by - 1) / by), bits - 1};
}

struct Tiling {
    uint32_t rows, chunks, tiles;
    Divisor row_chunks;
    int group_shift;  // so many tiles are a group: as many as there are groups, about
};

// The least magnitude, as an integer, that is kept: that of T next above the threshold. 0, all, if the threshold is
// negative or NaN. For T of 16 bits it stands in both halves.
template <class T>
__device__ inline uint32_t least_kept(float threshold) {
    const uint32_t bits = std::bit_cast<uint32_t>(threshold);
    if (!(threshold >= 0.0f)) return 0;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if constexpr (std::is_same_v<T, float>) return magnitude + 1;
    uint32_t below = magnitude >> 16;  // the greatest of T that is not above
    if constexpr (std::is_same_v<T, Half>) {
        const Half nearest = from_float<Half>(std::bit_cast<float>(magnitude));
        below = nearest.bits - (to_float(nearest) > threshold ? 1u : 0u);
    }
    return (below + 1) * 0x10001u;
}

// Sets the sign of each weight that is kept and clears the other signs: as integers, magnitudes are ordered as the
// numbers are, NaN above all, and a difference borrows nothing from the upper half as long as the sign is set. The
// other bits mean nothing; kept_signs clears them.
template <class T>
__device__ inline uint32_t signs_and_more(uint32_t word, uint32_t least) {
    return (word | kSigns<T>)-least;
}
template <class T>
__device__ inline uint32_t kept_signs(uint32_t word, uint32_t least) {
    return signs_and_more<T>(word, least) & kSigns<T>;
}

// A lane's chunks of a tile; zeros beyond the end.
template <class T>
struct LaneChunks {
    Chunk<T> at[kLaneChunks<T>];
    uint32_t first;  // the index of at[0] in the matrix; at[i] is 32 i further

    __device__ void load(const T* weight, uint32_t tile, uint32_t chunks) {
        const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        first = tile * kTileChunks<T> + warp * (kWarp * kLaneChunks<T>)+lane;
        const auto* from = reinterpret_cast<const Chunk<T>*>(weight) + first;
#pragma unroll
        for (int i = 0; i < kLaneChunks<T>; ++i) {
            at[i] = {};
            if (first + i * kWarp < chunks) at[i] = from[i * kWarp];
        }
    }
};

// What is kept of each of a lane's chunks: nothing of one beyond the end.
template <class T>
struct Least {
    uint32_t at[kLaneChunks<T>];

    __device__ Least(const Threshold& threshold, const Tiling& tiling, uint32_t first) {
        const uint32_t all = threshold.row_stride == 0 ? least_kept<T>(threshold.values[0]) : 0;
#pragma unroll
        for (int i = 0; i < kLaneChunks<T>; ++i) {
            const uint32_t chunk = first + i * kWarp;
            at[i] = all;
            if (chunk >= tiling.chunks) {
                at[i] = kSigns<T>;
            } else if (threshold.row_stride != 0) {
                at[i] = least_kept<T>(threshold.values[tiling.row_chunks.quotient(chunk) * threshold.row_stride]);
            }
        }
    }
};

// A magnitude's bits as fp32.
template <class T>
__device__ inline uint32_t float_bits(uint32_t magnitude) {
    if constexpr (std::is_same_v<T, float>) return magnitude;
    if constexpr (std::is_same_v<T, BFloat16>) return magnitude << 16;
    return std::bit_cast<uint32_t>(to_float(Half{static_cast<uint16_t>(magnitude)}));
}

// The signs of a chunk's kept weights, in their order, as the bits of a byte.
template <class T>
__device__ inline uint32_t mask_of_chunk(const Chunk<T>& chunk, uint32_t least) {
    uint32_t kept[2 * sizeof(T)], bytes[2];  // a weight a byte
#pragma unroll
    for (size_t i = 0; i < 2 * sizeof(T); ++i) kept[i] = signs_and_more<T>(chunk.words[i], least);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if constexpr (sizeof(T) == 2) {
            bytes[i] = byte_permute(kept[2 * i], kept[2 * i + 1], 0x7531);
        } else {
            bytes[i] = byte_permute(byte_permute(kept[4 * i], kept[4 * i + 1], 0x0073),
                                    byte_permute(kept[4 * i + 2], kept[4 * i + 3], 0x0073), 0x5410);
        }
        bytes[i] &= 0x80808080u;
    }
    return byte_dot(bytes[0], 0x08040201u, byte_dot(bytes[1], 0x80402010u, 0)) >> 7;
}

// Where the kept weights of each of a lane's chunks begin among those of its warp, and how many the warp has. The
// prefix sums of all chunks are made at once, each in a byte: there are 8 · 31 at most before the last lane's.
template <int kChunks>
struct Begins {
    uint32_t at[kChunks], total;

    __device__ explicit Begins(const uint32_t (&bits)[kChunks]) {
        const unsigned lane = threadIdx.x % kWarp;
        uint32_t own = 0;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) own |= static_cast<uint32_t>(__popc(bits[i])) << (8 * i);
        uint32_t before = __shfl_up_sync(kAllLanes, own, 1);
        if (lane == 0) before = 0;
        before = sum_through(before);
        uint32_t packed = 0, sum = 0;  // of the last lane: sums through each chunk but the last, of at most 768
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            sum += (before >> (8 * i) & 0xff) + (own >> (8 * i) & 0xff);
            packed |= i < 3 ? sum << (10 * i) : 0;
        }
        packed = __shfl_sync(kAllLanes, packed, kWarp - 1);
        total = sum;  // of the last lane only
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            at[i] = (before >> (8 * i) & 0xff) + (i > 0 ? packed >> (10 * (i - 1)) & 0x3ff : 0);
    }
};

// [begin, end) of an array that begins on 16 bytes, `begin` in the first of them: pieces of kEach elements that lie
// wholly within, and the elements at either end that do not fill one. A block shares them out among its threads.
template <uint32_t kEach>
struct Span {
    uint32_t begin, end;
    template <class F>
    __device__ void each_piece(const F& with) const {
        for (uint32_t piece = (begin > 0 ? 1 : 0) + threadIdx.x; piece < end / kEach; piece += kPruneThreads)
            with(piece);
    }
    template <class F>
    __device__ void each_edge(const F& with) const {
        if (threadIdx.x >= 2 * kEach) return;
        const uint32_t piece = threadIdx.x < kEach ? 0 : end / kEach, at = piece * kEach + threadIdx.x % kEach;
        const bool whole = piece < end / kEach && (begin == 0 || piece > 0);
        if (!whole && at >= begin && at < end) with(at);
    }
};

}  // namespace engine::cuda
