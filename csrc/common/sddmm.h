// Products of two dense matrices at the kept places of a third alone (SDDMM):
// out[n, k] += sum over m of a[m, n] b[m, k].
//
// Both are packed in strips of up to kWidth rows m, as in common/spmm.h: [n][row of the strip] and [k][row of the
// strip]. A sum over a strip is then a dot product of two short runs of memory, and the run of `a` stays in registers
// for all of a row's kept places.
#pragma once

#include <cstdint>

#include "common/spmm.h"

namespace engine {

struct SddmmPortable {
    static constexpr int64_t kWidth = 64, kUnit = 32;

    // Adds to the kept places of one row their sums over a strip.
    static void row(const KeptRows::Row& kept,
                    const float* a,  // [width]
                    const float* b,  // [kc, width]
                    int64_t width,
                    float* out) {  // [kept.count]
        constexpr int kLanes = 16;
        for (int64_t i = 0; i < kept.count; ++i) {
            const float* x = b + kept.columns[i] * width;
            float acc[kLanes] = {};
            for (int64_t m = 0; m < width; m += kLanes) {
                for (int j = 0; j < kLanes; ++j) acc[j] += a[m + j] * x[m + j];
            }
            for (int half = kLanes / 2; half > 0; half /= 2) {
                for (int j = 0; j < half; ++j) acc[j] += acc[j + half];
            }
            out[i] += acc[0];
        }
    }
};

#if ENGINE_X86
struct SddmmAvx2 {
    static constexpr int64_t kWidth = 64, kUnit = 32;

    // Four sums from four vectors' lanes.
    ENGINE_AVX2 ENGINE_INLINE static __m128 sums_4(const __m256 (&v)[4]) {
        const __m256 low = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
        const __m256 high = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
        const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee));
        return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    }

    template <int V>
    ENGINE_AVX2 static void row_of(const KeptRows::Row& kept, const float* a, const float* b, float* out) {
        constexpr int kChains = 2;
        const uint8_t* columns = kept.columns;
        __m256 x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) x[v] = _mm256_load_ps(a + 8 * v);
        for (int64_t i = 0; i < kept.count; i += 4) {
            const int64_t left = kept.count - i;
            __m256 sums[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const float* from = b + columns[i + (j < left ? j : 0)] * (8 * V);
                __m256 acc[kChains];
#pragma GCC unroll 2
                for (int c = 0; c < kChains; ++c) acc[c] = _mm256_mul_ps(x[c], _mm256_load_ps(from + 8 * c));
#pragma GCC unroll 8
                for (int v = kChains; v < V; ++v) {
                    acc[v % kChains] = _mm256_fmadd_ps(x[v], _mm256_load_ps(from + 8 * v), acc[v % kChains]);
                }
                sums[j] = _mm256_add_ps(acc[0], acc[1]);
            }
            const __m128 four = sums_4(sums);
            if (left >= 4) {
                _mm_storeu_ps(out + i, _mm_add_ps(_mm_loadu_ps(out + i), four));
            } else {
                alignas(16) float each[4];
                _mm_store_ps(each, four);
                for (int64_t j = 0; j < left; ++j) out[i + j] += each[j];
            }
        }
    }

    ENGINE_AVX2 static void row(const KeptRows::Row& kept,
                                const float* a,  // [width]
                                const float* b,  // [kc, width]
                                int64_t width,
                                float* out) {  // [kept.count]
        if (width == kWidth) return row_of<8>(kept, a, b, out);
        row_of<4>(kept, a, b, out);
    }
};
#endif

// Whether so few places are kept, of all, that sums for these alone are faster than the product of the dense matrices,
// which is the BLAS's. Measured on Zen 3 and Zen 5 (docs/experiments/sparse_linear.md).
inline bool sddmm_pays(int64_t m, int64_t kept, int64_t places) {
    const double share = isa() == Isa::avx2 ? 0.5 : isa() == Isa::avx512 ? 0.35 : 0.2;
    return m >= 32 && kept > 0 && static_cast<double>(kept) <= share * static_cast<double>(places);
}

struct SddmmStripsScratch;  // tag: the packed matrices, held by the calling thread

// `source` is as for spmm, over the places [n, k] of which some are kept; what its rows hold as values is what is added
// to, [kept()], and is not read by others meanwhile. Panel packs.
template <class Kernel, class Panel, class A, class B, class Source>
void sddmm(const A* a,  // [m, n]
           const B* b,  // [m, k]
           int64_t m, int64_t n, int64_t k, const Source& source) {
    const int64_t depth = spmm_depth(Kernel::kWidth, kSpmmDepth);
    constexpr int64_t kSerialWork = 1 << 17;  // as in spmm
    const bool serial = m * source.kept() < kSerialWork;
    const int64_t threads = serial ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t most = spmm_chunk_rows<Kernel>(m, n + k);
    const int64_t columns = std::min(kSpmmGroup, divide_up(n, threads)), groups = divide_up(n, columns);
    using Shared = Scratch<SddmmStripsScratch>;
    Shared shared(Shared::template bytes_for<float>(most * n) + Shared::template bytes_for<float>(most * k));
    float* const a_strips = shared.template take<float>(most * n);
    float* const b_strips = shared.template take<float>(most * k);
    for (int64_t chunk = 0; chunk < m; chunk += most) {
        const int64_t rows = std::min(most, m - chunk), strips = divide_up(rows, Kernel::kWidth);
        const auto width_of = [&](int64_t strip) {
            return std::min(Kernel::kWidth, round_up(rows - strip * Kernel::kWidth, Kernel::kUnit));
        };
        // Stretches of both, as in spmm.
        const int64_t a_parts = divide_up(n, depth), b_parts = divide_up(k, depth);
        parallel_for_unless(serial, strips * (a_parts + b_parts), 4, [&](int64_t first, int64_t last) {
            for (int64_t task = first; task < last; ++task) {
                const int64_t strip = task / (a_parts + b_parts), part = task % (a_parts + b_parts);
                const int64_t row = strip * Kernel::kWidth, count = std::min(Kernel::kWidth, rows - row);
                const int64_t width = width_of(strip);
                if (part < a_parts) {
                    const int64_t i = part * depth;
                    Panel::transpose(a + (chunk + row) * n + i, n, count, std::min(depth, n - i), width,
                                     a_strips + row * n + i * width);
                } else {
                    const int64_t i = (part - a_parts) * depth;
                    Panel::transpose(b + (chunk + row) * k + i, k, count, std::min(depth, k - i), width,
                                     b_strips + row * k + i * width);
                }
            }
        });
        parallel_for_unless(serial, groups, 1, [&](int64_t first, int64_t last) {
            using Own = Scratch<SpmmSumsScratch>;
            Own own(Own::template bytes_for<KeptRows>(1));
            KeptRows& kept = *own.template take<KeptRows>(1);
            Source position = source;
            for (int64_t group = first; group < last; ++group) {
                const int64_t begin = group * columns, count = std::min(columns, n - begin);
                for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += depth) {
                    position.rows(begin, count, k0, std::min(depth, k - k0), kept);
                    for (int64_t strip = 0; strip < strips; ++strip) {
                        const int64_t width = width_of(strip), row = strip * Kernel::kWidth;
                        for (int64_t r = 0; r < count; ++r) {
                            Kernel::row(kept.row[r], a_strips + row * n + (begin + r) * width,
                                        b_strips + row * k + k0 * width, width, const_cast<float*>(kept.row[r].values));
                        }
                    }
                }
            }
        });
    }
}

}  // namespace engine
