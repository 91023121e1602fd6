// int8_linear: int8 activations, quantised here, times int8 weights [N, K] as they lie. For many rows of activations
// the panels of common/gemm_int8.h; for a few, dot products straight from the weights, which are then read from memory
// once and would cost more to rearrange than to multiply.

#include <cstring>

#include "common/gemm_int8.h"
#include "common/tensor.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

constexpr int kDotColumns = 4;          // weight rows that a dot-product kernel reads side by side
constexpr int64_t kDotBlock = 32;       // outputs for which a stretch of the activations stays in L1
constexpr int64_t kDotRows = 16;        // up to so many rows of activations dot products are the faster way
constexpr int64_t kL1Bytes = 20 << 10;  // of L1, what activations may take

// A dot-product kernel is a struct: Q, the type of the activations; kRows, how many rows of them a tile takes; kShift,
// 128 where weights are shifted to unsigned, so that kShift · (sum of the row's q) must be taken away; and tile<R>,
// which writes R × kDotColumns sums.

struct DotPortable {
    using Q = int16_t;
    static constexpr int64_t kRows = 1, kShift = 0;

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
    static constexpr int64_t kRows = 3, kShift = 0;  // 12 sums in registers

    // R rows by four of weights. The products are written as assembly because GCC, which would rather read ahead, runs
    // out of registers and keeps the sums in memory; it does so as well where this is inlined.
    template <int R>
    ENGINE_AVX2 __attribute__((noinline)) static void tile(
        const int16_t* q,  // [R, q_stride]
        int64_t q_stride,
        const int8_t* w,  // [kDotColumns, stride]
        int64_t stride, int64_t kc,
        const int8_t* ahead,  // [kDotColumns, stride], what to ask memory for; or w itself
        int32_t* sums) {      // [R, kDotColumns]
        // The last weights of each row, with zeros: copied now, as a call amid the products would cost the registers.
        const int64_t whole = kc / 64 * 64;
        alignas(64) int8_t tail[kDotColumns][64];
        if (whole < kc) {
            std::memset(tail, 0, sizeof tail);
            for (int j = 0; j < kDotColumns; ++j) std::copy_n(w + j * stride + whole, kc - whole, tail[j]);
        }
        __m256i acc[R][kDotColumns];
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm256_setzero_si256();
        }
        for (int part = whole > 0 ? 0 : 1; part < (whole < kc ? 2 : 1); ++part) {
            const int8_t* from = part == 0 ? w : tail[0];
            const int8_t* const end = part == 0 ? w + whole : tail[1];
            const int64_t step = part == 0 ? stride : sizeof tail[0];
            for (; from < end; from += 64, ahead += 64, q += 64) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    __builtin_prefetch(ahead + i * stride, 0, 2);
#pragma GCC unroll 4
                    for (int j = 0; j < kDotColumns; ++j) {
                        const auto* weights = reinterpret_cast<const __m128i*>(from + j * step + 16 * i);
                        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(weights));
#pragma GCC unroll 3
                        for (int r = 0; r < R; ++r) {
                            const auto* x = reinterpret_cast<const __m256i*>(q + r * q_stride + 16 * i);
                            __m256i product;
                            asm volatile(
                                "vpmaddwd %[x], %[wide], %[product]\n\t"
                                "vpaddd %[product], %[acc], %[acc]"
                                : [acc] "+x"(acc[r][j]), [product] "=&x"(product)
                                : [wide] "x"(wide), [x] "m"(*x));
                        }
                    }
                }
            }
        }
