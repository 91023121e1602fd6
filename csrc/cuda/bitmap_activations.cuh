// x as bitmap_tile.cuh multiplies it: rows of V, padded by zeros to whole stretches.
//
// The order of the summed dimension is that in which a lane spreads w: of each 256 bytes of a row, word 16 t + 8 j + i
// becomes word 4 i + t of step j: a lane t of a quad has 64 bytes of w one after another.
#pragma once

#include "cuda/quantize_rows.cuh"

namespace engine {

constexpr int kStepsAStretch = 2, kStretchBytes = 256;

// At least one, so that no kernel need care for none.
template <class V>
ENGINE_INLINE int64_t stretches_of(int64_t columns) {
    constexpr int64_t kWeights = kStretchBytes / sizeof(V);
    return columns == 0 ? 1 : (columns + kWeights - 1) / kWeights;
}

template <int kCount, class T>
struct alignas(kCount * sizeof(T)) Elements {
    T at[kCount];
};
// Elements [first, first + kCount) of a row of k; zeros beyond it.
template <int kCount, class T>
__device__ inline Elements<kCount, T> elements_at(const T* row, int64_t first, int64_t k) {
    Elements<kCount, T> elements{};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (first + i < k) elements.at[i] = row[first + i];
    return elements;
}

// Four bytes of V made of x, of which they are elements [first, first + 4 / sizeof(V)).
template <class V, int kCount, class T>
__device__ inline uint32_t arranged_word(const Elements<kCount, T>& elements, int64_t first, int64_t k, float inverse,
                                         const float* channels) {
    if constexpr (sizeof(V) == 2) {
        return std::bit_cast<uint32_t>(elements);
    } else {
        uint32_t bytes = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float by = channels != nullptr && first + i < k ? 1.0f / channels[first + i] : inverse;
            bytes |= static_cast<uint32_t>(static_cast<uint8_t>(quantize_one(to_float(elements.at[i]), by))) << (8 * i);
        }
        return bytes;
    }
}

constexpr int kArrangeThreads = 512;

// `factor` [m] becomes the scale of each row where V is int8; else 0, or NaN for a row that is not finite. A block has
// a row.
template <class V, class T>
__global__ void __launch_bounds__(kArrangeThreads)
    arrange_kernel(const T* x,                // [m, k]
                   const float* input_scale,  // [1], or null: by row
                   const float* channels,     // [k], or null
                   uint8_t* to,               // [m, stride]
                   float* factor, int64_t k, int64_t stride, bool vectors) {
    ENGINE_SHARED(warps, uint32_t[kArrangeThreads / kWarp]);
    const int64_t row = blockIdx.x;
    const T* from = x + row * k;
    uint32_t amax = 0;
    constexpr int kEach = 16 / sizeof(T);
    if (vectors) {
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < k / kEach; i += kArrangeThreads) {
            const auto elements = reinterpret_cast<const Elements<kEach, T>*>(from)[i];
            for (int j = 0; j < kEach; ++j)
                amax = std::max(amax, std::bit_cast<uint32_t>(to_float(elements.at[j])) & 0x7fffffffu);
        }
    } else {
        for (int64_t i = threadIdx.x; i < k; i += kArrangeThreads)
            amax = std::max(amax, std::bit_cast<uint32_t>(to_float(from[i])) & 0x7fffffffu);
    }
    if (channels != nullptr) {
        for (int64_t i = threadIdx.x; i < k; i += kArrangeThreads)
            if (!static_scale(channels[i], 0).finite) amax = std::max(amax, 0x7f800000u);
    }
    for (unsigned by = 1; by < kWarp; by *= 2) amax = std::max(amax, __shfl_xor_sync(kAllLanes, amax, by));
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = amax;
    __syncthreads();
    for (int i = 0; i < kArrangeThreads / kWarp; ++i) amax = std::max(amax, warps[i]);

    RowScale s = row_scale(amax);
    if constexpr (sizeof(V) == 1) {
        if (input_scale != nullptr) s = static_scale(*input_scale, amax);
        if (channels != nullptr) s = static_scale(1.0f, amax);
        if (threadIdx.x == 0) factor[row] = s.scale;
    } else {
        if (threadIdx.x == 0) factor[row] = s.finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    constexpr int kCount = 4 / sizeof(V);
#pragma unroll 2
    for (int64_t i = threadIdx.x; i < stride / 16; i += kArrangeThreads) {
        const int64_t first = (i / 16 * 64 + i % 16) * kCount, last = first + 48 * kCount;
        Elements<kCount, T> elements[4] = {};
        if (vectors && last + kCount <= k) {
#pragma unroll
            for (int t = 0; t < 4; ++t)
                elements[t] = *reinterpret_cast<const Elements<kCount, T>*>(from + first + 16 * t * kCount);
        } else {
#pragma unroll
            for (int t = 0; t < 4; ++t) elements[t] = elements_at<kCount>(from, first + 16 * t * kCount, k);
        }
        uint32_t words[4] = {};
        if (sizeof(V) == 2 || s.inverse != 0.0f) {
#pragma unroll
            for (int t = 0; t < 4; ++t)
                words[t] = arranged_word<V>(elements[t], first + 16 * t * kCount, k, s.inverse, channels);
        }
        reinterpret_cast<uint4*>(to + row * stride)[i] = {words[0], words[1], words[2], words[3]};
    }
}

template <class V>
struct ArrangedRows {
    int64_t m, stride;
    Tensor memory, factor_memory;
    const uint8_t* data;  // [m, stride]
    const float* factor;  // [m]: the scales of int8; else 0, or NaN for a row that is not finite

    // `input_scale` contiguous: one, one for each channel, or none: by row.
    ArrangedRows(const Tensor& x, Rows rows, const std::optional<Tensor>& input_scale, const char* what,
                 const OnDeviceOf& device)
        : m(rows.m),
          stride(stretches_of<V>(rows.k) * kStretchBytes),
          memory(new_tensor(x, {rows.m, stride}, ScalarType::Byte)),
          factor_memory(new_tensor(x, {rows.m}, ScalarType::Float)),
          data(engine::data<uint8_t>(memory)),
          factor(engine::data<float>(factor_memory)) {
        const float* given = input_scale ? engine::data<float>(*input_scale) : nullptr;
        const bool by_channel = input_scale && input_scale->numel() != 1;
        const float *one = by_channel ? nullptr : given, *channels = by_channel ? given : nullptr;
        const auto start = [&](auto zero) {
            using T = decltype(zero);
            const T* from = engine::data<T>(x);
            const bool vectors = rows.k * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
            launch(arrange_kernel<V, T>, what, rows.m, kArrangeThreads, device, from, one, channels,
                   mutable_data<uint8_t>(memory), mutable_data<float>(factor_memory), rows.k, stride, vectors);
        };
        if constexpr (sizeof(V) == 1) {
            dispatch_float(x.scalar_type(), what, start);
        } else {
            start(V{});
        }
    }
};

}  // namespace engine
