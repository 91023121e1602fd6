// bitmap_int8_linear for 2 to 64 rows of activations on AVX-512: tiles of activations by a few rows of weights.
//
// To spread 64 weights takes as long as two or three products. The first tile multiplies what it spread while it is in
// registers, and keeps it for the others, which multiply it as if it were dense. All of them ask memory for the next
// rows of weights: the first alone would ask for more at a time than memory gives.
#pragma once

#include "common/bitmap_dot_avx512.h"
#if ENGINE_X86

namespace engine {

constexpr int64_t kBitmapBlockRows = 64;  // of activations, at most

// A pointer that moves on in a way that GCC cannot turn into several.
template <class P>
ENGINE_INLINE void next_step(P*& pointer, int64_t bytes) {
    pointer += bytes;
    asm("" : "+r"(pointer));
}

template <int most_rows, int columns>
struct BitmapTiles {
    static constexpr int64_t kRows = most_rows, kColumns = columns;
    static constexpr int64_t kSums = DotTiles<most_rows, columns, 2>::kSums;  // that a tile writes
    static constexpr int64_t kDepth = 4096;                                   // of what is kept
    static constexpr int64_t kKeptStride = kDepth + 64;  // rows a power of two apart drive each other out

    enum class Weights { spread, spread_and_kept, kept };
    struct Tile {
        const int8_t* q;  // [R, q_stride]
        int64_t q_stride;
        int64_t words;        // of 64 weights
        const uint8_t* mask;  // [columns, mask_stride], whole words; where weights are spread
        int64_t mask_stride;
        const int8_t* values[columns];  // left where they end
        int64_t ahead[columns];         // where weights are spread and not kept: how far on values are asked for; else:
        int8_t* kept;                   // [columns, kKeptStride], shifted
        const int8_t* ask[2];           // what memory is asked for, and
        int64_t pace[2];                // how much of it for each word
        const int8_t* next_q;           // what the next tile begins with
        bool add;                       // to the sums that are there
    };

    // Unrolled by force, else GCC keeps the sums in memory. Rows are addressed from the first and the fourth: an
    // address for each would take more registers than there are.
    template <int R, Weights from>
    ENGINE_AVX512 __attribute__((noinline)) static void tile_of(Tile& t,
                                                                int32_t* sums) {  // [R, columns], up to whole vectors
        constexpr bool kSpreads = from != Weights::kept;
        __m512i acc[R * columns];
#pragma GCC unroll 24
        for (auto& a : acc) a = _mm512_setzero_si512();
        const int64_t q_stride = t.q_stride, mask_stride = t.mask_stride;
        const int8_t *q = t.q, *q3 = q + 3 * q_stride, *ask0 = t.ask[0], *ask1 = t.ask[1];
        const uint8_t *mask = t.mask, *mask3 = mask + 3 * mask_stride;
        int8_t* kept = t.kept;
        const int8_t* values[columns] = {};
        if constexpr (kSpreads) {
#pragma GCC unroll 6
            for (int c = 0; c < columns; ++c) values[c] = t.values[c];
        }
        for (int64_t word = t.words; word > 0; --word) {
            __m512i w[columns];
            if constexpr (from != Weights::spread) {
                __builtin_prefetch(ask0);
                __builtin_prefetch(ask1);
                ask0 += t.pace[0], ask1 += t.pace[1];
            }
#pragma GCC unroll 6
            for (int c = 0; c < columns; ++c) {
                if constexpr (from == Weights::kept) {
                    w[c] = _mm512_load_si512(kept + c * kKeptStride);
                } else {
                    const uint8_t* at = (c < 3 ? mask : mask3) + c % 3 * mask_stride;
                    if constexpr (from == Weights::spread) {
                        __builtin_prefetch(at + columns * mask_stride);
                        __builtin_prefetch(values[c] + t.ahead[c]);
                    }
                    w[c] = expand_shifted_avx512(values[c], at);
                    if constexpr (from == Weights::spread_and_kept) _mm512_store_si512(kept + c * kKeptStride, w[c]);
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_load_si512((r < 3 ? q : q3) + r % 3 * q_stride);
#pragma GCC unroll 6
                for (int c = 0; c < columns; ++c) accumulate_avx512(acc[r * columns + c], w[c], x);
            }
            kept += 64;
            next_step(q, 64), next_step(q3, 64), next_step(mask, 8), next_step(mask3, 8);
        }
        if constexpr (kSpreads) {
#pragma GCC unroll 6
            for (int c = 0; c < columns; ++c) t.values[c] = values[c];
        }
        if constexpr (from != Weights::spread) {  // the hardware has yet to notice so many new streams
            for (int64_t line = 0; line < 3; ++line) {
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) __builtin_prefetch(t.next_q + r * q_stride + 64 * line);
            }
        }
        store_sums_avx512(acc, t.add, sums);
    }

