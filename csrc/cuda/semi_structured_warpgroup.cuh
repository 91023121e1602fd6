// x · wᵀ of a 2:4 sparse w by the warpgroup's sparse product, wgmma.sp: sm_90a's, for more than a few rows of x.
//
// w is operand A and comes as it is: its values by the tensor memory accelerator (TMA), its metadata by cp.async and
// through registers. x is operand B. One warp fetches, into a ring of stages as many as shared memory holds, of each
// step 128 bytes of a row of x and 64 bytes of values; two warpgroups multiply, each 64 rows of w by all kTokens rows
// of x. A block of threads works on one tile of y after the other, and fetches for the next while it finishes one.
//
// A step of 128 rows of w by 256 of x takes the tensor cores 512 clocks and brings 42 KB (int8), of which 10 are w's.
#pragma once

#include "common/round.h"
#include "cuda/semi_structured.cuh"
#include "cuda/warpgroup_output.cuh"

namespace engine::cuda {

// A tile of y, of rows of w by tokens (rows of x), and who makes it: kConsumers warpgroups of 64 rows each.
template <class V_, int kConsumers_, int kTokens_>
struct SemiTile {
    using V = V_;
    static constexpr int kConsumers = kConsumers_, kTokens = kTokens_;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kRows = kConsumers * 64;
    static constexpr int kMetadata = kStepMetadata<V>;
    static constexpr int kStageBytes = kTokens * 128 + kRows * (64 + kMetadata);
    static constexpr int kChunk = 64;  // tokens of y that a warpgroup turns at once
    static constexpr int kStages = std::min(12, (225 * 1024 - kConsumers * 2 * kChunk * 128) / kStageBytes);
    struct Shared {
        alignas(1024) uint8_t x[kStages][kTokens * 128];
        alignas(1024) uint8_t w[kStages][kRows * 64];
        alignas(1024) uint8_t metadata[kStages][kRows * kMetadata];
        alignas(1024) uint8_t staged[kConsumers][2][kChunk * 128];
        alignas(16) float of_token[kConsumers][kTokens];
        Barrier full[kStages], empty[kStages];
    };
    static_assert(sizeof(Shared) <= 227 * 1024);
};

// The warp that fetches.
template <class Tile, class V>
__device__ inline void fetch_semi_structured(typename Tile::Shared& shared, const SemiStructured<V>& w,
                                             const TileMap& map_x, const TileMap& map_w, TileOrder tiles, int steps) {
    constexpr int kEach = Tile::kRows / kWarp;  // rows of metadata that a lane copies
    const int lane = threadIdx.x % kWarp;
    RingPlace<Tile::kStages> at{0, 1};
    for (int item = blockIdx.x; item < tiles.count(); item += gridDim.x) {
        int row, token;
        tiles.at(item, row, token);
        const uint8_t* metadata[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            metadata[i] =
                w.metadata + std::min<int64_t>(row * Tile::kRows + i * kWarp + lane, w.rows - 1) * w.row_bytes;
        for (int step = 0; step < steps; ++step) {
            Barrier& full = shared.full[at.stage];
            barrier_wait(shared.empty[at.stage], at.parity);
            if (lane == 0) {
                barrier_arrive_and_expect(full, sizeof(shared.x[0]) + sizeof(shared.w[0]));
                copy_tile(shared.x[at.stage], map_x, step * 128, token * Tile::kTokens, full);
                copy_tile(shared.w[at.stage], map_w, step * 64, row * Tile::kRows, full);
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                uint8_t* to = shared.metadata[at.stage] + (i * kWarp + lane) * Tile::kMetadata;
                if constexpr (sizeof(V) == 1) {
                    copy_16_async(to, metadata[i]);
                } else {
                    copy_8_async(to, metadata[i]);
                }
                metadata[i] += Tile::kMetadata;
            }
            barrier_arrive_after_copies(full);
            at.next();
        }
    }
}

template <class Tile, class Y, class V, class Output>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    semi_structured_warpgroup_kernel(SemiStructured<V> w, const __grid_constant__ TileMap map_x,
                                     const __grid_constant__ TileMap map_w,
                                     Output output,        // y is of Y
                                     const float* poison,  // [m], or null
                                     int64_t m, TileOrder tiles) {
    constexpr int kTokens = Tile::kTokens;
    ENGINE_DYNAMIC_SHARED(shared, typename Tile::Shared);
    const int steps = static_cast<int>(w.columns / kStepWeights<V>), warpgroup = threadIdx.x / kWarpgroup;
    begin_ring<Tile>(shared, 1 + kWarp);
    if (warpgroup == 0) {
        if constexpr (Tile::kConsumers > 1) give_registers<40>();
        if (threadIdx.x < kWarp) fetch_semi_structured<Tile>(shared, w, map_x, map_w, tiles, steps);
        return;
    }
    if constexpr (Tile::kConsumers > 1) take_registers<232>();
    const int consumer = warpgroup - 1, first_row = consumer * 64;
    const int warp_row = first_row + threadIdx.x % kWarpgroup / kWarp * 16;
    RingPlace<Tile::kStages> at{0, 0};
    for (int item = blockIdx.x; item < tiles.count(); item += gridDim.x) {
        int row, token;
        tiles.at(item, row, token);
        const int64_t first_m = static_cast<int64_t>(token) * kTokens;
        const int64_t first_n = static_cast<int64_t>(row) * Tile::kRows + first_row;
        const OutputTerms<kTokens> of(output, poison, first_m, first_n, m);
        WarpgroupD<Accumulator<V>, kTokens> sums{};
        multiply_steps<Tile>(shared, at, steps, [&](int stage) {
            const uint64_t tile_x = shared_tile<128>(shared.x[stage]);
            const uint64_t tile_w = shared_tile<64>(shared.w[stage] + first_row * 64);
            const uint2 metadata = staged_metadata<V>(shared.metadata[stage], warp_row);
            wgmma_begin();
            wgmma_sparse(sums, tile_w, metadata.x, tile_x, V{});
            wgmma_sparse(sums, advance(tile_w, 32), metadata.y, advance(tile_x, 64), V{});
        });
        finish_tile<Y>(shared, consumer, sums, of, output, first_m, first_n, m);
    }
}

// The host's part.

template <class Tile, class Y, class V, class Output>
void launch_semi_structured_warpgroup(const SemiStructured<V>& w, const Activations& x, const Output& output,
                                      const float* poison, const char* what, const OnDeviceOf& device) {
    constexpr int kTokens = Tile::kTokens, kRows = Tile::kRows;
    const TileOrder tiles{static_cast<int>(divide_up(w.rows, kRows)), static_cast<int>(divide_up(x.m, kTokens)),
                          2048 / kRows};
    const auto map_x = tile_map(x.data, x.m, x.stride, x.stride, kTokens, 128, what);
    const int64_t row_size = w.row_values * static_cast<int64_t>(sizeof(V));
    const auto map_w = tile_map(w.values, w.rows, row_size, row_size, Tile::kRows, 64, what);
    launch_with_shared(semi_structured_warpgroup_kernel<Tile, Y, V, Output>, what,
                       std::min<int64_t>(device.processors(), tiles.count()), Tile::kThreads,
                       sizeof(typename Tile::Shared), device, w, map_x, map_w, output, poison, x.m, tiles);
}

// How many rows of x a tile has: those with which the waves of tiles, each as long as its copies take, end first.
template <class V>
int semi_tile_tokens(int64_t rows, int64_t m, int processors) {
    constexpr int kRows = 128;
    int best = 0;
    int64_t least = 0;
    for (const int tokens : {256, 128, 64}) {
        const int64_t tiles = divide_up(rows, kRows) * divide_up(m, tokens);
        const int64_t step = kRows * (64 + kStepMetadata<V>)+tokens * 128;
        const int64_t bytes = divide_up(tiles, processors) * step;
        if (best == 0 || bytes < least) {
            best = tokens;
            least = bytes;
        }
    }
    return best;
}

template <class V, class Output>
void multiply_semi_structured(const SemiStructured<V>& w, const Activations& x, const Output& output,
                              const float* poison, const char* what, const OnDeviceOf& device) {
    if (x.m == 0 || w.rows == 0) return;
    const bool exact = sizeof(V) > 1 || w.columns <= kExactSpans * kStepWeights<V>;
    const bool countable = std::max(w.rows, x.m) < 1 << 30 && (w.rows / 64 + 1) * (x.m / 64 + 1) < 1 << 30;
    if (!exact || !countable || !has_whole_steps(w) || !device.has_wgmma())
        return multiply_semi_structured_by_warps(w, x, output, poison, what, device);
    const auto multiply = [&](auto type) {
        using Y = decltype(type);
        const auto by = [&](auto tile) {
            launch_semi_structured_warpgroup<decltype(tile), Y>(w, x, output, poison, what, device);
        };
        if (x.m <= 16) return by(SemiTile<V, 1, 16>{});
        const int tokens = semi_tile_tokens<V>(w.rows, x.m, device.processors());
        if (tokens == 64) return by(SemiTile<V, 2, 64>{});
        if (tokens == 128) return by(SemiTile<V, 2, 128>{});
        by(SemiTile<V, 2, 256>{});
    };
    if constexpr (sizeof(V) == 2) {
        multiply(V{});
    } else {
        dispatch_float(output.y.dtype, what, multiply);
    }
}

}  // namespace engine::cuda
