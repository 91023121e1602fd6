// x · wᵀ of a bitmap w for many rows of x, by wgmma.
//
// A block has 128 rows of w and kTokens of x: two warpgroups multiply 64 rows of w each, operand A, by all of the tile
// of x, operand B. Each warp spreads its 16 rows in registers (bitmap_stretch.cuh), straight into fragments of A, while
// the tensor cores work on the step before: no spread weight is ever in memory. One more warpgroup brings the
// compressed w, a stretch or two ahead, and x, kStages steps ahead, for both blocks of a cluster at once.
//
// What is spent, for a step of 128 bytes of 128 rows of w by 256 of x, the products of which take 1024 clocks: issue
// slots, of four a clock, about 1500 for the spread and 500 for what is brought; shared memory, by 128 B a clock: x
// written 256 clocks and read 512, tables and values some 400.
//
// Where the tiles are fewer than the GPU has multiprocessors, the summed dimension is split over blocks, whose sums
// reduce_kernel adds. So it is, too, where the sums of int8 could pass 2^31.
#pragma once

#include <cstdlib>

#include "cuda/bitmap_tile_output.cuh"

namespace engine {

constexpr int kWgmmaTileThreads = kTileConsumers + kWarpgroup;
// Of a thread of the warpgroups that multiply and of the one that brings: 3 · 168, what they are started with, in all.
constexpr int kMultiplyRegisters = 200, kBringRegisters = 104;
constexpr int kStages = 4;

template <class V, int kTokens>
struct TileShape {
    static constexpr int kCopies = kTokens == 256 ? 2 : 3;  // stretches of w on their way or being spread
    struct alignas(1024) Ring {
        uint8_t x[kStages][kTokens * 128];
        StretchCopy<V> copies[kCopies];
    };
    union Shared {
        Ring ring;
        float sums[kTokens][kStagedRow];
    };
    struct Barriers {
        Barrier full[kStages], empty[kStages];                // x: of a step; empty: in all blocks of the cluster
        Barrier values_full[kCopies], values_empty[kCopies];  // w: of a stretch
        Barrier ended;                                        // `fits` is known
    };
};

// The part of a tile that a block has.
struct TilePart {
    int tile_m, tile_n, number, begin, end;  // stretches [begin, end)
};
template <class V>
__device__ inline TilePart tile_part(const TileWork<V>& work, unsigned cluster) {
    const unsigned clusters_n = static_cast<unsigned>(work.tiles_n) / cluster;
    const unsigned first = blockIdx.x / cluster, tile_m = first % static_cast<unsigned>(work.tiles_m);
    const unsigned rest = first / static_cast<unsigned>(work.tiles_m);
    const auto number = static_cast<int>(rest / clusters_n), begin = number * work.stretches_a_part;
    return {static_cast<int>(tile_m), static_cast<int>(rest % clusters_n * cluster + blockIdx.x % cluster), number,
            begin, std::min(begin + work.stretches_a_part, work.stretches)};
}

// The warpgroup that brings x and the compressed w: a quad has four of its warp's 32 rows.
template <class V, int kTokens, class Shape>
__device__ inline void bring(const TileWork<V>& work, const TileMap& map_x, const TilePart& part, unsigned cluster,
                             typename Shape::Ring& ring, typename Shape::Barriers& barriers, bool (&fits)[kTileRows]) {
    constexpr int kBehind = Shape::kCopies - kStages / kStepsAStretch;
    const int thread = threadIdx.x - kTileConsumers, tile_row = thread / kWarp * 32 + thread % kWarp / 4;
    const int stretches = part.end - part.begin, rank = cluster == 1 ? 0 : static_cast<int>(cluster_rank());
    const int tokens = kTokens / static_cast<int>(cluster);
    // Each block of a cluster brings its share of the tile to all.
    const auto bring_x = [&](int step) {
        const int stage = step % kStages, round = step / kStages;
        if (round > 0) barrier_wait(barriers.empty[stage], (round - 1) % 2);
        barrier_arrive_and_expect(barriers.full[stage], kTokens * 128);
        uint8_t* to = ring.x[stage] + rank * tokens * 128;
        const int byte = (part.begin * kStepsAStretch + step) * 128, row = part.tile_m * kTokens + rank * tokens;
        if (cluster == 1) {
            copy_tile(to, map_x, byte, row, barriers.full[stage]);
        } else {
            copy_tile_to(to, map_x, byte, row, barriers.full[stage], (1u << cluster) - 1);
        }
    };
    if (thread == 0)
        for (int step = 0; step < kStages && step < stretches * kStepsAStretch; ++step) bring_x(step);
    const int by_words =
        work.aligned ? std::min(part.end, static_cast<int>(work.w.columns) / (4 * kLaneWeights<V>)) : 0;
    RowStream rows[kStreams];
    LaneMask<V> masks[kStreams], next[kStreams];
#pragma unroll
    for (int r = 0; r < kStreams; ++r) {
        const int64_t row = int64_t{part.tile_n} * kTileRows + tile_row + 8 * r;
        rows[r] = stream_of(work.w, row, part.begin, part.end, work.aligned);
        masks[r] = load_mask<V>(rows[r], part.begin, part.begin < by_words);
        next[r] = load_mask<V>(rows[r], part.begin + 1, part.begin + 1 < by_words);
    }
    int slot = 0;
    uint32_t parity = 1;  // nothing is waited for in the first round
    for (int i = 0; i < stretches + kBehind; ++i) {
        if (i < stretches) {
            barrier_wait(barriers.values_empty[slot], parity);
            begin_values<V>(ring.copies[slot], tile_row, rows, masks, work.w);
            barrier_arrive_after_copies(barriers.values_full[slot]);
            barrier_arrive(barriers.values_full[slot]);  // for what was written without a copy
            if (++slot == Shape::kCopies) {
                slot = 0;
                parity ^= 1;
            }
#pragma unroll
            for (int r = 0; r < kStreams; ++r) {
                masks[r] = next[r];
                next[r] = load_mask<V>(rows[r], part.begin + i + 2, part.begin + i + 2 < by_words);
            }
        }
        const int step = (i - kBehind) * kStepsAStretch;
        if (thread == 0 && step >= kStages)
            for (int j = 0; j < kStepsAStretch; ++j) bring_x(step + j);
        __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < kStreams; ++r) {
        if (thread % 4 != 0 || part.end != work.stretches) continue;
        const int64_t row = int64_t{part.tile_n} * kTileRows + tile_row + 8 * r;
        fits[tile_row + 8 * r] = rows[r].left == 0;
        if (work.partial != nullptr && row < work.w.rows) work.fits[row] = rows[r].left == 0;
    }
    barrier_arrive(barriers.ended);
}

// The warpgroups that multiply: a warp has 16 rows of w, a lane parts of rows g and g + 8.
template <class V, int kTokens, class Shape>
__device__ inline void multiply(WarpgroupD<Accumulator<V>, kTokens>& sums, int stretches, unsigned cluster,
                                typename Shape::Ring& ring, typename Shape::Barriers& barriers, uint32_t table) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint64_t tiles = shared_tile<128>(ring.x[0]);
    const uint32_t values = shared_address(&ring.copies[0].values[warp * 16 + g][0]);
    int slot = 0, stage = 0, stretch = 0;
    uint32_t parity = 0, values_parity = 0;
    FragmentA weights[kStepsAStretch][4];
    do {
        barrier_wait(barriers.values_full[slot], values_parity);
        const LaneStretch<V> of_g = ring.copies[slot].lanes[warp * 16 + g][t];
        const LaneStretch<V> of_g8 = ring.copies[slot].lanes[warp * 16 + g + 8][t];
        const LaneMask<V> masks[2] = {of_g.mask, of_g8.mask};
        const uint32_t copy = values + slot * static_cast<uint32_t>(sizeof(StretchCopy<V>));
        ValueReader readers[2] = {ValueReader(copy + of_g.first), ValueReader(copy + 8 * kRowBytes + of_g8.first)};
#pragma unroll
        for (int j = 0; j < kStepsAStretch; ++j) {
            spread_step<V>(weights[j], readers, masks, j, table);
            if (j == kStepsAStretch - 1) {
                __syncwarp();
                if (lane == 0) barrier_arrive(barriers.values_empty[slot]);
            }
            barrier_wait(barriers.full[stage], parity);
            const uint64_t tile = advance(tiles, stage * kTokens * 128);
            wgmma_begin();
#pragma unroll
            for (int s = 0; s < 4; ++s) wgmma(sums, weights[j][s], advance(tile, 32 * s), V{});
            wgmma_commit();
            wgmma_wait<1>();  // the step before: its fragments may be written over, and its tile
            Barrier& read = barriers.empty[(stage + kStages - 1) % kStages];
            if (stretch + j > 0 && lane < static_cast<int>(cluster))
                cluster == 1 ? barrier_arrive(read) : barrier_arrive(read, lane);
            stage = (stage + 1) % kStages;
            parity ^= stage == 0 ? 1 : 0;
        }
        if (++slot == Shape::kCopies) {
            slot = 0;
            values_parity ^= 1;
        }
    } while (++stretch < stretches);
    wgmma_wait<0>();
}

