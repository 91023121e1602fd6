// int8_linear: int8 activations, quantised here, times int8 weights [N, K] as they lie. For many rows of activations
// the panels of common/gemm_int8.h; for a few, dot products straight from the weights, which are then read from memory
// once and would cost more to rearrange than to multiply. (On AVX2 without VNNI these are for up to 4 rows, and the
// panels' driver has others for a few more.)

#include <cstring>

#include "common/dot_int8_avx512.h"
#include "common/dot_tiles_avx2.h"
#include "common/gemm_int8.h"
#include "common/int8_activations.h"
#include "common/linear_binding.h"

namespace engine {
namespace {

// A dot-product kernel is a struct:
//
//   Q            the type of the activations
//   kRows        how many rows of them a tile takes
//   kTogether    outputs for which one stretch of K is done before the next
//   rows(n, k)   up to so many rows of activations dot products are the faster way
//   depth(m)     how much of K is multiplied at once, at most kExactDepth
//   tile<R>(...) writes R × kDotColumns sums
//   finish(...)  sums to outputs

struct DotPortable {
    using Q = int16_t;
    static constexpr int64_t kRows = 1, kTogether = 32;
    static int64_t rows(int64_t, int64_t) { return 16; }
    static int64_t depth(int64_t m) { return m == 1 ? kExactDepth : depth_in_l1<Q>(m); }

    template <int R>
    static void tile(const DotTile<int16_t>& t,
                     int32_t* sums) {  // [R, kDotColumns]
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kDotColumns; ++j) {
                int32_t acc = 0;
                const int16_t* q = t.q + r * t.q_stride;
                const int8_t* w = t.w + j * t.stride;
                for (int64_t i = 0; i < t.kc; ++i) acc += q[i] * static_cast<int16_t>(w[i]);
                sums[r * kDotColumns + j] = acc;
            }
        }
    }

    template <class T, class Total>
    static void finish(const FinishRows<T>& f, const Total* totals) {
        finish_rows<0>(f, totals, kDotBlock);
    }
};

// Adds the products of [k, k + kc) for `columns` ≤ kDotColumns rows of weights and all rows of activations. Not
// inlined: where GCC did so, in a build for one dtype alone, 16 × 1536 × 384 took a fifth longer.
template <class Kernel, class Total>
__attribute__((noinline)) void add_dots(const QuantizedRows<typename Kernel::Q>& rows, int64_t k, int64_t kc,
                                        const int8_t* w,  // [columns, rows.k], at k
                                        int64_t columns, int64_t ahead,
                                        Total* totals) {  // [rows.rows, kDotBlock]
    alignas(64) int32_t sums[round_up(Kernel::kRows, 4) * kDotColumns];
    const auto* q = rows.q + k;
    if (columns < kDotColumns) {  // too few to read side by side: one by one, each read four times over
        for (int64_t j = 0; j < columns; ++j, w += rows.k) {
            for (int64_t row = 0; row < rows.rows; ++row) {
                const auto* x = q + row * rows.stride;
                dot_tile<Kernel>(1, {x, rows.stride, w, 0, kc, w, 0, kDotColumns, x, w}, sums);
                totals[row * kDotBlock + j] += sums[0];
            }
        }
        return;
    }
    // Tiles of nearly equal height: a tile of one row would leave most registers idle.
    const int64_t tiles = divide_up(rows.rows, Kernel::kRows);
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        const int64_t count = divide_up(rows.rows - row, tiles - tile);
        const auto* x = q + row * rows.stride;
        const int8_t* asked = tile == 0 ? w + ahead : w;  // the first tile asks for what comes next
        dot_tile<Kernel>(count, {x, rows.stride, w, rows.k, kc, asked, rows.k, kDotColumns, x, w}, sums);
        for (int64_t r = 0; r < count; ++r, ++row) {
            for (int64_t j = 0; j < kDotColumns; ++j) totals[row * kDotBlock + j] += sums[r * kDotColumns + j];
        }
    }
}

// Outputs [begin, end) of every row. Total holds the sums of all of K.
template <class Kernel, class Total, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const int8_t* weight,
                 int64_t begin, int64_t end) {
    Total totals[kInt8DotRows * kDotBlock];
    const int64_t step = Kernel::depth(call.m);
    // Four rows of weights lie one after another, and so do their successors: one stream, asked for 8 KB ahead.
    const int64_t group = kDotColumns * std::max<int64_t>(1, call.k), next_groups = round_up(8 << 10, group);
    const bool groupwise = step >= call.k;
    for (int64_t block = begin; block < end; block += kDotBlock) {
        const int64_t columns = std::min(kDotBlock, end - block);
        std::fill_n(totals, call.m * kDotBlock, Total{0});
        for (int64_t part = 0; part < columns; part += Kernel::kTogether) {
            const int64_t part_end = std::min(columns, part + Kernel::kTogether);
            for (int64_t k = 0; k < call.k; k += step) {
                const int64_t kc = std::min(step, call.k - k);
                // Where K is cut, what is read next is the same row's next stretch; after its last one, the first
                // stretch of the next part's rows.
                const int64_t ahead = groupwise ? next_groups : k + kc < call.k ? kc : Kernel::kTogether * call.k - k;
                for (int64_t j = part; j < part_end; j += kDotColumns) {
                    add_dots<Kernel>(rows, k, kc, weight + (block + j) * call.k + k,
                                     std::min<int64_t>(kDotColumns, part_end - j), ahead, totals + j);
                }
            }
        }
        Kernel::finish(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, block, columns}, totals);
    }
}

