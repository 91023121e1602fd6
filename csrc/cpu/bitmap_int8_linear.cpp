// bitmap_int8_linear: int8 activations, quantised here, times a pruned int8 weight read as its bitmap holds it.
//
// One row of activations is bound by memory, which sees nothing but the mask and the kept values, each one sequential
// stream: 64 weights at a time are spread in registers and multiplied there. A few rows of activations share what was
// spread; many go through the panels of common/gemm_int8.h, or where most weights are pruned on AVX2, meet the kept
// ones only (common/spmm.h).

#include "common/bitmap_blocks_avx512.h"
#include "common/bitmap_dot.h"
#include "common/bitmap_dot_avx2.h"
#include "common/bitmap_dot_avx512.h"
#include "common/bitmap_spmm.h"
#include "common/int8_activations.h"
#include "common/linear_binding.h"

namespace engine {
namespace {

// Weight rows that are summed side by side, stretch by stretch, so that the activations of a stretch stay in L1.
constexpr int64_t kGroupRows = 16;
// Up to so many rows of activations the portable dot products are the faster way.
constexpr int64_t kFewRows = 16;

struct ValuesScratch;  // tag: a thread's copies of values at the tensor's end

// Asks memory for what the next stretch of a row will need: about as much as the last did.
inline void prefetch_stretch(const Int8Bitmap& weight, const uint8_t* mask, int64_t position, int64_t kc,
                             int64_t taken) {
    for (int64_t i = 0; i < mask_bytes(kc); i += 64) __builtin_prefetch(mask + i);
    const int64_t end = std::min(weight.nnz, position + taken);
    for (int64_t i = position; i < end; i += 64) __builtin_prefetch(weight.values + i);
}

// Sums [f.rows, kGroupRows] to outputs.
template <class Kernel, class T>
void finish(const FinishRows<T>& f, const int64_t* sums) {
#if ENGINE_X86
    if constexpr (std::is_same_v<Kernel, VectorAvx512>) return PanelAvx512::finish(f, sums, kGroupRows);
#endif
    finish_rows<Kernel::kShift>(f, sums, kGroupRows);
}

// Outputs [begin, end) of every row of activations.
template <class Kernel, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const Int8Bitmap& weight,
                 int64_t begin, int64_t end, BadRow& bad) {
    constexpr int kColumns = Kernel::kColumns;
    const int64_t depth = Kernel::depth(call.m), buffer_bytes = std::min(depth, call.k) + kReadAhead;
    Scratch<ValuesScratch> scratch(kColumns * (buffer_bytes + 64));
    int8_t* buffers[kColumns];
    for (auto& buffer : buffers) buffer = scratch.take<int8_t>(buffer_bytes);

    for (int64_t first = begin; first < end; first += kGroupRows) {
        const int64_t group = std::min(kGroupRows, end - first);
        int64_t position[kGroupRows], sums[kFewRows][kGroupRows];
        std::fill_n(sums[0], call.m * kGroupRows, int64_t{0});
        std::copy_n(weight.row_offsets + first, group, position);
        for (int64_t k0 = 0; k0 < call.k; k0 += depth) {
            const int64_t kc = std::min(depth, call.k - k0);
            for (int64_t j = 0; j < group; j += kColumns) {
                Column columns[kColumns];
                const int8_t* start[kColumns];
                for (int c = 0; c < kColumns; ++c) {
                    // In the place of a row that is missing the first is read once more.
                    const int64_t row = j + c < group ? j + c : j;
                    start[c] = weight.readable(position[row], kc, buffers[c]);
                    const int64_t next = std::min(first + row + kColumns, weight.n);
                    columns[c] = {weight.row_mask(first + row) + k0 / 8, start[c],
                                  weight.row_offsets[next] - weight.row_offsets[first + row],
                                  kColumns * mask_bytes(call.k)};
                }
                int32_t part[kFewRows * kColumns];
                Kernel::stretch(rows.q + k0, rows.stride, call.m, columns, kc, part);
                for (int c = 0; c < kColumns && j + c < group; ++c) {
                    const int64_t taken = columns[c].values - start[c];
                    position[j + c] += taken;
                    for (int64_t r = 0; r < call.m; ++r) sums[r][j + c] += part[r * kColumns + c];
                    if constexpr (Kernel::kReadsAhead) continue;
                    if (k0 + kc < call.k) {
                        prefetch_stretch(weight, columns[c].mask + depth / 8, position[j + c], kc, taken);
                    } else if (first + kGroupRows + j + c < end) {
                        const int64_t next = first + kGroupRows + j + c;
                        prefetch_stretch(weight, weight.row_mask(next), weight.row_offsets[next], kc, taken);
                    }
                }
            }
        }
        for (int64_t j = 0; j < group; ++j) {
            if (!weight.ends_well(first + j, position[j])) bad.record(first + j);
        }
        finish<Kernel>(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, first, group}, sums[0]);
    }
}

template <class Kernel, class T>
void dot_linear(const LinearCall<T>& call, const Int8Bitmap& weight, BadRow& bad) {
    using Q = typename Kernel::Q;
    with_quantized_rows<Q>(call, call.k * (1 + call.m / 4),
                           [&](const QuantizedRows<Q>& rows, int64_t begin, int64_t end) {
                               dot_outputs<Kernel>(call, rows, weight, begin, end, bad);
                           });
}