    // `rows` of activations, at most kRows.
    template <Weights from, int R = most_rows>
    static void tile(int64_t rows, Tile& t, int32_t* sums) {
        if constexpr (R > 1) {
            if (rows < R) return tile<from, R - 1>(rows, t, sums);
        }
        tile_of<R, from>(t, sums);
    }
};

// Up to 8 rows of activations where K is short: weights row after row, spread for all activations at once, and what 16
// weight rows come to added up together. A tile of four rows of weights would take longer to begin and to end than to
// multiply.
struct BitmapRowsAvx512 {
    static constexpr int64_t kRows = 8, kColumns = 16, kMostDepth = 1024;

    // One row of weights; a function of its own, else GCC keeps the sums in memory. Returns where its values end.
    template <int R>
    ENGINE_AVX512 __attribute__((noinline)) static const int8_t* row_of(const int8_t* q,  // [R, q_stride]
                                                                        int64_t q_stride, const uint8_t* mask,
                                                                        const int8_t* values, int64_t k,
                                                                        __m512i* sums) {  // [R], kColumns apart
        const int8_t *q3 = q + 3 * q_stride, *q6 = q3 + 3 * q_stride;
        __m512i acc[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_si512();
        for (; k >= 64; k -= 64) {
            multiply<R>(acc, expand_shifted_avx512(values, mask), q, q3, q6, q_stride);
            next_step(q, 64), next_step(q3, 64), next_step(q6, 64);
            mask += 8;
        }
        if (k > 0) multiply<R>(acc, expand_shifted_avx512(values, mask_bits(mask, 0, k)), q, q3, q6, q_stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r * kColumns] = acc[r];
        return values;
    }

    template <int R>
    ENGINE_AVX512 static void rows_of(const int8_t* q,  // [R, q_stride]
                                      int64_t q_stride, const Int8Bitmap& weight, int64_t first, int64_t count,
                                      BadRow& bad,
                                      int32_t* sums) {  // [R, kColumns]
        alignas(64) __m512i column[R][kColumns];
        alignas(64) int8_t buffer[kMostDepth + kReadAhead];
        for (int64_t j = 0; j < count; ++j) {
            const int64_t row = first + j, position = weight.row_offsets[row];
            const int8_t* const start = weight.readable(position, weight.k, buffer);
            const int8_t* const end = row_of<R>(q, q_stride, weight.row_mask(row), start, weight.k, &column[0][j]);
            if (!weight.ends_well(row, position + (end - start))) bad.record(row);
        }
        for (int r = 0; r < R; ++r) {
            for (int64_t j = count; j < kColumns; ++j) column[r][j] = _mm512_setzero_si512();
            store_sums_avx512(column[r], false, sums + r * kColumns);
        }
    }

    // `rows` of activations, at most kRows, by weight rows [first, first + count), count ≤ kColumns, K ≤ kMostDepth.
    template <int R = kRows>
    static void multiply_rows(int64_t rows, const int8_t* q, int64_t q_stride, const Int8Bitmap& weight, int64_t first,
                              int64_t count, BadRow& bad, int32_t* sums) {
        if constexpr (R > 1) {
            if (rows < R) return multiply_rows<R - 1>(rows, q, q_stride, weight, first, count, bad, sums);
        }
        rows_of<R>(q, q_stride, weight, first, count, bad, sums);
    }

  private:
    template <int R>
    ENGINE_AVX512 ENGINE_INLINE static void multiply(__m512i (&acc)[R], __m512i w, const int8_t* x, const int8_t* x3,
                                                     const int8_t* x6, int64_t q_stride) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int8_t* from = r < 3 ? x : r < 6 ? x3 : x6;
            accumulate_avx512(acc[r], w, _mm512_load_si512(from + r % 3 * q_stride));
        }
    }
};

