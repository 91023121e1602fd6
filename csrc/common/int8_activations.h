// The activations of an int8 linear call: quantised once, row by row, into scratch from which every kernel reads them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/half.h"
#include "common/int8_activations_avx2.h"
#include "common/int8_activations_avx512.h"
#include "common/isa.h"
#include "common/linear_call.h"
#include "common/quantize.h"
#include "common/round.h"
#include "common/scratch.h"
#include "common/tensor.h"

namespace engine {

// The longest stretch of K that kernels sum in int32. No kernel's sums, however it shifts its operands, leave 2^31 in
// it: the largest are of products of 255 · 127. Longer rows are summed stretch by stretch in int64. A multiple of every
// kernel's kDepth.
constexpr int64_t kExactDepth = 32640;

struct ActivationTag;   // the quantised activations of a call, held by the calling thread
struct InverseScratch;  // tag: the reciprocals of its channels' scales
struct ScaledScratch;   // tag: one row divided by them, held by each thread
struct PatchScratch;    // tag: one row put together of an image, held by each thread

constexpr int64_t kActivationBytes = 4 << 20;  // of quantised activations at a time, where a row isn't larger
// Kept whole, with room for scales and sums, as a call would otherwise fault its pages in anew each time: 6,000 of them
// in a forward pass of MiniLM over 1024 tokens, once the heap gives memory back.
using ActivationScratch = Scratch<ActivationTag, kActivationBytes + (256 << 10)>;

// Rows of quantised activations. Q is int8_t, or int16_t for kernels that multiply 16-bit integers.
template <class Q>
struct QuantizedRows {
    Q* q;          // [rows, stride]: k values, then zeros
    float* scale;  // [rows]; NaN for a row that is not finite (its q are 0)
    int64_t* sum;  // [rows]: of int8_t the sum of a row's q; of int16_t that of q[i] q[i + 2], i = 0, 1, 4, 5, ...
    int64_t rows, k, stride;  // stride is a multiple of 64
    Q zero = 0;               // what 0 is written as: -128, of int8_t, where a kernel wants q unsigned

    // Rows a power of two apart share a few sets of the cache and drive each other out. Long rows are spread evenly
    // over the sets, which repeat every 4 KB, by a step of 26 or 38 of its 64 lines: near the golden section.
    static int64_t stride_for(int64_t k) {
        constexpr int64_t kLine = 64 / sizeof(Q), kLines = 4096 / 64;
        int64_t stride = round_up(k, 64);
        const auto spread = [&] { return stride / kLine % kLines == 26 || stride / kLine % kLines == 38; };
        while (stride / kLine >= kLines && !spread()) stride += kLine;
        return stride;
    }
    static int64_t scratch_bytes(int64_t rows, int64_t k) {
        using S = ActivationScratch;
        return S::bytes_for<Q>(rows * stride_for(k)) + S::bytes_for<float>(rows) + S::bytes_for<int64_t>(rows);
    }
    QuantizedRows(ActivationScratch& scratch, int64_t rows, int64_t k)
        : q(scratch.take<Q>(rows * stride_for(k))),
          scale(scratch.take<float>(rows)),
          sum(scratch.take<int64_t>(rows)),
          rows(rows),
          k(k),
          stride(stride_for(k)) {}
};

// What kernels that shift their operands, or use Winograd's identity, have to take away (QuantizedRows::sum).
template <class Q>
ENGINE_INLINE int64_t row_sum(const Q* q,  // [stride]
                              int64_t stride) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < stride; begin += kExactDepth) {
        const int64_t end = std::min(stride, begin + kExactDepth);
        int32_t part = 0;
        if constexpr (sizeof(Q) == 1) {
            for (int64_t i = begin; i < end; ++i) part += q[i];
        } else {
            for (int64_t i = begin; i < end; i += 4) part += q[i] * q[i + 2] + q[i + 1] * q[i + 3];
        }
        sum += part;
    }
    return sum;
}

