// x as bitmap_tile.cuh multiplies it: the rows of V of a tile, 128 bytes of each a step, lie as wgmma reads them from
// shared memory, so that one copy of a stretch of memory brings a step of a whole tile.
//
// The order of the summed dimension is that in which a lane spreads w: of each 256 bytes of a row, word 16 t + 8 j + i
// becomes word 4 i + t of step j: a lane t of a quad has 64 bytes of w one after another.
#pragma once

#include "common/round.h"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {

constexpr int kStepsAStretch = 2, kStretchBytes = 256;

// At least one, so that no kernel need care for none.
template <class V>
ENGINE_INLINE int64_t stretches_of(int64_t columns) {
    constexpr int64_t kWeights = kStretchBytes / sizeof(V);
    return columns == 0 ? 1 : (columns + kWeights - 1) / kWeights;
}

// Elements [first, first + kCount) of a row of k; zeros beyond it. `vectors`: rows begin on kCount elements.
template <int kCount, class T>
struct alignas(kCount * sizeof(T)) Elements {
    T at[kCount];
};
template <int kCount, class T>
__device__ inline Elements<kCount, T> elements_at(const T* row, int64_t first, int64_t k, bool vectors) {
    if (vectors && first + kCount <= k) return *reinterpret_cast<const Elements<kCount, T>*>(row + first);
    Elements<kCount, T> elements{};
    for (int i = 0; i < kCount; ++i)
        if (first + i < k) elements.at[i] = row[first + i];
    return elements;
}

// Four bytes of V made of x.
template <class V, class T>
__device__ inline uint32_t arranged_word(const T* row, int64_t word, int64_t k, float inverse, const float* channels,
                                         bool vectors) {
    constexpr int kCount = 4 / sizeof(V);
    const int64_t first = word * kCount;
    const auto elements = elements_at<kCount>(row, first, k, vectors);
    if constexpr (sizeof(V) == 2) {
        return std::bit_cast<uint32_t>(elements);
    } else {
        uint32_t bytes = 0;
        for (int i = 0; i < kCount; ++i) {
            const bool zero = first + i >= k || inverse == 0.0f;
            const float by = zero || channels == nullptr ? inverse : 1.0f / channels[first + i];
            const int8_t q = zero ? int8_t{0} : quantize_one(to_float(elements.at[i]), by);
            bytes |= static_cast<uint32_t>(static_cast<uint8_t>(q)) << (8 * i);
        }
        return bytes;
    }
}

// `factor` [m] becomes the scale of each row where V is int8; else 0, or NaN for a row that is not finite. A block has
// a row.
template <class V, class T>
__global__ void __launch_bounds__(kRowThreads)
    arrange_kernel(const T* x,                // [m, k]
                   const float* input_scale,  // [1], or null: by row
                   const float* channels,     // [k], or null
                   uint8_t* to,               // [tiles, steps, tokens, 128]
                   float* factor, int64_t k, int64_t steps, int tokens, bool vectors) {
    const int64_t row = blockIdx.x;
    const T* from = x + row * k;
    uint32_t amax = 0;
    for (int64_t i = threadIdx.x * 4; i < k; i += kRowThreads * 4) {
        const auto four = elements_at<4>(from, i, k, vectors);
        for (int j = 0; j < 4; ++j) amax = std::max(amax, std::bit_cast<uint32_t>(to_float(four.at[j])) & 0x7fffffffu);
    }
    amax = amax_of_threads(amax, channels, k);
    RowScale s = row_scale(amax);
    if constexpr (sizeof(V) == 1) {
        if (input_scale != nullptr) s = static_scale(*input_scale, amax);
        if (channels != nullptr) s = static_scale(1.0f, amax);
        if (threadIdx.x == 0) factor[row] = s.scale;
    } else {
        if (threadIdx.x == 0) factor[row] = s.finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    uint8_t* tile = to + row / tokens * steps * tokens * 128;
    const int line = static_cast<int>(row % tokens);
    for (int64_t i = threadIdx.x; i < steps * 8; i += kRowThreads) {
        uint32_t words[4];
#pragma unroll
        for (int t = 0; t < 4; ++t)
            words[t] = arranged_word<V>(from, i / 16 * 64 + 16 * t + i % 16, k, s.inverse, channels, vectors);
        auto* chunk = tile + i / 8 * tokens * 128 + chunk_at(line, static_cast<int>(i % 8));
        *reinterpret_cast<uint4*>(chunk) = {words[0], words[1], words[2], words[3]};
    }
}

// How many rows of x a tile has.
inline int tile_tokens(int64_t m) { return m <= 64 ? 64 : m <= 128 ? 128 : 256; }

// x arranged in tiles. What lies beyond its rows in the last tile is anything.
template <class V>
struct ArrangedRows {
    int tokens;
    int64_t m, steps, tiles;
    Tensor memory, factor_memory;
    const uint8_t* data;  // [tiles, steps, tokens, 128]
    const float* factor;  // [m]: the scales of int8; else 0, or NaN for a row that is not finite

    // `input_scale` contiguous: one, one for each channel, or none: by row.
    ArrangedRows(const Tensor& x, Rows rows, const std::optional<Tensor>& input_scale, const char* what,
                 const OnDeviceOf& device)
        : tokens(tile_tokens(rows.m)),
          m(rows.m),
          steps(stretches_of<V>(rows.k) * kStepsAStretch),
          tiles(divide_up(rows.m, tokens)),
          memory(new_tensor(x, {tiles, steps, tokens, 128}, ScalarType::Byte)),
          factor_memory(new_tensor(x, {rows.m}, ScalarType::Float)),
          data(engine::data<uint8_t>(memory)),
          factor(engine::data<float>(factor_memory)) {
        const float* given = input_scale ? engine::data<float>(*input_scale) : nullptr;
        const bool by_channel = input_scale && input_scale->numel() != 1;
        const float *one = by_channel ? nullptr : given, *channels = by_channel ? given : nullptr;
        const auto start = [&](auto zero) {
            using T = decltype(zero);
            const T* from = engine::data<T>(x);
            const bool vectors = rows.k % 4 == 0 && reinterpret_cast<uintptr_t>(from) % (4 * sizeof(T)) == 0;
            launch(arrange_kernel<V, T>, what, rows.m, kRowThreads, device, from, one, channels,
                   mutable_data<uint8_t>(memory), mutable_data<float>(factor_memory), rows.k, steps, tokens, vectors);
        };
        if constexpr (sizeof(V) == 1) {
            dispatch_float(x.scalar_type(), what, start);
        } else {
            start(V{});
        }
    }
};

}  // namespace engine::cuda