#pragma GCC unroll 3
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
    static constexpr int64_t kRows = 4, kShift = 128;  // 16 sums in registers

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int R>
    ENGINE_AVX512 __attribute__((noinline)) static void tile(
        const int8_t* q,  // [R, q_stride]
        int64_t q_stride,
        const int8_t* w,  // [kDotColumns, stride]
        int64_t stride, int64_t kc,
        const int8_t* ahead,  // [kDotColumns, stride], what to ask memory for; or w itself
        int32_t* sums) {      // [R, kDotColumns], 128 · (sum of q) too large
        const __m512i shift = _mm512_set1_epi8(-128);
        __m512i acc[R][kDotColumns];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm512_setzero_si512();
        }
        for (int64_t k = 0; k < kc; k += 64) {
            const __mmask64 inside = kc - k >= 64 ? ~uint64_t{0} : ~uint64_t{0} >> (64 - (kc - k));
            __m512i shifted[kDotColumns];
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) {
                __builtin_prefetch(ahead + j * stride + k, 0, 2);
                shifted[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, w + j * stride + k), shift);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_load_si512(q + r * q_stride + k);
#pragma GCC unroll 4
                for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], shifted[j], x);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) sums[r * kDotColumns + j] = _mm512_reduce_add_epi32(acc[r][j]);
        }
    }
};
#endif

// `count` rows of activations, at most Kernel::kRows, by kDotColumns rows of weights.
template <class Kernel>
void dot_tile(int64_t count, const typename Kernel::Q* q, int64_t q_stride, const int8_t* w, int64_t stride, int64_t kc,
              const int8_t* ahead, int32_t* sums) {
    if constexpr (Kernel::kRows >= 4) {
        if (count == 4) return Kernel::template tile<4>(q, q_stride, w, stride, kc, ahead, sums);
    }
    if constexpr (Kernel::kRows >= 3) {
        if (count == 3) return Kernel::template tile<3>(q, q_stride, w, stride, kc, ahead, sums);
    }
    if constexpr (Kernel::kRows >= 2) {
        if (count == 2) return Kernel::template tile<2>(q, q_stride, w, stride, kc, ahead, sums);
    }
    Kernel::template tile<1>(q, q_stride, w, stride, kc, ahead, sums);
}

// Adds the products of [k, k + kc) for `columns` ≤ kDotColumns rows of weights and all rows of activations.
template <class Kernel>
void add_dots(const QuantizedRows<typename Kernel::Q>& rows, int64_t k, int64_t kc,
              const int8_t* w,  // [columns, rows.k], at k
              int64_t columns, int64_t ahead,
              int64_t* totals) {  // [rows.rows, kDotBlock]
    if (columns < kDotColumns) {  // too few to read side by side: one by one, each read four times over
        for (int64_t j = 0; j < columns; ++j) {
            for (int64_t row = 0; row < rows.rows; ++row) {
                int32_t sums[kDotColumns];
                const auto* q = rows.q + row * rows.stride + k;
                dot_tile<Kernel>(1, q, rows.stride, w + j * rows.k, 0, kc, w, sums);
                totals[row * kDotBlock + j] += sums[0];
            }
        }
        return;
    }
    for (int64_t row = 0; row < rows.rows;) {
        const int64_t left = rows.rows - row;
        // One row alone uses the registers badly: of four left a tile of three takes two.
        const int64_t count = left == Kernel::kRows + 1 && left > 2 ? (left + 1) / 2 : std::min(Kernel::kRows, left);
        int32_t sums[Kernel::kRows * kDotColumns];
        dot_tile<Kernel>(count, rows.q + row * rows.stride + k, rows.stride, w, rows.k, kc, row == 0 ? w + ahead : w,
                         sums);
        for (int64_t i = 0; i < count * kDotColumns; ++i) {
            totals[(row + i / kDotColumns) * kDotBlock + i % kDotColumns] += sums[i];
        }
        row += count;
    }
}

// How much of K is multiplied at once: all of it that int32 sums can take where the weights serve one tile alone.
template <class Kernel>
int64_t dot_depth(int64_t m) {
    if (m <= Kernel::kRows) return kExactDepth;
    return std::clamp<int64_t>(kL1Bytes / static_cast<int64_t>(m * sizeof(typename Kernel::Q)) / 64 * 64, 384,
                               kExactDepth);
}

