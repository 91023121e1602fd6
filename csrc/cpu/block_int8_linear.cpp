// block_int8_linear: int8 activations, quantised here, times a weight of which only some blocks are kept.
//
// For many rows of activations with AVX-512 these are packed, and weights read where they lie
// (common/block_int8_strips.h). Elsewhere a row of blocks is packed, for the microkernels of common/gemm_int8.h, which
// know nothing of blocks: the activations that kept blocks meet are gathered, tile by tile in L1, to lie side by side.
// What a gathered activation costs is shared by as many outputs as a block has rows. For a few rows of activations
// neither is packed (common/block_dot_avx2.h, common/block_dot_avx512.h).

#include <cstring>

#include "common/block.h"
#include "common/block_dot_avx2.h"
#include "common/block_dot_avx512.h"
#include "common/block_int8_strips.h"
#include "common/gemm_int8.h"
#include "common/int8_activations.h"
#include "common/linear_binding.h"
#include "common/patches.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

// Copies of activations [column, column + count) of a row, zeros where they lie beyond its stride.
template <class Q>
ENGINE_INLINE void copy_stretch(const QuantizedRows<Q>& rows, int64_t row, int64_t column, int64_t count, Q* to) {
    if (column + count <= rows.stride) {  // by moves of 16: a call of memcpy would cost more than the copy
        const Q* from = rows.q + row * rows.stride + column;
        for (int64_t i = 0; i < count; i += 16) std::memcpy(to + i, from + i, 16 * sizeof(Q));
        return;
    }
    const int64_t there = std::clamp<int64_t>(rows.stride - column, 0, count);
    std::memcpy(to, rows.q + row * rows.stride + column, there * sizeof(Q));
    if (there < count) std::memset(to + there, 0, (count - there) * sizeof(Q));
}

// ---- panels -----------------------------------------------------------------------------------------------------

constexpr int64_t kBlockRows = 512;  // rows of activations to a task: sums of up to 128 KB

struct BlockScratch;  // tag: what a thread packs, gathers and sums in
struct PartScratch;   // tag: sums of activations by column of blocks, held by the calling thread

template <class Kernel>
struct BlockMemory {
    using Q = typename Kernel::Q;
    static constexpr int64_t kGroup = Kernel::kStrips * Kernel::kColumns;
    int8_t* weights;  // [kGroup, Kernel::kDepth]
    char* strips;     // [kStrips][kStripBytes]
    Q* gathered;      // [kRows, Kernel::kDepth]
    int32_t* sums;    // [rows, kGroup]
    int64_t* wide;    // [rows, kGroup]

    static int64_t bytes(int64_t rows) {
        using S = Scratch<BlockScratch>;
        return S::bytes_for<int8_t>(kGroup * Kernel::kDepth) +
               S::bytes_for<char>(Kernel::kStrips * Kernel::kStripBytes) +
               S::bytes_for<Q>(Kernel::kRows * Kernel::kDepth) + S::bytes_for<int32_t>(rows * kGroup) +
               S::bytes_for<int64_t>(rows * kGroup);
    }
    BlockMemory(Scratch<BlockScratch>& scratch, int64_t rows)
        : weights(scratch.take<int8_t>(kGroup * Kernel::kDepth)),
          strips(scratch.take<char>(Kernel::kStrips * Kernel::kStripBytes)),
          gathered(scratch.take<Q>(Kernel::kRows * Kernel::kDepth)),
          sums(scratch.take<int32_t>(rows * kGroup)),
          wide(scratch.take<int64_t>(rows * kGroup)) {}
};

// Outputs of one row of blocks, at most kGroup, by rows [begin, end) of the quantised ones.
template <class Kernel, class T>
struct BlockTask {
    using Q = typename Kernel::Q;
    static constexpr int64_t kGroup = BlockMemory<Kernel>::kGroup;
    const LinearCall<T>& call;
    const Blocks& weight;
    const QuantizedRows<Q>& rows;
    const int32_t* parts;  // [rows.rows, wide]: QuantizedRows::sum of each column of blocks
    BlockMemory<Kernel> memory;
    int64_t chunk;  // the call's row that is row 0 of `rows`

    // Kept blocks [first, last), of which `columns` rows from `inside` on are wanted, side by side and packed.
    void pack(int64_t first, int64_t last, int64_t inside, int64_t columns) const {
        const auto [high, wide] = weight.shape;
        const int8_t* values = weight.blocks<int8_t>();
        for (int64_t j = 0; j < columns; ++j) {
            int8_t* to = memory.weights + j * Kernel::kDepth;
            for (int64_t i = first; i < last; ++i, to += wide) {
                std::memcpy(to, values + (i * high + inside + j) * wide, wide);
            }
        }
        for (int64_t s = 0; s < columns; s += Kernel::kColumns) {
            Kernel::pack(memory.weights + s * Kernel::kDepth, Kernel::kDepth, std::min(Kernel::kColumns, columns - s),
                         (last - first) * wide, memory.strips + s / Kernel::kColumns * Kernel::kStripBytes);
        }
    }

