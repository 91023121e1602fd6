// prune_to_bitmap on NVIDIA GPUs. cuda/prune_tiles.cuh and cuda/prune.cuh have the kernels, their cost, and where the
// CPU waits for the GPU.

#include "common/dtype.h"
#include "cuda/prune_tiles.cuh"

namespace engine::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> prune_to_bitmap(Tensor weight_in, Tensor threshold_in) {
    check_weight(weight_in, threshold_in, "prune_to_bitmap");
    const Tensor weight = as_contiguous(weight_in);
    const Matrix matrix = matrix_of(weight);
    const Threshold threshold = threshold_of(threshold_in, matrix.rows, matrix.columns, "prune_to_bitmap: threshold");
    Tensor bitmask = new_tensor(weight, {matrix.rows, matrix.row_bytes}, ScalarType::Byte);
    Tensor row_offsets = new_tensor(weight, {matrix.rows + 1}, ScalarType::Long);
    Tensor values = dispatch_float(weight.scalar_type(), "prune_to_bitmap: weight", [&](auto zero) {
        using T = decltype(zero);
        const OnDeviceOf device(weight);
        if (by_tiles(weight, threshold)) {
            std::optional<Tensor> kept;
            const auto allocate = [&](int64_t nnz) {
                kept = new_tensor(weight, {nnz}, weight.scalar_type());
                auto* to = static_cast<typename KeepBits<T>::Value*>(kept->mutable_data_ptr());
                return std::pair{KeepBits<T>{to}, static_cast<int64_t*>(nullptr)};
            };
            pack_by_tiles<true, false, false, T, int64_t>(weight, threshold, mutable_data<uint8_t>(bitmask),
                                                          mutable_data<int64_t>(row_offsets), nullptr, allocate,
                                                          "prune_to_bitmap: tiles", device);
            return *kept;
        }
        const int64_t nnz = mask_rows<false, T, int64_t>(weight, threshold, bitmask, row_offsets, nullptr,
                                                         "prune_to_bitmap: mask_kernel", device);
        Tensor kept = new_tensor(weight, {nnz}, weight.scalar_type());
        fill_rows<T, int64_t>(weight, bitmask, row_offsets, KeepValue<T>{mutable_data<T>(kept)}, nullptr,
                              "prune_to_bitmap: fill_kernel", device);
        return kept;
    });
    return {bitmask, row_offsets, values};
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("prune_to_bitmap", TORCH_BOX(&engine::cuda::prune_to_bitmap)); }
