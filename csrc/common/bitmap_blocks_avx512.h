// bitmap_int8_linear for a few rows of activations on AVX-512.
#pragma once

#include "common/spread_blocks_avx512.h"
#if ENGINE_X86

namespace engine {

// A bitmap's weights for common/spread_blocks_avx512.h.
template <int columns>
class BitmapBlocksAvx512 {
  public:
    static constexpr bool kInTile = true;
    static constexpr int64_t kTallRows = 10;

    BitmapBlocksAvx512(const Int8Bitmap& weight, int64_t m, BadRow& bad)
        : weight_(weight), bad_(bad), scratch_(columns * 2 * buffer_bytes(weight, m)) {
        const int64_t bytes = buffer_bytes(weight, m);
        for (auto& buffer : buffers_) buffer = scratch_.template take<int8_t>(bytes);
        mask_copy_ = scratch_.template take<uint8_t>(columns * mask_bytes(bytes));
    }

    void begin(int64_t first, int64_t count) {
        first_ = first;
        std::copy_n(weight_.row_offsets + first, count, position_);
        const int64_t words = std::max<int64_t>(1, weight_.k / 64);
        for (int64_t j = 0; j < count; ++j) {
            pace_[j] = (weight_.row_offsets[first + j + 1] - weight_.row_offsets[first + j]) / words + 1;
        }
    }

    template <class Tile>
    void prepare(Tile& t, int64_t j, int64_t count, int64_t k, int64_t kc) {
        k_ = k;
        t.mask = masks(first_ + j, count, k, kc, &t.mask_stride);
        for (int64_t c = 0; c < columns; ++c) {
            // In the place of a row that is missing the first is read, with a mask of zeros.
            const int64_t row = c < count ? j + c : j, next = std::min(first_ + row + columns, weight_.n);
            t.values[c] = start_[c] = weight_.readable(position_[row], kc, buffers_[c]);
            t.ahead[c] = weight_.row_offsets[next] - weight_.row_offsets[first_ + row];
        }
    }

    template <class Tile>
    const int8_t* next(const Tile& t, int64_t, int64_t c) const {
        return t.values[c] + t.ahead[c];
    }
    int64_t pace(int64_t j) const { return pace_[j]; }
    template <class Tile>
    ENGINE_INLINE void ask_places(const Tile& t, int64_t j) const {
        const int64_t row_bytes = mask_bytes(weight_.k);
        const uint8_t* mask = weight_.row_mask(first_ + j + columns) + k_ / 8;
        for (int64_t c = 0; c < columns; ++c, mask += row_bytes) {
            for (int64_t i = 0; i < t.words * 8; i += 64) __builtin_prefetch(mask + i);
        }
    }

    template <class Tile>
    void done(const Tile& t, int64_t j, int64_t count) {
        for (int64_t c = 0; c < count; ++c) position_[j + c] += t.values[c] - start_[c];
    }
    void end(int64_t first, int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
            if (!weight_.ends_well(first + j, position_[j])) bad_.record(first + j);
        }
    }

  private:
    struct BlocksScratch;  // tag: a thread's copies of values and masks at the tensor's end

    static int64_t buffer_bytes(const Int8Bitmap& weight, int64_t m) {
        using Tiles = std::conditional_t<columns == TallTiles::kColumns, TallTiles, WideTiles>;
        return SpreadBlocksAvx512<Tiles, BitmapBlocksAvx512>::depth(m, weight.k) + kReadAhead;
    }

    // The masks of a stretch: where they lie, or in a copy, where rows are missing or end within a word.
    const uint8_t* masks(int64_t row, int64_t count, int64_t k, int64_t kc, int64_t* stride) {
        if (count == columns && kc % 64 == 0) {
            *stride = mask_bytes(weight_.k);
            return weight_.row_mask(row) + k / 8;
        }
        *stride = (kc + 63) / 64 * 8;
        for (int64_t c = 0; c < columns; ++c) {
            for (int64_t i = 0; i < kc; i += 64) {
                const uint64_t bits = c < count ? mask_bits(weight_.row_mask(row + c) + k / 8, i, kc) : 0;
                std::memcpy(mask_copy_ + c * *stride + i / 8, &bits, 8);
            }
        }
        return mask_copy_;
    }

    const Int8Bitmap weight_;
    BadRow& bad_;
    int64_t first_ = 0, k_ = 0, position_[4 * columns], pace_[4 * columns];
    const int8_t* start_[columns];
    Scratch<BlocksScratch> scratch_;
    int8_t* buffers_[columns];
    uint8_t* mask_copy_;
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

}  // namespace engine
#endif
