// The kernels of common/bitmap_dot.h for AVX-512.
#pragma once

#include "common/bitmap_dot.h"
#if ENGINE_X86
#include <immintrin.h>

#include "common/dot_int8.h"
#include "common/registers_avx512.h"

namespace engine {

// 64 weights, shifted to unsigned.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_shifted_avx512(const int8_t*& values, uint64_t bits) {
    const __m512i shift = _mm512_set1_epi8(-128);  // which is what 0 becomes
    const __m512i packed = _mm512_xor_si512(_mm512_loadu_si512(values), shift);
    bits = integer_bits(bits);
    values += popcount64(bits);
    return _mm512_mask_expand_epi8(opaque_avx512(shift), bits, packed);
}

// One row of activations: four sums, as one would wait for itself.
struct VectorAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 1;
    static constexpr bool kShifted = true, kReadsAhead = true;
    static int64_t depth(int64_t) { return kExactDepth; }

    ENGINE_AVX512 static void stretch(const int8_t* q, int64_t, int64_t, Column* columns, int64_t kc, int32_t* sums) {
        const uint8_t* mask = columns[0].mask;
        const int8_t* values = columns[0].values;
        __m512i acc[4];
        for (auto& a : acc) a = _mm512_setzero_si512();
        int64_t k = 0;
        for (; k + 256 <= kc; k += 256) {
            uint64_t bits[4];
            std::memcpy(bits, mask + k / 8, 32);
            __builtin_prefetch(mask + k / 8 + kMaskAhead);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __builtin_prefetch(values + kValuesAhead);
                const __m512i w = expand_shifted_avx512(values, bits[i]);
                acc[i] = _mm512_dpbusd_epi32(acc[i], w, _mm512_load_si512(q + k + 64 * i));
            }
        }
        for (; k < kc; k += 64) {
            const __m512i w = expand_shifted_avx512(values, mask_bits(mask, k, kc));
            acc[0] = _mm512_dpbusd_epi32(acc[0], w, _mm512_load_si512(q + k));
        }
        columns[0].values = values;
        sums[0] = _mm512_reduce_add_epi32(
            _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3])));
    }
};

ENGINE_AVX512 ENGINE_INLINE __m256i add_halves_avx512(__m512i v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
ENGINE_AVX512 ENGINE_INLINE __m128i horizontal_sums_avx512(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m256i low = _mm256_hadd_epi32(add_halves_avx512(a), add_halves_avx512(b));
    const __m256i high = _mm256_hadd_epi32(add_halves_avx512(c), add_halves_avx512(d));
    const __m256i all = _mm256_hadd_epi32(low, high);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// A few rows of activations. To spread 64 weights takes as long as two or three products: what was spread serves up to
// 12 rows while it is in registers, and activations that were loaded serve several columns.
struct MatrixAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 4;
    static constexpr int64_t kFour = 6, kTwo = 12;  // rows of activations up to which a tile takes 4 columns, and 2
    static constexpr bool kShifted = true, kReadsAhead = true;
    static int64_t depth(int64_t m) { return std::min(kExactDepth, (128 << 10) / m / 64 * 64); }  // activations in L2

    // 64 weights of C rows by R rows of activations. Unrolled by force, else GCC keeps the sums in memory. What was
    // spread is kept in `out` where there are tiles to come; these ask for memory then.
    template <int R, int C, int64_t kept>
    ENGINE_AVX512 ENGINE_INLINE static void step(const uint64_t (&bits)[C], const int64_t (&ahead)[C],
                                                 const int8_t* (&values)[C], const int8_t* q, int64_t q_stride,
                                                 int8_t* out,  // [C, kept], or nothing where kept is 0
                                                 __m512i (&acc)[R * C]) {
        __m512i w[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            if constexpr (kept == 0) __builtin_prefetch(values[c] + ahead[c]);
            w[c] = expand_shifted_avx512(values[c], bits[c]);
            if constexpr (kept != 0) {
                _mm512_store_si512(out + c * kept, _mm512_xor_si512(w[c], _mm512_set1_epi8(-128)));
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_load_si512(q + r * q_stride);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) accumulate_avx512(acc[r * C + c], w[c], x);
        }
    }

    template <int R, int C, int64_t kept = 0>
    ENGINE_AVX512 __attribute__((noinline)) static void tile(const int8_t* q, int64_t q_stride, Column* columns,
                                                             int64_t kc,
                                                             int32_t* sums,  // [R, kColumns]
                                                             int8_t* out = nullptr) {
        __m512i acc[R * C];
#pragma GCC unroll 24
        for (auto& a : acc) a = _mm512_setzero_si512();
        const int8_t* values[C];
        const uint8_t* mask[C];
        int64_t ahead[C];
        uint64_t bits[C], rest[C];
        const int64_t whole = kc / 64 * 64;
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            values[c] = columns[c].values, mask[c] = columns[c].mask, ahead[c] = columns[c].values_ahead;
            rest[c] = mask_bits(mask[c], whole, kc);
        }
        for (int64_t k = 0; k < whole; k += 64, q += 64) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                std::memcpy(&bits[c], mask[c] + k / 8, 8);
                __builtin_prefetch(mask[c] + k / 8 + columns[0].mask_ahead);
            }
            step<R, C, kept>(bits, ahead, values, q, q_stride, kept ? out + k : nullptr, acc);
        }
        if (whole < kc) step<R, C, kept>(rest, ahead, values, q, q_stride, kept ? out + whole : nullptr, acc);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c].values = values[c];
        alignas(16) int32_t flat[(R * C + 3) / 4 * 4];
