// x · wᵀ of a 2:4 sparse w by the tensor cores' own sparse product, mma.sp, for int8 and 16-bit floats.
//
// wgmma.sp would be faster on sm_90; mma.sp runs on every card from sm_80 on and skips the same products. w is operand
// A, its canonical values and metadata as they are; x is operand B. A block has 64 rows of w by 128 of x (or 16, where
// x has no more), and steps by 64 B of values a row, which stand for 128 B of w. Copies by cp.async are one step ahead,
// or three where x is small and memory the bound. Bytes: 0.625 (int8) or 1.125 (16-bit) a weight, read once for each
// 128 rows of x. Issue slots of a warp a step, of 32 x 32 outputs: 16 mma.sp, 12 ldmatrix, 4 loads of metadata, 5
// cp.async.
#pragma once

#include <algorithm>

#include "cuda/quantize_rows.cuh"

namespace engine {

// A 2:4 weight [rows, columns], all on the device. Whatever the metadata holds, nothing is read out of bounds.
template <class V>
struct SemiStructured {
    const V* values;          // [rows, row_values]
    const uint8_t* metadata;  // [rows, row_bytes]
    int64_t rows, columns, row_values, row_bytes;
    bool aligned;  // rows of values begin and end on 16 bytes, and those of metadata on a lane's part
};

constexpr int kSemiThreads = 256, kSemiRows = 64;
constexpr uint8_t kAnyPlaces = 0x44;  // metadata beyond a row's end: places that ascend, for values of 0

template <class V>
constexpr int kStepWeights = 128 / sizeof(V);

// Rows of 64 bytes in 4 chunks of 16, swapped so that 8 rows' same chunk lies in 8 different bank groups.
ENGINE_INLINE int value_chunk_at(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) * 16); }

template <class V>
__device__ inline void load_values(uint8_t* tile,  // [kSemiRows, 64]
                                   const SemiStructured<V>& w, int64_t first, int64_t step) {
    static_assert(kSemiRows * 4 == kSemiThreads);
    const int tile_row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    const int64_t row = std::min(first + tile_row, w.rows - 1);  // beyond: computed, and never written
    const int64_t at = step * 64 + chunk * 16, row_size = w.row_values * static_cast<int64_t>(sizeof(V));
    const auto* from = reinterpret_cast<const uint8_t*>(w.values + row * w.row_values) + at;
    uint8_t* to = tile + value_chunk_at(tile_row, chunk);
    if (w.aligned && at + 16 <= row_size) return copy_16_async(to, from);
    for (int i = 0; i < 16; ++i) to[i] = at + i < row_size ? from[i] : uint8_t{0};
}

template <int kTokens>
__device__ inline void load_tokens(uint8_t* tile,  // [kTokens, 128]
                                   const Activations& x, int64_t first, int64_t step) {
    for (int i = threadIdx.x; i < kTokens * 8; i += kSemiThreads) {
        const int64_t row = std::min<int64_t>(first + i / 8, x.m - 1);
        copy_16_async(tile + chunk_at(i / 8, i % 8), x.data + row * x.stride + step * 128 + i % 8 * 16);
    }
}

// `bytes` of a row's metadata from byte `at` on, in the low bytes.
template <class V>
__device__ inline uint32_t metadata_bytes(const SemiStructured<V>& w, int64_t row, int64_t at, int bytes) {
    const uint8_t* from = w.metadata + std::min(row, w.rows - 1) * w.row_bytes + at;
    if (w.aligned && at + bytes <= w.row_bytes) {
        if (bytes == 4) return *reinterpret_cast<const uint32_t*>(from);
        return *reinterpret_cast<const uint16_t*>(from);
    }
    uint32_t result = 0;
    for (int i = 0; i < bytes; ++i)
        result |= static_cast<uint32_t>(at + i < w.row_bytes ? from[i] : kAnyPlaces) << (8 * i);
    return result;
}

// This lane's metadata of rows [row, row + 16) for the product `half` (0 or 1) of a step (ptx.cuh).
template <class V>
__device__ inline uint32_t metadata_of(const SemiStructured<V>& w, int64_t row, int64_t step, int half) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int64_t begin = (step * 2 + half) * (kStepWeights<V> / 16);
    if constexpr (sizeof(V) == 1) return metadata_bytes(w, row + g + t % 2 * 8, begin + t / 2 * 4, 4);
    return metadata_bytes(w, row + g, begin + t % 2 * 2, 2) | metadata_bytes(w, row + g + 8, begin + t % 2 * 2, 2)
                                                                  << 16;
}

// How a tile of kTokens rows of x is shared out among the 8 warps.
template <int kTokens>
struct SemiShape {
    static constexpr int kStages = kTokens > 16 ? 2 : 4;
    static constexpr int kWarpRows = kTokens > 16 ? 32 : 16, kWarpTokens = kTokens > 16 ? 32 : 8;
    static constexpr int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;
    static constexpr int kWarpsAcross = kTokens / kWarpTokens;
    static_assert(kSemiRows / kWarpRows * kWarpsAcross == kSemiThreads / kWarp);
};

