// csr_linear: y = x W^T + bias for W in compressed sparse rows, for weights so sparse that an index beside every value
// costs less than a bit for every place.
//
// Rows of x are taken kBlock at a time and transposed, so that one value and its column serve a whole vector: x^T[col]
// is kBlock numbers side by side. A single row of x needs no transpose and gathers.

#include <atomic>
#include <limits>

#include "common/dtype.h"
#include "common/tensor.h"

namespace engine {
namespace {

constexpr int kBlock = 16;  // rows of x: 64 bytes of fp32, one cache line

template <class V, class I>
struct Csr {
    const I* crow;      // [n + 1]
    const I* columns;   // [nnz]
    const V* values;    // [nnz]
    const float* bias;  // [n] or null
};

// Outputs [begin, end) for kRows rows of x. Four sums overlap the additions' latencies, and lose less to rounding.
template <int kRows, class V, class I>
ENGINE_INLINE void outputs(const Csr<V, I>& w,
                           const float* xt,  // [k, kRows]
                           int64_t begin, int64_t end, int64_t n,
                           float* y) {  // [kRows, n]
    constexpr int kSums = 4;
    for (int64_t row = begin; row < end; ++row) {
        float sums[kSums][kRows] = {};
        int64_t i = w.crow[row];
        const int64_t last = w.crow[row + 1];
        for (; i + kSums <= last; i += kSums) {
            for (int s = 0; s < kSums; ++s) {
                const float value = to_float(w.values[i + s]);
                const float* from = xt + static_cast<int64_t>(w.columns[i + s]) * kRows;
                for (int m = 0; m < kRows; ++m) sums[s][m] += value * from[m];
            }
        }
        for (; i < last; ++i) {
            const float value = to_float(w.values[i]);
            const float* from = xt + static_cast<int64_t>(w.columns[i]) * kRows;
            for (int m = 0; m < kRows; ++m) sums[0][m] += value * from[m];
        }
        for (int m = 0; m < kRows; ++m) {
            float total = sums[0][m];
            for (int s = 1; s < kSums; ++s) total += sums[s][m];
            y[m * n + row] = total + (w.bias != nullptr ? w.bias[row] : 0.0f);
        }
    }
}

template <int kRows, class V, class I>
void outputs_portable(const Csr<V, I>& w, const float* xt, int64_t begin, int64_t end, int64_t n, float* y) {
    outputs<kRows>(w, xt, begin, end, n, y);
}
#if ENGINE_X86
template <int kRows, class V, class I>
ENGINE_AVX2 void outputs_avx2(const Csr<V, I>& w, const float* xt, int64_t begin, int64_t end, int64_t n, float* y) {
    outputs<kRows>(w, xt, begin, end, n, y);
}
template <int kRows, class V, class I>
ENGINE_AVX512 void outputs_avx512(const Csr<V, I>& w, const float* xt, int64_t begin, int64_t end, int64_t n,
                                  float* y) {
    outputs<kRows>(w, xt, begin, end, n, y);
}
#endif

template <int kRows, class V, class I>
auto outputs_kernel() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return outputs_avx2<kRows, V, I>;
    if (isa() == Isa::avx512) return outputs_avx512<kRows, V, I>;
#endif
    return outputs_portable<kRows, V, I>;
}

// Throws unless the offsets rise from 0 to nnz and every column lies in [0, k): then no read below is out of bounds.
template <class I>
void check_indices(const I* crow, const I* columns, int64_t n, int64_t nnz, int64_t k) {
    bool rises = crow[0] == 0 && crow[n] == nnz;
    for (int64_t row = 0; row < n; ++row) rises &= crow[row] <= crow[row + 1];
    STD_TORCH_CHECK(rises, "csr_linear: crow_indices: expected offsets rising from 0 to ", nnz);
    std::atomic<bool> inside{true};
    parallel_rows(nnz, sizeof(I), [&](int64_t begin, int64_t end) {
        bool all = true;
        for (int64_t i = begin; i < end; ++i) all &= columns[i] >= 0 && columns[i] < k;
        if (!all) inside = false;
    });
    STD_TORCH_CHECK(inside, "csr_linear: col_indices: expected columns in [0, ", k, ")");
}

// `kRows` rows of x from row `first` on, as fp32 [k, kRows]; missing rows are 0. Notes rows that are not finite.
template <int kRows, class T>
void transpose(const T* x,  // [m, k]
               int64_t first, int64_t m, int64_t k,
               float* xt,  // [k, kRows]
               bool (&finite)[kRows]) {
    for (int r = 0; r < kRows; ++r) {
        finite[r] = true;
        for (int64_t i = 0; i < k; ++i) {
            const float value = first + r < m ? to_float(x[(first + r) * k + i]) : 0.0f;
            finite[r] &= (std::bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u;
            xt[i * kRows + r] = value;
        }
    }
}

template <int kRows, class T, class V, class I>
void block_of_rows(const Csr<V, I>& w, const T* x, T* y, int64_t first, int64_t m, int64_t n, int64_t k,
                   std::vector<float>& xt, std::vector<float>& sums) {
    bool finite[kRows];
    transpose<kRows>(x, first, m, k, xt.data(), finite);
    const auto kernel = outputs_kernel<kRows, V, I>();
    const int64_t bytes = n == 0 ? 1 : (w.crow[n] * static_cast<int64_t>(sizeof(V) + sizeof(I)) * kRows) / n + 1;
    parallel_rows(n, bytes, [&](int64_t begin, int64_t end) { kernel(w, xt.data(), begin, end, n, sums.data()); });
    for (int r = 0; r < kRows && first + r < m; ++r) {
        for (int64_t j = 0; j < n; ++j) {
            const float value = finite[r] ? sums[r * n + j] : std::numeric_limits<float>::quiet_NaN();
            y[(first + r) * n + j] = from_float<T>(value);
        }
    }
}

template <class T, class V, class I>
void linear(const Csr<V, I>& w, const T* x, T* y, int64_t m, int64_t n, int64_t k) {
    const int rows = m == 1 ? 1 : kBlock;
    std::vector<float> xt(k * rows), sums(n * rows);
    for (int64_t first = 0; first < m; first += rows) {
        if (rows == 1) {
            block_of_rows<1>(w, x, y, first, m, n, k, xt, sums);
        } else {
            block_of_rows<kBlock>(w, x, y, first, m, n, k, xt, sums);
        }
    }
}

Tensor csr_linear(Tensor x_in, Tensor crow_in, Tensor columns_in, Tensor values_in, std::optional<Tensor> bias_in) {
    STD_TORCH_CHECK(x_in.dim() >= 1 && crow_in.dim() == 1 && crow_in.numel() > 0 && values_in.dim() == 1 &&
                        columns_in.dim() == 1 && columns_in.size(0) == values_in.size(0) &&
                        crow_in.scalar_type() == columns_in.scalar_type(),
                    "csr_linear: shapes or dtypes don't fit");
    const Tensor x = as_contiguous(x_in), crow = as_contiguous(crow_in), columns = as_contiguous(columns_in);
    const Tensor values = as_contiguous(values_in);
    std::vector<int64_t> sizes = sizes_of(x);
    const int64_t k = sizes.back(), n = crow.size(0) - 1, nnz = values.size(0);
    sizes.back() = n;
    int64_t m = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
    std::vector<float> bias;
    if (bias_in.has_value()) {
        STD_TORCH_CHECK(bias_in->dim() == 1 && bias_in->size(0) == n, "csr_linear: bias: expected shape [N]");
        const Tensor b = as_contiguous(*bias_in);
        dispatch_float(b.scalar_type(), "csr_linear: bias", [&](auto zero) {
            const auto* from = data<decltype(zero)>(b);
            for (int64_t i = 0; i < n; ++i) bias.push_back(to_float(from[i]));
        });
    }
    Tensor y = new_tensor(x, sizes, x.scalar_type());
    const bool wide = crow.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || crow.scalar_type() == ScalarType::Int, "csr_linear: crow_indices: expected int32 or int64");
    dispatch_float(x.scalar_type(), "csr_linear: x", [&](auto x_zero) {
        dispatch_float(values.scalar_type(), "csr_linear: values", [&](auto v_zero) {
            using T = decltype(x_zero);
            using V = decltype(v_zero);
            auto run = [&](auto index) {
                using I = decltype(index);
                check_indices(data<I>(crow), data<I>(columns), n, nnz, k);
                const Csr<V, I> w{data<I>(crow), data<I>(columns), data<V>(values),
                                  bias.empty() ? nullptr : bias.data()};
                linear(w, data<T>(x), mutable_data<T>(y), m, n, k);
            };
            wide ? run(int64_t{}) : run(int32_t{});
        });
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("csr_linear", TORCH_BOX(&engine::csr_linear)); }
