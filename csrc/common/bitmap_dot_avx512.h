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

// The same for a word that seldom has more than 32 bits: half a line is loaded then, and most loads of a whole one
// touch two lines, each of which takes a turn.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_shifted_sparse_avx512(const int8_t*& values, uint64_t bits) {
    const __m512i shift = _mm512_set1_epi8(-128);
    bits = integer_bits(bits);
    const int64_t count = popcount64(bits);
    __m512i packed;
    if (__builtin_expect(count <= 32, 1)) {
        packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    } else {
        packed = _mm512_loadu_si512(values);
    }
    values += count;
    return _mm512_mask_expand_epi8(opaque_avx512(shift), bits, _mm512_xor_si512(packed, shift));
}

// One row of activations: four sums, as one would wait for itself.
struct VectorAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 1;
    static constexpr bool kShifted = true, kReadsAhead = true;
    // How far ahead memory is asked for: masks are one stream, values another. A core needs much on its way.
    static constexpr int64_t kValuesAhead = 8 << 10, kMaskAhead = 2 << 10;
    static int64_t depth(int64_t) { return kExactDepth; }

    template <bool sparse>
    ENGINE_AVX512 static void stretch_of(const int8_t* q, Column& column, int64_t kc, int32_t* sums) {
        const uint8_t* mask = column.mask;
        const int8_t* values = column.values;
        __m512i acc[4];
        for (auto& a : acc) a = _mm512_setzero_si512();
        int64_t k = 0;
        for (; k + 256 <= kc; k += 256) {
            uint64_t bits[4];
            std::memcpy(bits, mask + k / 8, 32);
            __builtin_prefetch(mask + k / 8 + kMaskAhead);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                // Fewer values are asked for less often.
                if (!sparse || i % 2 == 0) __builtin_prefetch(values + kValuesAhead);
                const __m512i w =
                    sparse ? expand_shifted_sparse_avx512(values, bits[i]) : expand_shifted_avx512(values, bits[i]);
                acc[i] = _mm512_dpbusd_epi32(acc[i], w, _mm512_load_si512(q + k + 64 * i));
            }
        }
        for (; k < kc; k += 64) {
            const __m512i w = expand_shifted_avx512(values, mask_bits(mask, k, kc));
            acc[0] = _mm512_dpbusd_epi32(acc[0], w, _mm512_load_si512(q + k));
        }
        column.values = values;
        sums[0] = _mm512_reduce_add_epi32(
            _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3])));
    }

    static void stretch(const int8_t* q, int64_t, int64_t, Column* columns, int64_t kc, int32_t* sums) {
        // values_ahead is what the whole row holds, mask_ahead an eighth of its K. With a third kept at random one word
        // in 400 has more than 32 bits; a branch that is mispredicted costs as much as several words.
        const bool sparse = columns[0].values_ahead * 3 <= columns[0].mask_ahead * 8;
        if (sparse) return stretch_of<true>(q, columns[0], kc, sums);
        stretch_of<false>(q, columns[0], kc, sums);
    }
};

