// bitmap_int8_linear on NVIDIA GPUs: the rows of x become int8, then bitmap_decode.cuh (up to 16 rows), bitmap_tile.cuh
// (more, where there is wgmma) or bitmap_product.cuh multiplies what the bitmap holds. Nothing waits for the GPU. A row
// of the bitmap that is inconsistent gives NaN (bitmap.cuh).

#include "common/dtype.h"
#include "cuda/bitmap_decode.cuh"
#include "cuda/bitmap_product.cuh"
#include "cuda/bitmap_tile.cuh"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {
namespace {

constexpr const char* kBitmapInt8Linear = "bitmap_int8_linear";

void check(const Tensor& x, const Tensor& bitmask, const Tensor& row_offsets, const Tensor& values, const Tensor& scale,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale) {
    STD_TORCH_CHECK(x.dim() >= 1, kBitmapInt8Linear, ": x: expected at least one dimension");
    check_bitmap(kBitmapInt8Linear, bitmask, row_offsets, values, x.size(-1));
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char, kBitmapInt8Linear, ": values: expected int8");
    STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == bitmask.size(0), kBitmapInt8Linear,
                    ": scale: expected float32 [N]");
    check_scales(kBitmapInt8Linear, x, values, scale, bias, input_scale);
}

Tensor bitmap_int8_linear(Tensor x_in, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, Tensor scale_in,
                          std::optional<Tensor> bias_in, std::optional<Tensor> input_scale_in) {
    check(x_in, bitmask_in, row_offsets_in, values_in, scale_in, bias_in, input_scale_in);
    const Tensor x = as_contiguous(x_in), bitmask = as_contiguous(bitmask_in), scale = as_contiguous(scale_in);
    const Tensor row_offsets = as_contiguous(row_offsets_in), values = as_contiguous(values_in);
    const std::optional<Tensor> bias = contiguous_bias(bias_in, "bitmap_int8_linear: bias");
    const auto input_scale = input_scale_in ? std::optional<Tensor>(as_contiguous(*input_scale_in)) : std::nullopt;
    const int64_t n = bitmask.size(0);
    const Rows rows = rows_of(x);
    Tensor y = new_tensor(x, output_sizes(x, n), x.scalar_type());
    const OnDeviceOf device(x);
    const auto w = bitmap_of<int8_t>(bitmask, row_offsets, values, rows.k);
    Int8Output output{{y.mutable_data_ptr(), x.scalar_type()}, nullptr, data<float>(scale), any_float(bias), n};
    const bool few = rows.m <= kDecodeRows;
    if (!few && takes_tiles(rows, device)) {
        const ArrangedRows<int8_t> in(x, rows, input_scale, "bitmap_int8_linear: arrange_kernel", device);
        multiply_bitmap_tiles(w, in, output, "bitmap_int8_linear: product", device);
        return y;
    }
    const QuantizedRows q(x, rows, input_scale, few ? kFragmentStage : kSpan<int8_t>,
                          "bitmap_int8_linear: quantize_kernel", device, few);
    output.row_scale = q.scale;
    if (few) {
        multiply_few(w, Fragments{reinterpret_cast<const uint4*>(q.q), nullptr, static_cast<int>(rows.m)}, output,
                     "bitmap_int8_linear: decode", device);
    } else {
        multiply_bitmap(w, Activations{reinterpret_cast<const uint8_t*>(q.q), rows.m, q.stride}, output, nullptr,
                        "bitmap_int8_linear: product", device);
    }
    return y;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("bitmap_int8_linear", TORCH_BOX(&engine::cuda::bitmap_int8_linear));
}
