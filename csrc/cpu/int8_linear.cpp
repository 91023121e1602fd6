// int8_linear: int8 activations, quantised here, times int8 weights [N, K] as they lie. For many rows of activations
// the panels of common/gemm_int8.h; for a few, dot products straight from the weights, which are then read from memory
// once and would cost more to rearrange than to multiply.

#include "common/dot_int8_avx2.h"
#include "common/gemm_int8.h"
#include "common/tensor.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

constexpr int kDotColumns = 4;  // weight rows that a dot-product kernel reads side by side

// How far ahead of the four rows being read memory is asked for. They lie one after another, and so do their
// successors: seen from memory this is one sequential stream.
constexpr int64_t kPrefetchBytes = 8 << 10;

struct DotPortable {
    using Q = int16_t;
    static constexpr int kRows = 1;

    template <int R>
    static void tile(const int16_t* q,  // [R, q_stride]
                     int64_t q_stride,
                     const int8_t* w,  // [kDotColumns, stride]
                     int64_t stride, int64_t kc, const int8_t*,
                     int32_t* sums) {  // [R, kDotColumns]
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kDotColumns; ++j) {
                int32_t acc = 0;
                for (int64_t i = 0; i < kc; ++i) acc += q[r * q_stride + i] * static_cast<int16_t>(w[j * stride + i]);
                sums[r * kDotColumns + j] = acc;
            }
        }
    }
};

#if ENGINE_X86
struct DotAvx2 {
    using Q = int16_t;
    static constexpr int kRows = 3;  // 12 sums in registers

    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void step(const int16_t* q, int64_t q_stride, const int8_t* const* row, int64_t k,
                                               __m256i (&acc)[R][kDotColumns]) {
        for (int j = 0; j < kDotColumns; ++j) {
            const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[j])));
            for (int r = 0; r < R; ++r) {
                const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + r * q_stride + k));
                acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(w, x));
            }
        }
    }

    template <int R>
    ENGINE_AVX2 static void tile(const int16_t* q,  // [R, q_stride]
                                 int64_t q_stride,
                                 const int8_t* w,  // [kDotColumns, stride]
                                 int64_t stride, int64_t kc,
                                 const int8_t* ahead,  // what to ask memory for, kDotColumns · kc bytes; or null
                                 int32_t* sums) {      // [R, kDotColumns]
        __m256i acc[R][kDotColumns];
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm256_setzero_si256();
        }
        int64_t k = 0;
        for (; k + 16 <= kc; k += 16) {
            if (ahead) __builtin_prefetch(ahead + kDotColumns * k);
            const int8_t* const row[] = {w + k, w + stride + k, w + 2 * stride + k, w + 3 * stride + k};
            step<R>(q, q_stride, row, k, acc);
        }
        if (k < kc) {
            alignas(16) int8_t tail[kDotColumns][16] = {};
            for (int j = 0; j < kDotColumns; ++j) std::copy_n(w + j * stride + k, kc - k, tail[j]);
            const int8_t* const row[] = {tail[0], tail[1], tail[2], tail[3]};
            step<R>(q, q_stride, row, k, acc);
        }
        for (int r = 0; r < R; ++r) {
            const __m256i low = _mm256_hadd_epi32(acc[r][0], acc[r][1]), high = _mm256_hadd_epi32(acc[r][2], acc[r][3]);
            const __m256i both = _mm256_hadd_epi32(low, high);
            const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kDotColumns), sum);
        }
    }
};

struct DotAvx512 {
    using Q = int8_t;
    static constexpr int kRows = 4;  // 16 sums in registers

