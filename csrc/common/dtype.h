// Which of the three float types of weights and activations a tensor holds.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/half.h"

namespace engine {

// Calls f with a value of the C++ type for `dtype`; `what` begins the error message ("int8_quantize: x").
template <class F>
auto dispatch_float(torch::headeronly::ScalarType dtype, const char* what, F&& f) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
        case ScalarType::Float:
            return f(float{});
        case ScalarType::Half:
            return f(Half{});
        case ScalarType::BFloat16:
            return f(BFloat16{});
        default:
            STD_TORCH_CHECK(false, what, ": expected float32, float16 or bfloat16");
    }
}

}  // namespace engine
