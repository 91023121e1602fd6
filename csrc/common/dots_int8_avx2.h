// A microkernel of common/gemm_int8.h for AVX2 and a few rows of activations: dot products by Winograd's identity (see
// common/gemm_int8_avx2.h), of weights where they lie.
//
// Lanes go along K, 16 values of a row at a time, whose partners are the next 16. Up to 11 rows of activations stay in
// L1 and are multiplied by one row of weights after the other, as memory operands of the additions. Weights are widened
// in registers, which costs as much as a quarter of a row of activations, and nothing is packed.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <cstring>

#include "common/gemm_int8.h"

namespace engine {

struct DotsAvx2 {
    using Q = int16_t;
    static constexpr int64_t kRows = 11, kColumns = 128, kStrips = 1;
    static constexpr int64_t kGrain = 4;     // what the columns of a group may be a multiple of
    static constexpr int64_t kDepth = 1088;  // 24 KB of activations
    static constexpr bool kAsk = false;

    // Up to so many rows of activations it is faster than panels. Beyond, what it reads from L1 is the limit, all the
    // more where two threads share one. Adding up lanes costs as much as 100 of K.
    static int64_t rows(int64_t k) { return k < 256 ? 16 : k < 1024 ? 24 : 40; }

    static constexpr int64_t kStep = 32;  // of K, what one of the identities below covers in all lanes

    // Weights where they lie, which have to stay there while they are multiplied.
    struct Strip {
        const int8_t* w;  // [rows, stride]
        int64_t stride;
        bool summed;                   // whether `products` holds them yet
        int32_t products[kColumns];    // the sums of w0 w1 of each row
        int8_t tail[kColumns][kStep];  // the last weights of rows that don't end with a step, and zeros
    };
    static constexpr int64_t kStripBytes = (sizeof(Strip) + 63) / 64 * 64;

    static void pack(const int8_t* w,  // [rows, stride]
                     int64_t stride, int64_t rows, int64_t kc, void* to) {
        auto& strip = *static_cast<Strip*>(to);
        strip.w = w;
        strip.stride = stride;
        strip.summed = false;
        const int64_t rest = kc % kStep;
        if (rest == 0) return;
        for (int64_t j = 0; j < rows; ++j) {
            std::memset(strip.tail[j], 0, kStep);
            std::memcpy(strip.tail[j], w + j * stride + kc - rest, rest);
        }
    }

    // acc += (x0 + w1) (x1 + w0). As assembly, since GCC would load all rows' activations ahead of the products and run
    // out of registers; marked volatile, instructions stay in their order.
    ENGINE_AVX2 ENGINE_INLINE static void accumulate(__m256i& acc, const int16_t* x, __m256i w0, __m256i w1) {
        __m256i a, b;
        asm volatile(
            "vpaddw %[x0], %[w1], %[a]\n\t"
            "vpaddw %[x1], %[w0], %[b]\n\t"
            "vpmaddwd %[b], %[a], %[a]\n\t"
            "vpaddd %[a], %[acc], %[acc]"
            : [acc] "+x"(acc), [a] "=&x"(a), [b] "=&x"(b)
            : [w0] "x"(w0), [w1] "x"(w1), [x0] "m"(*reinterpret_cast<const int16_t (*)[16]>(x)),
              [x1] "m"(*reinterpret_cast<const int16_t (*)[16]>(x + 16)));
    }
    ENGINE_AVX2 ENGINE_INLINE static void accumulate_weights(__m256i& acc, __m256i w0, __m256i w1) {
        __m256i product;
        asm volatile(
            "vpmaddwd %[w1], %[w0], %[product]\n\t"
            "vpaddd %[product], %[acc], %[acc]"
            : [acc] "+x"(acc), [product] "=&x"(product)
            : [w0] "x"(w0), [w1] "x"(w1));
    }

