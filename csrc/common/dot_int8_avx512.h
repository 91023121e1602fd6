// int8_linear for a few rows of activations on AVX-512: dot products straight from the weights. What is read from
// memory is one stream for each thread, in the order in which it lies there, whatever order the products are made in:
// that is what memory delivers fastest, by a tenth to a third here than four rows side by side.
#pragma once

#include "common/dot_int8.h"
#include "common/gemm_int8.h"
#include "common/round.h"

namespace engine {

constexpr int64_t kInt8DotRows = 128;  // at most so many rows of activations

#if ENGINE_X86

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
            store_sums_avx512(column[r], false, sums + r * kColumns);
        }
    }
};

// Tiles of activations by blocks of weights.
//
// From L2 the activations of a tile of 6 x 4 would come at 6 lines for 12 cycles of products (Zen 5), more than it
// delivers beside what comes from memory. Where weights serve few tiles, K is cut so that the activations stay in L1,
// and outputs are taken by several groups, for all of which a stretch is done before the next. Else tiles are wide,
// which reads the activations less often, and K is cut so that the weights of a tile stay in L1.
//
// Memory is asked either for what lies one block of weights further on, in its order, as much at each step as that step
// reads; or, where one or two tiles read a piece of weights, for the piece some 12 KB further on in the order of
// reading: it is in L1 still when its turn comes. For three tiles and more that was slower.
template <class Tiles>
class DotBlocksAvx512 {
  public:
    DotBlocksAvx512(int64_t m, int64_t k) : m_(m), k_(k), tiles_(divide_up(m, Tiles::kRows)), depth_(depth(m, k)) {
        groups_ = kStays && depth_ < k ? kMostGroups : 1;
        const int64_t block = groups_ * Tiles::kColumns * std::max<int64_t>(1, k), piece = Tiles::kColumns * depth_;
        pieces_ahead_ = kStays && depth_ < k && tiles_ <= 2 ? divide_up(kPiecesAhead, piece) : 0;
        blocks_ahead_ = round_up(kAhead, block);
        asked_ = std::min<int64_t>(4, divide_up(Tiles::kColumns, tiles_));
        ahead_step_ = divide_up(64 * Tiles::kColumns, tiles_);
    }

    // The products of all rows of activations by `columns` rows of weights, at most kDotBlock.
    template <class Total>
    void multiply(const QuantizedRows<int8_t>& q, const int8_t* weight, int64_t columns,
                  Total* totals) const {  // [m, kDotBlock]
        int64_t j = 0;
        if (m_ > DotRowsAvx512::kRows) {
            while (columns - j >= Tiles::kColumns) {
                const int64_t groups = std::min(groups_, (columns - j) / Tiles::kColumns);
                multiply_groups(q, weight + j * k_, groups, totals + j);
                j += groups * Tiles::kColumns;
            }
        }
        for (; j < columns; j += DotRowsAvx512::kColumns) {
            multiply_rows(q, weight + j * k_, std::min(DotRowsAvx512::kColumns, columns - j), totals + j);
        }
    }

  private:
    // Which side stays in L1 along a stretch of K: the activations if true, the weights of a tile if false.
    static constexpr bool kStays = Tiles::kRows > Tiles::kColumns;
    static constexpr int64_t kMostGroups = kStays ? 4 : 1;
    static constexpr int64_t kAhead = 8 << 10, kPiecesAhead = 12 << 10;
    static constexpr int64_t kL1Bytes = 16 << 10;  // of L1, what activations may take where K is cut for them
    static constexpr int64_t kMostTiles = divide_up(kInt8DotRows, Tiles::kRows);
    static constexpr int64_t kGroupSums = kMostTiles * Tiles::kSums;

