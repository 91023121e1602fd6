// x · wᵀ of a bitmap w by tensor cores, for int8 and for 16-bit floats, whose fragments are the same bytes (ptx.cuh).
// For more than 16 rows of x (up to there: bitmap_decode.cuh) where there is no wgmma (bitmap_tile.cuh): 128 rows of x
// by 64 of w by 128 B a step. Every step the block spreads its part of w into shared memory, from which ldmatrix and
// mma.m16n8 read as from a dense one: for each 64 · 128 B of w 320 issue slots a warp to spread and 4 · 8 products and
// 16 ldmatrix: about as many as the products take on the tensor cores. No dense copy is ever in device memory. The
// compressed w is read once for each 128 rows of x, mostly from L2.
#pragma once

#include <algorithm>

#include "common/round.h"
#include "cuda/bitmap.cuh"

namespace engine::cuda {

constexpr int kTileM = 128, kTileN = 64, kTileThreads = 256;
constexpr int kWarpM = 32, kWarpN = 32, kWarpsN = kTileN / kWarpN;

__device__ inline void load_tile(uint8_t* tile,  // [kTileM, 128]
                                 const Activations& x, int64_t first, int64_t span) {
    for (int i = threadIdx.x; i < kTileM * 8; i += kTileThreads) {
        const int64_t row = std::min<int64_t>(first + i / 8, x.m - 1);  // beyond: computed, and never written
        copy_16_async(tile + chunk_at(i / 8, i % 8), x.data + row * x.stride + span * 128 + i % 8 * 16);
    }
}

template <class V>
struct TileSums {
    FragmentD<Accumulator<V>> at[kWarpM / 16][kWarpN / 8];
};

// One step: what a warp multiplies of two tiles in shared memory.
template <class V>
__device__ inline void multiply_tile(TileSums<V>& sums,
                                     const uint8_t* x,  // [kTileM, 128]
                                     const uint8_t* w,  // [kTileN, 128]
                                     int warp_m, int warp_n) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        FragmentA a[kWarpM / 16];
        uint32_t b[kWarpN / 16][4];  // of two fragments: low, high, low, high
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i)
            load_matrices(a[i].at, x + chunk_at(warp_m + i * 16 + lane % 16, 2 * s + lane / 16));
#pragma unroll
        for (int i = 0; i < kWarpN / 16; ++i)
            load_matrices(b[i], w + chunk_at(warp_n + i * 16 + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
            for (int j = 0; j < kWarpN / 8; ++j)
                multiply_add(sums.at[i][j], a[i], FragmentB{{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}}, V{});
        }
    }
}

