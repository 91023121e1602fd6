// x · wᵀ of a 2:4 sparse w by the sparse product of one warp, mma.sp, for int8 and 16-bit floats: on every card from
// sm_80 on. semi_structured_warpgroup.cuh is faster where it can be used.
//
// w is operand A, its canonical values and metadata as they are; x is operand B. A block has 64 rows of w by 128 of x
// (or 16, where x has no more), and steps by 64 B of values a row, which stand for 128 B of w. Copies by cp.async are
// one step ahead, or five where x is small and memory the bound. Bytes: 0.625 (int8) or 1.125 (16-bit) a weight, read
// once for each 128 rows of x. Issue slots of a warp a step, of 32 x 32 outputs, where rows consist of whole steps: 97
// (sm_90), of which 16 mma.sp, 12 ldmatrix, 4 loads of metadata, 6 cp.async.
#pragma once

#include <algorithm>

#include "common/round.h"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {

// A 2:4 weight [rows, columns], all on the device. Whatever the metadata holds, nothing is read out of bounds.
template <class V>
struct SemiStructured {
    const V* values;          // [rows, row_values]
    const uint8_t* metadata;  // [rows, row_bytes]
    int64_t rows, columns, row_values, row_bytes;
    bool aligned;  // rows of values begin and end on 16 bytes, and those of metadata on a step's part
};

constexpr int kSemiThreads = 256, kSemiRows = 64;
constexpr uint8_t kAnyPlaces = 0x44;  // metadata beyond a row's end: places that ascend, for values of 0

template <class V>
constexpr int kStepWeights = 128 / sizeof(V);
// Bytes of a row's metadata in a step.
template <class V>
constexpr int kStepMetadata = kStepWeights<V> / 8;

// Rows of 64 bytes in 4 chunks of 16, swapped so that 8 rows' same chunk lies in 8 different bank groups.
ENGINE_INLINE int value_chunk_at(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) * 16); }

// A step of a tile in shared memory.
template <class V, int kTokens>
struct SemiStage {
    alignas(128) uint8_t x[kTokens * 128], w[kSemiRows * 64], metadata[kSemiRows * kStepMetadata<V>];
};

// What a thread copies of each step: 16 bytes of values, some chunks of x, and the first threads a row's metadata.
// kWhole: rows of w consist of whole steps, so that nothing is asked of their ends.
template <class V, int kTokens, bool kWhole>
class SemiCopies {
  public:
    __device__ SemiCopies(const SemiStructured<V>& w, const Activations& x, int64_t first_n, int64_t first_m) {
        const int thread = threadIdx.x;
        static_assert(kSemiRows * 4 == kSemiThreads);
        // Rows beyond the last are computed, and never written.
        values_ =
            reinterpret_cast<const uint8_t*>(w.values + std::min(first_n + thread / 4, w.rows - 1) * w.row_values);
        metadata_ = w.metadata + std::min(first_n + thread % kSemiRows, w.rows - 1) * w.row_bytes;
        row_size_ = w.row_values * static_cast<int64_t>(sizeof(V));
        row_bytes_ = w.row_bytes;
        aligned_ = w.aligned;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = i * kSemiThreads + thread;
            x_[i] = x.data + std::min<int64_t>(first_m + at / 8, x.m - 1) * x.stride + at % 8 * 16;
        }
    }
    __device__ void begin(SemiStage<V, kTokens>& stage, int step) const {
        const int thread = threadIdx.x, chunk = thread % 4;
        uint8_t* to = stage.w + value_chunk_at(thread / 4, chunk);
        const int64_t at = static_cast<int64_t>(step) * 64 + chunk * 16;
        if (kWhole || (aligned_ && at + 16 <= row_size_)) {
            copy_16_async(to, values_ + at);
        } else {
            for (int i = 0; i < 16; ++i) to[i] = at + i < row_size_ ? values_[at + i] : uint8_t{0};
        }
        if (thread < kSemiRows) begin_metadata(stage.metadata + thread * kBytes, static_cast<int64_t>(step) * kBytes);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int which = i * kSemiThreads + thread;
            if (which < kTokens * 8)
                copy_16_async(stage.x + chunk_at(which / 8, which % 8), x_[i] + static_cast<int64_t>(step) * 128);
        }
    }

  private:
    static constexpr int kEach = (kTokens * 8 + kSemiThreads - 1) / kSemiThreads, kBytes = kStepMetadata<V>;

    __device__ void begin_metadata(uint8_t* to, int64_t at) const {
        if (kWhole || (aligned_ && at + kBytes <= row_bytes_)) {
            if constexpr (kBytes == 16) {
                copy_16_async(to, metadata_ + at);
            } else {
                copy_8_async(to, metadata_ + at);
            }
        } else {
            for (int i = 0; i < kBytes; ++i) to[i] = at + i < row_bytes_ ? metadata_[at + i] : kAnyPlaces;
        }
    }

    const uint8_t *values_, *metadata_, *x_[kEach];
    int64_t row_size_, row_bytes_;
    bool aligned_;
};

