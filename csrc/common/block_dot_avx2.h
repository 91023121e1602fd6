// A row of blocks by a few rows of activations on AVX2: registers hold the sums of some rows of weights while these go
// from block to block, then come the next rows. A step is a struct:
//
//   Weight, X      the types of weights and activations
//   Lanes, Sum     of products, and what they are added up to
//   kLanes         weights to a vector
//   load(w, left)  a vector of weights, zeros from `left` on where there are fewer, which are a multiple of 16
//   multiply(sums, w, x)  x: where as many activations are, which are as aligned as 16 of them
//   kChain         weights of a row whose products are added up before they are added to the total
//   add_up(lanes, add, sums)  the sums of four vectors of lanes, added to what is there if `add`
#pragma once

#include "common/block.h"
#include "common/dot_bytes_avx2.h"
#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/int8_activations.h"
#if ENGINE_X86

namespace engine {

template <class V>
struct FloatBlockStepAvx2 {
    using Weight = V;
    using X = float;
    using Lanes = __m256;
    using Sum = float;
    static constexpr int64_t kLanes = 8, kChain = 8 * kDotChain;

    ENGINE_AVX2 ENGINE_INLINE static __m256 load(const V* w, int64_t) { return load_8_avx2(w); }
    ENGINE_AVX2 ENGINE_INLINE static void multiply(__m256& sums, __m256 w, const float* x) {
        sums = _mm256_fmadd_ps(w, _mm256_load_ps(x), sums);
    }
    ENGINE_AVX2 ENGINE_INLINE static void add_up(const __m256* lanes, bool add, float* sums) {
        const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(lanes[0], lanes[1]), _mm256_hadd_ps(lanes[2], lanes[3]));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        _mm_storeu_ps(sums, add ? _mm_add_ps(_mm_loadu_ps(sums), four) : four);
    }
};

template <class Bytes>
struct Int8BlockStepAvx2 {
    using Weight = int8_t;
    using X = int8_t;
    using Lanes = __m256i;
    using Sum = int64_t;
    static constexpr int64_t kLanes = 32, kChain = INT64_MAX;

