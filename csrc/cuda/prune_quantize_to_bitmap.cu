// prune_quantize_to_bitmap on NVIDIA GPUs: prune_to_bitmap's kernels, of which the first also takes each row's amax and
// the second writes int8. cuda/prune_tiles.cuh and cuda/prune.cuh have the kernels, their cost, and where the CPU waits
// for the GPU.

#include "common/dtype.h"
#include "cuda/prune_tiles.cuh"

namespace engine::cuda {
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

// The same for cuda/prune_tiles.cuh. No kept weight is above amax, so that nothing has to be clamped, and the sum by
// which quantize_to_int rounds has the result in its low byte.
template <class T>
struct QuantizeBits {
    using Value = uint8_t;
    Value* values;         // [nnz]
    const uint32_t* amax;  // [rows]
    float* scale;          // [rows]
    struct Row {
        float inverse;
        uint32_t live;  // 0 where all is 0
    };
    __device__ Row row(uint32_t row) const {
        const float inverse = row_scale(amax[row]).inverse;
        return {inverse, inverse == 0.0f ? 0u : ~0u};
    }
    __device__ void start_row(uint32_t row) const { scale[row] = row_scale(amax[row]).scale; }
    __device__ static void prepare(Chunk<T>& chunk, Row row) {
#pragma unroll
        for (uint32_t& word : chunk.words) word &= row.live;
    }
    __device__ static uint32_t value(const Chunk<T>& chunk, int j, Row row) {
        constexpr float kRound = 12582912.0f;
        const uint32_t word = chunk.words[j * sizeof(T) / 4];
        float w;
        if constexpr (std::is_same_v<T, float>) w = std::bit_cast<float>(word);
        if constexpr (std::is_same_v<T, Half>) w = to_float(Half{static_cast<uint16_t>(word >> (16 * (j % 2)))});
        if constexpr (std::is_same_v<T, BFloat16>) w = std::bit_cast<float>(j % 2 ? word & 0xffff0000u : word << 16);
        return std::bit_cast<uint32_t>(w * row.inverse + kRound);
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
        if (by_tiles(weight, threshold)) {
            std::optional<Tensor> kept;
            const auto allocate = [&](int64_t nnz) {
                kept = new_tensor(weight, {nnz}, ScalarType::Char);
                auto* to = static_cast<uint8_t*>(kept->mutable_data_ptr());
                return std::pair{QuantizeBits<T>{to, amax_bits, mutable_data<float>(scale)},
                                 static_cast<int64_t*>(nullptr)};
            };
            pack_by_tiles<true, true, false, T, int64_t>(weight, threshold, mutable_data<uint8_t>(bitmask),
                                                         mutable_data<int64_t>(row_offsets), amax_bits, allocate,
                                                         "prune_quantize_to_bitmap: tiles", device);
            return *kept;
        }
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
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("prune_quantize_to_bitmap", TORCH_BOX(&engine::cuda::prune_quantize_to_bitmap));
}