// More rows of activations, four rows of weights at a time. To spread 64 weights takes as long as two or three
// products: the first tile of up to 6 rows multiplies what it spread while it is in registers, and keeps it for the
// others, which multiply it as if it were dense. All of them ask memory for the next four rows of weights: the first
// alone would ask for more at a time than memory gives.
struct MatrixAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 4;
    static constexpr int64_t kRows = 6;  // of activations to a tile: 24 sums in registers
    static constexpr bool kShifted = true, kReadsAhead = true;
    static constexpr int64_t kDepth = 4096,
                             kKeptStride = kDepth + 64;  // rows a power of two apart drive each other out

    static int64_t rows(int64_t k) { return DotTilesAvx512::rows(k); }
    // One tile: activations in L2. Several read them, and what was kept, again: both in L1, where they fit. Shorter
    // stretches than 2048 would be summed up too often.
    static int64_t depth(int64_t m) {
        if (m <= kRows) return std::min(kExactDepth, (128 << 10) / m / 64 * 64);
        return m <= 24 ? std::clamp<int64_t>((40 << 10) / (m + kColumns) / 64 * 64, 2048, kDepth) : kDepth;
    }

    enum class Weights { spread, spread_and_kept, kept };
    struct Tile {
        const int8_t* q;  // [R, q_stride]
        int64_t q_stride;
        Column* columns;  // [kColumns]: where weights are spread
        int64_t kc;
        int8_t* kept;          // [kColumns, kKeptStride], shifted
        const int8_t* ask[2];  // what memory is asked for, and how much of it for each 64 weights
        int64_t pace[2];
        const int8_t* next_q;  // what the next tile begins with
    };

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int R, Weights from>
    ENGINE_AVX512 ENGINE_INLINE static void step(const uint64_t (&bits)[kColumns], const int64_t (&ahead)[kColumns],
                                                 const int8_t* (&values)[kColumns], const int8_t* q, int64_t q_stride,
                                                 int8_t* kept, __m512i (&acc)[R * kColumns]) {
        __m512i w[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            if constexpr (from == Weights::kept) {
                w[c] = _mm512_load_si512(kept + c * kKeptStride);
            } else {
                if constexpr (from == Weights::spread) __builtin_prefetch(values[c] + ahead[c]);
                w[c] = expand_shifted_avx512(values[c], bits[c]);
                if constexpr (from == Weights::spread_and_kept) _mm512_store_si512(kept + c * kKeptStride, w[c]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_load_si512(q + r * q_stride);
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) accumulate_avx512(acc[r * kColumns + c], w[c], x);
        }
    }

    // The 16 lanes of each sum added up.
    template <int R>
    ENGINE_AVX512 ENGINE_INLINE static void store_sums(const __m512i (&acc)[R * kColumns], int32_t* sums) {
        __m512i row[(R + 3) / 4 * 4];  // each row's four sums, spread over four lanes
#pragma GCC unroll 8
        for (int r = 0; r < (R + 3) / 4 * 4; ++r) row[r] = add_lanes_avx512(acc + (r < R ? r : 0) * kColumns);
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 4) _mm512_storeu_si512(sums + r * kColumns, add_quarters_avx512(row + r));
    }

    template <int R, Weights from>
    ENGINE_AVX512 __attribute__((noinline)) static void tile(const Tile& t,
                                                             int32_t* sums) {  // [R up to a multiple of 4, kColumns]
        constexpr bool kSpreads = from != Weights::kept;
        __m512i acc[R * kColumns];
#pragma GCC unroll 24
        for (auto& a : acc) a = _mm512_setzero_si512();
        const int8_t *q = t.q, *ask0 = t.ask[0], *ask1 = t.ask[1];
        int8_t* kept = t.kept;
        const int64_t q_stride = t.q_stride, kc = t.kc, whole = kc / 64 * 64, pace0 = t.pace[0], pace1 = t.pace[1];
        const int8_t* values[kColumns] = {};
        const uint8_t* mask[kColumns] = {};
        int64_t ahead[kColumns] = {};
        uint64_t bits[kColumns] = {}, rest[kColumns] = {};
        int64_t mask_ahead = 0, mask_row = 0;
        if constexpr (kSpreads) {
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
                const Column& column = t.columns[c];
                values[c] = column.values, mask[c] = column.mask, ahead[c] = column.values_ahead;
                rest[c] = mask_bits(mask[c], whole, kc);
            }
            mask_ahead = t.columns[0].mask_ahead, mask_row = mask_ahead / kColumns;
        }
        for (int64_t k = 0; k < whole; k += 64, q += 64) {
            if constexpr (kSpreads) {
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) {
                    std::memcpy(&bits[c], mask[c] + k / 8, 8);
                    if constexpr (from == Weights::spread) __builtin_prefetch(mask[c] + k / 8 + mask_ahead);
                }
                // Where products decide: a line holds eight words, and each row's is asked for twice.
                if constexpr (from != Weights::spread) {
                    __builtin_prefetch(mask[0] + mask_ahead + k / 8 + k / 64 % kColumns * mask_row);
                }
            }
            if constexpr (from != Weights::spread) {
                __builtin_prefetch(ask0);
                __builtin_prefetch(ask1);
                ask0 += pace0, ask1 += pace1;
            }
            step<R, from>(bits, ahead, values, q, q_stride, kept, acc);
            kept += 64;
        }
        if (whole < kc) step<R, from>(rest, ahead, values, q, q_stride, kept, acc);
        if constexpr (kSpreads) {
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) t.columns[c].values = values[c];
        }
        if constexpr (from != Weights::spread) {  // the hardware has yet to notice so many new streams
            for (int64_t line = 0; line < 3; ++line) {
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) __builtin_prefetch(t.next_q + r * q_stride + 64 * line);
            }
        }
        store_sums<R>(acc, sums);
    }

    // `rows` ≤ kRows of activations.
    template <Weights from, int R = kRows>
    static void tile_of(int64_t rows, const Tile& t, int32_t* sums) {
        if constexpr (R > 1) {
            if (rows < R) return tile_of<from, R - 1>(rows, t, sums);
        }
        tile<R, from>(t, sums);
    }

    static void stretch(const int8_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        Tile t{q, q_stride, columns, kc, nullptr, {q, q}, {0, 0}, q};
        if (m <= kRows) return one_tile(m, t, sums);
        alignas(64) int8_t kept[kColumns * kKeptStride];
        t.kept = kept;
        const int64_t tiles = (m + kRows - 1) / kRows;
        const int8_t* next[kColumns];  // where the values of the next four rows lie, about
        int64_t pace[kColumns];        // and how many of them belong to 64 weights
        for (int c = 0; c < kColumns; ++c) {
            next[c] = columns[c].values + columns[c].values_ahead;
            pace[c] = columns[c].values_ahead * 8 / columns[c].mask_ahead + 1;
        }
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t row = m * i / tiles, end = m * (i + 1) / tiles;
            const int64_t first = kColumns * i / tiles, asked = kColumns * (i + 1) / tiles - first;
            for (int64_t a = 0; a < 2; ++a) {
                t.ask[a] = a < asked ? next[first + a] : kept;
                t.pace[a] = a < asked ? pace[first + a] : 0;
            }
            t.q = q + row * q_stride;
            t.next_q = q + end % m * q_stride;
            int32_t part[(kRows + 3) / 4 * 4 * kColumns];
            if (i == 0) {
                tile_of<Weights::spread_and_kept>(end - row, t, part);
            } else {
                tile_of<Weights::kept>(end - row, t, part);
            }
            std::copy_n(part, (end - row) * kColumns, sums + row * kColumns);
        }
    }

    static void one_tile(int64_t m, const Tile& t, int32_t* sums) {
        int32_t part[(kRows + 3) / 4 * 4 * kColumns];
        tile_of<Weights::spread>(m, t, part);
        std::copy_n(part, m * kColumns, sums);
    }
};

}  // namespace engine
#endif
