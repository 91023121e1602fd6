// block_int8_linear for up to four rows of activations on AVX-512: dot products of blocks as they lie in memory, which
// is one stream.
#pragma once

#include "common/block.h"
#include "common/dot_int8.h"
#include "common/int8_activations.h"
#if ENGINE_X86

namespace engine {

// 64 weights are a piece of a row of a block, or 2 or 4 rows of a narrow one; activations are repeated for each of
// these. Weights are the unsigned side, shifted by 128: what sums are too large by depends on the activations only.
struct BlockDotAvx512 {
    static constexpr int64_t kMostRows = 4, kMostBlock = 256;

    static bool fits(const Blocks& weight) {
        const int64_t wide = weight.shape.columns;
        return weight.k <= kExactDepth && (wide == 16 || wide == 32 || wide % 64 == 0);
    }

    // The products of a row of blocks, as many rows of activations as `m`.
    static void line(int64_t m, const QuantizedRows<int8_t>& rows, const Blocks& weight, int64_t line,
                     int32_t (*sums)[kMostRows]) {  // [high, m]
        switch (m) {
            case 1:
                return line_of<1>(rows, weight, line, sums);
            case 2:
                return line_of<2>(rows, weight, line, sums);
            case 3:
                return line_of<3>(rows, weight, line, sums);
            default:
                return line_of<4>(rows, weight, line, sums);
        }
    }

  private:
    static constexpr int64_t kInCache = 1 << 20;         // weights that are read from L2 as fast in any order
    static constexpr int64_t kMostVectors = kMostBlock;  // of weights, a column of blocks' width each

    // What vectors of weights and rows of activations come to, lane by lane.
    template <int M>
    struct Sums {
        __m512i of[kMostVectors][M], excess[M];
    };

    template <int M>
    static void line_of(const QuantizedRows<int8_t>& rows, const Blocks& weight, int64_t line,
                        int32_t (*sums)[kMostRows]) {
        const int64_t wide = weight.shape.columns;
        if (wide == 16) return blocks<M, 4>(rows, weight, line, sums);
        if (wide == 32) return blocks<M, 2>(rows, weight, line, sums);
        blocks<M, 1>(rows, weight, line, sums);
    }

    // Where registers hold the sums of a whole block they do so from block to block. Else sums go to memory and back,
    // so that weights are still read in one stream.
    template <int M, int together>
    static void blocks(const QuantizedRows<int8_t>& rows, const Blocks& weight, int64_t line,
                       int32_t (*sums)[kMostRows]) {
        constexpr int kVectors = M == 1 ? 16 : M <= 3 ? 8 : 4;
        const int64_t vectors = weight.shape.rows / together, first = weight.offsets()[line],
                      last = weight.offsets()[line + 1];
        alignas(64) Sums<M> all;
        const bool pieces = M <= 2 && vectors >= 4 * kVectors && weight.values.numel() > kInCache;
        if (!pieces || first == last) {
            stretch<M, together, kVectors>(rows, weight, first, last, 0, vectors, false, all);
        } else {
            for (int64_t block = first; block < last; ++block) {
                stretch<M, together, kVectors>(rows, weight, block, block + 1, 0, vectors, block > first, all);
            }
        }
        add_up<M, together>(all, vectors, sums);
    }

    // Blocks [first, last) from vector `v` of each on, as many vectors at a time as there are registers for; their
    // number is a multiple of 4.
    template <int M, int together, int most>
    static void stretch(const QuantizedRows<int8_t>& rows, const Blocks& weight, int64_t first, int64_t last, int64_t v,
                        int64_t vectors, bool add, Sums<M>& all) {
        for (; v + most <= vectors; v += most) multiply<M, together, most>(rows, weight, first, last, v, add, all);
        if constexpr (most > 4) {
            if (v < vectors) stretch<M, together, most / 2>(rows, weight, first, last, v, vectors, add, all);
        }
    }

    template <int together>
    ENGINE_AVX512 ENGINE_INLINE static __m512i repeated(const int8_t* x) {
        if constexpr (together == 4) return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(x)));
        if constexpr (together == 2) {
            return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(x)));
        }
        return _mm512_load_si512(x);
    }

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int M, int together, int vectors>
    ENGINE_AVX512 __attribute__((noinline)) static void multiply(const QuantizedRows<int8_t>& rows,
                                                                 const Blocks& weight, int64_t first, int64_t last,
                                                                 int64_t vector, bool add, Sums<M>& all) {
        constexpr int64_t kAhead = 4 << 10;
        const int64_t wide = weight.shape.columns, size = weight.shape.rows * wide, pieces = (wide + 63) / 64;
        const int64_t w_stride = together * wide;
        const __m512i shift = _mm512_set1_epi8(-128);
        __m512i acc[M * vectors], excess[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            excess[m] = add ? all.excess[m] : _mm512_setzero_si512();
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) {
                acc[m * vectors + v] = add ? all.of[vector + v][m] : _mm512_setzero_si512();
            }
        }
        const int8_t* w = data<int8_t>(weight.values) + first * size + vector * w_stride;
        alignas(64) int8_t tail[M][kMostBlock];  // the activations of a block that reaches beyond them
        for (int64_t block = first; block < last; ++block, w += size) {
            const int64_t column = weight.columns()[block] * wide;
            const int8_t* x = rows.q + column;
            int64_t x_stride = rows.stride;
            if (__builtin_expect(column + wide > x_stride, 0)) {
                std::memset(tail, 0, sizeof tail);
                for (int m = 0; m < M; ++m) std::copy_n(x + m * x_stride, x_stride - column, tail[m]);
                x = tail[0], x_stride = kMostBlock;
            }
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int8_t* from = w + 64 * piece;
                __m512i activations[M];
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    activations[m] = repeated<together>(x + m * x_stride + 64 * piece);
                    accumulate_avx512(excess[m], shift, activations[m]);
                }
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v, from += w_stride) {
                    __builtin_prefetch(from + kAhead);
                    const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(from), shift);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) accumulate_avx512(acc[m * vectors + v], weights, activations[m]);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            if (vector == 0) all.excess[m] = excess[m];  // other vectors have met the same activations
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) all.of[vector + v][m] = acc[m * vectors + v];
        }
    }

    template <int M, int together>
    ENGINE_AVX512 static void add_up(const Sums<M>& all, int64_t vectors, int32_t (*sums)[kMostRows]) {
        for (int64_t v = 0; v < vectors; v += 4) {
            for (int m = 0; m < M; ++m) {
                __m512i four[4];
                for (int i = 0; i < 4; ++i) four[i] = _mm512_sub_epi32(all.of[v + i][m], all.excess[m]);
                alignas(64) int32_t lanes[together][4 / together][4];  // of four vectors, by the weight row they are of
                _mm512_store_si512(lanes, add_lanes_avx512(four));
                for (int i = 0; i < 4; ++i) {
                    for (int t = 0; t < together; ++t) {
                        int32_t sum = 0;
                        for (int lane = 0; lane < 4 / together; ++lane) sum += lanes[t][lane][i];
                        sums[(v + i) * together + t][m] = sum;
                    }
                }
            }
        }
    }
};

}  // namespace engine
#endif
