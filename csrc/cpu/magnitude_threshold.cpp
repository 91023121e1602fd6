// magnitude_threshold: exact selection of the k-th smallest magnitude by counting.
//
// The bits of a magnitude, sign cleared, order as the numbers do (NaN last). For a tensor of fp32 a first pass counts
// the upper 16 of the 31 bits of all elements; the bin in which the k-th falls fixes them. A second pass counts the
// lower 15 bits of the elements in that bin alone, which for weights is about one in a thousand, so that most of it is
// a vectorised comparison at the speed of memory. Any data is exact: if all elements fall into one bin, the second pass
// counts all. Of a 16-bit tensor one pass counts every pattern.
//
// A row is too short for so many bins: it counts the upper 11 bits, and moves the few elements of the bin together. In
// these, or all of a short row, the rest is found bit by bit.

#include <cmath>
#include <cstring>
#include <mutex>

#include "common/compiled.h"
#include "common/dtype.h"
#include "common/round.h"
#include "common/tensor.h"

namespace engine {
namespace {

constexpr int kLowBits = 15;
constexpr int64_t kHighBins = int64_t{1} << 16, kLowBins = int64_t{1} << kLowBits;
constexpr int64_t kPatterns = int64_t{1} << 15;      // of a 16-bit magnitude
constexpr int64_t kBlock = int64_t{1} << 26;         // elements that a 32-bit counter surely counts
constexpr int64_t kManyElements = int64_t{1} << 21;  // for which four counters a bin are worth clearing and adding
constexpr int kRowShift = 20;
constexpr int64_t kRowBins = int64_t{1} << (31 - kRowShift);
constexpr int64_t kLongRow = int64_t{1} << 18;  // from here on a row is counted as a tensor is, by all threads

// 31 bits that order as the magnitudes do.
ENGINE_INLINE uint32_t key_of(float w) { return std::bit_cast<uint32_t>(w) & 0x7fffffffu; }
template <class T>
ENGINE_INLINE uint32_t key_of(T w) {
    static_assert(sizeof(T) == 2);
    return (w.bits & 0x7fffu) << 16;
}

template <class T>
float magnitude_of(uint32_t key) {
    if constexpr (sizeof(T) == 2) return to_float(T{static_cast<uint16_t>(key >> 16)});
    return std::bit_cast<float>(key);
}

// Elements of one dtype that lie in order.
struct Span {
    ScalarType dtype;
    const void* data;
    int64_t n;
};

// Counts elements into bins. The next four go to bins `lane` apart: where many are equal, and in a pruned weight most
// are 0, a counter that was just stored is slow to load again.
template <class T>
using Count = void (*)(const T* w,  // [n]
                       int64_t n,
                       uint32_t high,     // upper bits of what is to be counted, in the second pass
                       uint32_t* counts,  // [4 * lane], or where lane is 0 all bins once
                       int64_t lane);

// By the upper bits, of which there are 16 for fp32 and all 15 for 16-bit dtypes.
template <class T>
void count_upper(const T* w, int64_t n, uint32_t /*high*/, uint32_t* counts, int64_t lane) {
    constexpr int kShift = sizeof(T) == 2 ? 16 : kLowBits;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        ++counts[key_of(w[i]) >> kShift];
        ++counts[lane + (key_of(w[i + 1]) >> kShift)];
        ++counts[2 * lane + (key_of(w[i + 2]) >> kShift)];
        ++counts[3 * lane + (key_of(w[i + 3]) >> kShift)];
    }
    for (; i < n; ++i) ++counts[key_of(w[i]) >> kShift];
}

ENGINE_INLINE void count_low(const float* w,  // [n]
                             int64_t n, uint32_t high,
                             uint32_t* counts,  // [4 * lane], or [kLowBins]
                             int64_t lane) {
    constexpr int64_t kSpan = 64;
    for (int64_t begin = 0; begin < n; begin += kSpan) {
        const int64_t span = n - begin < kSpan ? n - begin : kSpan;
        uint32_t any = 0;
        for (int64_t i = 0; i < span; ++i) any |= (key_of(w[begin + i]) >> kLowBits) == high;
        if (any == 0) continue;
        for (int64_t i = 0; i < span; ++i) {
            const uint32_t key = key_of(w[begin + i]);
            if (key >> kLowBits == high) ++counts[(i & 3) * lane + (key & (kLowBins - 1))];
        }
    }
}

// Adds the counts of `n` elements to `total`. Each thread counts in memory of its own.
template <class T>
void count(Count<T> kernel, const T* from, int64_t n, uint32_t high, std::vector<uint64_t>& total) {
    // A row stands for 4096 elements, so that a thread's counters are worth clearing and adding.
    constexpr int64_t kRow = 4096;
    std::mutex mutex;
    const int64_t rows = divide_up(n, kRow);
    parallel_rows(rows, kRow * static_cast<int64_t>(sizeof(T)) / 16, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(end * kRow, n), bins = static_cast<int64_t>(total.size());
        const int64_t lane = last - begin * kRow < kManyElements ? 0 : bins;
        std::vector<uint32_t> counts(lane == 0 ? bins : 4 * bins);
        for (int64_t i = begin * kRow; i < last; i += kBlock) {
            std::fill(counts.begin(), counts.end(), 0u);
            kernel(from + i, std::min(kBlock, last - i), high, counts.data(), lane);
            const std::lock_guard lock(mutex);
            for (auto from_lane = counts.begin(); from_lane != counts.end(); from_lane += bins) {
                for (int64_t bin = 0; bin < bins; ++bin) total[bin] += from_lane[bin];
            }
        }
    });
}

