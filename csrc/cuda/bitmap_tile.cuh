// x · wᵀ of a bitmap w for many rows of x, by wgmma.
//
// A block has 128 rows of w and kTokens of x: two warpgroups multiply 64 rows of w each, operand A, by all of the tile
// of x, operand B. Each warp spreads its 16 rows in registers, straight into fragments of A, while the tensor cores
// work on the step before: no spread weight is ever in memory. A thread beside them brings x (bitmap_activations.cuh),
// by one bulk copy a step, kStages - 1 steps ahead.
//
// A stretch is 256 bytes of each row of w, two steps. Its mask is read two stretches or more ahead, its values come by
// cp.async into shared memory one or two ahead. Lane t of a quad has 64 bytes of it, whose values it takes one word
// after another.
//
// What is spent, for a step of 128 bytes of 128 rows of w by 256 of x, the products of which take 1024 clocks: the
// spread 16 registers a lane of some 10 instructions each, of 8 warps, a third of the issue slots; shared memory, by
// 128 B a clock: x written 256 clocks and read 512, tables and values some 400.
//
// Where the tiles are fewer than the GPU has multiprocessors, the summed dimension is split over blocks, whose sums
// reduce_kernel adds. So it is, too, where the sums of int8 could pass 2^31.
#pragma once

#include "common/round.h"
#include "cuda/bitmap_tile_output.cuh"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace engine::cuda {

constexpr int kWgmmaTileThreads = kTileConsumers + kWarpgroup;  // registers are given to whole warpgroups
constexpr int kStages = 4;

template <int kTokens>
struct TileShape {
    // Stretches whose values are in shared memory.
    static constexpr int kCopies = kTokens == 256 ? 2 : 3;
    struct alignas(1024) Ring {
        uint8_t x[kStages][kTokens * 128];
        uint8_t values[kCopies][kTileRows][kRowBytes];
    };
    union Shared {
        Ring ring;
        float sums[kTokens][kStagedRow];
    };
};

template <class V, int kTokens, class Output>
__global__ void __launch_bounds__(kWgmmaTileThreads, 1) wgmma_tile_kernel(TileWork<V> work, Output output) {
    using Shape = TileShape<kTokens>;
    constexpr int kCopies = Shape::kCopies, kAhead = kCopies - 1;
    ENGINE_DYNAMIC_SHARED(shared, typename Shape::Shared);
    ENGINE_SHARED(full, Barrier[kStages]);
    ENGINE_SHARED(empty, Barrier[kStages]);
    ENGINE_SHARED(table, SpreadTable<V>);
    ENGINE_SHARED(must_end, uint32_t[kTileRows]);
    ENGINE_SHARED(fits, bool[kTileRows]);
    const Bitmap<V>& w = work.w;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t tile_m = blockIdx.x % work.tiles_m, tile_n = blockIdx.x / work.tiles_m % work.tiles_n;
    const int64_t part = blockIdx.x / work.tiles_m / work.tiles_n;
    const auto begin = static_cast<int>(part * work.stretches_a_part);
    const auto end = static_cast<int>(std::min<int64_t>(begin + work.stretches_a_part, work.stretches));
    const int steps = (end - begin) * kStepsAStretch;
    const bool last_part = end == work.stretches;

    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full[i], 1);
            barrier_init(empty[i], kTileWarps);
        }
        barriers_ready();
    }
    make_spread_table<V>(table);
    __syncthreads();

    if (warp >= kTileWarps) {
        give_registers<24>();
        if (threadIdx.x == kTileConsumers) {
            const uint8_t* from = work.x + (tile_m * work.stretches + begin) * kStepsAStretch * kTokens * 128;
            for (int step = 0; step < steps; ++step, from += kTokens * 128) {
                const int stage = step % kStages, round = step / kStages;
                if (round > 0) barrier_wait(empty[stage], (round - 1) % 2);
                barrier_arrive_and_expect(full[stage], kTokens * 128);
                copy_bytes(shared.ring.x[stage], from, kTokens * 128, full[stage]);
            }
        }
        return;  // of threads that have ended no barrier waits
    }
    take_registers<240>();
    WarpgroupD<Accumulator<V>, kTokens> sums{};
    const int tile_row = warp * 16 + g;
    RowStream rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32_t end_at;
        rows[r] = stream_of(w, tile_n * kTileRows + tile_row + 8 * r, begin, end, work.aligned, end_at);
        if (t == 0) must_end[tile_row + 8 * r] = end_at;
    }
    LaneMask<V> masks[kAhead + 2][2];
    uint32_t first[kAhead + 1][2];
    uint8_t* const copies = &shared.ring.values[0][tile_row][0];
    constexpr int kCopyBytes = kTileRows * kRowBytes;