// Outputs [begin, end) of every row.
template <class Kernel, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const int8_t* weight,
                 int64_t begin, int64_t end) {
    int64_t totals[kDotRows * kDotBlock];
    const int64_t step = dot_depth<Kernel>(call.m);
    // Four rows of weights lie one after another, and so do their successors: one stream, asked for 8 KB ahead.
    const int64_t group = kDotColumns * std::max<int64_t>(1, call.k),
                  next_groups = ((8 << 10) + group - 1) / group * group;
    for (int64_t block = begin; block < end; block += kDotBlock) {
        const int64_t columns = std::min(kDotBlock, end - block);
        for (int64_t row = 0; row < call.m; ++row) {
            std::fill_n(totals + row * kDotBlock, columns, Kernel::kShift ? -Kernel::kShift * rows.sum[row] : 0);
        }
        for (int64_t k = 0; k < call.k; k += step) {
            const int64_t kc = std::min(step, call.k - k);
            // Where K is cut, what comes next is the rows' next stretch, and after the last the next block.
            const int64_t ahead = step >= call.k ? next_groups : k + kc < call.k ? kc : kDotBlock * call.k - k;
            for (int64_t j = 0; j < columns; j += kDotColumns) {
                add_dots<Kernel>(rows, k, kc, weight + (block + j) * call.k + k,
                                 std::min<int64_t>(kDotColumns, columns - j), ahead, totals + j);
            }
        }
        for (int64_t row = 0; row < call.m; ++row) {
            for (int64_t j = 0; j < columns; ++j) {
                call.y[row * call.n + block + j] =
                    linear_output(totals[row * kDotBlock + j], rows.scale[row], call, block + j);
            }
        }
    }
}

template <class Kernel, class T>
void dot_linear(const LinearCall<T>& call, const int8_t* weight) {
    using Rows = QuantizedRows<typename Kernel::Q>;
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call, 0, rows);
    parallel_rows(call.n, call.k * (1 + call.m / 4),
                  [&](int64_t begin, int64_t end) { dot_outputs<Kernel>(call, rows, weight, begin, end); });
}

template <class T>
void linear(const LinearCall<T>& call, const int8_t* weight) {
    if (call.m == 0 || call.n == 0) return;
    if (call.m > kDotRows) return int8_panel_linear(call, DenseProvider{weight, call.k});
#if ENGINE_X86
    if (isa() == Isa::avx2) return dot_linear<DotAvx2>(call, weight);
    if (isa() == Isa::avx512) return dot_linear<DotAvx512>(call, weight);
#endif
    dot_linear<DotPortable>(call, weight);
}

void check(int64_t k, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& input_scale) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char,
                    "int8_linear: weight: expected int8 [N, K]");
    const int64_t n = weight.size(0);
    STD_TORCH_CHECK(weight.size(1) == k, "int8_linear: x: expected shape [..., ", weight.size(1), "]");
    STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == n && scale.scalar_type() == ScalarType::Float,
                    "int8_linear: scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "int8_linear: bias: expected shape [N]");
    check_input_scale("int8_linear", input_scale, k);
}

template <bool as_patches>
Tensor int8_linear(Tensor x_in, Tensor weight_in, Tensor scale_in, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale) {
    LinearInput input("int8_linear", x_in, as_patches);
    check(input.k, weight_in, scale_in, bias, input_scale);
    const Tensor& x = input.x;
    const Tensor weight = as_contiguous(weight_in), scale = as_contiguous(scale_in);
    const int64_t n = weight.size(0), k = weight.size(1);
    input.sizes.back() = n;
    Tensor y = new_tensor(x, input.sizes, x.scalar_type());
    const FloatBias as_float(bias);
    if (input_scale) input_scale = as_contiguous(*input_scale);
    dispatch_float(x.scalar_type(), "int8_linear: x", [&](auto zero) {
        using T = decltype(zero);
        linear<T>({data<T>(x), input_scale_of(input_scale), data<float>(scale), as_float.data(), mutable_data<T>(y),
                   input.m, n, k, input.where()},
                  data<int8_t>(weight));
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("int8_linear", TORCH_BOX(&engine::int8_linear<false>));
    m.impl("int8_linear.patches", TORCH_BOX(&engine::int8_linear<true>));
}