template <class V, int kTokens, class Output>
__global__ void __launch_bounds__(kWgmmaTileThreads, 1)
    wgmma_tile_kernel(TileWork<V> work, const __grid_constant__ TileMap map_x, Output output, unsigned cluster) {
    using Shape = TileShape<V, kTokens>;
    ENGINE_DYNAMIC_SHARED(shared, typename Shape::Shared);
    ENGINE_SHARED(barriers, typename Shape::Barriers);
    ENGINE_SHARED(table, TileTable);
    ENGINE_SHARED(fits, bool[kTileRows]);
    const TilePart part = tile_part(work, cluster);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(barriers.full[i], 1);
            barrier_init(barriers.empty[i], kTileWarps * static_cast<int>(cluster));
        }
        for (int i = 0; i < Shape::kCopies; ++i) {
            barrier_init(barriers.values_full[i], 2 * kWarpgroup);
            barrier_init(barriers.values_empty[i], kTileWarps);
        }
        barrier_init(barriers.ended, kWarpgroup);
        barriers_ready();
    }
    make_tile_table<V>(table);
    cluster == 1 ? __syncthreads() : cluster_barrier();

    if (threadIdx.x >= kTileConsumers) {
        give_registers<kBringRegisters>();
        bring<V, kTokens, Shape>(work, map_x, part, cluster, shared.ring, barriers, fits);
        return;  // of threads that have ended no barrier waits
    }
    take_registers<kMultiplyRegisters>();
    WarpgroupD<Accumulator<V>, kTokens> sums{};
    multiply<V, kTokens, Shape>(sums, part.end - part.begin, cluster, shared.ring, barriers, shared_address(table));
    barrier_wait(barriers.ended, 0);
    // All have read what sums are written over, and no block ends while another arrives at its barriers.
    cluster == 1 ? __syncthreads() : cluster_barrier();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    if (work.partial != nullptr) {
        const int64_t tile = (int64_t{part.number} * work.tiles_n + part.tile_n) * work.tiles_m + part.tile_m;
        uint4* to = work.partial + tile * (kTokens / 8) * kTileConsumers + threadIdx.x;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j)
            to[j * kTileConsumers] = std::bit_cast<uint4>(Elements<4, Accumulator<V>>{
                {sums.at[4 * j], sums.at[4 * j + 1], sums.at[4 * j + 2], sums.at[4 * j + 3]}});
        return;
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i)
        shared.sums[i / 4 * 8 + 2 * t + i % 2][warp * 16 + g + i / 2 % 2 * 8] = static_cast<float>(sums.at[i]);
    __syncthreads();
    const bool four[4] = {fits[4 * lane], fits[4 * lane + 1], fits[4 * lane + 2], fits[4 * lane + 3]};
    write_tile(output, shared.sums, int64_t{part.tile_m} * kTokens,
               static_cast<int>(std::min<int64_t>(kTokens, work.m - int64_t{part.tile_m} * kTokens)),
               int64_t{part.tile_n} * kTileRows, work.w.rows, work.factor, four);
}

