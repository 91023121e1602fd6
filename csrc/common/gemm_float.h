// Linear layers in fp32 arithmetic whose weights are stored smaller: what they share.
//
// For many rows of activations float_panel_linear: each thread takes a group of outputs and, stretch by stretch of K,
// has the PROVIDER turn their weights into floats once, to multiply all activations by them. Activations are packed
// once for all threads, in STRIPS of as many rows as the microkernel's vectors are wide: [k][row of the strip]. So the
// weights may stay row by row, as they come; each is broadcast.
//
// A provider is copied for each thread, so that it may keep a position, and has one function:
//
//   void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, Element* panel);
//
// Element is float; or BFloat16, where the provider's Value, of which its weights are, becomes that without rounding.
//
// It writes the weights [row, row + rows) × [k0, k0 + kc) to `panel`, rows kFloatDepth apart, and may write anything to
// the rest of a row of the panel, of which the driver makes the other half of a last pair zero.
//   rows ≤ kFloatGroup; kc ≤ kFloatDepth; k0 is a multiple of kFloatDepth, and kc is kFloatDepth unless the row ends.
//   A call begins a new group of rows, with k0 = 0, or continues the last one where it ended.
//
// A provider of block-sparse weights also has spans(r): the ranges [begin, end) of K that row r of the panel written
// last holds; only these are written. unit() consecutive rows share their spans, and a group is a multiple of them,
// even of more than kFloatGroup rows.
//
// For a few rows float_dot_linear: activations as fp32 row by row, and a kernel that multiplies them by the weights
// where they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/compiled.h"
#include "common/half.h"
#include "common/linear_call.h"
#include "common/quantize.h"
#include "common/round.h"
#include "common/scratch.h"
#include "common/tensor.h"
#if ENGINE_X86
#include "common/registers_avx512.h"
#endif

namespace engine {

constexpr int64_t kFloatDepth = 256;  // a strip of such depth stays in L1, a panel of it in L2
constexpr int64_t kFloatGroup = 112;  // at most so many weight rows to a group
// Products of K added up before they are added to the total: a rounding error grows with the length L of a chain of
// dependent additions, about 0.15 L epsilon for random products, and as sqrt(L K) where K is cut into chains of L. MKL
// has 4 chains for up to 8 outputs, and for more of them one of at most 192 additions.
constexpr int64_t kFloatChain = 64;
// The chain of totals errs too, as K / sqrt(L): least where L is sqrt(K).
constexpr int64_t float_chain(int64_t k) {
    return k <= kFloatChain * kFloatChain ? kFloatChain : k <= 4 * kFloatChain * kFloatChain ? 128 : kFloatDepth;
}

// Makes a row of outputs NaN.
template <class T>
void fill_nan(const FloatLinear<T>& call, int64_t row) {
    std::fill_n(call.y + row * call.n, call.n, from_float<T>(std::numeric_limits<float>::quiet_NaN()));
}

template <class T>
ENGINE_INLINE bool all_finite(const T* x, int64_t k) {
    return amax_bits(x, k) < 0x7f800000u;
}

// Whether activations T by weights V can be multiplied as bfloat16, and whether this processor does so: it has twice as
// many such products in its time.
template <class T, class V>
constexpr bool kBFloat16Products =
    std::is_same_v<T, BFloat16> && (std::is_same_v<V, BFloat16> || std::is_same_v<V, int8_t>);
template <class T, class V>
bool multiplies_bfloat16() {
#if ENGINE_X86
    return kBFloat16Products<T, V> && isa() == Isa::avx512 && has_bf16();
#else
    return false;
#endif
}

// y of the whole call, on torch's threads.
template <class T, class Provider>
void float_panel_linear(const FloatLinear<T>& call, const Provider& weights);

// ---- a few rows -------------------------------------------------------------------------------------------------

constexpr int64_t kFloatDotRows = 8;  // rows of activations to a tile at most
constexpr int64_t kMostDotRows = 64;  // rows of activations to a call at most
// Products that a lane adds up before the lanes are added to the total, so that long rows lose no more than torch's.
constexpr int64_t kDotChain = 256;

// The sums of `count` dot products along K, in stretches: dot(k0, kc, sums) makes those of one, in `lanes` lanes each.
template <int64_t most, int64_t lanes, class Dot>
ENGINE_INLINE void sum_stretches(int64_t count, int64_t k, const Dot& dot,
                                 float* sums) {  // [count], count ≤ most
    constexpr int64_t depth = lanes * kDotChain;
    dot(0, std::min(k, depth), sums);
    // Without the hint GCC keeps the caller's variables in memory for the sake of this loop: 3 cycles a row.
    if (__builtin_expect(k <= depth, 1)) return;
    for (int64_t k0 = depth; k0 < k; k0 += depth) {
        float more[most];
        dot(k0, std::min(k - k0, depth), more);
        for (int64_t i = 0; i < count; ++i) sums[i] += more[i];
    }
}

// Activations as fp32 rows, for the length of a call.
struct FloatRows {
    float* x;        // [m, stride]: k values, then zeros; 64-byte aligned
    int64_t stride;  // a multiple of 64
    static int64_t stride_for(int64_t k) { return round_up(k, 64); }
};

// The body for every instruction set: it vectorises by itself where it is inlined.
template <class T>
ENGINE_INLINE void float_rows(const FloatLinear<T>& call, const FloatRows& rows,
                              bool* finite) {  // [m]
    for (int64_t row = 0; row < call.m; ++row) {
        const T* from = call.x + row * call.k;
        float* to = rows.x + row * rows.stride;
        for (int64_t i = 0; i < call.k; ++i) to[i] = to_float(from[i]);
        std::fill(to + call.k, to + rows.stride, 0.0f);
        finite[row] = all_finite(to, call.k);
    }
}

struct FloatRowsScratch;  // tag: the activations of a call, held by the calling thread

struct AsTheyCome {
    void operator()(const FloatRows&) const {}
};

// Calls f(rows), which writes all of y. m ≤ kMostDotRows.
template <class T, class F>
void with_float_rows(const FloatLinear<T>& call, const F& f) {
    if (call.m == 0 || call.n == 0) return;
    const int64_t stride = FloatRows::stride_for(call.k);
    Scratch<FloatRowsScratch> scratch(Scratch<FloatRowsScratch>::template bytes_for<float>(call.m * stride) + 64);
    const FloatRows rows{scratch.template take<float>(call.m * stride), stride};
    bool finite[kMostDotRows];
    compiled<float_rows<T>>()(call, rows, finite);
    f(rows);
    for (int64_t row = 0; row < call.m; ++row) {
        if (!finite[row]) fill_nan(call, row);
    }
}

// Runs dots(begin, end, rows) over all weight rows, on torch's threads; it writes y[:, begin:end). Before,
// arrange(rows) may put the activations into the order that it reads them in.
template <class T, class Dots, class Arrange = AsTheyCome>
void float_dot_linear(const FloatLinear<T>& call, int64_t weight_row_bytes, const Dots& dots,
                      const Arrange& arrange = {}) {
    with_float_rows(call, [&](const FloatRows& rows) {
        arrange(rows);
        parallel_rows(call.n, weight_row_bytes * (call.m + 3) / 4,
                      [&](int64_t begin, int64_t end) { dots(begin, end, rows); });
    });
}

}  // namespace engine

#include "common/gemm_float_driver.h"
