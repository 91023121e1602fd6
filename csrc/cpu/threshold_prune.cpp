// threshold_prune: zeros in place of small weights. One read, one write, no branch: the loop vectorises by itself.

#include "common/bitmap_mask.h"
#include "common/huge_pages.h"

namespace engine {
namespace {

template <class T>
using PruneSpan = void (*)(const T*, const float*, int64_t, int64_t, T*);

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
ENGINE_INLINE void prune_span(const T* w,               // [n]
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

template <class T>
void span_portable(const T* w, const float* threshold, int64_t step, int64_t n, T* out) {
    prune_span(w, threshold, step, n, out);
}
#if ENGINE_X86
template <class T>
ENGINE_AVX2 void span_avx2(const T* w, const float* threshold, int64_t step, int64_t n, T* out) {
    prune_span(w, threshold, step, n, out);
}
template <class T>
ENGINE_AVX512 void span_avx512(const T* w, const float* threshold, int64_t step, int64_t n, T* out) {
    prune_span(w, threshold, step, n, out);
}
#endif

Tensor threshold_prune(Tensor weight_in, Tensor threshold_in) {
    const Tensor weight = as_contiguous(weight_in);
    Tensor out = new_output(weight, sizes_of(weight), weight.scalar_type());
    // One threshold, or one for each element: a single long row, which threads share as they like.
    const bool matrix = weight.dim() == 2;
    const bool flat = threshold_in.numel() == 1 || !matrix;
    if (!matrix) {
        STD_TORCH_CHECK(threshold_in.numel() == 1 || sizes_of(threshold_in) == sizes_of(weight),
                        "threshold_prune: threshold: expected one element, or the weight's shape");
        STD_TORCH_CHECK(threshold_in.scalar_type() == ScalarType::Float, "threshold_prune: threshold: expected float32");
    }
    const Tensor kept_alive = as_contiguous(threshold_in);
    const ThresholdRows rows =
        flat ? ThresholdRows{kept_alive, data<float>(kept_alive), 0, kept_alive.numel() == 1 ? 0 : 1}
             : threshold_rows("threshold_prune", threshold_in, weight.size(0), weight.size(1));
    STD_TORCH_CHECK(rows.tensor.scalar_type() == ScalarType::Float, "threshold_prune: threshold: expected float32");

    dispatch_float(weight.scalar_type(), "threshold_prune: weight", [&](auto zero) {
        using T = decltype(zero);
        const T* from = data<T>(weight);
        T* to = mutable_data<T>(out);
        PruneSpan<T> kernel = span_portable<T>;
#if ENGINE_X86
        if (isa() == Isa::avx2) kernel = span_avx2<T>;
        if (isa() == Isa::avx512) kernel = span_avx512<T>;
#endif
        if (flat) {
            parallel_rows(weight.numel(), sizeof(T), [&](int64_t begin, int64_t end) {
                kernel(from + begin, rows.data + begin * rows.column_step, rows.column_step, end - begin, to + begin);
            });
        } else {
            const int64_t k = weight.size(1);
            parallel_rows(weight.size(0), k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row) {
                    kernel(from + row * k, rows.data + row * rows.row_step, rows.column_step, k, to + row * k);
                }
            });
        }
    });
    return out;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("threshold_prune", TORCH_BOX(&engine::threshold_prune)); }
