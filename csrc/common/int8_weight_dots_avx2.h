// The kernel of common/int8_weight_dots.h for AVX2.
#pragma once

#include "common/floats.h"
#include "common/int8_weight_dots.h"
#if ENGINE_X86
#include <immintrin.h>

namespace engine {

struct WeightDotsAvx2 {
    using Element = float;
    static constexpr int64_t kMostRows = 4, kMostDepth = 2048;
    static constexpr int kLanes = 8;

    template <int M>
    static constexpr int kColumns = M <= 2 ? 4 : 3;
    template <int count>
    static constexpr int64_t kSums = count;

    template <int M, int R>
    ENGINE_AVX2 ENGINE_INLINE static void step(const int8_t* w, int64_t w_stride, const float* x, int64_t x_stride,
                                               __m256 (&acc)[M][R]) {
        __m256 weights[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + r * w_stride));
            weights[r] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const __m256 activations = _mm256_load_ps(x + m * x_stride);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[m][r] = _mm256_fmadd_ps(weights[r], activations, acc[m][r]);
        }
    }

    template <int M, int R>
    ENGINE_AVX2 __attribute__((noinline)) static void tile(const int8_t* w,  // [R, w_stride], kc of each row
                                                           int64_t w_stride, int64_t kc,
                                                           const float* x,  // [M, x_stride]
                                                           int64_t x_stride,
                                                           const int8_t* ahead,  // [R, w_stride]
                                                           bool add,
                                                           float* sums) {  // [M, R]
        // Sums of their own, so that additions need not wait. As many for every R, which threads cut differently.
        constexpr int U = M == 1 ? 2 : 1;
        __m256 acc[U][M][R];
#pragma GCC unroll 12
        for (int i = 0; i < U * M * R; ++i) acc[i / (M * R)][i / R % M][i % R] = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 32 <= kc; i += 32) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (i % 64 == 0) __builtin_prefetch(ahead + r * w_stride + i);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                step<M, R>(w + i + j * kLanes, w_stride, x + i + j * kLanes, x_stride, acc[j % U]);
            }
        }
        for (; i + kLanes <= kc; i += kLanes) step<M, R>(w + i, w_stride, x + i, x_stride, acc[0]);
        if (i < kc) {
            int8_t tail[R][kLanes] = {};
            for (int r = 0; r < R; ++r) std::copy_n(w + r * w_stride + i, kc - i, tail[r]);
            step<M, R>(tail[0], kLanes, x + i, x_stride, acc[0]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int u = 1; u < U; ++u) acc[0][m][r] = _mm256_add_ps(acc[0][m][r], acc[u][m][r]);
                const float sum = sum_8_avx2(acc[0][m][r]);
                sums[m * R + r] = add ? sums[m * R + r] + sum : sum;
            }
        }
    }
};

}  // namespace engine
#endif
