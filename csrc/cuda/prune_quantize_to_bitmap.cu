// prune_quantize_to_bitmap on NVIDIA GPUs: prune_to_bitmap's kernels, of which the first also takes each row's amax and
// the second writes int8. cuda/prune.cuh has the kernels, their cost, and where the CPU waits for the GPU.

#include "common/dtype.h"
#include "cuda/prune.cuh"

namespace engine {
namespace {

// A kept weight as int8, by its row's scale, which is written on the way.
template <class T>
struct QuantizeValue {
    using Value = int8_t;
    Value* values;         // [nnz]
    const uint32_t* amax;  // [rows]
    float* scale;          // [rows]
    struct Row {
        float inverse;
    };
    __device__ Row row(int64_t row, bool writes) const {
        const RowScale s = row_scale(amax[row]);
        if (writes) scale[row] = s.scale;
        return {s.inverse};
    }
    __device__ Value operator()(T w, Row row) const {
        return row.inverse == 0.0f ? int8_t{0} : quantize_one(to_float(w), row.inverse);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_quantize_to_bitmap(Tensor weight_in, Tensor threshold_in) {
    check_weight(weight_in, threshold_in, "prune_quantize_to_bitmap");
    const Tensor weight = as_contiguous(weight_in);
    const Matrix matrix = matrix_of(weight);
    const Threshold threshold =
        threshold_of(threshold_in, matrix.rows, matrix.columns, "prune_quantize_to_bitmap: threshold");
    Tensor bitmask = new_tensor(weight, {matrix.rows, matrix.row_bytes}, ScalarType::Byte);
    Tensor row_offsets = new_tensor(weight, {matrix.rows + 1}, ScalarType::Long);
    Tensor scale = new_tensor(weight, {matrix.rows}, ScalarType::Float);
    Tensor amax = new_tensor(weight, {matrix.rows}, ScalarType::Int);
    Tensor values = dispatch_float(weight.scalar_type(), "prune_quantize_to_bitmap: weight", [&](auto zero) {
        using T = decltype(zero);
        const OnDeviceOf device(weight);
        auto* amax_bits = reinterpret_cast<uint32_t*>(mutable_data<int32_t>(amax));
        const int64_t nnz = mask_rows<true, T, int64_t>(weight, threshold, bitmask, row_offsets, amax_bits,
                                                        "prune_quantize_to_bitmap: mask_kernel", device);
        Tensor kept = new_tensor(weight, {nnz}, ScalarType::Char);
        fill_rows<T, int64_t>(weight, bitmask, row_offsets,
                              QuantizeValue<T>{mutable_data<int8_t>(kept), amax_bits, mutable_data<float>(scale)},
                              nullptr, "prune_quantize_to_bitmap: fill_kernel", device);
        return kept;
    });
    return {bitmask, row_offsets, values, scale};
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("prune_quantize_to_bitmap", TORCH_BOX(&engine::prune_quantize_to_bitmap));
}
