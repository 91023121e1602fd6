// semi_structured_linear: float activations times a 2:4 weight of float values, in fp32, read as it lies. For a few
// rows of activations the two bits of each value become a permutation that fetches the activation it belongs to, once
// for all rows; many meet the stored values only (common/spmm.h). With AVX-512 the panels of common/gemm_float.h, which
// the weights are spread to, are faster below 64 rows, and in bfloat16.

#include "common/bitmap_float_avx512.h"
#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/linear_binding.h"
#include "common/semi_structured.h"
#include "common/semi_structured_avx512.h"
#include "common/spmm.h"

namespace engine {
namespace {

constexpr int64_t kPrefetchBytes = 2 << 10;  // how far ahead of the value being read memory is asked for

// For a byte of metadata the columns of its four values among eight weights, a byte each.
constexpr std::array<uint32_t, 256> make_places() {
    std::array<uint32_t, 256> table{};
    for (uint32_t b = 0; b < 256; ++b) {
        table[b] = (b & 3) | (b >> 2 & 3) << 8 | (4 + (b >> 4 & 3)) << 16 | (4 + (b >> 6)) << 24;
    }
    return table;
}
constexpr std::array<uint32_t, 256> kPlaces = make_places();

// As a source for common/spmm.h.
template <class V>
class SemiSource {
  public:
    explicit SemiSource(const SemiStructured<V>& weight) : weight_(weight) {}

    int64_t kept() const { return weight_.n * weight_.row_values(); }

    void rows(int64_t row, int64_t rows, int64_t k0, int64_t kc, KeptRows& kept) const {
        static_assert(kSpmmDepth % 8 == 0);
        const int64_t groups = groups_of_four(kc);
        uint8_t* columns = kept.columns;
        float* values = kept.values;
        for (int64_t r = row; r < row + rows; ++r) {
            const uint8_t* metadata = weight_.metadata_at(r, k0);
            for (int64_t i = 0; i < (groups + 1) / 2; ++i) {
                const uint32_t four = kPlaces[metadata[i]] + static_cast<uint32_t>(8 * i) * 0x01010101u;
                std::memcpy(columns + 4 * i, &four, sizeof four);
            }
            int64_t count = 2 * groups;
            const V* from = weight_.values_at(r, k0);
            const float* as_float = values;
            if constexpr (sizeof(V) == sizeof(float)) {
                as_float = from;
            } else {
                to_floats_(from, count, values);
            }
            if (kc % 4 != 0) {  // the last group may stand for columns beyond K, which hold nothing
                std::copy_n(as_float, count, values);
                as_float = values;
                const int64_t last = count - 2;
                count = last;
                for (int64_t i = last; i < last + 2; ++i) {
                    if (columns[i] >= kc) continue;
                    columns[count] = columns[i];
                    values[count++] = values[i];
                }
            }
            kept.row[r - row] = {as_float, columns, count};
            columns += count;
            values += count;
        }
    }

  private:
    SemiStructured<V> weight_;
    ToFloats<V> to_floats_ = to_floats<V>();
};

// A kernel multiplies a stretch of a row of weights by M of activations. Several sums each, so that additions need not
// wait for each other.
template <class V>
using DotRow = void (*)(const V* values,          // [2 groups]
                        const uint8_t* metadata,  // [ceil(groups/2)]
                        int64_t k,
                        const float* x,  // [M, stride]: k, then zeros
                        int64_t stride,
                        float* sums);  // [M]

struct DotPortable {
    static constexpr int64_t kLanes = 8, kLeastLanes = kLanes;
    static void arrange(const FloatRows&, int64_t) {}

    template <class V>
    static void add(const V* values, const uint8_t* metadata, const float* x, int64_t stride, int m,
                    float (*acc)[kLanes]) {
        float weight[kLanes];
        spread_any(values, metadata, kLanes, weight, [](V value) { return to_float(value); });
        for (int r = 0; r < m; ++r) {
            for (int64_t j = 0; j < kLanes; ++j) acc[r][j] += x[r * stride + j] * weight[j];
        }
    }

    template <int M, class V>
    static void dot(const V* values, const uint8_t* metadata, int64_t k, const float* x, int64_t stride, float* sums) {
        float acc[M][kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= k; i += kLanes) add(values + i / 2, metadata + i / 8, x + i, stride, M, acc);
        if (i < k) {
            const SemiTail<V, kLanes> tail(values + i / 2, metadata + i / 8, k - i);
            add(tail.values, tail.metadata, x + i, stride, M, acc);
        }
        for (int m = 0; m < M; ++m) sums[m] = sum_8(acc[m]);
    }
};

#if ENGINE_X86
struct DotAvx2 {
    static constexpr int64_t kLeastLanes = 32;  // 16 for the half of the weights that is stored

