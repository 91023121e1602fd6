// The microkernel of common/gemm_float.h in plain C++.
#pragma once

#include <cstring>

#include "common/gemm_float.h"

namespace engine {

// A strip from rows of activations, one by one; also the tails of other kernels: rows [row, rows) of k [begin, kc).
template <class T>
ENGINE_INLINE void pack_rest(const T* x,  // [rows, stride]
                             int64_t stride, int64_t row, int64_t rows, int64_t begin, int64_t kc, int64_t width,
                             float* strip) {  // [kc, width]
    for (; row < rows; ++row) {
        for (int64_t i = begin; i < kc; ++i) strip[i * width + row] = to_float(x[row * stride + i]);
    }
}

// Outputs one by one: rows [row, rows) of columns [begin, columns), whose first is the call's `column`.
template <class T>
ENGINE_INLINE void finish_rest(const FloatLinear<T>& call,
                               const float* sums,  // [columns, width]
                               int64_t width, int64_t first_row, int64_t row, int64_t rows, int64_t column,
                               int64_t begin, int64_t columns) {
    for (; row < rows; ++row) {
        T* y = call.y + (first_row + row) * call.n + column;
        for (int64_t j = begin; j < columns; ++j) y[j] = float_output(sums[j * width + row], call, column + j);
    }
}

struct FloatPanelPortable {
    using Element = float;
    static constexpr int64_t kChain = kFloatChain;
    static constexpr int64_t kWidth = 16, kNarrow = 8, kRows = 4, kGroup = 96;

    template <class T>
    static void pack(const T* x,  // [rows, stride]
                     int64_t stride, int64_t rows, int64_t kc, int64_t width,
                     float* strip,       // [kc, width]: beyond `rows` zeros
                     uint8_t* finite) {  // [rows]
        transpose(x, stride, rows, kc, width, strip);
        for (int64_t row = 0; row < rows; ++row) finite[row] = all_finite(x + row * stride, kc);
    }

    template <class T>
    static void transpose(const T* x,  // [rows, stride]
                          int64_t stride, int64_t rows, int64_t kc, int64_t width,
                          float* strip) {  // [kc, width]: beyond `rows` zeros
        std::fill(strip, strip + kc * width, 0.0f);
        pack_rest(x, stride, 0, rows, 0, kc, width, strip);
    }

    // GCC and Clang have vectors of four for every processor. Of plain loops GCC makes shuffles here, ten times as
    // slow.
    using Four = float __attribute__((vector_size(16)));

    static Four load(const float* x) {
        Four four;
        std::memcpy(&four, x, sizeof four);
        return four;
    }

    // R weight rows by W activations.
    template <int64_t W>
    static void tile_of(const float* w, const float* strip, int64_t kc, bool add, float* sums) {
        constexpr int64_t R = 2, V = W / 4;
        for (int64_t first = 0; first < kRows; first += R) {
            Four acc[R][V] = {};
            for (int64_t i = 0; i < kc; ++i) {
                Four x[V];
                for (int64_t v = 0; v < V; ++v) x[v] = load(strip + i * W + 4 * v);
                for (int64_t r = 0; r < R; ++r) {
                    const float weight = w[(first + r) * kFloatDepth + i];
                    for (int64_t v = 0; v < V; ++v) acc[r][v] += weight * x[v];
                }
            }
            for (int64_t r = 0; r < R; ++r) {
                float* to = sums + (first + r) * W;
                for (int64_t c = 0; c < W; ++c) to[c] = (add ? to[c] : 0.0f) + acc[r][c / 4][c % 4];
            }
        }
    }

    static void tile(const float* w,      // [kRows, kFloatDepth], of which kc are used
                     const float* strip,  // [kc, width]
                     int64_t kc, int64_t width, bool add,
                     float* sums) {  // [kRows, width]
        if (width == kNarrow) return tile_of<kNarrow>(w, strip, kc, add, sums);
        tile_of<kWidth>(w, strip, kc, add, sums);
    }

    template <class T>
    static void finish(const FloatLinear<T>& call,
                       const float* sums,  // [columns, width]
                       int64_t width, int64_t first_row, int64_t rows, int64_t column, int64_t columns) {
        finish_rest(call, sums, width, first_row, 0, rows, column, 0, columns);
    }
};

}  // namespace engine