    template <int R>
    ENGINE_AVX512 static void tile(const int8_t* q,  // [R, q_stride]
                                   int64_t q_stride,
                                   const int8_t* w,  // [kDotColumns, stride]
                                   int64_t stride, int64_t kc,
                                   const int8_t* ahead,  // what to ask memory for, kDotColumns · kc bytes; or null
                                   int32_t* sums) {      // [R, kDotColumns], 128 · (sum of q) too large
        const __m512i shift = _mm512_set1_epi8(-128);
        __m512i acc[R][kDotColumns];
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm512_setzero_si512();
        }
        for (int64_t k = 0; k < kc; k += 64) {
            const __mmask64 inside = kc - k >= 64 ? ~uint64_t{0} : ~uint64_t{0} >> (64 - (kc - k));
            __m512i shifted[kDotColumns];
            for (int j = 0; j < kDotColumns; ++j) {
                if (ahead) __builtin_prefetch(ahead + kDotColumns * k + 64 * j);
                shifted[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, w + j * stride + k), shift);
            }
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_load_si512(q + r * q_stride + k);
                for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], shifted[j], x);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kDotColumns; ++j) sums[r * kDotColumns + j] = _mm512_reduce_add_epi32(acc[r][j]);
        }
    }
};
#endif

// Up to Kernel::kRows rows of activations by kDotColumns rows of weights, summed exactly for every K.
template <class Kernel, int R>
void dot_tile(const QuantizedRows<typename Kernel::Q>& rows, int64_t row,
              const int8_t* w,  // [kDotColumns, stride]
              int64_t stride, const int8_t* ahead,
              int64_t* sums) {  // [R, kDotColumns]
    constexpr bool kShifted = sizeof(typename Kernel::Q) == 1;
    const auto* q = rows.q + row * rows.stride;
    for (int i = 0; i < R * kDotColumns; ++i) sums[i] = kShifted ? -128 * rows.sum[row + i / kDotColumns] : 0;
    for (int64_t k = 0; k < rows.k; k += kExactDepth) {
        int32_t part[R * kDotColumns];
        Kernel::template tile<R>(q + k, rows.stride, w + k, stride, std::min(kExactDepth, rows.k - k), ahead, part);
        for (int i = 0; i < R * kDotColumns; ++i) sums[i] += part[i];
    }
}

template <class Kernel>
void dot_tile_of(int64_t count, const QuantizedRows<typename Kernel::Q>& rows, int64_t row, const int8_t* w,
                 int64_t stride, const int8_t* ahead, int64_t* sums) {
    if constexpr (Kernel::kRows >= 4) {
        if (count == 4) return dot_tile<Kernel, 4>(rows, row, w, stride, ahead, sums);
    }
    if constexpr (Kernel::kRows >= 3) {
        if (count == 3) return dot_tile<Kernel, 3>(rows, row, w, stride, ahead, sums);
    }
    if constexpr (Kernel::kRows >= 2) {
        if (count == 2) return dot_tile<Kernel, 2>(rows, row, w, stride, ahead, sums);
    }
    dot_tile<Kernel, 1>(rows, row, w, stride, ahead, sums);
}

// Outputs [begin, end) of every row.
template <class Kernel, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const int8_t* weight,
                 int64_t begin, int64_t end) {
    const int64_t ahead = std::max(kPrefetchBytes, kDotColumns * call.k);
    for (int64_t column = begin; column < end; column += kDotColumns) {
        const int64_t columns = std::min<int64_t>(kDotColumns, end - column);
        // A last group of fewer than four rows reads its first one again in the places of those that are missing.
        const int64_t stride = columns == kDotColumns ? call.k : 0;
        for (int64_t single = 0; single < (stride ? 1 : columns); ++single) {
            const int8_t* w = weight + (column + single) * call.k;
            for (int64_t row = 0; row < call.m;) {
                const int64_t left = call.m - row;
                // Four left go as two and two where a tile has three: alone a row uses the registers badly.
                const int64_t count =
                    left == Kernel::kRows + 1 && left > 2 ? (left + 1) / 2 : std::min<int64_t>(Kernel::kRows, left);
                int64_t sums[Kernel::kRows * kDotColumns];
                dot_tile_of<Kernel>(count, rows, row, w, stride, row == 0 && stride ? w + ahead : nullptr, sums);
                for (int64_t r = 0; r < count; ++r) {
                    T* to = call.y + (row + r) * call.n + column + single;
                    for (int64_t j = 0; j < (stride ? kDotColumns : 1); ++j) {
                        to[j] =
                            linear_output(sums[r * kDotColumns + j], rows.scale[row + r], call, column + single + j);
                    }
                }
                row += count;
            }
        }
    }
}

