// int8 linears of sparse weights for a few rows of activations on AVX-512: tiles of activations by a few rows of
// weights that are spread once.
//
// To spread 64 weights takes as long as two or three products. Of a bitmap the first tile multiplies what it spread
// while it is in registers, and keeps it for the others, which multiply it as if it were dense. All tiles ask memory
// for the next rows of weights: one alone would ask for more at a time than memory gives.
#pragma once

#include "common/bitmap_dot_avx512.h"
#include "common/gemm_int8_avx512.h"
#include "common/round.h"
#if ENGINE_X86

namespace engine {

constexpr int64_t kSpreadBlockRows = 160;  // of activations, at most

// A pointer that moves on in a way that GCC cannot turn into several.
template <class P>
ENGINE_INLINE void next_step(P*& pointer, int64_t bytes) {
    pointer += bytes;
    asm("" : "+r"(pointer));
}

// Up to so many rows of activations it is the faster way: adding 16 lanes up costs as much as 160 of K.
constexpr int64_t spread_block_rows(int64_t k) { return k < 1024 ? 16 : k < 4096 ? 64 : kSpreadBlockRows; }

template <int most_rows, int columns>
struct SpreadTiles {
    static constexpr int64_t kRows = most_rows, kColumns = columns;
    static constexpr int64_t kSums = DotTiles<most_rows, columns, 2>::kSums;  // that a tile writes
    static constexpr int64_t kDepth = 4096;                                   // of what is kept

