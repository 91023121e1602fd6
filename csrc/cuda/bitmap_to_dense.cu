// bitmap_to_dense and its reverse, bitmap_gather, on NVIDIA GPUs.
//
// A warp has a row, or where rows are few a part of one, 256 weights at a time: a byte of the mask a lane, whose place
// among the values is a prefix sum of the warp. bitmap_to_dense reads 1/8 + d v and writes v bytes a weight of v bytes
// of which a fraction d is kept, in about 4 instructions a weight. Every row is compared with row_offsets before its
// values are read; one that does not fit is recorded, and so the CPU waits once, at the end, to raise the error.

#include "common/dtype.h"
#include "cuda/bitmap.cuh"
#include "cuda/prune.cuh"

namespace engine {
namespace {

// Bits set in bytes [0, end) of a row's mask, for all lanes of the warp.
__device__ inline int64_t count_bytes(const uint8_t* mask, int64_t end) {
    int64_t bits = 0;
    for (int64_t byte = threadIdx.x % kWarp; byte < end; byte += kWarp) bits += __popc(mask[byte]);
    return sum_of_warp(bits);
}

// The part of a row that a warp has: bytes [begin, end) of its mask, and where its first value is.
struct Part {
    int64_t begin, end, position;
};

// False where there is nothing to do. Records in `bad` a row that does not fit.
template <class V>
__device__ inline bool part_of_row(const Bitmap<V>& w, const Matrix& matrix, int64_t row, unsigned long long* bad,
                                   Part& part) {
    const uint8_t* mask = w.mask + row * w.row_bytes;
    if (!row_fits(w, row, count_bytes(mask, w.row_bytes))) {
        atomicMax(bad, static_cast<unsigned long long>(row + 1));
        return false;
    }
    const int64_t steps = (w.row_bytes + kStepBytes - 1) / kStepBytes;
    const int64_t each = (steps + matrix.row_warps - 1) / matrix.row_warps * kStepBytes;
    part.begin = std::min(threadIdx.x / kWarp % matrix.row_warps * each, w.row_bytes);
    part.end = std::min(part.begin + each, w.row_bytes);
    part.position = w.row_offsets[row] + count_bytes(mask, part.begin);
    return true;
}

// Calls with_byte(byte, bits, position) for the byte of the mask that is this lane's in each step.
template <class V, class F>
__device__ inline void each_byte(const Bitmap<V>& w, int64_t row, Part part, const F& with_byte) {
    const uint8_t* mask = w.mask + row * w.row_bytes;
    for (int64_t step = part.begin; step < part.end; step += kStepBytes) {
        const int64_t byte = step + threadIdx.x % kWarp;
        const unsigned bits = byte < part.end ? mask[byte] : 0;
        const int through = sum_through(__popc(bits));
        if (byte < part.end) with_byte(byte, bits, part.position + (through - __popc(bits)));
        part.position += __shfl_sync(kAllLanes, through, kWarp - 1);
    }
}

// V is an unsigned integer of the values' size: bits alone are moved.
template <class V>
__global__ void __launch_bounds__(kPruneThreads) dense_kernel(Bitmap<V> w, Matrix matrix,
                                                              V* dense,                 // [rows, columns]
                                                              unsigned long long* bad,  // [1], 0: a bad row + 1
                                                              bool aligned) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * matrix.block_rows() + threadIdx.x / kWarp / matrix.row_warps;
    Part part;
    if (row >= w.rows || !part_of_row(w, matrix, row, bad, part)) return;
    each_byte(w, row, part, [&](int64_t byte, unsigned bits, int64_t position) {
        struct alignas(8 * sizeof(V) < 16 ? 8 * sizeof(V) : 16) Eight8 {
            V at[8];
        } out;
        const V* from = w.values + position;
#pragma unroll
        for (int j = 0; j < 8; ++j) out.at[j] = bits >> j & 1 ? *from++ : V{0};
        V* to = dense + row * w.columns + byte * 8;
        if (aligned) {
            *reinterpret_cast<Eight8*>(to) = out;
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (byte * 8 + j < w.columns) to[j] = out.at[j];
        }
    });
}

template <class V>
__global__ void __launch_bounds__(kPruneThreads) gather_kernel(Bitmap<V> w, Matrix matrix,
                                                               const V* dense,  // [rows, columns]
                                                               V* values,       // [nnz]
                                                               unsigned long long* bad) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * matrix.block_rows() + threadIdx.x / kWarp / matrix.row_warps;
    Part part;
    if (row >= w.rows || !part_of_row(w, matrix, row, bad, part)) return;
    each_byte(w, row, part, [&](int64_t byte, unsigned bits, int64_t position) {
        const V* from = dense + row * w.columns + byte * 8;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (bits >> j & 1) values[position++] = from[j];
    });
}