template <class Kernel, class T>
void dot_linear(const LinearCall<T>& call, const int8_t* weight) {
    using Rows = QuantizedRows<typename Kernel::Q>;
    Scratch<ActivationScratch> scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call.x, call.input_scale, rows);
    parallel_rows(call.n, call.k * (1 + call.m / 4),
                  [&](int64_t begin, int64_t end) { dot_outputs<Kernel>(call, rows, weight, begin, end); });
}

#if ENGINE_X86
template <class T>
void winograd_linear(const LinearCall<T>& call, const int8_t* weight) {
    using Rows = QuantizedRows<int16_t>;
    Scratch<ActivationScratch> scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call.x, call.input_scale, rows);
    int64_t row_sums[WinogradDots::kMaxRows];
    for (int64_t row = 0; row < call.m; ++row)
        row_sums[row] = WinogradDots::row_sum(rows.q + row * rows.stride, rows.stride);
    parallel_rows(call.n, call.k * (1 + call.m / 4),
                  [&](int64_t begin, int64_t end) { WinogradDots::outputs(call, rows, row_sums, weight, begin, end); });
}
#endif

// Up to how many rows of activations each way is the fastest.
#ifndef KDOT
#define KDOT 16
#endif
constexpr int64_t kDotRows = 16;     // AVX-512 and portable
constexpr int64_t kDotRowsAvx2 = 3;  // of which memory is the limit
constexpr int64_t kWinogradRows = KDOT;

template <class T>
void linear(const LinearCall<T>& call, const int8_t* weight) {
#if ENGINE_X86
    if (isa() == Isa::avx2 && call.m <= kDotRowsAvx2) return dot_linear<DotAvx2>(call, weight);
    if (isa() == Isa::avx2 && call.m <= kWinogradRows) return winograd_linear(call, weight);
    if (isa() == Isa::avx512 && call.m <= kDotRows) return dot_linear<DotAvx512>(call, weight);
#endif
    if (isa() == Isa::portable && call.m <= kDotRows) return dot_linear<DotPortable>(call, weight);
    int8_panel_linear(call, DenseProvider{weight, call.k});
}

void check(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& input_scale) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char,
                    "int8_linear: weight: expected int8 [N, K]");
    const int64_t n = weight.size(0), k = weight.size(1);
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == k, "int8_linear: x: expected shape [..., ", k, "]");
    STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == n && scale.scalar_type() == ScalarType::Float,
                    "int8_linear: scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "int8_linear: bias: expected shape [N]");
    STD_TORCH_CHECK(!input_scale || (input_scale->numel() == 1 && input_scale->scalar_type() == ScalarType::Float),
                    "int8_linear: input_scale: expected one float32");
}

Tensor int8_linear(Tensor x_in, Tensor weight_in, Tensor scale_in, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale) {
    check(x_in, weight_in, scale_in, bias, input_scale);
    const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in), scale = as_contiguous(scale_in);
    const int64_t n = weight.size(0), k = weight.size(1);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = n;
    int64_t m = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) m *= sizes[i];
    Tensor y = new_tensor(x, sizes, x.scalar_type());
    const FloatBias as_float(bias);
    dispatch_float(x.scalar_type(), "int8_linear: x", [&](auto zero) {
        using T = decltype(zero);
        linear<T>({data<T>(x), input_scale ? data<float>(*input_scale) : nullptr, data<float>(scale), as_float.data(),
                   mutable_data<T>(y), m, n, k},
                  data<int8_t>(weight));
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_linear", TORCH_BOX(&engine::int8_linear)); }