    // Of 16 activations groups 0, 2, 1, 3: vpermilps fetches within 128 bits, groups 0 and 2 for the lower halves of
    // lanes.
    ENGINE_AVX2 static void arrange(const FloatRows& rows, int64_t m) {
        for (int64_t i = 0; i < m * rows.stride; i += 16) {
            float* middle = rows.x + i + 4;
            const __m128 second = _mm_load_ps(middle), third = _mm_load_ps(middle + 4);
            _mm_store_ps(middle, third);
            _mm_store_ps(middle + 4, second);
        }
    }

    // 8 values of 16 weights; the lowest two bits of each lane of `places` say where the value stands in its group.
    template <int M, class V>
    ENGINE_AVX2 ENGINE_INLINE static void step(const V* values, __m256i places, const float* x, int64_t stride,
                                               __m256 (&acc)[M]) {
        const __m256 w = load_8_avx2(values);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m256 even = _mm256_permutevar_ps(_mm256_load_ps(x + m * stride), places);
            const __m256 odd = _mm256_permutevar_ps(_mm256_load_ps(x + m * stride + 8), places);
            acc[m] = _mm256_fmadd_ps(w, _mm256_blend_ps(even, odd, 0xcc), acc[m]);
        }
    }

    template <int M, class V>
    ENGINE_AVX2 ENGINE_INLINE static void step_32(const V* values, const uint8_t* metadata, const float* x,
                                                  int64_t stride, __m256 (&low)[M], __m256 (&high)[M]) {
        int32_t word;
        std::memcpy(&word, metadata, sizeof word);
        const __m256i fields = _mm256_set1_epi32(word);
        const __m256i first = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        const __m256i second = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
        step<M>(values, _mm256_srlv_epi32(fields, first), x, stride, low);
        step<M>(values + 8, _mm256_srlv_epi32(fields, second), x + 16, stride, high);
    }

    template <int M, class V>
    ENGINE_AVX2 static void dot(const V* values, const uint8_t* metadata, int64_t k, const float* x, int64_t stride,
                                float* sums) {
        constexpr int U = M == 1 ? 4 : 2;  // M of 5 and more spill a few sums
        __m256 acc[U][M];
#pragma GCC unroll 16
        for (int i = 0; i < U * M; ++i) acc[i / M][i % M] = _mm256_setzero_ps();
        int64_t i = 0;
        for (; i + 64 <= k; i += 64) {
#pragma GCC unroll 2
            for (int p = 0; p < 32 * static_cast<int>(sizeof(V)); p += 64) {
                __builtin_prefetch(reinterpret_cast<const char*>(values + i / 2) + kPrefetchBytes + p);
            }
            __builtin_prefetch(metadata + i / 8 + kPrefetchBytes / 4);
            step_32<M>(values + i / 2, metadata + i / 8, x + i, stride, acc[0], acc[1]);
            step_32<M>(values + i / 2 + 16, metadata + i / 8 + 4, x + i + 32, stride, acc[U - 2], acc[U - 1]);
        }
        if (i < k) {
            const SemiTail<V, 64> tail(values + i / 2, metadata + i / 8, k - i);
            step_32<M>(tail.values, tail.metadata, x + i, stride, acc[0], acc[1]);
            step_32<M>(tail.values + 16, tail.metadata + 4, x + i + 32, stride, acc[0], acc[1]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) acc[0][m] = _mm256_add_ps(acc[0][m], acc[u][m]);
            sums[m] = sum_8_avx2(acc[0][m]);
        }
    }
};

// With AVX-512 the weight is a bitmap, as soon as its places have become bits (common/bitmap_float_avx512.h).
template <class V>
struct SemiBitmap {
    using Value = V;
    struct Scratch {
        std::vector<uint8_t> mask;
        std::vector<V> values;
    };
    SemiStructured<V> weight;

    int64_t row_bytes() const { return weight.row_values() * static_cast<int64_t>(sizeof(V)) + weight.row_bytes(); }
    FloatColumn<V> column(int64_t row, int64_t together, Scratch& scratch) const {
        const int64_t values_bytes = weight.row_values() * static_cast<int64_t>(sizeof(V));
        const int64_t bytes = weight.row_bytes();
        scratch.mask.resize(round_up(bytes, 64));
        const uint8_t* metadata = weight.metadata_at(row, 0);
        bitmap_of_row_avx512(metadata, bytes, scratch.mask.data());
        return {scratch.mask.data(), readable(row, 0, weight.row_values(), scratch.values),
                metadata + bytes_ahead(together * bytes), bytes_ahead(together * values_bytes)};
    }
    void check_row(int64_t, int64_t) const {}