// kLong: sums are widened every kExactSpans. `poison` [m] is NaN for a row of x that is not finite, else 0; or null.
template <bool kLong, class V, class Output>
__global__ void __launch_bounds__(kTileThreads, kLong ? 1 : 2)
    tile_kernel(Bitmap<V> w, Activations x, Output output, const float* poison, int64_t tiles_m) {
    struct alignas(128) Tiles {
        uint8_t x[2][kTileM * 128], w[kTileN * 128];
    };
    ENGINE_SHARED(tiles, Tiles);
    ENGINE_SHARED(table, SpreadTable<V>);
    ENGINE_SHARED(fits, bool[kTileN]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane % 4, tile_row = threadIdx.x / 4;
    const int64_t first_m = blockIdx.x % tiles_m * kTileM, first_n = blockIdx.x / tiles_m * kTileN;
    const int64_t row = first_n + tile_row, spans = spans_of<V>(w.columns);
    const uint8_t* row_mask = w.mask + (row < w.rows ? row : 0) * w.row_bytes;
    const auto* begin = reinterpret_cast<const uint8_t*>(w.values);
    const auto* end = reinterpret_cast<const uint8_t*>(w.values + w.nnz);

    if (spans > 0) load_tile(tiles.x[0], x, first_m, 0);
    copy_commit();
    make_spread_table<V>(table);
    const int64_t bits = sum_of_quad(row < w.rows ? count_spans(w, row_mask, 0, spans, t) : 0);
    const bool readable = row < w.rows && row_fits(w, row, bits);
    if (t == 0) fits[tile_row] = readable;
    int64_t position = readable ? w.row_offsets[row] : 0;

    const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
    TileSums<V> sums{};
    Total<V> totals[kLong ? kWarpM / 16 : 1][kLong ? kWarpN / 8 : 1][4] = {};
    uint32_t next = readable ? mask_piece(w, row_mask, t * kPiece<V>) : 0;
    for (int64_t span = 0; span < spans; ++span) {
        const uint32_t mask = next;
        if (readable) next = mask_piece(w, row_mask, (span + 1) * kSpan<V> + t * kPiece<V>);
        copy_wait<0>();
        __syncthreads();  // x is there; what the step before has read may be written over
        if (span + 1 < spans) load_tile(tiles.x[(span + 1) % 2], x, first_m, span + 1);
        copy_commit();
        const uint32_t through = sum_through_quad(__popc(mask)), total = __shfl_sync(kAllLanes, through, lane | 3);
        uint32_t weights[8] = {};
        if (mask != 0) {
            const auto* from = reinterpret_cast<const uint8_t*>(w.values + position + (through - __popc(mask)));
            const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) % 4);
            spread<V>(weights, mask, GlobalWords{from - offset, begin, end}, offset, table);
        }
        position += total;
        auto* low = reinterpret_cast<uint4*>(tiles.w + chunk_at(tile_row, 2 * t));
        auto* high = reinterpret_cast<uint4*>(tiles.w + chunk_at(tile_row, 2 * t + 1));
        *low = {weights[0], weights[1], weights[2], weights[3]};
        *high = {weights[4], weights[5], weights[6], weights[7]};
        __syncthreads();
        multiply_tile<V>(sums, tiles.x[span % 2], tiles.w, warp_m, warp_n);
        if constexpr (kLong) {
            if ((span + 1) % kExactSpans != 0) continue;
            for (int i = 0; i < kWarpM / 16 * (kWarpN / 8) * 4; ++i) {
                auto& sum = sums.at[i / 16][i / 4 % 4].at[i % 4];
                totals[i / 16][i / 4 % 4][i % 4] += sum;
                sum = 0;
            }
        }
    }
    if (spans == 0) __syncthreads();  // `fits` is read by others
#pragma unroll
    for (int i = 0; i < kWarpM / 16 * (kWarpN / 8) * 4; ++i) {
        const int m = warp_m + i / 16 * 16 + lane / 4 + i / 2 % 2 * 8, n = warp_n + i / 4 % 4 * 8 + 2 * t + i % 2;
        if (first_m + m >= x.m || first_n + n >= w.rows) continue;
        Total<V> sum = sums.at[i / 16][i / 4 % 4].at[i % 4];
        if constexpr (kLong) sum += totals[i / 16][i / 4 % 4][i % 4];
        output(first_m + m, first_n + n, sum, fits[n], poison == nullptr ? 0.0f : poison[first_m + m]);
    }
}

template <class V, class Output>
void multiply_bitmap(const Bitmap<V>& w, const Activations& x, const Output& output, const float* poison,
                     const char* what, const OnDeviceOf& device) {
    if (x.m == 0 || w.rows == 0) return;
    const int64_t tiles_m = divide_up(x.m, kTileM), tiles_n = divide_up(w.rows, kTileN);
    auto kernel = tile_kernel<false, V, Output>;
    if constexpr (sizeof(V) == 1)
        if (spans_of<V>(w.columns) > kExactSpans) kernel = tile_kernel<true, V, Output>;
    launch(kernel, what, tiles_m * tiles_n, kTileThreads, device, w, x, output, poison, tiles_m);
}

}  // namespace engine::cuda
