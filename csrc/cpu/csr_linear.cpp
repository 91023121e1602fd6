// csr_linear: y = x W^T + bias for W in compressed sparse rows, for weights so sparse that an index beside every value
// costs less than a bit for every place.
//
// Up to 8 rows of x are transposed, so that one value and its column serve a whole vector: x^T[col] is that many numbers
// side by side. A single row needs no transpose and gathers. More rows: common/csr_spmm.h.
//
// For these few a column is clamped into [0, k) where it is used, and one that was not inside is reported after the loop:
// so nothing is read out of bounds whatever the indices hold, and no pass is spent on looking at them beforehand.

#include <atomic>
#include <limits>

#include "common/compiled.h"
#include "common/csr_spmm.h"
#include "common/floats.h"
#include "common/linear_binding.h"
#include "common/scratch.h"

namespace engine {
namespace {

constexpr int kMostRows = 8;  // of x, to be transposed here
constexpr int kChunk = 128;   // values after which partial sums are added to the total: long rows lose less to rounding
constexpr int kSums = 4;      // beside one another, to overlap the latencies of additions

// Columns where they are used: clamped into [0, k), and the largest noted, for what lay outside to be reported.
template <class I>
class ClampedColumns {
  public:
    explicit ENGINE_INLINE ClampedColumns(int64_t k)
        : last_(static_cast<U>(std::min<int64_t>(k - 1, std::numeric_limits<I>::max()))) {}
    ENGINE_INLINE int64_t operator()(I column) {
        const U at = static_cast<U>(column);  // a negative one becomes a large one
        most_ = std::max(most_, at);
        return static_cast<int64_t>(std::min(at, last_));
    }
    ENGINE_INLINE bool inside() const { return most_ <= last_; }

