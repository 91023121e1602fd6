// int8_weight_linear: float activations times int8 weights [N, K] as they lie, in fp32. For many rows of activations
// the panels of common/gemm_float.h; for a few, dot products straight from the weights, which memory bounds.

#include "common/gemm_float.h"
#include "common/tensor.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

constexpr int64_t kPrefetchBytes = 2 << 10;  // how far ahead of the row being read memory is asked for

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
using ConvertBlock = void (*)(const int8_t*, int64_t, int64_t, int64_t, bool, float*);
void convert_block_portable(const int8_t* weight, int64_t k, int64_t rows, int64_t kc, bool more, float* panel) {
    convert_block(weight, k, rows, kc, more, panel);
}
#if ENGINE_X86
ENGINE_AVX2 void convert_block_avx2(const int8_t* weight, int64_t k, int64_t rows, int64_t kc, bool more,
                                    float* panel) {
    convert_block(weight, k, rows, kc, more, panel);
}
template <class Element>
ENGINE_AVX512 void convert_block_avx512(const int8_t* weight, int64_t k, int64_t rows, int64_t kc, bool more,
                                        Element* panel) {
    convert_block(weight, k, rows, kc, more, panel);
}
#endif

ConvertBlock converter() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return convert_block_avx2;
    if (isa() == Isa::avx512) return convert_block_avx512<float>;
#endif
    return convert_block_portable;
}

struct Int8Provider {
    using Value = int8_t;
    const int8_t* weight;  // [n, k]
    int64_t k;
    ConvertBlock convert;

    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, float* panel) const {
        convert(weight + row * k + k0, k, rows, kc, k0 + 2 * kFloatDepth <= k, panel);
    }
#if ENGINE_X86
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, BFloat16* panel) const {
        convert_block_avx512(weight + row * k + k0, k, rows, kc, k0 + 2 * kFloatDepth <= k, panel);
    }
#endif
};

// ---- dot products -----------------------------------------------------------------------------------------------

// A kernel multiplies R rows of weights by M of activations, so that a weight turned into fp32 serves M products and an
// activation R. It has kLanes weights to a step, and U steps at once, each with sums of its own: additions need not
// wait for each other.
struct DotPortable {
    static constexpr int kLanes = 8;

    template <int M, int R>
    static void dot(const int8_t* w,  // [R, k]
                    int64_t k,
                    const float* x,  // [M, stride]
                    int64_t stride, const int8_t*,
                    float* sums) {  // [M, R]
        for (int m = 0; m < M; ++m) {
            for (int r = 0; r < R; ++r) {
                const int8_t* from = w + r * k;
                float acc[kLanes] = {};
                int64_t i = 0;
                for (; i + kLanes <= k; i += kLanes) {
                    for (int j = 0; j < kLanes; ++j) acc[j] += x[m * stride + i + j] * static_cast<float>(from[i + j]);
                }
                for (int j = 0; i + j < k; ++j) acc[j] += x[m * stride + i + j] * static_cast<float>(from[i + j]);
                sums[m * R + r] = ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
            }
        }
    }
};

#if ENGINE_X86
struct DotAvx2 {
    static constexpr int kLanes = 8;

    template <int M, int R>
    ENGINE_AVX2 ENGINE_INLINE static void step(const int8_t* w, int64_t w_stride, const float* x, int64_t stride,
                                               __m256 (&acc)[M][R]) {
        __m256 weight[R];
        for (int r = 0; r < R; ++r) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + r * w_stride));
            weight[r] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        }
        for (int m = 0; m < M; ++m) {
            const __m256 v = _mm256_load_ps(x + m * stride);
            for (int r = 0; r < R; ++r) acc[m][r] = _mm256_fmadd_ps(weight[r], v, acc[m][r]);
        }
    }

    template <int M, int R>
    ENGINE_AVX2 static void dot(const int8_t* w,  // [R, k]
                                int64_t k,
                                const float* x,  // [M, stride]
                                int64_t stride,
                                const int8_t* ahead,  // what to ask memory for, R · k bytes
                                float* sums) {        // [M, R]
        constexpr int U = M * R == 1 ? 4 : M * R <= 4 ? 2 : 1;
        __m256 acc[U][M][R];
        for (int i = 0; i < U * M * R; ++i) acc[i / (M * R)][i / R % M][i % R] = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 32 <= k; i += 32) {
            if (ahead) __builtin_prefetch(ahead + i * R);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) step<M, R>(w + i + j * kLanes, k, x + i + j * kLanes, stride, acc[j % U]);
        }
        for (; i + kLanes <= k; i += kLanes) step<M, R>(w + i, k, x + i, stride, acc[0]);
        if (i < k) {
            int8_t tail[R][kLanes] = {};
            for (int r = 0; r < R; ++r) std::copy_n(w + r * k + i, k - i, tail[r]);
            step<M, R>(tail[0], kLanes, x + i, stride, acc[0]);
        }
        for (int m = 0; m < M; ++m) {
            for (int r = 0; r < R; ++r) {
                for (int u = 1; u < U; ++u) acc[0][m][r] = _mm256_add_ps(acc[0][m][r], acc[u][m][r]);
                sums[m * R + r] = sum_8_avx2(acc[0][m][r]);
            }
        }
    }
};

struct DotAvx512 {
    static constexpr int kLanes = 16;

