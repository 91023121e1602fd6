// The microkernel of common/gemm_int8.h for AVX2, in 16-bit integers, whose pairs vpmaddwd multiplies and adds.
// (vpmaddubsw multiplies twice as many bytes, but saturates at 16 bits: it is not exact.) 16 products take two
// instructions (vpmaddwd, vpaddd), which already saturate the vector ports. Winograd's identity (A new algorithm for
// inner product, IEEE Trans. Computers, 1968) halves the multiplications:
//
//   x0 w0 + x1 w1 = (x0 + w1) (x1 + w0) - x0 x1 - w0 w1
//
// The products of x alone are summed once for a row, those of w once for a panel. Two 16-bit additions, which all four
// pipes do, take the place of a multiplication and a 32-bit addition: 1.26 times as fast, and all of it exact, for
// |x + w| <= 255 and sums may wrap round on the way.
//
// A strip of 16 outputs is int16 [pairs of k, 16, 2]; pair p is partnered with pair p + 1. A tile of 4 rows × 16
// outputs takes 8 accumulators, 4 registers for weights, 2 for activations (pairs, broadcast) and 2 for the sums x + w.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <cstring>

#include "common/gemm_int8.h"

namespace engine {

struct PanelAvx2 {
    using Q = int16_t;
    static constexpr int64_t kRows = 4, kColumns = 16, kStrips = 2;
    static constexpr bool kAsk = false;
    static constexpr int64_t kDepth = 384;  // a panel and its activations stay in L1
    static constexpr int64_t kWeightBytes = kColumns * kDepth * sizeof(int16_t);
    static constexpr int64_t kStripBytes = kWeightBytes + kColumns * sizeof(int32_t);

    // Rows side by side, with zeros beyond the block up to a multiple of 16. In the weights they often lie a power of
    // two apart, where they would drive each other out of the cache while they are read piece by piece.
    static constexpr int64_t kBlockStride = kDepth + 64;
    ENGINE_AVX2 static void gather(const int8_t* w,  // [rows, stride]
                                   int64_t stride, int64_t rows, int64_t kc,
                                   int8_t* block) {  // [kColumns, kBlockStride]
        const int64_t whole = kc / 32 * 32;
        for (int64_t j = 0; j < kColumns; ++j) {
            int8_t* to = block + j * kBlockStride;
            if (j >= rows) {
                std::fill(to, to + (kc + 15) / 16 * 16, int8_t{0});
                continue;
            }
            const int8_t* from = w + j * stride;
            for (int64_t k = 0; k < whole; k += 32) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
                _mm256_store_si256(reinterpret_cast<__m256i*>(to + k), bytes);
                __builtin_prefetch(from + k + kc, 0, 2);  // the next stretch: short pieces escape the hardware's eye
            }
            std::copy(from + whole, from + kc, to + whole);
            std::fill(to + kc, to + (kc + 15) / 16 * 16, int8_t{0});
        }
    }