#pragma GCC unroll 6
        for (int i = 0; i < R * C; i += 4) {
            constexpr int last = R * C - 1;
            const __m128i sum = horizontal_sums_avx512(acc[i], acc[std::min(i + 1, last)], acc[std::min(i + 2, last)],
                                                       acc[std::min(i + 3, last)]);
            _mm_store_si128(reinterpret_cast<__m128i*>(flat + i), sum);
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sums[r * kColumns + c] = flat[r * C + c];
        }
    }

    // m ≤ kTwo
    static void stretch(const int8_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        using Tile = void (*)(const int8_t*, int64_t, Column*, int64_t, int32_t*, int8_t*);
        constexpr Tile kTiles[] = {tile<1, 4>, tile<2, 4>, tile<3, 4>, tile<4, 4>,  tile<5, 4>,  tile<6, 4>,
                                   tile<7, 2>, tile<8, 2>, tile<9, 2>, tile<10, 2>, tile<11, 2>, tile<12, 2>};
        if (m <= kFour) return kTiles[m - 1](q, q_stride, columns, kc, sums, nullptr);
        for (int c = 0; c < kColumns; c += 2) kTiles[m - 1](q, q_stride, columns + c, kc, sums + c, nullptr);
    }
};

// More rows of activations: the first tile multiplies four weight rows as it spreads them, and keeps them for the
// others, which multiply them as if they were dense. Those ask memory for the next four: with the first alone it would
// be more at a time than memory gives.
struct SpreadAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = kDotColumns;
    static constexpr bool kShifted = true, kReadsAhead = true;
    static constexpr int64_t kDepth = 8192;
    static int64_t depth(int64_t) { return kDepth; }
    static int64_t rows(int64_t k) { return DotTilesAvx512::rows(k); }

    static void stretch(const int8_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        constexpr int64_t kStride = kDepth + 64;  // not a power of two: rows would drive each other out of the cache
        alignas(64) int8_t w[kColumns * kStride];
        const int8_t* next[kColumns];  // where the values of the next four rows lie, about
        for (int c = 0; c < kColumns; ++c) next[c] = columns[c].values + columns[c].values_ahead;
        constexpr int64_t kFirst = MatrixAvx512::kFour;
        MatrixAvx512::tile<kFirst, kColumns, kStride>(q, q_stride, columns, kc, sums, w);
        constexpr int64_t kRows = DotTilesAvx512::kRows;
        const int64_t tiles = (m - kFirst + kRows - 1) / kRows;  // at least two, as m > kTwo
        const int64_t asked = tiles < kColumns ? 2 : 1;  // rows that a tile asks for, so that the first ask for all
        for (int64_t tile = 0, row = kFirst; tile < tiles; ++tile) {
            const int64_t count = (m - row + tiles - tile - 1) / (tiles - tile), first = tile * asked;
            const bool asks = first < kColumns;
            int32_t part[(kRows + 3) / 4 * 4 * kColumns];
            dot_tile<DotTilesAvx512>(count,
                                     {.q = q + row * q_stride,
                                      .q_stride = q_stride,
                                      .w = w,
                                      .stride = kStride,
                                      .kc = kc,
                                      .ahead = asks ? next[first] : w,
                                      .ahead_stride = asks && asked == 2 ? next[first + 1] - next[first] : 0,
                                      .asked = asks ? asked : 0,
                                      .next_q = q + (row + count) % m * q_stride,
                                      .next_w = w},
                                     part);
            std::copy_n(part, count * kColumns, sums + row * kColumns);
            row += count;
        }
    }
};

}  // namespace engine
#endif
