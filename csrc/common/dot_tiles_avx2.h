// int8_linear for a few rows of activations on AVX2, with and without AVX-VNNI: dot products straight from the weights,
// four rows of them at a time. A step is a struct:
//
//   Q           the type of the activations
//   kLanes      weights to a vector
//   kShift      what is added to each weight, so that sums are too large by as many times the activations
//   kTileRows   how many rows of activations a tile takes
//   kStreamed   up to so many of them weights are read row after row: memory delivers them faster so than side by side
//   rows(n, k)  up to so many of them dot products are the faster way
//   depth(m)    how much of K is multiplied at once
//   load(w)     a vector of weights
//   multiply<columns>(acc, w, x)  acc[j] += w[j] by the activations at x
#pragma once

#include "common/dot_bytes_avx2.h"
#include "common/dot_int8.h"
#include "common/gemm_int8.h"
#if ENGINE_X86

namespace engine {

// Products are written as assembly because GCC, which would rather read ahead, runs out of registers and keeps the sums
// in memory.
struct PairStepAvx2 {
    using Q = int16_t;
    static constexpr int kLanes = 16, kShift = 0, kStreamed = 0;
    static constexpr int64_t kTileRows = 3;
    // Four rows of activations take two tiles: good where the weights stay in a cache.
    static int64_t rows(int64_t n, int64_t k) { return n * k <= (8 << 20) ? 4 : 3; }
    static int64_t depth(int64_t) { return kExactDepth; }

    ENGINE_AVX2 ENGINE_INLINE static __m256i load(const int8_t* w) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    }
    template <int>
    ENGINE_AVX2 ENGINE_INLINE static void multiply(__m256i* acc, const __m256i* w, const __m256i* x) {
        __m256i product;
        asm volatile(
            "vpmaddwd %[x], %[w], %[product]\n\t"
            "vpaddd %[product], %[acc], %[acc]"
            : [acc] "+x"(*acc), [product] "=&x"(product)
            : [w] "x"(*w), [x] "m"(*x));
    }
};

struct ByteStepAvxVnni {
    using Q = int8_t;
    static constexpr int kLanes = 32, kShift = 128, kStreamed = 2;
    static constexpr int64_t kTileRows = 6;
    static int64_t rows(int64_t, int64_t) { return 36; }
    static int64_t depth(int64_t m) { return m <= kTileRows ? kExactDepth : depth_in_l1<Q>(m); }

    ENGINE_AVX2 ENGINE_INLINE static __m256i load(const int8_t* w) {
        return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), _mm256_set1_epi8(-128));
    }
    template <int columns>
    ENGINE_AVX2 ENGINE_INLINE static void multiply(__m256i* acc, const __m256i* w, const __m256i* x) {
        if constexpr (columns == 1) return accumulate_avx_vnni(*acc, *w, x);
        const __m256i activations = _mm256_load_si256(x);
#pragma GCC unroll 2
        for (int j = 0; j < columns; ++j) accumulate_avx_vnni(acc[j], w[j], activations);
    }
};

template <class Step>
struct DotTilesAvx2 {
    using Q = typename Step::Q;
    static constexpr int64_t kRows = Step::kTileRows, kTogether = 32;
    static int64_t rows(int64_t n, int64_t k) { return Step::rows(n, k); }
    static int64_t depth(int64_t m) { return Step::depth(m); }

    // R rows by four of weights: one after the other, in the order in which memory delivers them fastest; at once; or
    // by twos, so that registers hold the sums.
    template <int R>
    static void tile(const DotTile<Q>& t,
                     int32_t* sums) {  // [R, kDotColumns]
        if constexpr (R <= Step::kStreamed) return rows_of<R>(t, sums);
        constexpr int kAtOnce = R > 3 ? 2 : 4;
        for (int first = 0; first < kDotColumns; first += kAtOnce) {
            tile_of<R, kAtOnce>(t, t.w + first * t.stride, t.ahead + first * t.stride, sums + first);
        }
    }

