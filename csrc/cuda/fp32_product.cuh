// x · wᵀ in fp32 of a compressed w: for pairs of dtypes whose products tensor cores do not make exactly.
//
// A block spreads 64 rows by 32 weights of w at a time into shared memory and multiplies and adds in fp32. Its bound is
// the fp32 units' rate, 1 / 15 of the tensor cores', but for up to 8 rows of x the memory's: 4 B a kept weight. A
// thread has one row of w and 2 or 8 of x: 3 loads from shared memory for 8 products.
#pragma once

#include "common/round.h"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {

constexpr int kFp32Threads = 256, kFp32N = 64, kFp32Depth = 32;

// `Source` is w. Its Reader, made by all threads of a quad for a row, has fits(), and next(k, out), which gives weights
// [k, k + 8) and moves on by 32; k is 8 t more than a multiple of 32. `x` is [m, stride] with zeros up to a multiple of
// 32; `poison` [m] is NaN for a row that is not finite, else 0.
template <int kM, class Source>
__global__ void __launch_bounds__(kFp32Threads, 4)
    fp32_kernel(Source w, const float* x, int64_t m, int64_t stride, FloatOutput output, const float* poison,
                int64_t tiles_m) {
    constexpr int kEach = kM / 4;  // of x, for a thread
    struct alignas(16) Tiles {
        float x[kFp32Depth][kM], w[kFp32N][kFp32Depth + 1];
    };
    ENGINE_SHARED(tiles, Tiles);
    ENGINE_SHARED(fits, bool[kFp32N]);
    const int t = threadIdx.x % 4, tile_row = threadIdx.x / 4;
    const int n = threadIdx.x % kFp32N, m_first = threadIdx.x / kFp32N * kEach;
    const int64_t first_m = blockIdx.x % tiles_m * kM, first_n = blockIdx.x / tiles_m * kFp32N;
    typename Source::Reader reader(w, first_n + tile_row);
    if (t == 0) fits[tile_row] = reader.fits();
    float total[kEach] = {};
    for (int64_t k = 0; k < w.columns; k += kFp32Depth) {
        for (int i = threadIdx.x; i < kM * kFp32Depth; i += kFp32Threads) {
            const int64_t token = first_m + i / kFp32Depth;
            tiles.x[i % kFp32Depth][i / kFp32Depth] = token < m ? x[token * stride + k + i % kFp32Depth] : 0.0f;
        }
        float weights[8];
        reader.next(k + 8 * t, weights);
#pragma unroll
        for (int i = 0; i < 8; ++i) tiles.w[tile_row][t * 8 + i] = weights[i];
        __syncthreads();
        float sum[kEach] = {};  // of this stretch alone, as errors grow with the length of a sum
#pragma unroll 8
        for (int i = 0; i < kFp32Depth; ++i) {
            const float weight = tiles.w[n][i];
#pragma unroll
            for (int j = 0; j < kEach; ++j) sum[j] = fmaf(tiles.x[i][m_first + j], weight, sum[j]);
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) total[j] += sum[j];
        __syncthreads();
    }
    if (w.columns == 0) __syncthreads();  // `fits` is read by others
    for (int j = 0; j < kEach; ++j) {
        const int64_t token = first_m + m_first + j;
        if (token < m && first_n + n < w.rows) output(token, first_n + n, total[j], fits[n], poison[token]);
    }
}

template <class Source>
void multiply_fp32(const Tensor& x, const Source& w, Rows rows, const FloatOutput& output, const char* what,
                   const OnDeviceOf& device) {
    if (rows.m == 0 || w.rows == 0) return;
    dispatch_float(x.scalar_type(), what, [&](auto zero) {
        const PreparedRows<float> in(x, zero, rows, kFp32Depth, true, what, device);
        const int64_t tile_m = rows.m <= 8 ? 8 : 32, tiles_m = divide_up(rows.m, tile_m);
        launch(rows.m <= 8 ? fp32_kernel<8, Source> : fp32_kernel<32, Source>, what,
               tiles_m * divide_up(w.rows, kFp32N), kFp32Threads, device, w, in.x, rows.m, in.stride, output, in.poison,
               tiles_m);
    });
}

}  // namespace engine::cuda
