// prune_to_block: kept blocks of a weight, one after another, and where they stand.

#include <cstring>

#include "common/block.h"
#include "common/dtype.h"
#include "common/huge_pages.h"

namespace engine {
namespace {

// One block, with zeros beyond the matrix.
void copy_block(const char* weight,  // [n, k] elements of `size` bytes
                int64_t n, int64_t k, int64_t size, const BlockShape& shape, int64_t row, int64_t column, char* out) {
    const int64_t rows = std::min(shape.rows, n - row), columns = std::min(shape.columns, k - column);
    if (rows < shape.rows || columns < shape.columns) std::memset(out, 0, shape.rows * shape.columns * size);
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(out + r * shape.columns * size, weight + ((row + r) * k + column) * size, columns * size);
    }
}

std::tuple<Tensor, Tensor, Tensor> prune_to_block(Tensor weight_in, Tensor keep_in, int64_t block_rows,
                                                  int64_t block_columns) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_to_block: weight: expected shape [N, K]");
    if (weight_in.scalar_type() != ScalarType::Char) {
        dispatch_float(weight_in.scalar_type(), "prune_to_block: weight", [](auto) {});
    }
    const BlockShape shape = checked_block_shape("prune_to_block", block_rows, block_columns);
    const Tensor weight = as_contiguous(weight_in), keep = as_contiguous(keep_in);
    const int64_t n = weight.size(0), k = weight.size(1), size = static_cast<int64_t>(weight.element_size());
    const int64_t row_blocks = pieces_of(n, shape.rows), column_blocks = pieces_of(k, shape.columns);
    STD_TORCH_CHECK(keep.dim() == 2 && keep.scalar_type() == ScalarType::Bool && keep.size(0) == row_blocks &&
                        keep.size(1) == column_blocks && row_blocks * column_blocks < (int64_t{1} << 31),
                    "prune_to_block: keep: expected bool [ceil(N / R), ceil(K / C)]");
    const bool* kept = data<bool>(keep);
    Tensor crow_indices = new_tensor(weight, {row_blocks + 1}, ScalarType::Int);
    int32_t* offsets = mutable_data<int32_t>(crow_indices);
    offsets[0] = 0;
    for (int64_t row = 0; row < row_blocks; ++row) {
        int32_t count = 0;
        for (int64_t column = 0; column < column_blocks; ++column) count += kept[row * column_blocks + column];
        offsets[row + 1] = offsets[row] + count;
    }
    const int64_t blocks = offsets[row_blocks];
    Tensor col_indices = new_tensor(weight, {blocks}, ScalarType::Int);
    Tensor values = new_output(weight, {blocks, shape.rows, shape.columns}, weight.scalar_type());
    int32_t* columns = mutable_data<int32_t>(col_indices);
    const char* from = static_cast<const char*>(weight.const_data_ptr());
    char* to = static_cast<char*>(values.mutable_data_ptr());
    const int64_t block_bytes = shape.rows * shape.columns * size;
    parallel_rows(row_blocks, shape.rows * k * size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            int64_t block = offsets[row];
            for (int64_t column = 0; column < column_blocks; ++column) {
                if (!kept[row * column_blocks + column]) continue;
                columns[block] = static_cast<int32_t>(column);
                copy_block(from, n, k, size, shape, row * shape.rows, column * shape.columns, to + block * block_bytes);
                ++block;
            }
        }
    });
    return {crow_indices, col_indices, values};
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("prune_to_block", TORCH_BOX(&engine::prune_to_block)); }