    // acc[r] += R rows by a vector of weights.
    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void add_vector(__m256i (&acc)[R], const Q* q, int64_t q_stride, const int8_t* w) {
        const __m256i weights = Step::load(w);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            Step::template multiply<1>(&acc[r], &weights, reinterpret_cast<const __m256i*>(q + r * q_stride));
        }
    }

    template <int R>
    ENGINE_AVX2 __attribute__((noinline)) static void rows_of(const DotTile<Q>& t,
                                                              int32_t* sums) {  // [R, kDotColumns]
        constexpr int kChains = 4, kLanes = Step::kLanes;  // one chain of sums would wait for itself
        const Q* const q = t.q;
        const int64_t q_stride = t.q_stride, kc = t.kc;
        __m256i column[kDotColumns][R];
        for (int j = 0; j < kDotColumns; ++j) {
            const int8_t *w = t.w + j * t.stride, *ahead = t.ahead + j * t.stride;
            __m256i acc[kChains][R];
#pragma GCC unroll 4
            for (auto& chain : acc) {
#pragma GCC unroll 2
                for (__m256i& sum : chain) sum = _mm256_setzero_si256();
            }
            int64_t k = 0;
            for (; k + kChains * kLanes <= kc; k += kChains * kLanes) {
#pragma GCC unroll 2
                for (int i = 0; i < kChains * kLanes; i += 64) __builtin_prefetch(ahead + k + i, 0, 2);
#pragma GCC unroll 4
                for (int i = 0; i < kChains; ++i) {
                    add_vector<R>(acc[i], q + k + kLanes * i, q_stride, w + k + kLanes * i);
                }
            }
            for (; k + kLanes <= kc; k += kLanes) add_vector<R>(acc[0], q + k, q_stride, w + k);
            if (k < kc) {
                alignas(32) int8_t tail[kLanes] = {};
                std::copy_n(w + k, kc - k, tail);
                add_vector<R>(acc[0], q + k, q_stride, tail);
            }
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                column[j][r] =
                    _mm256_add_epi32(_mm256_add_epi32(acc[0][r], acc[1][r]), _mm256_add_epi32(acc[2][r], acc[3][r]));
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            const __m128i sum = add_lanes_avx2(column[0][r], column[1][r], column[2][r], column[3][r]);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kDotColumns), sum);
        }
    }

    // Not inlined: GCC would keep the sums in memory.
    template <int R, int C>
    ENGINE_AVX2 __attribute__((noinline)) static void tile_of(const DotTile<Q>& t,
                                                              const int8_t* w,  // [C, t.stride]
                                                              const int8_t* ahead,
                                                              int32_t* sums) {  // [R, kDotColumns]
        constexpr int kPieces = 64 / Step::kLanes;
        constexpr int kShared = R > 3 ? C : 1;  // columns that share a load of activations
        const Q* q = t.q;
        const int64_t q_stride = t.q_stride, stride = t.stride, kc = t.kc;
        // The last weights of each row, with zeros: copied now, as a call amid the products would cost the registers.
        const int64_t whole = kc / 64 * 64;
        alignas(64) int8_t tail[C][64];
        if (whole < kc) {
            std::memset(tail, 0, sizeof tail);
            for (int j = 0; j < C; ++j) std::copy_n(w + j * stride + whole, kc - whole, tail[j]);
        }
        __m256i acc[R][C];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) acc[r][j] = _mm256_setzero_si256();
        }
        for (int part = whole > 0 ? 0 : 1; part < (whole < kc ? 2 : 1); ++part) {
            const int8_t* from = part == 0 ? w : tail[0];
            const int8_t* const end = part == 0 ? w + whole : tail[1];
            const int64_t step = part == 0 ? stride : sizeof tail[0];
            for (; from < end; from += 64, ahead += 64, q += 64) {
#pragma GCC unroll 4
                for (int i = 0; i < kPieces; ++i) {
#pragma GCC unroll 4
                    for (int j = C * i / kPieces; j < C * (i + 1) / kPieces; ++j) {
                        __builtin_prefetch(ahead + j * stride, 0, 2);
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < C; j += kShared) {
                        __m256i weights[kShared];
#pragma GCC unroll 2
                        for (int s = 0; s < kShared; ++s) {
                            weights[s] = Step::load(from + (j + s) * step + Step::kLanes * i);
                        }
#pragma GCC unroll 6
                        for (int r = 0; r < R; ++r) {
                            const auto* x = reinterpret_cast<const __m256i*>(q + r * q_stride + Step::kLanes * i);
                            Step::template multiply<kShared>(&acc[r][j], weights, x);
                        }
                    }
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r += 4 / C) {
            const int next = C == 4 ? r : std::min(r + 1, R - 1);
            const __m128i sum = add_lanes_avx2(acc[r][0], acc[r][1], acc[next][C - 2], acc[next][C - 1]);
            if constexpr (C == 4) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kDotColumns), sum);
            } else {
                _mm_storel_epi64(reinterpret_cast<__m128i*>(sums + r * kDotColumns), sum);
                _mm_storeh_pd(reinterpret_cast<double*>(sums + next * kDotColumns), _mm_castsi128_pd(sum));
            }
        }
    }

    template <class T, class Total>
    ENGINE_AVX2 static void finish(const FinishRows<T>& f, const Total* totals) {
        finish_rows<Step::kShift>(f, totals, kDotBlock);
    }
};

}  // namespace engine
#endif