// The counts of several spans by the bits of their magnitudes in fp32, whatever their dtypes.
class Counts {
  public:
    explicit Counts(const std::vector<Span>& spans) : spans_(spans) {
        for (const Span& span : spans_) {
            if (span.dtype == ScalarType::Half) count_16(static_cast<const Half*>(span.data), span.n, half_);
            if (span.dtype == ScalarType::BFloat16) {
                count_16(static_cast<const BFloat16*>(span.data), span.n, bfloat16_);
            }
        }
    }
    std::vector<uint64_t> high() const {  // [kHighBins]
        return sum(kHighBins, count_upper<float>, 0, [](uint32_t bits) { return bits >> kLowBits; });
    }
    std::vector<uint64_t> low(uint32_t high) const {  // [kLowBins] of those with these upper bits
        return sum(kLowBins, compiled<count_low>(), high, [=](uint32_t bits) {
            return bits >> kLowBits == high ? bits & (kLowBins - 1) : static_cast<uint32_t>(kLowBins);
        });
    }

  private:
    template <class T>
    static void count_16(const T* from, int64_t n, std::vector<uint64_t>& total) {
        total.resize(kPatterns);
        count(count_upper<T>, from, n, 0, total);
    }

    // Counts fp32 spans by `kernel`, and adds those counted before to the bin that `bin_of` gives them; beyond: none.
    template <class F>
    std::vector<uint64_t> sum(int64_t bins, Count<float> kernel, uint32_t high, const F& bin_of) const {
        std::vector<uint64_t> total(bins);
        for (const Span& span : spans_) {
            if (span.dtype == ScalarType::Float)
                count(kernel, static_cast<const float*>(span.data), span.n, high, total);
        }
        add<Half>(half_, total, bin_of);
        add<BFloat16>(bfloat16_, total, bin_of);
        return total;
    }
    template <class T, class F>
    static void add(const std::vector<uint64_t>& patterns, std::vector<uint64_t>& total, const F& bin_of) {
        for (size_t i = 0; i < patterns.size(); ++i) {
            const size_t bin = bin_of(std::bit_cast<uint32_t>(to_float(T{static_cast<uint16_t>(i)})));
            if (bin < total.size()) total[bin] += patterns[i];
        }
    }

    const std::vector<Span>& spans_;
    std::vector<uint64_t> half_, bfloat16_;  // [kPatterns], or empty
};

// The bin in which the rank-th (from 1) falls; `rank` becomes its rank within the bin.
template <class C>
uint32_t find_bin(const C& counts, uint64_t& rank) {
    uint32_t bin = 0;
    while (rank > counts[bin]) rank -= counts[bin++];
    return bin;
}

// round(sparsity * n), half to even, as Python's.
uint64_t rank_of(double sparsity, int64_t n) {
    return static_cast<uint64_t>(std::nearbyint(sparsity * static_cast<double>(n)));
}

// The rank-th of all elements.
float select(const std::vector<Span>& spans, uint64_t rank) {
    const Counts counts(spans);
    const uint32_t high = find_bin(counts.high(), rank);
    const uint32_t low = find_bin(counts.low(high), rank);
    return std::bit_cast<float>(high << kLowBits | low);
}

float select_all(const std::vector<Span>& spans, double sparsity) {
    int64_t n = 0;
    for (const Span& span : spans) n += span.n;
    const uint64_t rank = rank_of(sparsity, n);
    return rank == 0 ? 0.0f : select(spans, rank);
}

template <class T>
ENGINE_INLINE void row_keys(const T* __restrict w, int64_t k, uint32_t* __restrict keys) {
    for (int64_t i = 0; i < k; ++i) keys[i] = key_of(w[i]);
}

// The rank-th of some keys that may differ in bits [low, high): the largest number below which fewer than `rank` lie, bit
// by bit. It vectorises by itself, and mispredicts nothing.
ENGINE_INLINE uint32_t rank_th(const uint32_t* keys, int64_t count, uint64_t rank, int low, int high) {
    uint32_t found = keys[0] >> high << high;
    for (int bit = high - 1; bit >= low; --bit) {
        const uint32_t next = found | uint32_t{1} << bit;
        uint32_t below = 0;
        for (int64_t i = 0; i < count; ++i) below += keys[i] < next;
        if (below < rank) found = next;
    }
    return found;
}

