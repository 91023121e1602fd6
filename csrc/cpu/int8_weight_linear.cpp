// int8_weight_linear: float activations times int8 weights [N, K] as they lie, in fp32. For many rows of activations
// the panels of common/gemm_float.h; for a few, dot products straight from the weights, which memory bounds.

#include "common/compiled.h"
#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/int8_weight_dots_avx2.h"
#include "common/int8_weight_dots_avx512.h"
#include "common/linear_binding.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

// ---- panels -----------------------------------------------------------------------------------------------------

ENGINE_INLINE void convert(int8_t from, float& to) { to = static_cast<float>(from); }
ENGINE_INLINE void convert(int8_t from, BFloat16& to) {  // exact, so nothing is to be rounded
    to.bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(from)) >> 16);
}

template <class Element>
ENGINE_INLINE void convert_block(const int8_t* weight,  // [rows, k], from k0 on
                                 int64_t k, int64_t rows, int64_t kc, bool more,
                                 Element* panel) {  // [rows, kFloatDepth]
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t* from = weight + r * k;
        if (more) {  // the next stretch of this row, while this one is multiplied
            for (int64_t i = 0; i < kFloatDepth; i += 64) __builtin_prefetch(from + kc + i);
        }
        Element* to = panel + r * kFloatDepth;
        for (int64_t i = 0; i < kc; ++i) convert(from[i], to[i]);
    }
}

struct Int8Provider {
    using Value = int8_t;
    const int8_t* weight;  // [n, k]
    int64_t k;
    decltype(&convert_block<float>) convert = compiled<convert_block<float>>();

    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, float* panel) const {
        convert(weight + row * k + k0, k, rows, kc, k0 + 2 * kFloatDepth <= k, panel);
    }
#if ENGINE_X86
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, BFloat16* panel) const {
        Compiled<convert_block<BFloat16>>::avx512(weight + row * k + k0, k, rows, kc, k0 + 2 * kFloatDepth <= k, panel);
    }
#endif
};

// ---- dot products -----------------------------------------------------------------------------------------------

struct WeightDotsPortable {
    using Element = float;
    static constexpr int64_t kMostRows = 4, kMostDepth = 2048;
    static constexpr int kLanes = 8;

    template <int M>
    static constexpr int kColumns = M == 1 ? 1 : 2;
    template <int count>
    static constexpr int64_t kSums = count;

    template <int M, int R>
    static void tile(const int8_t* w,  // [R, w_stride], kc of each row
                     int64_t w_stride, int64_t kc,
                     const float* x,  // [M, x_stride]
                     int64_t x_stride, const int8_t*, bool add,
                     float* sums) {  // [M, R]
        for (int m = 0; m < M; ++m) {
            for (int r = 0; r < R; ++r) {
                const int8_t* weights = w + r * w_stride;
                const float* activations = x + m * x_stride;
                float acc[kLanes] = {};
                int64_t i = 0;
                for (; i + kLanes <= kc; i += kLanes) {
                    for (int j = 0; j < kLanes; ++j) acc[j] += activations[i + j] * static_cast<float>(weights[i + j]);
                }
                for (int j = 0; i + j < kc; ++j) acc[j] += activations[i + j] * static_cast<float>(weights[i + j]);
                sums[m * R + r] = add ? sums[m * R + r] + sum_8(acc) : sum_8(acc);
            }
        }
    }
};

template <class Kernel, class T>
void dot_linear(const FloatLinear<T>& call, const int8_t* weight) {
    float_dot_linear(call, call.k, [&](int64_t begin, int64_t end, const FloatRows& rows) {
        WeightDots<Kernel>::outputs(call, weight, rows.x, rows.stride, begin, end);
    });
}

#if ENGINE_X86
constexpr int64_t kMostPairRows = 12;  // of activations; from there on panels are as fast
struct PairsScratch;                   // tag: the activations of a call, held by the calling thread

// Products of bfloat16.
void pairs_linear(const FloatLinear<BFloat16>& call, const int8_t* weight) {
    if (call.m == 0 || call.n == 0) return;
    const int64_t stride = FloatRows::stride_for(call.k);
    Scratch<PairsScratch> scratch(Scratch<PairsScratch>::bytes_for<BFloat16>(call.m * stride));
    auto* const x = scratch.take<BFloat16>(call.m * stride);
    bool finite[kMostPairRows];
    for (int64_t row = 0; row < call.m; ++row) {
        finite[row] = PairStepAvx512::arrange(call.x + row * call.k, call.k, x + row * stride);
    }
    parallel_rows(call.n, call.k * (call.m + 3) / 4, [&](int64_t begin, int64_t end) {
        WeightDots<WeightDotsAvx512<PairStepAvx512>>::outputs(call, weight, x, stride, begin, end);
    });
    for (int64_t row = 0; row < call.m; ++row) {
        if (!finite[row]) fill_nan(call, row);
    }
}
#endif

template <class T>
void linear(const FloatLinear<T>& call, const int8_t* weight) {
#if ENGINE_X86
    if constexpr (kBFloat16Products<T, int8_t>) {
        if (multiplies_bfloat16<T, int8_t>() && call.m <= kMostPairRows) return pairs_linear(call, weight);
    }
#endif
    if (call.m > kFloatDotRows) return float_panel_linear(call, Int8Provider{weight, call.k});
#if ENGINE_X86
    if (isa() == Isa::avx2) return dot_linear<WeightDotsAvx2>(call, weight);
    if (isa() == Isa::avx512) return dot_linear<WeightDotsAvx512<FloatStepAvx512>>(call, weight);
#endif
    dot_linear<WeightDotsPortable>(call, weight);
}

Tensor int8_weight_linear(Tensor x, Tensor weight_in, Tensor scale_in, std::optional<Tensor> bias) {
    constexpr auto op = "int8_weight_linear";
    STD_TORCH_CHECK(weight_in.dim() == 2 && weight_in.scalar_type() == ScalarType::Char, op,
                    ": weight: expected int8 [N, K]");
    const int64_t n = weight_in.size(0), k = weight_in.size(1);
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == k, op, ": x: expected shape [..., ", k, "]");
    STD_TORCH_CHECK(scale_in.dim() == 1 && scale_in.size(0) == n && scale_in.scalar_type() == ScalarType::Float, op,
                    ": scale: expected float32 [N]");
    const Tensor weight = as_contiguous(weight_in), scale = as_contiguous(scale_in);
    return float_linear_output(op, x, n, data<float>(scale), bias,
                               [&](const auto& call) { linear(call, data<int8_t>(weight)); });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_weight_linear", TORCH_BOX(&engine::int8_weight_linear)); }
