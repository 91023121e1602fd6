// bitmap_to_dense and its reverse, bitmap_gather, on NVIDIA GPUs.
//
// bitmap_to_dense reads 1/8 + d v and writes v bytes a weight of v bytes of which a fraction d is kept. Where rows are
// whole bytes of the mask, tiles_kernel goes by tiles of memory, as cuda/tiles.cuh cuts it: it takes a tile's values
// to shared memory in pieces of 16 bytes, and from there to their places. The other kernels give a warp a row, or where
// rows are few a part of one, 256 weights at a time: a byte of the mask a lane, whose place among the values is a
// prefix sum of the warp.
//
// row_offsets are compared with the mask before values are read; a row that does not fit is recorded, and so the CPU
// waits once, at the end, to raise the error.

#include "common/dtype.h"
#include "common/round.h"
#include "cuda/bitmap.cuh"
#include "cuda/tiles.cuh"

namespace engine::cuda {
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
__device__ inline bool part_of_row(const Bitmap<V>& w, const Matrix& matrix, int64_t row, volatile uint64_t* bad,
                                   Part& part) {
    const uint8_t* mask = w.mask + row * w.row_bytes;
    if (!row_fits(w, row, count_bytes(mask, w.row_bytes))) {
        *bad = static_cast<uint64_t>(row + 1);
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
struct alignas(8 * sizeof(V) < 16 ? 8 * sizeof(V) : 16) EightOf {
    V at[8];
};

// Bytes of the mask that a lane has, 32 apart.
template <class V>
constexpr int kLaneBytes = sizeof(V) == 4 ? 2 : 4;
template <class V>
constexpr uint32_t kTileBytes = kPruneThreads * kLaneBytes<V>;
constexpr int64_t kMostTilesARow = 16;  // as each counts the bits of its row that come before it

// Where a tile's values begin: after those of the rows before, and the bits of its row that come before it, which this
// thread's part of is returned.
__device__ inline uint32_t count_before(const uint8_t* mask, uint32_t begin, uint32_t end) {
    uint32_t bits = 0;
    for (uint32_t byte = begin + threadIdx.x; byte < end; byte += kPruneThreads) bits += __popc(mask[byte]);
    return sum_of_warp(bits);
}

// Each boundary between rows is compared with row_offsets by the tile that it is in or at the end of.
template <class V>
__global__ void __launch_bounds__(kPruneThreads) tiles_kernel(Bitmap<V> w, Tiling tiling,
                                                              EightOf<V>* dense,         // [chunks]
                                                              volatile uint64_t* bad) {  // a bad row + 1
    constexpr uint32_t kEach = 16 / sizeof(V), kBytes = kTileBytes<V>;
    struct alignas(16) Piece {
        V at[kEach];
    };
    struct alignas(16) Staged {  // as much off 16 bytes as in memory
        Piece at[kBytes * 8 / kEach + 1];
    };
    ENGINE_SHARED(staged, Staged);
    ENGINE_SHARED(warp_counts, uint32_t[kPruneWarps]);
    ENGINE_SHARED(warp_before, uint32_t[kPruneWarps]);
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, tile = blockIdx.x * kBytes;
    const uint32_t first = tile + warp * (kWarp * kLaneBytes<V>)+lane, end = std::min(tile + kBytes, tiling.chunks);
    uint32_t bits[kLaneBytes<V>];
#pragma unroll
    for (int i = 0; i < kLaneBytes<V>; ++i) bits[i] = first + i * kWarp < end ? w.mask[first + i * kWarp] : 0;
    const uint32_t row = tiling.row_chunks.quotient(tile);
    const int64_t row_begins = w.row_offsets[row];
    const uint32_t part = count_before(w.mask, row * tiling.row_chunks.by, tile);
    const Begins<kLaneBytes<V>> begins(bits);
    if (lane == kWarp - 1) {
        warp_counts[warp] = begins.total;
        warp_before[warp] = part;
    }
    __syncthreads();
    uint32_t before_warp = 0, total = 0, before_tile = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPruneWarps; ++i) {
        if (i == warp) before_warp = total;
        total += warp_counts[i];
        before_tile += warp_before[i];
    }
    const int64_t base = row_begins + before_tile;
    if (row_begins < 0 || row_begins > w.nnz || base + total > w.nnz) {
        *bad = row + 1;
        return;
    }
    const V* from = w.values + base;
    const uint32_t shift = reinterpret_cast<uintptr_t>(from) % 16 / sizeof(V);
    from -= shift;
    V* values = staged.at[0].at;
    const Span<kEach> span{shift, shift + total};
    span.each_piece(
        [&](uint32_t piece) { copy_16_async(&staged.at[piece], reinterpret_cast<const Piece*>(from) + piece); });
    copy_commit();
    span.each_edge([&](uint32_t at) { values[at] = from[at]; });
    if (threadIdx.x == 0) {
        const uint32_t last = tiling.row_chunks.quotient(end);
        if (last * tiling.row_chunks.by == end && w.row_offsets[last] != base + total) *bad = last;
        if (w.row_offsets[0] != 0) *bad = 1;
        if (w.row_offsets[tiling.rows] != w.nnz) *bad = tiling.rows;
    }
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLaneBytes<V>; ++i) {
        const uint32_t byte = first + i * kWarp;
        if (byte >= end) continue;
        const uint32_t begin = before_warp + begins.at[i], its_row = tiling.row_chunks.quotient(byte);
        if (its_row * tiling.row_chunks.by == byte && w.row_offsets[its_row] != base + begin) *bad = its_row;
        const V* value = values + shift + begin;
        EightOf<V> out;
#pragma unroll
        for (int j = 0; j < 8; ++j) out.at[j] = bits[i] >> j & 1 ? *value++ : V{0};
        dense[byte] = out;
    }
}

template <class V>
__global__ void __launch_bounds__(kPruneThreads) dense_kernel(Bitmap<V> w, Matrix matrix,
                                                              V* dense,                // [rows, columns]
                                                              volatile uint64_t* bad,  // [1], 0: a bad row + 1
                                                              bool aligned) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * matrix.block_rows() + threadIdx.x / kWarp / matrix.row_warps;
    Part part;
    if (row >= w.rows || !part_of_row(w, matrix, row, bad, part)) return;
    each_byte(w, row, part, [&](int64_t byte, unsigned bits, int64_t position) {
        EightOf<V> out;
        const V* from = w.values + position;
#pragma unroll
        for (int j = 0; j < 8; ++j) out.at[j] = bits >> j & 1 ? *from++ : V{0};
        V* to = dense + row * w.columns + byte * 8;
        if (aligned) {
            *reinterpret_cast<EightOf<V>*>(to) = out;
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
                                                               volatile uint64_t* bad) {
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
void run(Kernel kernel, const char* op, const Bitmap<V>& w, const OnDeviceOf& device) {
    // An empty bitmap has no row in which a wrong offset would show.
    if (w.rows == 0) {
        STD_TORCH_CHECK(read_back(w.row_offsets, op, device) == 0 && w.nnz == 0, op, ": row_offsets: expected 0");
        return;
    }
    const HostWord bad(op, device);
    const Matrix matrix{w.rows, w.columns, w.row_bytes, w.rows >= kRowsForAWarp ? 1 : kPruneWarps};
    kernel(matrix, bad.on_device());
    const auto row = static_cast<int64_t>(bad.after_all()) - 1;
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
            [&](Matrix matrix, volatile uint64_t* bad) {
                const int64_t chunks = w.rows * w.row_bytes;
                if (columns % 8 == 0 && columns >= 16 && chunks < int64_t{1} << 28 &&
                    w.row_bytes <= kMostTilesARow * kTileBytes<V>) {
                    const Tiling tiling{static_cast<uint32_t>(w.rows), static_cast<uint32_t>(chunks), 0,
                                        divisor(static_cast<uint32_t>(w.row_bytes)), 0};
                    launch(tiles_kernel<V>, kOp, divide_up(chunks, kTileBytes<V>), kPruneThreads, device, w, tiling,
                           reinterpret_cast<EightOf<V>*>(to), bad);
                    return;
                }
                launch(dense_kernel<V>, kOp, matrix.blocks(), kPruneThreads, device, w, matrix, to, bad,
                       columns % 8 == 0);
            },
            kOp, w, device);
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
            [&](Matrix matrix, volatile uint64_t* bad) {
                launch(gather_kernel<V>, kOp, matrix.blocks(), kPruneThreads, device, w, matrix, from, to, bad);
            },
            kOp, w, device);
    });
    return values;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("bitmap_to_dense", TORCH_BOX(&engine::cuda::bitmap_to_dense));
    m.impl("bitmap_gather", TORCH_BOX(&engine::cuda::bitmap_gather));
}
