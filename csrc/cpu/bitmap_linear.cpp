// bitmap_linear: float activations times a bitmap's float weights, in fp32, read directly from the bitmap. For many rows
// of activations, and fewer where little is kept, products with the kept weights alone (common/spmm.h), or the panels of
// common/gemm_float.h where most are; for a few by AVX2 and AVX-512, each row of weights is spread register by register
// and multiplied at once. Memory is safe by the scheme of common/bitmap.h.

#include "common/bitmap.h"
#include "common/bitmap_expand_float.h"
#include "common/bitmap_float.h"
#include "common/bitmap_float_avx512.h"
#include "common/bitmap_spmm.h"
#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/linear_binding.h"

namespace engine {
namespace {

constexpr int64_t kPrefetchBytes = 2 << 10;  // how far ahead of the value being read memory is asked for

// ---- panels -----------------------------------------------------------------------------------------------------

// Spreads a stretch of a row over out[0, kc), and may write on to the next multiple of 16. Returns how many values it
// took.
template <class V>
using ExpandFloats = int64_t (*)(const uint8_t* mask,  // of the stretch
                                 const V* values,      // kc + kReadAhead may be read
                                 int64_t kc, float* out);

template <class V>
int64_t expand_floats_portable(const uint8_t* mask, const V* values, int64_t kc, float* out) {
    int64_t taken = 0;
    for (int64_t i = 0; i < kc; ++i) {
        const bool kept = (mask[i / 8] >> (i % 8) & 1) != 0;
        const float value = to_float(values[taken]);
        out[i] = kept ? value : 0.0f;
        taken += kept;
    }
    return taken;
}

#if ENGINE_X86
template <class V>
ENGINE_AVX2 int64_t expand_floats_avx2(const uint8_t* mask, const V* values, int64_t kc, float* out) {
    const V* p = values;
    for (int64_t i = 0; i < kc; i += 64) {
        uint64_t bits = mask_bits(mask, i, kc);
        for (int64_t j = i; j < i + 64 && j < kc; j += 8, bits >>= 8) {
            const uint32_t m = bits & 0xff;
            _mm256_storeu_ps(out + j, expand_8_avx2(p, m));
            p += popcount64(m);
        }
    }
    return p - values;
}
#endif

template <class V>
ExpandFloats<V> expand_floats() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return expand_floats_avx2<V>;
    if (isa() == Isa::avx512) return expand_floats_avx512<V>;
#endif
    return expand_floats_portable<V>;
}

template <class V>
struct FloatBitmapProvider {
    using Value = V;
    FloatBitmap<V> weights;
    ExpandFloats<V> expand;
    std::array<int64_t, kFloatGroup> taken;           // values that each row of the group has given so far
    std::array<V, kFloatDepth + kReadAhead> scratch;  // the last values, where a vector would read beyond the tensor

    explicit FloatBitmapProvider(const FloatBitmap<V>& weights)
        : weights(weights), expand(expand_floats<V>()), taken{}, scratch{} {}

    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, float* panel) {
        block(row, rows, k0, kc, panel, expand);
    }
#if ENGINE_X86
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, BFloat16* panel) {
        block(row, rows, k0, kc, panel, [](auto... call) { return expand_floats_avx512(call...); });
    }
#endif

  private:
    template <class Element, class Expand>
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, Element* panel, Expand expand) {
        if (k0 == 0) taken.fill(0);
        for (int64_t r = 0; r < rows; ++r) {
            // Within the tensor, though a bitmap that doesn't fit together may have taken more than its row holds.
            const int64_t begin = std::min(weights.nnz, weights.row_offsets[row + r] + taken[r]);
            const int64_t left = weights.nnz - begin;
            const V* from = weights.values + begin;
            if (left < kc + kReadAhead) {
                std::copy_n(from, std::min(left, kc), scratch.data());
                from = scratch.data();
            }
            const uint8_t* mask = weights.mask(row + r) + k0 / 8;
            const int64_t count = expand(mask, from, kc, panel + r * kFloatDepth);
            taken[r] += count;
            // Ask for the row's next stretch, which will be about as long, while this one is multiplied; at its end for
            // the start of a row of the next group.
            const V* next = from + count;
            if (k0 + kc >= weights.k) {
                weights.check_row(row + r, taken[r]);
                const int64_t below = std::min(row + r + rows, weights.n - 1);
                mask = weights.mask(below);
                next = weights.values + weights.row_offsets[below];
            } else {
                mask += kFloatDepth / 8;
            }
            __builtin_prefetch(mask);
            const char* bytes = reinterpret_cast<const char*>(next);
            for (size_t b = 0; b < (count + 64 / sizeof(V)) * sizeof(V); b += 64) __builtin_prefetch(bytes + b);
        }
    }
};

// ---- dot products -----------------------------------------------------------------------------------------------

#if ENGINE_X86
// A few rows of activations by AVX2: each row of weights is spread register by register. AVX-512's way is in
// common/bitmap_float_avx512.h.
struct DotAvx2 {
    // Several sums for each output, so that additions need not wait for each other.
    static constexpr int64_t lanes(int m) { return m == 1 ? 32 : m <= 4 ? 16 : 8; }