// Groups of weight rows, stretch by stretch along K, so that the activations of a stretch stay in L1.
template <class Tiles>
class BitmapBlocksAvx512 {
  public:
    static constexpr int64_t kGroup = 4 * Tiles::kColumns;  // weight rows

    BitmapBlocksAvx512(const Int8Bitmap& weight, int64_t m)
        : weight_(weight),
          m_(m),
          tiles_((m + Tiles::kRows - 1) / Tiles::kRows),
          depth_(depth(m)),
          buffer_bytes_(std::min(depth_, weight.k) + kReadAhead + 64),
          scratch_(kColumns * 2 * buffer_bytes_) {
        for (int64_t tile = 0; tile <= tiles_; ++tile) {
            row_[tile] = m * tile / tiles_;
            asked_[tile] = kColumns * tile / tiles_;
        }
        for (auto& buffer : buffers_) buffer = scratch_.template take<int8_t>(buffer_bytes_);
        mask_copy_ = scratch_.template take<uint8_t>(kColumns * mask_bytes(buffer_bytes_));
    }

    // The products of all rows of activations by weight rows [first, first + count), count ≤ kGroup. Total holds the
    // sums of all of K.
    template <class Total>
    void multiply(const QuantizedRows<int8_t>& q, int64_t first, int64_t count, BadRow& bad,
                  Total* totals) {  // [m, kGroup], zeros
        constexpr bool wide = sizeof(Total) > sizeof(int32_t);
        const int64_t words = std::max<int64_t>(1, weight_.k / 64);
        std::copy_n(weight_.row_offsets + first, count, position_);
        for (int64_t j = 0; j < count; ++j) {
            pace_[j] = (weight_.row_offsets[first + j + 1] - weight_.row_offsets[first + j]) / words + 1;
        }
        alignas(64) int32_t sums[kGroup / kColumns][kMostTiles * Tiles::kSums];
        for (int64_t k = 0; k < weight_.k; k += depth_) {
            const int64_t kc = std::min(depth_, weight_.k - k);
            for (int64_t j = 0; j < count; j += kColumns) {
                multiply_stretch(q, k, kc, first, j, std::min(kColumns, count - j), !wide && k > 0, sums[j / kColumns]);
            }
            if (!wide && k + kc < weight_.k) continue;
            for (int64_t j = 0; j < count; j += kColumns) add_to(sums[j / kColumns], totals + j);
        }
        for (int64_t j = 0; j < count; ++j) {
            if (!weight_.ends_well(first + j, position_[j])) bad.record(first + j);
        }
    }

  private:
    using Tile = typename Tiles::Tile;
    using Weights = typename Tiles::Weights;
    static constexpr int64_t kColumns = Tiles::kColumns;
    static constexpr int64_t kMostTiles = (kBitmapBlockRows + Tiles::kRows - 1) / Tiles::kRows;

    // One tile: activations in L2. Several read them, and what was kept, again: both in L1, where they fit. Shorter
    // stretches than 2048 would be summed up too often.
    static int64_t depth(int64_t m) {
        if (m <= Tiles::kRows) return std::min(kExactDepth, (128 << 10) / m / 64 * 64);
        return m <= 24 ? std::clamp<int64_t>((40 << 10) / (m + kColumns) / 64 * 64, 2048, Tiles::kDepth)
                       : Tiles::kDepth;
    }

