// What the ops that pack a pruned weight share. Here are the kernels for any rows and any thresholds; those whose rows
// begin on 16 bytes, with a threshold for all or for each row, go by cuda/prune_tiles.cuh, twice as fast.
//
//   1. mask_kernel reads the weight once, writes a bit for each and where every row's kept weights begin: blocks learn
//      what the blocks before them keep by decoupled look-back, so that no pass for a prefix sum follows.
//   2. The CPU reads the last offset, nnz, without which the result cannot be allocated: the only synchronisation.
//   3. fill_kernel moves the kept weights by the mask, last rows first.
//
// Bytes for a weight of b bytes of which a fraction d is kept as v bytes: b + 1/8 in step 1, b + 1/8 + d v in step 3.
// What takes the time on an H200 are instructions, 9 a weight in step 1 and 22 in step 3: it has 13 at the speed of its
// memory.
#pragma once

#include <algorithm>
#include <bit>

#include "common/quantize.h"
#include "common/round.h"
#include "cuda/ptx.cuh"

namespace engine::cuda {

constexpr int kPruneThreads = 256, kPruneWarps = kPruneThreads / kWarp;
constexpr int kStepBytes = kWarp;        // of the mask, that a warp fills at once: a byte, 8 weights, a lane
constexpr int64_t kRowsForAWarp = 4096;  // from here on a warp has a row of its own, else all of the block share it

template <class T>
__device__ inline uint32_t magnitude_bits(T w) {
    return std::bit_cast<uint32_t>(to_float(w)) & 0x7fffffffu;
}

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

// Sum over the lanes up to and with this one.
template <class T>
__device__ inline T sum_through(T value) {
    const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
    for (unsigned by = 1; by < kWarp; by *= 2) {
        const T below = __shfl_up_sync(kAllLanes, value, by);
        if (lane >= by) value += below;
    }
    return value;
}
template <class T>
__device__ inline T sum_of_warp(T value) {
#pragma unroll
    for (unsigned by = 1; by < kWarp; by *= 2) value += __shfl_xor_sync(kAllLanes, value, by);
    return value;
}
__device__ inline uint32_t max_of_warp(uint32_t value) {
#pragma unroll
    for (unsigned by = 1; by < kWarp; by *= 2) value = std::max(value, __shfl_xor_sync(kAllLanes, value, by));
    return value;
}

// Decoupled look-back (Merrill and Garland, 2016). A block's state is 0, then what it alone counts, then what all up to
// it count, told apart by the two upper bits, so that one 64-bit store publishes both.
constexpr uint64_t kOwn = uint64_t{1} << 62, kThrough = uint64_t{2} << 62, kCount = kOwn - 1;

// What the blocks before `block` count. A whole warp calls; blocks are numbered in the order in which they start, so
// that those before are running or done, and the wait ends.
__device__ inline uint64_t look_back(uint64_t* states,  // [blocks], 0 at first
                                     int64_t block, uint64_t own) {
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) store_release(states + block, (block == 0 ? kThrough : kOwn) | own);
    uint64_t before = 0;
    for (int64_t end = block; end > 0; end -= kWarp) {
        const int64_t which = end - 1 - lane;  // the nearest first
        uint64_t state = which >= 0 ? load_acquire(states + which) : kThrough;
        while (__ballot_sync(kAllLanes, state == 0) != 0) {
            __nanosleep(32);
            if (state == 0) state = load_acquire(states + which);
        }
        const unsigned through = __ballot_sync(kAllLanes, (state & kThrough) != 0);
        const int last = through != 0 ? __ffs(static_cast<int>(through)) - 1 : kWarp - 1;
        before += sum_of_warp(lane <= last ? state & kCount : uint64_t{0});
        if (through != 0) break;
    }
    if (lane == 0 && block > 0) store_release(states + block, kThrough | (before + own));
    return before;
}

struct Threshold {
    const float* values;  // read at row * row_stride + k * column_stride
    int64_t row_stride, column_stride;
};

// The weight and how its rows are shared out: a block takes kPruneWarps / row_warps rows.
struct Matrix {
    int64_t rows, columns, row_bytes;  // row_bytes = ceil(columns / 8), of the mask
    int row_warps;
    ENGINE_INLINE int block_rows() const { return kPruneWarps / row_warps; }
    int64_t blocks() const { return divide_up(rows, block_rows()); }
};

template <bool kAligned, bool kAmax, class T>
__device__ inline uint32_t mask_of_eight(const Eight<T>& w, const float* limits, float row_limit, int64_t column_stride,
                                         int64_t k, int64_t columns, uint32_t& amax) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (!kAligned && k + j >= columns) continue;
        const float limit = column_stride == 0 ? row_limit : limits[(k + j) * column_stride];
        const uint32_t magnitude = magnitude_bits(w.at[j]);
        const bool kept = !(std::bit_cast<float>(magnitude) <= limit);
        bits |= static_cast<uint32_t>(kept) << j;
        if constexpr (kAmax) amax = std::max(amax, kept ? magnitude : 0u);
    }
    return bits;
}