    // The sums of R rows of activations by one row of weights, and where `first` that of the weights' own products;
    // spread over the lanes of R + 1 vectors.
    template <int R, bool first>
    ENGINE_AVX2 ENGINE_INLINE static void dot(const int16_t* q, int64_t stride, const int8_t* w, int64_t whole,
                                              const int8_t* tail,  // or null
                                              int64_t ahead,       // what to ask for: so far from w
                                              __m256i (&acc)[R + 1]) {
#pragma GCC unroll 12
        for (int r = 0; r <= R; ++r) acc[r] = _mm256_setzero_si256();
        const int16_t *x0 = q, *x3 = q + 3 * stride, *x6 = q + 6 * stride, *x9 = q + 9 * stride;
        const int8_t* end = w + whole;
        for (;;) {
            for (; w < end; w += kStep, x0 += kStep, x3 += kStep, x6 += kStep, x9 += kStep) {
                __builtin_prefetch(w + ahead, 0, 2);
                const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
                const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16)));
                if constexpr (first) accumulate_weights(acc[R], w0, w1);
#pragma GCC unroll 11
                for (int r = 0; r < R; ++r) {
                    const int16_t* x = (r < 3 ? x0 : r < 6 ? x3 : r < 9 ? x6 : x9) + r % 3 * stride;
                    accumulate(acc[r], x, w0, w1);
                }
            }
            if (tail == nullptr) return;
            w = tail;
            end = tail + kStep;
            ahead = 0;
            tail = nullptr;
        }
    }

    template <int R, bool first>
    ENGINE_AVX2 __attribute__((noinline)) static void tile_of(const int16_t* q,  // [R, stride]
                                                              int64_t stride, Strip& strip, int64_t columns, int64_t kc,
                                                              bool add,
                                                              int32_t* sums,  // [R, width]
                                                              int64_t width, const LinesAhead* lines) {
        constexpr int kVectors = R / 4 + 1;  // of R + 1 sums
        alignas(16) int32_t column[kColumns][4 * kVectors];
        const int64_t whole = kc / kStep * kStep;
        for (int64_t j = 0; j < columns; ++j) {
            const int8_t* w = strip.w + j * strip.stride;
            const int64_t ahead = lines == nullptr ? 0 : lines->distance(j, w);
            __m256i acc[R + 1];
            dot<R, first>(q, stride, w, whole, whole < kc ? strip.tail[j] : nullptr, ahead, acc);
            __m128i four[kVectors];
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
                four[v] = add_lanes_avx2(acc[std::min(4 * v, R)], acc[std::min(4 * v + 1, R)],
                                         acc[std::min(4 * v + 2, R)], acc[std::min(4 * v + 3, R)]);
            }
            if constexpr (first) strip.products[j] = _mm_extract_epi32(four[R / 4], R % 4);
            const __m128i products = _mm_set1_epi32(strip.products[j]);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
                _mm_store_si128(reinterpret_cast<__m128i*>(column[j] + 4 * v), _mm_sub_epi32(four[v], products));
            }
        }
        for (int64_t j = columns; j % 4 != 0; ++j) std::memset(column[j], 0, sizeof column[j]);
        for (int64_t j = 0; j < columns; j += 4) {
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
                __m128i a[4];
                for (int i = 0; i < 4; ++i) a[i] = _mm_load_si128(reinterpret_cast<__m128i*>(column[j + i] + 4 * v));
                const __m128i low[] = {_mm_unpacklo_epi32(a[0], a[1]), _mm_unpacklo_epi32(a[2], a[3])};
                const __m128i high[] = {_mm_unpackhi_epi32(a[0], a[1]), _mm_unpackhi_epi32(a[2], a[3])};
                const __m128i row[] = {_mm_unpacklo_epi64(low[0], low[1]), _mm_unpackhi_epi64(low[0], low[1]),
                                       _mm_unpacklo_epi64(high[0], high[1]), _mm_unpackhi_epi64(high[0], high[1])};
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    if (4 * v + i >= R) continue;
                    auto* to = reinterpret_cast<__m128i*>(sums + (4 * v + i) * width + j);
                    _mm_storeu_si128(to, add ? _mm_add_epi32(_mm_loadu_si128(to), row[i]) : row[i]);
                }
            }
        }
    }

    template <int R = kRows>
    static void tile_rows(int64_t rows, const int16_t* q, int64_t stride, Strip& strip, int64_t columns, int64_t kc,
                          bool add, int32_t* sums, int64_t width, const LinesAhead* lines) {
        if constexpr (R > 1) {
            if (rows < R) return tile_rows<R - 1>(rows, q, stride, strip, columns, kc, add, sums, width, lines);
        }
        if (strip.summed) return tile_of<R, false>(q, stride, strip, columns, kc, add, sums, width, lines);
        tile_of<R, true>(q, stride, strip, columns, kc, add, sums, width, lines);
        strip.summed = true;
    }
    // Reads activations up to a multiple of kStep. sums up to a multiple of 4 columns are written.
    static void tile(int64_t rows, int64_t columns, const int16_t* q, int64_t stride, void* strip, int64_t kc, bool add,
                     int32_t* sums, int64_t width, const LinesAhead* lines = nullptr) {
        tile_rows(rows, q, stride, *static_cast<Strip*>(strip), columns, kc, add, sums, width, lines);
    }

    // What a row's sums are too large by.
    ENGINE_AVX2 static int64_t activation_sum(const int16_t* q,  // [stride]
                                              int64_t stride) {
        int64_t sum = 0;
        for (int64_t begin = 0; begin < stride; begin += kExactDepth) {
            const int64_t end = std::min(stride, begin + kExactDepth);
            __m256i part = _mm256_setzero_si256();
            for (int64_t k = begin; k < end; k += kStep) {
                const auto* x = reinterpret_cast<const __m256i*>(q + k);
                part = _mm256_add_epi32(part, _mm256_madd_epi16(_mm256_load_si256(x), _mm256_load_si256(x + 1)));
            }
            sum += sum_lanes_avx2(part);
        }
        return sum;
    }

    template <class T, class Acc>
    ENGINE_AVX2 static void finish(const FinishRows<T>& f, const Acc* sums, int64_t width) {
        finish_rows<1>(f, sums, width);
    }
};

}  // namespace engine
#endif
