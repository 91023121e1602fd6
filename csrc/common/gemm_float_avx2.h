// The microkernel of common/gemm_float.h with AVX2 and FMA: 6 weights by 16 activations in 12 registers.
#pragma once

#include <immintrin.h>

#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/gemm_float_portable.h"

namespace engine {

ENGINE_AVX2 ENGINE_INLINE void transpose_8x8_avx2(__m256 (&v)[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

struct FloatPanelAvx2 {
    using Element = float;
    static constexpr int64_t kChain = kFloatChain;
    static constexpr int64_t kWidth = 16, kNarrow = 8, kRows = 12, kGroup = 96;

    template <class T>
    ENGINE_AVX2 static void pack(const T* x,  // [rows, stride]
                                 int64_t stride, int64_t rows, int64_t kc, int64_t width,
                                 float* strip,       // [kc, width]: beyond `rows` zeros
                                 uint8_t* finite) {  // [rows]
        transpose(x, stride, rows, kc, width, strip);
        for (int64_t row = 0; row < rows; ++row) finite[row] = all_finite(x + row * stride, kc);
    }

    template <class T>
    ENGINE_AVX2 static void transpose(const T* x,  // [rows, stride]
                                      int64_t stride, int64_t rows, int64_t kc, int64_t width,
                                      float* strip) {  // [kc, width]: beyond `rows` zeros
        if (rows < width) std::fill(strip, strip + kc * width, 0.0f);
        int64_t row = 0;
        for (; row + 8 <= rows; row += 8) {
            int64_t i = 0;
            for (; i + 8 <= kc; i += 8) {
                __m256 v[8];
                for (int j = 0; j < 8; ++j) v[j] = load_8_avx2(x + (row + j) * stride + i);
                transpose_8x8_avx2(v);
                for (int j = 0; j < 8; ++j) _mm256_store_ps(strip + (i + j) * width + row, v[j]);
            }
            pack_rest(x, stride, row, row + 8, i, kc, width, strip);
        }
        pack_rest(x, stride, row, rows, 0, kc, width, strip);
    }

    // R weight rows by V vectors of activations.
    template <int R, int V>
    ENGINE_AVX2 ENGINE_INLINE static void tile_of(const float* w, const float* strip, int64_t kc, bool add,
                                                  float* sums) {
        __m256 acc[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) acc[r][v] = _mm256_setzero_ps();
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < kc; ++i) {
            __m256 x[V];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) x[v] = _mm256_load_ps(strip + (i * V + v) * 8);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const __m256 weight = _mm256_broadcast_ss(w + r * kFloatDepth + i);
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) acc[r][v] = _mm256_fmadd_ps(weight, x[v], acc[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) {
                float* to = sums + (r * V + v) * 8;
                _mm256_store_ps(to, add ? _mm256_add_ps(_mm256_load_ps(to), acc[r][v]) : acc[r][v]);
            }
        }
    }

    ENGINE_AVX2 static void tile(const float* w,      // [kRows, kFloatDepth], of which kc are used
                                 const float* strip,  // [kc, width]
                                 int64_t kc, int64_t width, bool add,
                                 float* sums) {  // [kRows, width]
        if (width == kNarrow) return tile_of<12, 1>(w, strip, kc, add, sums);
        tile_of<6, 2>(w, strip, kc, add, sums);
        tile_of<6, 2>(w + 6 * kFloatDepth, strip, kc, add, sums + 6 * kWidth);
    }

    template <class T>
    ENGINE_AVX2 static void finish(const FloatLinear<T>& call,
                                   const float* sums,  // [columns, width]
                                   int64_t width, int64_t first_row, int64_t rows, int64_t column, int64_t columns) {
        int64_t row = 0;
        for (; row + 8 <= rows; row += 8) {
            int64_t j = 0;
            for (; j + 8 <= columns; j += 8) {
                __m256 v[8];
                for (int i = 0; i < 8; ++i) v[i] = _mm256_load_ps(sums + (j + i) * width + row);
                transpose_8x8_avx2(v);
                for (int i = 0; i < 8; ++i) {
                    if (call.scale) v[i] = _mm256_mul_ps(v[i], _mm256_loadu_ps(call.scale + column + j));
                    if (call.bias) v[i] = _mm256_add_ps(v[i], _mm256_loadu_ps(call.bias + column + j));
                    store_8_avx2(call.y + (first_row + row + i) * call.n + column + j, v[i]);
                }
            }
            finish_rest(call, sums, width, first_row, row, row + 8, column, j, columns);
        }
        finish_rest(call, sums, width, first_row, row, rows, column, 0, columns);
    }
};

// The same by tiles of 4 weight rows by 24 of activations: 12 rows would not divide those that are pruned alike.
struct FloatSpanPanelAvx2 : FloatPanelAvx2 {
    static constexpr int64_t kWidth = 24, kNarrow = 16, kRows = 8;

    ENGINE_AVX2 static void tile(const float* w,      // [kRows, kFloatDepth], of which kc are used
                                 const float* strip,  // [kc, width]
                                 int64_t kc, int64_t width, bool add,
                                 float* sums) {  // [kRows, width]
        for (int64_t r = 0; r < kRows; r += 4) {
            if (width == kNarrow) {
                tile_of<4, 2>(w + r * kFloatDepth, strip, kc, add, sums + r * width);
            } else {
                tile_of<4, 3>(w + r * kFloatDepth, strip, kc, add, sums + r * width);
            }
        }
    }
};

}  // namespace engine
