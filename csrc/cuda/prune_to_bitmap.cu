// prune_to_bitmap on NVIDIA GPUs: two passes over the weight and a scan between them.
//
//   1. mask_kernel writes the bitmask and, in row_offsets, how many weights each row keeps;
//   2. scan_kernel turns those counts into offsets;
//      the CPU reads the last one, which is nnz and must be known to allocate `values`: the op's only synchronisation;
//   3. fill_kernel moves the kept weights by the mask.
//
// A thread owns a byte of the mask, eight weights, which it reads as 16-byte vectors where the rows are aligned to
// them. A block owns a row at a time; blocks are as wide as a row needs, so that short rows do not idle.

#include <cuda_fp16.h>

#include <algorithm>

#include "common/dtype.h"
#include "cuda/launch.h"

namespace engine {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;       // of a block, at most: 2048 weights a step
constexpr int kScanThreads = 1024;  // of the one block that scans, at most
constexpr int kScanEach = 8;        // rows of a thread in one step of the scan
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ inline float magnitude(float w) { return __uint_as_float(__float_as_uint(w) & 0x7fffffffu); }
__device__ inline float magnitude(BFloat16 w) { return __uint_as_float((w.bits & 0x7fffu) << 16); }
__device__ inline float magnitude(Half w) { return __half2float(__ushort_as_half(w.bits & 0x7fffu)); }

// The eight weights under one byte of the mask.
template <class T>
struct alignas(16) Eight {
    T at[8];
};

// Reads row[k, k + 8), of which those beyond the row's end are left as they are.
template <bool kAligned, class T>
__device__ inline void read_eight(Eight<T>& w,
                                  const T* row,  // [columns]
                                  int64_t k, int64_t columns) {
    if constexpr (kAligned) {  // columns is a multiple of 8, so that there are eight or none
        w = *reinterpret_cast<const Eight<T>*>(row + k);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (k + j < columns) w.at[j] = row[k + j];
    }
}

// The sum of `value` over the block's threads before this one, and over all of them in `total`. All threads must call.
template <class T>
__device__ inline T sum_before(T value, T& total) {
    __shared__ T warp_sums[kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    T sum = value;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const T below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
    }
    if (lane == kWarp - 1) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        T s = lane < warps ? warp_sums[lane] : 0;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const T below = __shfl_up_sync(0xffffffffu, s, step);
            if (lane >= step) s += below;
        }
        warp_sums[lane] = s;
    }
    __syncthreads();
    total = warp_sums[warps - 1];
    const T before = sum - value + (warp > 0 ? warp_sums[warp - 1] : 0);
    __syncthreads();  // before warp_sums serves the next call
    return before;
}

struct Threshold {
    const float* values;  // read at row * row_stride + k * column_stride
    int64_t row_stride, column_stride;
};

template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads) mask_kernel(const T* weight,  // [rows, columns]
                                                        Threshold threshold,
                                                        uint8_t* bitmask,      // [rows, row_bytes]
                                                        int64_t* row_offsets,  // [rows + 1]: row's count at row + 1
                                                        int64_t rows, int64_t columns, int64_t row_bytes) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const float* limits = threshold.values + row * threshold.row_stride;
        int64_t kept = 0;
        for (int64_t byte = threadIdx.x; byte < row_bytes; byte += blockDim.x) {
            Eight<T> w;
            read_eight<kAligned>(w, weight + row * columns, byte * 8, columns);
            const float row_limit = limits[0];
            unsigned bits = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int64_t k = byte * 8 + j;
                if (!kAligned && k >= columns) continue;
                const float limit = threshold.column_stride == 0 ? row_limit : limits[k * threshold.column_stride];
                bits |= static_cast<unsigned>(!(magnitude(w.at[j]) <= limit)) << j;
            }
            bitmask[row * row_bytes + byte] = static_cast<uint8_t>(bits);
            kept += __popc(bits);
        }
        int64_t total;
        sum_before(kept, total);
        if (threadIdx.x == 0) row_offsets[row + 1] = total;
    }
}

// One block. Turns the counts at row_offsets[1 ...] into sums.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* row_offsets,  // [rows + 1]
                                                            int64_t rows) {
    if (threadIdx.x == 0) row_offsets[0] = 0;
    int64_t sum = 0;  // of the steps before
    for (int64_t begin = 0; begin < rows; begin += blockDim.x * kScanEach) {
        const int64_t first = begin + threadIdx.x * kScanEach;
        int64_t counts[kScanEach], own = 0, total;
#pragma unroll
        for (int i = 0; i < kScanEach; ++i) own += counts[i] = first + i < rows ? row_offsets[first + i + 1] : 0;
        int64_t before = sum + sum_before(own, total);
#pragma unroll
        for (int i = 0; i < kScanEach; ++i) {
            before += counts[i];
            if (first + i < rows) row_offsets[first + i + 1] = before;
        }
        sum += total;
    }
}

