// What every reader of a block-sparse weight shares.
//
// A weight [N, K] is cut into blocks of R rows and C columns, both multiples of 16 from 16 to 256: crow_indices int32
// [ceil(N / R) + 1] says where each row of blocks begins, col_indices int32 [B] in which column of blocks each kept one
// stands, ascending within a row, and values [B, R, C] holds them. Blocks checks the indices, O(B), and so makes all of
// it safe to follow.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/tensor.h"

namespace engine {

inline int64_t pieces_of(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // without overflow for any a

struct BlockShape {
    int64_t rows, columns;
};

// Bytes of kept weights up to which asking memory for what comes next costs more than it brings: they stay in a cache.
constexpr int64_t kLeastAsked = 4 << 20;

// Asks for `rows` rows of weights further on than these. Where `far` is 0 the weights stay in a cache, and what lies a
// little further on is asked for, to L1. Else they come from memory: what lies `far` bytes further on is asked for, to
// L2.
template <int rows>
ENGINE_INLINE void ask_ahead(const void* row, int64_t row_bytes, int64_t far) {
    constexpr int64_t kNear = 4 << 10;
    const char* at = static_cast<const char*>(row) + (far > 0 ? far : kNear);
    if (far > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) __builtin_prefetch(at + r * row_bytes, 0, 2);
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) __builtin_prefetch(at + r * row_bytes);
    }
}

inline BlockShape checked_block_shape(const char* op, int64_t rows, int64_t columns) {
    const auto fits = [](int64_t size) { return size >= 16 && size <= 256 && size % 16 == 0; };
    STD_TORCH_CHECK(fits(rows) && fits(columns), op, ": block_shape: expected multiples of 16 from 16 to 256");
    return {rows, columns};
}

// The tensors of a block-sparse weight, contiguous and checked, data included.
struct Blocks {
    Tensor crow_indices, col_indices, values;
    BlockShape shape;
    int64_t n, k;

    Blocks(const char* op, const Tensor& crow, const Tensor& col, const Tensor& blocks, int64_t n, int64_t k)
        : crow_indices(as_contiguous(crow)),
          col_indices(as_contiguous(col)),
          values(as_contiguous(blocks)),
          shape{},
          n(n),
          k(k) {
        STD_TORCH_CHECK(n >= 0 && k >= 0 && values.dim() == 3, op, ": values: expected shape [B, R, C]");
        shape = checked_block_shape(op, values.size(1), values.size(2));
        STD_TORCH_CHECK(crow.scalar_type() == ScalarType::Int && crow.dim() == 1 && crow.size(0) == row_blocks() + 1,
                        op, ": crow_indices: expected int32 [ceil(N / R) + 1]");
        STD_TORCH_CHECK(col.scalar_type() == ScalarType::Int && col.dim() == 1 && col.size(0) == values.size(0), op,
                        ": col_indices: expected int32 [B]");
        offsets_ = data<int32_t>(crow_indices);
        columns_ = data<int32_t>(col_indices);
        blocks_ = data<char>(values);
        kept_ = values.numel();
        check_indices(op);
    }

    // Rows of blocks. What is high and wide elsewhere is a block.
    int64_t row_blocks() const { return pieces_of(n, shape.rows); }
    const int32_t* offsets() const { return offsets_; }
    const int32_t* columns() const { return columns_; }
    template <class V>
    const V* blocks() const {  // [B, R, C]
        return reinterpret_cast<const V*>(blocks_);
    }
    int64_t kept() const { return kept_; }  // weights

  private:
    // Asking the tensors each time would cost a call of torch.
    const int32_t *offsets_ = nullptr, *columns_ = nullptr;
    const char* blocks_ = nullptr;
    int64_t kept_ = 0;

    void check_indices(const char* op) const {
        const int32_t *from = offsets(), *column = columns();
        const int64_t count = values.size(0), column_blocks = pieces_of(k, shape.columns);
        bool good = from[0] == 0 && from[row_blocks()] == count;
        for (int64_t row = 0; row < row_blocks(); ++row) good &= from[row] <= from[row + 1];
        STD_TORCH_CHECK(good, op, ": crow_indices: expected to rise from 0 to the number of blocks");
        for (int64_t row = 0; row < row_blocks(); ++row) {
            for (int64_t i = from[row]; i < from[row + 1]; ++i) {
                good &= column[i] >= 0 && column[i] < column_blocks && (i == from[row] || column[i - 1] < column[i]);
            }
        }
        STD_TORCH_CHECK(good, op, ": col_indices: expected columns of blocks that ascend within a row");
    }
};

}  // namespace engine
