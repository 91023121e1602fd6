// The microkernel of common/gemm_int8.h for AVX-VNNI, as that of common/gemm_int8_avx512.h: weights are made unsigned
// (w + 128, by xor) while they are packed, and Kernel::finish takes the 128 · (sum of q) away.
//
// A strip of 64 outputs is four parts, uint8 [fours of k, 16, 4] each; a tile of 6 rows × 16 outputs takes 12
// accumulators, 2 registers for weights and one for activations (one dword, broadcast). Activations of 6 rows stay in
// L1 for the four parts.
#pragma once

#include "common/dot_bytes_avx2.h"
#include "common/gemm_int8.h"
#if ENGINE_X86

namespace engine {

struct PanelAvxVnni {
    using Q = int8_t;
    static constexpr int64_t kRows = 6, kColumns = 64, kStrips = 1;
    static constexpr bool kAsk = true;
    static constexpr int64_t kDepth = 2176;  // 139 KB of L2
    static constexpr int64_t kPartColumns = 16, kPartBytes = kPartColumns * kDepth;
    static constexpr int64_t kStripBytes = kColumns * kDepth;

    // 8 rows × 32 weights: an 8 × 8 transpose of dwords.
    ENGINE_AVX2 ENGINE_INLINE static void pack_rows(const __m256i (&rows)[8],
                                                    uint8_t* to) {  // [8 fours of k, kPartColumns, 4], of 8 columns
        __m256i a[8], b[8];
        for (int j = 0; j < 4; ++j) {
            a[2 * j] = _mm256_unpacklo_epi32(rows[2 * j], rows[2 * j + 1]);
            a[2 * j + 1] = _mm256_unpackhi_epi32(rows[2 * j], rows[2 * j + 1]);
        }
        // b[4 j + i]: in lane l, four i of that lane's (fours 4 l + i), of rows 4 j to 4 j + 3.
        for (int j = 0; j < 2; ++j) {
            b[4 * j] = _mm256_unpacklo_epi64(a[4 * j], a[4 * j + 2]);
            b[4 * j + 1] = _mm256_unpackhi_epi64(a[4 * j], a[4 * j + 2]);
            b[4 * j + 2] = _mm256_unpacklo_epi64(a[4 * j + 1], a[4 * j + 3]);
            b[4 * j + 3] = _mm256_unpackhi_epi64(a[4 * j + 1], a[4 * j + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            auto* low = reinterpret_cast<__m256i*>(to + i * kPartColumns * 4);
            auto* high = reinterpret_cast<__m256i*>(to + (i + 4) * kPartColumns * 4);
            _mm256_store_si256(low, _mm256_permute2x128_si256(b[i], b[4 + i], 0x20));
            _mm256_store_si256(high, _mm256_permute2x128_si256(b[i], b[4 + i], 0x31));
        }
    }

    ENGINE_AVX2 static void pack(const int8_t* w,  // [columns, stride]
                                 int64_t stride, int64_t columns, int64_t kc,
                                 void* strip) {  // [4][kPartBytes]
        const __m256i shift = _mm256_set1_epi8(-128);
        const int64_t whole = kc / 32 * 32;
        for (int64_t j = 0; j < columns; j += 8) {
            auto* to = static_cast<uint8_t*>(strip) + j / kPartColumns * kPartBytes + j % kPartColumns * 4;
            const int64_t there = std::min<int64_t>(8, columns - j);
            for (int64_t k = 0; k < kc; k += 32) {
                __m256i rows[8];
                for (int64_t i = 0; i < 8; ++i) {
                    const int8_t* from = w + (j + i) * stride + k;
                    alignas(32) int8_t rest[32] = {};
                    if (i < there && k == whole) std::memcpy(rest, from, kc - k);
                    const void* row = i < there && k < whole ? from : rest;
                    rows[i] = _mm256_xor_si256(_mm256_loadu_si256(static_cast<const __m256i*>(row)), shift);
                }
                pack_rows(rows, to + k * kPartColumns);
            }
        }
    }

    // R rows × V vectors of 8 outputs. Unrolled by force, else GCC keeps the sums in memory.
    template <int R, int V>
    ENGINE_AVX2 __attribute__((noinline)) static void tile_of(const int8_t* q,  // [R, stride]
                                                              int64_t stride,
                                                              const uint8_t* part,  // [fours, 16, 4]
                                                              int64_t fours, bool add,
                                                              int32_t* sums,  // [R, width]
                                                              int64_t width,
                                                              const void* const* line,  // what to ask memory for
                                                              const void* const* lines_end) {
        __m256i acc[R][V];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                const auto* from = reinterpret_cast<const __m256i*>(sums + r * width + 8 * v);
                acc[r][v] = add ? _mm256_load_si256(from) : _mm256_setzero_si256();
            }
        }
        const int8_t* row[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) row[r] = q + r * stride;
        for (int64_t f = 0; f < fours; ++f) {
            if (line < lines_end) LinesAhead::ask(*line++);
            __m256i w[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                w[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(part + f * kPartColumns * 4 + 32 * v));
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, row[r] + 4 * f, sizeof four);
                const __m256i x = _mm256_set1_epi32(four);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) accumulate_avx_vnni(acc[r][v], w[v], x);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(sums + r * width + 8 * v), acc[r][v]);
            }
        }
        while (line < lines_end) LinesAhead::ask(*line++);
    }

    template <int V, int R = kRows>
    static void tile_rows(int64_t rows, const int8_t* q, int64_t stride, const uint8_t* part, int64_t fours, bool add,
                          int32_t* sums, int64_t width, const void* const* line, const void* const* lines_end) {
        if constexpr (R > 1) {
            if (rows < R) {
                return tile_rows<V, R - 1>(rows, q, stride, part, fours, add, sums, width, line, lines_end);
            }
        }
        tile_of<R, V>(q, stride, part, fours, add, sums, width, line, lines_end);
    }
    static void tile(int64_t rows, int64_t columns, const int8_t* q, int64_t stride, const void* strip, int64_t kc,
                     bool add, int32_t* sums, int64_t width, const LinesAhead* ahead = nullptr) {
        const auto* w = static_cast<const uint8_t*>(strip);
        const int64_t fours = (kc + 3) / 4;  // activations end in zeros
        const int64_t parts = divide_up(columns, kPartColumns);
        for (int64_t part = 0; part < parts; ++part, w += kPartBytes, sums += kPartColumns) {
            const void* const* lines = ahead ? ahead->lines : nullptr;
            const int64_t count = ahead ? ahead->count : 0;
            const auto *from = lines + count * part / parts, *to = lines + count * (part + 1) / parts;
            if (columns - part * kPartColumns > 8) {
                tile_rows<2>(rows, q, stride, w, fours, add, sums, width, from, to);
            } else {
                tile_rows<1>(rows, q, stride, w, fours, add, sums, width, from, to);
            }
        }
    }

    template <class T, class Acc>
    ENGINE_AVX2 static void finish(const FinishRows<T>& f, const Acc* sums, int64_t width) {
        finish_rows<128>(f, sums, width);
    }
};

}  // namespace engine
#endif
