// int8_weight_linear for a few rows of activations: dot products of weights that are turned to floats on the way. A
// tile multiplies several rows of weights by all of activations, so that these are read that much less often, and goes
// along K in stretches for which they stay in L1.
//
// A kernel is a struct:
//
//   Element      the type of the activations that it multiplies
//   kMostRows    at most so many rows of them to a tile
//   kMostDepth   at most so much of K at once, a multiple of 64: how long a chain in which sums are added up
//   kColumns<M>  weight rows of a tile for M rows of activations, as registers allow: 1 to 4, which divide kGroup
//   kSums<count> how many floats a tile of `count` sums writes
//   tile<M, R>   the sums [M, R] of a stretch, added to what is there if `add`; memory is asked for [R, kc] at `ahead`
#pragma once

#include "common/gemm_float.h"

namespace engine {

template <class Kernel>
class WeightDots {
  public:
    using Element = typename Kernel::Element;

    // y[:, begin:end).
    template <class T>
    static void outputs(const FloatLinear<T>& call, const int8_t* weight,
                        const Element* x,  // [call.m, x_stride], 64-byte aligned
                        int64_t x_stride, int64_t begin, int64_t end) {
        for (int64_t row = 0; row < call.m; row += Kernel::kMostRows) {
            rows_of<Kernel::kMostRows>(std::min(Kernel::kMostRows, call.m - row), call, weight, x + row * x_stride,
                                       x_stride, row, begin, end);
        }
    }

  private:
    static constexpr int64_t kGroup = 12;  // weight rows for which a stretch of the activations stays in L1
    static constexpr int64_t kL1Activations = (32 << 10) / sizeof(Element);

    // y[row:row + count, begin:end); x is the activations from `row` on.
    template <int M, class T>
    static void rows_of(int64_t count, const FloatLinear<T>& call, const int8_t* weight, const Element* x,
                        int64_t x_stride, int64_t row, int64_t begin, int64_t end) {
        if constexpr (M > 1) {
            if (count < M) return rows_of<M - 1>(count, call, weight, x, x_stride, row, begin, end);
        }
        for (int64_t first = begin; first < end; first += kGroup) {
            group<M>(call, weight, x, x_stride, row, first, std::min(end, first + kGroup));
        }
    }

    template <int M, class T>
    static void group(const FloatLinear<T>& call, const int8_t* weight, const Element* x, int64_t x_stride, int64_t row,
                      int64_t first, int64_t end) {
        constexpr int R = Kernel::template kColumns<M>;
        const int64_t k = call.k, depth = std::min(Kernel::kMostDepth, kL1Activations / M / 64 * 64);
        const int64_t tiles = (end - first) / R, rest = first + tiles * R;
        float sums[kGroup / R][Kernel::template kSums<M * R>], rest_sums[R][Kernel::template kSums<M>];
        for (int64_t i = 0; i < std::max<int64_t>(1, k); i += depth) {
            const int64_t kc = std::min(depth, k - i);
            const int8_t* w = weight + first * k + i;
            const int8_t* const next = kc < k - i ? w + kc : weight + end * k;
            for (int64_t t = 0; t < tiles; ++t, w += R * k) {
                const int8_t* const ahead = t + 1 < tiles ? w + R * k : next;
                Kernel::template tile<M, R>(w, k, kc, x + i, x_stride, ahead, i > 0, sums[t]);
            }
            for (int64_t column = rest; column < end; ++column, w += k) {
                Kernel::template tile<M, 1>(w, k, kc, x + i, x_stride, next, i > 0, rest_sums[column - rest]);
            }
        }
        for (int m = 0; m < M; ++m) {
            T* const y = call.y + (row + m) * call.n;
            for (int64_t column = first; column < end; ++column) {
                const int64_t j = column - first;
                y[column] = float_output(column < rest ? sums[j / R][m * R + j % R] : rest_sums[column - rest][m], call,
                                         column);
            }
        }
    }
};

}  // namespace engine