    void multiply(int64_t first, int64_t last, int64_t columns, int64_t begin, int64_t end, bool add) const {
        const int64_t wide = weight.shape.columns, kc = (last - first) * wide;
        for (int64_t row = begin; row < end; row += Kernel::kRows) {
            const int64_t count = std::min<int64_t>(Kernel::kRows, end - row);
            for (int64_t r = 0; r < count; ++r) {
                Q* to = memory.gathered + r * Kernel::kDepth;
                for (int64_t i = first; i < last; ++i, to += wide) {
                    copy_stretch(rows, row + r, weight.columns()[i] * wide, wide, to);
                }
            }
            for (int64_t s = 0; s < columns; s += Kernel::kColumns) {
                Kernel::tile(count, std::min(Kernel::kColumns, columns - s), memory.gathered, Kernel::kDepth,
                             memory.strips + s / Kernel::kColumns * Kernel::kStripBytes, kc, add,
                             memory.sums + (row - begin) * kGroup + s, kGroup);
            }
        }
    }

    void run(int64_t line, int64_t inside, int64_t begin, int64_t end) const {
        const auto [high, wide] = weight.shape;
        const int64_t column = line * high + inside;
        const int64_t columns = std::min({kGroup, high - inside, weight.n - column});
        if (columns <= 0) return;
        const int64_t first = weight.offsets()[line], last = weight.offsets()[line + 1];
        const int64_t step = Kernel::kDepth / wide, longest = kExactDepth / (step * wide) * step;
        const int64_t count = (end - begin) * kGroup;
        const bool widens = last - first > longest;  // too many for sums in int32
        if (widens) std::fill_n(memory.wide, count, int64_t{0});
        if (first == last) std::fill_n(memory.sums, count, 0);
        for (int64_t i = first; i < last; i += step) {
            const int64_t stop = std::min(last, i + step);
            pack(i, stop, inside, columns);
            multiply(i, stop, columns, begin, end, (i - first) % longest != 0);
            if (widens && (stop == last || (stop - first) % longest == 0)) {
                for (int64_t j = 0; j < count; ++j) memory.wide[j] += memory.sums[j];
            }
        }
        finish(first, last, column, columns, begin, end, widens);
    }

    void finish(int64_t first, int64_t last, int64_t column, int64_t columns, int64_t begin, int64_t end,
                bool widens) const {
        const int64_t across = pieces_of(weight.k, weight.shape.columns);
        for (int64_t row = begin; row < end; ++row) {
            int64_t sum = 0;
            for (int64_t i = first; i < last; ++i) sum += parts[row * across + weight.columns()[i]];
            const FinishRows<T> f{call, rows.scale + row, &sum, chunk + row, 1, column, columns};
            if (widens) {
                Kernel::finish(f, memory.wide + (row - begin) * kGroup, kGroup);
            } else {
                Kernel::finish(f, memory.sums + (row - begin) * kGroup, kGroup);
            }
        }
    }
};

// QuantizedRows::sum for each column of blocks.
template <class Q>
void sum_parts(const QuantizedRows<Q>& rows, int64_t wide, int64_t across,
               int32_t* parts) {  // [rows.rows, across]
    parallel_rows(rows.rows, rows.stride, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t i = 0; i < across; ++i) {
                const int64_t count = std::min(wide, rows.stride - i * wide);
                parts[row * across + i] =
                    static_cast<int32_t>(row_sum(rows.q + row * rows.stride + i * wide, std::max<int64_t>(0, count)));
            }
        }
    });
}

template <class Kernel, class T>
void panel_linear(const LinearCall<T>& call, const Blocks& weight) {
    using Q = typename Kernel::Q;
    using Rows = QuantizedRows<Q>;
    constexpr int64_t kGroup = BlockMemory<Kernel>::kGroup;
    const auto [high, wide] = weight.shape;
    const int64_t row_bytes = Rows::stride_for(call.k) * static_cast<int64_t>(sizeof(Q));
    const int64_t chunk_rows =
        std::min(call.m, std::max<int64_t>(192, kActivationBytes / std::max<int64_t>(1, row_bytes)));
    const int64_t across = pieces_of(call.k, wide), slices = pieces_of(high, kGroup);
    ActivationScratch scratch(Rows::scratch_bytes(chunk_rows, call.k));
    const Rows memory_rows(scratch, chunk_rows, call.k);
    Scratch<PartScratch> parts_scratch(chunk_rows * across * static_cast<int64_t>(sizeof(int32_t)) + 64);
    int32_t* parts = parts_scratch.take<int32_t>(chunk_rows * across);
    for (int64_t chunk = 0; chunk < call.m; chunk += chunk_rows) {
        Rows rows = memory_rows;
        rows.rows = std::min(chunk_rows, call.m - chunk);
        quantize_activations(call, chunk, rows);
        sum_parts(rows, wide, across, parts);
        const int64_t tall = std::min(rows.rows, kBlockRows), bands = pieces_of(rows.rows, tall);
        const auto tasks = [&, high = high](int64_t from, int64_t to) {
            Scratch<BlockScratch> own(BlockMemory<Kernel>::bytes(tall));
            const BlockTask<Kernel, T> task{call, weight, rows, parts, BlockMemory<Kernel>(own, tall), chunk};
            for (int64_t i = from; i < to; ++i) {
                const int64_t band = i % bands, slice = i / bands % slices, line = i / bands / slices;
                task.run(line, slice * kGroup, band * tall, std::min(rows.rows, (band + 1) * tall));
            }
        };
        parallel_rows(weight.row_blocks() * slices * bands, kGroup * call.k * tall / 32, tasks);
    }
}

