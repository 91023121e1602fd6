// What the kernel of a linear op is told, and its last step: sums to outputs.
#pragma once

#include <cstdint>
#include <optional>

#include "common/half.h"
#include "common/patches.h"
#include "common/tensor.h"

namespace engine {

// How activations are quantised: dynamically (null: each row by its own maximum), by one static scale, or by one static
// scale for each channel; then the weights hold the channels' scales already, and a row's own scale is 1.
struct InputScale {
    const float* values = nullptr;  // [1] or [k], or null
    bool by_channel = false;
};

inline void check_input_scale(const char* op, const std::optional<Tensor>& input_scale, int64_t k) {
    if (!input_scale) return;
    const bool fits = input_scale->numel() == 1 || (input_scale->dim() == 1 && input_scale->size(0) == k);
    STD_TORCH_CHECK(fits && input_scale->scalar_type() == ScalarType::Float, op,
                    ": input_scale: expected float32, one element or [K]");
}

inline InputScale input_scale_of(const std::optional<Tensor>& contiguous) {
    if (!contiguous) return {};
    return {data<float>(*contiguous), contiguous->numel() != 1};
}

// What an int8 linear kernel works on.
template <class T>
struct LinearCall {
    const T* x;  // [m, k], or the image of `patches`
    InputScale input_scale;
    const float* scale;  // [n], of the weights
    const float* bias;   // [n], or null
    T* y;                // [m, n]
    int64_t m, n, k;
    const Patches* patches = nullptr;
};

// The last step of every such kernel, always in this order and in fp32, then cast: (float(acc) · (s_x · s_w)) + bias.
// `column` is the output's number.
template <class T, class Acc>
ENGINE_INLINE T linear_output(Acc acc, float row_scale, const LinearCall<T>& call, int64_t column) {
    float y = static_cast<float>(acc) * (row_scale * call.scale[column]);
    if (call.bias) y = y + call.bias[column];
    return from_float<T>(y);
}

// What a float linear kernel works on: y = (x · weightᵀ) · scale + bias, in fp32 and then cast.
template <class T>
struct FloatLinear {
    const T* x;          // [m, k]
    const float* scale;  // [n], or null: 1
    const float* bias;   // [n], or null: 0
    T* y;                // [m, n]
    int64_t m, n, k;
};

// The last step of every such kernel; `column` is the output's number.
template <class T>
ENGINE_INLINE T float_output(float sum, const FloatLinear<T>& call, int64_t column) {
    if (call.scale) sum = sum * call.scale[column];
    if (call.bias) sum = sum + call.bias[column];
    return from_float<T>(sum);
}

}  // namespace engine