    template <int M, int R>
    ENGINE_AVX512 ENGINE_INLINE static void step(const int8_t* w, int64_t w_stride, const float* x, int64_t stride,
                                                 __m512 (&acc)[M][R]) {
        __m512 weight[R];
        for (int r = 0; r < R; ++r) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * w_stride));
            weight[r] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        }
        for (int m = 0; m < M; ++m) {
            const __m512 v = _mm512_loadu_ps(x + m * stride);
            for (int r = 0; r < R; ++r) acc[m][r] = _mm512_fmadd_ps(weight[r], v, acc[m][r]);
        }
    }

    template <int M, int R>
    ENGINE_AVX512 static void dot(const int8_t* w,  // [R, k]
                                  int64_t k,
                                  const float* x,  // [M, stride]
                                  int64_t stride,
                                  const int8_t* ahead,  // what to ask memory for, R · k bytes
                                  float* sums) {        // [M, R]
        constexpr int U = M * R <= 2 ? 4 : M * R <= 4 ? 2 : 1;
        __m512 acc[U][M][R];
        for (int i = 0; i < U * M * R; ++i) acc[i / (M * R)][i / R % M][i % R] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 64 <= k; i += 64) {
            if (ahead) {
                for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + i * R + r * 64);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) step<M, R>(w + i + j * kLanes, k, x + i + j * kLanes, stride, acc[j % U]);
        }
        for (; i + kLanes <= k; i += kLanes) step<M, R>(w + i, k, x + i, stride, acc[0]);
        if (i < k) {
            int8_t tail[R][kLanes] = {};
            for (int r = 0; r < R; ++r) std::copy_n(w + r * k + i, k - i, tail[r]);
            step<M, R>(tail[0], kLanes, x + i, stride, acc[0]);
        }
        for (int m = 0; m < M; ++m) {
            for (int r = 0; r < R; ++r) {
                for (int u = 1; u < U; ++u) acc[0][m][r] = _mm512_add_ps(acc[0][m][r], acc[u][m][r]);
                sums[m * R + r] = _mm512_reduce_add_ps(acc[0][m][r]);
            }
        }
    }
};
#endif

// Rows [row, row + M) of activations by weight rows [column, column + R).
template <class Kernel, int M, int R, class T>
ENGINE_INLINE void dot_tile(const FloatLinear<T>& call, const FloatRows& rows, const int8_t* weight, int64_t row,
                            int64_t column) {
    float sums[M * R];
    const int8_t* w = weight + column * call.k;
    const bool more = row == 0 && (column + R) * call.k + kPrefetchBytes < call.n * call.k;
    Kernel::template dot<M, R>(w, call.k, rows.x + row * rows.stride, rows.stride, more ? w + kPrefetchBytes : nullptr,
                               sums);
    for (int m = 0; m < M; ++m) {
        T* y = call.y + (row + m) * call.n + column;
        for (int r = 0; r < R; ++r) y[r] = float_output(sums[m * R + r], call, column + r);
    }
}

template <class Kernel, int R, class T>
void dot_rows(const FloatLinear<T>& call, const FloatRows& rows, const int8_t* weight, int64_t column) {
    for (int64_t row = 0; row < call.m; row += 4) {
        switch (std::min<int64_t>(4, call.m - row)) {
            case 1:
                dot_tile<Kernel, 1, R>(call, rows, weight, row, column);
                break;
            case 2:
                dot_tile<Kernel, 2, R>(call, rows, weight, row, column);
                break;
            case 3:
                dot_tile<Kernel, 3, R>(call, rows, weight, row, column);
                break;
            default:
                dot_tile<Kernel, 4, R>(call, rows, weight, row, column);
        }
    }
}

template <class Kernel, class T>
void dot_linear(const FloatLinear<T>& call, const int8_t* weight) {
    float_dot_linear(call, call.k, [&](int64_t begin, int64_t end, const FloatRows& rows) {
        int64_t column = begin;
        if (call.m > 1) {
            for (; column + 2 <= end; column += 2) dot_rows<Kernel, 2>(call, rows, weight, column);
        }
        for (; column < end; ++column) dot_rows<Kernel, 1>(call, rows, weight, column);
    });
}

template <class T>
void linear(const FloatLinear<T>& call, const int8_t* weight) {
    constexpr int64_t kPairDotRows = 6;  // products of bfloat16 make panels the faster way earlier
    const int64_t most = multiplies_bfloat16<T, int8_t>() ? kPairDotRows : kDotRows;
    if (call.m > most) return float_panel_linear(call, Int8Provider{weight, call.k, converter()});
#if ENGINE_X86
    if (isa() == Isa::avx2) return dot_linear<DotAvx2>(call, weight);
    if (isa() == Isa::avx512) return dot_linear<DotAvx512>(call, weight);
#endif
    dot_linear<DotPortable>(call, weight);
}

Tensor int8_weight_linear(Tensor x_in, Tensor weight_in, Tensor scale_in, std::optional<Tensor> bias) {
    STD_TORCH_CHECK(weight_in.dim() == 2 && weight_in.scalar_type() == ScalarType::Char,
                    "int8_weight_linear: weight: expected int8 [N, K]");
    const int64_t n = weight_in.size(0), k = weight_in.size(1);
    STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.size(-1) == k, "int8_weight_linear: x: expected shape [..., ", k, "]");
    STD_TORCH_CHECK(scale_in.dim() == 1 && scale_in.size(0) == n && scale_in.scalar_type() == ScalarType::Float,
                    "int8_weight_linear: scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "int8_weight_linear: bias: expected shape [N]");
    const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in), scale = as_contiguous(scale_in);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = n;
    const int64_t m = rows_of(sizes);
    Tensor y = new_tensor(x, sizes, x.scalar_type());
    const FloatBias as_float(bias);
    dispatch_float(x.scalar_type(), "int8_weight_linear: x", [&](auto zero) {
        using T = decltype(zero);
        linear<T>({data<T>(x), data<float>(scale), as_float.data(), mutable_data<T>(y), m, n, k}, data<int8_t>(weight));
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_weight_linear", TORCH_BOX(&engine::int8_weight_linear)); }
