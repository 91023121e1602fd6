// block_to_dense: kept blocks back at their places, zeros elsewhere.

#include <cstring>

#include "common/block.h"
#include "common/dtype.h"
#include "common/huge_pages.h"

namespace engine {
namespace {

Tensor block_to_dense(Tensor crow_indices, Tensor col_indices, Tensor values, int64_t rows, int64_t columns) {
    const Blocks weight("block_to_dense", crow_indices, col_indices, values, rows, columns);
    if (values.scalar_type() != ScalarType::Char) {
        dispatch_float(values.scalar_type(), "block_to_dense: values", [](auto) {});
    }
    Tensor dense = new_output(weight.values, {rows, columns}, values.scalar_type());
    const auto [high, wide] = weight.shape;
    const int64_t size = static_cast<int64_t>(values.element_size());
    const char* from = static_cast<const char*>(weight.values.const_data_ptr());
    char* to = static_cast<char*>(dense.mutable_data_ptr());
    if (dense.numel() == 0) return dense;  // there is no memory
    parallel_rows(rows, columns * size, [&, high = high, wide = wide](int64_t begin, int64_t end) {
        std::memset(to + begin * columns * size, 0, (end - begin) * columns * size);
        for (int64_t row = begin; row < end; ++row) {
            const int64_t line = row / high;
            for (int64_t i = weight.offsets()[line]; i < weight.offsets()[line + 1]; ++i) {
                const int64_t column = weight.columns()[i] * wide;
                std::memcpy(to + (row * columns + column) * size, from + (i * high + row % high) * wide * size,
                            std::min(wide, columns - column) * size);
            }
        }
    });
    return dense;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("block_to_dense", TORCH_BOX(&engine::block_to_dense)); }