  private:
    using U = std::make_unsigned_t<I>;
    U last_, most_ = 0;
};

// Some rows of x, and where their results go.
struct Block {
    const float* xt;  // [k, kRows] fp32: the rows, transposed; those beyond `rows` are 0
    uint32_t bad;     // bit m is set where row m holds a NaN or an infinity
    int64_t rows;     // in use
    float* y;         // [rows, n]
};

template <class V, class I>
using Outputs = bool (*)(const Csr<V, I>& w, const Block& block, int64_t begin, int64_t end);

template <class V, class I>
ENGINE_INLINE void write_output(const Csr<V, I>& w, const Block& block, int64_t row, const float* total) {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    const float bias = w.bias == nullptr ? 0.0f : w.bias[row];
    for (int64_t m = 0; m < block.rows; ++m) {
        block.y[m * w.n + row] = (block.bad >> m & 1) != 0 ? kNaN : total[m] + bias;
    }
}

// Outputs [begin, end) of each row of the block. False where a column lay outside.
template <int kRows, class V, class I>
bool outputs_portable(const Csr<V, I>& w, const Block& block, int64_t begin, int64_t end) {
    ClampedColumns<I> clamp(w.k);
    for (int64_t row = begin; row < end; ++row) {
        float total[kRows] = {};
        for (int64_t chunk = w.crow[row]; chunk < w.crow[row + 1]; chunk += kChunk) {
            const int64_t last = std::min<int64_t>(chunk + kChunk, w.crow[row + 1]);
            float sums[kSums][kRows] = {};
            int64_t i = chunk;
            for (; i + kSums <= last; i += kSums) {
                for (int s = 0; s < kSums; ++s) {
                    const float value = to_float(w.values[i + s]);
                    const float* x = block.xt + clamp(w.columns[i + s]) * kRows;
                    for (int m = 0; m < kRows; ++m) sums[s][m] += value * x[m];
                }
            }
            for (; i < last; ++i) {
                const float value = to_float(w.values[i]);
                const float* x = block.xt + clamp(w.columns[i]) * kRows;
                for (int m = 0; m < kRows; ++m) sums[i % kSums][m] += value * x[m];
            }
            for (int m = 0; m < kRows; ++m) total[m] += (sums[0][m] + sums[1][m]) + (sums[2][m] + sums[3][m]);
        }
        write_output(w, block, row, total);
    }
    return clamp.inside();
}

#if ENGINE_X86
// kMostRows rows of x, for AVX-512 processors too: the loop waits for x^T to come from the second cache.
template <class V, class I>
ENGINE_AVX2 bool outputs_avx2(const Csr<V, I>& w, const Block& block, int64_t begin, int64_t end) {
    ClampedColumns<I> clamp(w.k);
    for (int64_t row = begin; row < end; ++row) {
        __m256 total = _mm256_setzero_ps();
        for (int64_t chunk = w.crow[row]; chunk < w.crow[row + 1]; chunk += kChunk) {
            const int64_t last = std::min<int64_t>(chunk + kChunk, w.crow[row + 1]);
            __m256 sums[kSums] = {};
            const auto product = [&](int64_t i, __m256& sum) __attribute__((always_inline)) ENGINE_AVX2 {
                const float* x = block.xt + clamp(w.columns[i]) * kMostRows;
                sum = _mm256_fmadd_ps(_mm256_set1_ps(to_float(w.values[i])), _mm256_loadu_ps(x), sum);
            };
            int64_t i = chunk;
            for (; i + kSums <= last; i += kSums) {
#pragma GCC unroll 4
                for (int s = 0; s < kSums; ++s) product(i + s, sums[s]);
            }
            for (; i < last; ++i) product(i, sums[0]);
            const __m256 two = _mm256_add_ps(sums[0], sums[1]);
            total = _mm256_add_ps(total, _mm256_add_ps(two, _mm256_add_ps(sums[2], sums[3])));
        }
        alignas(32) float all[kMostRows];
        _mm256_store_ps(all, total);
        write_output(w, block, row, all);
    }
    return clamp.inside();
}

// Eight products of values with a single row of x, gathered, on top of `sum`.
ENGINE_AVX2 ENGINE_INLINE __m256 gather_8_avx2(__m256 values, __m256i columns,
                                               __m256i last,    // column
                                               const float* x,  // [k]
                                               __m256 sum, __m256i& outside) {
    const __m256i clamped = _mm256_min_epu32(columns, last);
    outside = _mm256_or_si256(outside, _mm256_xor_si256(columns, clamped));
    return _mm256_fmadd_ps(values, _mm256_i32gather_ps(x, clamped, 4), sum);
}
// Eight columns as int32; what the upper halves of wider ones hold is added to `outside`.
ENGINE_AVX2 ENGINE_INLINE __m256i load_8_columns_avx2(const int32_t* columns, __m256i& /*outside*/) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
}
ENGINE_AVX2 ENGINE_INLINE __m256i load_8_columns_avx2(const int64_t* columns, __m256i& outside) {
    const __m256 first = _mm256_loadu_ps(reinterpret_cast<const float*>(columns));
    const __m256 second = _mm256_loadu_ps(reinterpret_cast<const float*>(columns + 4));
    outside = _mm256_or_si256(outside, _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)));
    return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), 0xd8);
}

// The first `count` of 8 values or columns, then zeros; `mask` has the sign bit set in as many lanes.
ENGINE_AVX2 ENGINE_INLINE __m256 load_some_avx2(const float* values, int64_t /*count*/, __m256i mask) {
    return _mm256_maskload_ps(values, mask);
}
template <class V>
ENGINE_AVX2 ENGINE_INLINE __m256 load_some_avx2(const V* values, int64_t count, __m256i /*mask*/) {
    V all[8] = {};
    std::copy(values, values + count, all);
    return load_8_avx2(all);
}
template <class I>
ENGINE_AVX2 ENGINE_INLINE __m256i load_some_columns_avx2(const I* columns, int64_t count, __m256i mask,
                                                         __m256i& outside) {
    if constexpr (sizeof(I) == 4) return _mm256_maskload_epi32(columns, mask);
    I all[8] = {};
    std::copy(columns, columns + count, all);
    return load_8_columns_avx2(all, outside);
}