template <class T>
void scale_row_portable(const T* x, const float* factors, int64_t k, float* scaled) {
    for (int64_t i = 0; i < k; ++i) scaled[i] = to_float(x[i]) * factors[i];
}

template <class Q, class T>
int64_t quantize_row_portable(const T* x, int64_t k, float inverse, Q zero, Q* q, int64_t stride) {
    for (int64_t i = 0; i < k; ++i) q[i] = static_cast<Q>(quantize_to_int(to_float(x[i]), inverse));
    std::fill(q + k, q + stride, Q{0});
    const int64_t sum = row_sum(q, stride);
    shift_row(q, stride, zero);
    return sum;
}

// How this processor quantises a row.
template <class Q, class T>
struct RowKernels {
    template <class X>
    using Quantize = int64_t (*)(const X* x,  // [k]
                                 int64_t k, float inverse,
                                 Q zero,                     // added to every q, once they are summed
                                 Q* q,                       // [stride]: all of it is written
                                 int64_t stride);            // returns QuantizedRows::sum
    uint32_t (*amax)(const T* x, int64_t k) = amax_bits<T>;  // of quantize.h
    Quantize<T> quantize = quantize_row_portable<Q, T>;
    // The same where each channel is multiplied by its own factor first.
    void (*scale)(const T* x, const float* factors, int64_t k, float* scaled) = scale_row_portable<T>;
    Quantize<float> quantize_scaled = quantize_row_portable<Q, float>;

    RowKernels() {
#if ENGINE_X86
        if (isa() == Isa::portable) return;
        amax = amax_bits_avx2<T>;
        quantize = quantize_row_avx2<Q, T>;
        scale = scale_row_avx2<T>;
        quantize_scaled = quantize_row_avx2<Q, float>;
        if constexpr (sizeof(Q) == 1) {
            if (isa() != Isa::avx512) return;
            amax = amax_bits_avx512<T>;
            quantize = quantize_row_avx512<T>;
            quantize_scaled = quantize_row_avx512<float>;
        }
#endif
    }
};

// The reciprocal of each channel's scale; false where one can't be used, as in static_scale: then every row is NaN.
inline bool invert_scales(const float* scales, int64_t k, float* inverses) {
    bool usable = true;
    for (int64_t i = 0; i < k; ++i) {
        const RowScale s = static_scale(scales[i], 0);
        inverses[i] = s.inverse;
        usable = usable && s.finite;
    }
    return usable;
}

// Quantises rows of a call. Made once a call; its threads share it.
template <class Q, class T>
class ActivationQuantizer {
  public:
    using Sum = int64_t (*)(const Q* q,  // [stride]
                            int64_t stride);
    // `sum`: a kernel's own QuantizedRows::sum.
    explicit ActivationQuantizer(const LinearCall<T>& call, Sum sum = nullptr)
        : source_{call.x, call.patches},
          k_(call.k),
          sum_(sum),
          input_scale_(call.input_scale.values),
          inverse_memory_(call.input_scale.by_channel ? call.k * static_cast<int64_t>(sizeof(float)) : 0) {
        if (!call.input_scale.by_channel) return;
        inverses_ = inverse_memory_.template take<float>(k_);
        // What channels were divided by already is 1; by 0 no row can be divided, and all are NaN.
        static constexpr float kOne = 1.0f, kNone = 0.0f;
        input_scale_ = invert_scales(call.input_scale.values, k_, inverses_) ? &kOne : &kNone;
    }

    // The call's rows [first, first + count) to the first of `rows`, on this thread.
    void operator()(int64_t first, int64_t count, const QuantizedRows<Q>& rows) const { part(first, 0, count, rows); }

    // The same on torch's threads, where it is worth it.
    void all(int64_t first, int64_t count, const QuantizedRows<Q>& rows) const {
        parallel_rows(count, k_ * static_cast<int64_t>(sizeof(T) + sizeof(Q)),
                      [&](int64_t begin, int64_t end) { part(first, begin, end, rows); });
    }

