// float(q · wᵀ) of int8 rows q and a dense int8 w, with scales and bias, by the warpgroup's product: sm_90a's.
//
// Both operands come by the tensor memory accelerator, 128 bytes of a row at a time, through a ring of stages; w is
// operand A, so that few rows of q fill the columns of a product and many fill all 256. One warp fetches; each other
// warpgroup multiplies kBlocks blocks of 64 rows of w by all kTokens rows of q, and lets a product go on while it waits
// for the next stage. A block of threads works on one tile of y after the other, and fetches for the next while it
// finishes one.
//
// Bytes from L2: (kRows + kTokens) 128 for kRows kTokens 128 products: at 128 by 256 a multiprocessor that multiplies
// at its full rate takes 48 of the 64 that it can have a clock.
#pragma once

#include "cuda/warpgroup_output.cuh"

namespace engine {

// A tile of y, of rows of w by tokens (rows of q), and who makes it: kConsumers warpgroups of kBlocks blocks of 64 rows
// each.
template <int kConsumers_, int kBlocks_, int kTokens_>
struct DenseTile {
    static constexpr int kConsumers = kConsumers_, kBlocks = kBlocks_, kTokens = kTokens_;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kRows = kConsumers * kBlocks * 64;
    static constexpr int kStageBytes = (kTokens + kRows) * 128;
    static constexpr int kStaged = 64 * 128;
    static constexpr int kStages = std::min(8, (225 * 1024 - kConsumers * 2 * kStaged) / kStageBytes);
    struct Shared {
        alignas(1024) uint8_t x[kStages][kTokens * 128];
        alignas(1024) uint8_t w[kStages][kRows * 128];
        alignas(1024) uint8_t staged[kConsumers][2][kStaged];
        alignas(16) float of_token[kConsumers][kTokens];
        Barrier full[kStages], empty[kStages];
    };
    static_assert(sizeof(Shared) <= 227 * 1024);
};

// One thread fetches.
template <class Tile>
__device__ inline void fetch_dense(typename Tile::Shared& shared, const TileMap& map_x, const TileMap& map_w,
                                   TileOrder tiles, int steps) {
    int stage = 0;
    uint32_t parity = 1;
    for (int item = blockIdx.x; item < tiles.count(); item += gridDim.x) {
        int row, token;
        tiles.at(item, row, token);
        for (int step = 0; step < steps; ++step) {
            barrier_wait(shared.empty[stage], parity);
            barrier_arrive_and_expect(shared.full[stage], sizeof(shared.x[0]) + sizeof(shared.w[0]));
            copy_tile(shared.x[stage], map_x, step * 128, token * Tile::kTokens, shared.full[stage]);
            copy_tile(shared.w[stage], map_w, step * 128, row * Tile::kRows, shared.full[stage]);
            if (++stage == Tile::kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

template <class Tile, class Y>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    int8_warpgroup_kernel(const __grid_constant__ TileMap map_x, const __grid_constant__ TileMap map_w, Int8Terms terms,
                          Y* y,           // [m, n]
                          AnyFloat bias,  // [n], or null
                          int64_t m, int64_t n, int steps, TileOrder tiles) {
    constexpr int kBlocks = Tile::kBlocks, kTokens = Tile::kTokens;
    ENGINE_DYNAMIC_SHARED(shared, typename Tile::Shared);
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kStages; ++i) {
            barrier_init(shared.full[i], 1);
            barrier_init(shared.empty[i], Tile::kConsumers * kWarpgroup / kWarp);
        }
        barriers_ready();
    }
    __syncthreads();
    if (warpgroup == 0) {
        if constexpr (Tile::kConsumers > 1) give_registers<40>();
        if (threadIdx.x == 0) fetch_dense<Tile>(shared, map_x, map_w, tiles, steps);
        return;
    }
    if constexpr (Tile::kConsumers > 1) take_registers<232>();
    const int thread = threadIdx.x % kWarpgroup, first_row = (warpgroup - 1) * kBlocks * 64;
    int stage = 0;
    uint32_t parity = 0;
    for (int item = blockIdx.x; item < tiles.count(); item += gridDim.x) {
        int row, token;
        tiles.at(item, row, token);
        const int64_t first_m = static_cast<int64_t>(token) * kTokens;
        const int64_t first_n = static_cast<int64_t>(row) * Tile::kRows + first_row;
        const OutputTerms<kBlocks, kTokens> of(terms, bias, first_m, first_n, m, n);
        WarpgroupD<int32_t, kTokens> sums[kBlocks] = {};
        int before = 0;
        for (int step = 0; step < steps; ++step) {
            barrier_wait(shared.full[stage], parity);
            const uint64_t tile_x = shared_tile<128>(shared.x[stage]);
            const uint64_t tile_w = shared_tile<128>(shared.w[stage] + first_row * 128);
            wgmma_begin();
#pragma unroll
            for (int part = 0; part < 4; ++part) {
#pragma unroll
                for (int i = 0; i < kBlocks; ++i)
                    wgmma(sums[i], advance(tile_w, i * 64 * 128 + part * 32), advance(tile_x, part * 32), int8_t{});
            }
            wgmma_commit();
            wgmma_wait<1>();  // what the step before has read may be written over
            if (step > 0) release_stage(shared.empty[before]);
            before = stage;
            if (++stage == Tile::kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        release_stage(shared.empty[before]);
        float* of_token = shared.of_token[warpgroup - 1];
#pragma unroll
        for (int i = 0; i * kWarpgroup < kTokens; ++i)
            if (i * kWarpgroup + thread < kTokens) of_token[i * kWarpgroup + thread] = of.token[i];
        warpgroup_barrier();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            write_tile<Y, Int8Terms>(sums[i], of.out[i], of.bias[i], of_token, shared.staged[warpgroup - 1], y, first_m,
                                     first_n + 64 * i, m, n);
            warpgroup_barrier();  // what was staged may be written over
        }
    }
}

}  // namespace engine
