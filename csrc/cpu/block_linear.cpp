// block_linear: float activations times a weight of which only some blocks are kept, in fp32. For a few rows of
// activations blocks are multiplied by dot products (common/block_dot_avx2.h, common/block_dot_avx512.h). For many they
// go through panels that leave out what was pruned (common/gemm_float.h), with AVX-512 through a kernel of their own
// (common/block_float_strips.h).

#include <cstring>
#include <span>

#include "common/block.h"
#include "common/block_dot_avx2.h"
#include "common/block_dot_avx512.h"
#include "common/block_float_strips.h"
#include "common/gemm_float.h"
#include "common/linear_binding.h"

namespace engine {
namespace {

constexpr int64_t kLanes = 8;       // sums of an output, so that additions need not wait for each other
constexpr int64_t kMaxBlock = 256;  // rows and columns of a block

// One row of blocks by a few rows of activations.
template <class T, class V>
void line_portable(const FloatLinear<T>& call, const FloatRows& rows, const Blocks& weight, int64_t line) {
    const auto [high, wide] = weight.shape;
    const int64_t first = weight.offsets()[line], end = weight.offsets()[line + 1], chain = kLanes * kDotChain / wide;
    const bool several = end - first > chain;
    alignas(64) float sums[kMaxBlock][kFloatDotRows][kLanes];
    alignas(64) float w[kMaxBlock], last[kFloatDotRows][kMaxBlock];
    float totals[kMaxBlock][kFloatDotRows];
    const auto clear = [&](int64_t r) { std::memset(sums[r], 0, call.m * sizeof sums[r][0]); };
    for (int64_t r = 0; r < high; ++r) clear(r);
    if (several) std::memset(totals, 0, high * sizeof totals[0]);
    for (int64_t i = first; i < end; ++i) {
        if (__builtin_expect(i > first && (i - first) % chain == 0, 0)) {
            for (int64_t r = 0; r < high; ++r) {
                for (int64_t m = 0; m < call.m; ++m) totals[r][m] += sum_8(sums[r][m]);
                clear(r);
            }
        }
        const V* values = weight.blocks<V>() + i * high * wide;
        const int64_t column = weight.columns()[i] * wide, inside = std::min(wide, weight.k - column);
        const float* x = rows.x + column;
        int64_t stride = rows.stride;
        if (inside < wide) {  // what lies beyond K counts for nothing, not even where it is no number
            std::memset(last, 0, sizeof last);
            for (int64_t m = 0; m < call.m; ++m) std::copy_n(x + m * stride, inside, last[m]);
            x = last[0];
            stride = kMaxBlock;
        }
        for (int64_t r = 0; r < high; ++r) {
            for (int64_t c = 0; c < wide; ++c) w[c] = to_float(values[r * wide + c]);
            if (inside < wide) std::fill(w + inside, w + wide, 0.0f);
            for (int64_t m = 0; m < call.m; ++m) {
                float* __restrict sum = sums[r][m];
                const float* from = x + m * stride;
                for (int64_t c = 0; c < wide; c += kLanes) {
                    for (int64_t j = 0; j < kLanes; ++j) sum[j] += w[c + j] * from[c + j];
                }
            }
        }
    }
    for (int64_t r = 0; r < high && line * high + r < weight.n; ++r) {
        for (int64_t m = 0; m < call.m; ++m) {
            float sum = sum_8(sums[r][m]);
            if (several) sum += totals[r][m];
            call.y[m * call.n + line * high + r] = float_output(sum, call, line * high + r);
        }
    }
}

// Many rows without AVX-512: panels (common/gemm_float.h) of what is kept.

template <class V>
ENGINE_INLINE void copy_body(const V* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}
template <class V>
void copy_portable(const V* from, int64_t count, float* to) {
    copy_body(from, count, to);
}
#if ENGINE_X86
template <class V>
ENGINE_AVX2 void copy_avx2(const V* from, int64_t count, float* to) {
    copy_body(from, count, to);
}
#endif

template <class V>
class BlockProvider {
  public:
    using Value = V;
    struct Span {
        int64_t begin, end;
    };

    explicit BlockProvider(const Blocks& weight) : weight_(&weight) {
#if ENGINE_X86
        if (isa() != Isa::portable) copy_ = copy_avx2<V>;
#endif
    }
    int64_t unit() const { return weight_->shape.rows; }
    std::span<const Span> spans(int64_t r) const {
        const int64_t line = r / unit();
        return {spans_[line], static_cast<size_t>(count_[line])};
    }

    // `row` is a multiple of unit().
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, float* panel) {
        const auto [high, wide] = weight_->shape;
        const int32_t *offsets = weight_->offsets() + row / high, *columns = weight_->columns();
        for (int64_t line = 0; line * high < rows; ++line) {
            Span* const spans = spans_[line];
            int64_t count = 0;
            const int32_t* column = std::lower_bound(columns + offsets[line], columns + offsets[line + 1], k0 / wide);
            for (; column < columns + offsets[line + 1] && *column * wide < k0 + kc; ++column) {
                const int64_t first = *column * wide, begin = std::max(first, k0),
                              end = std::min(first + wide, k0 + kc);
                const V* from = weight_->template blocks<V>() + (column - columns) * high * wide + begin - first;
                float* to = panel + line * high * kFloatDepth + begin - k0;
                for (int64_t r = 0; r < std::min(high, rows - line * high); ++r, from += wide, to += kFloatDepth) {
                    copy_(from, end - begin, to);
                }
                if (count > 0 && spans[count - 1].end == begin - k0) {
                    spans[count - 1].end = end - k0;
                } else {
                    spans[count++] = {begin - k0, end - k0};
                }
            }
            count_[line] = count;
        }
    }

