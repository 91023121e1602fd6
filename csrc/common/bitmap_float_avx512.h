// Bitmaps of float values with AVX-512: spread to panels, or multiplied by a few rows of activations as they are
// spread. For every weight that can give a row's bitmap and its kept values.
#pragma once

#include "common/bitmap_expand_float.h"
#include "common/bitmap_float.h"
#include "common/gemm_float.h"

namespace engine {

#if ENGINE_X86

// As much of `out` is written as kc, rounded up to 16. Returns how many values it took.
template <class V>
ENGINE_AVX512 int64_t expand_floats_avx512(const uint8_t* mask,  // of the stretch
                                           const V* values,      // kc + kReadAhead may be read
                                           int64_t kc, float* out) {
    const V* p = values;
    for (int64_t i = 0; i < kc; i += 64) {
        uint64_t bits = mask_bits(mask, i, kc);
        for (int64_t j = i; j < i + 64 && j < kc; j += 32, bits >>= 32) {
            const auto m = static_cast<uint32_t>(bits);
            __m512 w[2];
            expand_32_avx512(p, m, w);
            _mm512_storeu_ps(out + j, w[0]);
            if (j + 16 < kc) _mm512_storeu_ps(out + j + 16, w[1]);
            p += popcount64(m);
        }
    }
    return p - values;
}

// The same without a conversion; as much is written as kc, rounded up to 32.
inline ENGINE_AVX512 int64_t expand_floats_avx512(const uint8_t* mask, const BFloat16* values, int64_t kc,
                                                  BFloat16* out) {
    const BFloat16* p = values;
    for (int64_t i = 0; i < kc; i += 64) {
        uint64_t bits = mask_bits(mask, i, kc);
        for (int64_t j = i; j < i + 64 && j < kc; j += 32, bits >>= 32) {
            const auto m = static_cast<uint32_t>(bits);
            _mm512_storeu_si512(out + j, expand_lanes_avx512<uint16_t>(m, _mm512_loadu_si512(p)));
            p += popcount64(m);
        }
    }
    return p - values;
}

// What a tile does with 32 weights. `kFloats` is how much of a row of activations, in floats, 32 of them take.

struct FmaAvx512 {
    static constexpr int64_t kFloats = 32;

    // Activations in the order of expand_32_apart_avx512.
    template <class V>
    ENGINE_AVX512 static void arrange(const FloatRows& rows, int64_t m) {
        if constexpr (!std::is_same_v<V, BFloat16>) return;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        for (float* x = rows.x; x < rows.x + m * rows.stride; x += 32) {
            const __m512i low = _mm512_load_si512(x), high = _mm512_load_si512(x + 16);
            _mm512_store_si512(x, _mm512_permutex2var_epi32(low, even, high));
            _mm512_store_si512(x + 16, _mm512_permutex2var_epi32(low, odd, high));
        }
    }

    template <int M, int C, int U, class V>
    ENGINE_AVX512 ENGINE_INLINE static void add_32(const V* (&p)[C], const uint32_t (&bits)[C], int half,
                                                   const float* x, int64_t stride, __m512 (&acc)[C][M][U]) {
        static_cast<void>(half);
        __m512 w[C][2];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) expand_32_apart_avx512(p[c], bits[c], w[c]);
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m512 a = _mm512_load_ps(x + m * stride + 16 * part);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    acc[c][m][part % U] = _mm512_fmadd_ps(w[c][part], a, acc[c][m][part % U]);
                }
            }
        }
    }
};

// bfloat16 values by bfloat16 activations: products of pairs are added in fp32 by one instruction, which makes twice
// as many in its time.
struct PairsAvx512 {
    static constexpr int64_t kFloats = 16;

    // Activations as the bfloat16 that they were; a row takes the first half of its memory.
    template <class V>
    ENGINE_AVX512 static void arrange(const FloatRows& rows, int64_t m) {
        for (int64_t row = 0; row < m; ++row) {
            float* x = rows.x + row * rows.stride;
            for (int64_t i = 0; i < rows.stride; i += 16) {
                const __m512i bits = _mm512_srli_epi32(_mm512_load_si512(x + i), 16);
                _mm256_store_si256(reinterpret_cast<__m256i*>(x + i / 2), _mm512_cvtepi32_epi16(bits));
            }
        }
    }

    template <int M, int C, int U>
    ENGINE_AVX512 ENGINE_INLINE static void add_32(const BFloat16* (&p)[C], const uint32_t (&bits)[C], int half,
                                                   const float* x, int64_t stride, __m512 (&acc)[C][M][U]) {
        __m512i w[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) w[c] = expand_lanes_avx512<uint16_t>(bits[c], _mm512_loadu_si512(p[c]));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i a = _mm512_load_si512(x + m * stride);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) accumulate_pairs_avx512(acc[c][m][half % U], w[c], a);
        }
    }
};

// Several rows of weights at once, so that a vector of activations, which comes from L2 for the most part, serves all
// of them. Whole rows: with stretches of K that fit L1 the many short streams of values cost more than was saved.
template <class Step>
struct FloatDotAvx512 {
    static constexpr int columns(int m) { return m == 1 ? 2 : m <= 4 ? 4 : 3; }

