// magnitude_threshold: exact selection of the k-th smallest magnitude by counting.
//
// A magnitude's fp32 bits, sign cleared, order as the numbers do (NaN last). The first pass counts the upper 16 of the
// 31 bits of all elements; the bin in which the k-th falls fixes them. The second pass counts the lower 15 bits of the
// elements in that bin alone, which for weights is about one in a thousand, so that most of it is a vectorised
// comparison at the speed of memory. Any data is exact: if all elements fall into one bin, the second pass counts all.

#include <cmath>
#include <mutex>

#include "common/dtype.h"
#include "common/tensor.h"

namespace engine {
namespace {

constexpr int kLowBits = 15;
constexpr int64_t kHighBins = int64_t{1} << 16, kLowBins = int64_t{1} << kLowBits;
constexpr int64_t kBlock = int64_t{1} << 26;  // elements that a 32-bit counter surely counts

template <class T>
ENGINE_INLINE uint32_t magnitude_bits(T w) {
    return std::bit_cast<uint32_t>(to_float(w)) & 0x7fffffffu;
}

template <class T>
using Count = void (*)(const T*, int64_t, uint32_t, uint32_t*);

template <class T>
void count_high(const T* w,                  // [n]
                int64_t n, uint32_t /*high*/,  // so that both passes have one signature
                uint32_t* counts) {          // [kHighBins]
    for (int64_t i = 0; i < n; ++i) ++counts[magnitude_bits(w[i]) >> kLowBits];
}

template <class T>
ENGINE_INLINE void count_low(const T* w,  // [n]
                             int64_t n, uint32_t high,
                             uint32_t* counts) {  // [kLowBins]
    constexpr int64_t kSpan = 64;
    for (int64_t begin = 0; begin < n; begin += kSpan) {
        const int64_t span = n - begin < kSpan ? n - begin : kSpan;
        uint32_t any = 0;
        for (int64_t i = 0; i < span; ++i) any |= (magnitude_bits(w[begin + i]) >> kLowBits) == high;
        if (any == 0) continue;
        for (int64_t i = 0; i < span; ++i) {
            const uint32_t bits = magnitude_bits(w[begin + i]);
            if (bits >> kLowBits == high) ++counts[bits & (kLowBins - 1)];
        }
    }
}

template <class T>
void low_portable(const T* w, int64_t n, uint32_t high, uint32_t* counts) {
    count_low(w, n, high, counts);
}
#if ENGINE_X86
template <class T>
ENGINE_AVX2 void low_avx2(const T* w, int64_t n, uint32_t high, uint32_t* counts) {
    count_low(w, n, high, counts);
}
template <class T>
ENGINE_AVX512 void low_avx512(const T* w, int64_t n, uint32_t high, uint32_t* counts) {
    count_low(w, n, high, counts);
}
#endif

template <class T>
Count<T> count_low_kernel() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return low_avx2<T>;
    if (isa() == Isa::avx512) return low_avx512<T>;
#endif
    return low_portable<T>;
}

// Counts of all tensors together. Each thread counts in memory of its own.
std::vector<uint64_t> count_all(const std::vector<Tensor>& weights, bool first_pass, uint32_t high) {
    std::vector<uint64_t> total(first_pass ? kHighBins : kLowBins);
    std::mutex mutex;
    for (const Tensor& weight : weights) {
        dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [&](auto zero) {
            using T = decltype(zero);
            const T* from = data<T>(weight);
            const Count<T> kernel = first_pass ? count_high<T> : count_low_kernel<T>();
            // A row stands for 4096 elements, so that a thread's counters are worth clearing and adding.
            constexpr int64_t kRow = 4096;
            const int64_t n = weight.numel(), rows = (n + kRow - 1) / kRow;
            parallel_rows(rows, kRow * static_cast<int64_t>(sizeof(T)) / 16, [&](int64_t begin, int64_t end) {
                std::vector<uint32_t> counts(total.size());
                for (int64_t i = begin * kRow; i < std::min(end * kRow, n); i += kBlock) {
                    std::fill(counts.begin(), counts.end(), 0u);
                    kernel(from + i, std::min({kBlock, end * kRow - i, n - i}), high, counts.data());
                    const std::lock_guard lock(mutex);
                    for (size_t bin = 0; bin < total.size(); ++bin) total[bin] += counts[bin];
                }
            });
        });
    }
    return total;
}

