// What every linear kernel shares: its operands, its sums, and the last step of each output.
#pragma once

#include <limits>
#include <type_traits>

#include "common/dtype.h"
#include "cuda/ptx.cuh"

namespace engine::cuda {

template <class V>
using Accumulator = std::conditional_t<sizeof(V) == 1, int32_t, float>;
template <class V>
using Total = std::conditional_t<sizeof(V) == 1, int64_t, float>;

// Sums are widened when they are of so many spans: of int8 2^15 products, which are far below 2^31.
constexpr int64_t kExactSpans = 256;

// x as bytes. Rows begin on 16 bytes and have zeros up to a whole span.
struct Activations {
    const uint8_t* data;  // [m, stride]
    int64_t m, stride;
};

// Rows of 128 bytes in 8 chunks of 16, swapped so that 8 rows' same chunk lies in 8 different bank groups.
ENGINE_INLINE int chunk_at(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) * 16); }

// A float tensor of whichever dtype, where speed is no matter.
struct AnyFloat {
    void* at;  // or null
    ScalarType dtype;
    __device__ float load(int64_t i) const {
        if (dtype == ScalarType::Float) return static_cast<const float*>(at)[i];
        if (dtype == ScalarType::Half) return to_float(static_cast<const Half*>(at)[i]);
        return to_float(static_cast<const BFloat16*>(at)[i]);
    }
    __device__ void store(int64_t i, float value) const {
        if (dtype == ScalarType::Float) {
            static_cast<float*>(at)[i] = value;
        } else if (dtype == ScalarType::Half) {
            static_cast<Half*>(at)[i] = from_float<Half>(value);
        } else {
            static_cast<BFloat16*>(at)[i] = from_float<BFloat16>(value);
        }
    }
};

// How a sum becomes an element of y: by a number of its token and one of its row of w, then the bias, in fp32 and in
// each op's own order, each step rounded.

// float(sum) · (s_x · s_w) + bias.
struct Int8Output {
    AnyFloat y;              // [m, n]
    const float* row_scale;  // [m]
    const float* scale;      // [n]
    AnyFloat bias;           // [n], or null
    int64_t n;
    __device__ float of_token(int64_t token, const float*) const { return row_scale[token]; }
    __device__ float of_out(int64_t out) const { return scale[out]; }
    __device__ static float finish(float sum, float of_token, float of_out) { return sum * (of_token * of_out); }
    __device__ void operator()(int64_t token, int64_t out, int64_t sum, bool fits, float) const {
        float value = finish(static_cast<float>(sum), row_scale[token], scale[out]);
        if (bias.at != nullptr) value = value + bias.load(out);
        y.store(token * n + out, fits ? value : std::numeric_limits<float>::quiet_NaN());
    }
};

// sum + poison + bias: `poison` [m] is NaN for a row of x that is not finite, else 0; or null.
struct FloatOutput {
    AnyFloat y;     // [m, n]
    AnyFloat bias;  // [n], or null
    int64_t n;
    __device__ float of_token(int64_t token, const float* poison) const {
        return poison == nullptr ? 0.0f : poison[token];
    }
    __device__ float of_out(int64_t) const { return 0; }
    __device__ static float finish(float sum, float of_token, float) { return sum + of_token; }
    __device__ void operator()(int64_t token, int64_t out, float sum, bool fits, float poison) const {
        float value = finish(sum, poison, 0);
        if (bias.at != nullptr) value = value + bias.load(out);
        y.store(token * n + out, fits ? value : std::numeric_limits<float>::quiet_NaN());
    }
};

}  // namespace engine::cuda