// Up to so long a row is searched whole, else first counted by its upper bits.
template <class T>
int64_t short_row() {
    return isa() == Isa::portable ? 512 : sizeof(T) == 2 ? 2048 : 1024;
}

// The rank-th key of a row.
template <class T>
uint32_t select_row(const T* w,  // [k]
                    int64_t k, uint64_t rank,
                    uint32_t* counts,  // [2, kRowBins], two, as the same counter twice in a row waits for itself
                    uint32_t* keys) {  // [k + 1]
    constexpr int kLowest = sizeof(T) == 2 ? 16 : 0;
    auto* const among = compiled<rank_th>();
    if (k <= short_row<T>()) {
        compiled<row_keys<T>>()(w, k, keys);
        return among(keys, k, rank, kLowest, 31);
    }
    std::memset(counts, 0, 2 * kRowBins * sizeof(uint32_t));
    int64_t i = 0;
    for (; i + 2 <= k; i += 2) {
        ++counts[key_of(w[i]) >> kRowShift];
        ++counts[kRowBins + (key_of(w[i + 1]) >> kRowShift)];
    }
    if (i < k) ++counts[key_of(w[i]) >> kRowShift];
    for (int64_t bin = 0; bin < kRowBins; ++bin) counts[bin] += counts[kRowBins + bin];
    const uint32_t bin = find_bin(counts, rank);
    int64_t found = 0;
    for (int64_t j = 0; j < k; ++j) {  // written always, counted where it belongs: no branch to mispredict
        const uint32_t key = key_of(w[j]);
        keys[found] = key;
        found += key >> kRowShift == bin;
    }
    return among(keys, found, rank, kLowest, kRowShift);
}

template <class T>
void select_rows(const T* w,  // [rows, k]
                 float* out,  // [rows]
                 int64_t rows, int64_t k, uint64_t rank) {
    if (k >= kLongRow) {
        constexpr ScalarType kDtype = std::is_same_v<T, float>  ? ScalarType::Float
                                      : std::is_same_v<T, Half> ? ScalarType::Half
                                                                : ScalarType::BFloat16;
        for (int64_t row = 0; row < rows; ++row) out[row] = select({{kDtype, w + row * k, k}}, rank);
        return;
    }
    parallel_rows(rows, 8 * k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
        std::vector<uint32_t> counts(2 * kRowBins), keys(k + 1);
        for (int64_t row = begin; row < end; ++row) {
            out[row] = magnitude_of<T>(select_row(w + row * k, k, rank, counts.data(), keys.data()));
        }
    });
}

Tensor rows_threshold(const Tensor& weight, double sparsity) {
    STD_TORCH_CHECK(weight.dim() == 2, "magnitude_threshold: weight: expected shape [N, K]");
    const int64_t rows = weight.size(0), k = weight.size(1);
    Tensor out = new_tensor(weight, {rows, 1}, ScalarType::Float);
    float* to = mutable_data<float>(out);
    const uint64_t rank = rank_of(sparsity, k);
    dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [&](auto zero) {
        if (rank == 0) {
            std::fill(to, to + rows, 0.0f);
        } else {
            select_rows(data<decltype(zero)>(weight), to, rows, k, rank);
        }
    });
    return out;
}

Tensor tensor_threshold(const std::vector<Tensor>& weights, double sparsity) {
    std::vector<Tensor> kept_alive;
    std::vector<Span> spans;
    for (const Tensor& weight : weights) {
        dispatch_float(weight.scalar_type(), "magnitude_threshold: weight", [](auto) {});
        kept_alive.push_back(as_contiguous(weight));
        const Tensor& t = kept_alive.back();
        spans.push_back({t.scalar_type(), t.const_data_ptr(), t.numel()});
    }
    Tensor out = new_tensor(weights[0], {}, ScalarType::Float);
    *mutable_data<float>(out) = select_all(spans, sparsity);
    return out;
}

void check_sparsity(double sparsity) {
    STD_TORCH_CHECK(sparsity >= 0 && sparsity < 1, "magnitude_threshold: sparsity: expected a number in [0, 1)");
}

Tensor magnitude_threshold(Tensor weight, double sparsity, std::string scope) {
    check_sparsity(sparsity);
    STD_TORCH_CHECK(scope == "tensor" || scope == "row", "magnitude_threshold: scope: expected tensor or row");
    if (scope == "row") return rows_threshold(as_contiguous(weight), sparsity);
    return tensor_threshold({weight}, sparsity);
}

Tensor magnitude_threshold_of_list(std::vector<Tensor> weights, double sparsity) {
    check_sparsity(sparsity);
    STD_TORCH_CHECK(!weights.empty(), "magnitude_threshold_of_list: weights: expected at least one");
    return tensor_threshold(weights, sparsity);
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("magnitude_threshold", TORCH_BOX(&engine::magnitude_threshold));
    m.impl("magnitude_threshold_of_list", TORCH_BOX(&engine::magnitude_threshold_of_list));
}