    template <int M, class T, class V>
    static void outputs(const FloatLinear<T>& call, const FloatRows& rows, const FloatBitmap<V>& weights, int64_t begin,
                        int64_t end) {
        std::vector<V> scratch;
        for (int64_t column = begin; column < end; ++column) {
            const FloatColumn<V> row = weights.column(column, 1, scratch);
            float sums[M];
            int64_t taken = 0;
            const auto stretch = [&](int64_t k0, int64_t kc, float* to) __attribute__((always_inline)) {
                taken += dot<M>(row.mask + k0 / 8, row.values + taken, kc, rows.x + k0, rows.stride, to);
            };
            sum_stretches<M, lanes(M)>(M, call.k, stretch, sums);
            weights.check_row(column, taken);
            for (int m = 0; m < M; ++m) call.y[m * call.n + column] = float_output(sums[m], call, column);
        }
    }

    // Multiplies a stretch of a row of weights by M of activations. Returns how many values it took.
    template <int M, class V>
    ENGINE_AVX2 static int64_t dot(const uint8_t* mask,  // [ceil(k/8)]
                                   const V* values,      // k + kReadAhead may be read
                                   int64_t k,
                                   const float* x,  // [M, stride]
                                   int64_t stride,
                                   float* sums) {  // [M]
        constexpr int U = lanes(M) / 8;
        __m256 acc[U][M];
#pragma GCC unroll 16
        for (int i = 0; i < U * M; ++i) acc[i / M][i % M] = _mm256_setzero_ps();
        const V* p = values;
        int64_t i = 0;
        for (; i + 64 <= k; i += 64) {
            prefetch_values(p);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                const uint32_t m8 = mask[i / 8 + j];
                const __m256 weight = expand_8_avx2(p, m8);
                p += popcount64(m8);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    acc[j % U][m] = _mm256_fmadd_ps(weight, _mm256_load_ps(x + m * stride + i + j * 8), acc[j % U][m]);
                }
            }
        }
        uint64_t bits = mask_bits(mask, i, k);
        for (; i < k; i += 8, bits >>= 8) {
            const __m256 weight = expand_8_avx2(p, bits & 0xff);
            p += popcount64(bits & 0xff);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                acc[0][m] = _mm256_fmadd_ps(weight, _mm256_load_ps(x + m * stride + i), acc[0][m]);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) acc[0][m] = _mm256_add_ps(acc[0][m], acc[u][m]);
            sums[m] = sum_8_avx2(acc[0][m]);
        }
        return p - values;
    }

    template <class V>
    ENGINE_AVX2 ENGINE_INLINE static void prefetch_values(const V* p) {
        for (size_t i = 0; i < 64 * sizeof(V); i += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + i);
        }
    }
};

template <class T, class V, int M = kFloatDotRows>
void dot_linear(const FloatLinear<T>& call, const FloatBitmap<V>& weights) {
    if constexpr (M > 1) {
        if (call.m < M) return dot_linear<T, V, M - 1>(call, weights);
    }
    float_dot_linear(call, weights.row_bytes(), [&](int64_t begin, int64_t end, const FloatRows& rows) {
        DotAvx2::outputs<M>(call, rows, weights, begin, end);
    });
}
#endif

template <class T, class V>
void linear(const FloatLinear<T>& call, const FloatBitmap<V>& weights) {
    if (call.m == 0 || call.n == 0) return;
    const auto [bitmask, row_offsets, values, n, k, nnz, bad] = weights;
    if (float_spmm_pays<T, V>(call.m, nnz, n * k)) {
        return float_spmm(call, BitmapSource<V>(bitmask, row_offsets, values, k, nnz, *bad));
    }
#if ENGINE_X86
    if (isa() == Isa::avx512 && bitmap_dot_linear(call, weights)) return;
    if (isa() == Isa::avx2 && call.m <= kFloatDotRows) return dot_linear(call, weights);
#endif
    float_panel_linear(call, FloatBitmapProvider<V>(weights));
}

Tensor bitmap_linear(Tensor x, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, std::optional<Tensor> bias) {
    constexpr auto op = "bitmap_linear";
    STD_TORCH_CHECK(bitmask_in.scalar_type() == ScalarType::Byte && row_offsets_in.scalar_type() == ScalarType::Long,
                    op, ": expected a uint8 bitmask and int64 row_offsets");
    STD_TORCH_CHECK(x.dim() >= 1 && bitmask_in.dim() == 2 && bitmask_in.size(1) == mask_bytes(x.size(-1)), op,
                    ": expected x [..., K] and bitmask [N, ceil(K / 8)]");
    STD_TORCH_CHECK(
        row_offsets_in.dim() == 1 && row_offsets_in.size(0) == bitmask_in.size(0) + 1 && values_in.dim() == 1, op,
        ": expected row_offsets [N + 1] and values [nnz]");
    const Tensor bitmask = as_contiguous(bitmask_in), row_offsets = as_contiguous(row_offsets_in);
    const Tensor values = as_contiguous(values_in);
    const int64_t n = bitmask.size(0), nnz = values.numel();
    check_row_offsets(op, data<int64_t>(row_offsets), n, nnz);
    BadRow bad;
    Tensor y = float_linear_output(op, x, n, nullptr, bias, [&]<class T>(const FloatLinear<T>& call) {
        dispatch_float(values.scalar_type(), "bitmap_linear: values", [&](auto zero) {
            using V = decltype(zero);
            linear<T, V>(call,
                         {data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<V>(values), n, call.k, nnz, &bad});
        });
    });
    bad.raise(op);
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("bitmap_linear", TORCH_BOX(&engine::bitmap_linear)); }