    // `count` values of a row and kReadAhead more: where they lie, or a copy.
    const V* readable(int64_t row, int64_t k0, int64_t count, std::vector<V>& copy) const {
        const V* from = weight.values_at(row, k0);
        const V* end = weight.values_at(weight.n, 0);
        if (end - from >= count + kReadAhead) return from;
        copy.resize(count + kReadAhead);
        std::copy_n(from, std::min<int64_t>(count, end - from), copy.data());
        return copy.data();
    }
};

template <class V>
struct SemiBitmapProvider {
    using Value = V;
    SemiBitmap<V> weight;
    std::vector<V> copy;

    explicit SemiBitmapProvider(const SemiStructured<V>& weight) : weight{weight}, copy{} {}

    template <class Element>
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, Element* panel) {
        for (int64_t r = row; r < row + rows; ++r, panel += kFloatDepth) {
            const uint8_t* metadata = weight.weight.metadata_at(r, k0);
            const V* values = weight.readable(r, k0, kc / 2 + 2, copy);
            uint8_t mask[64];
            bitmap_of_row_avx512(metadata, (groups_of_four(kc) + 1) / 2, mask);
            expand_floats_avx512(mask, values, kc, panel);
            // Ask for the row's next stretch, while this one is multiplied.
            __builtin_prefetch(metadata + kFloatDepth / 8);
            const char* next = reinterpret_cast<const char*>(values + kFloatDepth / 2);
            for (size_t b = 0; b < kFloatDepth / 2 * sizeof(V); b += 64) __builtin_prefetch(next + b);
        }
    }
};
#endif

template <class Kernel, class T, class V>
void dot_linear(const FloatLinear<T>& call, const SemiStructured<V>& weight) {
    static constexpr DotRow<V> kDots[kFloatDotRows] = {
        Kernel::template dot<1, V>, Kernel::template dot<2, V>, Kernel::template dot<3, V>, Kernel::template dot<4, V>,
        Kernel::template dot<5, V>, Kernel::template dot<6, V>, Kernel::template dot<7, V>, Kernel::template dot<8, V>};
    const DotRow<V> dot = kDots[call.m - 1];
    const auto dots = [&](int64_t begin, int64_t end, const FloatRows& rows) {
        for (int64_t column = begin; column < end; ++column) {
            float sums[kFloatDotRows];
            const auto stretch = [&](int64_t k0, int64_t kc, float* to) __attribute__((always_inline)) {
                dot(weight.values_at(column, k0), weight.metadata_at(column, k0), kc, rows.x + k0, rows.stride, to);
            };
            sum_stretches<kFloatDotRows, Kernel::kLeastLanes>(call.m, call.k, stretch, sums);
            for (int64_t m = 0; m < call.m; ++m) call.y[m * call.n + column] = float_output(sums[m], call, column);
        }
    };
    float_dot_linear(call, call.k / 2 * static_cast<int64_t>(sizeof(V)), dots,
                     [&](const FloatRows& rows) { Kernel::arrange(rows, call.m); });
}

template <class T, class V>
void linear(const FloatLinear<T>& call, const SemiStructured<V>& weight) {
    if (call.m == 0 || call.n == 0) return;
#if ENGINE_X86
    if (isa() == Isa::avx512) {
        if (bitmap_dot_linear(call, SemiBitmap<V>{weight})) return;
        if (!float_spmm_pays<T, V>(call.m, 1, 2)) return float_panel_linear(call, SemiBitmapProvider<V>(weight));
    }
#endif
    if (call.m > kFloatDotRows) return float_spmm(call, SemiSource<V>(weight));
#if ENGINE_X86
    if (isa() == Isa::avx2) return dot_linear<DotAvx2>(call, weight);
#endif
    dot_linear<DotPortable>(call, weight);
}

Tensor semi_structured_linear(Tensor x, Tensor values_in, Tensor metadata_in, std::optional<Tensor> bias) {
    constexpr auto op = "semi_structured_linear";
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x: expected at least one dimension");
    check_semi_structured(op, values_in, metadata_in, x.size(-1));
    const Tensor values = as_contiguous(values_in), metadata = as_contiguous(metadata_in);
    const int64_t n = values.size(0);
    return float_linear_output(op, x, n, nullptr, bias, [&]<class T>(const FloatLinear<T>& call) {
        dispatch_float(values.scalar_type(), "semi_structured_linear: values", [&](auto zero) {
            using V = decltype(zero);
            linear<T, V>(call, {data<V>(values), data<uint8_t>(metadata), n, call.k});
        });
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("semi_structured_linear", TORCH_BOX(&engine::semi_structured_linear));
}
