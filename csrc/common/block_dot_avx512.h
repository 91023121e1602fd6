// block_linear and block_int8_linear for a few rows of activations on AVX-512: dot products of blocks as they lie in
// memory, which is one stream. What is multiplied is said by a step:
//
//   Weight, X       the elements of weights and of activations
//   Sum, Lanes      of products, and a vector of them
//   kLanes          weights to a vector: a piece of a row of a block, or 2 or 4 rows of a narrow one
//   kChain          weights of a row whose products are added up before they are added to the total
//   load(w)         such a vector of weights; load(w, inside) the same with zeros where a bit is not set
//   multiply(sums, w, x)  x: the bits of a vector of activations
//   kShifted        whether weights are shifted by 128, so that sums are too large by 128 times the activations
#pragma once

#include "common/block.h"
#include "common/dot_int8.h"
#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/int8_activations_avx512.h"
#if ENGINE_X86

namespace engine {

// A vector of activations for `times` rows of weights: as many times what a row of them meets.
template <int times>
ENGINE_AVX512 ENGINE_INLINE __m512i repeat_avx512(const void* x) {
    if constexpr (times == 4) return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(x)));
    if constexpr (times == 2) return _mm512_broadcast_i64x4(_mm256_load_si256(static_cast<const __m256i*>(x)));
    return _mm512_load_si512(x);
}

struct Int8BlockStep {
    using Weight = int8_t;
    using X = int8_t;
    using Sum = int32_t;
    using Lanes = __m512i;
    static constexpr int64_t kLanes = 64, kChain = INT64_MAX;
    static constexpr bool kShifted = true;

    ENGINE_AVX512 ENGINE_INLINE static __m512i load(const int8_t* w) {
        return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
    }
    // Beyond K activations are 0.
    ENGINE_AVX512 ENGINE_INLINE static __m512i load(const int8_t* w, uint64_t) { return load(w); }
    ENGINE_AVX512 ENGINE_INLINE static void multiply(__m512i& sums, __m512i w, __m512i x) {
        accumulate_avx512(sums, w, x);
    }
};

template <class V>
struct FloatBlockStep {
    using Weight = V;
    using X = float;
    using Sum = float;
    using Lanes = __m512;
    static constexpr int64_t kLanes = 16, kChain = 16 * kDotChain;
    static constexpr bool kShifted = false;

    ENGINE_AVX512 ENGINE_INLINE static __m512 load(const V* w) { return load_16_avx512(w); }
    ENGINE_AVX512 ENGINE_INLINE static __m512 load(const V* w, uint64_t inside) {
        const __m512i bits = _mm512_castps_si512(load_16_avx512(w));
        return _mm512_castsi512_ps(
            _mm512_maskz_add_epi32(static_cast<__mmask16>(inside), bits, _mm512_setzero_si512()));
    }
    ENGINE_AVX512 ENGINE_INLINE static void multiply(__m512& sums, __m512 w, __m512i x) {
        sums = _mm512_fmadd_ps(w, _mm512_castsi512_ps(x), sums);
    }
};

// bfloat16 by bfloat16, on processors with AVX512_BF16.
struct PairBlockStep {
    using Weight = BFloat16;
    using X = BFloat16;
    using Sum = float;
    using Lanes = __m512;
    static constexpr int64_t kLanes = 32, kChain = 16 * kDotChain;
    static constexpr bool kShifted = false;

    ENGINE_AVX512 ENGINE_INLINE static __m512i load(const BFloat16* w) { return _mm512_loadu_si512(w); }
    ENGINE_AVX512 ENGINE_INLINE static __m512i load(const BFloat16* w, uint64_t inside) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(inside), w);
    }
    ENGINE_AVX512 ENGINE_INLINE static void multiply(__m512& sums, __m512i w, __m512i x) {
        accumulate_pairs_avx512(sums, w, x);
    }
};

template <class Step>
class BlockDotAvx512 {
  public:
    using Weight = typename Step::Weight;
    using X = typename Step::X;
    using Sum = typename Step::Sum;
    static constexpr int64_t kMostRows = 6, kMostBlock = 256;

    static bool fits(const Blocks& weight) {
        const int64_t wide = weight.shape.columns;
        return wide % Step::kLanes == 0 || Step::kLanes == 2 * wide || Step::kLanes == 4 * wide;
    }