// This lane's metadata of rows [row, row + 16) for both products of a step (ptx.cuh).
template <class V>
__device__ inline uint2 staged_metadata(const uint8_t* metadata, int row) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(V) == 1) {
        const auto* words = reinterpret_cast<const uint32_t*>(metadata + (row + g + t % 2 * 8) * 16) + t / 2;
        return {words[0], words[2]};
    } else {
        const uint2 low = *reinterpret_cast<const uint2*>(metadata + (row + g) * 8);
        const uint2 high = *reinterpret_cast<const uint2*>(metadata + (row + g + 8) * 8);
        const uint32_t which = t % 2 == 0 ? 0x5410 : 0x7632;
        return {byte_permute(low.x, high.x, which), byte_permute(low.y, high.y, which)};
    }
}

// How a tile of kTokens rows of x is shared out among the 8 warps.
template <int kTokens>
struct SemiShape {
    static constexpr int kStages = kTokens > 16 ? 2 : 6;
    static constexpr int kWarpRows = kTokens > 16 ? 32 : 16, kWarpTokens = kTokens > 16 ? 32 : 8;
    static constexpr int kRowTiles = kWarpRows / 16, kTokenTiles = kWarpTokens / 8;
    static constexpr int kWarpsAcross = kTokens / kWarpTokens;
    static_assert(kSemiRows / kWarpRows * kWarpsAcross == kSemiThreads / kWarp);
};

// kLong: sums are widened every kExactSpans steps. `poison` [m] is NaN for a row of x that is not finite, else 0; or
// null.
template <int kTokens, bool kWhole, bool kLong, class V, class Output>
__global__ void __launch_bounds__(kSemiThreads, kLong ? 1 : 2)
    semi_structured_kernel(SemiStructured<V> w, Activations x, Output output, const float* poison, int64_t tiles_m) {
    using Shape = SemiShape<kTokens>;
    constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles, kStages = Shape::kStages;
    ENGINE_SHARED(stages, SemiStage<V, kTokens>[kStages]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t first_m = blockIdx.x % tiles_m * kTokens, first_n = blockIdx.x / tiles_m * kSemiRows;
    const int warp_row = warp / Shape::kWarpsAcross * Shape::kWarpRows;
    const int warp_token = warp % Shape::kWarpsAcross * Shape::kWarpTokens;
    const int steps = static_cast<int>((w.columns + kStepWeights<V> - 1) / kStepWeights<V>);

    const SemiCopies<V, kTokens, kWhole> copies(w, x, first_n, first_m);
    const auto begin_step = [&](int step) {
        if (step < steps) copies.begin(stages[step % kStages], step);
        copy_commit();
    };
    FragmentD<Accumulator<V>> sums[kRowTiles][kTokenTiles] = {};
    Total<V> totals[kLong ? kRowTiles : 1][kLong ? kTokenTiles : 1][4] = {};
    for (int step = 0; step < kStages - 1; ++step) begin_step(step);
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();  // this step is there; what the step before has read may be written over
        begin_step(step + kStages - 1);
        const SemiStage<V, kTokens>& stage = stages[step % kStages];
        uint2 metadata[kRowTiles];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) metadata[i] = staged_metadata<V>(stage.metadata, warp_row + i * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            FragmentA a[kRowTiles];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i)
                load_matrices(a[i].at, stage.w + value_chunk_at(warp_row + i * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
                FragmentB2 b;
                load_matrices(b.at, stage.x + chunk_at(warp_token + j * 8 + lane % 8, 4 * half + lane / 8));
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i)
                    multiply_add_sparse(sums[i][j], a[i], half == 0 ? metadata[i].x : metadata[i].y, b, V{});
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
    constexpr int64_t kPart = kStepMetadata<V>;
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

// Whether rows consist of whole steps, and lie so that they can be copied by 16 bytes.
template <class V>
bool has_whole_steps(const SemiStructured<V>& w) {
    return w.columns > 0 && w.columns % kStepWeights<V> == 0 && reinterpret_cast<uintptr_t>(w.values) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(w.metadata) % kStepMetadata<V> == 0;
}

template <int kTokens, bool kWhole, bool kLong, class V, class Output>
void launch_semi_structured(const SemiStructured<V>& w, const Activations& x, const Output& output, const float* poison,
                            const char* what, const OnDeviceOf& device) {
    const int64_t tiles_m = divide_up(x.m, kTokens);
    launch(semi_structured_kernel<kTokens, kWhole, kLong, V, Output>, what, tiles_m * divide_up(w.rows, kSemiRows),
           kSemiThreads, device, w, x, output, poison, tiles_m);
}

template <class V, class Output>
void multiply_semi_structured_by_warps(const SemiStructured<V>& w, const Activations& x, const Output& output,
                                       const float* poison, const char* what, const OnDeviceOf& device) {
    STD_TORCH_CHECK(w.columns <= int64_t{1} << 36, what, ": more columns than steps can be counted");
    constexpr bool kLong = sizeof(V) == 1;  // floats are never widened
    const bool few = x.m <= 16;
    if (kLong && w.columns > kExactSpans * kStepWeights<V>) {
        return few ? launch_semi_structured<16, false, kLong>(w, x, output, poison, what, device)
                   : launch_semi_structured<128, false, kLong>(w, x, output, poison, what, device);
    }
    if (has_whole_steps(w)) {
        return few ? launch_semi_structured<16, true, false>(w, x, output, poison, what, device)
                   : launch_semi_structured<128, true, false>(w, x, output, poison, what, device);
    }
    few ? launch_semi_structured<16, false, false>(w, x, output, poison, what, device)
        : launch_semi_structured<128, false, false>(w, x, output, poison, what, device);
}

}  // namespace engine::cuda