template <class F>
auto dispatch_size(size_t size, F&& f) {
    if (size == 1) return f(uint8_t{});
    if (size == 2) return f(uint16_t{});
    return f(uint32_t{});
}
size_t size_of(const Tensor& values, const char* op, bool with_int8) {
    if (with_int8 && values.scalar_type() == ScalarType::Char) return 1;
    return dispatch_float(values.scalar_type(), op, [](auto zero) { return sizeof(zero); });
}

// Runs `kernel` over the bitmap and raises what it records.
template <class V, class Kernel>
void run(Kernel kernel, const char* op, const Tensor& like, const Bitmap<V>& w, const OnDeviceOf& device) {
    // An empty bitmap has no row in which a wrong offset would show.
    if (w.rows == 0) {
        STD_TORCH_CHECK(read_back(w.row_offsets, op, device) == 0 && w.nnz == 0, op, ": row_offsets: expected 0");
        return;
    }
    Tensor bad = new_tensor(like, {1}, ScalarType::Long);
    fill_zero(bad.mutable_data_ptr(), sizeof(int64_t), op, device);
    auto* recorded = static_cast<unsigned long long*>(bad.mutable_data_ptr());
    const Matrix matrix{w.rows, w.columns, w.row_bytes, w.rows >= kRowsForAWarp ? 1 : kPruneWarps};
    kernel(matrix, recorded);
    const auto row = static_cast<int64_t>(read_back(recorded, op, device)) - 1;
    STD_TORCH_CHECK(row < 0, op, ": bitmask: row ", row, " has not as many bits set as row_offsets gives it values");
}

Tensor bitmap_to_dense(Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, int64_t columns) {
    constexpr const char* kOp = "bitmap_to_dense";
    check_bitmap(kOp, bitmask_in, row_offsets_in, values_in, columns);
    const Tensor bitmask = as_contiguous(bitmask_in), row_offsets = as_contiguous(row_offsets_in);
    const Tensor values = as_contiguous(values_in);
    const size_t size = size_of(values, "bitmap_to_dense: values", true);
    Tensor dense = new_tensor(values, {bitmask.size(0), columns}, values.scalar_type());
    const OnDeviceOf device(values);
    dispatch_size(size, [&](auto zero) {
        using V = decltype(zero);
        const Bitmap<V> w = bitmap_of<V>(bitmask, row_offsets, values, columns);
        auto* to = static_cast<V*>(dense.mutable_data_ptr());
        run(
            [&](Matrix matrix, unsigned long long* bad) {
                launch(dense_kernel<V>, kOp, matrix.blocks(), kPruneThreads, device, w, matrix, to, bad,
                       columns % 8 == 0);
            },
            kOp, values, w, device);
    });
    return dense;
}

Tensor bitmap_gather(Tensor dense_in, Tensor bitmask_in, Tensor row_offsets_in, int64_t nnz) {
    constexpr const char* kOp = "bitmap_gather";
    STD_TORCH_CHECK(dense_in.dim() == 2 && nnz >= 0, kOp, ": dense: expected [N, K]");
    const Tensor bitmask = as_contiguous(bitmask_in), row_offsets = as_contiguous(row_offsets_in);
    const Tensor dense = as_contiguous(dense_in);
    const size_t size = size_of(dense, "bitmap_gather: dense", false);
    Tensor values = new_tensor(dense, {nnz}, dense.scalar_type());
    check_bitmap(kOp, bitmask, row_offsets, values, dense.size(1));
    STD_TORCH_CHECK(dense.size(0) == bitmask.size(0), kOp, ": dense: expected as many rows as bitmask");
    const OnDeviceOf device(dense);
    dispatch_size(size, [&](auto zero) {
        using V = decltype(zero);
        const Bitmap<V> w = bitmap_of<V>(bitmask, row_offsets, values, dense.size(1));
        const auto* from = static_cast<const V*>(dense.const_data_ptr());
        auto* to = static_cast<V*>(values.mutable_data_ptr());
        run(
            [&](Matrix matrix, unsigned long long* bad) {
                launch(gather_kernel<V>, kOp, matrix.blocks(), kPruneThreads, device, w, matrix, from, to, bad);
            },
            kOp, dense, w, device);
    });
    return values;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("bitmap_to_dense", TORCH_BOX(&engine::bitmap_to_dense));
    m.impl("bitmap_gather", TORCH_BOX(&engine::bitmap_gather));
}