    // The masks of a stretch: where they lie, or in a copy, where rows are missing or end within a word.
    const uint8_t* masks(int64_t row, int64_t count, int64_t k, int64_t kc, int64_t* stride) {
        if (count == kColumns && kc % 64 == 0) {
            *stride = mask_bytes(weight_.k);
            return weight_.row_mask(row) + k / 8;
        }
        *stride = (kc + 63) / 64 * 8;
        for (int64_t c = 0; c < kColumns; ++c) {
            for (int64_t i = 0; i < kc; i += 64) {
                const uint64_t bits = c < count ? mask_bits(weight_.row_mask(row + c) + k / 8, i, kc) : 0;
                std::memcpy(mask_copy_ + c * *stride + i / 8, &bits, 8);
            }
        }
        return mask_copy_;
    }

    // All rows of activations, [k, k + kc) of them, by `count` ≤ kColumns weight rows from first + j on.
    void multiply_stretch(const QuantizedRows<int8_t>& q, int64_t k, int64_t kc, int64_t first, int64_t j,
                          int64_t count, bool add, int32_t* sums) {
        Tile t{.q = q.q + k, .q_stride = q.stride, .words = (kc + 63) / 64, .add = add};
        t.mask = masks(first + j, count, k, kc, &t.mask_stride);
        const int8_t* start[kColumns];
        for (int64_t c = 0; c < kColumns; ++c) {
            // In the place of a row that is missing the first is read, with a mask of zeros.
            const int64_t row = c < count ? j + c : j, next = std::min(first + row + kColumns, weight_.n);
            t.values[c] = start[c] = weight_.readable(position_[row], kc, buffers_[c]);
            t.ahead[c] = weight_.row_offsets[next] - weight_.row_offsets[first + row];
        }
        if (tiles_ == 1) {
            Tiles::template tile<Weights::spread>(m_, t, sums);
        } else {
            multiply_tiles(q, k, j, t, sums);
        }
        for (int64_t c = 0; c < count; ++c) position_[j + c] += t.values[c] - start[c];
    }

    void multiply_tiles(const QuantizedRows<int8_t>& q, int64_t k, int64_t j, Tile& t, int32_t* sums) {
        const int8_t* next[kColumns];  // where the values of the next rows lie, about
        for (int64_t c = 0; c < kColumns; ++c) {
            next[c] = t.values[c] + t.ahead[c];
            const uint8_t* mask = t.mask + (kColumns + c) * t.mask_stride;
            for (int64_t i = 0; i < t.words * 8; i += 64) __builtin_prefetch(mask + i);
        }
        t.kept = kept_;
        for (int64_t tile = 0; tile < tiles_; ++tile) {
            for (int64_t a = 0; a < 2; ++a) {
                const bool asks = asked_[tile] + a < asked_[tile + 1];
                t.ask[a] = asks ? next[asked_[tile] + a] : kept_;
                t.pace[a] = asks ? pace_[j] : 0;
            }
            const int64_t rows = row_[tile + 1] - row_[tile];
            t.q = q.q + row_[tile] * q.stride + k;
            t.next_q = q.q + row_[(tile + 1) % tiles_] * q.stride + k;
            if (tile == 0) {
                Tiles::template tile<Weights::spread_and_kept>(rows, t, sums);
            } else {
                Tiles::template tile<Weights::kept>(rows, t, sums + tile * Tiles::kSums);
            }
        }
    }

    template <class Total>
    void add_to(const int32_t* sums, Total* totals) const {
        for (int64_t tile = 0; tile < tiles_; ++tile, sums += Tiles::kSums) {
            const int32_t* from = sums;
            for (int64_t row = row_[tile]; row < row_[tile + 1]; ++row, from += kColumns) {
                for (int64_t c = 0; c < kColumns; ++c) totals[row * kGroup + c] += from[c];
            }
        }
    }

    struct BlocksScratch;  // tag: a thread's copies of values and masks at the tensor's end

    const Int8Bitmap weight_;
    const int64_t m_, tiles_, depth_, buffer_bytes_;
    int64_t row_[kMostTiles + 1];    // of activations, where each tile begins
    int64_t asked_[kMostTiles + 1];  // which of the next weight rows it is the first to ask for
    int64_t position_[kGroup], pace_[kGroup];
    Scratch<BlocksScratch> scratch_;
    int8_t* buffers_[kColumns];
    uint8_t* mask_copy_;
    alignas(64) int8_t kept_[kColumns * Tiles::kKeptStride];
};

}  // namespace engine
#endif
