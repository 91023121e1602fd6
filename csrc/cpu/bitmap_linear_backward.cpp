// The gradients of bitmap_linear: for x the product with the weight's columns, for the values the products of two dense
// matrices at the kept places alone. Where most weights are kept both are dense products, block by block of the
// weight's rows, so that it is never dense as a whole. Memory is safe by the scheme of common/bitmap.h.

#include "common/bitmap_pack.h"
#include "common/bitmap_spmm.h"
#include "common/gemm_float.h"
#include "common/huge_pages.h"
#include "common/sddmm.h"
#include "common/tensor.h"

namespace engine {
namespace {

// A checked bitmap of float values.
template <class V>
struct Bitmap {
    const uint8_t* bitmask;      // [n, ceil(k/8)]
    const int64_t* row_offsets;  // [n + 1]
    const V* values;             // [nnz]
    int64_t n, k, nnz;
    BadRow* bad;

    const uint8_t* mask(int64_t row) const { return bitmask + row * mask_bytes(k); }
};

// ---- the gradient for x -----------------------------------------------------------------------------------------

// A bitmap's columns, up to 64 side by side, stretch by stretch of its rows.
template <class V>
class Columns {
  public:
    explicit Columns(const Bitmap<V>& weights) : w_(weights) {}

    // Calls f(row, column, value) for what is kept of the rows [row, row + rows) × columns [column, column + columns),
    // row by row. columns ≤ 64.
    template <class F>
    ENGINE_INLINE void each(int64_t row, int64_t rows, int64_t column, int64_t columns, const F& f) const {
        const int64_t first = column / 8 * 8;
        const auto shift = static_cast<int>(column - first);
        const uint64_t wanted = ~uint64_t{0} >> (64 - columns);
        for (int64_t r = row; r < row + rows; ++r) {
            const uint8_t* mask = w_.mask(r);
            int64_t position = w_.row_offsets[r];
            for (int64_t i = 0; i < first; i += 64) {
                const uint64_t before = mask_bits(mask, i, w_.k);
                position += popcount64(i + 64 <= first ? before : before << (64 - (first - i)));
            }
            const uint64_t low = mask_bits(mask, first, w_.k);
            uint64_t bits = low >> shift;
            if (shift > 0) {
                position += popcount64(low << (64 - shift));
                bits |= mask_bits(mask, first + 64, w_.k) << (64 - shift);
            }
            bits &= wanted;
            const int64_t end = position + popcount64(bits);
            const bool last = column + columns == w_.k;
            if (last && (end != w_.row_offsets[r + 1] || has_padding_bits(mask, w_.k))) w_.bad->record(r);
            if (end > w_.nnz) continue;  // such a row is reported above
            for (const V* value = w_.values + position; bits != 0; bits &= bits - 1, ++value) {
                f(r - row, __builtin_ctzll(bits), to_float(*value));
            }
        }
    }

