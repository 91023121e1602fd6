// The innermost loops of common/spmm.h: some weight rows' kept values by a strip of activations. A kernel is a struct:
//
//   kWidth, kUnit  rows of activations in a strip at most, and what they are a multiple of
//   chain(width)   how much of K may be added up before sums are to be added to a total
//   tile(...)      rows × width sums; of what is kept it reads row[r], as that of KeptRows
#pragma once

#include "common/spmm.h"

namespace engine {

struct SpmmPortable {
    static constexpr int64_t kWidth = 12, kUnit = 4;  // sums of 16 would not stay in SSE2's registers
    // How much of K, of which at most 60 % are kept, may be added up before the error is larger than MKL's for few
    // outputs. Half of what the FMA kernels allow, as products are rounded here before they are added.
    static constexpr int64_t chain(int64_t /*width*/) { return 48 * kChains; }
    static constexpr int64_t kChains = 2;

    template <int W, class Kept>
    static void tile_of(const Kept& kept, int64_t rows, const float* strip, bool add, float* sums) {
        for (int64_t r = 0; r < rows; ++r) {
            const auto [values, columns, count] = kept.row[r];
            float acc[kChains][W] = {};
            const auto product = [&](int64_t i, float* to) {
                const float* x = strip + columns[i] * W;
                for (int m = 0; m < W; ++m) to[m] += values[i] * x[m];
            };
            int64_t i = 0;
            for (; i + kChains <= count; i += kChains) {
                for (int c = 0; c < kChains; ++c) product(i + c, acc[c]);
            }
            if (i < count) product(i, acc[0]);
            for (int m = 0; m < W; ++m) {
                const float sum = acc[0][m] + acc[1][m];
                sums[r * W + m] = add ? sums[r * W + m] + sum : sum;
            }
        }
    }

    template <class Kept>
    static void tile(const Kept& kept, int64_t rows,
                     const float* strip,  // [kc, width]
                     int64_t width, bool add,
                     float* sums) {  // [rows, width]
        if (width == 4) return tile_of<4>(kept, rows, strip, add, sums);
        if (width == 8) return tile_of<8>(kept, rows, strip, add, sums);
        tile_of<kWidth>(kept, rows, strip, add, sums);
    }
};

#if ENGINE_X86
ENGINE_AVX2 ENGINE_INLINE void add_up_8_avx2(float* total, __m256 sum, bool add) {
    _mm256_store_ps(total, add ? _mm256_add_ps(_mm256_load_ps(total), sum) : sum);
}
ENGINE_AVX2 ENGINE_INLINE void add_up_8_avx2(int32_t* total, __m256 sum, bool add) {
    auto* at = reinterpret_cast<__m256i*>(total);
    const __m256i part = _mm256_cvtps_epi32(sum);
    _mm256_store_si256(at, add ? _mm256_add_epi32(_mm256_load_si256(at), part) : part);
}

struct SpmmAvx2 {
    static constexpr int64_t kWidth = 64, kUnit = 16;
    static constexpr int64_t chains(int64_t width) { return width >= 48 ? 1 : width == 32 ? 2 : 4; }
    static constexpr int64_t chain(int64_t width) { return 96 * chains(width); }

    template <int V, class Kept, class Sum>
    ENGINE_AVX2 static void tile_of(const Kept& kept, int64_t rows, const float* strip, bool add, Sum* sums) {
        constexpr int C = chains(8 * V);  // to a vector: with them there are at least 6 multiply-adds to wait for
        for (int64_t r = 0; r < rows; ++r) {
            const auto [values, columns, count] = kept.row[r];
            __m256 acc[C][V];
#pragma GCC unroll 16
            for (int i = 0; i < C * V; ++i) acc[i / V][i % V] = _mm256_setzero_ps();
            const auto product = [&](int64_t i, __m256(&to)[V]) __attribute__((always_inline)) ENGINE_AVX2 {
                const float* x = strip + columns[i] * (8 * V);
                const __m256 value = _mm256_broadcast_ss(values + i);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) to[v] = _mm256_fmadd_ps(value, _mm256_load_ps(x + 8 * v), to[v]);
            };
            int64_t i = 0;
            if constexpr (C > 1) {
                for (; i + C <= count; i += C) {
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) product(i + c, acc[c]);
                }
            }
            for (; i < count; ++i) product(i, acc[0]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
                for (int c = 1; c < C; ++c) acc[0][v] = _mm256_add_ps(acc[0][v], acc[c][v]);
                add_up_8_avx2(sums + (r * V + v) * 8, acc[0][v], add);
            }
        }
    }

    template <class Kept, class Sum>
    static void tile(const Kept& kept, int64_t rows,
                     const float* strip,  // [kc, width]
                     int64_t width, bool add,
                     Sum* sums) {  // [rows, width]
        if (width == 64) return tile_of<8>(kept, rows, strip, add, sums);
        if (width == 48) return tile_of<6>(kept, rows, strip, add, sums);
        if (width == 32) return tile_of<4>(kept, rows, strip, add, sums);
        tile_of<2>(kept, rows, strip, add, sums);
    }
};

struct SpmmAvx512 {
    static constexpr int64_t kWidth = 64, kUnit = 16;
    static constexpr int64_t chains(int64_t width) { return width >= 48 ? 2 : 4; }
    static constexpr int64_t chain(int64_t width) { return 96 * chains(width); }

    template <int V, class Kept>
    ENGINE_AVX512 static void tile_of(const Kept& kept, int64_t rows, const float* strip, bool add, float* sums) {
        constexpr int C = chains(16 * V);
        for (int64_t r = 0; r < rows; ++r) {
            const auto [values, columns, count] = kept.row[r];
            __m512 acc[C][V];
#pragma GCC unroll 16
            for (int i = 0; i < C * V; ++i) acc[i / V][i % V] = _mm512_setzero_ps();
            const auto product = [&](int64_t i, __m512(&to)[V]) __attribute__((always_inline)) ENGINE_AVX512 {
                const float* x = strip + columns[i] * (16 * V);
                const __m512 value = _mm512_set1_ps(values[i]);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) to[v] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + 16 * v), to[v]);
            };
            int64_t i = 0;
            for (; i + C <= count; i += C) {
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) product(i + c, acc[c]);
            }
            for (; i < count; ++i) product(i, acc[0]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
                for (int c = 1; c < C; ++c) acc[0][v] = _mm512_add_ps(acc[0][v], acc[c][v]);
                float* total = sums + (r * V + v) * 16;
                _mm512_storeu_ps(total, add ? _mm512_add_ps(_mm512_loadu_ps(total), acc[0][v]) : acc[0][v]);
            }
        }
    }

    template <class Kept>
    static void tile(const Kept& kept, int64_t rows,
                     const float* strip,  // [kc, width]
                     int64_t width, bool add,
                     float* sums) {  // [rows, width]
        if (width == 64) return tile_of<4>(kept, rows, strip, add, sums);
        if (width == 48) return tile_of<3>(kept, rows, strip, add, sums);
        if (width == 32) return tile_of<2>(kept, rows, strip, add, sums);
        tile_of<1>(kept, rows, strip, add, sums);
    }
};
#endif

}  // namespace engine