  private:
    void part(int64_t first, int64_t begin, int64_t end, const QuantizedRows<Q>& rows) const {
        Scratch<ScaledScratch> scaled_memory(inverses_ ? k_ * static_cast<int64_t>(sizeof(float)) : 0);
        float* scaled = scaled_memory.take<float>(0);
        Scratch<PatchScratch> patch(source_.scratch_bytes(k_));
        T* const together = patch.template take<T>(0);
        for (int64_t row = begin; row < end; ++row) {
            const T* from = source_.row(first + row, k_, together);
            const uint32_t amax = kernels_.amax(from, k_);
            const RowScale s = input_scale_ ? static_scale(*input_scale_, amax) : row_scale(amax);
            Q* q = rows.q + row * rows.stride;
            rows.scale[row] = s.scale;
            if (s.inverse == 0.0f) {
                std::fill(q, q + rows.stride, rows.zero);
                rows.sum[row] = 0;
            } else if (inverses_) {  // the row is in L1 by now: another pass over it costs little
                kernels_.scale(from, inverses_, k_, scaled);
                rows.sum[row] = kernels_.quantize_scaled(scaled, k_, 1.0f, rows.zero, q, rows.stride);
            } else {
                rows.sum[row] = kernels_.quantize(from, k_, s.inverse, rows.zero, q, rows.stride);
            }
            if (sum_) rows.sum[row] = sum_(q, rows.stride);
        }
    }

    RowKernels<Q, T> kernels_;
    ActivationSource<T> source_;
    int64_t k_;
    Sum sum_;
    const float* input_scale_;  // [1], or null: each row by its own maximum
    Scratch<InverseScratch> inverse_memory_;
    float* inverses_ = nullptr;  // [k], or null
};

template <class Q, class T>
void quantize_activations(const LinearCall<T>& call, int64_t first, const QuantizedRows<Q>& rows) {
    ActivationQuantizer<Q, T>(call).all(first, rows.rows, rows);
}

// Whether each thread had better quantise all rows for itself than share them. To read a line that another core has
// just written takes about 25 ns (Zen 4), and so does overwriting it in the next call: three times what it takes to
// quantise its 64 values. Quantising a value takes as long as multiplying it by the weights of 16 outputs.
inline bool quantize_by_thread(int64_t rows, int64_t row_bytes, int64_t n, int64_t threads) {
    constexpr int64_t kMost = 768 << 10;                         // bytes, most of an L2
    return rows * row_bytes <= kMost && 10 * 16 * threads <= n;  // a tenth of the work at most
}

// Calls f(rows, begin, end) for outputs [begin, end) on torch's threads, with all rows of the call quantised. A call of
// a few rows is bound by memory, and where x is large every thread that quantises all of it reads it once more: at
// 16 × 4096 that is 3 to 5 % slower than sharing.
template <class Q, class T, class F>
void with_quantized_rows(const LinearCall<T>& call, int64_t bytes_per_output, const F& f) {
    using Rows = QuantizedRows<Q>;
    const ActivationQuantizer<Q, T> quantize(call);
    constexpr int64_t kFewValues = 32 << 10;
    const bool by_thread =
        call.m * call.k <= kFewValues && quantize_by_thread(call.m, call.k * static_cast<int64_t>(sizeof(Q)), call.n,
                                                            static_cast<int64_t>(torch::stable::get_num_threads()));
    const auto with_own = [&](int64_t begin, int64_t end) {
        ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
        const Rows rows(scratch, call.m, call.k);
        quantize(0, call.m, rows);
        f(rows, begin, end);
    };
    if (by_thread) return parallel_rows(call.n, bytes_per_output, with_own);
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize.all(0, call.m, rows);
    parallel_rows(call.n, bytes_per_output, [&](int64_t begin, int64_t end) { f(rows, begin, end); });
}

}  // namespace engine
