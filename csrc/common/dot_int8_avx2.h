// Dot products of int8 weights as they lie with a few rows of activations, for AVX2, by Winograd's identity as in
// common/gemm_int8_avx2.h: (x0 + w1) (x1 + w0) = x0 w0 + x1 w1 + x0 x1 + w0 w1. Here element i of each block of 32 is
// partnered with i + 16. Four rows of weights are widened to 16 bits once and multiply all rows of activations, in
// stretches of K short enough that both stay in L1.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "common/int8_activations.h"

namespace engine {

struct WinogradDots {
    static constexpr int kColumns = 4;              // weight rows side by side
    static constexpr int64_t kMaxRows = 64;         // of activations
    static constexpr int64_t kMaxDepth = 1536;      // of K at once
    static constexpr int64_t kL1Values = 12 << 10;  // 16-bit values that share L1: 24 KB

    static int64_t depth(int64_t rows) {
        return std::clamp<int64_t>(kL1Values / (rows + kColumns) / 32 * 32, 192, kMaxDepth);
    }

    // The sum of x0 x1 over a row of activations.
    ENGINE_AVX2 static int64_t row_sum(const int16_t* q,  // [stride]
                                       int64_t stride) {
        int64_t sum = 0;
        for (int64_t begin = 0; begin < stride; begin += kExactDepth) {
            __m256i part = _mm256_setzero_si256();
            for (int64_t i = begin; i < std::min(stride, begin + kExactDepth); i += 32) {
                const auto* x = reinterpret_cast<const __m256i*>(q + i);
                part = _mm256_add_epi32(part, _mm256_madd_epi16(_mm256_load_si256(x), _mm256_load_si256(x + 1)));
            }
            sum += sum_lanes_avx2(part);
        }
        return sum;
    }

    // Adds the four lanes of each of four vectors: one sum a vector.
    ENGINE_AVX2 ENGINE_INLINE static __m128i sums_of(__m256i a, __m256i b, __m256i c, __m256i d) {
        const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    }

    // Widens a block and returns the sums of w0 w1 of its rows. Zeros beyond kc, up to a multiple of 32, and in rows
    // that are missing.
    ENGINE_AVX2 static __m128i widen(const int8_t* w,  // [columns, stride]
                                     int64_t stride, int64_t columns, int64_t kc,
                                     int64_t ahead,  // how far on memory is asked for
                                     int16_t* to) {  // [kColumns, kMaxDepth]
        const int64_t whole = kc / 32 * 32;
        __m256i sum[kColumns];
        for (int64_t j = 0; j < kColumns; ++j) {
            const int8_t* from = w + j * stride;
            auto* out = reinterpret_cast<__m256i*>(to + j * kMaxDepth);
            __m256i part = _mm256_setzero_si256();
            int64_t k = 0;
            for (; k < whole && j < columns; k += 32, out += 2) {
                const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
                const __m256i high =
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k + 16)));
                __builtin_prefetch(from + k + ahead, 0, 2);
                _mm256_store_si256(out, low);
                _mm256_store_si256(out + 1, high);
                part = _mm256_add_epi32(part, _mm256_madd_epi16(low, high));
            }
            for (; k < kc; k += 32, out += 2) {
                alignas(32) int8_t rest[32] = {};
                if (j < columns) std::copy(from + k, from + kc, rest);  // fewer than 32
                const auto* bytes = reinterpret_cast<const __m128i*>(rest);
                const __m256i low = _mm256_cvtepi8_epi16(_mm_load_si128(bytes));
                const __m256i high = _mm256_cvtepi8_epi16(_mm_load_si128(bytes + 1));
                _mm256_store_si256(out, low);
                _mm256_store_si256(out + 1, high);
                part = _mm256_add_epi32(part, _mm256_madd_epi16(low, high));
            }
            sum[j] = part;
        }
        return sums_of(sum[0], sum[1], sum[2], sum[3]);
    }

    // The stretch's sums of products, less those of w0 w1, added to the totals of one row of activations.
    ENGINE_AVX2 ENGINE_INLINE static void add_to(int64_t* totals,  // [kColumns]
                                                 __m128i sums, __m128i w_sums) {
        auto* total = reinterpret_cast<__m256i*>(totals);
        const __m256i part = _mm256_cvtepi32_epi64(_mm_sub_epi32(sums, w_sums));
        _mm256_store_si256(total, _mm256_add_epi64(_mm256_load_si256(total), part));
    }

    // One row of activations by four of weights.
    ENGINE_AVX2 static void row_tile(const int16_t* q,  // [kc]
                                     const int16_t* w,  // [kColumns, kMaxDepth]
                                     int64_t kc, __m128i w_sums,
                                     int64_t* totals) {  // [kColumns]
        __m256i acc[kColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) acc[j] = _mm256_setzero_si256();
        for (int64_t k = 0; k < kc; k += 32) {
            const __m256i x0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + k));
            const __m256i x1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + k + 16));