    ENGINE_AVX2 ENGINE_INLINE static __m256i load(const int8_t* w, int64_t left) {
        if (left < kLanes) return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    }
    ENGINE_AVX2 ENGINE_INLINE static void multiply(__m256i& sums, __m256i w, const int8_t* x) {
        Bytes::add(sums, _mm256_abs_epi8(w), w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    // A lane's sum fits 32 bits, that of all of them may not.
    ENGINE_AVX2 ENGINE_INLINE static void add_up(const __m256i* lanes, bool, int64_t* sums) {
        for (int i = 0; i < 4; ++i) sums[i] = sum_lanes_avx2(lanes[i]);
    }
};

template <class Step>
class BlockDotAvx2 {
  public:
    using Weight = typename Step::Weight;
    using X = typename Step::X;
    using Sum = typename Step::Sum;
    static constexpr int64_t kMostRows = 8, kMostBlock = 256;

    // The products of a row of blocks by `m` ≤ kMostRows rows of activations.
    template <int M = kMostRows>
    static void line(int64_t m,
                     const X* x,  // [m, x_stride], 64-byte aligned, zeros beyond K
                     int64_t x_stride, const Blocks& weight, int64_t line,
                     Sum (*sums)[kMostBlock]) {  // [m, high], of which those of outputs are written
        if constexpr (M > 1) {
            if (m < M) return BlockDotAvx2::line<M - 1>(m, x, x_stride, weight, line, sums);
        }
        const int64_t wanted = (weight.n - line * weight.shape.rows + 7) / 8 * 8;
        const Line of{x,
                      x_stride,
                      weight,
                      weight.offsets()[line],
                      weight.offsets()[line + 1],
                      std::min(weight.shape.rows, wanted)};
        blocks<M>(of, sums);
    }

  private:
    static constexpr int64_t kChunkBytes = 64 << 10, kInCache = 8 << 20;  // of weights
    using Lanes = typename Step::Lanes;

    struct Line {
        const X* x;
        int64_t x_stride;
        const Blocks& weight;
        int64_t first, last;  // blocks
        int64_t rows;         // of each that are wanted, a multiple of 8
    };

    // Rows [row, row + R) of blocks that lie one after another.
    struct Part {
        const X* x;  // of which a block begins with column columns[i] · wide
        int64_t x_stride;
        const Weight* w;
        int64_t size, wide;  // of a block
        const int32_t* columns;
        int64_t blocks;
        int64_t ahead;  // bytes: where memory is asked for what comes next
    };

    template <int M>
    static void blocks(const Line& line, Sum (*sums)[kMostBlock]) {
        constexpr int kRows = M == 1 ? 8 : M <= 3 ? 4 : M <= 6 ? 2 : 1;  // 8 to 12 sums
        const Blocks& weight = line.weight;
        const auto [high, wide] = weight.shape;
        const int32_t* columns = weight.columns();
        const Weight* values = weight.blocks<Weight>();
        const bool partial = line.last > line.first && (columns[line.last - 1] + 1) * wide > weight.k;
        const int64_t last = line.last - partial, size = high * wide;
        // So many blocks at a time that L2 holds them while their rows are gone through. What one row of activations
        // gets from memory had better be one stream, block by block.
        const int64_t bytes = weight.kept() * static_cast<int64_t>(sizeof(Weight));
        const bool stream = M == 1 && bytes > kInCache;
        const int64_t block_bytes = size * static_cast<int64_t>(sizeof(Weight));
        const int64_t step = stream ? 1 : std::max<int64_t>(1, kChunkBytes / block_bytes);
        const int64_t ahead = !stream && bytes > kLeastAsked ? kChunkBytes : 0, chain = Step::kChain / wide;
        alignas(64) Lanes all[kMostBlock][M];
        if (line.last == line.first) std::memset(all, 0, line.rows * sizeof all[0]);
        int64_t first = line.first;
        do {
            const int64_t end = first + std::min(chain, line.last - first), whole = std::min(end, last);
            for (int64_t block = first; block < whole; block += step) {
                const int64_t count = std::min(step, whole - block);
                for (int64_t row = 0; row < line.rows; row += kRows) {
                    const Weight* w = values + block * size + row * wide;
                    multiply<M, kRows>({line.x, line.x_stride, w, size, wide, columns + block, count, ahead},
                                       block > first, all + row);
                }
            }
            if (whole < end) {
                add_partial<M, kRows>(line, values + last * size, columns[last] * wide, last > first, all);
            }
            add_up<M>(all, line.rows, first > line.first, sums);
            first = end;
        } while (first < line.last);
    }

    // A block that reaches beyond K, of which what is there counts for nothing, not even if it is no number.
    template <int M, int R>
    static void add_partial(const Line& line, const Weight* w, int64_t column, bool add, Lanes (*all)[M]) {
        const int64_t wide = line.weight.shape.columns, inside = line.weight.k - column;
        constexpr int32_t kFirst = 0;
        alignas(64) X x[M][kMostBlock];
        alignas(64) Weight rows[R][kMostBlock];
        for (int m = 0; m < M; ++m) {
            std::fill(std::copy_n(line.x + m * line.x_stride + column, inside, x[m]), x[m] + kMostBlock, X{});
        }
        for (int64_t row = 0; row < line.rows; row += R) {
            for (int r = 0; r < R; ++r, w += wide) {
                std::fill(std::copy_n(w, inside, rows[r]), rows[r] + kMostBlock, Weight{});
            }
            multiply<M, R>({x[0], kMostBlock, rows[0], 0, kMostBlock, &kFirst, 1, 0}, add, all + row,
                           (inside + 15) / 16 * 16);
        }
    }

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int M, int R>
    ENGINE_AVX2 __attribute__((noinline)) static void multiply(const Part& part, bool add, Lanes (*all)[M],
                                                               int64_t inside = kMostBlock) {
        const int64_t size = part.size, wide = part.wide, x_stride = part.x_stride, ahead = part.ahead;
        const int64_t end = std::min(wide, inside);
        const int32_t* columns = part.columns;
        Lanes acc[R][M];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) acc[r][m] = add ? all[r][m] : Lanes{};
        }
        const Weight* w = part.w;
        for (int64_t block = 0; block < part.blocks; ++block, w += size) {
            const X* x = part.x + columns[block] * wide;
            for (int64_t c = 0; c < end; c += Step::kLanes) {
                ask_ahead<R>(w + c, wide * static_cast<int64_t>(sizeof(Weight)), ahead);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Weight* from = w + r * wide + c;
                    const auto weights = Step::load(from, end - c);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) Step::multiply(acc[r][m], weights, x + m * x_stride + c);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) all[r][m] = acc[r][m];
        }
    }

    template <int M>
    ENGINE_AVX2 static void add_up(const Lanes (*all)[M], int64_t rows, bool add, Sum (*sums)[kMostBlock]) {
        for (int64_t row = 0; row < rows; row += 4) {
            for (int m = 0; m < M; ++m) {
                const Lanes four[] = {all[row][m], all[row + 1][m], all[row + 2][m], all[row + 3][m]};
                Step::add_up(four, add, sums[m] + row);
            }
        }
    }
};

}  // namespace engine
#endif
