// Products with the kept weights only, for many rows of activations, or fewer where little is kept: what a pruned weight
// saves in arithmetic, where common/gemm_float.h multiplies by its zeros.
//
// Activations are packed once for all threads, in fp32 and transposed, in STRIPS of up to kWidth rows: [k][row of the
// strip]. Each kept weight costs one broadcast and one FMA for each vector of the strip, whose activations come from
// L1: nearly twice a product in a dense tile, which uses each load for a dozen weights. So it pays where half of the
// weights are zero, or more (float_spmm_pays).
//
// Each thread takes a group of outputs and, stretch by stretch of K, asks the SOURCE which of their weights are kept,
// once for all strips. A source is copied for each thread, so that it may keep a position, and has one function:
//
//   void rows(int64_t row, int64_t rows, int64_t k0, int64_t kc, KeptRows& kept);
//
// It says what is kept of the weights [row, row + rows) × [k0, k0 + kc).
//   rows ≤ kSpmmGroup; kc ≤ kSpmmDepth; k0 is a multiple of 8, and kc the same for all stretches but a row's last.
//   A call begins a new group of rows, with k0 = 0, or continues the last one where it ended.
//
// int8 goes the same way, as fp32 holds what is added up in one stretch exactly: 256 · 127 · 128 < 2^24.
// Stretches are added up in int32.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/floats.h"
#include "common/gemm_float.h"
#include "common/gemm_float_portable.h"
#include "common/gemm_int8.h"
#if ENGINE_X86
#include "common/gemm_float_avx2.h"
#endif

namespace engine {

constexpr int64_t kSpmmDepth = 256;  // at most so much of K to a stretch: columns are counted in bytes
constexpr int64_t kSpmmGroup = 64;   // at most so many weight rows to a group
static_assert(kSpmmDepth * 127 * 128 < 1 << 24);

// The processor's L1 for data: from 32 KB to 48, where it is known.
inline int64_t l1_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL1_DCACHE_SIZE), 32 << 10, 48 << 10);
    return bytes;
#else
    return 32 << 10;
#endif
}

// The length of a stretch of K for strips of this width: a strip may fill three quarters of L1, and chains of additions
// may be no longer than Kernel::chain.
inline int64_t spmm_depth(int64_t width, int64_t chain) {
    const auto fitting = l1_bytes() / 4 * 3 / static_cast<int64_t>(sizeof(float)) / width;
    return std::min({kSpmmDepth, chain, round_down(fitting, 8)});
}

// Whether few enough of the weights V are kept for the sparse product to beat dense tiles, or for a few rows of
// activations T dot products that spread a row of weights in registers. AVX-512 has twice the registers, and twice the
// throughput in bfloat16, so that fewer may be kept. The portable code spreads weights one by one. Measured on Zen 3 and,
// with AVX-512, on Zen 5 (docs/experiments/sparse_linear.md).
template <class T, class V>
bool float_spmm_pays(int64_t m, int64_t kept, int64_t weights) {
    double share = m <= 6 ? 0.0 : m <= kFloatDotRows ? 0.1 : m < 32 ? 0.5 : 0.6;
    if (isa() == Isa::avx512) share = m <= kFloatDotRows ? 0.0 : m <= 12 ? 0.15 : m <= 16 ? 0.2 : m < 64 ? 0.4 : 0.5;
    if (multiplies_bfloat16<T, V>()) share = m < 128 ? 0.0 : 0.12;
    if (isa() == Isa::portable) share = m < 64 ? 0.9 : 0.4;
    return static_cast<double>(kept) <= share * static_cast<double>(weights);
}
// AVX2's int8 tiles are up to twice as fast as fp32's, most of all for a few rows; with VNNI four times.
inline bool int8_spmm_pays(int64_t m, int64_t k, int64_t kept, int64_t weights) {
    if (variant() != Variant::avx2 || m <= 24 || k > kExactDepth) return false;
    const double share = m <= 40 ? 0.15 : m < 128 ? 0.2 : 0.3;
    return static_cast<double>(kept) <= share * static_cast<double>(weights);
}

