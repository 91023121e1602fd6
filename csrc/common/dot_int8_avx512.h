// int8_linear for a few rows of activations on AVX-512: dot products straight from the weights. What is read from
// memory is one stream for each thread, in the order in which it lies there, whatever order the products are made in:
// that is what memory delivers fastest, by a tenth to a third here than four rows side by side.
#pragma once

#include "common/dot_int8.h"
#include "common/gemm_int8.h"

namespace engine {

#if ENGINE_X86

constexpr int64_t kDotBlock = 64;  // outputs that are finished together

// R rows of activations by row after row of weights. Four lines at a time, each with its own sum: one after the other
// they would wait for each other.
struct DotRowsAvx512 {
    static constexpr int64_t kRows = 2, kColumns = 16;

    template <int R>
    ENGINE_AVX512 __attribute__((noinline)) static void multiply(
        const int8_t* q,  // [R, q_stride]
        int64_t q_stride,
        const int8_t* w,  // [columns, stride]
        int64_t stride, int64_t kc,
        int64_t columns,  // at most kColumns
        int32_t* sums) {  // [R, kColumns], 128 · (sum of q) too large
        constexpr int kLines = 4;
        constexpr int64_t kAhead = 4096;
        const __m512i shift = _mm512_set1_epi8(-128);
        const int64_t whole = kc / 64 * 64, fours = kc / (64 * kLines) * (64 * kLines);
        const __mmask64 inside = whole < kc ? ~uint64_t{0} >> (64 - (kc - whole)) : 0;
        alignas(64) __m512i column[R][kColumns];
        for (int64_t j = 0; j < columns; ++j, w += stride) {
            __m512i acc[R][kLines];
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int i = 0; i < kLines; ++i) acc[r][i] = _mm512_setzero_si512();
            }
            int64_t k = 0;
            for (; k < fours; k += 64 * kLines) {
#pragma GCC unroll 4
                for (int i = 0; i < kLines; ++i) {
                    __builtin_prefetch(w + k + 64 * i + kAhead);
                    const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(w + k + 64 * i), shift);
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) {
                        accumulate_avx512(acc[r][i], weights, _mm512_load_si512(q + r * q_stride + k + 64 * i));
                    }
                }
            }
            for (; k < kc; k += 64) {
                const __mmask64 lanes = k < whole ? ~uint64_t{0} : inside;
                const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(lanes, w + k), shift);
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) {
                    accumulate_avx512(acc[r][0], weights, _mm512_load_si512(q + r * q_stride + k));
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                column[r][j] =
                    _mm512_add_epi32(_mm512_add_epi32(acc[r][0], acc[r][1]), _mm512_add_epi32(acc[r][2], acc[r][3]));
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int64_t j = columns; j < kColumns; ++j) column[r][j] = _mm512_setzero_si512();
            __m512i four[4];
            for (int i = 0; i < 4; ++i) four[i] = add_lanes_avx512(column[r] + 4 * i);
            _mm512_storeu_si512(sums + r * kColumns, add_quarters_avx512(four));
        }
    }
};

// Tiles of activations by blocks of weights.
class DotBlocksAvx512 {
  public:
    using Q = int8_t;
    using Tiles = DotTiles<3>;

    static int64_t rows(int64_t k) { return Tiles::rows(k); }

    // Where the weights serve several tiles, K is cut so that the activations stay in L1, with the weights of a tile
    // and what is asked for: from L2 they would come at 6 lines for 12 cycles of products. Outputs are taken by groups
    // of four, so that a cut serves several.
    DotBlocksAvx512(int64_t m, int64_t k)
        : m_(m), k_(k), tiles_((m + Tiles::kRows - 1) / Tiles::kRows), depth_(depth(m, k)) {
        groups_ = depth_ < k ? kGroups : 1;
        const int64_t block = outputs() * std::max<int64_t>(1, k);
        ahead_ = (kAhead + block - 1) / block * block;
        asked_ = (kDotColumns + tiles_ - 1) / tiles_;
        ahead_step_ = (64 * kDotColumns + tiles_ - 1) / tiles_;
    }

    // The products of all rows of activations by `columns` rows of weights, at most kDotBlock.
    template <class Total>
    void multiply(const QuantizedRows<int8_t>& q, const int8_t* weight, int64_t columns,
                  Total* totals) const {  // [m, kDotBlock]
        int64_t j = 0;
        if (m_ > DotRowsAvx512::kRows) {
            while (columns - j >= kDotColumns) {
                const int64_t groups = std::min(groups_, (columns - j) / kDotColumns);
                multiply_groups(q, weight + j * k_, groups, totals + j);
                j += groups * kDotColumns;
            }
        }
        for (; j < columns; j += DotRowsAvx512::kColumns) {
            multiply_rows(q, weight + j * k_, std::min(DotRowsAvx512::kColumns, columns - j), totals + j);
        }
    }

  private:
    static constexpr int64_t kGroups = 4;
    static constexpr int64_t kAhead = 8 << 10;
    static constexpr int64_t kL1Bytes = 16 << 10;  // of L1, what activations may take
    static constexpr int64_t kMostTiles = (64 + Tiles::kRows - 1) / Tiles::kRows;
    static constexpr int64_t kTileSums = (Tiles::kRows + 3) / 4 * 4 * kDotColumns;
    static constexpr int64_t kGroupSums = kMostTiles * kTileSums;

