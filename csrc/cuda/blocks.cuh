// What prune_to_block and block_to_dense share on NVIDIA GPUs: how a matrix and its kept blocks are cut into pieces
// that a thread moves at once, 16 bytes where rows allow it and else an element.
#pragma once

#include <algorithm>

#include "common/block.h"
#include "cuda/ptx.cuh"

namespace engine::cuda {

constexpr int kBlockThreads = 256, kBlockWarps = kBlockThreads / kWarp;
constexpr int kSlab = 8;  // rows that a CUDA block has, and a thread moves together: blocks have a multiple of it

struct BlockMatrix {
    int64_t rows, row_pieces;  // of the dense matrix
    int64_t column_blocks;     // of the matrix
    int block_rows, block_pieces;
};

// The row of blocks and the rows within it that a CUDA block has; it moves those that are left of the matrix.
struct Slab {
    int64_t line, first;  // the row of blocks, the matrix's row
    int within;           // the first row's place in its blocks
    __device__ Slab(const BlockMatrix& m, int64_t index) {
        const int slabs = m.block_rows / kSlab;
        line = index / slabs;
        within = static_cast<int>(index % slabs) * kSlab;
        first = line * m.block_rows + within;
    }
};

// Calls f with a piece's type: 16 bytes if each of the matrix's rows, at `dense`, begins on such.
template <class F>
void dispatch_piece(const void* dense, const void* blocks, int64_t row_bytes, size_t size, F&& f) {
    const bool aligned = (reinterpret_cast<uintptr_t>(dense) | reinterpret_cast<uintptr_t>(blocks)) % 16 == 0;
    if (aligned && row_bytes % 16 == 0) return f(uint4{});
    if (size == 1) return f(uint8_t{});
    if (size == 2) return f(uint16_t{});
    return f(uint32_t{});
}

inline size_t size_of_blocks(const Tensor& values, const char* what) {
    if (values.scalar_type() == ScalarType::Char) return 1;
    return dispatch_float(values.scalar_type(), what, [](auto zero) { return sizeof(zero); });
}

}  // namespace engine::cuda