// What is kept of a stretch of some rows.
struct KeptRows {
    struct Row {
        const float* values;     // [count]
        const uint8_t* columns;  // [count], counted from the stretch's first
        int64_t count;
    };
    Row row[kSpmmGroup];
    // Where a source may put them, row after row, or kStride apart: an odd number of lines, as lists a power of two
    // apart share a few sets of the cache and drive each other out.
    static constexpr int64_t kStride = kSpmmDepth + 16;
    alignas(64) float values[kSpmmGroup * kStride];
    alignas(64) uint8_t columns[kSpmmGroup * kStride];
};

}  // namespace engine

#include "common/spmm_kernels.h"

namespace engine {

// ---- the loops around them --------------------------------------------------------------------------------------

// How a call is cut into tasks.
struct SpmmPlan {
    int64_t chunk_rows;  // rows of activations packed at a time
    int64_t width;       // of a strip
    int64_t depth;       // of a stretch of K
    int64_t columns;     // outputs to a task
    int64_t groups;      // tasks along the outputs
    int64_t strips;      // of a chunk, to a task
    int64_t parts;       // tasks along the strips of a chunk
};

// Rows of activations packed at a time: 8 MB, but 256 rows at most, whose sums take up to 64 KB.
template <class Kernel>
int64_t spmm_chunk_rows(int64_t m, int64_t k) {
    constexpr int64_t kChunkBytes = 8 << 20, kMostRows = 256;
    const int64_t fitting = kChunkBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, k);
    const int64_t unit = fitting < Kernel::kWidth ? Kernel::kUnit : Kernel::kWidth;
    const int64_t most = std::min(kMostRows, std::max(unit, round_down(fitting, unit)));
    return round_up(divide_up(m, divide_up(m, most)), Kernel::kUnit);
}

template <class Kernel>
SpmmPlan plan_spmm(int64_t m, int64_t n, int64_t k, int64_t threads) {
    SpmmPlan plan;
    plan.chunk_rows = spmm_chunk_rows<Kernel>(m, k);
    plan.width = round_up(divide_up(plan.chunk_rows, divide_up(plan.chunk_rows, Kernel::kWidth)), Kernel::kUnit);
    plan.depth = spmm_depth(plan.width, Kernel::chain(plan.width));
    const int64_t groups = round_up(divide_up(n, kSpmmGroup), threads);
    plan.columns = divide_up(n, groups);
    plan.groups = divide_up(n, plan.columns);
    // Where outputs are too few for all threads, cut along the rows too, though each part looks for what is kept again.
    const int64_t strips = divide_up(plan.chunk_rows, plan.width);
    plan.strips = divide_up(strips, std::min(strips, std::max<int64_t>(1, threads / plan.groups)));
    plan.parts = divide_up(strips, plan.strips);
    return plan;
}

struct SpmmStripsScratch;  // tag: the packed activations, held by the calling thread
struct SpmmSumsScratch;    // tag: a thread's sums, and what is kept of its rows

