// Dot products of a few rows of int8 activations and a bitmap's int8 weights: what the kernels for each instruction set
// share, and the portable one.
#pragma once

#include "common/bitmap_int8.h"

namespace engine {

// How far ahead of a single row of activations memory is asked for values, which are one sequential stream.
constexpr int64_t kValuesAhead = 2 << 10;

// A weight row on its way along K.
struct Column {
    const uint8_t* mask;               // of the stretch
    const int8_t* values;              // of the stretch, kc + kReadAhead readable; a kernel leaves it where it ended
    int64_t values_ahead, mask_ahead;  // how far on lies what comes next
};

// A kernel multiplies a stretch of kColumns weight rows by all rows of activations, in int32:
//
//   Q         the type of activations that it multiplies
//   kShift    what is added to each weight, see QuantizedRows::sum
//   stretch   sums [m, kColumns] of one stretch
//   depth(m)  how long a stretch may be, a multiple of 64; at most kExactDepth
//   kReadsAhead  whether it asks memory for what comes next itself
struct MatrixPortable {
    using Q = int16_t;
    static constexpr int kColumns = 1;
    static constexpr int kShift = 0;
    static constexpr bool kReadsAhead = false;
    static int64_t depth(int64_t) { return 512; }

    static void stretch(const int16_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        alignas(64) int8_t w[512];
        columns[0].values += expand_stretch_portable(columns[0].mask, columns[0].values, kc, w);
        for (int64_t r = 0; r < m; ++r) {
            int32_t acc = 0;
            for (int64_t i = 0; i < kc; ++i) acc += q[r * q_stride + i] * static_cast<int16_t>(w[i]);
            sums[r] = acc;
        }
    }
};

}  // namespace engine