// kLong: sums are widened every kExactSpans steps. `poison` [m] is NaN for a row of x that is not finite, else 0; or
// null.
template <int kTokens, bool kLong, class V, class Output>
__global__ void __launch_bounds__(kSemiThreads, kLong ? 1 : 2)
    semi_structured_kernel(SemiStructured<V> w, Activations x, Output output, const float* poison, int64_t tiles_m) {
    using Shape = SemiShape<kTokens>;
    constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles, kStages = Shape::kStages;
    struct alignas(128) Stages {
        uint8_t x[kStages][kTokens * 128], w[kStages][kSemiRows * 64];
    };
    ENGINE_SHARED(tiles, Stages);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t first_m = blockIdx.x % tiles_m * kTokens, first_n = blockIdx.x / tiles_m * kSemiRows;
    const int warp_row = warp / Shape::kWarpsAcross * Shape::kWarpRows;
    const int warp_token = warp % Shape::kWarpsAcross * Shape::kWarpTokens;
    const int64_t steps = (w.columns + kStepWeights<V> - 1) / kStepWeights<V>;

    const auto begin_step = [&](int64_t step) {
        if (step < steps) {
            load_values(tiles.w[step % kStages], w, first_n, step);
            load_tokens<kTokens>(tiles.x[step % kStages], x, first_m, step);
        }
        copy_commit();
    };
    FragmentD<Accumulator<V>> sums[kRowTiles][kTokenTiles] = {};
    Total<V> totals[kLong ? kRowTiles : 1][kLong ? kTokenTiles : 1][4] = {};
    for (int step = 0; step < kStages - 1; ++step) begin_step(step);
    for (int64_t step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();  // this step is there; what the step before has read may be written over
        begin_step(step + kStages - 1);
        const uint8_t *tile_w = tiles.w[step % kStages], *tile_x = tiles.x[step % kStages];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t metadata[kRowTiles];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) metadata[i] = metadata_of(w, first_n + warp_row + i * 16, step, half);
            FragmentA a[kRowTiles];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i)
                load_matrices(a[i].at, tile_w + value_chunk_at(warp_row + i * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
                FragmentB2 b;
                load_matrices(b.at, tile_x + chunk_at(warp_token + j * 8 + lane % 8, 4 * half + lane / 8));
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) multiply_add_sparse(sums[i][j], a[i], metadata[i], b, V{});
            }
        }
        if constexpr (kLong) {
            if ((step + 1) % kExactSpans != 0) continue;
            for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
                auto& sum = sums[i / 4 / kTokenTiles][i / 4 % kTokenTiles].at[i % 4];
                totals[i / 4 / kTokenTiles][i / 4 % kTokenTiles][i % 4] += sum;
                sum = 0;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
        if (i % 4 == 0) __syncwarp();  // so that not the scales and addresses of all outputs are loaded ahead
        const int tile = i / 4 / kTokenTiles, across = i / 4 % kTokenTiles;
        const int64_t n = first_n + warp_row + tile * 16 + lane / 4 + i / 2 % 2 * 8;
        const int64_t m = first_m + warp_token + across * 8 + lane % 4 * 2 + i % 2;
        if (n >= w.rows || m >= x.m) continue;
        Total<V> sum = sums[tile][across].at[i % 4];
        if constexpr (kLong) sum += totals[tile][across][i % 4];
        output(m, n, sum, true, poison == nullptr ? 0.0f : poison[m]);
    }
}

// The host's part.

template <class V>
SemiStructured<V> semi_structured_of(const Tensor& values, const Tensor& metadata, int64_t columns) {
    SemiStructured<V> w{data<V>(values), data<uint8_t>(metadata), values.size(0), columns,
                        values.size(1),  metadata.size(1),        false};
    constexpr int64_t kPart = sizeof(V) == 1 ? 4 : 2;
    w.aligned = w.row_values * static_cast<int64_t>(sizeof(V)) % 16 == 0 && w.row_bytes % kPart == 0 &&
                reinterpret_cast<uintptr_t>(w.values) % 16 == 0 && reinterpret_cast<uintptr_t>(w.metadata) % kPart == 0;
    return w;
}

inline void check_semi_structured(const char* op, const Tensor& values, const Tensor& metadata, int64_t columns) {
    const int64_t groups = columns / 4 + (columns % 4 != 0);
    STD_TORCH_CHECK(columns >= 0 && values.dim() == 2 && values.size(1) == 2 * groups, op,
                    ": values: expected [N, 2 * ceil(K / 4)]");
    STD_TORCH_CHECK(metadata.dim() == 2 && metadata.scalar_type() == ScalarType::Byte &&
                        metadata.size(0) == values.size(0) && metadata.size(1) == (groups + 1) / 2,
                    op, ": metadata: expected uint8 [N, ceil(K / 8)]");
    STD_TORCH_CHECK(metadata.device() == values.device(), op, ": values: expected one device for all tensors");
}

template <int kTokens, bool kLong, class V, class Output>
void launch_semi_structured(const SemiStructured<V>& w, const Activations& x, const Output& output, const float* poison,
                            const char* what, const OnDeviceOf& device) {
    const int64_t tiles_m = (x.m + kTokens - 1) / kTokens;
    launch(semi_structured_kernel<kTokens, kLong, V, Output>, what, tiles_m * ((w.rows + kSemiRows - 1) / kSemiRows),
           kSemiThreads, device, w, x, output, poison, tiles_m);
}

template <class V, class Output>
void multiply_semi_structured(const SemiStructured<V>& w, const Activations& x, const Output& output,
                              const float* poison, const char* what, const OnDeviceOf& device) {
    if (x.m == 0 || w.rows == 0) return;
    constexpr bool kLong = sizeof(V) == 1;  // floats are never widened
    const bool few = x.m <= 16;
    if (kLong && w.columns > kExactSpans * kStepWeights<V>) {
        return few ? launch_semi_structured<16, kLong>(w, x, output, poison, what, device)
                   : launch_semi_structured<128, kLong>(w, x, output, poison, what, device);
    }
    few ? launch_semi_structured<16, false>(w, x, output, poison, what, device)
        : launch_semi_structured<128, false>(w, x, output, poison, what, device);
}

}  // namespace engine