// `work` says what is multiplied (m, n, k) and how it begins and ends:
//
//   chunk(first, rows)                                before rows [first, first + rows) are packed
//   pack(row, rows, k0, kc, width, strip, finite)     part of a strip; `row` is counted from the chunk's first
//   finish(sums, width, row, rows, column, columns)   sums [columns, width] to outputs
//   spoil(row)                                        outputs of a row that is not finite
template <class Kernel, class Work, class Source>
void spmm(Work& work, const Source& weights) {
    using Sum = typename Work::Sum;
    constexpr int64_t kSerialWork = 1 << 17;  // multiplications that are done before another thread has woken
    const int64_t m = work.m, n = work.n, k = work.k;
    const bool serial = m * weights.kept() < kSerialWork;
    const int64_t threads = serial ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
    const SpmmPlan plan = plan_spmm<Kernel>(m, n, k, threads);
    const int64_t stretches = std::max<int64_t>(1, divide_up(k, plan.depth));
    // Sums of many stretches are added up by the square root of their number, as an error grows with a chain's length.
    constexpr int64_t kLongestChain = 32;
    const bool several = std::is_same_v<Sum, float> && stretches > kLongestChain;
    const int64_t chain = several ? static_cast<int64_t>(std::sqrt(static_cast<double>(stretches))) : stretches;
    using Shared = Scratch<SpmmStripsScratch>;
    Shared shared(Shared::template bytes_for<float>(plan.chunk_rows * k) +
                  Shared::template bytes_for<uint8_t>(stretches * plan.chunk_rows));
    float* const strips = shared.template take<float>(plan.chunk_rows * k);
    uint8_t* const finite =
        shared.template take<uint8_t>(stretches * plan.chunk_rows);  // whether a stretch of a row is
    for (int64_t chunk = 0; chunk < m; chunk += plan.chunk_rows) {
        const int64_t rows = std::min(plan.chunk_rows, m - chunk), count = divide_up(rows, plan.width);
        const auto width_of = [&](int64_t strip) {
            return std::min(plan.width, round_up(rows - strip * plan.width, Kernel::kUnit));
        };
        const auto at = [&](int64_t strip, int64_t k0) {
            return strips + strip * plan.width * k + k0 * width_of(strip);
        };
        work.chunk(chunk, rows);
        parallel_for_unless(serial, count * stretches, 4, [&](int64_t first, int64_t last) {
            for (int64_t task = first; task < last; ++task) {
                const int64_t strip = task / stretches, stretch = task % stretches, k0 = stretch * plan.depth;
                const int64_t row = strip * plan.width;
                work.pack(row, std::min(plan.width, rows - row), k0, std::min(plan.depth, k - k0), width_of(strip),
                          at(strip, k0), finite + stretch * rows + row);
            }
        });
        parallel_for_unless(serial, plan.groups * plan.parts, 1, [&](int64_t first, int64_t last) {
            using Own = Scratch<SpmmSumsScratch>;
            const int64_t sums = plan.strips * plan.width * plan.columns;
            Own own((several ? 2 : 1) * Own::template bytes_for<Sum>(sums) + Own::template bytes_for<KeptRows>(1));
            Sum* const own_sums = own.template take<Sum>(sums);
            Sum* const totals = several ? own.template take<Sum>(sums) : own_sums;
            KeptRows& kept = *own.template take<KeptRows>(1);
            Source source = weights;
            for (int64_t task = first; task < last; ++task) {
                const int64_t column = task / plan.parts * plan.columns, begin = task % plan.parts * plan.strips;
                const int64_t end = std::min(count, begin + plan.strips);
                const int64_t columns = std::min(plan.columns, n - column);
                if (begin >= end) continue;
                for (int64_t stretch = 0; stretch < stretches; ++stretch) {
                    const int64_t k0 = stretch * plan.depth;
                    source.rows(column, columns, k0, std::min(plan.depth, k - k0), kept);
                    for (int64_t strip = begin; strip < end; ++strip) {
                        Kernel::tile(kept, columns, at(strip, k0), width_of(strip), stretch % chain > 0,
                                     own_sums + (strip - begin) * plan.width * columns);
                    }
                    if (several && (stretch % chain == chain - 1 || stretch == stretches - 1)) {
                        const int64_t count = (end - begin) * plan.width * columns;
                        for (int64_t i = 0; i < count; ++i) {
                            totals[i] = stretch < chain ? own_sums[i] : totals[i] + own_sums[i];
                        }
                    }
                }
                for (int64_t strip = begin; strip < end; ++strip) {
                    const int64_t row = strip * plan.width;
                    work.finish(totals + (strip - begin) * plan.width * columns, width_of(strip), row,
                                std::min(plan.width, rows - row), column, columns);
                }
            }
        });
        for (int64_t row = 0; row < rows; ++row) {
            bool all = true;
            for (int64_t i = 0; i < stretches; ++i) all &= finite[i * rows + row] != 0;
            if (!all) work.spoil(row);
        }
    }
}

// ---- what is multiplied -----------------------------------------------------------------------------------------

// Float activations; Panel packs and finishes (common/gemm_float_<isa>.h).
template <class Panel, class T>
struct FloatSpmm {
    using Sum = float;
    const FloatLinear<T>& call;
    int64_t m = call.m, n = call.n, k = call.k;
    int64_t first = 0;  // the call's row that is the chunk's first

