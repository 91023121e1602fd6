// prune_to_semi_structured on NVIDIA GPUs: one read of the weight, one write of what is kept, in about 10 instructions
// a weight. The CPU waits for nothing.

#include "common/dtype.h"
#include "common/round.h"
#include "cuda/prune.cuh"

namespace engine::cuda {
namespace {

constexpr int kPairThreads = 256, kPairEach = 4;  // chunks of eight that a thread has, kPairThreads apart

// Of eight weights the four kept, and the places of two groups as a byte of metadata.
template <class T>
struct alignas(sizeof(T) == 2 ? 8 : 16) KeptOfEight {
    T values[4];
};

// Magnitudes are ordered as their bits are; every NaN is the same, above infinity.
template <class T>
__device__ inline uint32_t rank_of_weight(T w) {
    if constexpr (std::is_same_v<T, float>) return std::min(std::bit_cast<uint32_t>(w) & 0x7fffffffu, 0x7f800001u);
    if constexpr (std::is_same_v<T, Half>) return std::min<uint32_t>(w.bits & 0x7fffu, 0x7c01u);
    if constexpr (std::is_same_v<T, BFloat16>) return std::min<uint32_t>(w.bits & 0x7fffu, 0x7f81u);
}

// The two of largest magnitude of w[0 .. 4), in their order: a weight is kept if at most one goes before it; of equal
// ones the first does. So four zeros give places 0 and 1, as a group beyond the row's end should have.
template <class T>
__device__ inline uint32_t keep_two(const T* w, T* kept) {
    uint32_t rank[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rank[i] = rank_of_weight(w[i]);
    const int b10 = rank[1] > rank[0], b20 = rank[2] > rank[0], b30 = rank[3] > rank[0];
    const int b21 = rank[2] > rank[1], b31 = rank[3] > rank[1], b32 = rank[3] > rank[2];
    const bool keep0 = b10 + b20 + b30 < 2, keep1 = b21 + b31 < 1 + b10, keep2 = b32 < b20 + b21;
    const bool keep3 = b30 + b31 + b32 > 1;
    kept[0] = keep0 ? w[0] : keep1 ? w[1] : w[2];
    kept[1] = keep3 ? w[3] : keep2 ? w[2] : w[1];
    return (keep0 ? 0 : keep1 ? 1 : 2) | (keep3 ? 12 : keep2 ? 8 : 4);
}

// Rows of whole chunks: there are no edges.
template <class T>
__global__ void __launch_bounds__(kPairThreads) keep_whole_kernel(const Eight<T>* weight,  // [chunks]
                                                                  KeptOfEight<T>* values,  // [chunks]
                                                                  uint8_t* metadata,       // [chunks]
                                                                  int64_t chunks) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kPairThreads * kPairEach) + threadIdx.x;
    Eight<T> w[kPairEach];
#pragma unroll
    for (int i = 0; i < kPairEach; ++i)
        if (first + i * kPairThreads < chunks) w[i] = weight[first + i * kPairThreads];
#pragma unroll
    for (int i = 0; i < kPairEach; ++i) {
        if (first + i * kPairThreads >= chunks) continue;
        KeptOfEight<T> kept;
        const uint32_t low = keep_two(w[i].at, kept.values), high = keep_two(w[i].at + 4, kept.values + 2);
        values[first + i * kPairThreads] = kept;
        metadata[first + i * kPairThreads] = static_cast<uint8_t>(low | high << 4);
    }
}

// Any rows: eight weights a thread, 0 beyond the row's end.
template <class T>
__global__ void __launch_bounds__(kPairThreads) keep_edges_kernel(const T* weight,    // [rows, columns]
                                                                  T* values,          // [rows, 2 * groups]
                                                                  uint8_t* metadata,  // [rows, row_bytes]
                                                                  int64_t columns, int64_t row_bytes, int64_t bytes) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
    if (at >= bytes) return;
    const int64_t row = at / row_bytes, first = at % row_bytes * 8, groups = columns / 4 + (columns % 4 != 0);
    Eight<T> w{};
    KeptOfEight<T> kept;
    read_eight<false>(w, weight + row * columns, first, columns);
    const uint32_t low = keep_two(w.at, kept.values), high = keep_two(w.at + 4, kept.values + 2);
    metadata[at] = static_cast<uint8_t>(low | high << 4);
    for (int i = 0; i < 4; ++i)
        if (first / 2 + i < 2 * groups) values[row * 2 * groups + first / 2 + i] = kept.values[i];
}

std::tuple<Tensor, Tensor> prune_to_semi_structured(Tensor weight_in) {
    constexpr const char* kOp = "prune_to_semi_structured";
    STD_TORCH_CHECK(weight_in.dim() == 2, kOp, ": weight: expected [N, K]");
    const Tensor weight = as_contiguous(weight_in);
    const int64_t rows = weight.size(0), columns = weight.size(1), groups = columns / 4 + (columns % 4 != 0);
    const int64_t row_bytes = (groups + 1) / 2, bytes = rows * row_bytes;
    Tensor values = new_tensor(weight, {rows, 2 * groups}, weight.scalar_type());
    Tensor metadata = new_tensor(weight, {rows, row_bytes}, ScalarType::Byte);
    dispatch_float(weight.scalar_type(), "prune_to_semi_structured: weight", [&](auto zero) {
        using T = decltype(zero);
        if (bytes == 0) return;
        const OnDeviceOf device(weight);
        if (rows_aligned(weight)) {
            constexpr int64_t kWork = kPairThreads * kPairEach;
            launch(keep_whole_kernel<T>, kOp, divide_up(bytes, kWork), kPairThreads, device,
                   static_cast<const Eight<T>*>(weight.const_data_ptr()),
                   static_cast<KeptOfEight<T>*>(values.mutable_data_ptr()), mutable_data<uint8_t>(metadata), bytes);
        } else {
            launch(keep_edges_kernel<T>, kOp, divide_up(bytes, kPairThreads), kPairThreads, device, data<T>(weight),
                   mutable_data<T>(values), mutable_data<uint8_t>(metadata), columns, row_bytes, bytes);
        }
    });
    return {values, metadata};
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("prune_to_semi_structured", TORCH_BOX(&engine::cuda::prune_to_semi_structured));
}
