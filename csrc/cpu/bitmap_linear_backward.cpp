// The gradients of bitmap_linear: for x the product with the weight's columns, for the values the products of two dense
// matrices at the kept places alone. Where most weights are kept both are dense products, block by block of the
// weight's rows, so that it is never dense as a whole. Memory is safe by the scheme of common/bitmap.h.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/bitmap_float.h"
#include "common/bitmap_pack.h"
#include "common/bitmap_spmm.h"
#include "common/compiled.h"
#include "common/dtype.h"
#include "common/gemm_float.h"
#include "common/huge_pages.h"
#include "common/sddmm.h"
#include "common/tensor.h"

namespace engine {
namespace {

// Looking for a column's weights is worth its while for so many rows of gradients, and where so small a share is kept.
constexpr int64_t kFewestRows = 64;
constexpr double kMostKept = 0.45;

// ---- the gradient for x -----------------------------------------------------------------------------------------

// A bitmap's columns, up to 64 side by side, stretch by stretch of its rows: the rows of the transposed weight, as a
// source for common/spmm.h.
template <class V>
class Columns {
  public:
    explicit Columns(const FloatBitmap<V>& weights) : w_(weights), position_(weights.n) {}

    // What is kept of the columns [column, column + count) × rows [row, row + rows); count ≤ 64.
    ENGINE_INLINE void kept(int64_t column, int64_t count, int64_t row, int64_t rows, KeptRows& kept) {
        int64_t counts[kSpmmGroup] = {};
        const int64_t first = round_down(column, 8), end = column + count;
        const auto shift = static_cast<int>(column - first);
        const uint64_t wanted = ~uint64_t{0} >> (64 - count);
        if (row == 0) continued_ = column == next_;
        if (row + rows == w_.n) next_ = end;
        for (int64_t r = row; r < row + rows; ++r) {
            const uint8_t* mask = w_.mask(r);
            if (!continued_) position_[r] = w_.row_offsets[r] + count_bits_below(mask, column);
            uint64_t bits = mask_bits(mask, first, w_.k) >> shift;
            if (shift > 0) bits |= mask_bits(mask, first + 64, w_.k) << (64 - shift);
            bits &= wanted;
            const V* value = w_.values + position_[r];
            position_[r] += popcount64(bits);
            if (end == w_.k && (position_[r] != w_.row_offsets[r + 1] || has_padding_bits(mask, w_.k))) {
                w_.bad->record(r);
            }
            if (position_[r] > w_.nnz) continue;  // such a row is reported above
            for (; bits != 0; bits &= bits - 1, ++value) {
                const auto c = __builtin_ctzll(bits);
                const int64_t at = c * KeptRows::kStride + counts[c]++;
                kept.columns[at] = static_cast<uint8_t>(r - row);
                kept.values[at] = to_float(*value);
            }
        }
        for (int64_t c = 0; c < count; ++c) {
            kept.row[c] = {kept.values + c * KeptRows::kStride, kept.columns + c * KeptRows::kStride, counts[c]};
        }
    }

  private:
    ENGINE_INLINE int64_t count_bits_below(const uint8_t* mask, int64_t column) const {
        int64_t count = 0, i = 0;
        for (; i + 64 <= column; i += 64) count += popcount64(mask_bits(mask, i, w_.k));
        return i < column ? count + popcount64(mask_bits(mask, i, w_.k) << (64 - (column - i))) : count;
    }

    FloatBitmap<V> w_;
    std::vector<int64_t> position_;  // of the value with which each row goes on
    int64_t next_ = -1;              // the column that it belongs to
    bool continued_ = false;
};

template <class V>
ENGINE_INLINE void kept_columns(Columns<V>& columns, int64_t column, int64_t count, int64_t row, int64_t rows,
                                KeptRows& kept) {
    columns.kept(column, count, row, rows, kept);
}

template <class V>
class ColumnSource {
  public:
    explicit ColumnSource(const FloatBitmap<V>& weights) : columns_(weights), nnz_(weights.nnz) {}
    int64_t kept() const { return nnz_; }
    void rows(int64_t row, int64_t rows, int64_t k0, int64_t kc, KeptRows& kept) {
        compiled_to_avx2<kept_columns<V>>()(columns_, row, rows, k0, kc, kept);
    }

  private:
    Columns<V> columns_;
    int64_t nnz_;
};

// How many rows of the weight are dense at once, where they are.
int64_t block_rows(int64_t k) { return std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, k)); }

