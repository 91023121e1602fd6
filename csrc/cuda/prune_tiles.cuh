// How the ops that pack a pruned weight go about one whose rows are aligned to 16 bytes, with thresholds by row: by
// tiles of its memory, whatever the length of rows. cuda/prune.cuh takes every other weight.
//
//   1. count_tiles_kernel reads the weight and counts what each tile keeps (and finds each row's amax).
//   2. The CPU reads nnz, without which the result cannot be allocated: the only synchronisation.
//   3. pack_tiles_kernel reads the weight again, last tiles first, as the end of what was read last is still in L2. A
//      block finds where its values go by adding up what the tiles before it keep, in two levels, packs them in shared
//      memory, and writes them in 16-byte pieces that lie as the result's do. The mask is made here too.
//
// Bytes for a weight of b bytes of which a fraction d is kept as v bytes: b in step 1, b + 1/8 + d v in step 3, less
// what L2 (50 MB) gives back. Instructions, of which an H200 has 13 a weight at the speed of its memory: of 16-bit
// floats two at a time are compared, as integers, in 2, and counted in 2; a kept one takes 4 to be put to its place.
#pragma once

#include "cuda/tiles.cuh"

namespace engine::cuda {

// The largest magnitude of a chunk, as an integer of T's size.
template <class T>
__device__ inline uint32_t largest_of(const Chunk<T>& chunk) {
    uint32_t low = 0, high = 0;
#pragma unroll
    for (const uint32_t word : chunk.words) {
        high = std::max(high, word & 0x7fffffffu);
        if constexpr (sizeof(T) == 2) low = std::max(low, word & 0x7fffu);
    }
    return sizeof(T) == 2 ? std::max(low, high >> 16) : high;
}
// Whether the largest magnitude of some weights is kept, as then something is.
template <class T>
__device__ inline bool is_kept(uint32_t magnitude, uint32_t least) {
    return magnitude >= (sizeof(T) == 2 ? least & 0xffffu : least);
}

// amax[row] of the rows of a warp's chunks.
template <class T>
__device__ inline void find_amax(const LaneChunks<T>& w, const Least<T>& least, const Tiling& tiling,
                                 uint32_t* amax) {  // [rows]: bits as fp32, 0 at first
    const uint32_t begin = w.first - threadIdx.x % kWarp, last = begin + kWarp * kLaneChunks<T> - 1;
    const uint32_t row = tiling.row_chunks.quotient(begin);
    if (last < tiling.chunks && tiling.row_chunks.quotient(last) == row) {
        uint32_t largest = 0;
#pragma unroll
        for (const Chunk<T>& chunk : w.at) largest = std::max(largest, largest_of<T>(chunk));
        largest = max_of_warp(largest);
        if (threadIdx.x % kWarp == 0 && is_kept<T>(largest, least.at[0])) atomicMax(&amax[row], float_bits<T>(largest));
        return;
    }
#pragma unroll
    for (int i = 0; i < kLaneChunks<T>; ++i) {
        const uint32_t chunk = w.first + i * kWarp, largest = largest_of<T>(w.at[i]);
        if (chunk < tiling.chunks && is_kept<T>(largest, least.at[i]))
            atomicMax(&amax[tiling.row_chunks.quotient(chunk)], float_bits<T>(largest));
    }
}

// How many weights are kept, of all, of each group of tiles and of each tile.
struct Counts {
    unsigned long long* all;     // [1], 0 at first: the tiles that are counted in the upper half
    uint32_t *groups, *tiles;    // [groups], 0 at first; [tiles]
    volatile uint64_t* on_host;  // [1]: all, plus 1, once it is known
};

template <bool kAmax, class T>
__global__ void __launch_bounds__(kPruneThreads)
    count_tiles_kernel(const T* weight, Threshold threshold, Tiling tiling, Counts counts,
                       uint32_t* amax) {  // [rows], 0 at first
    ENGINE_SHARED(warp_counts, uint32_t[kPruneWarps]);
    const uint32_t tile = blockIdx.x;
    LaneChunks<T> w;
    w.load(weight, tile, tiling.chunks);
    const Least<T> least(threshold, tiling, w.first);
    uint32_t kept = 0;  // the signs of 16 words
#pragma unroll
    for (int i = 0; i < kLaneChunks<T>; ++i) {
#pragma unroll
        for (const uint32_t word : w.at[i].words) kept = kept >> 1 | kept_signs<T>(word, least.at[i]);
    }
    if constexpr (kAmax) find_amax<T>(w, least, tiling, amax);
    const uint32_t sum = sum_of_warp(static_cast<uint32_t>(__popc(kept)));
    if (threadIdx.x % kWarp == 0) warp_counts[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    uint32_t total = 0;
    for (const uint32_t count : warp_counts) total += count;
    counts.tiles[tile] = total;
    atomicAdd(&counts.groups[tile >> tiling.group_shift], total);
    const unsigned long long before = atomicAdd(counts.all, 1ull << 32 | total);
    if (before >> 32 == tiling.tiles - 1) *counts.on_host = (before & 0xffffffffu) + total + 1;
}

// A kept weight as it is.
template <class T>
struct KeepBits {
    using Value = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    Value* values;  // [nnz]
    struct Row {};
    __device__ Row row(uint32_t) const { return {}; }
    __device__ void start_row(uint32_t) const {}
    __device__ static void prepare(Chunk<T>&, Row) {}
    // In the low bits.
    __device__ static uint32_t value(const Chunk<T>& chunk, int j, Row) {
        if constexpr (sizeof(T) == 2) return chunk.words[j / 2] >> (16 * (j % 2));
        return chunk.words[j];
    }
};

// What is kept of the tiles before this one: a warp adds up the groups before, then the tiles of its own group.
__device__ inline uint32_t kept_before(const Counts& counts, uint32_t tile, int group_shift) {
    const uint32_t group = tile >> group_shift, lane = threadIdx.x % kWarp;
    uint32_t sum = 0;
    for (uint32_t i = lane; i < group; i += kWarp) sum += counts.groups[i];
    for (uint32_t i = (group << group_shift) + lane; i < tile; i += kWarp) sum += counts.tiles[i];
    return sum_of_warp(sum);
}

// col_indices[at] of the staged weights at [begin, end), four at a time.
template <class T, class I>
__device__ inline void write_columns(const Tiling& tiling, uint32_t tile, const uint16_t* places, uint32_t begin,
                                     uint32_t end, I* col_indices) {  // begins on 16 bytes
    struct alignas(8) Places {
        uint16_t at[4];
    };
    struct alignas(16) Columns {
        I at[4];
    };
    const uint32_t chunk = tile * kTileChunks<T>, row = tiling.row_chunks.quotient(chunk);
    const uint32_t first = (chunk - row * tiling.row_chunks.by) * 8, columns = tiling.row_chunks.by * 8;
    const bool one_row = first + kTileChunks<T> * 8 <= columns;
    const auto column_of = [&](uint32_t place) {
        const uint32_t column = first + place;
        return static_cast<I>(one_row ? column : column - tiling.row_chunks.quotient(column / 8) * columns);
    };
    const Span<4> span{begin, end};
    span.each_piece([&](uint32_t four) {
        const Places from = reinterpret_cast<const Places*>(places)[four];
        Columns to;
#pragma unroll
        for (int j = 0; j < 4; ++j) to.at[j] = column_of(from.at[j]);
        reinterpret_cast<Columns*>(col_indices)[four] = to;
    });
    span.each_edge([&](uint32_t at) { col_indices[at] = column_of(places[at]); });
}

template <bool kMask, bool kColumns, class T, class I, class Out>
__global__ void __launch_bounds__(kPruneThreads)
    pack_tiles_kernel(const T* weight, Threshold threshold, Tiling tiling, Counts counts, Out out,
                      uint8_t* bitmask,  // [chunks], with kMask
                      I* offsets,        // [rows + 1]
                      I* col_indices) {  // [nnz], with kColumns
    using Value = typename Out::Value;
    constexpr uint32_t kEach = 16 / sizeof(Value), kWeights = kTileChunks<T> * 8;
    struct alignas(16) Piece {
        Value at[kEach];
    };
    struct alignas(16) Staged {  // in order, and as much off 16 bytes as in the result
        Piece values[kWeights / kEach + 1];
        uint16_t places[kColumns ? kWeights + kEach : 1];  // within the tile
    };
    ENGINE_SHARED(staged, Staged);
    ENGINE_SHARED(warp_counts, uint32_t[kPruneWarps]);
    ENGINE_SHARED(before_tile, uint32_t);
    const uint32_t tile = gridDim.x - 1 - blockIdx.x, warp = threadIdx.x / kWarp;
    LaneChunks<T> w;
    w.load(weight, tile, tiling.chunks);
    uint32_t row_before = tiling.row_chunks.quotient(std::min(w.first, tiling.chunks - 1));
    auto how = out.row(row_before);
    if (warp == 0) {
        const uint32_t before = kept_before(counts, tile, tiling.group_shift);
        if (threadIdx.x == 0) before_tile = before;
    }
    const Least<T> least(threshold, tiling, w.first);
    uint32_t bits[kLaneChunks<T>];
#pragma unroll
    for (int i = 0; i < kLaneChunks<T>; ++i) {
        bits[i] = mask_of_chunk<T>(w.at[i], least.at[i]);
        if (kMask && w.first + i * kWarp < tiling.chunks) bitmask[w.first + i * kWarp] = static_cast<uint8_t>(bits[i]);
    }
    const Begins<kLaneChunks<T>> begins(bits);
    if (threadIdx.x % kWarp == kWarp - 1) warp_counts[warp] = begins.total;
    __syncthreads();
    uint32_t before_warp = 0, total = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPruneWarps; ++i) {
        if (i == warp) before_warp = total;
        total += warp_counts[i];
    }
    const uint32_t base = before_tile, shift = base % kEach;

    auto* values = staged.values[0].at;
#pragma unroll
    for (int i = 0; i < kLaneChunks<T>; ++i) {
        const uint32_t chunk = w.first + i * kWarp, begin = before_warp + begins.at[i];
        const uint32_t row = tiling.row_chunks.quotient(chunk);
        if (chunk < tiling.chunks && row * tiling.row_chunks.by == chunk) {
            offsets[row] = static_cast<I>(base + begin);
            out.start_row(row);
        }
        if (row != row_before && chunk < tiling.chunks) how = out.row(row);
        row_before = row;
        out.prepare(w.at[i], how);
        SharedAddress to = shared_address(values + (shift + begin)), place_to = shared_address(staged.places);
        if constexpr (kColumns) place_to += (shift + begin) * sizeof(uint16_t);
        const uint32_t place = (chunk - tile * kTileChunks<T>)*8;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            push_if<sizeof(Value)>(bits[i] & 1u << j, to, out.value(w.at[i], j, how));
            if constexpr (kColumns) push_if<sizeof(uint16_t)>(bits[i] & 1u << j, place_to, place + j);
        }
    }
    if (tile == tiling.tiles - 1 && threadIdx.x == 0) offsets[tiling.rows] = static_cast<I>(base + total);
    __syncthreads();