    // The products of a row of blocks by `m` ≤ kMostRows rows of activations.
    template <int M = kMostRows>
    static void line(int64_t m,
                     const X* x,  // [m, x_stride], 64-byte aligned
                     int64_t x_stride, const Blocks& weight, int64_t line,
                     Sum (*sums)[kMostBlock]) {  // [m, high]
        if constexpr (M > 1) {
            if (m < M) return BlockDotAvx512::line<M - 1>(m, x, x_stride, weight, line, sums);
        }
        const Line of{
            x, x_stride, weight, weight.template blocks<Weight>(), weight.offsets()[line], weight.offsets()[line + 1]};
        const int64_t together = Step::kLanes / weight.shape.columns;
        if constexpr (Step::kLanes >= 64) {
            if (together == 4) return blocks<M, 4>(of, sums);
        }
        if constexpr (Step::kLanes >= 32) {
            if (together == 2) return blocks<M, 2>(of, sums);
        }
        blocks<M, 1>(of, sums);
    }

  private:
    static constexpr int64_t kChunkBytes = 128 << 10;    // of weights
    static constexpr int64_t kMostVectors = kMostBlock;  // of weights, a column of blocks' width each
    using Lanes = typename Step::Lanes;

    struct Line {
        const X* x;
        int64_t x_stride;
        const Blocks& weight;
        const Weight* values;
        int64_t first, last;  // blocks
    };

    // What vectors of weights and rows of activations come to, lane by lane.
    template <int M>
    struct Sums {
        Lanes of[kMostVectors][M], excess[M];
    };

    // As many rows of a block as registers hold sums of go from block to block, then the next. So many blocks at a time
    // that L2 holds them meanwhile.
    template <int M, int together>
    static void blocks(const Line& line, Sum (*sums)[kMostBlock]) {
        constexpr int kVectors = M == 1 ? 16 : M <= 3 ? 8 : 4;
        const Blocks& weight = line.weight;
        const int64_t vectors = weight.shape.rows / together;
        // Of a block that reaches beyond K, the last one, what is there counts for nothing, not even if it is no
        // number.
        const bool partial =
            line.last > line.first && (weight.columns()[line.last - 1] + 1) * weight.shape.columns > weight.k;
        const int64_t last = line.last - partial;
        const int64_t size = weight.shape.rows * weight.shape.columns * static_cast<int64_t>(sizeof(Weight));
        const int64_t step = std::max<int64_t>(1, kChunkBytes / size), chain = Step::kChain / weight.shape.columns;
        alignas(64) Sums<M> all;
        int64_t first = line.first;
        do {
            const int64_t end = first + std::min(chain, line.last - first), whole = std::min(end, last);
            int64_t block = first;
            do {
                const int64_t stop = std::min(whole, block + step);
                stretch<M, together, false, kVectors>(line, block, stop, 0, vectors, block > first, all);
                block = stop;
            } while (block < whole);
            if (whole < end) stretch<M, together, true, kVectors>(line, last, end, 0, vectors, true, all);
            add_up<M, together>(all, vectors, first > line.first, sums);
            first = end;
        } while (first < line.last);
    }