    // A stretch of C rows of weights, which are left where it ended, by M of activations, in 32 registers.
    template <int M, int C, class V>
    ENGINE_AVX512 static void tile(FloatColumn<V> (&columns)[C], int64_t kc,
                                   const float* x,  // [M, stride]
                                   int64_t stride,
                                   float* sums) {  // [C, M]
        constexpr int U = M == 1 ? 2 : 1;  // sums of an output: for one row, one sum each would leave additions waiting
        __m512 acc[C][M][U];
        const V* p[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            p[c] = columns[c].values;
#pragma GCC unroll 16
            for (int i = 0; i < M * U; ++i) acc[c][i / U][i % U] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < kc; i += 64) {
            uint64_t bits[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                bits[c] = mask_bits(columns[c].mask, i, kc);
                __builtin_prefetch(columns[c].ahead + i / 8);
#pragma GCC unroll 4
                for (size_t b = 0; b < 32 * sizeof(V); b += 64) {  // what half of 64 weights take
                    __builtin_prefetch(reinterpret_cast<const char*>(p[c]) + columns[c].values_ahead + b);
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half, x += Step::kFloats) {
                uint32_t m32[C];
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) m32[c] = static_cast<uint32_t>(bits[c] >> (32 * half));
                Step::template add_32<M, C, U>(p, m32, half, x, stride, acc);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) p[c] += popcount64(m32[c]);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            columns[c].values = p[c];
            columns[c].mask += kc / 8;
            columns[c].ahead += kc / 8;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                if (U == 2) acc[c][m][0] = _mm512_add_ps(acc[c][m][0], acc[c][m][U - 1]);
                sums[c * M + m] = _mm512_reduce_add_ps(acc[c][m][0]);
            }
        }
    }

    // All rows of activations by weight rows [begin, end): M at a time, from L1 or L2 the second time. The last M may
    // begin among the first, whose products are then the same.
    template <int M, class T, class Weights>
    static void outputs(const FloatLinear<T>& call, const FloatRows& rows, const Weights& weights, int64_t begin,
                        int64_t end) {
        using V = typename Weights::Value;
        constexpr int C = columns(M);
        typename Weights::Scratch scratch[C];
        for (int64_t first = begin; first < end; first += C) {
            FloatColumn<V> columns[C], start[C];
            for (int c = 0; c < C; ++c) {  // the last once more in place of one that is missing
                start[c] = weights.column(std::min(first + c, end - 1), C, scratch[c]);
            }
            for (int64_t at = 0;; at = std::min(at + M, call.m - M)) {
                float sums[C * M];
                std::copy_n(start, C, columns);
                const float* x = rows.x + at * rows.stride;
                const auto stretch = [&](int64_t k0, int64_t kc, float* to) {
                    tile<M, C>(columns, kc, x + k0 / 32 * Step::kFloats, rows.stride, to);
                };
                sum_stretches<C * M, M == 1 ? 32 : 16>(C * M, call.k, stretch, sums);
                for (int c = 0; c < C && first + c < end; ++c) {
                    for (int m = 0; m < M; ++m) {
                        call.y[(at + m) * call.n + first + c] = float_output(sums[c * M + m], call, first + c);
                    }
                }
                if (at + M >= call.m) break;
            }
            for (int c = 0; c < C && first + c < end; ++c) {
                weights.check_row(first + c, columns[c].values - start[c].values);
            }
        }
    }
};

// As many rows of activations to a tile as divide all of them into tiles of one size, or nearly.
template <class Step, class T, class Weights, int M = kFloatDotRows>
void bitmap_dots(const FloatLinear<T>& call, const Weights& weights) {
    if constexpr (M > 1) {
        if (divide_up(call.m, divide_up(call.m, kFloatDotRows)) < M)
            return bitmap_dots<Step, T, Weights, M - 1>(call, weights);
    }
    float_dot_linear(
        call, weights.row_bytes(),
        [&](int64_t begin, int64_t end, const FloatRows& rows) {
            FloatDotAvx512<Step>::template outputs<M>(call, rows, weights, begin, end);
        },
        [&](const FloatRows& rows) { Step::template arrange<typename Weights::Value>(rows, call.m); });
}
// y, where dot products are the faster way. A weight is a struct: Value; Scratch, what a column needs for as long as it
// is read; row_bytes(); column(row, how many are read at once, scratch); and check_row(row, how many values were
// taken).
template <class T, class Weights>
bool bitmap_dot_linear(const FloatLinear<T>& call, const Weights& weights) {
    constexpr int64_t kMostPairRows = 3 * kFloatDotRows, kMostRows = 2 * kFloatDotRows;  // then panels are faster
    using V = typename Weights::Value;
    if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<V, BFloat16>) {
        if (has_bf16()) {
            if (call.m > kMostPairRows) return false;
            bitmap_dots<PairsAvx512>(call, weights);
            return true;
        }
    }
    if (call.m > kMostRows) return false;
    bitmap_dots<FmaAvx512>(call, weights);
    return true;
}
#endif

}  // namespace engine
