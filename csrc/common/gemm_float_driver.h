// The loops around the microkernels of common/gemm_float.h, the same for every instruction set. A struct describes the
// microkernel:
//
//   Element          what it multiplies: float, or BFloat16 in pairs along K
//   kChain           how much of K is added up at least before it is added to the sums
//   kWidth, kNarrow  rows of activations in a strip; in the last one where they suffice
//   kRows            weight rows that one call of tile() multiplies
//   kGroup           weight rows to a group at most, a multiple of kRows
//   pack(...)        activations to a strip
//   tile(...)        kRows × width sums
//   finish(...)      sums to outputs
#pragma once

#include "common/gemm_float.h"
#include "common/gemm_float_portable.h"
#if ENGINE_X86
#include "common/gemm_float_avx2.h"
#include "common/gemm_float_avx512.h"
#endif

namespace engine {

struct FloatPanelScratch;   // tag: a thread's panel and sums
struct FloatStripsScratch;  // tag: the packed activations, held by the calling thread

// How a call is cut into tasks.
struct FloatPlan {
    int64_t chunk_rows;  // rows of activations packed at a time, so that they stay in cache
    int64_t columns;     // outputs to a task
    int64_t groups;      // tasks along the outputs
    int64_t strips;      // of a chunk, to a task
    int64_t parts;       // tasks along the strips of a chunk
};

template <class Kernel>
FloatPlan plan_float(int64_t m, int64_t n, int64_t k, int64_t threads,
                     int64_t unit) {  // outputs that belong together; a multiple of kRows, or 1
    constexpr int64_t kChunkBytes = 8 << 20;
    constexpr int64_t kMostRows = 512;  // sums of a task: up to 200 KB
    constexpr auto kSize = static_cast<int64_t>(sizeof(typename Kernel::Element));
    const int64_t fitting = kChunkBytes / kSize / std::max<int64_t>(1, k);
    const int64_t most = std::clamp<int64_t>(fitting, 64, kMostRows);
    FloatPlan plan;
    plan.chunk_rows = round_up(divide_up(m, divide_up(m, most)), Kernel::kWidth);
    const int64_t groups = round_up(divide_up(n, Kernel::kGroup), threads);
    plan.columns = round_up(divide_up(n, groups), std::max(unit, Kernel::kRows));
    plan.groups = divide_up(n, plan.columns);
    // Where outputs are too few for all threads, cut along the rows too, though each part converts the weights again.
    const int64_t strips = plan.chunk_rows / Kernel::kWidth;
    plan.strips = divide_up(strips, std::min(strips, std::max<int64_t>(1, threads / plan.groups)));
    plan.parts = divide_up(strips, plan.strips);
    return plan;
}

// Packed activations of a chunk.
template <class Kernel>
struct FloatStrips {
    using Element = typename Kernel::Element;
    Element* data;    // strip after strip, each [k, its width], kWidth · k apart
    uint8_t* finite;  // [stretches of K, chunk_rows]: whether a stretch of a row is
    int64_t rows;
    int64_t k;  // the call's, made even where elements are pairs

    int64_t count() const { return divide_up(rows, Kernel::kWidth); }
    int64_t stretches() const { return divide_up(k, kFloatDepth); }
    int64_t width(int64_t strip) const {
        return rows - strip * Kernel::kWidth <= Kernel::kNarrow ? Kernel::kNarrow : Kernel::kWidth;
    }
    const Element* at(int64_t strip, int64_t k0) const { return data + strip * Kernel::kWidth * k + k0 * width(strip); }
};

template <class Kernel, class T>
void pack_strips(const FloatLinear<T>& call, const FloatStrips<Kernel>& strips, int64_t chunk, bool serial) {
    const int64_t stretches = strips.stretches();
    const auto tasks = [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t strip = task / stretches, stretch = task % stretches;
            const int64_t row = strip * Kernel::kWidth, k0 = stretch * kFloatDepth;
            Kernel::pack(call.x + (chunk + row) * call.k + k0, call.k, std::min(Kernel::kWidth, strips.rows - row),
                         std::min(kFloatDepth, call.k - k0), strips.width(strip),
                         const_cast<typename Kernel::Element*>(strips.at(strip, k0)),
                         strips.finite + stretch * strips.rows + row);
        }
    };
    parallel_for_unless(serial, strips.count() * stretches, 4, tasks);
}

template <class Provider>
constexpr bool kHasSpans = requires(const Provider& weights) { weights.spans(0); };