#pragma GCC unroll 4
            for (int j = 0; j < kColumns; ++j) {
                const auto* pair = reinterpret_cast<const __m256i*>(w + j * kMaxDepth + k);
                const __m256i a = _mm256_add_epi16(x0, _mm256_load_si256(pair + 1));
                const __m256i b = _mm256_add_epi16(x1, _mm256_load_si256(pair));
                acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(a, b));
            }
        }
        add_to(totals, sums_of(acc[0], acc[1], acc[2], acc[3]), w_sums);
    }

    // Two rows by four: all 16 registers. Left to itself GCC reads x again for each product instead of keeping it.
    ENGINE_AVX2 static void pair_tile(const int16_t* q,  // [2, stride]
                                      int64_t stride,
                                      const int16_t* w,  // [kColumns, kMaxDepth]
                                      int64_t kc, __m128i w_sums,
                                      int64_t* totals) {  // [2, kColumns]
        __m256i first[kColumns], second[kColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) first[j] = second[j] = _mm256_setzero_si256();
        for (int64_t k = 0; k < kc; k += 32) {
            const auto* x = reinterpret_cast<const __m256i*>(q + k);
            const auto* y = reinterpret_cast<const __m256i*>(q + stride + k);
            const __m256i x0 = _mm256_load_si256(x), x1 = _mm256_load_si256(x + 1);
            const __m256i y0 = _mm256_load_si256(y), y1 = _mm256_load_si256(y + 1);
#pragma GCC unroll 4
            for (int j = 0; j < kColumns; ++j) {
                const auto* pair = reinterpret_cast<const __m256i*>(w + j * kMaxDepth + k);
                __m256i a, b, c, d;
                asm volatile(
                    "vmovdqa %[w1], %[a]\n\t"
                    "vmovdqa %[w0], %[b]\n\t"
                    "vpaddw %[a], %[x0], %[c]\n\t"
                    "vpaddw %[b], %[x1], %[d]\n\t"
                    "vpaddw %[a], %[y0], %[a]\n\t"
                    "vpaddw %[b], %[y1], %[b]\n\t"
                    "vpmaddwd %[c], %[d], %[c]\n\t"
                    "vpmaddwd %[a], %[b], %[a]\n\t"
                    "vpaddd %[c], %[first], %[first]\n\t"
                    "vpaddd %[a], %[second], %[second]"
                    : [first] "+x"(first[j]), [second] "+x"(second[j]), [a] "=&x"(a), [b] "=&x"(b), [c] "=&x"(c),
                      [d] "=&x"(d)
                    : [x0] "x"(x0), [x1] "x"(x1), [y0] "x"(y0), [y1] "x"(y1), [w0] "m"(pair[0]), [w1] "m"(pair[1]));
            }
        }
        add_to(totals, sums_of(first[0], first[1], first[2], first[3]), w_sums);
        add_to(totals + kColumns, sums_of(second[0], second[1], second[2], second[3]), w_sums);
    }

    // Outputs [begin, end) of every row.
    template <class T>
    ENGINE_AVX2 static void outputs(const LinearCall<T>& call, const QuantizedRows<int16_t>& rows,
                                    const int64_t* row_sums,  // [m]
                                    const int8_t* weight,     // [n, k]
                                    int64_t begin, int64_t end) {
        alignas(64) int16_t wide[kColumns * kMaxDepth];
        alignas(64) int64_t sums[kMaxRows * kColumns];
        const int64_t step = depth(call.m), ahead = std::max<int64_t>(8 << 10, kColumns * call.k);
        for (int64_t column = begin; column < end; column += kColumns) {
            const int64_t columns = std::min<int64_t>(kColumns, end - column);
            for (int64_t i = 0; i < call.m * kColumns; ++i) sums[i] = -row_sums[i / kColumns];
            for (int64_t k = 0; k < call.k; k += step) {
                const int64_t kc = std::min(step, call.k - k);
                const __m128i w_sums = widen(weight + column * call.k + k, call.k, columns, kc, ahead, wide);
                int64_t row = 0;
                for (; row + 2 <= call.m; row += 2) {
                    pair_tile(rows.q + row * rows.stride + k, rows.stride, wide, kc, w_sums, sums + row * kColumns);
                }
                if (row < call.m) {
                    row_tile(rows.q + row * rows.stride + k, wide, kc, w_sums, sums + row * kColumns);
                }
            }
            for (int64_t row = 0; row < call.m; ++row) {
                T* to = call.y + row * call.n + column;
                for (int64_t j = 0; j < columns; ++j) {
                    to[j] = linear_output(sums[row * kColumns + j], rows.scale[row], call, column + j);
                }
            }
        }
    }
};

}  // namespace engine
#endif