// grad · weight as dense products of some rows of the weight at a time.
Tensor dense_input(const Tensor& grad,  // [m, n]
                   const Tensor& bitmask, const Tensor& row_offsets, const Tensor& values, int64_t columns) {
    Tensor g = torch::stable::to(grad, ScalarType::Float), mask = bitmask, kept = values;
    const int64_t n = grad.size(1), step = block_rows(columns);
    const int64_t* offsets = data<int64_t>(row_offsets);
    Tensor total = new_output(grad, {grad.size(0), columns}, ScalarType::Float);
    if (n == 0) torch::stable::zero_(total);
    for (int64_t first = 0; first < n; first += step) {
        const int64_t rows = std::min(step, n - first), begin = offsets[first];
        Tensor own = new_tensor(row_offsets, {rows + 1}, ScalarType::Long);
        for (int64_t i = 0; i <= rows; ++i) mutable_data<int64_t>(own)[i] = offsets[first + i] - begin;
        std::array<StableIValue, 4> stack{
            torch::stable::detail::from(torch::stable::narrow(mask, 0, first, rows)), torch::stable::detail::from(own),
            torch::stable::detail::from(torch::stable::narrow(kept, 0, begin, offsets[first + rows] - begin)),
            torch::stable::detail::from(columns)};
        STABLE_TORCH_ERROR_CODE_CHECK(
            torch_call_dispatcher("engine::bitmap_to_dense", "", stack.data(), TORCH_ABI_VERSION));
        const Tensor dense = torch::stable::to(torch::stable::detail::to<Tensor>(stack[0]), ScalarType::Float);
        const Tensor part = torch::stable::narrow(g, 1, first, rows);
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu_addmm_out(total.get(), total.get(), part.get(), dense.get(), first == 0 ? 0 : 1, 1));
    }
    return total;
}

void check_bitmap(const char* op, const Tensor& bitmask, const Tensor& row_offsets, int64_t n, int64_t k, int64_t nnz) {
    STD_TORCH_CHECK(bitmask.scalar_type() == ScalarType::Byte && row_offsets.scalar_type() == ScalarType::Long, op,
                    ": expected a uint8 bitmask and int64 row_offsets");
    STD_TORCH_CHECK(
        k >= 0 && nnz >= 0 && bitmask.dim() == 2 && bitmask.size(0) == n && bitmask.size(1) == mask_bytes(k), op,
        ": bitmask: expected shape [N, ceil(K / 8)]");
    STD_TORCH_CHECK(row_offsets.dim() == 1 && row_offsets.size(0) == n + 1, op,
                    ": row_offsets: expected shape [N + 1]");
}

Tensor backward_input(Tensor grad_in, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, int64_t columns) {
    constexpr auto op = "bitmap_linear_backward_input";
    STD_TORCH_CHECK(grad_in.dim() >= 1 && values_in.dim() == 1, op, ": expected grad [..., N] and values [nnz]");
    const Tensor grad = as_contiguous(grad_in), bitmask = as_contiguous(bitmask_in);
    const Tensor row_offsets = as_contiguous(row_offsets_in), values = as_contiguous(values_in);
    const int64_t n = grad.size(-1), nnz = values.numel();
    check_bitmap(op, bitmask, row_offsets, n, columns, nnz);
    check_row_offsets(op, data<int64_t>(row_offsets), n, nnz);
    STD_TORCH_CHECK(columns > 0 || nnz == 0, op, ": values: expected none, as there are no columns");
    std::vector<int64_t> sizes = sizes_of(grad);
    sizes.back() = columns;
    const int64_t m = rows_of(sizes);
    dispatch_float(grad.scalar_type(), "bitmap_linear_backward_input: grad", [](auto) {});
    dispatch_float(values.scalar_type(), "bitmap_linear_backward_input: values", [](auto) {});
    const bool few_kept = static_cast<double>(nnz) <= kMostKept * static_cast<double>(n * columns);
    BadRow bad;
    if (m < kFewestRows || !few_kept || !float_spmm_pays<float, float>(m, nnz, n * columns)) {
        const auto* mask = data<uint8_t>(bitmask);
        const auto* offsets = data<int64_t>(row_offsets);
        for (int64_t row = 0; row < n; ++row, mask += mask_bytes(columns)) {
            const bool fits = count_bits(mask, columns) == offsets[row + 1] - offsets[row];
            if (!fits || has_padding_bits(mask, columns)) bad.record(row);
        }
        bad.raise(op);
        const Tensor total = dense_input(torch::stable::view(grad, {m, n}), bitmask, row_offsets, values, columns);
        return torch::stable::to(torch::stable::view(total, sizes), grad.scalar_type());
    }
    Tensor result = new_output(grad, sizes, grad.scalar_type());
    dispatch_float(grad.scalar_type(), "bitmap_linear_backward_input: grad", [&](auto grad_zero) {
        using T = decltype(grad_zero);
        const FloatLinear<T> call{data<T>(grad), nullptr, nullptr, mutable_data<T>(result), m, columns, n};
        dispatch_float(values.scalar_type(), "bitmap_linear_backward_input: values", [&](auto zero) {
            using V = decltype(zero);
            const FloatBitmap<V> weights{
                data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<V>(values), n, columns, nnz, &bad};
            float_spmm(call, ColumnSource<V>(weights));
        });
    });
    bad.raise(op);
    return result;
}

