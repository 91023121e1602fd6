// Microkernels for many rows of activations by one row of blocks, with AVX-512: bfloat16 and fp32. Blocks are packed;
// activations are read where they lie, at the columns of the kept blocks. Sums stay in registers from one block to the
// next.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/block.h"
#include "common/gemm_float.h"
#include "common/registers_avx512.h"

namespace engine {

constexpr int64_t kStripOutputs = 64;  // at most so many to a strip; always a multiple of 16

// Rows of activations to a tile: as many sums as fit registers, and 12 for 16 outputs.
constexpr int64_t strip_rows(int64_t outputs) { return outputs > 48 ? 6 : outputs > 32 ? 8 : 12; }

// Kept blocks of one row of blocks, packed. W: BFloat16 in pairs, float one by one.
template <class W>
struct BlockStrip {
    const int32_t* columns;  // [blocks]: where each stands
    int64_t blocks, wide;    // wide: columns of a block
    const W* weights;        // [blocks · wide / 2, outputs, 2], or as many one by one
    int64_t chain;           // how much of K is added up before it is added to the sums, in fp32 products
    // What memory is asked for meanwhile, so many lines with each block: many at once would hold up the activations.
    const char* next = nullptr;
    int64_t next_stride = 0, lines = 0;  // bytes from what is asked for with a block to that with the next

    // Has tile `tile` of `tiles` ask for its part of the rows [inside, inside + outputs) of as many blocks that follow.
    template <class V>
    void ask_next(const Blocks& weight, int64_t block, int64_t inside, int64_t outputs, int64_t tile, int64_t tiles) {
        if (weight.kept() * static_cast<int64_t>(sizeof(V)) <= kLeastAsked) return;
        const int64_t row_bytes = wide * static_cast<int64_t>(sizeof(V));
        const int64_t all = outputs * row_bytes / 64, each = pieces_of(all, tiles);
        next_stride = weight.shape.rows * row_bytes;
        next = reinterpret_cast<const char*>(weight.blocks<V>()) + block * next_stride + inside * row_bytes +
               tile * each * 64;
        lines = std::clamp<int64_t>(all - tile * each, 0, each);
    }
    ENGINE_INLINE void ask(int64_t block) const {
        for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(next + block * next_stride + 64 * line, 0, 2);
    }
};

// 16 rows of 4 dwords as 4 of 16.
ENGINE_AVX512 ENGINE_INLINE void transpose_16x4_avx512(const void* rows, int64_t stride_bytes, __m512i (&columns)[4]) {
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    __m512i four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // rows 4 i to 4 i + 3
        const char* from = static_cast<const char*>(rows) + 4 * i * stride_bytes;
        four[i] = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        from += stride_bytes;
        four[i] = _mm512_inserti32x4(four[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), 1);
        from += stride_bytes;
        four[i] = _mm512_inserti32x4(four[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), 2);
        from += stride_bytes;
        four[i] = _mm512_inserti32x4(four[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), 3);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i index = half == 0 ? first : second;
        const __m512i low = _mm512_permutex2var_epi32(four[0], index, four[1]);
        const __m512i high = _mm512_permutex2var_epi32(four[2], index, four[3]);
        columns[2 * half] = _mm512_shuffle_i32x4(low, high, 0x44);
        columns[2 * half + 1] = _mm512_shuffle_i32x4(low, high, 0xee);
    }
}

// bfloat16 by bfloat16, with AVX512_BF16: a broadcast of 32 bits is multiplied at once.
struct BlockPairsAvx512 {
    using W = BFloat16;
    static constexpr int64_t kTogether = 2;  // weights of an output that lie together

    // Packs 16 outputs of a block.
    ENGINE_AVX512 static void pack(const BFloat16* w,  // [16, stride]
                                   int64_t stride, int64_t wide,
                                   BFloat16* to,  // [wide / 2, outputs, 2]
                                   int64_t outputs) {
        for (int64_t k = 0; k < wide; k += 8) {
            __m512i pairs[4];
            transpose_16x4_avx512(w + k, stride * static_cast<int64_t>(sizeof(BFloat16)), pairs);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) _mm512_store_si512(to + (k + 2 * i) * outputs, pairs[i]);
        }
    }

    // R rows of activations by 16 V outputs. Rows are reached from every third, by one and two strides.
    template <int R, int V>
    ENGINE_AVX512 __attribute__((noinline)) static void tile_of(const BFloat16* x,  // [R, elements]
                                                                int64_t elements,   // from one row to the next
                                                                const BlockStrip<BFloat16>& strip, bool add,
                                                                float* sums) {  // [R, 16 V]
        __m512 acc[R][V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                acc[r][v] = add ? _mm512_load_ps(sums + (r * V + v) * 16) : _mm512_setzero_ps();
            }
        }
        const auto* q = reinterpret_cast<const char*>(x);
        constexpr auto kSize = static_cast<int64_t>(sizeof(BFloat16));
        const int64_t stride = elements * kSize, wide = strip.wide * kSize;  // bytes
        const auto* w = reinterpret_cast<const char*>(strip.weights);
        for (int64_t i = 0; i < strip.blocks; ++i) {
            strip.ask(i);
            const char* row[(R + 2) / 3];
            const char* next = q + strip.columns[std::min(i + 1, strip.blocks - 1)] * wide;
#pragma GCC unroll 4
            for (int t = 0; t < (R + 2) / 3; ++t) row[t] = q + strip.columns[i] * wide + 3 * t * stride;
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * stride);
            for (int64_t k = 0; k < wide; k += 16) {
#pragma GCC unroll 4
                for (int f = 0; f < 4; ++f, w += 64 * V) {
                    __m512i weight[V];
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) weight[v] = _mm512_load_si512(w + 64 * v);
#pragma GCC unroll 12
                    for (int r = 0; r < R; ++r) {
                        int32_t pair;
                        std::memcpy(&pair, row[r / 3] + r % 3 * stride + k + 4 * f, sizeof pair);
                        const __m512i one = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
                        for (int v = 0; v < V; ++v) accumulate_pairs_avx512(acc[r][v], one, weight[v]);
                    }
                }
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) _mm512_store_ps(sums + (r * V + v) * 16, acc[r][v]);
        }
    }
};

