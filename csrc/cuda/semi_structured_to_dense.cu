// semi_structured_to_dense on NVIDIA GPUs: one read of what is kept, one write of the matrix, in about 5 instructions a
// weight. The CPU waits once, at the end, to learn whether the metadata was consistent.

#include "common/dtype.h"
#include "common/round.h"
#include "cuda/semi_structured.cuh"

namespace engine::cuda {
namespace {

constexpr int kSpreadThreads = 256, kSpreadEach = 4;  // bytes of metadata that a thread has, kSpreadThreads apart

// The weights under one byte of metadata: two groups of four.
template <class V, int kCount>
struct alignas(kCount * sizeof(V) < 16 ? kCount * sizeof(V) : 16) SomeOf {
    V at[kCount];
};

// For each half of a byte whether its two places ascend.
constexpr uint32_t kAscend = 1u << 0b0100 | 1u << 0b1000 | 1u << 0b1100 | 1u << 0b1001 | 1u << 0b1101 | 1u << 0b1110;

template <class V>
__device__ inline SomeOf<V, 8> spread_two(const SomeOf<V, 4>& kept, uint32_t places) {
    SomeOf<V, 8> dense;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t half = places >> (i / 4 * 4);
        const V low = kept.at[i / 4 * 2], high = kept.at[i / 4 * 2 + 1];
        dense.at[i] = (half & 3) == i % 4 ? low : (half >> 2 & 3) == i % 4 ? high : V{0};
    }
    return dense;
}

// Rows of whole bytes of metadata: there are no edges.
template <class V>
__global__ void __launch_bounds__(kSpreadThreads) spread_whole_kernel(const SomeOf<V, 4>* values,  // [bytes]
                                                                      const uint8_t* metadata,     // [bytes]
                                                                      SomeOf<V, 8>* dense,         // [bytes]
                                                                      int64_t bytes, volatile uint64_t* bad) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kSpreadThreads * kSpreadEach) + threadIdx.x;
    SomeOf<V, 4> kept[kSpreadEach];
    uint32_t places[kSpreadEach];
#pragma unroll
    for (int i = 0; i < kSpreadEach; ++i) {
        places[i] = 0x44;
        if (first + i * kSpreadThreads >= bytes) continue;
        places[i] = metadata[first + i * kSpreadThreads];
        kept[i] = values[first + i * kSpreadThreads];
    }
#pragma unroll
    for (int i = 0; i < kSpreadEach; ++i) {
        if ((kAscend >> (places[i] & 15) & kAscend >> (places[i] >> 4) & 1) == 0) *bad = 1;
        if (first + i * kSpreadThreads < bytes) dense[first + i * kSpreadThreads] = spread_two(kept[i], places[i]);
    }
}

// Any rows: a byte of metadata a thread.
template <class V>
__global__ void __launch_bounds__(kSpreadThreads)
    spread_edges_kernel(const V* values,          // [rows, 2 * groups]
                        const uint8_t* metadata,  // [rows, ceil(groups / 2)]
                        V* dense,                 // [rows, columns]
                        int64_t columns, int64_t bytes, volatile uint64_t* bad) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kSpreadThreads + threadIdx.x;
    if (at >= bytes) return;
    const int64_t groups = columns / 4 + (columns % 4 != 0), row_bytes = (groups + 1) / 2;
    const int64_t row = at / row_bytes, byte = at % row_bytes, left = columns - 8 * byte;
    const uint32_t places = metadata[at];
    SomeOf<V, 4> kept{};
    bool fits = kAscend >> (places & 15) & kAscend >> (places >> 4) & 1;
    for (int i = 0; i < 4; ++i) {
        if (4 * byte + i >= 2 * groups) {
            fits &= places >> 4 == 0b0100;  // the padding beyond the last group
            continue;
        }
        kept.at[i] = values[row * 2 * groups + 4 * byte + i];
        const auto magnitude = static_cast<V>(sizeof(V) > 1 ? kept.at[i] << 1 : kept.at[i]);  // -0.0 is a zero
        fits &= i / 2 * 4 + (places >> (2 * i) & 3) < left || magnitude == 0;
    }
    if (!fits) *bad = 1;
    const SomeOf<V, 8> spread = spread_two(kept, places);
    for (int i = 0; i < 8 && i < left; ++i) dense[row * columns + 8 * byte + i] = spread.at[i];
}

template <class V>
void spread_all(const Tensor& values, const Tensor& metadata, Tensor& dense) {
    constexpr const char* kOp = "semi_structured_to_dense";
    const OnDeviceOf device(values);
    const int64_t columns = dense.size(1), bytes = metadata.numel();
    const auto* from = static_cast<const V*>(values.const_data_ptr());
    auto* to = static_cast<V*>(dense.mutable_data_ptr());
    const HostWord bad(kOp, device);
    if (columns % 8 == 0 && reinterpret_cast<uintptr_t>(from) % alignof(SomeOf<V, 4>) == 0) {
        launch(spread_whole_kernel<V>, kOp, divide_up(bytes, kSpreadThreads * kSpreadEach), kSpreadThreads, device,
               reinterpret_cast<const SomeOf<V, 4>*>(from), data<uint8_t>(metadata),
               reinterpret_cast<SomeOf<V, 8>*>(to), bytes, bad.on_device());
    } else {
        launch(spread_edges_kernel<V>, kOp, divide_up(bytes, kSpreadThreads), kSpreadThreads, device, from,
               data<uint8_t>(metadata), to, columns, bytes, bad.on_device());
    }
    STD_TORCH_CHECK(bad.after_all() == 0, kOp, ": metadata: expected places that ascend");
}

Tensor semi_structured_to_dense(Tensor values_in, Tensor metadata_in, int64_t columns) {
    constexpr const char* kOp = "semi_structured_to_dense";
    check_semi_structured(kOp, values_in, metadata_in, columns);
    const Tensor values = as_contiguous(values_in), metadata = as_contiguous(metadata_in);
    Tensor dense = new_tensor(values, {values.size(0), columns}, values.scalar_type());
    const auto size = values.scalar_type() == ScalarType::Char
                          ? size_t{1}
                          : dispatch_float(values.scalar_type(), "semi_structured_to_dense: values",
                                           [](auto zero) { return sizeof(zero); });
    if (dense.numel() == 0) return dense;
    if (size == 1) spread_all<uint8_t>(values, metadata, dense);
    if (size == 2) spread_all<uint16_t>(values, metadata, dense);
    if (size == 4) spread_all<uint32_t>(values, metadata, dense);
    return dense;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("semi_structured_to_dense", TORCH_BOX(&engine::cuda::semi_structured_to_dense));
}
