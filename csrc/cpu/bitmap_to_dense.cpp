// bitmap_to_dense: a bitmap's values spread over a dense matrix, and bitmap_gather, its gradient, the reverse. Both are
// bound by memory and touch each byte once. Values move as bits, so that one body serves every dtype of a size.

#include "common/bitmap.h"
#include "common/bitmap_expand.h"
#include "common/bitmap_pack.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/tensor.h"

namespace engine {
namespace {

template <class W>
void expand(const Tensor& bitmask, const Tensor& row_offsets, const Tensor& values, int64_t k, Tensor& dense) {
    const int64_t rows = bitmask.size(0), nnz = values.numel();
    const uint8_t* masks = data<uint8_t>(bitmask);
    const int64_t* offsets = data<int64_t>(row_offsets);
    const W* packed = data<W>(values);
    W* out = mutable_data<W>(dense);
    const ExpandRow<W> kernel = expand_row<W>();
    BadRow bad;
    parallel_rows(rows, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        std::vector<W> scratch;
        for (int64_t row = begin; row < end; ++row) {
            const uint8_t* mask = masks + row * mask_bytes(k);
            const W* from = row_values(packed, offsets, row, k, nnz, scratch);
            const int64_t taken = kernel(mask, from, k, out + row * k);
            if (taken != offsets[row + 1] - offsets[row] || has_padding_bits(mask, k)) bad.record(row);
        }
    });
    bad.raise("bitmap_to_dense");
}

void check_metadata(const char* op, const Tensor& bitmask, const Tensor& row_offsets, int64_t columns) {
    STD_TORCH_CHECK(bitmask.scalar_type() == ScalarType::Byte && row_offsets.scalar_type() == ScalarType::Long, op,
                    ": expected a uint8 bitmask and int64 row_offsets");
    STD_TORCH_CHECK(columns >= 0 && bitmask.dim() == 2 && bitmask.size(1) == mask_bytes(columns), op,
                    ": bitmask: expected shape [N, ceil(columns / 8)]");
    STD_TORCH_CHECK(row_offsets.dim() == 1 && row_offsets.size(0) == bitmask.size(0) + 1, op,
                    ": row_offsets: expected shape [N + 1]");
}

Tensor bitmap_to_dense(Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, int64_t columns) {
    check_metadata("bitmap_to_dense", bitmask_in, row_offsets_in, columns);
    STD_TORCH_CHECK(values_in.dim() == 1, "bitmap_to_dense: values: expected shape [nnz]");
    const Tensor bitmask = as_contiguous(bitmask_in), row_offsets = as_contiguous(row_offsets_in);
    const Tensor values = as_contiguous(values_in);
    const int64_t rows = bitmask.size(0);
    check_row_offsets("bitmap_to_dense", data<int64_t>(row_offsets), rows, values.numel());
    Tensor dense = new_output(values, {rows, columns}, values.scalar_type());
    switch (values.scalar_type()) {
        case ScalarType::Char:
            expand<uint8_t>(bitmask, row_offsets, values, columns, dense);
            break;
        case ScalarType::Half:
        case ScalarType::BFloat16:
            expand<uint16_t>(bitmask, row_offsets, values, columns, dense);
            break;
        case ScalarType::Float:
            expand<uint32_t>(bitmask, row_offsets, values, columns, dense);
            break;
        default:
            STD_TORCH_CHECK(false, "bitmap_to_dense: values: expected float32, float16, bfloat16 or int8");
    }
    return dense;
}

template <class W>
void gather(const Tensor& dense, const Tensor& bitmask, const Tensor& row_offsets, Tensor& values) {
    const int64_t rows = dense.size(0), k = dense.size(1);
    const uint8_t* masks = data<uint8_t>(bitmask);
    const int64_t* offsets = data<int64_t>(row_offsets);
    const W* from = data<W>(dense);
    W* packed = mutable_data<W>(values);
    const PackRow<W> kernel = pack_row<W>();
    BadRow bad;
    parallel_rows(rows, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const uint8_t* mask = masks + row * mask_bytes(k);
            const int64_t length = offsets[row + 1] - offsets[row];
            if (count_bits(mask, k) != length || has_padding_bits(mask, k)) {  // it would write beyond the row's values
                bad.record(row);
            } else {
                kernel(mask, from + row * k, k, packed + offsets[row], length);
            }
        }
    });
    bad.raise("bitmap_gather");
}

Tensor bitmap_gather(Tensor dense_in, Tensor bitmask_in, Tensor row_offsets_in, int64_t nnz) {
    STD_TORCH_CHECK(dense_in.dim() == 2 && nnz >= 0, "bitmap_gather: expected a dense matrix and nnz of at least 0");
    check_metadata("bitmap_gather", bitmask_in, row_offsets_in, dense_in.size(1));
    STD_TORCH_CHECK(bitmask_in.size(0) == dense_in.size(0),
                    "bitmap_gather: bitmask: expected as many rows as dense has");
    const Tensor dense = as_contiguous(dense_in), bitmask = as_contiguous(bitmask_in);
    const Tensor row_offsets = as_contiguous(row_offsets_in);
    check_row_offsets("bitmap_gather", data<int64_t>(row_offsets), bitmask.size(0), nnz);
    STD_TORCH_CHECK(nnz <= dense.numel(), "bitmap_gather: nnz: expected at most the elements of dense");
    dispatch_float(dense.scalar_type(), "bitmap_gather: dense", [](auto) {});
    Tensor values = new_output(dense, {nnz}, dense.scalar_type());
    if (dense.scalar_type() == ScalarType::Float) {
        gather<uint32_t>(dense, bitmask, row_offsets, values);
    } else {
        gather<uint16_t>(dense, bitmask, row_offsets, values);
    }
    return values;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("bitmap_to_dense", TORCH_BOX(&engine::bitmap_to_dense));
    m.impl("bitmap_gather", TORCH_BOX(&engine::bitmap_gather));
}