// ---- dot products -----------------------------------------------------------------------------------------------

#if ENGINE_X86
// Of K: a lane of 32 bits sums a quarter of it at most, where blocks of 16 columns fill half of a vector.
constexpr int64_t kLongestDot = 1 << 19;

// A few rows of activations by Dot, whose registers hold the sums.
template <class Dot, class T>
void dot_linear(const LinearCall<T>& call, const Blocks& weight) {
    using Rows = QuantizedRows<int8_t>;
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call, 0, rows);
    const int64_t lines = weight.row_blocks(), high = weight.shape.rows;
    parallel_rows(lines, weight.kept() / std::max<int64_t>(1, lines) * call.m, [&](int64_t begin, int64_t end) {
        typename Dot::Sum sums[Dot::kMostRows][Dot::kMostBlock];
        for (int64_t line = begin; line < end; ++line) {
            Dot::line(call.m, rows.q, rows.stride, weight, line, sums);
            const int64_t first = line * high, outputs = std::min(high, weight.n - first);
            for (int64_t m = 0; m < call.m; ++m) {
                T* y = call.y + m * call.n + first;
                for (int64_t r = 0; r < outputs; ++r) y[r] = linear_output(sums[m][r], rows.scale[m], call, first + r);
            }
        }
    });
}

using DotAvx512 = BlockDotAvx512<Int8BlockStep>;
template <class Bytes>
using DotAvx2 = BlockDotAvx2<Int8BlockStepAvx2<Bytes>>;
#endif

template <class T>
void linear(const LinearCall<T>& call, const Blocks& weight) {
    if (call.m == 0 || call.n == 0) return;
#if ENGINE_X86
    // Up to so many rows of activations dot products are the faster way. Of high blocks registers hold the sums of
    // fewer rows, which are read in as many more pieces. Blocks that don't fit AVX-512's vectors are multiplied by
    // AVX2's products there too.
    const bool vnni = variant() == Variant::avx_vnni;
    const int64_t few_avx512 = weight.shape.rows <= 32 ? DotAvx512::kMostRows : 4;
    const int64_t few_avx2 = isa() == Isa::avx512 ? 2 : vnni ? 6 : DotAvx2<SignedBytesAvx2>::kMostRows;
    if (isa() == Isa::avx512 && call.m <= few_avx512 && call.k <= kExactDepth && DotAvx512::fits(weight)) {
        return dot_linear<DotAvx512>(call, weight);
    }
    if (isa() != Isa::portable && call.m <= few_avx2 && call.k <= kLongestDot) {
        if (vnni) return dot_linear<DotAvx2<SignedBytesAvxVnni>>(call, weight);
        return dot_linear<DotAvx2<SignedBytesAvx2>>(call, weight);
    }
    if (isa() == Isa::avx512) return strip_linear(call, weight);
    if (vnni) return panel_linear<PanelAvxVnni>(call, weight);
    if (isa() == Isa::avx2) return panel_linear<PanelAvx2>(call, weight);
#endif
    panel_linear<PanelPortable>(call, weight);
}

template <bool as_patches>
Tensor block_int8_linear(Tensor x_in, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor scale,
                         std::optional<Tensor> bias, std::optional<Tensor> input_scale) {
    LinearInput input("block_int8_linear", x_in, as_patches);
    STD_TORCH_CHECK(scale.dim() == 1, "block_int8_linear: scale: expected float32 [N]");
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char, "block_int8_linear: values: expected int8");
    const int64_t n = scale.size(0);
    const Blocks weight("block_int8_linear", crow_indices, col_indices, values, n, input.k);
    return int8_linear_output("block_int8_linear", input, n, scale, bias, input_scale,
                              [&](const auto& call) { linear(call, weight); });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("block_int8_linear", TORCH_BOX(&engine::block_int8_linear<false>));
    m.impl("block_int8_linear.patches", TORCH_BOX(&engine::block_int8_linear<true>));
}