    // Blocks [first, last) from vector `v` of each on, as many vectors at a time as there are registers for; their
    // number is a multiple of 4.
    template <int M, int together, bool partial, int most>
    static void stretch(const Line& line, int64_t first, int64_t last, int64_t v, int64_t vectors, bool add,
                        Sums<M>& all) {
        for (; v + most <= vectors; v += most) {
            if (v == 0) {
                multiply<M, together, partial, most, true>(line, first, last, v, add, all);
            } else {
                multiply<M, together, partial, most, false>(line, first, last, v, add, all);
            }
        }
        if constexpr (most > 4) {
            if (v < vectors) stretch<M, together, partial, most / 2>(line, first, last, v, vectors, add, all);
        }
    }

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int M, int together, bool partial, int vectors, bool first_vectors>
    ENGINE_AVX512 __attribute__((noinline)) static void multiply(const Line& line, int64_t first, int64_t last,
                                                                 int64_t vector, bool add, Sums<M>& all) {
        constexpr int64_t kLanes = Step::kLanes;
        constexpr bool kExcess = Step::kShifted && first_vectors;  // the same for all
        const int64_t wide = line.weight.shape.columns, size = line.weight.shape.rows * wide;
        const int64_t pieces = (wide + kLanes - 1) / kLanes, w_stride = together * wide;
        const int64_t bytes = line.weight.kept() * static_cast<int64_t>(sizeof(Weight));
        const int64_t ahead = bytes > kLeastAsked ? kChunkBytes : 0;
        const int32_t* columns = line.weight.columns();
        Lanes acc[M * vectors], excess[M];
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            if constexpr (kExcess) excess[m] = add ? all.excess[m] : Lanes{};
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) acc[m * vectors + v] = add ? all.of[vector + v][m] : Lanes{};
        }
        const Weight* w = line.values + first * size + vector * w_stride;
        alignas(64) X tail[M][partial ? kMostBlock : 1];
        for (int64_t block = first; block < last; ++block, w += size) {
            const int64_t column = columns[block] * wide;
            const X* x = line.x + column;
            int64_t x_stride = line.x_stride;
            if constexpr (partial) {
                for (int m = 0; m < M; ++m) {
                    X* const end = std::copy_n(x + m * x_stride, line.weight.k - column, tail[m]);
                    std::fill(end, tail[m] + kMostBlock, X{});
                }
                x = tail[0], x_stride = kMostBlock;
            }
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const Weight* from = w + kLanes * piece;
                uint64_t inside = 0;
                if constexpr (partial) inside = lanes_inside<together>(line.weight.k - column - kLanes * piece, wide);
                ask_ahead<vectors>(from, w_stride * static_cast<int64_t>(sizeof(Weight)), ahead);
                __m512i activations[M];
#pragma GCC unroll 6
                for (int m = 0; m < M; ++m) {
                    activations[m] = repeat_avx512<together>(x + m * x_stride + kLanes * piece);
                    if constexpr (kExcess) Step::multiply(excess[m], _mm512_set1_epi8(-128), activations[m]);
                }
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v, from += w_stride) {
                    const auto weights = partial ? Step::load(from, inside) : Step::load(from);
#pragma GCC unroll 6
                    for (int m = 0; m < M; ++m) Step::multiply(acc[m * vectors + v], weights, activations[m]);
                }
            }
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            if constexpr (kExcess) all.excess[m] = excess[m];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) all.of[vector + v][m] = acc[m * vectors + v];
        }
    }

    // Which lanes of a vector are within K, where `left` columns are.
    template <int together>
    static uint64_t lanes_inside(int64_t left, int64_t wide) {
        uint64_t lanes = left >= 64 ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << left) - 1;
        if (together > 1) lanes &= (uint64_t{1} << wide) - 1;
        for (int row = 1; row < together; ++row) lanes |= lanes << wide;
        return lanes;
    }

    // The lanes of each row of weights added up, 16 rows at a time, and to what is there if `add`.
    template <int M, int together>
    ENGINE_AVX512 static void add_up(const Sums<M>& all, int64_t vectors, bool add, Sum (*sums)[kMostBlock]) {
        // Of vectors of 2 or 4 rows each, the first rows come first, then the second ones.
        const __m512i pairs = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int64_t v = 0; v < vectors; v += 16 / together) {
            for (int m = 0; m < M; ++m) {
                Lanes four[4];
                for (int i = 0; i < 4 / together; ++i) {
                    Lanes one[4];
                    for (int l = 0; l < 4; ++l) {
                        one[l] = all.of[v + 4 * i + l][m];
                        if constexpr (Step::kShifted) one[l] = _mm512_sub_epi32(one[l], all.excess[m]);
                    }
                    four[i] = add_lanes_avx512(one);
                }
                __m512i sixteen;
                if constexpr (together == 1) sixteen = bits_avx512(add_quarters_avx512(four));
                if constexpr (together == 2) {
                    sixteen = _mm512_permutexvar_epi32(pairs, bits_avx512(add_halves_avx512<256>(four[0], four[1])));
                }
                if constexpr (together == 4) sixteen = _mm512_permutexvar_epi32(fours, bits_avx512(four[0]));
                Sum* const to = sums[m] + v * together;
                if constexpr (std::is_same_v<Sum, float>) {
                    if (add) sixteen = bits_avx512(_mm512_add_ps(_mm512_loadu_ps(to), _mm512_castsi512_ps(sixteen)));
                }
                _mm512_storeu_si512(to, sixteen);
            }
        }
    }
};

}  // namespace engine
#endif
