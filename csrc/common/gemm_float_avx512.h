// The microkernels of common/gemm_float.h with AVX-512: 14 weights by 32 activations in 28 registers. Packing is
// AVX2's: it is a hundredth of the work. The last step isn't, where K is a few hundred.
#pragma once

#include <immintrin.h>

#include "common/gemm_float_avx2.h"
#include "common/registers_avx512.h"

namespace engine {

ENGINE_AVX512 ENGINE_INLINE void transpose_16x16_avx512(__m512i (&v)[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // b[i + j]: in each 128 bits, element j of them of rows i to i + 3
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // 4 by 4 of 128 bits
        const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i high_odd = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

// Sums to outputs, 16 by 16 and the rest one by one.
template <class T>
ENGINE_AVX512 void finish_avx512(const FloatLinear<T>& call,
                                 const float* sums,  // [columns, width]
                                 int64_t width, int64_t first_row, int64_t rows, int64_t column, int64_t columns) {
    int64_t row = 0;
    for (; row + 16 <= rows; row += 16) {
        int64_t j = 0;
        for (; j + 16 <= columns; j += 16) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums + (j + i) * width + row);
            transpose_16x16_avx512(v);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                __m512 y = _mm512_castsi512_ps(v[i]);
                if (call.scale) y = _mm512_mul_ps(y, _mm512_loadu_ps(call.scale + column + j));
                if (call.bias) y = _mm512_add_ps(y, _mm512_loadu_ps(call.bias + column + j));
                store_16_avx512(call.y + (first_row + row + i) * call.n + column + j, y);
            }
        }
        finish_rest(call, sums, width, first_row, row, row + 16, column, j, columns);
    }
    finish_rest(call, sums, width, first_row, row, rows, column, 0, columns);
}

// A tile's sums, added to those that are there if `add`.
template <int R, int V>
ENGINE_AVX512 ENGINE_INLINE void store_tile_avx512(const __m512 (&acc)[R][V], bool add,
                                                   float* sums) {  // [R, 16 V], 64-byte aligned
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float* to = sums + (r * V + v) * 16;
            _mm512_store_ps(to, add ? _mm512_add_ps(_mm512_load_ps(to), acc[r][v]) : acc[r][v]);
        }
    }
}

struct FloatPanelAvx512 {
    using Element = float;
    static constexpr int64_t kChain = kFloatChain;
    static constexpr int64_t kWidth = 32, kNarrow = 16, kRows = 14, kGroup = 98;

    template <class T>
    static void pack(const T* x,  // [rows, stride]
                     int64_t stride, int64_t rows, int64_t kc, int64_t width,
                     float* strip,       // [kc, width]: beyond `rows` zeros
                     uint8_t* finite) {  // [rows]
        FloatPanelAvx2::pack(x, stride, rows, kc, width, strip, finite);
    }

    // V vectors of activations.
    template <int V>
    ENGINE_AVX512 ENGINE_INLINE static void tile_of(const float* w, const float* strip, int64_t kc, bool add,
                                                    float* sums) {
        __m512 acc[kRows][V];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
        }
#pragma GCC unroll 2
        for (int64_t i = 0; i < kc; ++i) {
            __m512 x[V];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_ps(strip + (i * V + v) * 16);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const __m512 weight = _mm512_set1_ps(w[r * kFloatDepth + i]);
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(weight, x[v], acc[r][v]);
            }
        }
        store_tile_avx512(acc, add, sums);
    }

    ENGINE_AVX512 static void tile(const float* w,      // [kRows, kFloatDepth], of which kc are used
                                   const float* strip,  // [kc, width]
                                   int64_t kc, int64_t width, bool add,
                                   float* sums) {  // [kRows, width]
        if (width == kNarrow) return tile_of<1>(w, strip, kc, add, sums);
        tile_of<2>(w, strip, kc, add, sums);
    }

    template <class T>
    static void finish(const FloatLinear<T>& call,
                       const float* sums,  // [columns, width]
                       int64_t width, int64_t first_row, int64_t rows, int64_t column, int64_t columns) {
        finish_avx512(call, sums, width, first_row, rows, column, columns);
    }
};

// bfloat16 by bfloat16 with AVX512_BF16. What is a float above is a pair of neighbours along K here.
struct PairPanelAvx512 {
    using Element = BFloat16;
    static constexpr int64_t kChain = kFloatDepth;  // chains are short beside what bfloat16 outputs tell apart
    static constexpr int64_t kWidth = 32, kNarrow = 16, kRows = 14, kGroup = 98;

    ENGINE_AVX2 static void pack(const BFloat16* x,  // [rows, stride]
                                 int64_t stride, int64_t rows, int64_t kc, int64_t width,
                                 BFloat16* strip,    // [ceil(kc / 2), width, 2]: beyond `rows` and `kc` zeros
                                 uint8_t* finite) {  // [rows]
        for (int64_t row = 0; row < rows; ++row) finite[row] = all_finite(x + row * stride, kc);
        const int64_t pairs = divide_up(kc, 2);
        if (rows < width || kc % 2 != 0) std::fill(strip, strip + 2 * pairs * width, BFloat16{});
        const auto rest = [&](int64_t row, int64_t end, int64_t i) {
            for (; row < end; ++row) {
                for (int64_t k = i; k < kc; ++k) strip[(k / 2 * width + row) * 2 + k % 2] = x[row * stride + k];
            }
        };
        int64_t row = 0;
        for (; row + 8 <= rows; row += 8) {
            int64_t i = 0;
            for (; i + 8 <= kc / 2; i += 8) {
                __m256 v[8];
                for (int j = 0; j < 8; ++j) {
                    v[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(x + (row + j) * stride + 2 * i));
                }
                transpose_8x8_avx2(v);
                for (int j = 0; j < 8; ++j) {
                    _mm256_store_ps(reinterpret_cast<float*>(strip + ((i + j) * width + row) * 2), v[j]);
                }
            }
            rest(row, row + 8, 2 * i);
        }
        rest(row, rows, 0);
    }

    template <int V>
    ENGINE_AVX512 ENGINE_INLINE static void tile_of(const BFloat16* w, const BFloat16* strip, int64_t kc, bool add,
                                                    float* sums) {
        __m512 acc[kRows][V];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < kc; i += 2) {
            __m512i x[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) x[v] = _mm512_load_si512(strip + (i / 2 * V + v) * 32);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                int32_t pair;
                std::memcpy(&pair, w + r * kFloatDepth + i, sizeof pair);
                const __m512i weight = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) accumulate_pairs_avx512(acc[r][v], weight, x[v]);
            }
        }
        store_tile_avx512(acc, add, sums);
    }

    ENGINE_AVX512 static void tile(const BFloat16* w,      // [kRows, kFloatDepth], of which kc are used
                                   const BFloat16* strip,  // [kc / 2, width, 2]
                                   int64_t kc, int64_t width, bool add,
                                   float* sums) {  // [kRows, width]
        if (width == kNarrow) return tile_of<1>(w, strip, kc, add, sums);
        tile_of<2>(w, strip, kc, add, sums);
    }

    static void finish(const FloatLinear<BFloat16>& call,
                       const float* sums,  // [columns, width]
                       int64_t width, int64_t first_row, int64_t rows, int64_t column, int64_t columns) {
        finish_avx512(call, sums, width, first_row, rows, column, columns);
    }
};

}  // namespace engine
