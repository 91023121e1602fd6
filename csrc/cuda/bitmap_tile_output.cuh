// What bitmap_tile.cuh does with its sums: outputs, or parts of sums that reduce_kernel adds.
#pragma once

#include "cuda/bitmap_stretch.cuh"

namespace engine::cuda {

constexpr int kTileRows = 128, kTileWarps = 8, kTileConsumers = kTileWarps * kWarp;
constexpr int kStagedRow = kTileRows + 4;  // floats: the lanes that write a fragment are in 32 banks

// What a tile_kernel is to do. Block i has tile_m = i % tiles_m, then the tile of w, then the part.
template <class V>
struct TileWork {
    Bitmap<V> w;
    const uint8_t* x;     // [tiles_m, steps, kTokens, 128]
    const float* factor;  // [m]
    uint4* partial;       // [parts, tiles, kTokens / 8, kTileConsumers], or null: there is one part
    bool* fits;           // [rows], where there are parts
    int64_t m, tiles_m, tiles_n, stretches, stretches_a_part;
    bool aligned;  // lanes' masks are
};

// Writes four outputs one after another.
__device__ inline void store_four(const AnyFloat& y, int64_t at, const float (&values)[4]) {
    if (y.dtype == ScalarType::Float) {
        *reinterpret_cast<Elements<4, float>*>(static_cast<float*>(y.at) +
                                               at) = {{values[0], values[1], values[2], values[3]}};
    } else if (y.dtype == ScalarType::Half) {
        Elements<4, Half> four;
        for (int i = 0; i < 4; ++i) four.at[i] = from_float<Half>(values[i]);
        *reinterpret_cast<Elements<4, Half>*>(static_cast<Half*>(y.at) + at) = four;
    } else {
        Elements<4, BFloat16> four;
        for (int i = 0; i < 4; ++i) four.at[i] = from_float<BFloat16>(values[i]);
        *reinterpret_cast<Elements<4, BFloat16>*>(static_cast<BFloat16*>(y.at) + at) = four;
    }
}

// Writes `tokens` rows of y from sums in shared memory: kTileWarps warps, each lane four columns.
template <class Output>
__device__ inline void write_outputs(const Output& output, const float (*sums)[kStagedRow], int64_t first_token,
                                     int tokens, int64_t first_row, int64_t rows, const float* factor,
                                     const bool (&row_fits)[4]) {
    const int lane = threadIdx.x % kWarp;
    const int64_t row = first_row + 4 * lane;
    float of_out[4], bias[4] = {};
    for (int i = 0; i < 4; ++i) {
        of_out[i] = row + i < rows ? output.of_out(row + i) : 0.0f;
        if (output.bias.at != nullptr && row + i < rows) bias[i] = output.bias.load(row + i);
    }
    for (int token = threadIdx.x / kWarp; token < tokens; token += kTileWarps) {
        const float of_token = factor[first_token + token];
        const auto four = *reinterpret_cast<const Elements<4, float>*>(&sums[token][4 * lane]);
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[i] = Output::finish(four.at[i], of_token, of_out[i]);
            if (output.bias.at != nullptr) values[i] = values[i] + bias[i];
            if (!row_fits[i]) values[i] = std::numeric_limits<float>::quiet_NaN();
        }
        const int64_t at = (first_token + token) * output.n + row;
        if (output.n % 4 == 0) {
            if (row < rows) store_four(output.y, at, values);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (row + i < rows) output.y.store(at + i, values[i]);
        }
    }
}

constexpr int kReducedTokens = 64;

// Adds the parts of kReducedTokens tokens of a tile.
template <class V, int kTokens, class Output>
__global__ void __launch_bounds__(kTileConsumers, 4) reduce_kernel(TileWork<V> work, Output output, int parts) {
    ENGINE_SHARED(sums, float[kReducedTokens][kStagedRow]);
    constexpr int kChunks = kTokens / kReducedTokens;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t tile = blockIdx.x / kChunks, tiles = work.tiles_m * work.tiles_n;
    const int64_t first_token = tile % work.tiles_m * kTokens + blockIdx.x % kChunks * kReducedTokens;
    const int64_t first_row = tile / work.tiles_m * kTileRows;
    if (first_token >= work.m) return;
#pragma unroll 1
    for (int j = 0; j < kReducedTokens / 8; ++j) {
        const int64_t group = blockIdx.x % kChunks * (kReducedTokens / 8) + j;
        Total<V> total[4] = {};
        for (int part = 0; part < parts; ++part) {
            const uint4* from = work.partial + ((part * tiles + tile) * (kTokens / 8) + group) * kTileConsumers;
            const auto four = std::bit_cast<Elements<4, Accumulator<V>>>(from[threadIdx.x]);
            for (int i = 0; i < 4; ++i) total[i] += four.at[i];
        }
        for (int i = 0; i < 4; ++i)
            sums[8 * j + 2 * t + i % 2][warp * 16 + g + i / 2 * 8] = static_cast<float>(total[i]);
    }
    __syncthreads();
    bool fits[4];
    for (int i = 0; i < 4; ++i) fits[i] = first_row + 4 * lane + i < work.w.rows && work.fits[first_row + 4 * lane + i];
    write_outputs(output, sums, first_token, static_cast<int>(std::min<int64_t>(kReducedTokens, work.m - first_token)),
                  first_row, work.w.rows, work.factor, fits);
}

}  // namespace engine::cuda
