// csr_linear for many rows of activations: the kernels of common/spmm.h by the values and columns where they lie.
//
// A row keeps so few that a stretch of K would hold hardly any. So strips of activations are as long as K, and as wide as
// L2 holds; each thread goes through its strips, and for each through the outputs.
#pragma once

#include <atomic>
#include <limits>

#include "common/compiled.h"
#include "common/spmm.h"

namespace engine {

template <class V, class I>
struct Csr {
    const I* crow;      // [n + 1], checked
    const I* columns;   // [nnz]
    const V* values;    // [nnz]
    const float* bias;  // [n], or null
    int64_t n, k;       // k > 0 where there are values
};

// Some values of one row, as a kernel reads them.
template <class I>
struct CsrValues {
    struct Row {
        const float* values;
        const I* columns;
        int64_t count;
    };
    Row row[1];
};

template <class I>
ENGINE_INLINE bool columns_inside(const I* columns, int64_t count, int64_t k) {
    using U = std::make_unsigned_t<I>;
    U most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<U>(columns[i]));  // a negative one is large
    return count == 0 || static_cast<uint64_t>(most) < static_cast<uint64_t>(k);
}

// Rows of activations to a strip, of which half of L2 holds one.
template <class Kernel>
int64_t csr_strip_width(int64_t m, int64_t k) {
    constexpr int64_t kStripBytes = 512 << 10;
    const int64_t row_bytes = std::max<int64_t>(1, k) * static_cast<int64_t>(sizeof(float));
    int64_t most = Kernel::kWidth;
    while (most > Kernel::kUnit && most * row_bytes > kStripBytes) most -= Kernel::kUnit;
    return round_up(divide_up(m, divide_up(m, most)), Kernel::kUnit);
}

// The values [begin, end) of one row by a strip.
template <class Kernel, class V, class I>
void sum_row(const Csr<V, I>& w, int64_t begin, int64_t end, int64_t longest, const float* strip, int64_t width,
             float* sums) {  // [width]
    constexpr int64_t kMost = 512;
    float converted[std::is_same_v<V, float> ? 1 : kMost];
    int64_t i = begin;
    do {
        const int64_t count = std::min({longest, kMost, end - i});
        const float* values;
        if constexpr (std::is_same_v<V, float>) {
            values = w.values + i;
        } else {
            floats(w.values + i, count, converted);
            values = converted;
        }
        Kernel::tile(CsrValues<I>{{{values, w.columns + i, count}}}, 1, strip, width, i > begin, sums);
        i += count;
    } while (i < end);
}

struct CsrStripScratch;  // tag: a strip of packed activations and sums, held by each thread

// A strip of rows [row, row + rows) of the call, which a thread packs for itself: lines that another core has written
// take longer to come.
template <class Kernel, class Panel, class T>
class CsrStrip {
    static constexpr int64_t kPiece = 64;  // of K, packed at a time
    using S = Scratch<CsrStripScratch>;
    const FloatLinear<T>& call;
    int64_t width, row = 0, rows = 0;
    float* packed;  // [k, width]
    float* sums;    // [kOutputs, width]
    bool* finite;   // [width]

  public:
    static constexpr int64_t kOutputs = 64;
    static int64_t bytes(int64_t k, int64_t width) {
        return S::bytes_for<float>(k * width) + S::bytes_for<float>(kOutputs * width) + S::bytes_for<bool>(width);
    }
    CsrStrip(S& scratch, const FloatLinear<T>& call, int64_t width)
        : call(call),
          width(width),
          packed(scratch.take<float>(call.k * width)),
          sums(scratch.take<float>(kOutputs * width)),
          finite(scratch.take<bool>(width)) {}

    void take(int64_t first) {
        row = first;
        rows = std::min(width, call.m - row);
        std::fill_n(finite, rows, true);
        for (int64_t k = 0; k < call.k; k += kPiece) {
            uint8_t piece_finite[64];
            Panel::pack(call.x + row * call.k + k, call.k, rows, std::min(kPiece, call.k - k), width,
                        packed + k * width, piece_finite);
            for (int64_t r = 0; r < rows; ++r) finite[r] &= piece_finite[r] != 0;
        }
    }

    // Outputs [column, column + columns), at most kOutputs. False where a column of the weight lay outside.
    template <class V, class I>
    bool multiply(const Csr<V, I>& w, int64_t column, int64_t columns) const {
        auto* const inside = compiled_to_avx2<columns_inside<I>>();
        const int64_t longest = Kernel::chain(width) * 2 / 3;  // values that are added up before the total
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t begin = w.crow[column + j], end = w.crow[column + j + 1];
            if (!inside(w.columns + begin, end - begin, w.k)) return false;
            sum_row<Kernel>(w, begin, end, longest, packed, width, sums + j * width);
        }
        Panel::finish(call, sums, width, row, rows, column, columns);
        for (int64_t r = 0; r < rows; ++r) {
            if (finite[r]) continue;
            const auto nan = from_float<T>(std::numeric_limits<float>::quiet_NaN());
            std::fill_n(call.y + (row + r) * call.n + column, columns, nan);
        }
        return true;
    }
};

// False where a column lay outside.
template <class Kernel, class Panel, class T, class V, class I>
bool csr_strips(const FloatLinear<T>& call, const Csr<V, I>& w) {
    using Strip = CsrStrip<Kernel, Panel, T>;
    constexpr int64_t kSerialWork = 1 << 17;  // multiplications that are done before another thread has woken
    const int64_t width = csr_strip_width<Kernel>(call.m, w.k), groups = divide_up(w.n, Strip::kOutputs);
    std::atomic<bool> inside{true};
    parallel_for_unless(call.m * w.crow[w.n] < kSerialWork, divide_up(call.m, width) * groups, 1,
                        [&](int64_t first, int64_t last) {
                            Scratch<CsrStripScratch> scratch(Strip::bytes(w.k, width));
                            Strip strip(scratch, call, width);
                            for (int64_t task = first; task < last && inside.load(std::memory_order_relaxed); ++task) {
                                const int64_t column = task % groups * Strip::kOutputs;
                                if (task == first || column == 0) strip.take(task / groups * width);
                                if (!strip.multiply(w, column, std::min(Strip::kOutputs, w.n - column))) {
                                    inside.store(false, std::memory_order_relaxed);
                                }
                            }
                        });
    return inside.load();
}

template <class T, class V, class I>
bool csr_spmm(const FloatLinear<T>& call, const Csr<V, I>& w) {
#if ENGINE_X86
    if (isa() == Isa::avx512) return csr_strips<SpmmAvx512, FloatPanelAvx2>(call, w);
    if (isa() == Isa::avx2) return csr_strips<SpmmAvx2, FloatPanelAvx2>(call, w);
#endif
    return csr_strips<SpmmPortable, FloatPanelPortable>(call, w);
}

}  // namespace engine