    const Span<kEach> span{shift, shift + total};
    Value* result = out.values + (base - shift);
    span.each_piece([&](uint32_t piece) { reinterpret_cast<Piece*>(result)[piece] = staged.values[piece]; });
    span.each_edge([&](uint32_t at) { result[at] = values[at]; });
    if constexpr (kColumns) {
        // The first column's piece of four may be the second of the first value's.
        const uint32_t from = shift / 4 * 4;
        write_columns<T>(tiling, tile, staged.places + from, shift - from, span.end - from,
                         col_indices + (base - shift + from));
    }
}

// The host's part.

// Whether the kernels above take it: rows aligned, thresholds by row, and places that fit 32 bits.
inline bool by_tiles(const Tensor& weight, const Threshold& threshold) {
    return rows_aligned(weight) && threshold.column_stride == 0 && weight.numel() > 0 && weight.size(1) >= 16 &&
           weight.numel() < int64_t{1} << 31;
}

// Counts, asks `allocate(nnz)` for `Out` and the columns, and packs. `bitmask` is null without kMask.
template <bool kMask, bool kAmax, bool kColumns, class T, class I, class Allocate>
void pack_by_tiles(const Tensor& weight, Threshold threshold, uint8_t* bitmask, I* offsets, uint32_t* amax,
                   Allocate allocate, const char* what, const OnDeviceOf& device) {
    const auto rows = static_cast<uint32_t>(weight.size(0)), chunks = static_cast<uint32_t>(weight.numel() / 8);
    const uint32_t tiles = (chunks + kTileChunks<T> - 1) / kTileChunks<T>;
    const int group_shift = (std::bit_width(tiles) + 1) / 2;
    const Tiling tiling{rows, chunks, tiles, divisor(chunks / rows), group_shift};
    const uint32_t groups = ((tiles - 1) >> group_shift) + 1;
    Tensor scratch = new_tensor(weight, {2 + int64_t{groups} + tiles}, ScalarType::Int);
    auto* words = static_cast<uint32_t*>(scratch.mutable_data_ptr());
    const HostWord nnz(what, device);
    const Counts counts{reinterpret_cast<unsigned long long*>(words), words + 2, words + 2 + groups, nnz.on_device()};
    fill_zero(words, (2 + groups) * sizeof(uint32_t), what, device);
    if constexpr (kAmax) fill_zero(amax, rows * sizeof(uint32_t), what, device);
    launch(count_tiles_kernel<kAmax, T>, what, tiles, kPruneThreads, device, data<T>(weight), threshold, tiling, counts,
           amax);
    const auto [out, columns] = allocate(static_cast<int64_t>(nnz.written() - 1));
    launch(pack_tiles_kernel<kMask, kColumns, T, I, std::remove_const_t<decltype(out)>>, what, tiles, kPruneThreads,
           device, data<T>(weight), threshold, tiling, counts, out, bitmask, offsets, columns);
}

}  // namespace engine::cuda