template <bool kAligned, class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(const T* weight,             // [rows, columns]
                                                        const uint8_t* bitmask,      // [rows, row_bytes]
                                                        const int64_t* row_offsets,  // [rows + 1]
                                                        T* values,                   // [nnz]
                                                        int64_t rows, int64_t columns, int64_t row_bytes) {
    // What a step keeps, in order: it leaves the block by neighbouring threads writing neighbouring values.
    __shared__ T packed[kThreads * 8];
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        T* out = values + row_offsets[row];
        for (int64_t begin = 0; begin < row_bytes; begin += blockDim.x) {  // a step: every thread takes part
            const int64_t byte = begin + threadIdx.x;
            const unsigned bits = byte < row_bytes ? bitmask[row * row_bytes + byte] : 0;
            int total;
            int at = sum_before(__popc(bits), total);
            if (bits) {
                Eight<T> w;
                read_eight<kAligned>(w, weight + row * columns, byte * 8, columns);
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (bits >> j & 1) packed[at++] = w.at[j];
            }
            __syncthreads();
            for (int i = threadIdx.x; i < total; i += blockDim.x) out[i] = packed[i];
            out += total;  // the next sum_before waits for all, before `packed` is written again
        }
    }
}

Threshold threshold_of(const Tensor& threshold, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float, "prune_to_bitmap: threshold: expected float32");
    const int64_t dims = threshold.dim();
    const int64_t across = dims >= 1 ? threshold.size(dims - 1) : 1, down = dims == 2 ? threshold.size(0) : 1;
    STD_TORCH_CHECK(dims <= 2 && (across == 1 || across == columns) && (down == 1 || down == rows),
                    "prune_to_bitmap: threshold: expected to broadcast against weight");
    return {data<float>(threshold), down == 1 ? 0 : threshold.stride(0), across == 1 ? 0 : threshold.stride(dims - 1)};
}

// Whole warps, as many as `work` has use for.
int threads_for(int64_t work, int most) {
    return static_cast<int>(std::clamp<int64_t>((work + kWarp - 1) / kWarp * kWarp, kWarp, most));
}

template <bool kAligned, class T>
Tensor prune(const Tensor& weight, Threshold threshold, Tensor& bitmask, Tensor& row_offsets) {
    const OnDeviceOf device(weight);
    const int64_t rows = weight.size(0), columns = weight.size(1), row_bytes = (columns + 7) / 8;
    const int64_t blocks = std::min(rows, kMaxBlocks);
    const int threads = threads_for(row_bytes, kThreads);
    const int scan_threads = threads_for((rows + kScanEach - 1) / kScanEach, kScanThreads);
    const T* from = data<T>(weight);
    uint8_t* masks = mutable_data<uint8_t>(bitmask);
    int64_t* offsets = mutable_data<int64_t>(row_offsets);

    launch(mask_kernel<kAligned, T>, "prune_to_bitmap: mask_kernel", blocks, threads, device, from, threshold, masks,
           offsets, rows, columns, row_bytes);
    launch(scan_kernel, "prune_to_bitmap: scan_kernel", 1, scan_threads, device, offsets, rows);
    const int64_t nnz = read_back(offsets + rows, "prune_to_bitmap: nnz", device);
    Tensor values = new_tensor(weight, {nnz}, weight.scalar_type());
    launch(fill_kernel<kAligned, T>, "prune_to_bitmap: fill_kernel", blocks, threads, device, from, masks, offsets,
           mutable_data<T>(values), rows, columns, row_bytes);
    return values;
}

std::tuple<Tensor, Tensor, Tensor> prune_to_bitmap(Tensor weight_in, Tensor threshold_in) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_to_bitmap: weight: expected [N, K]");
    STD_TORCH_CHECK(threshold_in.device() == weight_in.device(),
                    "prune_to_bitmap: threshold: expected weight's device");
    const Tensor weight = as_contiguous(weight_in);
    const int64_t rows = weight.size(0), columns = weight.size(1);
    const Threshold threshold = threshold_of(threshold_in, rows, columns);
    Tensor bitmask = new_tensor(weight, {rows, (columns + 7) / 8}, ScalarType::Byte);
    Tensor row_offsets = new_tensor(weight, {rows + 1}, ScalarType::Long);
    Tensor values = dispatch_float(weight.scalar_type(), "prune_to_bitmap: weight", [&](auto zero) {
        using T = decltype(zero);
        const bool aligned = columns % 8 == 0 && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
        return aligned ? prune<true, T>(weight, threshold, bitmask, row_offsets)
                       : prune<false, T>(weight, threshold, bitmask, row_offsets);
    });
    return {bitmask, row_offsets, values};
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("prune_to_bitmap", TORCH_BOX(&engine::prune_to_bitmap)); }
