// What the linear kernels do to x before the product: rows as int8, or as padded floats, and which rows are finite.
// A block has a row: 2 reads of x (the second from L1 or L2) and one write, small beside the weight.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/quantize.h"
#include "cuda/product.cuh"

namespace engine {

struct Rows {
    int64_t m, k;
};

inline Rows rows_of(const Tensor& x) {
    int64_t m = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
    return {m, x.size(-1)};
}
inline std::vector<int64_t> output_sizes(const Tensor& x, int64_t n) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = n;
    return sizes;
}
inline std::optional<Tensor> contiguous_bias(const std::optional<Tensor>& bias, const char* what) {
    if (!bias) return std::nullopt;
    dispatch_float(bias->scalar_type(), what, [](auto) {});
    return as_contiguous(*bias);
}
inline AnyFloat any_float(const std::optional<Tensor>& t) {
    if (!t) return {nullptr, ScalarType::Float};
    return {const_cast<void*>(t->const_data_ptr()), t->scalar_type()};
}

// Of an int8 linear's arguments those that don't belong to a format.
inline void check_scales(const char* op, const Tensor& x, const Tensor& values, const Tensor& scale,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale) {
    const int64_t n = scale.dim() == 1 ? scale.size(0) : -1;
    STD_TORCH_CHECK(n >= 0 && scale.scalar_type() == ScalarType::Float, op, ": scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), op, ": bias: expected [N]");
    const auto fits = [&] {
        return input_scale->numel() == 1 || (input_scale->dim() == 1 && input_scale->size(0) == x.size(-1));
    };
    STD_TORCH_CHECK(!input_scale || (input_scale->scalar_type() == ScalarType::Float && fits()), op,
                    ": input_scale: expected float32, one element or [K]");
    STD_TORCH_CHECK(values.device() == x.device() && scale.device() == x.device() &&
                        (!bias || bias->device() == x.device()) &&
                        (!input_scale || input_scale->device() == x.device()),
                    op, ": x: expected one device for all tensors");
}

constexpr int kRowThreads = 256;

// The largest |x| of a row, as bits (quantize.h), for all threads of a block. Where channels have scales, one that
// can't be used counts as an infinity.
template <class T>
__device__ inline uint32_t row_amax(const T* row, int64_t k,
                                    const float* channels = nullptr) {  // [k], or null
    ENGINE_SHARED(warps, uint32_t[kRowThreads / kWarp]);
    uint32_t amax = 0;
    for (int64_t i = threadIdx.x; i < k; i += kRowThreads)
        amax = std::max(amax, std::bit_cast<uint32_t>(to_float(row[i])) & 0x7fffffffu);
    if (channels != nullptr) {
        for (int64_t i = threadIdx.x; i < k; i += kRowThreads)
            if (!static_scale(channels[i], 0).finite) amax = std::max(amax, 0x7f800000u);
    }
    for (unsigned by = 1; by < kWarp; by *= 2) amax = std::max(amax, __shfl_xor_sync(kAllLanes, amax, by));
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = amax;
    __syncthreads();
    for (int i = 0; i < kRowThreads / kWarp; ++i) amax = std::max(amax, warps[i]);
    return amax;
}

// Where channels have scales, the weights hold them already, and a row's own scale is 1.
template <class T>
__global__ void __launch_bounds__(kRowThreads) quantize_kernel(const T* x,                // [m, k]
                                                               const float* input_scale,  // [1], or null: by row
                                                               const float* channels,     // [k], or null
                                                               int8_t* q,                 // [m, stride]
                                                               float* scale,              // [m]
                                                               int64_t k, int64_t stride) {
    const int64_t row = blockIdx.x;
    const T* from = x + row * k;
    const uint32_t amax = row_amax(from, k, channels);
    RowScale s = row_scale(amax);
    if (input_scale != nullptr) s = static_scale(*input_scale, amax);
    if (channels != nullptr) s = static_scale(1.0f, amax);
    if (threadIdx.x == 0) scale[row] = s.scale;
    for (int64_t i = threadIdx.x; i < stride; i += kRowThreads) {
        const bool zero = i >= k || s.inverse == 0.0f;
        const float inverse = zero || channels == nullptr ? s.inverse : 1.0f / channels[i];
        q[row * stride + i] = zero ? int8_t{0} : quantize_one(to_float(from[i]), inverse);
    }
}

// Rows of x as int8, zeros up to a multiple of `multiple`, and the scale of each: NaN for a row that is not finite.
struct QuantizedRows {
    Tensor q_memory, scale_memory;
    int8_t* q;     // [m, stride]
    float* scale;  // [m]
    int64_t stride;

    // `input_scale` contiguous: one, one for each channel, or none: by row.
    QuantizedRows(const Tensor& x, Rows rows, const std::optional<Tensor>& input_scale, int64_t multiple,
                  const char* what, const OnDeviceOf& device)
        : q_memory(new_tensor(x, {rows.m, (rows.k + multiple - 1) / multiple * multiple}, ScalarType::Char)),
          scale_memory(new_tensor(x, {rows.m}, ScalarType::Float)),
          q(mutable_data<int8_t>(q_memory)),
          scale(mutable_data<float>(scale_memory)),
          stride(q_memory.size(1)) {
        const float* given = input_scale ? data<float>(*input_scale) : nullptr;
        const bool by_channel = input_scale && input_scale->numel() != 1;
        const float *one = by_channel ? nullptr : given, *channels = by_channel ? given : nullptr;
        dispatch_float(x.scalar_type(), what, [&](auto zero) {
            using T = decltype(zero);
            launch(quantize_kernel<T>, what, rows.m, kRowThreads, device, data<T>(x), one, channels, q, scale, rows.k,
                   stride);
        });
    }
};

// `padded` [m, stride] becomes x and zeros, where it is not null; `poison` [m] NaN where a row is not finite, else 0.
template <class T, class To>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(const T* x,  // [m, k]
                                                           To* padded, float* poison, int64_t k, int64_t stride) {
    const int64_t row = blockIdx.x;
    const T* from = x + row * k;
    const uint32_t amax = row_amax(from, k);
    if (threadIdx.x == 0) poison[row] = amax < 0x7f800000u ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (padded == nullptr) return;
    for (int64_t i = threadIdx.x; i < stride; i += kRowThreads) {
        if constexpr (std::is_same_v<T, To>) {
            padded[row * stride + i] = i < k ? from[i] : T{};
        } else {
            padded[row * stride + i] = i < k ? to_float(from[i]) : 0.0f;
        }
    }
}

// x as a kernel takes it: `To` rows with zeros up to a multiple of `multiple`, itself where it is so, and the poison.
template <class To>
struct PreparedRows {
    std::optional<Tensor> memory, poison_memory;
    const To* x;
    float* poison = nullptr;
    int64_t stride;

    template <class T>
    PreparedRows(const Tensor& from, T, Rows rows, int64_t multiple, bool wants_poison, const char* what,
                 const OnDeviceOf& device)
        : x(static_cast<const To*>(from.const_data_ptr())), stride((rows.k + multiple - 1) / multiple * multiple) {
        const bool as_is = std::is_same_v<T, To> && rows.k == stride && reinterpret_cast<uintptr_t>(x) % 16 == 0;
        if (as_is && !wants_poison) return;
        To* padded = nullptr;
        if (!as_is) {
            memory = new_tensor(from, {rows.m, stride}, std::is_same_v<T, To> ? from.scalar_type() : ScalarType::Float);
            x = padded = mutable_data<To>(*memory);
        }
        poison_memory = new_tensor(from, {rows.m}, ScalarType::Float);
        poison = mutable_data<float>(*poison_memory);
        launch(rows_kernel<T, To>, what, rows.m, kRowThreads, device, data<T>(from), padded, poison, rows.k, stride);
    }
};

}  // namespace engine