    enum class Weights { spread, spread_and_kept, kept };
    struct Tile {
        static constexpr int64_t kKeptStride = kDepth + 64;  // rows a power of two apart drive each other out
        const int8_t* q;                                     // [R, q_stride]
        int64_t q_stride;
        int64_t words;        // of 64 weights
        const uint8_t* mask;  // [columns, mask_stride], whole words; where weights are spread
        int64_t mask_stride;
        const int8_t* values[columns];  // left where they end
        // Weights that are spread and not kept ask memory for values `ahead` bytes further on. In the other two cases
        // memory is asked for two streams, which begin at `ask` and go on by `pace` bytes for each word.
        int64_t ahead[columns];
        int8_t* kept;  // [columns, kKeptStride]: spread weights, shifted
        const int8_t* ask[2];
        int64_t pace[2];
        const int8_t* next_q;  // what the next tile begins with
        bool add;              // to the sums that are there
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
                    w[c] = _mm512_load_si512(kept + c * Tile::kKeptStride);
                } else {
                    const uint8_t* at = (c < 3 ? mask : mask3) + c % 3 * mask_stride;
                    if constexpr (from == Weights::spread) {
                        __builtin_prefetch(at + columns * mask_stride);
                        __builtin_prefetch(values[c] + t.ahead[c]);
                    }
                    w[c] = expand_shifted_avx512(values[c], at);
                    if constexpr (from == Weights::spread_and_kept)
                        _mm512_store_si512(kept + c * Tile::kKeptStride, w[c]);
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

// Groups of weight rows, stretch by stretch along K, so that the activations of a stretch stay in L1. What the weights
// are is said by a class:
//
//   kInTile                   whether a tile spreads them, else prepare() does
//   kTallRows                 up to so many rows of activations tall tiles are the faster ones
//   begin(first, count)       a group of at most 4 kColumns rows begins, all of K to come
//   prepare(t, j, count, k, kc)  readies the stretch [k, k + kc) of rows first + j to first + j + count, kColumns at
//                             most. With kInTile it says where the tile finds masks and values, and what to ask memory
//                             for; without, it spreads the rows to t.kept
//   next(j, c)                where the values of the row kColumns after row j + c lie, about
//   pace(j)                   how many bytes of row j belong to 64 weights, about
//   ask_places(t, j)          asks for the masks, or metadata, of a stretch of these next rows. It is inlined by force,
//                             as GCC drops the call of a function that only asks memory for something
//   done(t, j, count)         the stretch was multiplied
//   end(first, count)         and the group
template <class Tiles, class Weights>
class SpreadBlocksAvx512 {
  public:
    static constexpr int64_t kGroup = 4 * Tiles::kColumns;  // weight rows

    SpreadBlocksAvx512(Weights& weights, int64_t m, int64_t k)
        : weights_(weights), m_(m), k_(k), tiles_(divide_up(m, Tiles::kRows)), depth_(depth(m, k)) {
        for (int64_t tile = 0; tile <= tiles_; ++tile) {
            row_[tile] = m * tile / tiles_;
            asked_[tile] = kColumns * tile / tiles_;
        }
    }

    // How much of K at once: of one tile as much as leaves activations in L2. Several tiles read them, and what was
    // kept, again: both in L1, where they fit. Shorter stretches than 2048 would be summed up too often. All of one
    // length, or nearly.
    static int64_t depth(int64_t m, int64_t k) {
        int64_t most = Tiles::kDepth;
        if (Weights::kInTile && m <= Tiles::kRows) {
            most = std::min(kExactDepth, (128 << 10) / m);
        } else if (m <= 24) {
            most = std::clamp<int64_t>((40 << 10) / (m + kColumns), 2048, Tiles::kDepth);
        }
        const int64_t words = divide_up(k, 64), cuts = std::max<int64_t>(1, divide_up(words, most / 64));
        return std::max<int64_t>(1, divide_up(words, cuts)) * 64;
    }

    // The products of all rows of activations by weight rows [first, first + count), count ≤ kGroup. Total holds the
    // sums of all of K.
    template <class Total>
    void multiply(const QuantizedRows<int8_t>& q, int64_t first, int64_t count,
                  Total* totals) {  // [m, kGroup], zeros
        constexpr bool wide = sizeof(Total) > sizeof(int32_t);
        weights_.begin(first, count);
        alignas(64) int32_t sums[kGroup / kColumns][kMostTiles * Tiles::kSums];
        for (int64_t k = 0; k < k_; k += depth_) {
            const int64_t kc = std::min(depth_, k_ - k);
            for (int64_t j = 0; j < count; j += kColumns) {
                multiply_stretch(q, k, kc, j, std::min(kColumns, count - j), !wide && k > 0, sums[j / kColumns]);
            }
            if (!wide && k + kc < k_) continue;
            for (int64_t j = 0; j < count; j += kColumns) add_to(sums[j / kColumns], totals + j);
        }
        weights_.end(first, count);
    }

  private:
    using Tile = typename Tiles::Tile;
    using From = typename Tiles::Weights;
    static constexpr int64_t kColumns = Tiles::kColumns;
    static constexpr int64_t kMostTiles = divide_up(kSpreadBlockRows, Tiles::kRows);

    // All rows of activations, [k, k + kc) of them, by `count` ≤ kColumns weight rows.
    void multiply_stretch(const QuantizedRows<int8_t>& q, int64_t k, int64_t kc, int64_t j, int64_t count, bool add,
                          int32_t* sums) {
        Tile t{};
        t.q = q.q + k;
        t.q_stride = q.stride;
        t.words = divide_up(kc, 64);
        t.kept = kept_;
        t.add = add;
        weights_.prepare(t, j, count, k, kc);
        if (Weights::kInTile && tiles_ == 1) {
            Tiles::template tile<From::spread>(m_, t, sums);
        } else {
            multiply_tiles(q, k, j, t, sums);
        }
        weights_.done(t, j, count);
    }

    void multiply_tiles(const QuantizedRows<int8_t>& q, int64_t k, int64_t j, Tile& t, int32_t* sums) {
        const int8_t* next[kColumns];
        for (int64_t c = 0; c < kColumns; ++c) next[c] = weights_.next(t, j, c);
        weights_.ask_places(t, j);
        const int64_t pace = weights_.pace(j);
        for (int64_t tile = 0; tile < tiles_; ++tile) {
            for (int64_t a = 0; a < 2; ++a) {
                const bool asks = asked_[tile] + a < asked_[tile + 1];
                t.ask[a] = asks ? next[asked_[tile] + a] : kept_;
                t.pace[a] = asks ? pace : 0;
            }
            const int64_t rows = row_[tile + 1] - row_[tile];
            t.q = q.q + row_[tile] * q.stride + k;
            t.next_q = q.q + row_[(tile + 1) % tiles_] * q.stride + k;
            if (Weights::kInTile && tile == 0) {
                Tiles::template tile<From::spread_and_kept>(rows, t, sums);
            } else {
                Tiles::template tile<From::kept>(rows, t, sums + tile * Tiles::kSums);
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

    Weights& weights_;
    const int64_t m_, k_, tiles_, depth_;
    int64_t row_[kMostTiles + 1];    // of activations, where each tile begins
    int64_t asked_[kMostTiles + 1];  // which of the next weight rows it is the first to ask for
    alignas(64) int8_t kept_[kColumns * Tile::kKeptStride];
};

// Outputs [begin, end) of every row of activations by all of K.
template <class Tiles, class Total, class Weights, class T>
void spread_outputs_avx512(const LinearCall<T>& call, const QuantizedRows<int8_t>& rows, Weights& weights,
                           int64_t begin, int64_t end) {
    using Blocks = SpreadBlocksAvx512<Tiles, Weights>;
    Blocks blocks(weights, call.m, call.k);
    Total totals[kSpreadBlockRows * Blocks::kGroup];
    for (int64_t first = begin; first < end; first += Blocks::kGroup) {
        const int64_t count = std::min(Blocks::kGroup, end - first);
        std::fill_n(totals, call.m * Blocks::kGroup, Total{0});
        blocks.multiply(rows, first, count, totals);
        PanelAvx512::finish(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, first, count}, totals, Blocks::kGroup);
    }
}

// Tall tiles, of many rows of activations, are for activations that stay in L1. Wide ones read them less often.
using TallTiles = SpreadTiles<6, 4>;
using WideTiles = SpreadTiles<4, 6>;

// The same with the tiles that suit. Weights is a template of the columns of a tile; it is made of `arguments`.
template <template <int> class Weights, class T, class... Arguments>
void spread_outputs_avx512(const LinearCall<T>& call, const QuantizedRows<int8_t>& rows, int64_t begin, int64_t end,
                           Arguments&... arguments) {
    if (call.m > Weights<1>::kTallRows && call.k <= kExactDepth) {
        Weights<WideTiles::kColumns> weights(arguments...);
        return spread_outputs_avx512<WideTiles, int32_t>(call, rows, weights, begin, end);
    }
    Weights<TallTiles::kColumns> weights(arguments...);
    if (call.k > kExactDepth) return spread_outputs_avx512<TallTiles, int64_t>(call, rows, weights, begin, end);
    spread_outputs_avx512<TallTiles, int32_t>(call, rows, weights, begin, end);
}

}  // namespace engine
#endif
