// prune_to_bitmap: the weights above a threshold, packed by a bitmask. One pass writes the mask and counts, a second
// moves the kept weights by the mask. The second goes backwards, as the end of what the first has read is still in
// cache.

#include "common/bitmap_mask.h"
#include "common/bitmap_pack.h"
#include "common/dtype.h"
#include "common/huge_pages.h"

namespace engine {
namespace {

template <class T, class W>
Tensor prune(const Tensor& weight, const ThresholdRows& threshold, Tensor& bitmask, Tensor& row_offsets) {
    const int64_t rows = weight.size(0), k = weight.size(1);
    uint8_t* masks = mutable_data<uint8_t>(bitmask);
    int64_t* offsets = mutable_data<int64_t>(row_offsets);
    mask_rows<false>(data<T>(weight), threshold, rows, k, masks, offsets, [](int64_t, RowSummary) {});

    Tensor values = new_output(weight, {offsets[rows]}, weight.scalar_type());
    const W* from = data<W>(weight);
    W* packed = mutable_data<W>(values);
    const PackRow<W> kernel = pack_row<W>();
    parallel_rows(rows, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        for (int64_t row = end; row-- > begin;) {
            const int64_t length = offsets[row + 1] - offsets[row];
            kernel(masks + row * mask_bytes(k), from + row * k, k, packed + offsets[row], length);
        }
    });
    return values;
}

std::tuple<Tensor, Tensor, Tensor> prune_to_bitmap(Tensor weight_in, Tensor threshold_in) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_to_bitmap: weight: expected shape [N, K]");
    const Tensor weight = as_contiguous(weight_in);
    const int64_t rows = weight.size(0), k = weight.size(1);
    const ThresholdRows threshold = threshold_rows("prune_to_bitmap", threshold_in, rows, k);
    Tensor bitmask = new_output(weight, {rows, mask_bytes(k)}, ScalarType::Byte);
    Tensor row_offsets = new_tensor(weight, {rows + 1}, ScalarType::Long);
    Tensor values = dispatch_float(weight.scalar_type(), "prune_to_bitmap: weight", [&](auto zero) {
        using T = decltype(zero);
        return prune<T, std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>(weight, threshold, bitmask,
                                                                                row_offsets);
    });
    return {bitmask, row_offsets, values};
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("prune_to_bitmap", TORCH_BOX(&engine::prune_to_bitmap)); }