#pragma unroll
    for (int i = 0; i <= kAhead; ++i)
        for (int r = 0; r < 2; ++r) masks[i][r] = load_mask<V>(rows[r], begin + i, work.aligned);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        begin_values<V>(first[i], rows, masks[i], copies + i * kCopyBytes, w);
        copy_commit();
    }
    const uint64_t tiles = shared_tile<128>(shared.ring.x[0]);
    int now = 0, ahead = kAhead % kCopies, stage = 0;
    uint32_t parity = 0;
    FragmentA weights[kStepsAStretch][4];
    int stretch = begin;
    do {
#pragma unroll
        for (int r = 0; r < 2; ++r) masks[kAhead + 1][r] = load_mask<V>(rows[r], stretch + kAhead + 1, work.aligned);
        begin_values<V>(first[kAhead], rows, masks[kAhead], copies + ahead * kCopyBytes, w);
        copy_commit();
        copy_wait<kAhead>();
        __syncwarp();
        const uint8_t* copy = copies + now * kCopyBytes;
        ValueReader readers[2] = {ValueReader(copy, first[0][0]), ValueReader(copy + 8 * kRowBytes, first[0][1])};
#pragma unroll
        for (int j = 0; j < kStepsAStretch; ++j) {
            spread_step<V>(weights[j], readers, masks[0], j, table);
            barrier_wait(full[stage], parity);
            const uint64_t tile = advance(tiles, stage * kTokens * 128);
            wgmma_begin();
#pragma unroll
            for (int s = 0; s < 4; ++s) wgmma(sums, weights[j][s], advance(tile, 32 * s), V{});
            wgmma_commit();
            wgmma_wait<1>();  // the step before: its fragments may be written over, and its tile
            if (lane == 0 && stretch + j > begin) barrier_arrive(empty[(stage + kStages - 1) % kStages]);
            stage = (stage + 1) % kStages;
            parity ^= stage == 0 ? 1 : 0;
        }
        __syncwarp();  // before the copy is written over
        now = now + 1 == kCopies ? 0 : now + 1;
        ahead = ahead + 1 == kCopies ? 0 : ahead + 1;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i <= kAhead; ++i) masks[i][r] = masks[i + 1][r];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) first[i][r] = first[i + 1][r];
        }
    } while (++stretch < end);
    wgmma_wait<0>();
    if (last_part) {
        __syncwarp();
        for (int r = 0; r < 2 && t == 0; ++r) {
            const int64_t row = tile_n * kTileRows + tile_row + 8 * r;
            fits[tile_row + 8 * r] = rows[r].at == must_end[tile_row + 8 * r];
            if (work.partial != nullptr && row < w.rows) work.fits[row] = fits[tile_row + 8 * r];
        }
    }
    __syncthreads();  // all have read what sums are written over, and `fits` is there

    if (work.partial != nullptr) {
        uint4* to = work.partial + static_cast<int64_t>(blockIdx.x) * (kTokens / 8) * kTileConsumers + threadIdx.x;
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
    write_outputs(output, shared.sums, tile_m * kTokens,
                  static_cast<int>(std::min<int64_t>(kTokens, work.m - tile_m * kTokens)), tile_n * kTileRows, w.rows,
                  work.factor, four);
}

// Whether wgmma_tile_kernel is for these rows: more than the decode kernel's, places in which are 32-bit numbers.
inline bool takes_tiles(Rows rows, const OnDeviceOf& device) {
    return rows.m > kDecodeRows && rows.k <= 1 << 29 && device.has_wgmma();
}

template <int kTokens, class V, class Output>
void multiply_tiles(TileWork<V> work, int64_t parts, const Output& output, const char* what, const OnDeviceOf& device) {
    const int64_t tiles = work.tiles_m * work.tiles_n;
    launch_with_shared(wgmma_tile_kernel<V, kTokens, Output>, what, tiles * parts, kWgmmaTileThreads,
                       static_cast<int>(sizeof(typename TileShape<kTokens>::Shared)), device, work, output);
    if (parts > 1)
        launch(reduce_kernel<V, kTokens, Output>, what, tiles * (kTokens / kReducedTokens), kTileConsumers, device,
               work, output, static_cast<int>(parts));
}

template <class V, class Output>
void multiply_bitmap_tiles(const Bitmap<V>& w, const ArrangedRows<V>& x, const Output& output, const char* what,
                           const OnDeviceOf& device) {
    if (x.m == 0 || w.rows == 0) return;
    TileWork<V> work{
        w, x.data, x.factor, nullptr, nullptr, x.m, x.tiles, divide_up(w.rows, kTileRows), stretches_of<V>(w.columns),
        0, false};
    constexpr int kMaskBytes = kLaneWeights<V> / 8;
    work.aligned = w.row_bytes % kMaskBytes == 0 && reinterpret_cast<uintptr_t>(w.mask) % kMaskBytes == 0;
    // As many parts as multiprocessors are left for, of at least 8 stretches; of at most 2^17 products of int8.
    const int64_t tiles = work.tiles_m * work.tiles_n;
    int64_t parts = std::max<int64_t>(1, std::min(device.processors() / tiles, work.stretches / 8));
    if (sizeof(V) == 1) parts = std::max(parts, divide_up(w.columns, 1 << 17));
    work.stretches_a_part = divide_up(work.stretches, parts);
    parts = divide_up(work.stretches, work.stretches_a_part);
    std::optional<Tensor> partial, fits;
    if (parts > 1) {
        partial = new_tensor(x.memory, {parts, tiles, x.tokens, kTileRows}, ScalarType::Int);
        fits = new_tensor(x.memory, {w.rows}, ScalarType::Byte);
        work.partial = static_cast<uint4*>(partial->mutable_data_ptr());
        work.fits = static_cast<bool*>(fits->mutable_data_ptr());
    }
    if (x.tokens == 64) return multiply_tiles<64>(work, parts, output, what, device);
    if (x.tokens == 128) return multiply_tiles<128>(work, parts, output, what, device);
    multiply_tiles<256>(work, parts, output, what, device);
}

}  // namespace engine::cuda
