// What the linear kernels do to x before the product: rows as int8, or as padded floats, and which rows are finite.
// A block has a row: 2 reads of x (the second from L1 or L2) and one write, small beside the weight. All of it is by 16
// bytes, as for few rows the time is that of a chain of loads.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/quantize.h"
#include "common/round.h"
#include "cuda/product.cuh"

namespace engine::cuda {

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

constexpr int kRowThreads = 512;

// Where the chunks of 16 bytes of a row go.
struct ByRow {
    int64_t stride;
    __device__ int64_t operator()(int64_t row, int64_t chunk) const { return row * stride + chunk * 16; }
};
// As bitmap_decode.cuh loads them: of a stage of 256 bytes, four parts of 64, of which the first chunks come first. In
// memory [stages, 4 chunks of a part, 8 or 16 rows, 4 parts]; rows that there are not are left as they are.
constexpr int kFragmentStage = 256;
struct ByFragment {
    int64_t rows;
    explicit ByFragment(int64_t m) : rows(m <= 8 ? 8 : 16) {}
    __device__ int64_t operator()(int64_t row, int64_t chunk) const {
        return (((chunk / 16 * 4 + chunk % 4) * rows + row) * 4 + chunk % 16 / 4) * 16;
    }
};

// Elements [begin, begin + kCount) of a row, zeros beyond its end. `whole`: 16 bytes can be loaded at once.
template <int kCount, class T>
__device__ inline void load_elements(T (&out)[kCount], const T* row, int64_t k, int64_t begin, bool whole) {
    constexpr int kEach = 16 / sizeof(T);
    if (whole && begin + kCount <= k) {
#pragma unroll
        for (int i = 0; i < kCount / kEach; ++i) {
            const uint4 bytes = reinterpret_cast<const uint4*>(row + begin)[i];
            memcpy(out + i * kEach, &bytes, 16);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) out[i] = begin + i < k ? row[begin + i] : T{};
    }
}
template <class T>
__device__ inline bool whole_chunks(const T* x, int64_t k) {
    return reinterpret_cast<uintptr_t>(x) % 16 == 0 && k * sizeof(T) % 16 == 0;
}

// The largest |x| of a row, as bits (quantize.h), for all threads of a block, of which each has the largest that it
// saw. Where channels have scales, one that can't be used counts as an infinity.
__device__ inline uint32_t amax_of_threads(uint32_t amax, const float* channels, int64_t k) {  // channels [k], or null
    ENGINE_SHARED(warps, uint32_t[kRowThreads / kWarp]);
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
template <class T>
__device__ inline uint32_t row_amax(const T* row, int64_t k, bool whole,
                                    const float* channels = nullptr) {  // [k], or null
    uint32_t amax = 0;
    for (int64_t begin = int64_t{threadIdx.x} * 16; begin < k; begin += kRowThreads * 16) {
        T elements[16];
        load_elements(elements, row, k, begin, whole);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            amax = std::max(amax, std::bit_cast<uint32_t>(to_float(elements[i])) & 0x7fffffffu);
    }
    return amax_of_threads(amax, channels, k);
}

// Where channels have scales, the weights hold them already, and a row's own scale is 1.
template <class T, class Order>
__global__ void __launch_bounds__(kRowThreads, 2) quantize_kernel(const T* x,                // [m, k]
                                                                  const float* input_scale,  // [1], or null: by row
                                                                  const float* channels,     // [k], or null
                                                                  int8_t* q,     // [m, stride], in this order
                                                                  float* scale,  // [m]
                                                                  int64_t k, int64_t stride, Order order) {
    allow_next_kernel();
    const int64_t row = blockIdx.x;
    const T* from = x + row * k;
    const bool whole = whole_chunks(x, k);
    const uint32_t amax = row_amax(from, k, whole, channels);
    RowScale s = row_scale(amax);
    if (input_scale != nullptr) s = static_scale(*input_scale, amax);
    if (channels != nullptr) s = static_scale(1.0f, amax);
    if (threadIdx.x == 0) scale[row] = s.scale;
    for (int64_t chunk = threadIdx.x; chunk < stride / 16; chunk += kRowThreads) {
        uint32_t words[4] = {};
        if (s.inverse != 0.0f && channels == nullptr) {
            T elements[16];
            load_elements(elements, from, k, chunk * 16, whole);
#pragma unroll
            for (int i = 0; i < 16; ++i)
                words[i / 4] |= (quantize_to_int(to_float(elements[i]), s.inverse) & 0xff) << (8 * (i % 4));
        } else if (s.inverse != 0.0f) {
#pragma unroll
            for (int word = 0; word < 4; ++word) {
#pragma unroll 1
                for (int i = 0; i < 4; ++i) {
                    const int64_t column = chunk * 16 + word * 4 + i;
                    if (column >= k) break;
                    words[word] |= (quantize_to_int(to_float(from[column]), 1.0f / channels[column]) & 0xff) << (8 * i);
                }
            }
        }
        const uint4 out{words[0], words[1], words[2], words[3]};
        *reinterpret_cast<uint4*>(q + order(row, chunk)) = out;
    }
}

// Rows of x as int8, zeros up to a multiple of `multiple`, and the scale of each: NaN for a row that is not finite.
struct QuantizedRows {
    Tensor q_memory, scale_memory;
    int8_t* q;     // [m, stride]
    float* scale;  // [m]
    int64_t stride;

    // `input_scale` contiguous: one, one for each channel, or none: by row. `fragments`: in the order of ByFragment.
    QuantizedRows(const Tensor& x, Rows rows, const std::optional<Tensor>& input_scale, int64_t multiple,
                  const char* what, const OnDeviceOf& device, bool fragments = false)
        : q_memory(new_tensor(x, {fragments ? ByFragment(rows.m).rows : rows.m, round_up(rows.k, multiple)},
                              ScalarType::Char)),
          scale_memory(new_tensor(x, {rows.m}, ScalarType::Float)),
          q(mutable_data<int8_t>(q_memory)),
          scale(mutable_data<float>(scale_memory)),
          stride(q_memory.size(1)) {
        const float* given = input_scale ? data<float>(*input_scale) : nullptr;
        const bool by_channel = input_scale && input_scale->numel() != 1;
        const float *one = by_channel ? nullptr : given, *channels = by_channel ? given : nullptr;
        dispatch_float(x.scalar_type(), what, [&](auto zero) {
            using T = decltype(zero);
            const auto start = [&](auto order) {
                launch(quantize_kernel<T, decltype(order)>, what, rows.m, kRowThreads, device, data<T>(x), one,
                       channels, q, scale, rows.k, stride, order);
            };
            if (fragments) return start(ByFragment(rows.m));
            start(ByRow{stride});
        });
    }
};

// `padded` [m, stride], in this order, becomes x and zeros, where it is not null; `poison` [m] NaN where a row is not
// finite, else 0.
template <class T, class To, class Order>
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(const T* x,  // [m, k]
                To* padded, float* poison, int64_t k, int64_t stride, Order order) {
    allow_next_kernel();
    constexpr int kEach = 16 / sizeof(To);
    const int64_t row = blockIdx.x;
    const T* from = x + row * k;
    const bool whole = whole_chunks(x, k);
    const uint32_t amax = row_amax(from, k, whole);
    if (threadIdx.x == 0) poison[row] = amax < 0x7f800000u ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (padded == nullptr) return;
    for (int64_t chunk = threadIdx.x; chunk < stride / kEach; chunk += kRowThreads) {
        T elements[kEach];
        load_elements(elements, from, k, chunk * kEach, whole && kEach * sizeof(T) % 16 == 0);
        To converted[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            if constexpr (std::is_same_v<T, To>) {
                converted[i] = elements[i];
            } else {
                converted[i] = to_float(elements[i]);
            }
        }
        uint4 out;
        memcpy(&out, converted, 16);
        *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(padded) + order(row, chunk)) = out;
    }
}

// x as a kernel takes it: `To` rows with zeros up to a multiple of `multiple`, itself where it is so, and the poison.
template <class To>
struct PreparedRows {
    std::optional<Tensor> memory, poison_memory;
    const To* x;
    float* poison = nullptr;
    int64_t stride;