struct BlockFloatAvx512 {
    using W = float;
    static constexpr int64_t kTogether = 1;

    // Packs 16 outputs of a block.
    ENGINE_AVX512 static void pack(const float* w,  // [16, stride]
                                   int64_t stride, int64_t wide,
                                   float* to,  // [wide, outputs]
                                   int64_t outputs) {
        for (int64_t k = 0; k < wide; k += 4) {
            __m512i columns[4];
            transpose_16x4_avx512(w + k, stride * static_cast<int64_t>(sizeof(float)), columns);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) _mm512_store_si512(to + (k + i) * outputs, columns[i]);
        }
    }

    // As above. After a chain of K sums are added to what came before.
    template <int R, int V>
    ENGINE_AVX512 __attribute__((noinline)) static void tile_of(const float* x,  // [R, stride]
                                                                int64_t stride, const BlockStrip<float>& strip,
                                                                bool add,
                                                                float* sums) {  // [R, 16 V]
        const float* w = strip.weights;
        const int64_t blocks = std::max<int64_t>(1, strip.chain / strip.wide);
        int64_t first = 0, begin = 0;
        do {
            const int64_t last = std::min(strip.blocks, first + blocks);
            const int64_t end = std::min(strip.wide, begin + strip.chain);
            __m512 acc[R][V];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
            }
            for (int64_t i = first; i < last; ++i) {
                if (begin == 0) strip.ask(i);
                const float* row[(R + 2) / 3];
#pragma GCC unroll 4
                for (int t = 0; t < (R + 2) / 3; ++t) row[t] = x + strip.columns[i] * strip.wide + 3 * t * stride;
                for (int64_t k = begin; k < end; k += 4) {
#pragma GCC unroll 4
                    for (int f = 0; f < 4; ++f, w += 16 * V) {
                        __m512 weight[V];
#pragma GCC unroll 4
                        for (int v = 0; v < V; ++v) weight[v] = _mm512_load_ps(w + 16 * v);
#pragma GCC unroll 12
                        for (int r = 0; r < R; ++r) {
                            const __m512 one = _mm512_set1_ps(row[r / 3][r % 3 * stride + k + f]);
#pragma GCC unroll 4
                            for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(one, weight[v], acc[r][v]);
                        }
                    }
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    float* to = sums + (r * V + v) * 16;
                    _mm512_store_ps(to, add ? _mm512_add_ps(_mm512_load_ps(to), acc[r][v]) : acc[r][v]);
                }
            }
            add = true;
            begin = end < strip.wide ? end : 0;
            if (begin == 0) first = last;
        } while (first < strip.blocks);
    }
};

// Up to strip_rows(outputs) rows of activations by all outputs of the strip.
template <class Kernel, int V, int R = strip_rows(16 * V), class W>
void strip_tile_of(int64_t rows, const W* x, int64_t stride, const BlockStrip<W>& strip, bool add, float* sums) {
    if constexpr (R > 1) {
        if (rows < R) return strip_tile_of<Kernel, V, R - 1>(rows, x, stride, strip, add, sums);
    }
    Kernel::template tile_of<R, V>(x, stride, strip, add, sums);
}
template <class Kernel, class W>
void strip_tile(int64_t rows, int64_t outputs,
                const W* x,  // [rows, stride]
                int64_t stride, const BlockStrip<W>& strip, bool add,
                float* sums) {  // [rows, outputs]
    if (outputs == 64) return strip_tile_of<Kernel, 4>(rows, x, stride, strip, add, sums);
    if (outputs == 48) return strip_tile_of<Kernel, 3>(rows, x, stride, strip, add, sums);
    if (outputs == 32) return strip_tile_of<Kernel, 2>(rows, x, stride, strip, add, sums);
    strip_tile_of<Kernel, 1>(rows, x, stride, strip, add, sums);
}

}  // namespace engine
#endif
