// prune_to_csr on NVIDIA GPUs: prune_to_bitmap's kernels, writing columns in place of a mask. cuda/prune_tiles.cuh and
// cuda/prune.cuh have them and where the CPU waits for the GPU.
//
// Bytes a weight, bf16, half of them kept, int32 columns: 2 to count, 2 + 1 + 2 to pack: 7 where a copy moves 4.

#include "common/dtype.h"
#include "cuda/prune_tiles.cuh"

namespace engine::cuda {
namespace {

template <class T, class I>
std::tuple<Tensor, Tensor, Tensor> prune(const Tensor& weight, Threshold threshold, ScalarType index) {
    const OnDeviceOf device(weight);
    const Matrix matrix = matrix_of(weight);
    Tensor crow_indices = new_tensor(weight, {matrix.rows + 1}, index);
    if (by_tiles(weight, threshold)) {
        std::optional<Tensor> col_indices, values;
        const auto allocate = [&](int64_t nnz) {
            col_indices = new_tensor(weight, {nnz}, index);
            values = new_tensor(weight, {nnz}, weight.scalar_type());
            auto* to = static_cast<typename KeepBits<T>::Value*>(values->mutable_data_ptr());
            return std::pair{KeepBits<T>{to}, mutable_data<I>(*col_indices)};
        };
        pack_by_tiles<false, false, true, T, I>(weight, threshold, nullptr, mutable_data<I>(crow_indices), nullptr,
                                                allocate, "prune_to_csr: tiles", device);
        return {crow_indices, *col_indices, *values};
    }
    Tensor bitmask = new_tensor(weight, {matrix.rows, matrix.row_bytes}, ScalarType::Byte);
    const int64_t nnz =
        mask_rows<false, T, I>(weight, threshold, bitmask, crow_indices, nullptr, "prune_to_csr: mask_kernel", device);
    Tensor col_indices = new_tensor(weight, {nnz}, index);
    Tensor values = new_tensor(weight, {nnz}, weight.scalar_type());
    if (nnz > 0) {
        fill_rows<T, I>(weight, bitmask, crow_indices, KeepValue<T>{mutable_data<T>(values)},
                        mutable_data<I>(col_indices), "prune_to_csr: fill_kernel", device);
    }
    return {crow_indices, col_indices, values};
}

std::tuple<Tensor, Tensor, Tensor> prune_to_csr(Tensor weight_in, Tensor threshold_in) {
    check_weight(weight_in, threshold_in, "prune_to_csr");
    const Tensor weight = as_contiguous(weight_in);
    const Threshold threshold = threshold_of(threshold_in, weight.size(0), weight.size(1), "prune_to_csr: threshold");
    return dispatch_float(weight.scalar_type(), "prune_to_csr: weight", [&](auto zero) {
        using T = decltype(zero);
        if (weight.numel() < int64_t{1} << 31) return prune<T, int32_t>(weight, threshold, ScalarType::Int);
        return prune<T, int64_t>(weight, threshold, ScalarType::Long);
    });
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("prune_to_csr", TORCH_BOX(&engine::cuda::prune_to_csr)); }