#if ENGINE_X86
// Outputs [begin, end) of few rows of activations and a short K.
template <class T>
void short_outputs(const LinearCall<T>& call, const QuantizedRows<int8_t>& rows, const Int8Bitmap& weight,
                   int64_t begin, int64_t end, BadRow& bad) {
    using Rows = BitmapRowsAvx512;
    int32_t totals[Rows::kRows * Rows::kColumns];
    for (int64_t first = begin; first < end; first += Rows::kColumns) {
        const int64_t count = std::min(Rows::kColumns, end - first);
        Rows::multiply_rows(call.m, rows.q, rows.stride, weight, first, count, bad, totals);
        PanelAvx512::finish(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, first, count}, totals, Rows::kColumns);
    }
}

// By dot products, where they are the faster way.
template <class Bytes, class Products, class T>
bool dot_linear_avx2(const LinearCall<T>& call, const Int8Bitmap& weight, BadRow& bad) {
    if (call.m > Products::kRows) return false;
    if (call.m == 1) {
        dot_linear<VectorAvx2<Bytes>>(call, weight, bad);
    } else {
        dot_linear<MatrixAvx2<Products>>(call, weight, bad);
    }
    return true;
}

template <class T>
void linear_avx512(const LinearCall<T>& call, const Int8Bitmap& weight, BadRow& bad) {
    constexpr int64_t kMostDepth = BitmapRowsAvx512::kMostDepth;
    if (call.m == 1 && call.k > kMostDepth) return dot_linear<VectorAvx512>(call, weight, bad);
    with_quantized_rows<int8_t>(
        call, call.k * (1 + call.m / 4), [&](const QuantizedRows<int8_t>& rows, int64_t begin, int64_t end) {
            if (call.m <= BitmapRowsAvx512::kRows && call.k <= kMostDepth) {
                return short_outputs(call, rows, weight, begin, end, bad);
            }
            spread_outputs_avx512<BitmapBlocksAvx512>(call, rows, begin, end, weight, call.m, bad);
        });
}
#endif

template <class T>
void linear(const LinearCall<T>& call, const Int8Bitmap& weight, BadRow& bad) {
    if (call.m == 0) return;
#if ENGINE_X86
    if (isa() == Isa::avx512 && call.m <= spread_block_rows(call.k)) return linear_avx512(call, weight, bad);
    if (isa() == Isa::avx2) {
        if (variant() == Variant::avx_vnni) {
            if (dot_linear_avx2<SignedBytesAvxVnni, BytesAvxVnni>(call, weight, bad)) return;
        } else if (dot_linear_avx2<SignedBytesAvx2, PairsAvx2>(call, weight, bad)) {
            return;
        }
        if (int8_spmm_pays(call.m, call.k, weight.nnz, weight.n * weight.k)) {
            const auto [mask, row_offsets, values, n, k, nnz] = weight;
            return int8_spmm(call, BitmapSource<int8_t>(mask, row_offsets, values, k, nnz, bad));
        }
        return int8_panel_linear(call, BitmapProvider(weight, bad));
    }
#endif
    if (call.m > kFewRows) return int8_panel_linear(call, BitmapProvider(weight, bad));
    dot_linear<MatrixPortable>(call, weight, bad);
}

template <bool as_patches>
Tensor bitmap_int8_linear(Tensor x, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, Tensor scale,
                          std::optional<Tensor> bias, std::optional<Tensor> input_scale) {
    constexpr auto op = "bitmap_int8_linear";
    LinearInput input(op, x, as_patches);
    STD_TORCH_CHECK(bitmask_in.dim() == 2 && bitmask_in.scalar_type() == ScalarType::Byte &&
                        bitmask_in.size(1) == mask_bytes(input.k),
                    op, ": bitmask: expected uint8 [N, ceil(K / 8)]");
    const int64_t n = bitmask_in.size(0), nnz = values_in.numel();
    STD_TORCH_CHECK(row_offsets_in.dim() == 1 && row_offsets_in.size(0) == n + 1 &&
                        row_offsets_in.scalar_type() == ScalarType::Long,
                    op, ": row_offsets: expected int64 [N + 1]");
    STD_TORCH_CHECK(values_in.dim() == 1 && values_in.scalar_type() == ScalarType::Char, op,
                    ": values: expected int8 [nnz]");
    const Tensor bitmask = as_contiguous(bitmask_in), row_offsets = as_contiguous(row_offsets_in);
    const Tensor values = as_contiguous(values_in);
    check_row_offsets(op, data<int64_t>(row_offsets), n, nnz);
    const Int8Bitmap weight{data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<int8_t>(values), n, input.k, nnz};
    BadRow bad;
    Tensor y = int8_linear_output(op, input, n, scale, bias, input_scale,
                                  [&](const auto& call) { linear(call, weight, bad); });
    bad.raise(op);
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("bitmap_int8_linear", TORCH_BOX(&engine::bitmap_int8_linear<false>));
    m.impl("bitmap_int8_linear.patches", TORCH_BOX(&engine::bitmap_int8_linear<true>));
}