    void chunk(int64_t first_row, int64_t /*rows*/) { first = first_row; }
    void pack(int64_t row, int64_t rows, int64_t k0, int64_t kc, int64_t width, float* strip, uint8_t* finite) const {
        Panel::pack(call.x + (first + row) * k + k0, k, rows, kc, width, strip, finite);
    }
    void finish(const float* sums, int64_t width, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
        Panel::finish(call, sums, width, first + row, rows, column, columns);
    }
    void spoil(int64_t row) const { fill_nan(call, first + row); }
};

#if ENGINE_X86
// int8 activations, quantised chunk by chunk.
template <class T>
struct Int8Spmm {
    using Sum = int32_t;
    const LinearCall<T>& call;
    const QuantizedRows<int8_t>& quantized;  // a chunk
    const ActivationQuantizer<int8_t, T> quantize{call};
    int64_t m = call.m, n = call.n, k = call.k;
    int64_t first = 0;  // the call's row that is the chunk's first

    void chunk(int64_t first_row, int64_t rows) {
        first = first_row;
        quantize.all(first_row, rows, quantized);
    }
    void pack(int64_t row, int64_t rows, int64_t k0, int64_t kc, int64_t width, float* strip, uint8_t* finite) const {
        const int64_t stride = quantized.stride;
        FloatPanelAvx2::transpose(quantized.q + row * stride + k0, stride, rows, kc, width, strip);
        std::fill_n(finite, rows, uint8_t{1});  // a row that is not has a scale of NaN
    }
    ENGINE_AVX2 void finish(const int32_t* sums, int64_t width, int64_t row, int64_t rows, int64_t column,
                            int64_t columns) const {
        T* const y = call.y + first * call.n + column;
        int64_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            int64_t j = 0;
            for (; j + 8 <= columns; j += 8) {
                __m256 v[8];
                for (int i = 0; i < 8; ++i) {
                    const auto* from = reinterpret_cast<const __m256i*>(sums + (j + i) * width + r);
                    v[i] = _mm256_cvtepi32_ps(_mm256_load_si256(from));
                }
                transpose_8x8_avx2(v);
                const __m256 scale = _mm256_loadu_ps(call.scale + column + j);
                for (int i = 0; i < 8; ++i) {  // as linear_output
                    const __m256 both = _mm256_mul_ps(_mm256_set1_ps(quantized.scale[row + r + i]), scale);
                    __m256 out = _mm256_mul_ps(v[i], both);
                    if (call.bias) out = _mm256_add_ps(out, _mm256_loadu_ps(call.bias + column + j));
                    store_8_avx2(y + (row + r + i) * call.n + j, out);
                }
            }
            for (int64_t i = r; i < r + 8; ++i) finish_row(sums + i, width, row + i, column, j, columns);
        }
        for (; r < rows; ++r) finish_row(sums + r, width, row + r, column, 0, columns);
    }
    ENGINE_INLINE void finish_row(const int32_t* sums, int64_t width, int64_t row, int64_t column, int64_t begin,
                                  int64_t columns) const {
        T* const y = call.y + (first + row) * call.n + column;
        for (int64_t j = begin; j < columns; ++j)
            y[j] = linear_output(sums[j * width], quantized.scale[row], call, column + j);
    }
    void spoil(int64_t) const {}
};

// call.k ≤ kExactDepth: sums are int32.
template <class T, class Source>
void int8_spmm(const LinearCall<T>& call, const Source& weights) {
    if (call.m == 0 || call.n == 0) return;
    using Rows = QuantizedRows<int8_t>;
    const int64_t most = spmm_chunk_rows<SpmmAvx2>(call.m, call.k);
    ActivationScratch scratch(Rows::scratch_bytes(most, call.k));
    const Rows rows(scratch, most, call.k);
    Int8Spmm<T> work{call, rows};
    spmm<SpmmAvx2>(work, weights);
}
#endif

template <class T, class Source>
void float_spmm(const FloatLinear<T>& call, const Source& weights) {
    if (call.m == 0 || call.n == 0) return;
#if ENGINE_X86
    FloatSpmm<FloatPanelAvx2, T> work{call};
    if (isa() == Isa::avx512) return spmm<SpmmAvx512>(work, weights);
    if (isa() == Isa::avx2) return spmm<SpmmAvx2>(work, weights);
#endif
    FloatSpmm<FloatPanelPortable, T> portable{call};
    spmm<SpmmPortable>(portable, weights);
}

}  // namespace engine
