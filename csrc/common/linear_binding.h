// What the bindings of all linear ops do besides checking their weight.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/bias.h"
#include "common/huge_pages.h"
#include "common/linear_call.h"

namespace engine {

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t n) {
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), op, ": bias: expected shape [N]");
}

// y of an int8 linear op with n outputs, written by f(LinearCall). Checks what is not the weight's.
template <class F>
Tensor int8_linear_output(const char* op, LinearInput& input, int64_t n, const Tensor& scale_in,
                          const std::optional<Tensor>& bias, std::optional<Tensor> input_scale, const F& f) {
    STD_TORCH_CHECK(scale_in.dim() == 1 && scale_in.size(0) == n && scale_in.scalar_type() == ScalarType::Float, op,
                    ": scale: expected float32 [N]");
    check_bias(op, bias, n);
    check_input_scale(op, input_scale, input.k);
    const Tensor scale = as_contiguous(scale_in);
    if (input_scale) input_scale = as_contiguous(*input_scale);
    const FloatBias as_float(bias);
    input.sizes.back() = n;
    Tensor y = new_output(input.x, input.sizes, input.x.scalar_type());
    dispatch_float(input.x.scalar_type(), op, [&](auto zero) {
        using T = decltype(zero);
        f(LinearCall<T>{data<T>(input.x), input_scale_of(input_scale), data<float>(scale), as_float.data(),
                        mutable_data<T>(y), input.m, n, input.k, input.where()});
    });
    return y;
}

// The same of a float linear op, by f(FloatLinear).
template <class F>
Tensor float_linear_output(const char* op, const Tensor& x_in, int64_t n, const float* scale,
                           const std::optional<Tensor>& bias, const F& f) {
    check_bias(op, bias, n);
    const Tensor x = as_contiguous(x_in);
    const FloatBias as_float(bias);
    std::vector<int64_t> sizes = sizes_of(x);
    const int64_t k = sizes.back();
    sizes.back() = n;
    Tensor y = new_output(x, sizes, x.scalar_type());
    dispatch_float(x.scalar_type(), op, [&](auto zero) {
        using T = decltype(zero);
        f(FloatLinear<T>{data<T>(x), scale, as_float.data(), mutable_data<T>(y), rows_of(sizes), n, k});
    });
    return y;
}

}  // namespace engine
