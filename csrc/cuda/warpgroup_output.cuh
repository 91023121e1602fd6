// What the products by warpgroups share: the order of their tiles, the ring of stages through which w and x come, and
// how a warpgroup's sums become elements of y.
#pragma once

#include <algorithm>

#include "cuda/product.cuh"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace engine::cuda {

// Where the tiles of y lie: rows of tiles go in groups, column by column, so that what is multiplied at a time comes
// from the L2 cache.
struct TileOrder {
    int rows, tokens, group;  // tiles of w, tiles of x
    ENGINE_INLINE int count() const { return rows * tokens; }
    __device__ void at(int item, int& row, int& token) const {
        const int first = item / (group * tokens) * group, within = item % (group * tokens);
        const int high = std::min(group, rows - first);
        row = first + within % high;
        token = within / high;
    }
};

// The stage of a ring that is next, and the parity of the phase that is waited for there: at first 0, but 1 for who
// fetches, as every stage is empty.
template <int kStages>
struct RingPlace {
    int stage;
    uint32_t parity;
    __device__ void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// All threads of a block call. `copies` arrivals make a stage full, one of each consumer's warp empty.
template <class Tile>
__device__ inline void begin_ring(typename Tile::Shared& shared, int copies) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kStages; ++i) {
            barrier_init(shared.full[i], copies);
            barrier_init(shared.empty[i], Tile::kConsumers * kWarpgroup / kWarp);
        }
        barriers_ready();
    }
    __syncthreads();
}

// A consumer's warp: the stage may be written over.
__device__ inline void release_stage(Barrier& empty) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// A consumer's steps of a tile: multiply(stage) begins the products of one, which go on while the next is waited for.
template <class Tile, class Multiply>
__device__ inline void multiply_steps(typename Tile::Shared& shared, RingPlace<Tile::kStages>& at, int steps,
                                      const Multiply& multiply) {
    int before = 0;
    for (int step = 0; step < steps; ++step) {
        barrier_wait(shared.full[at.stage], at.parity);
        multiply(at.stage);
        wgmma_commit();
        wgmma_wait<1>();  // what the step before has read may be written over
        if (step > 0) release_stage(shared.empty[before]);
        before = at.stage;
        at.next();
    }
    wgmma_wait<0>();
    release_stage(shared.empty[before]);
}

// What a thread needs to finish its part of a tile of y: loaded before the products, to be there after them.
template <int kTokens>
struct OutputTerms {
    float token[(kTokens + kWarpgroup - 1) / kWarpgroup], out[2], bias[2];

    template <class Output>
    __device__ OutputTerms(const Output& output, const float* poison, int64_t first_m, int64_t first_n, int64_t m) {
        const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
        for (int i = 0; i * kWarpgroup < kTokens; ++i)
            token[i] = output.of_token(std::min(first_m + i * kWarpgroup + thread, m - 1), poison);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t at =
                std::min<int64_t>(first_n + thread / kWarp * 16 + thread % kWarp / 4 + i * 8, output.n - 1);
            out[i] = output.of_out(at);
            bias[i] = output.bias.at != nullptr ? output.bias.load(at) : -0.0f;  // which adds nothing, not even a sign
        }
    }
};

// A warpgroup's 64 rows of w by kTokens of x become elements of y. 16-bit ones are turned in shared memory, as y has
// the rows of w side by side.
template <class Y, class Output, class Acc, int kTokens>
__device__ inline void write_tile(const WarpgroupD<Acc, kTokens>& sums, const float (&of_out)[2],
                                  const float (&bias)[2],
                                  const float* of_token,  // [kTokens]
                                  uint8_t (&staged)[2][64 * 128], Y* y, int64_t first_m, int64_t first_n, int64_t m,
                                  int64_t n) {
    const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % kWarp, warp = thread / kWarp, t = lane % 4;
    const int tokens = static_cast<int>(std::min<int64_t>(m - first_m, kTokens));
    const auto value = [&](int i, float token) {
        return Output::finish(static_cast<float>(sums.at[i]), token, of_out[i / 2 % 2]) + bias[i / 2 % 2];
    };
    const auto pair_of = [&](int j) { return *reinterpret_cast<const float2*>(of_token + 8 * j + 2 * t); };
    if constexpr (sizeof(Y) == 4 || kTokens < 64) {
        const int64_t out = first_n + warp * 16 + lane / 4;
        Y* to = y + (first_m + 2 * t) * n + out;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            const float2 of = pair_of(j);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (8 * j + 2 * t + i % 2 < tokens && out + i / 2 * 8 < n)
                    to[i % 2 * n + i / 2 * 8] = from_float<Y>(value(4 * j + i, i % 2 == 0 ? of.x : of.y));
            to += 8 * n;
        }
    } else {
        const int64_t out = first_n + thread % 8 * 8;  // what this thread writes: 8 elements of every 16th token
        const bool vectors = n % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
        const int rest = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(8, n - out)));
        Y* to = y + (first_m + thread / 8) * n + out;
#pragma unroll
        for (int chunk = 0; chunk < kTokens / 64; ++chunk) {
            uint8_t* turned = staged[chunk % 2];
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const int at = 8 * chunk + j;
                const float2 low = pair_of(at), high = pair_of(at + 1);
                const uint32_t pairs[4] = {pack_16(value(4 * at, low.x), value(4 * at + 1, low.y), Y{}),
                                           pack_16(value(4 * at + 2, low.x), value(4 * at + 3, low.y), Y{}),
                                           pack_16(value(4 * at + 4, high.x), value(4 * at + 5, high.y), Y{}),
                                           pack_16(value(4 * at + 6, high.x), value(4 * at + 7, high.y), Y{})};
                const int token = (j + lane / 16) * 8 + lane % 8;
                store_matrices_transposed(turned + chunk_at(token, 2 * warp + lane / 8 % 2), pairs);
            }
            warpgroup_barrier();  // and so the chunk before the last has been written out, too
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = thread / 8 + 16 * i;
                if (64 * chunk + token < tokens && rest > 0) {
                    const uint8_t* from = turned + chunk_at(token, thread % 8);
                    if (vectors) {
                        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
                    } else {
#pragma unroll 1
                        for (int each = 0; each < rest; ++each) to[each] = reinterpret_cast<const Y*>(from)[each];
                    }
                }
                to += 16 * n;
            }
        }
    }
}

// A consumer writes its tile of y.
template <class Y, class Output, class Shared, class Acc, int kTokens>
__device__ inline void finish_tile(Shared& shared, int consumer, const WarpgroupD<Acc, kTokens>& sums,
                                   const OutputTerms<kTokens>& of, const Output& output, int64_t first_m,
                                   int64_t first_n, int64_t m) {
    const int thread = threadIdx.x % kWarpgroup;
    float* of_token = shared.of_token[consumer];
#pragma unroll
    for (int i = 0; i * kWarpgroup < kTokens; ++i)
        if (i * kWarpgroup + thread < kTokens) of_token[i * kWarpgroup + thread] = of.token[i];
    warpgroup_barrier();
    write_tile<Y, Output>(sums, of.out, of.bias, of_token, shared.staged[consumer], static_cast<Y*>(output.y.at),
                          first_m, first_n, m, output.n);
    warpgroup_barrier();  // what was staged may be written over
}

}  // namespace engine::cuda