    ENGINE_AVX2 static void pack(const int8_t* w,  // [rows, stride]
                                 int64_t stride, int64_t rows, int64_t kc,
                                 void* strip) {  // int16 [kDepth / 2, 16, 2], then int32 [16]: minus the sums of w0 w1
        alignas(64) int8_t block[kColumns * kBlockStride];
        gather(w, stride, rows, kc, block);
        auto* to = static_cast<__m256i*>(strip);
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t k = 0; k < kc; k += 16, to += 16) {
            // The pairs of bytes of 8 rows are transposed as 16-bit units: rows 0 to 7 in the lower lane, 8 to 15
            // above.
            __m256i a[8], b[8];
            for (int j = 0; j < 8; ++j) {
                const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(block + j * kBlockStride + k));
                const auto* high = reinterpret_cast<const __m128i*>(block + (j + 8) * kBlockStride + k);
                a[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_load_si128(high), 1);
            }
            for (int j = 0; j < 4; ++j) {
                b[2 * j] = _mm256_unpacklo_epi16(a[2 * j], a[2 * j + 1]);
                b[2 * j + 1] = _mm256_unpackhi_epi16(a[2 * j], a[2 * j + 1]);
            }
            for (int j = 0; j < 2; ++j) {
                for (int i = 0; i < 2; ++i) {
                    a[4 * j + 2 * i] = _mm256_unpacklo_epi32(b[4 * j + i], b[4 * j + 2 + i]);
                    a[4 * j + 2 * i + 1] = _mm256_unpackhi_epi32(b[4 * j + i], b[4 * j + 2 + i]);
                }
            }
            for (int i = 0; i < 4; ++i) {
                b[2 * i] = _mm256_unpacklo_epi64(a[i], a[4 + i]);
                b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[4 + i]);
            }
            for (int p = 0; p < 8; p += 2) {
                const __m256i even[2] = {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(b[p])),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b[p], 1))};
                const __m256i odd[2] = {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(b[p + 1])),
                                        _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b[p + 1], 1))};
                for (int v = 0; v < 2; ++v) {
                    _mm256_store_si256(to + 2 * p + v, even[v]);
                    _mm256_store_si256(to + 2 * p + 2 + v, odd[v]);
                    sum[v] = _mm256_sub_epi32(sum[v], _mm256_madd_epi16(even[v], odd[v]));
                }
            }
        }
        auto* sums = reinterpret_cast<__m256i*>(static_cast<char*>(strip) + kWeightBytes);
        for (int v = 0; v < 2; ++v) _mm256_store_si256(sums + v, sum[v]);
    }

    // Two activations in every lane. GCC would otherwise load all rows' ahead of the products and run out of registers,
    // spilling sums in the innermost loop: instructions marked volatile stay in their order.
    ENGINE_AVX2 ENGINE_INLINE static __m256i broadcast_pair(const int16_t* pair) {
        __m256i x;
        asm volatile("vpbroadcastd %1, %0" : "=x"(x) : "m"(*reinterpret_cast<const int16_t (*)[2]>(pair)));
        return x;
    }

    // R rows × V vectors of 8 outputs.
    template <int R, int V>
    ENGINE_AVX2 __attribute__((noinline)) static void tile_of(
        const int16_t* q,  // [R, stride]
        int64_t stride,
        const __m256i* strip,  // [pairs, 2] vectors
        const __m256i* start,  // [2] vectors: minus the sums of w0 w1
        int64_t fours, bool add,
        int32_t* sums,  // [R, width]
        int64_t width) {
        __m256i acc[R][V];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                const auto* from = reinterpret_cast<const __m256i*>(sums + r * width + 8 * v);
                acc[r][v] = add ? _mm256_add_epi32(start[v], _mm256_load_si256(from)) : start[v];
            }
        }
        for (int64_t f = 0; f < fours; ++f, strip += 4, q += 4) {
            __m256i w0[V], w1[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                w0[v] = _mm256_load_si256(strip + v);
                w1[v] = _mm256_load_si256(strip + 2 + v);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m256i x0 = broadcast_pair(q + r * stride), x1 = broadcast_pair(q + r * stride + 2);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const __m256i product = _mm256_madd_epi16(_mm256_add_epi16(x0, w1[v]), _mm256_add_epi16(x1, w0[v]));
                    acc[r][v] = _mm256_add_epi32(acc[r][v], product);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(sums + r * width + 8 * v), acc[r][v]);
            }
        }
    }

    template <int V>
    static void tile_rows(int64_t rows, const int16_t* q, int64_t stride, const void* strip, int64_t kc, bool add,
                          int32_t* sums, int64_t width) {
        const auto* w = static_cast<const __m256i*>(strip);
        const auto* start = reinterpret_cast<const __m256i*>(static_cast<const char*>(strip) + kWeightBytes);
        const int64_t fours = (kc + 3) / 4;  // activations end in zeros, and so do packed weights
        switch (rows) {
            case 4:
                return tile_of<4, V>(q, stride, w, start, fours, add, sums, width);
            case 3:
                return tile_of<3, V>(q, stride, w, start, fours, add, sums, width);
            case 2:
                return tile_of<2, V>(q, stride, w, start, fours, add, sums, width);
            default:
                return tile_of<1, V>(q, stride, w, start, fours, add, sums, width);
        }
    }
    static void tile(int64_t rows, int64_t columns, const int16_t* q, int64_t stride, const void* strip, int64_t kc,
                     bool add, int32_t* sums, int64_t width, const LinesAhead* = nullptr) {
        if (columns > 8) return tile_rows<2>(rows, q, stride, strip, kc, add, sums, width);
        tile_rows<1>(rows, q, stride, strip, kc, add, sums, width);
    }

    template <class T, class Acc>
    ENGINE_AVX2 static void finish(const FinishRows<T>& f, const Acc* sums, int64_t width) {
        finish_rows<1>(f, sums, width);
    }
};

}  // namespace engine
#endif
