// threshold_prune: zeros in place of small weights. One read, one write, no branch: the loop vectorises by itself.

#include "common/compiled.h"
#include "common/dtype.h"
#include "common/huge_pages.h"

namespace engine {
namespace {

// Elements move as bits, so that a kept NaN keeps its payload.
template <bool kSameThreshold, class T>
ENGINE_INLINE void prune_loop(const T* w, const float* threshold, int64_t n, T* out) {
    for (int64_t i = 0; i < n; ++i) {
        const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(to_float(w[i])) & 0x7fffffffu);
        const bool pruned = magnitude <= threshold[kSameThreshold ? 0 : i];
        if constexpr (sizeof(T) == 2) {
            out[i].bits = pruned ? uint16_t{0} : w[i].bits;
        } else {
            out[i] = pruned ? 0.0f : w[i];
        }
    }
}

template <class T>
ENGINE_INLINE void prune_span(const T* w,              // [n]
                              const float* threshold,  // [n] where `step` is 1, [1] where it is 0
                              int64_t step, int64_t n,
                              T* out) {  // [n]
    if (step == 0) {
        const float one = threshold[0];  // a local can't alias `out`
        prune_loop<true>(w, &one, n, out);
    } else {
        prune_loop<false>(w, threshold, n, out);
    }
}

// A threshold that broadcasts against a weight of any shape, as rows as long as they can be within which it either
// stays the same or goes on element by element.
struct Spans {
    Tensor threshold;            // keeps the memory
    std::vector<int64_t> sizes;  // of the dimensions that number the rows
    std::vector<int64_t> steps;  // of the threshold along each of them
    int64_t length;              // of a row
    int64_t step;                // of the threshold along a row: 0 or 1

    // Where the threshold of a row begins.
    const float* row(int64_t number) const {
        int64_t offset = 0;
        for (size_t i = sizes.size(); i-- > 0; number /= sizes[i]) offset += number % sizes[i] * steps[i];
        return data<float>(threshold) + offset;
    }
};

Spans spans_of(const Tensor& threshold, const Tensor& weight) {
    const int64_t missing = weight.dim() - threshold.dim();
    STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float, "threshold_prune: threshold: expected float32");
    STD_TORCH_CHECK(missing >= 0, "threshold_prune: threshold: expected no more dimensions than the weight has");
    Spans spans{threshold, {}, {}, 1, 0};
    for (int64_t i = 0; i < weight.dim(); ++i) {
        const int64_t size = weight.size(i), own = i < missing ? 1 : threshold.size(i - missing);
        STD_TORCH_CHECK(own == 1 || own == size,
                        "threshold_prune: threshold: expected a shape that broadcasts against the weight");
        if (size == 1) continue;
        const int64_t step = own == 1 ? 0 : threshold.stride(i - missing);
        if (!spans.sizes.empty() && spans.steps.back() == step * size) {  // goes on as the one before: together one
            spans.sizes.back() *= size;
            spans.steps.back() = step;
        } else {
            spans.sizes.push_back(size);
            spans.steps.push_back(step);
        }
    }
    if (spans.sizes.empty() || weight.numel() == 0) return spans;
    if (spans.steps.back() > 1) return spans_of(torch::stable::contiguous(threshold), weight);
    spans.length = spans.sizes.back();
    spans.step = spans.steps.back();
    spans.sizes.pop_back();
    spans.steps.pop_back();
    return spans;
}

template <class T>
void prune(const T* weight,  // [n]
           const Spans& spans, int64_t n,
           T* out) {  // [n]
    auto* const kernel = compiled<prune_span<T>>();
    if (n == 0) return;
    if (spans.sizes.empty()) {  // a single row, which threads share
        const float* threshold = spans.row(0);
        parallel_rows(n, sizeof(T), [&](int64_t begin, int64_t end) {
            kernel(weight + begin, threshold + begin * spans.step, spans.step, end - begin, out + begin);
        });
        return;
    }
    const int64_t length = spans.length;
    parallel_rows(n / length, length * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            kernel(weight + row * length, spans.row(row), spans.step, length, out + row * length);
        }
    });
}

Tensor threshold_prune(Tensor weight_in, Tensor threshold) {
    const Spans spans = spans_of(threshold, weight_in);
    const Tensor weight = as_contiguous(weight_in);
    Tensor out = new_output(weight, sizes_of(weight), weight.scalar_type());
    dispatch_float(weight.scalar_type(), "threshold_prune: weight", [&](auto zero) {
        using T = decltype(zero);
        prune(data<T>(weight), spans, weight.numel(), mutable_data<T>(out));
    });
    return out;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("threshold_prune", TORCH_BOX(&engine::threshold_prune)); }