template <bool kAligned, bool kAmax, class T, class I>
__global__ void __launch_bounds__(kPruneThreads, 3)
    mask_kernel(const T* weight,  // [rows, columns]
                Threshold threshold,
                uint8_t* bitmask,            // [rows, row_bytes]
                I* offsets,                  // [rows + 1]
                uint32_t* amax,              // [rows]: bits of the largest kept magnitude; unused without kAmax
                uint64_t* states,            // [blocks], 0
                unsigned long long* ticket,  // [1], 0: the number of the next block
                Matrix matrix) {
    ENGINE_SHARED(block, int64_t);
    ENGINE_SHARED(row_counts, unsigned long long[kPruneWarps]);
    ENGINE_SHARED(row_amax, unsigned[kPruneWarps]);
    constexpr int kStepsAhead = kAligned ? 8 / sizeof(T) : 1;  // whose loads are under way together
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (threadIdx.x == 0) block = static_cast<int64_t>(atomicAdd(ticket, 1ull));
    if (threadIdx.x < kPruneWarps) row_counts[threadIdx.x] = row_amax[threadIdx.x] = 0;
    __syncthreads();
    const int64_t first = block * matrix.block_rows(), row = first + warp / matrix.row_warps;
    if (row < matrix.rows) {
        const T* from = weight + row * matrix.columns;
        const float* limits = threshold.values + row * threshold.row_stride;
        const float row_limit = matrix.columns > 0 ? limits[0] : 0.0f;
        const int64_t step = kStepBytes * matrix.row_warps;
        uint64_t kept = 0;
        uint32_t largest = 0;
        for (int64_t begin = warp % matrix.row_warps * kStepBytes + lane; begin < matrix.row_bytes;
             begin += kStepsAhead * step) {
            Eight<T> w[kStepsAhead];
#pragma unroll
            for (int i = 0; i < kStepsAhead; ++i) {
                const int64_t byte = begin + i * step;
                if (byte < matrix.row_bytes) read_eight<kAligned>(w[i], from, byte * 8, matrix.columns);
            }
#pragma unroll
            for (int i = 0; i < kStepsAhead; ++i) {
                const int64_t byte = begin + i * step;
                if (byte >= matrix.row_bytes) continue;
                const uint32_t bits = mask_of_eight<kAligned, kAmax>(w[i], limits, row_limit, threshold.column_stride,
                                                                     byte * 8, matrix.columns, largest);
                bitmask[row * matrix.row_bytes + byte] = static_cast<uint8_t>(bits);
                kept += __popc(bits);
            }
        }
        kept = sum_of_warp(kept);
        if constexpr (kAmax) largest = max_of_warp(largest);
        if (lane == 0) {
            atomicAdd(&row_counts[warp / matrix.row_warps], static_cast<unsigned long long>(kept));
            if constexpr (kAmax) atomicMax(&row_amax[warp / matrix.row_warps], largest);
        }
    }
    __syncthreads();
    if (warp > 0) return;
    const bool mine = lane < matrix.block_rows() && first + lane < matrix.rows;
    const uint64_t through = sum_through(mine ? static_cast<uint64_t>(row_counts[lane]) : uint64_t{0});
    const uint64_t before = look_back(states, block, __shfl_sync(kAllLanes, through, kWarp - 1));
    if (first == 0 && lane == 0) offsets[0] = 0;
    if (!mine) return;
    offsets[first + lane + 1] = static_cast<I>(before + through);
    if constexpr (kAmax) amax[first + lane] = row_amax[lane];
}

// A kept weight as it is.
template <class T>
struct KeepValue {
    using Value = T;
    Value* values;  // [nnz]
    struct Row {};
    __device__ Row row(int64_t, bool) const { return {}; }
    __device__ Value operator()(T w, Row) const { return w; }
};