// Whether wgmma_tile_kernel can: places in a row and numbers of blocks are 32-bit numbers.
inline bool takes_tiles(Rows rows, int64_t n, const OnDeviceOf& device) {
    return rows.k <= 1 << 29 && n <= 1 << 29 && rows.m <= 1 << 29 && device.has_wgmma();
}

template <int kTokens, class V, class Output>
void multiply_tiles(const TileWork<V>& work, const ArrangedRows<V>& x, int parts, int cluster, const Output& output,
                    const char* what, const OnDeviceOf& device) {
    const int64_t tiles = int64_t{work.tiles_m} * work.tiles_n;
    const TileMap map_x = tile_map(x.data, x.m, x.stride, x.stride, kTokens / cluster, 128, what);
    launch_clusters(wgmma_tile_kernel<V, kTokens, Output>, what, tiles * parts, kWgmmaTileThreads, cluster,
                    static_cast<int>(sizeof(typename TileShape<V, kTokens>::Shared)), device, work, map_x, output,
                    static_cast<unsigned>(cluster));
    if (parts > 1)
        launch(reduce_kernel<V, kTokens, Output>, what, tiles * (kTokens / kReducedTokens), kTileConsumers, device,
               work, output, parts);
}

template <class V, class Output>
void multiply_bitmap_tiles(const Bitmap<V>& w, const ArrangedRows<V>& x, const Output& output, const char* what,
                           const OnDeviceOf& device) {
    if (x.m == 0 || w.rows == 0) return;
    const auto ceil = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
    const int tokens = x.m <= 64 ? 64 : x.m <= 128 ? 128 : 256;
    TileWork<V> work{w,
                     x.factor,
                     nullptr,
                     nullptr,
                     x.m,
                     ceil(x.m, tokens),
                     ceil(w.rows, kTileRows),
                     static_cast<int>(stretches_of<V>(w.columns)),
                     0,
                     false};
    static const char* const wanted = std::getenv("ENGINE_TILE_CLUSTER");  // to be decided by a GPU
    const int cluster = work.tiles_n > 1 && wanted != nullptr && *wanted == '2' ? 2 : 1;
    work.tiles_n = ceil(work.tiles_n, cluster) * cluster;
    constexpr int kMaskBytes = kLaneWeights<V> / 8;
    work.aligned = w.row_bytes % kMaskBytes == 0 && reinterpret_cast<uintptr_t>(w.mask) % kMaskBytes == 0;
    // As many parts as multiprocessors are left for, of at least 8 stretches; of at most 2^17 products of int8.
    const int64_t tiles = int64_t{work.tiles_m} * work.tiles_n;
    int parts = std::max(1, static_cast<int>(std::min<int64_t>(device.processors() / tiles, work.stretches / 8)));
    if (sizeof(V) == 1) parts = std::max(parts, ceil(w.columns, 1 << 17));
    work.stretches_a_part = ceil(work.stretches, parts);
    parts = ceil(work.stretches, work.stretches_a_part);
    std::optional<Tensor> partial, fits;
    if (parts > 1) {
        partial = new_tensor(x.memory, {parts, tiles, tokens, kTileRows}, ScalarType::Int);
        fits = new_tensor(x.memory, {w.rows}, ScalarType::Byte);
        work.partial = static_cast<uint4*>(partial->mutable_data_ptr());
        work.fits = static_cast<bool*>(fits->mutable_data_ptr());
    }
    if (tokens == 64) return multiply_tiles<64>(work, x, parts, cluster, output, what, device);
    if (tokens == 128) return multiply_tiles<128>(work, x, parts, cluster, output, what, device);
    multiply_tiles<256>(work, x, parts, cluster, output, what, device);
}

}  // namespace engine
