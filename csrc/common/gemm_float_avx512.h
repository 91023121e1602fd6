// The microkernel of common/gemm_float.h with AVX-512: 14 weights by 32 activations in 28 registers. Packing and the
// last step are AVX2's: they are a hundredth of the work.
#pragma once

#include <immintrin.h>

#include "common/gemm_float_avx2.h"

namespace engine {

struct FloatPanelAvx512 {
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
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) {
                float* to = sums + (r * V + v) * 16;
                _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[r][v]) : acc[r][v]);
            }
        }
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
        FloatPanelAvx2::finish(call, sums, width, first_row, rows, column, columns);
    }
};

}  // namespace engine
