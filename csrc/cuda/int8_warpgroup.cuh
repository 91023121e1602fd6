// float(q · wᵀ) of int8 rows q and a dense int8 w, with scales and bias, by the warpgroup's product: sm_90a's.
//
// Both operands come by the tensor memory accelerator, 128 bytes of a row at a time, through a ring of stages; w is
// operand A, so that few rows of q fill the columns of a product and many fill all 256. One warp fetches; each other
// warpgroup multiplies 64 rows of w by all kTokens rows of q, and lets a product go on while it waits for the next
// stage. A block of threads works on one tile of y after the other, and fetches for the next while it finishes one.
//
// Bytes from L2: (kRows + kTokens) 128 for kRows kTokens 128 products: at 128 by 256 a multiprocessor that multiplies
// at its full rate takes 48 of the 64 that it can have a clock.
#pragma once

#include "cuda/warpgroup_output.cuh"

namespace engine::cuda {

// A tile of y, of rows of w by tokens (rows of q), and who makes it: kConsumers warpgroups of 64 rows each.
template <int kConsumers_, int kTokens_>
struct DenseTile {
    static constexpr int kConsumers = kConsumers_, kTokens = kTokens_;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kRows = kConsumers * 64;
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
    RingPlace<Tile::kStages> at{0, 1};
    for (int item = blockIdx.x; item < tiles.count(); item += gridDim.x) {
        int row, token;
        tiles.at(item, row, token);
        for (int step = 0; step < steps; ++step) {
            Barrier& full = shared.full[at.stage];
            barrier_wait(shared.empty[at.stage], at.parity);
            barrier_arrive_and_expect(full, sizeof(shared.x[0]) + sizeof(shared.w[0]));
            copy_tile(shared.x[at.stage], map_x, step * 128, token * Tile::kTokens, full);
            copy_tile(shared.w[at.stage], map_w, step * 128, row * Tile::kRows, full);
            at.next();
        }
    }
}

template <class Tile, class Y>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    int8_warpgroup_kernel(const __grid_constant__ TileMap map_x, const __grid_constant__ TileMap map_w,
                          Int8Output output,  // y is of Y
                          int64_t m, int steps, TileOrder tiles) {
    constexpr int kTokens = Tile::kTokens;
    ENGINE_DYNAMIC_SHARED(shared, typename Tile::Shared);
    const int warpgroup = threadIdx.x / kWarpgroup;
    begin_ring<Tile>(shared, 1);
    if (warpgroup == 0) {
        if constexpr (Tile::kConsumers > 1) give_registers<40>();
        if (threadIdx.x == 0) fetch_dense<Tile>(shared, map_x, map_w, tiles, steps);
        return;
    }
    if constexpr (Tile::kConsumers > 1) take_registers<232>();
    const int consumer = warpgroup - 1, first_row = consumer * 64;
    RingPlace<Tile::kStages> at{0, 0};
    for (int item = blockIdx.x; item < tiles.count(); item += gridDim.x) {
        int row, token;
        tiles.at(item, row, token);
        const int64_t first_m = static_cast<int64_t>(token) * kTokens;
        const int64_t first_n = static_cast<int64_t>(row) * Tile::kRows + first_row;
        const OutputTerms<kTokens> of(output, nullptr, first_m, first_n, m);
        WarpgroupD<int32_t, kTokens> sums{};
        multiply_steps<Tile>(shared, at, steps, [&](int stage) {
            const uint64_t tile_x = shared_tile<128>(shared.x[stage]);
            const uint64_t tile_w = shared_tile<128>(shared.w[stage] + first_row * 128);
            wgmma_begin();
#pragma unroll
            for (int part = 0; part < 4; ++part)
                wgmma(sums, advance(tile_w, part * 32), advance(tile_x, part * 32), int8_t{});
        });
        finish_tile<Y>(shared, consumer, sums, of, output, first_m, first_n, m);
    }
}

}  // namespace engine::cuda
