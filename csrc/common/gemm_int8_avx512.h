// The microkernel of common/gemm_int8.h for AVX-512 VNNI: vpdpbusd multiplies 64 unsigned bytes by 64 signed ones and
// adds them by fours. Weights are made unsigned (w + 128, by xor) while they are packed; Kernel::finish takes the
// 128 · (sum of q) away. Sums may wrap round on the way: the true one fits.
//
// A strip of 64 outputs is uint8 [fours of k, 64, 4]; a tile of 6 rows × 64 outputs takes 24 accumulators and 4
// registers for weights. The activations (one dword) are broadcast from memory by vpdpbusd itself.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <cstring>

#include "common/gemm_int8.h"

namespace engine {

struct PanelAvx512 {
    using Q = int8_t;
    static constexpr int64_t kRows = 6, kColumns = 64, kStrips = 1;
    static constexpr bool kAsk = true;
    static constexpr int64_t kDepth = 2176;  // 139 KB of L2, read in order, so that sums seldom go to memory
    static constexpr int64_t kStripBytes = kColumns * kDepth;

    // 16 rows × 64 weights: a 16 × 16 transpose of dwords, in four steps of unpacking and lane shuffles.
    ENGINE_AVX512 static void pack_rows(const int8_t* w,  // [rows, stride]
                                        int64_t stride, int64_t rows, int64_t left,
                                        uint8_t* to) {  // [16 fours of k, kColumns, 4], of which 16 columns
        const __mmask64 inside = left >= 64 ? ~uint64_t{0} : ~uint64_t{0} >> (64 - left);
        const __m512i shift = _mm512_set1_epi8(-128);
        __m512i a[16], b[16];
        for (int j = 0; j < 16; ++j) {
            const __m512i row = j < rows ? _mm512_maskz_loadu_epi8(inside, w + j * stride) : _mm512_setzero_si512();
            a[j] = _mm512_xor_si512(row, shift);
        }
        for (int j = 0; j < 8; ++j) {
            b[2 * j] = _mm512_unpacklo_epi32(a[2 * j], a[2 * j + 1]);
            b[2 * j + 1] = _mm512_unpackhi_epi32(a[2 * j], a[2 * j + 1]);
        }
        // a[4 j + i]: in lane l, four i of that lane's 4 fours (fours 4 l + i), of rows 4 j to 4 j + 3.
        for (int j = 0; j < 4; ++j) {
            a[4 * j] = _mm512_unpacklo_epi64(b[4 * j], b[4 * j + 2]);
            a[4 * j + 1] = _mm512_unpackhi_epi64(b[4 * j], b[4 * j + 2]);
            a[4 * j + 2] = _mm512_unpacklo_epi64(b[4 * j + 1], b[4 * j + 3]);
            a[4 * j + 3] = _mm512_unpackhi_epi64(b[4 * j + 1], b[4 * j + 3]);
        }
        // A 4 × 4 transpose of lanes: rows' quarters j against lanes l.
        for (int i = 0; i < 4; ++i) {
            const __m512i low01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44);
            const __m512i high01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee);
            const __m512i low23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44);
            const __m512i high23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
            b[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
            b[4 + i] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
            b[8 + i] = _mm512_shuffle_i32x4(high01, high23, 0x88);
            b[12 + i] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
        }
        for (int f = 0; f < 16; ++f) _mm512_store_si512(to + f * kColumns * 4, b[f]);
    }

    ENGINE_AVX512 static void pack(const int8_t* w,  // [columns, stride]
                                   int64_t stride, int64_t columns, int64_t kc,
                                   void* strip) {  // uint8 [kDepth / 4, 64, 4]
        for (int64_t j = 0; j < columns; j += 16) {
            for (int64_t k = 0; k < kc; k += 64) {
                pack_rows(w + j * stride + k, stride, columns - j, kc - k,
                          static_cast<uint8_t*>(strip) + k * kColumns + j * 4);
            }
        }
    }

    // R rows × V vectors of 16 outputs. Unrolled by force, else GCC keeps the sums in memory.
    template <int R, int V>
    ENGINE_AVX512 __attribute__((noinline)) static void tile_of(const int8_t* q,  // [R, stride]
                                                                int64_t stride,
                                                                const uint8_t* strip,  // [fours, 64, 4]
                                                                int64_t fours, bool add,
                                                                int32_t* sums,  // [R, width]
                                                                int64_t width, const LinesAhead* ahead) {
        __m512i acc[R][V];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                acc[r][v] = add ? _mm512_load_si512(sums + r * width + 16 * v) : _mm512_setzero_si512();
            }
        }
        const int8_t* row[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) row[r] = q + r * stride;
        const void* const* line = ahead->lines;
        const void* const* const lines_end = line + ahead->count;
        for (int64_t f = 0; f < fours; ++f) {
            if (line < lines_end) LinesAhead::ask(*line++);
            __m512i w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(strip + f * kColumns * 4 + 64 * v);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, row[r] + 4 * f, sizeof four);
                const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], w[v], x);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) _mm512_store_si512(sums + r * width + 16 * v, acc[r][v]);
        }
        while (line < lines_end) LinesAhead::ask(*line++);
    }

    template <int V>
    static void tile_rows(int64_t rows, const int8_t* q, int64_t stride, const uint8_t* strip, int64_t fours, bool add,
                          int32_t* sums, int64_t width, const LinesAhead* ahead) {
        switch (rows) {
            case 6:
                return tile_of<6, V>(q, stride, strip, fours, add, sums, width, ahead);
            case 5:
                return tile_of<5, V>(q, stride, strip, fours, add, sums, width, ahead);
            case 4:
                return tile_of<4, V>(q, stride, strip, fours, add, sums, width, ahead);
            case 3:
                return tile_of<3, V>(q, stride, strip, fours, add, sums, width, ahead);
            case 2:
                return tile_of<2, V>(q, stride, strip, fours, add, sums, width, ahead);
            default:
                return tile_of<1, V>(q, stride, strip, fours, add, sums, width, ahead);
        }
    }
    static void tile(int64_t rows, int64_t columns, const int8_t* q, int64_t stride, const void* strip, int64_t kc,
                     bool add, int32_t* sums, int64_t width, const LinesAhead* ahead) {
        const auto* w = static_cast<const uint8_t*>(strip);
        const int64_t fours = (kc + 3) / 4;  // activations end in zeros
        if (columns > 48) return tile_rows<4>(rows, q, stride, w, fours, add, sums, width, ahead);
        if (columns > 32) return tile_rows<3>(rows, q, stride, w, fours, add, sums, width, ahead);
        if (columns > 16) return tile_rows<2>(rows, q, stride, w, fours, add, sums, width, ahead);
        tile_rows<1>(rows, q, stride, w, fours, add, sums, width, ahead);
    }

    template <class T, class Acc>
    ENGINE_AVX512 static void finish(const FinishRows<T>& f, const Acc* sums, int64_t width) {
        finish_rows<128>(f, sums, width);
    }
};

}  // namespace engine
#endif