// As outputs_avx2, for a single row of x of at most 2^31 columns.
template <class V, class I>
ENGINE_AVX2 bool gather_avx2(const Csr<V, I>& w, const Block& block, int64_t begin, int64_t end) {
    const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(w.k - 1));
    __m256i outside = _mm256_setzero_si256();
    for (int64_t row = begin; row < end; ++row) {
        const int64_t last = w.crow[row + 1];
        __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
        int64_t i = w.crow[row];
        for (; i + 16 <= last; i += 16) {
            const __m256i first = load_8_columns_avx2(w.columns + i, outside);
            const __m256i second = load_8_columns_avx2(w.columns + i + 8, outside);
            even = gather_8_avx2(load_8_avx2(w.values + i), first, limit, block.xt, even, outside);
            odd = gather_8_avx2(load_8_avx2(w.values + i + 8), second, limit, block.xt, odd, outside);
        }
        if (i + 8 <= last) {
            const __m256i columns = load_8_columns_avx2(w.columns + i, outside);
            even = gather_8_avx2(load_8_avx2(w.values + i), columns, limit, block.xt, even, outside);
            i += 8;
        }
        if (i < last) {  // the lanes that are left multiply 0 by x[0]
            const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(last - i)), lanes);
            const __m256i columns = load_some_columns_avx2(w.columns + i, last - i, mask, outside);
            const __m256 values = load_some_avx2(w.values + i, last - i, mask);
            odd = gather_8_avx2(values, columns, limit, block.xt, odd, outside);
        }
        const float total = sum_8_avx2(_mm256_add_ps(even, odd));
        write_output(w, block, row, &total);
    }
    return _mm256_testz_si256(outside, outside) != 0;
}
#endif

template <int kRows, class V, class I>
Outputs<V, I> outputs_kernel([[maybe_unused]] int64_t k) {
#if ENGINE_X86
    if (isa() != Isa::portable) {
        if constexpr (kRows > 1) return outputs_avx2<V, I>;
        if (kRows == 1 && k <= int64_t{1} << 31) return gather_avx2<V, I>;
    }
#endif
    return outputs_portable<kRows, V, I>;
}