  private:
    static constexpr int64_t kLeastBlock = 16, kMostLines = kFloatGroup / kLeastBlock;
    const Blocks* weight_;
    void (*copy_)(const V*, int64_t, float*) = copy_portable<V>;
    Span spans_[kMostLines][kFloatDepth / kLeastBlock + 1];
    int64_t count_[kMostLines] = {};
};

#if ENGINE_X86
// A few rows of activations [m, stride] by Dot, whose registers hold the sums.
template <class Dot, class T>
void dot_lines(const FloatLinear<T>& call, const typename Dot::X* x, int64_t stride, const Blocks& weight) {
    const int64_t lines = weight.row_blocks(), high = weight.shape.rows;
    const int64_t work = 2 * call.m * weight.kept() / std::max<int64_t>(1, lines);
    parallel_rows(lines, work, [&](int64_t begin, int64_t end) {
        float sums[Dot::kMostRows][Dot::kMostBlock];
        for (int64_t line = begin; line < end; ++line) {
            Dot::line(call.m, x, stride, weight, line, sums);
            const int64_t first = line * high, outputs = std::min(high, call.n - first);
            for (int64_t m = 0; m < call.m; ++m) {
                T* y = call.y + m * call.n + first;
                for (int64_t r = 0; r < outputs; ++r) y[r] = float_output(sums[m][r], call, first + r);
            }
        }
    });
}

template <class Dot, class T>
void dot_linear(const FloatLinear<T>& call, const Blocks& weight) {
    with_float_rows(call, [&](const FloatRows& rows) { dot_lines<Dot>(call, rows.x, rows.stride, weight); });
}

struct PairRowsScratch;  // tag: the activations of a call, held by the calling thread

// Copies rows, with zeros beyond k.
ENGINE_AVX512 void copy_rows_avx512(const FloatLinear<BFloat16>& call, int64_t stride, BFloat16* rows, bool* finite) {
    for (int64_t row = 0; row < call.m; ++row) {
        const BFloat16* x = call.x + row * call.k;
        BFloat16* const end = std::copy_n(x, call.k, rows + row * stride);
        std::fill(end, rows + (row + 1) * stride, BFloat16{});
        finite[row] = all_finite(x, call.k);
    }
}

void pair_dot_linear(const FloatLinear<BFloat16>& call, const Blocks& weight) {
    const int64_t stride = FloatRows::stride_for(call.k);
    Scratch<PairRowsScratch> scratch(Scratch<PairRowsScratch>::bytes_for<BFloat16>(call.m * stride) + 64);
    auto* const rows = scratch.take<BFloat16>(call.m * stride);
    bool finite[BlockDotAvx512<PairBlockStep>::kMostRows];
    copy_rows_avx512(call, stride, rows, finite);
    dot_lines<BlockDotAvx512<PairBlockStep>>(call, rows, stride, weight);
    for (int64_t row = 0; row < call.m; ++row) {
        if (!finite[row]) fill_nan(call, row);
    }
}
#endif

template <class T, class V>
void linear(const FloatLinear<T>& call, const Blocks& weight) {
#if ENGINE_X86
    if (isa() == Isa::avx512) {
        if (call.m == 0 || call.n == 0) return;
        using Dot = BlockDotAvx512<FloatBlockStep<V>>;
        constexpr int64_t kFew = Dot::kMostRows;
        if constexpr (kBFloat16Products<T, V> && std::is_same_v<V, BFloat16>) {
            if (multiplies_bfloat16<T, V>()) {
                if (call.m > kFew) return strip_linear<PairProducts, T, V>(call, weight);
                if (BlockDotAvx512<PairBlockStep>::fits(weight)) return pair_dot_linear(call, weight);
            }
        }
        if (call.m > kFew) return strip_linear<FloatProducts, T, V>(call, weight);
        return dot_linear<Dot>(call, weight);  // which fits every width
    }
#endif
    if (call.m > kFloatDotRows) return float_panel_linear(call, BlockProvider<V>(weight));
#if ENGINE_X86
    if (isa() == Isa::avx2) return dot_linear<BlockDotAvx2<FloatBlockStepAvx2<V>>>(call, weight);
#endif
    const int64_t lines = weight.row_blocks();
    with_float_rows(call, [&](const FloatRows& rows) {
        parallel_rows(lines, 4 * call.m * weight.kept() / std::max<int64_t>(1, lines), [&](int64_t begin, int64_t end) {
            for (int64_t line = begin; line < end; ++line) line_portable<T, V>(call, rows, weight, line);
        });
    });
}

Tensor block_linear(Tensor x_in, Tensor crow_indices, Tensor col_indices, Tensor values, int64_t n,
                    std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x_in.dim() >= 1, "block_linear: x: expected at least one dimension");
    const Blocks weight("block_linear", crow_indices, col_indices, values, n, x_in.size(-1));
    return float_linear_output("block_linear", x_in, n, nullptr, bias, [&]<class T>(const FloatLinear<T>& call) {
        dispatch_float(values.scalar_type(), "block_linear: values",
                       [&](auto zero) { linear<T, decltype(zero)>(call, weight); });
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("block_linear", TORCH_BOX(&engine::block_linear)); }
