// The kernels of common/bitmap_dot.h for AVX2.
#pragma once

#include "common/bitmap_dot.h"
#include "common/dot_bytes_avx2.h"
#if ENGINE_X86
#include <immintrin.h>

namespace engine {

ENGINE_AVX2 ENGINE_INLINE __m256i load_avx2(const void* from) {
    return _mm256_load_si256(static_cast<const __m256i*>(from));
}

// One row of activations.
template <class Bytes>
struct VectorAvx2 {
    using Q = int8_t;
    static constexpr int kColumns = 1;
    static constexpr int kShift = 0;
    static constexpr bool kReadsAhead = true;
    static int64_t depth(int64_t) { return kExactDepth; }

    ENGINE_AVX2 ENGINE_INLINE static void half(const __m128i* part, const int8_t* q, __m256i& acc) {
        const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
        Bytes::add(acc, _mm256_abs_epi8(w), w, load_avx2(q));
    }

    ENGINE_AVX2 ENGINE_INLINE static void step(uint64_t bits, const int8_t* q, const int8_t*& values,
                                               __m256i (&acc)[2]) {
        const Expanded64 w = expand_64_avx2(values, bits);
        half(w.part, q, acc[0]);
        half(w.part + 2, q + 32, acc[1]);
        values += w.taken;
    }

    ENGINE_AVX2 static void stretch(const int8_t* q, int64_t, int64_t, Column* columns, int64_t kc, int32_t* sums) {
        const uint8_t* mask = columns[0].mask;
        const int8_t* values = columns[0].values;
        __m256i acc[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        int64_t k = 0;
        for (; k + 64 <= kc; k += 64) {
            __builtin_prefetch(values + kValuesAhead);
            uint64_t bits;
            std::memcpy(&bits, mask + k / 8, 8);
            step(bits, q + k, values, acc);
        }
        if (k < kc) step(mask_bits(mask, k, kc), q + k, values, acc);
        columns[0].values = values;
        sums[0] = horizontal_sum_avx2(_mm256_add_epi32(acc[0], acc[1]));
    }
};

// What multiplies 32 weights w of a column, by R rows of activations.
struct PairsAvx2 {  // as 16-bit integers
    using Q = int16_t;
    static constexpr int64_t kRows = 4;
    static constexpr int kShift = 0;

    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void multiply_16(__m128i w, const int16_t* q, int64_t q_stride,
                                                      __m256i (&acc)[R]) {
        const __m256i wide = _mm256_cvtepi8_epi16(w);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) accumulate_avx2(acc[r], _mm256_madd_epi16(wide, load_avx2(q + r * q_stride)));
    }
    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void multiply(__m128i low, __m128i high, const int16_t* q, int64_t q_stride,
                                                   __m256i (&acc)[R]) {
        multiply_16<R>(low, q, q_stride, acc);
        multiply_16<R>(high, q + 16, q_stride, acc);
    }
};
struct BytesAvxVnni {  // made unsigned
    using Q = int8_t;
    static constexpr int64_t kRows = 6;
    static constexpr int kShift = 128;

    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void multiply(__m128i low, __m128i high, const int8_t* q, int64_t q_stride,
                                                   __m256i (&acc)[R]) {
        const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        const __m256i shifted = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            accumulate_avx_vnni(acc[r], shifted, reinterpret_cast<const __m256i*>(q + r * q_stride));
        }
    }
};

// A few rows of activations, which multiply what was spread while it is in registers.
template <class Products>
struct MatrixAvx2 {
    using Q = typename Products::Q;
    static constexpr int kColumns = 4, kShift = Products::kShift;
    static constexpr int64_t kRows = Products::kRows;
    static constexpr bool kReadsAhead = false;
    static int64_t depth(int64_t m) { return m > 2 ? 2048 : 4096; }  // at most 16 KB of activations

    // R rows of activations by columns 0 and 1.
    template <int R>
    ENGINE_AVX2 static void direct(const Q* q, int64_t q_stride, Column* columns, int64_t kc, int32_t* sums) {
        __m256i acc[2][R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) acc[0][r] = acc[1][r] = _mm256_setzero_si256();
        const uint8_t *mask0 = columns[0].mask, *mask1 = columns[1].mask;
        const int8_t *values0 = columns[0].values, *values1 = columns[1].values;
        for (int64_t k = 0; k < kc; k += 64, q += 64) {
            const uint64_t bits0 = mask_bits(mask0, k, kc), bits1 = mask_bits(mask1, k, kc);
            const Prefix64 before0 = prefix_64(bits0), before1 = prefix_64(bits1);
            Products::template multiply<R>(expand_part_avx2<0>(values0, bits0),
                                           expand_part_avx2<1>(values0 + before0.of[1], bits0), q, q_stride, acc[0]);
            Products::template multiply<R>(expand_part_avx2<0>(values1, bits1),
                                           expand_part_avx2<1>(values1 + before1.of[1], bits1), q, q_stride, acc[1]);
            Products::template multiply<R>(expand_part_avx2<2>(values0 + before0.of[2], bits0),
                                           expand_part_avx2<3>(values0 + before0.of[3], bits0), q + 32, q_stride,
                                           acc[0]);
            Products::template multiply<R>(expand_part_avx2<2>(values1 + before1.of[2], bits1),
                                           expand_part_avx2<3>(values1 + before1.of[3], bits1), q + 32, q_stride,
                                           acc[1]);
            values0 += before0.of[4];
            values1 += before1.of[4];
        }
        columns[0].values = values0;
        columns[1].values = values1;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < 2; ++c) sums[r * kColumns + c] = horizontal_sum_avx2(acc[c][r]);
        }
    }

    template <int R = kRows>
    static void direct_of(int64_t m, const Q* q, int64_t q_stride, Column* columns, int64_t kc, int32_t* sums) {
        if constexpr (R > 1) {
            if (m < R) return direct_of<R - 1>(m, q, q_stride, columns, kc, sums);
        }
        direct<R>(q, q_stride, columns, kc, sums);
    }

    static void stretch(const Q* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        direct_of(m, q, q_stride, columns, kc, sums);
        direct_of(m, q, q_stride, columns + 2, kc, sums + 2);
    }
};

}  // namespace engine
#endif