// Columns [begin, end) of `rows` rows of x as fp32, transposed. Returns the rows that hold what is not finite, as bits.
template <int kRows, class T>
ENGINE_INLINE uint32_t transpose(const T* x,  // [rows, k]
                                 int64_t rows, int64_t begin, int64_t end, int64_t k,
                                 float* xt) {  // [k, kRows]
    constexpr int64_t kTile = 64;              // columns turned to fp32 at once
    uint32_t bad = 0;
    for (int64_t i = begin; i < end; i += kTile) {
        const int64_t count = std::min(kTile, end - i);
        for (int64_t m = 0; m < kRows; ++m) {
            float tile[kTile] = {};
            uint32_t special = 0;
            for (int64_t j = 0; m < rows && j < count; ++j) {
                tile[j] = to_float(x[m * k + i + j]);
                special |= (std::bit_cast<uint32_t>(tile[j]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
            }
            bad |= special << m;
            for (int64_t j = 0; j < count; ++j) xt[(i + j) * kRows + m] = tile[j];
        }
    }
    return bad;
}

// Up to kRows rows of x from x on. False where a column lay outside.
template <int kRows, class T, class V, class I>
bool some_rows(const Csr<V, I>& w,
               const T* x,  // [rows, k]
               int64_t rows,
               float* y,     // [rows, n]
               float* xt) {  // [k, kRows], scratch
    std::atomic<uint32_t> bad{0};
    auto* const turn = compiled_to_avx2<transpose<kRows, T>>();
    parallel_rows(w.k, kRows * static_cast<int64_t>(sizeof(float)), [&](int64_t begin, int64_t end) {
        bad.fetch_or(turn(x, rows, begin, end, w.k, xt), std::memory_order_relaxed);
    });

    const Block block{xt, bad.load(), rows, y};
    const Outputs<V, I> kernel = outputs_kernel<kRows, V, I>(w.k);
    std::atomic<bool> inside{true};
    const int64_t bytes = w.crow[w.n] * static_cast<int64_t>(sizeof(V) + sizeof(I)) / std::max<int64_t>(1, w.n);
    parallel_rows(w.n, (bytes + 1) * (kRows == 1 ? 1 : 2), [&](int64_t begin, int64_t end) {
        if (!kernel(w, block, begin, end)) inside.store(false, std::memory_order_relaxed);
    });
    return inside.load();
}

struct CsrScratch;  // tag: x transposed and results as fp32, held by the calling thread

template <class T, class V, class I>
void linear(const FloatLinear<T>& call, const Csr<V, I>& w) {
    constexpr int64_t kLongestStrip = 128 << 10;  // of K: longer ones would take more than 8 MB a thread
    const auto [x, scale, bias, y, m, n, k] = call;
    bool inside = true;
    if (m > kMostRows && k <= kLongestStrip) {
        inside = csr_spmm(call, w);
    } else {
        const int64_t turned = k * (m == 1 ? 1 : kMostRows), results = sizeof(T) == 4 ? 0 : n * kMostRows;
        using Own = Scratch<CsrScratch>;
        Own scratch(Own::bytes_for<float>(turned) + Own::bytes_for<float>(results));
        float* const xt = scratch.take<float>(turned);
        float* as_float = scratch.take<float>(results);
        for (int64_t first = 0; first < m; first += kMostRows) {
            const T* from = x + first * k;
            T* to = y + first * n;
            const int64_t rows = std::min<int64_t>(kMostRows, m - first);
            if constexpr (sizeof(T) == 4) as_float = to;
            inside &=
                m == 1 ? some_rows<1>(w, from, 1, as_float, xt) : some_rows<kMostRows>(w, from, rows, as_float, xt);
            if constexpr (sizeof(T) != 4) {
                const FromFloats<T> convert = from_floats<T>();
                parallel_rows(rows * n, sizeof(float) + sizeof(T),
                              [&](int64_t begin, int64_t end) { convert(as_float + begin, end - begin, to + begin); });
            }
        }
    }
    STD_TORCH_CHECK(inside, "csr_linear: col_indices: expected columns in [0, ", k, ")");
}

// Throws unless the offsets rise from 0 to nnz.
template <class I>
void check_offsets(const I* crow,  // [n + 1]
                   int64_t n, int64_t nnz) {
    bool rises = crow[0] == 0 && crow[n] == nnz;
    for (int64_t row = 0; row < n; ++row) rises &= crow[row] <= crow[row + 1];
    STD_TORCH_CHECK(rises, "csr_linear: crow_indices: expected offsets rising from 0 to ", nnz);
}

Tensor csr_linear(Tensor x, Tensor crow_in, Tensor columns_in, Tensor values_in, std::optional<Tensor> bias) {
    constexpr auto op = "csr_linear";
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x: expected shape [..., K]");
    STD_TORCH_CHECK(crow_in.dim() == 1 && crow_in.numel() > 0, op, ": crow_indices: expected shape [N + 1]");
    STD_TORCH_CHECK(values_in.dim() == 1 && columns_in.dim() == 1 && columns_in.size(0) == values_in.size(0), op,
                    ": col_indices, values: expected shape [nnz]");
    const ScalarType index = crow_in.scalar_type();
    STD_TORCH_CHECK((index == ScalarType::Int || index == ScalarType::Long) && columns_in.scalar_type() == index, op,
                    ": crow_indices, col_indices: expected both int32 or both int64");
    const Tensor crow = as_contiguous(crow_in), columns = as_contiguous(columns_in), values = as_contiguous(values_in);
    const int64_t n = crow.size(0) - 1, nnz = values.size(0);
    STD_TORCH_CHECK(x.size(-1) > 0 || nnz == 0, op, ": col_indices: expected none, as x has no columns");
    return float_linear_output(op, x, n, nullptr, bias, [&](const auto& call) {
        dispatch_float(values.scalar_type(), "csr_linear: values", [&](auto zero) {
            const auto run = [&](auto index_zero) {
                using V = decltype(zero);
                using I = decltype(index_zero);
                check_offsets(data<I>(crow), n, nnz);
                const Csr<V, I> w{data<I>(crow), data<I>(columns), data<V>(values), call.bias, n, call.k};
                linear(call, w);
            };
            index == ScalarType::Int ? run(int32_t{}) : run(int64_t{});
        });
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("csr_linear", TORCH_BOX(&engine::csr_linear)); }