#if ENGINE_X86
// Tall tiles, of many rows of activations, are for activations that stay in L1. Where these come from L2, wide tiles,
// which multiply fewer rows of them by more rows of weights, read them less often.
using TallDots = DotTiles<6, 4, 3>;
using WideDots = DotTiles<4, 6, 3>;
constexpr int64_t kTallRows = 24;

struct DotAvx512 {
    using Q = int8_t;
    // Wide tiles beat panels at long K as long as half of L2 holds the activations.
    static int64_t rows(int64_t, int64_t k) {
        const int64_t most = DotTilesAvx512::rows(k);
        return k >= 4096 ? std::clamp<int64_t>((512 << 10) / k, most, kInt8DotRows) : most;
    }
};

template <class T, class Total>
ENGINE_AVX512 void finish_avx512(const FinishRows<T>& f, const Total* totals) {
    finish_rows<128>(f, totals, kDotBlock);
}

// The same on AVX-512.
template <class Tiles, class Total, class T>
void dot_outputs_avx512(const LinearCall<T>& call, const QuantizedRows<int8_t>& rows, const int8_t* weight,
                        int64_t begin, int64_t end) {
    Total totals[kInt8DotRows * kDotBlock];
    const DotBlocksAvx512<Tiles> dots(call.m, call.k);
    for (int64_t block = begin; block < end; block += kDotBlock) {
        const int64_t columns = std::min(kDotBlock, end - block);
        if (call.k == 0 || sizeof(Total) > sizeof(int32_t)) std::fill_n(totals, call.m * kDotBlock, Total{0});
        dots.multiply(rows, weight + block * call.k, columns, totals);
        finish_avx512(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, block, columns}, totals);
    }
}
#endif

// y of the whole call by dot products, where they are the faster way: outputs(total, rows, begin, end) is called with a
// number of the type that holds the sums of all of K.
template <class Kernel, class T, class Outputs>
bool dot_linear(const LinearCall<T>& call, const Outputs& outputs) {
    if (call.m > Kernel::rows(call.n, call.k)) return false;
    with_quantized_rows<typename Kernel::Q>(call, call.k * (1 + call.m / 4),
                                            [&](const auto& rows, int64_t begin, int64_t end) {
                                                if (call.k <= kExactDepth) return outputs(int32_t{}, rows, begin, end);
                                                outputs(int64_t{}, rows, begin, end);
                                            });
    return true;
}

template <class Kernel, class T>
bool dot_linear(const LinearCall<T>& call, const int8_t* weight) {
    return dot_linear<Kernel>(call, [&](auto total, const auto& rows, int64_t begin, int64_t end) {
        dot_outputs<Kernel, decltype(total)>(call, rows, weight, begin, end);
    });
}

template <class T>
bool dot_linear(const LinearCall<T>& call, const int8_t* weight) {
#if ENGINE_X86
    if (variant() == Variant::avx_vnni) return dot_linear<DotTilesAvx2<ByteStepAvxVnni>>(call, weight);
    if (isa() == Isa::avx2) return dot_linear<DotTilesAvx2<PairStepAvx2>>(call, weight);
    if (isa() == Isa::avx512) {
        return dot_linear<DotAvx512>(call, [&](auto total, const auto& rows, int64_t begin, int64_t end) {
            if (call.m <= kTallRows) {
                return dot_outputs_avx512<TallDots, decltype(total)>(call, rows, weight, begin, end);
            }
            dot_outputs_avx512<WideDots, decltype(total)>(call, rows, weight, begin, end);
        });
    }
#endif
    return dot_linear<DotPortable>(call, weight);
}

template <class T>
void linear(const LinearCall<T>& call, const int8_t* weight) {
    if (call.m == 0 || call.n == 0) return;
    if (!dot_linear(call, weight)) int8_panel_linear(call, DenseProvider{weight, call.k});
}

template <bool as_patches>
Tensor int8_linear(Tensor x, Tensor weight_in, Tensor scale, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale) {
    constexpr auto op = "int8_linear";
    LinearInput input(op, x, as_patches);
    STD_TORCH_CHECK(weight_in.dim() == 2 && weight_in.scalar_type() == ScalarType::Char, op,
                    ": weight: expected int8 [N, K]");
    STD_TORCH_CHECK(weight_in.size(1) == input.k, op, ": x: expected shape [..., ", weight_in.size(1), "]");
    const Tensor weight = as_contiguous(weight_in);
    return int8_linear_output(op, input, weight.size(0), scale, bias, input_scale,
                              [&](const auto& call) { linear(call, data<int8_t>(weight)); });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("int8_linear", TORCH_BOX(&engine::int8_linear<false>));
    m.impl("int8_linear.patches", TORCH_BOX(&engine::int8_linear<true>));
}