// One task: strips [begin, end) by the outputs [column, column + columns).
template <class Kernel, class T, class Provider>
void float_task(const FloatLinear<T>& call, const FloatStrips<Kernel>& strips, Provider& weights,
                typename Kernel::Element* panel,  // [columns, kFloatDepth], columns made whole to kRows
                float* sums,    // strip after strip, each [columns, its width], kWidth · columns apart
                int64_t chunk,  // the call's row that is row 0 of the strips
                int64_t begin, int64_t end, int64_t column, int64_t columns) {
    using Element = typename Kernel::Element;
    const int64_t whole = round_up(columns, Kernel::kRows), chain = std::max(Kernel::kChain, float_chain(call.k));
    std::fill(panel + columns * kFloatDepth, panel + whole * kFloatDepth, Element{});
    if constexpr (kHasSpans<Provider>) std::fill_n(sums, (end - begin) * Kernel::kWidth * whole, 0.0f);
    for (int64_t k0 = 0; k0 == 0 || k0 < call.k; k0 += kFloatDepth) {
        const int64_t kc = std::min(kFloatDepth, call.k - k0);
        weights.block(column, columns, k0, kc, panel);
        if (strips.k > call.k && k0 + kc == call.k) {  // half a pair is left
            for (int64_t r = 0; r < columns; ++r) panel[r * kFloatDepth + kc] = Element{};
        }
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t width = strips.width(strip), row = strip * Kernel::kWidth;
            float* mine = sums + (strip - begin) * Kernel::kWidth * whole;
            const bool last = k0 + kc >= call.k;
            for (int64_t r = 0; r < whole; r += Kernel::kRows) {
                if (last) {  // a share of the strip's outputs: all at once would hold up the activations
                    const int64_t rows = std::min(width, strips.rows - row);
                    for (int64_t i = rows * r / whole; i < rows * (r + Kernel::kRows) / whole; ++i) {
                        const T* y = call.y + (chunk + row + i) * call.n + column;
                        for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) ask_to_write(y + j);
                        ask_to_write(y + columns - 1);
                    }
                }
                const auto multiply = [&](int64_t k, int64_t last_k, bool add) {
                    Kernel::tile(panel + r * kFloatDepth + k, strips.at(strip, k0 + k), std::min(chain, last_k - k),
                                 width, add, mine + r * width);
                };
                if constexpr (kHasSpans<Provider>) {
                    for (const auto& span : weights.spans(r)) {
                        for (int64_t k = span.begin; k < span.end; k += chain) multiply(k, span.end, true);
                    }
                } else {
                    for (int64_t k = 0; k == 0 || k < kc; k += chain) multiply(k, kc, k0 + k > 0);
                }
            }
            if (last) {
                Kernel::finish(call, mine, width, chunk + row, std::min(width, strips.rows - row), column, columns);
            }
        }
    }
}

template <class Kernel, class T, class Provider>
void float_panels(const FloatLinear<T>& call, const Provider& weights) {
    constexpr int64_t kSerialWork = 1 << 18;  // multiplications that are done before another thread has woken
    using StripsScratch = Scratch<FloatStripsScratch>;
    const bool serial = call.m * call.n * call.k < kSerialWork;
    const int64_t threads = serial ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
    int64_t unit = 1;
    if constexpr (kHasSpans<Provider>) unit = weights.unit();
    const FloatPlan plan = plan_float<Kernel>(call.m, call.n, call.k, threads, unit);
    using Element = typename Kernel::Element;
    const int64_t flags = plan.chunk_rows * divide_up(call.k, kFloatDepth);
    const int64_t k = std::is_same_v<Element, float> ? call.k : round_up(call.k, 2);
    StripsScratch scratch(StripsScratch::template bytes_for<Element>(plan.chunk_rows * k) +
                          StripsScratch::template bytes_for<uint8_t>(flags) + 64);
    FloatStrips<Kernel> strips{scratch.template take<Element>(plan.chunk_rows * k),
                               scratch.template take<uint8_t>(flags), 0, k};
    for (int64_t chunk = 0; chunk < call.m; chunk += plan.chunk_rows) {
        strips.rows = std::min(plan.chunk_rows, call.m - chunk);
        pack_strips(call, strips, chunk, serial);
        const auto tasks = [&](int64_t first, int64_t last) {
            const int64_t panel = plan.columns * kFloatDepth, sums = plan.strips * Kernel::kWidth * plan.columns;
            using Own = Scratch<FloatPanelScratch>;
            Own own(Own::template bytes_for<Element>(panel) + Own::template bytes_for<float>(sums));
            Element* const own_panel = own.template take<Element>(panel);
            float* const own_sums = own.template take<float>(sums);
            Provider position = weights;
            for (int64_t task = first; task < last; ++task) {
                const int64_t column = task / plan.parts * plan.columns, begin = task % plan.parts * plan.strips;
                const int64_t end = std::min(strips.count(), begin + plan.strips);
                if (begin < end) {
                    float_task<Kernel>(call, strips, position, own_panel, own_sums, chunk, begin, end, column,
                                       std::min(plan.columns, call.n - column));
                }
            }
        };
        parallel_for_unless(serial, plan.groups * plan.parts, 1, tasks);
        for (int64_t row = 0; row < strips.rows; ++row) {
            bool finite = true;
            for (int64_t i = 0; i < strips.stretches(); ++i) finite &= strips.finite[i * strips.rows + row] != 0;
            if (!finite) fill_nan(call, chunk + row);
        }
    }
}

template <class T, class Provider>
void float_panel_linear(const FloatLinear<T>& call, const Provider& weights) {
    if (call.m == 0 || call.n == 0) return;
#if ENGINE_X86
    if constexpr (kHasSpans<Provider>) {
        if (isa() == Isa::avx2) return float_panels<FloatSpanPanelAvx2>(call, weights);
    } else {
        using V = typename Provider::Value;
        if constexpr (kBFloat16Products<T, V>) {
            if (multiplies_bfloat16<T, V>()) return float_panels<PairPanelAvx512>(call, weights);
        }
        if (isa() == Isa::avx512) return float_panels<FloatPanelAvx512>(call, weights);
        if (isa() == Isa::avx2) return float_panels<FloatPanelAvx2>(call, weights);
    }
#endif
    float_panels<FloatPanelPortable>(call, weights);
}

}  // namespace engine