    // `fragments`: a copy in the order of ByFragment, always with the poison.
    template <class T>
    PreparedRows(const Tensor& from, T, Rows rows, int64_t multiple, bool wants_poison, const char* what,
                 const OnDeviceOf& device, bool fragments = false)
        : x(static_cast<const To*>(from.const_data_ptr())), stride(round_up(rows.k, multiple)) {
        const bool as_is =
            !fragments && std::is_same_v<T, To> && rows.k == stride && reinterpret_cast<uintptr_t>(x) % 16 == 0;
        if (as_is && !wants_poison) return;
        To* padded = nullptr;
        if (!as_is) {
            memory = new_tensor(from, {fragments ? ByFragment(rows.m).rows : rows.m, stride},
                                std::is_same_v<T, To> ? from.scalar_type() : ScalarType::Float);
            x = padded = mutable_data<To>(*memory);
        }
        poison_memory = new_tensor(from, {rows.m}, ScalarType::Float);
        poison = mutable_data<float>(*poison_memory);
        const auto start = [&](auto order) {
            launch(rows_kernel<T, To, decltype(order)>, what, rows.m, kRowThreads, device, data<T>(from), padded,
                   poison, rows.k, stride, order);
        };
        if (fragments) {
            start(ByFragment(rows.m));
        } else {
            start(ByRow{stride * static_cast<int64_t>(sizeof(To))});
        }
    }
};

}  // namespace engine::cuda
