// The microkernel of common/gemm_int8.h in plain C++: dot products of 16-bit integers, which compilers vectorise by the
// multiply-and-add-pairs instruction that nearly every processor has.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm_int8.h"

namespace engine {

struct PanelPortable {
    using Q = int16_t;
    static constexpr int64_t kRows = 4, kColumns = 16, kStrips = 2, kDepth = 384;
    static constexpr bool kAsk = false;
    static constexpr int64_t kStripBytes = kColumns * kDepth * sizeof(int16_t);

    // A strip is int16 [columns, kDepth].
    static void pack(const int8_t* w,  // [columns, stride]
                     int64_t stride, int64_t columns, int64_t kc, void* strip) {
        for (int64_t j = 0; j < columns; ++j) {
            std::copy_n(w + j * stride, kc, static_cast<int16_t*>(strip) + j * kDepth);
        }
    }

    static void tile(int64_t rows, int64_t columns,
                     const int16_t* q,  // [rows, stride]
                     int64_t stride,
                     const void* strip,  // [kColumns, kDepth]
                     int64_t kc, bool add,
                     int32_t* sums,  // [rows, width]
                     int64_t width, const LinesAhead* = nullptr) {
        const auto* w = static_cast<const int16_t*>(strip);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < columns; ++j) {
                const int16_t *a = q + r * stride, *b = w + j * kDepth;
                int32_t acc = add ? sums[r * width + j] : 0;
                for (int64_t i = 0; i < kc; ++i) acc += a[i] * b[i];
                sums[r * width + j] = acc;
            }
        }
    }

    template <class T, class Acc>
    static void finish(const FinishRows<T>& f, const Acc* sums, int64_t width) {
        finish_rows<0>(f, sums, width);
    }
};

}  // namespace engine