// The bin in which the rank-th (from 1) falls; `rank` becomes its rank within the bin.
uint32_t find_bin(const std::vector<uint64_t>& counts, uint64_t& rank) {
    uint32_t bin = 0;
    while (rank > counts[bin]) rank -= counts[bin++];
    return bin;
}

// round(sparsity * n), half to even, as Python's.
uint64_t rank_of(double sparsity, int64_t n) {
    return static_cast<uint64_t>(std::nearbyint(sparsity * static_cast<double>(n)));
}

float select(const std::vector<Tensor>& weights, double sparsity) {
    int64_t n = 0;
    for (const Tensor& weight : weights) n += weight.numel();
    uint64_t rank = rank_of(sparsity, n);
    if (rank == 0) return 0.0f;
    const uint32_t high = find_bin(count_all(weights, true, 0), rank);
    const uint32_t low = find_bin(count_all(weights, false, high), rank);
    return std::bit_cast<float>(high << kLowBits | low);
}

template <class T>
void select_rows(const T* w,    // [rows, k]
                 float* out,  // [rows]
                 int64_t begin, int64_t end, int64_t k, uint64_t rank) {
    std::vector<uint32_t> bits(k);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = 0; i < k; ++i) bits[i] = magnitude_bits(w[row * k + i]);
        std::nth_element(bits.begin(), bits.begin() + static_cast<int64_t>(rank - 1), bits.end());
        out[row] = std::bit_cast<float>(bits[rank - 1]);
    }
}

Tensor rows_threshold(const Tensor& weight, double sparsity) {
    STD_TORCH_CHECK(weight.dim() == 2, "magnitude_threshold: weight: expected shape [N, K]");
    const int64_t rows = weight.size(0), k = weight.size(1);
    Tensor out = new_tensor(weight, {rows, 1}, ScalarType::Float);
    float* to = mutable_data<float>(out);
    const uint64_t rank = rank_of(sparsity, k);
    if (rank == 0) {
        std::fill(to, to + rows, 0.0f);
        return out;
    }
    dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [&](auto zero) {
        const auto* from = data<decltype(zero)>(weight);
        parallel_rows(rows, 32 * k, [&](int64_t begin, int64_t end) { select_rows(from, to, begin, end, k, rank); });
    });
    return out;
}

void check_sparsity(double sparsity) {
    STD_TORCH_CHECK(sparsity >= 0 && sparsity < 1, "magnitude_threshold: sparsity: expected a number in [0, 1)");
}

Tensor scalar(const Tensor& like, float value) {
    Tensor out = new_tensor(like, {}, ScalarType::Float);
    *mutable_data<float>(out) = value;
    return out;
}

Tensor magnitude_threshold(Tensor weight_in, double sparsity, std::string scope) {
    check_sparsity(sparsity);
    STD_TORCH_CHECK(scope == "tensor" || scope == "row", "magnitude_threshold: scope: expected tensor or row");
    const Tensor weight = as_contiguous(weight_in);
    if (scope == "row") return rows_threshold(weight, sparsity);
    return scalar(weight, select({weight}, sparsity));
}

Tensor magnitude_threshold_of_list(std::vector<Tensor> weights, double sparsity) {
    check_sparsity(sparsity);
    STD_TORCH_CHECK(!weights.empty(), "magnitude_threshold_of_list: weights: expected at least one");
    for (Tensor& weight : weights) weight = as_contiguous(weight);
    return scalar(weights[0], select(weights, sparsity));
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("magnitude_threshold", TORCH_BOX(&engine::magnitude_threshold));
    m.impl("magnitude_threshold_of_list", TORCH_BOX(&engine::magnitude_threshold_of_list));
}