  private:
    Bitmap<V> w_;
};

// As a source for common/spmm.h: the transposed weight's rows.
template <class V>
ENGINE_INLINE void kept_columns_of(const Columns<V>& columns, int64_t column, int64_t count, int64_t row, int64_t rows,
                                   KeptRows& kept) {
    int64_t counts[kSpmmGroup] = {};
    columns.each(row, rows, column, count, [&](int64_t r, int64_t c, float value) {
        const int64_t at = c * kSpmmDepth + counts[c]++;
        kept.columns[at] = static_cast<uint8_t>(r);
        kept.values[at] = value;
    });
    for (int64_t c = 0; c < count; ++c) {
        kept.row[c] = {kept.values + c * kSpmmDepth, kept.columns + c * kSpmmDepth, counts[c]};
    }
}

// As a provider for common/gemm_float.h: the same, spread over a panel.
template <class V>
ENGINE_INLINE void spread_columns_of(const Columns<V>& columns, int64_t column, int64_t count, int64_t row,
                                     int64_t rows, float* panel) {
    for (int64_t c = 0; c < count; ++c) std::fill_n(panel + c * kFloatDepth, rows, 0.0f);
    for (int64_t c = 0; c < count; c += 64) {
        columns.each(row, rows, column + c, std::min<int64_t>(64, count - c),
                     [&](int64_t r, int64_t j, float value) { panel[(c + j) * kFloatDepth + r] = value; });
    }
}

template <class V>
void kept_columns_portable(const Columns<V>& columns, int64_t column, int64_t count, int64_t row, int64_t rows,
                           KeptRows& kept) {
    kept_columns_of(columns, column, count, row, rows, kept);
}
template <class V>
void spread_columns_portable(const Columns<V>& columns, int64_t column, int64_t count, int64_t row, int64_t rows,
                             float* panel) {
    spread_columns_of(columns, column, count, row, rows, panel);
}
#if ENGINE_X86
template <class V>
ENGINE_AVX2 void kept_columns_avx2(const Columns<V>& columns, int64_t column, int64_t count, int64_t row, int64_t rows,
                                   KeptRows& kept) {
    kept_columns_of(columns, column, count, row, rows, kept);
}
template <class V>
ENGINE_AVX2 void spread_columns_avx2(const Columns<V>& columns, int64_t column, int64_t count, int64_t row,
                                     int64_t rows, float* panel) {
    spread_columns_of(columns, column, count, row, rows, panel);
}
#endif

template <class V>
class ColumnSource {
  public:
    explicit ColumnSource(const Bitmap<V>& weights) : columns_(weights), nnz_(weights.nnz) {}
    int64_t kept() const { return nnz_; }
    void rows(int64_t row, int64_t rows, int64_t k0, int64_t kc, KeptRows& kept) const {
#if ENGINE_X86
        if (isa() != Isa::portable) return kept_columns_avx2(columns_, row, rows, k0, kc, kept);
#endif
        kept_columns_portable(columns_, row, rows, k0, kc, kept);
    }

  private:
    Columns<V> columns_;
    int64_t nnz_;
};

template <class V>
class ColumnProvider {
  public:
    explicit ColumnProvider(const Bitmap<V>& weights) : columns_(weights) {}
    void block(int64_t row, int64_t rows, int64_t k0, int64_t kc, float* panel) const {
#if ENGINE_X86
        if (isa() != Isa::portable) return spread_columns_avx2(columns_, row, rows, k0, kc, panel);
#endif
        spread_columns_portable(columns_, row, rows, k0, kc, panel);
    }

  private:
    Columns<V> columns_;
};

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
    std::vector<int64_t> sizes = sizes_of(grad);
    sizes.back() = columns;
    const int64_t m = rows_of(sizes);
    Tensor result = new_output(grad, sizes, grad.scalar_type());
    BadRow bad;
    dispatch_float(grad.scalar_type(), "bitmap_linear_backward_input: grad", [&](auto grad_zero) {
        using T = decltype(grad_zero);
        const FloatLinear<T> call{data<T>(grad), nullptr, nullptr, mutable_data<T>(result), m, columns, n};
        dispatch_float(values.scalar_type(), "bitmap_linear_backward_input: values", [&](auto zero) {
            using V = decltype(zero);
            const Bitmap<V> weights{
                data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<V>(values), n, columns, nnz, &bad};
            if (float_spmm_pays(nnz, n * columns)) {
                float_spmm(call, ColumnSource<V>(weights));
            } else {
                float_panel_linear(call, ColumnProvider<V>(weights));
            }
        });
    });
    bad.raise(op);
    return result;
}

// ---- the gradient for the values --------------------------------------------------------------------------------

template <class G, class X>
void kept_products(const G* grad, const X* x, int64_t m, const Bitmap<float>& sums) {
    const BitmapSource<float> source(sums.bitmask, sums.row_offsets, sums.values, sums.k, sums.nnz, *sums.bad);
#if ENGINE_X86
    if (isa() != Isa::portable) return sddmm<SddmmAvx2, FloatPanelAvx2>(grad, x, m, sums.n, sums.k, source);
#endif
    sddmm<SddmmPortable, FloatPanelPortable>(grad, x, m, sums.n, sums.k, source);
}

// As dense products of some rows of the weight at a time, of which the kept places are taken.
void dense_products(const Tensor& grad, const Tensor& x, const Bitmap<float>& sums, float* to) {
    constexpr int64_t kBlock = 1 << 20;  // places that are dense at once
    const int64_t step = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, sums.k));
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
    const Bitmap<float> places{data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<float>(sums), n, k, nnz, &bad};
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