template <class T, class I, class Out>
__global__ void __launch_bounds__(kPruneThreads) fill_kernel(const T* weight,         // [rows, columns]
                                                             const uint8_t* bitmask,  // [rows, row_bytes]
                                                             const I* offsets,        // [rows + 1]
                                                             Out out,
                                                             I* col_indices,  // [nnz], or null
                                                             Matrix matrix, bool aligned) {
    using Value = typename Out::Value;
    // What a warp keeps of one step, in order: it leaves by neighbouring lanes writing neighbouring values.
    ENGINE_SHARED(packed, Value[kPruneWarps][kStepBytes * 8]);
    ENGINE_SHARED(places, uint8_t[kPruneWarps][kStepBytes * 8]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp % matrix.row_warps;
    const int64_t block = gridDim.x - 1 - blockIdx.x;
    const int64_t row = block * matrix.block_rows() + warp / matrix.row_warps;
    if (row >= matrix.rows) return;
    const uint8_t* mask = bitmask + row * matrix.row_bytes;
    const int64_t steps = (matrix.row_bytes + kStepBytes - 1) / kStepBytes;
    const int64_t part_bytes = (steps + matrix.row_warps - 1) / matrix.row_warps * kStepBytes;
    const int64_t begin = std::min(part * part_bytes, matrix.row_bytes);
    const int64_t end = std::min(begin + part_bytes, matrix.row_bytes);
    int64_t skipped = 0;  // what the warps before this one move
    for (int64_t byte = lane; byte < begin; byte += kWarp) skipped += __popc(mask[byte]);
    int64_t to = static_cast<int64_t>(offsets[row]) + sum_of_warp(skipped);
    const auto how = out.row(row, part == 0 && lane == 0);
    for (int64_t step = begin; step < end; step += kStepBytes) {
        const int64_t byte = step + lane;
        const unsigned bits = byte < end ? mask[byte] : 0;
        const int through = sum_through(__popc(bits));
        int at = through - __popc(bits);
        if (bits != 0) {
            Eight<T> w;
            if (aligned) {
                read_eight<true>(w, weight + row * matrix.columns, byte * 8, matrix.columns);
            } else {
                read_eight<false>(w, weight + row * matrix.columns, byte * 8, matrix.columns);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if ((bits >> j & 1) == 0) continue;
                if (col_indices != nullptr) places[warp][at] = static_cast<uint8_t>(lane * 8 + j);
                packed[warp][at++] = out(w.at[j], how);
            }
        }
        __syncwarp();
        const int total = __shfl_sync(kAllLanes, through, kWarp - 1);
        for (int i = lane; i < total; i += kWarp) {
            out.values[to + i] = packed[warp][i];
            if (col_indices != nullptr) col_indices[to + i] = static_cast<I>(step * 8 + places[warp][i]);
        }
        __syncwarp();
        to += total;
    }
}

// The host's part.

inline Threshold threshold_of(const Tensor& threshold, int64_t rows, int64_t columns, const char* what) {
    STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float, what, ": expected float32");
    const int64_t dims = threshold.dim();
    const int64_t across = dims >= 1 ? threshold.size(dims - 1) : 1, down = dims == 2 ? threshold.size(0) : 1;
    STD_TORCH_CHECK(dims <= 2 && (across == 1 || across == columns) && (down == 1 || down == rows), what,
                    ": expected to broadcast against weight");
    return {data<float>(threshold), down == 1 ? 0 : threshold.stride(0), across == 1 ? 0 : threshold.stride(dims - 1)};
}

inline Matrix matrix_of(const Tensor& weight) {
    const int64_t rows = weight.size(0), columns = weight.size(1);
    return {rows, columns, columns / 8 + (columns % 8 != 0), rows >= kRowsForAWarp ? 1 : kPruneWarps};
}

inline bool rows_aligned(const Tensor& weight) {
    return weight.size(1) % 8 == 0 && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
}

// Step 1, and nnz. `I` is the offsets' type; `amax` [rows] is filled with kAmax.
template <bool kAmax, class T, class I>
int64_t mask_rows(const Tensor& weight, Threshold threshold, Tensor& bitmask, Tensor& offsets, uint32_t* amax,
                  const char* what, const OnDeviceOf& device) {
    const Matrix matrix = matrix_of(weight);
    I* to = mutable_data<I>(offsets);
    if (matrix.rows == 0) {
        fill_zero(to, sizeof(I), what, device);
        return 0;
    }
    Tensor scratch = new_tensor(weight, {matrix.blocks() + 1}, ScalarType::Long);
    fill_zero(scratch.mutable_data_ptr(), (matrix.blocks() + 1) * sizeof(int64_t), what, device);
    auto* ticket = reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(scratch));
    auto* states = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(scratch)) + 1;
    launch(rows_aligned(weight) ? mask_kernel<true, kAmax, T, I> : mask_kernel<false, kAmax, T, I>, what,
           matrix.blocks(), kPruneThreads, device, data<T>(weight), threshold, mutable_data<uint8_t>(bitmask), to, amax,
           states, ticket, matrix);
    return static_cast<int64_t>(read_back(to + matrix.rows, what, device));
}

// Step 3.
template <class T, class I, class Out>
void fill_rows(const Tensor& weight, const Tensor& bitmask, const Tensor& offsets, Out out, I* col_indices,
               const char* what, const OnDeviceOf& device) {
    const Matrix matrix = matrix_of(weight);
    launch(fill_kernel<T, I, Out>, what, matrix.blocks(), kPruneThreads, device, data<T>(weight),
           data<uint8_t>(bitmask), data<I>(offsets), out, col_indices, matrix, rows_aligned(weight));
}

inline void check_weight(const Tensor& weight, const Tensor& threshold, const char* what) {
    STD_TORCH_CHECK(weight.dim() == 2, what, ": weight: expected [N, K]");
    STD_TORCH_CHECK(threshold.device() == weight.device(), what, ": threshold: expected weight's device");
}

}  // namespace engine::cuda
