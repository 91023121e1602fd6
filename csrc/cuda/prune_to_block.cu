// prune_to_block on NVIDIA GPUs: kept blocks of a weight, one after another, and where they stand. One kernel counts
// each row of blocks; the CPU waits for their sum, the result's size; the other copies, once each way.

#include "cuda/blocks.cuh"
#include "cuda/prune.cuh"

namespace engine::cuda {
namespace {

// A warp has a row of blocks.
__global__ void __launch_bounds__(kBlockThreads)
    count_blocks_kernel(const bool* keep,  // [row_blocks, column_blocks]
                        int64_t row_blocks, int64_t column_blocks,
                        int32_t* counts,               // [row_blocks]
                        unsigned long long* total,     // [1], 0: the rows that are
                                                       // counted in the upper half
                        volatile uint64_t* on_host) {  // the sum, plus 1
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
    if (row >= row_blocks) return;
    int32_t count = 0;
    for (int64_t column = threadIdx.x % kWarp; column < column_blocks; column += kWarp)
        count += keep[row * column_blocks + column];
    count = sum_of_warp(count);
    if (threadIdx.x % kWarp != 0) return;
    counts[row] = count;
    const unsigned long long before = atomicAdd(total, 1ull << 32 | static_cast<unsigned>(count));
    if (static_cast<int64_t>(before >> 32) == row_blocks - 1) *on_host = (before & 0xffffffffu) + count + 1;
}

template <class Piece>
__global__ void __launch_bounds__(kBlockThreads) copy_blocks_kernel(const Piece* weight,  // [rows, row_pieces]
                                                                    const bool* keep,     // [row_blocks, column_blocks]
                                                                    const int32_t* counts,  // [row_blocks]
                                                                    int32_t* crow_indices,  // [row_blocks + 1]
                                                                    int32_t* col_indices,   // [count]
                                                                    Piece* values,  // [count, block_rows, block_pieces]
                                                                    BlockMatrix m) {
    ENGINE_SHARED(columns, int32_t[kBlockThreads]);  // that are kept
    ENGINE_SHARED(warp_counts, int32_t[kBlockWarps]);
    const Slab slab(m, blockIdx.x);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int32_t before = 0;
    for (int64_t row = threadIdx.x; row < slab.line; row += kBlockThreads) before += counts[row];
    before = sum_of_warp(before);
    if (lane == 0) warp_counts[warp] = before;
    __syncthreads();
    before = 0;
    for (const int32_t some : warp_counts) before += some;
    if (slab.within == 0 && threadIdx.x == 0) {
        if (slab.line == 0) crow_indices[0] = 0;
        crow_indices[slab.line + 1] = before + counts[slab.line];
    }
    for (int64_t start = 0; start < m.column_blocks; start += kBlockThreads) {
        const int64_t column = start + threadIdx.x;
        const bool kept = column < m.column_blocks && keep[slab.line * m.column_blocks + column];
        const unsigned all_kept = __ballot_sync(kAllLanes, kept);
        __syncthreads();
        if (lane == 0) warp_counts[warp] = __popc(all_kept);
        __syncthreads();
        int at = __popc(all_kept & ((1u << lane) - 1)), count = 0;
        for (int i = 0; i < kBlockWarps; ++i) {
            if (i < warp) at += warp_counts[i];
            count += warp_counts[i];
        }
        if (kept) {
            columns[at] = static_cast<int32_t>(column);
            if (slab.within == 0) col_indices[before + at] = static_cast<int32_t>(column);
        }
        __syncthreads();
        for (int piece = threadIdx.x; piece < count * m.block_pieces; piece += kBlockThreads) {
            const int block = piece / m.block_pieces, within = piece - block * m.block_pieces;
            const int64_t from = static_cast<int64_t>(columns[block]) * m.block_pieces + within;
            Piece moved[kSlab];
#pragma unroll
            for (int i = 0; i < kSlab; ++i) {
                moved[i] = Piece{};
                if (from < m.row_pieces && slab.first + i < m.rows)
                    moved[i] = weight[(slab.first + i) * m.row_pieces + from];
            }
            Piece* to =
                values + (static_cast<int64_t>(before + block) * m.block_rows + slab.within) * m.block_pieces + within;
#pragma unroll
            for (int i = 0; i < kSlab; ++i) to[i * m.block_pieces] = moved[i];
        }
        before += count;
    }
}

std::tuple<Tensor, Tensor, Tensor> prune_to_block(Tensor weight_in, Tensor keep_in, int64_t block_rows,
                                                  int64_t block_columns) {
    constexpr const char* kOp = "prune_to_block";
    STD_TORCH_CHECK(weight_in.dim() == 2, kOp, ": weight: expected [N, K]");
    const auto size = size_of_blocks(weight_in, "prune_to_block: weight");
    const BlockShape shape = checked_block_shape(kOp, block_rows, block_columns);
    const int64_t rows = weight_in.size(0), columns = weight_in.size(1);
    const int64_t row_blocks = pieces_of(rows, shape.rows), column_blocks = pieces_of(columns, shape.columns);
    STD_TORCH_CHECK(keep_in.dim() == 2 && keep_in.scalar_type() == ScalarType::Bool && keep_in.size(0) == row_blocks &&
                        keep_in.size(1) == column_blocks && row_blocks * column_blocks < (int64_t{1} << 31) &&
                        keep_in.device() == weight_in.device(),
                    kOp, ": keep: expected bool [ceil(N / R), ceil(K / C)] beside weight");
    const Tensor weight = as_contiguous(weight_in), keep = as_contiguous(keep_in);
    const OnDeviceOf device(weight);
    Tensor crow = new_tensor(weight, {row_blocks + 1}, ScalarType::Int);
    Tensor scratch = new_tensor(weight, {2 + row_blocks}, ScalarType::Int);
    auto* total = static_cast<unsigned long long*>(scratch.mutable_data_ptr());
    auto* counts = mutable_data<int32_t>(scratch) + 2;
    int64_t count = 0;
    if (row_blocks == 0) {
        fill_zero(crow.mutable_data_ptr(), sizeof(int32_t), kOp, device);
    } else {
        const HostWord sum(kOp, device);
        fill_zero(total, sizeof *total, kOp, device);
        launch(count_blocks_kernel, kOp, pieces_of(row_blocks, kBlockWarps), kBlockThreads, device, data<bool>(keep),
               row_blocks, column_blocks, counts, total, sum.on_device());
        count = static_cast<int64_t>(sum.written() - 1);
    }
    Tensor col = new_tensor(weight, {count}, ScalarType::Int);
    Tensor values = new_tensor(weight, {count, shape.rows, shape.columns}, weight.scalar_type());
    const auto row_bytes = columns * static_cast<int64_t>(size);
    dispatch_piece(weight.const_data_ptr(), values.const_data_ptr(), row_bytes, size, [&](auto zero) {
        using Piece = decltype(zero);
        constexpr int64_t kSize = sizeof(Piece);
        const BlockMatrix m{rows, row_bytes / kSize, column_blocks, static_cast<int>(shape.rows),
                            static_cast<int>(shape.columns * static_cast<int64_t>(size) / kSize)};
        launch(copy_blocks_kernel<Piece>, kOp, row_blocks * (shape.rows / kSlab), kBlockThreads, device,
               static_cast<const Piece*>(weight.const_data_ptr()), data<bool>(keep), counts,
               mutable_data<int32_t>(crow), mutable_data<int32_t>(col), static_cast<Piece*>(values.mutable_data_ptr()),
               m);
    });
    return {crow, col, values};
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("prune_to_block", TORCH_BOX(&engine::cuda::prune_to_block)); }
