// int8 linear for many rows of activations: weights go panel by panel through the processor's own layout; on AVX2 for a
// few as well, by dot products of weights where they lie (common/dots_int8_avx2.h).
//
// Activations are quantised once (common/int8_activations.h). Each thread takes groups of up to kPanelColumns outputs;
// for a group and a stretch of K it asks the PROVIDER for the weights, converts them once to the layout of the
// microkernel (common/gemm_int8_<isa>.h), and multiplies all rows by them.
//
// A provider says where weights come from, so that compressed ones can be expanded on the way. It is copied for each
// thread, so that it may keep a position, and has a function:
//
//   const int8_t* block(int64_t row, int64_t rows, int64_t k0, int64_t kc, int8_t* scratch, int64_t* stride);
//
// It may have ask(row, rows, k0, kc, lines), which adds the cache lines that a later block() will read to LinesAhead:
// for providers that know the addresses early enough to prefetch. One whose weights lie in memory row after row also
// has at(row, k0), the address of a weight.
//
// block returns the weights [row, row + rows) × [k0, k0 + kc) as rows of int8, *stride apart: where they are, or
// written to `scratch`, 64-byte aligned, which holds `rows` rows provider_stride(kc) apart.
//   rows ≤ kPanelColumns; kc ≤ kPanelDepth; k0 is a multiple of 64, and so is kc unless the row ends.
//   A call begins a new group of rows, with k0 = 0, or continues the last one where it ended.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/int8_activations.h"
#include "common/round.h"

namespace engine {

constexpr int64_t kPanelColumns = 128;  // at most so many weight rows to a group
constexpr int64_t kPanelDepth = 2176;   // at most so much of K at once; a kernel may take less (kDepth)

// How far apart a provider writes rows of kc weights: an odd number of lines, which uses all sets of the cache.
constexpr int64_t provider_stride(int64_t kc) { return ((kc + 63) / 64 | 1) * 64; }

// Cache lines to prefetch, one at each step of the microkernel along K: all at once they would occupy every line fill
// buffer, and stall its own reads from L2.
struct LinesAhead {
    static constexpr int64_t kMost = kPanelDepth / 4;
    const void* lines[kMost];
    int64_t count = 0;

    static void ask(const void* line) { __builtin_prefetch(line, 0, 2); }
    void add(const void* line) {
        if (count < kMost) {
            lines[count++] = line;
        } else {
            ask(line);
        }
    }

    // For a kernel that reads weights row by row: with its j-th row it asks for as many bytes from pieces[j].
    const void* pieces[kPanelColumns];
    int64_t piece_count = 0;

    void add_piece(const void* piece, int64_t most) {
        if (piece_count < most) pieces[piece_count++] = piece;
    }
    // How far that is from `row`, the address of the j-th row; or 0.
    int64_t distance(int64_t j, const void* row) const {
        if (j >= piece_count) return 0;
        return static_cast<int64_t>(reinterpret_cast<intptr_t>(pieces[j]) - reinterpret_cast<intptr_t>(row));
    }
};

// Weights that lie in memory as rows of int8.
struct DenseProvider {
    const int8_t* weight;  // [n, k]
    int64_t k;
    const int8_t* block(int64_t row, int64_t, int64_t k0, int64_t, int8_t*, int64_t* stride) const {
        *stride = k;
        return weight + row * k + k0;
    }
    const int8_t* at(int64_t row, int64_t k0) const { return weight + row * k + k0; }
    void ask(int64_t row, int64_t rows, int64_t k0, int64_t kc, LinesAhead& lines) const {
        for (int64_t j = row; j < row + rows; ++j) {
            for (int64_t i = 0; i < kc; i += 64) lines.add(weight + j * k + k0 + i);
        }
    }
};

// y of the whole call, exact for every K, on torch's threads.
template <class T, class Provider>
void int8_panel_linear(const LinearCall<T>& call, const Provider& weights);

// ---- for the microkernels ----

// What the sums of rows [row, row + rows) need to become outputs; columns from `column` on, `columns` of them.
template <class T>
struct FinishRows {
    const LinearCall<T>& call;
    const float* row_scale;  // of the first row
    const int64_t* row_sum;  // of the first row
    int64_t row, rows, column, columns;
};

template <bool has_bias, class T, class Acc>
ENGINE_INLINE void finish_row(const Acc* __restrict from, int64_t excess, float row_scale,
                              const float* __restrict scale, const float* __restrict bias, int64_t columns,
                              T* __restrict to) {
    using Bits = std::make_unsigned_t<Acc>;  // the sum may wrap round, and back here
    for (int64_t j = 0; j < columns; ++j) {
        const auto acc = static_cast<Acc>(static_cast<Bits>(from[j]) - static_cast<Bits>(excess));
        float y = static_cast<float>(acc) * (row_scale * scale[j]);
        if constexpr (has_bias) y = y + bias[j];
        to[j] = from_float<T>(y);
    }
}

// The body of every Kernel::finish: it vectorises by itself where it is inlined. `factor` times the row's sum is what
// the kernel's sums are too large by.
template <int factor, class T, class Acc>
ENGINE_INLINE void finish_rows(const FinishRows<T>& f,
                               const Acc* sums,  // [f.rows, width]
                               int64_t width) {
    const float* __restrict scale = f.call.scale + f.column;
    const float* __restrict bias = f.call.bias ? f.call.bias + f.column : nullptr;
    for (int64_t r = 0; r < f.rows; ++r) {
        const Acc* __restrict from = sums + r * width;
        T* __restrict to = f.call.y + (f.row + r) * f.call.n + f.column;
        const int64_t excess = factor ? factor * f.row_sum[r] : 0;
        if (bias) {
            finish_row<true>(from, excess, f.row_scale[r], scale, bias, f.columns, to);
        } else {
            finish_row<false>(from, excess, f.row_scale[r], scale, bias, f.columns, to);
        }
    }
}

}  // namespace engine

#include "common/gemm_int8_driver.h"