    static int64_t depth(int64_t m, int64_t k) {
        int64_t most = 4096;
        if (kStays)
            most = m * k <= kL1Bytes * 3 / 2 ? kExactDepth : std::max<int64_t>(round_down(kL1Bytes / m, 64), 768);
        const int64_t cuts = divide_up(k, most);
        return cuts > 1 ? divide_up(divide_up(k, 64), cuts) * 64 : k;
    }

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
        alignas(64) int32_t sums[kMostGroups * kGroupSums];
        const int64_t group_bytes = Tiles::kColumns * k_;
        const int8_t* const next_block = w + groups * group_bytes;
        const int8_t* ahead = w + blocks_ahead_;
        for (int64_t k = 0, cut = 0; k < k_; k += depth_, ++cut) {
            const int64_t kc = std::min(depth_, k_ - k);
            const bool ends = k + kc >= k_;
            for (int64_t group = 0; group < groups; ++group, ahead += Tiles::kColumns * kc) {
                const int8_t* from = w + group * group_bytes + k;
                const bool last = group + 1 == groups;
                const int64_t next_k = !last ? k : ends ? 0 : k + kc;
                const int8_t* next = !last ? from + group_bytes : ends ? next_block : w + next_k;
                const int8_t* asked = ahead;
                if (pieces_ahead_ > 0) {
                    const int64_t piece = cut * groups + group + pieces_ahead_;
                    const int64_t there = piece % groups * group_bytes, at = piece / groups * depth_;
                    asked = at < k_ ? w + there + at : next_block + there;
                }
                multiply_tiles(q, k, kc, from, asked, q.q + next_k, next, !wide && k > 0, sums + group * kGroupSums);
            }
            if (!wide && !ends) continue;
            for (int64_t group = 0; group < groups; ++group) {
                add_group(sums + group * kGroupSums, totals + group * Tiles::kColumns);
            }
        }
    }

    // All rows of activations, [k, k + kc) of them, by the rows of weights of a tile.
    void multiply_tiles(const QuantizedRows<int8_t>& q, int64_t k, int64_t kc, const int8_t* w, const int8_t* ahead,
                        const int8_t* next_q, const int8_t* next_w, bool add, int32_t* sums) const {
        const bool rows_ahead = pieces_ahead_ > 0;
        for (int64_t tile = 0, row = 0; tile < tiles_; ++tile) {
            const int64_t count = tile_rows(tile, row), after = row + count;
            const bool last = after == m_;
            dot_tile<Tiles>(count,
                            {.q = q.q + row * q.stride + k,
                             .q_stride = q.stride,
                             .w = w,
                             .stride = k_,
                             .kc = kc,
                             .ahead = ahead + (rows_ahead ? tile * asked_ * k_ : tile * Tiles::kColumns * kc / tiles_),
                             .ahead_stride = rows_ahead ? k_ : ahead_step_ / asked_,
                             .asked = asked_,
                             .next_q = last ? next_q : q.q + after * q.stride + k,
                             .next_w = last ? next_w : w,
                             .ahead_step = rows_ahead ? 64 : ahead_step_,
                             .add = add},
                            sums + tile * Tiles::kSums);
            row = after;
        }
    }

    // Tiles of nearly equal height: a tile of one row would leave most registers idle.
    int64_t tile_rows(int64_t tile, int64_t row) const { return divide_up(m_ - row, tiles_ - tile); }

    template <class Total>
    void add_group(const int32_t* sums, Total* totals) const {
        for (int64_t tile = 0, row = 0; tile < tiles_; ++tile, sums += Tiles::kSums) {
            const int64_t count = tile_rows(tile, row);
            for (int64_t r = 0; r < count; ++r, ++row) {
                for (int64_t j = 0; j < Tiles::kColumns; ++j) {
                    add(sums[r * Tiles::kColumns + j], &totals[row * kDotBlock + j]);
                }
            }
        }
    }

    int64_t m_, k_, tiles_;
    int64_t depth_;   // how much of K is multiplied at once
    int64_t groups_;  // of outputs; a stretch of K is multiplied for all of them before the next stretch
    // Memory is asked for the piece of weights (one group by one stretch) that is read pieces_ahead_ pieces later. If
    // that is 0, it is asked instead for what lies blocks_ahead_ bytes further on, at the same speed as it is read.
    int64_t pieces_ahead_, blocks_ahead_;
    int64_t asked_;       // lines asked for at a step of a tile
    int64_t ahead_step_;  // the bytes that they cover
};

#endif

}  // namespace engine