    static int64_t depth(int64_t m, int64_t k) {
        if (m <= Tiles::kRows) return std::min(k, kExactDepth);
        const int64_t most = std::clamp<int64_t>(kL1Bytes / m / 64 * 64, 768, kExactDepth);
        const int64_t cuts = (k + most - 1) / most;
        return cuts > 0 ? ((k + 63) / 64 + cuts - 1) / cuts * 64 : 0;
    }
    int64_t outputs() const { return groups_ * kDotColumns; }

    // What stretches of K add up to. In int32, which holds the sums of kExactDepth, or stretch by stretch in int64.
    static void add(int32_t sum, int32_t* total) { *total = sum; }
    static void add(int32_t sum, int64_t* total) { *total += sum; }

    template <class Total>
    void multiply_rows(const QuantizedRows<int8_t>& q, const int8_t* w, int64_t columns, Total* totals) const {
        constexpr int64_t kRows = DotRowsAvx512::kRows, kColumns = DotRowsAvx512::kColumns;
        for (int64_t row = 0; row < m_; row += kRows) {
            for (int64_t k = 0; k < k_; k += kExactDepth) {
                const int64_t kc = std::min(kExactDepth, k_ - k), count = std::min(kRows, m_ - row);
                alignas(64) int32_t sums[kRows * kColumns];
                const int8_t* x = q.q + row * q.stride + k;
                if (count == 1) {
                    DotRowsAvx512::multiply<1>(x, q.stride, w + k, k_, kc, columns, sums);
                } else {
                    DotRowsAvx512::multiply<2>(x, q.stride, w + k, k_, kc, columns, sums);
                }
                for (int64_t r = 0; r < count; ++r) {
                    for (int64_t j = 0; j < columns; ++j) {
                        add(sums[r * kColumns + j], &totals[(row + r) * kDotBlock + j]);
                    }
                }
            }
        }
    }

    template <class Total>
    void multiply_groups(const QuantizedRows<int8_t>& q, const int8_t* w, int64_t groups, Total* totals) const {
        constexpr bool wide = sizeof(Total) > sizeof(int32_t);
        alignas(64) int32_t sums[kGroups * kGroupSums];
        const int8_t* ahead = w + ahead_;
        for (int64_t k = 0; k < k_; k += depth_) {
            const int64_t kc = std::min(depth_, k_ - k);
            const bool ends = k + kc >= k_;
            for (int64_t group = 0; group < groups; ++group) {
                const int8_t* from = w + group * kDotColumns * k_ + k;
                const bool last = group + 1 == groups;
                const int64_t next_k = !last ? k : ends ? 0 : k + kc;
                const int8_t* next = !last ? from + kDotColumns * k_ : ends ? w + outputs() * k_ : w + next_k;
                multiply_tiles(q, k, kc, from, ahead, q.q + next_k, next, !wide && k > 0, sums + group * kGroupSums);
                ahead += kDotColumns * kc;
            }
            if (!wide && !ends) continue;
            for (int64_t group = 0; group < groups; ++group) {
                add_group(sums + group * kGroupSums, totals + group * kDotColumns);
            }
        }
    }

    // All rows of activations, [k, k + kc) of them, by four rows of weights.
    void multiply_tiles(const QuantizedRows<int8_t>& q, int64_t k, int64_t kc, const int8_t* w, const int8_t* ahead,
                        const int8_t* next_q, const int8_t* next_w, bool add, int32_t* sums) const {
        for (int64_t tile = 0, row = 0; tile < tiles_; ++tile) {
            const int64_t count = tile_rows(tile, row), after = row + count;
            const bool last = after == m_;
            dot_tile<Tiles>(count,
                            {.q = q.q + row * q.stride + k,
                             .q_stride = q.stride,
                             .w = w,
                             .stride = k_,
                             .kc = kc,
                             .ahead = ahead + tile * kDotColumns * kc / tiles_,
                             .ahead_stride = ahead_step_ / asked_,
                             .asked = asked_,
                             .next_q = last ? next_q : q.q + after * q.stride + k,
                             .next_w = last ? next_w : w,
                             .ahead_step = ahead_step_,
                             .add = add},
                            sums + tile * kTileSums);
            row = after;
        }
    }

    // Tiles as even as can be: one row alone uses the registers badly.
    int64_t tile_rows(int64_t tile, int64_t row) const { return (m_ - row + tiles_ - tile - 1) / (tiles_ - tile); }

    template <class Total>
    void add_group(const int32_t* sums, Total* totals) const {
        for (int64_t tile = 0, row = 0; tile < tiles_; ++tile, sums += kTileSums) {
            const int64_t count = tile_rows(tile, row);
            for (int64_t r = 0; r < count; ++r, ++row) {
                for (int64_t j = 0; j < kDotColumns; ++j) add(sums[r * kDotColumns + j], &totals[row * kDotBlock + j]);
            }
        }
    }

    int64_t m_, k_, tiles_, depth_, groups_;
    int64_t ahead_;       // how far ahead memory is asked: all of a block, or of several
    int64_t asked_;       // lines of it at a step of a tile, and
    int64_t ahead_step_;  // the bytes that they cover, so that a group's tiles ask for as much as the group reads
};

#endif

}  // namespace engine