// ---- the gradient for the values --------------------------------------------------------------------------------

template <class G, class X>
void kept_products(const G* grad, const X* x, int64_t m, const FloatBitmap<float>& sums) {
    const BitmapSource<float> source(sums.bitmask, sums.row_offsets, sums.values, sums.k, sums.nnz, *sums.bad);
#if ENGINE_X86
    if (isa() != Isa::portable) return sddmm<SddmmAvx2, FloatPanelAvx2>(grad, x, m, sums.n, sums.k, source);
#endif
    sddmm<SddmmPortable, FloatPanelPortable>(grad, x, m, sums.n, sums.k, source);
}

// As dense products of some rows of the weight at a time, of which the kept places are taken.
void dense_products(const Tensor& grad, const Tensor& x, const FloatBitmap<float>& sums, float* to) {
    const int64_t step = block_rows(sums.k);
    Tensor g = torch::stable::to(grad, ScalarType::Float);
    const Tensor inputs = torch::stable::to(x, ScalarType::Float);
    const PackRow<uint32_t> pack = pack_row<uint32_t>();
    for (int64_t first = 0; first < sums.n; first += step) {
        const int64_t rows = std::min(step, sums.n - first);
        const Tensor part = torch::stable::transpose(torch::stable::narrow(g, 1, first, rows), 0, 1);
        const Tensor dense = as_contiguous(torch::stable::matmul(part, inputs));
        parallel_rows(rows, sums.k * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
            for (int64_t row = first + begin; row < first + end; ++row) {
                const int64_t length = sums.row_offsets[row + 1] - sums.row_offsets[row];
                if (count_bits(sums.mask(row), sums.k) != length || has_padding_bits(sums.mask(row), sums.k)) {
                    sums.bad->record(row);
                    continue;
                }
                pack(sums.mask(row), data<uint32_t>(dense) + (row - first) * sums.k, sums.k,
                     reinterpret_cast<uint32_t*>(to + sums.row_offsets[row]), length);
            }
        });
    }
}

Tensor backward_values(Tensor grad_in, Tensor x_in, Tensor bitmask_in, Tensor row_offsets_in, int64_t nnz,
                       ScalarType dtype) {
    constexpr auto op = "bitmap_linear_backward_values";
    STD_TORCH_CHECK(grad_in.dim() >= 1 && x_in.dim() >= 1, op, ": expected grad [..., N] and x [..., K]");
    const int64_t n = grad_in.size(-1), k = x_in.size(-1);
    check_bitmap(op, bitmask_in, row_offsets_in, n, k, nnz);
    dispatch_float(dtype, "bitmap_linear_backward_values: dtype", [](auto) {});
    const int64_t m = rows_of(sizes_of(grad_in));
    STD_TORCH_CHECK(m == rows_of(sizes_of(x_in)), op, ": x: expected as many rows as grad has");
    const Tensor grad = torch::stable::view(as_contiguous(grad_in), {m, n});
    const Tensor x = torch::stable::view(as_contiguous(x_in), {m, k});
    const Tensor bitmask = as_contiguous(bitmask_in), row_offsets = as_contiguous(row_offsets_in);
    check_row_offsets(op, data<int64_t>(row_offsets), n, nnz);
    Tensor sums = new_output(x, {nnz}, ScalarType::Float);
    torch::stable::zero_(sums);
    BadRow bad;
    const FloatBitmap<float> places{
        data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<float>(sums), n, k, nnz, &bad};
    dispatch_float(grad.scalar_type(), "bitmap_linear_backward_values: grad", [&](auto grad_zero) {
        dispatch_float(x.scalar_type(), "bitmap_linear_backward_values: x", [&](auto x_zero) {
            if (sddmm_pays(m, nnz, n * k)) {
                kept_products(data<decltype(grad_zero)>(grad), data<decltype(x_zero)>(x), m, places);
            } else {
                dense_products(grad, x, places, mutable_data<float>(sums));
            }
        });
    });
    bad.raise(op);
    return dtype == ScalarType::Float ? sums : torch::stable::to(sums, dtype);
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("bitmap_linear_backward_input", TORCH_BOX(&engine::backward_input));
    m.impl("bitmap_linear_backward_values", TORCH_BOX(&engine::backward_values));
}
