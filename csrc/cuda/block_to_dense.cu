// block_to_dense on NVIDIA GPUs: one read of what is kept, one write of the matrix, zeros included. A CUDA block has
// some rows and columns of the matrix: from the indices of its row of blocks it notes in shared memory which block
// stands where, and finds what does not fit. The CPU waits once, at the end, to learn whether all fitted.

#include "cuda/blocks.cuh"

namespace engine::cuda {
namespace {

constexpr int kTilePieces = 1024;         // columns of a CUDA block
constexpr int kMostAcross = kTilePieces;  // blocks in them: one of 16 int8 is a piece

template <class Piece>
__global__ void __launch_bounds__(kBlockThreads)
    spread_blocks_kernel(const int32_t* crow_indices,  // [row_blocks + 1]
                         const int32_t* col_indices,   // [count]
                         const Piece* values,          // [count, block_rows, block_pieces]
                         Piece* dense,                 // [rows, row_pieces]
                         BlockMatrix m, int64_t row_blocks, int64_t count, int64_t tiles_across,
                         volatile uint64_t* bad) {
    ENGINE_SHARED(places, int32_t[kMostAcross + 1]);
    const Slab slab(m, blockIdx.x / tiles_across);
    const int64_t begin_piece = blockIdx.x % tiles_across * kTilePieces;
    const int64_t end_piece = std::min(begin_piece + kTilePieces, m.row_pieces);
    const int64_t first_column = begin_piece / m.block_pieces;
    const auto cut = static_cast<int>(begin_piece - first_column * m.block_pieces);  // pieces of its first block
    for (int i = threadIdx.x; i <= kMostAcross; i += kBlockThreads) places[i] = -1;
    __syncthreads();
    const int64_t begin = crow_indices[slab.line], end = crow_indices[slab.line + 1];
    bool fits = begin >= 0 && begin <= end && end <= count;
    fits &= (slab.line > 0 || begin == 0) && (slab.line < row_blocks - 1 || end == count);
    for (int64_t i = begin + threadIdx.x; fits && i < end; i += kBlockThreads) {
        const int64_t column = col_indices[i], before = i > begin ? col_indices[i - 1] : -1;
        if (column <= before || column >= m.column_blocks) {
            *bad = 1;
        } else if (column >= first_column && column - first_column <= kMostAcross) {
            places[column - first_column] = static_cast<int32_t>(i);
        }
    }
    if (!fits) *bad = 1;
    __syncthreads();
    for (int at = threadIdx.x; at < end_piece - begin_piece; at += kBlockThreads) {
        const int column = (cut + at) / m.block_pieces, within = cut + at - column * m.block_pieces;
        const int32_t block = places[column];
        const Piece* from =
            values + (static_cast<int64_t>(block) * m.block_rows + slab.within) * m.block_pieces + within;
        Piece* to = dense + slab.first * m.row_pieces + begin_piece + at;
        Piece moved[kSlab];
#pragma unroll
        for (int i = 0; i < kSlab; ++i) {
            moved[i] = Piece{};
            if (block >= 0) moved[i] = from[i * m.block_pieces];
        }
#pragma unroll
        for (int i = 0; i < kSlab; ++i)
            if (slab.first + i < m.rows) to[i * m.row_pieces] = moved[i];
    }
}

Tensor block_to_dense(Tensor crow_in, Tensor col_in, Tensor values_in, int64_t rows, int64_t columns) {
    constexpr const char* kOp = "block_to_dense";
    STD_TORCH_CHECK(values_in.dim() == 3 && rows >= 0 && columns >= 0, kOp, ": values: expected [B, R, C]");
    const auto size = size_of_blocks(values_in, "block_to_dense: values");
    const BlockShape shape = checked_block_shape(kOp, values_in.size(1), values_in.size(2));
    const int64_t count = values_in.size(0), row_blocks = pieces_of(rows, shape.rows);
    for (const Tensor* indices : {&crow_in, &col_in}) {
        STD_TORCH_CHECK(indices->scalar_type() == ScalarType::Int && indices->dim() == 1 &&
                            indices->size(0) == (indices == &crow_in ? row_blocks + 1 : count) &&
                            indices->device() == values_in.device(),
                        kOp, ": crow_indices, col_indices: expected int32 [ceil(N / R) + 1] and [B] beside values");
    }
    const Tensor crow = as_contiguous(crow_in), col = as_contiguous(col_in), values = as_contiguous(values_in);
    Tensor dense = new_tensor(values, {rows, columns}, values.scalar_type());
    const OnDeviceOf device(values);
    if (row_blocks == 0) {
        STD_TORCH_CHECK(count == 0 && read_back(data<int32_t>(crow), kOp, device) == 0, kOp, ": expected no blocks");
        return dense;
    }
    const HostWord bad(kOp, device);
    const auto row_bytes = columns * static_cast<int64_t>(size);
    dispatch_piece(dense.const_data_ptr(), values.const_data_ptr(), row_bytes, size, [&](auto zero) {
        using Piece = decltype(zero);
        constexpr int64_t kSize = sizeof(Piece);
        const BlockMatrix m{rows, row_bytes / kSize, pieces_of(columns, shape.columns), static_cast<int>(shape.rows),
                            static_cast<int>(shape.columns * static_cast<int64_t>(size) / kSize)};
        const int64_t across = std::max<int64_t>(1, pieces_of(m.row_pieces, kTilePieces));
        launch(spread_blocks_kernel<Piece>, kOp, pieces_of(rows, kSlab) * across, kBlockThreads, device,
               data<int32_t>(crow), data<int32_t>(col), static_cast<const Piece*>(values.const_data_ptr()),
               static_cast<Piece*>(dense.mutable_data_ptr()), m, row_blocks, count, across, bad.on_device());
    });
    STD_TORCH_CHECK(bad.after_all() == 0, kOp, ": expected indices that ascend within the matrix");
    return dense;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("block_to_dense", TORCH_BOX(&engine::cuda::block_to_dense)); }
