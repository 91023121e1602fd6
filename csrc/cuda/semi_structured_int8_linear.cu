// semi_structured_int8_linear on NVIDIA GPUs: the rows of x become int8, then semi_structured.cuh multiplies. Nothing
// waits for the GPU.

#include "common/dtype.h"
#include "cuda/semi_structured_warpgroup.cuh"

namespace engine::cuda {
namespace {

constexpr const char* kSemiStructuredInt8Linear = "semi_structured_int8_linear";

void check(const Tensor& x, const Tensor& values, const Tensor& metadata, const Tensor& scale,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale) {
    STD_TORCH_CHECK(x.dim() >= 1, kSemiStructuredInt8Linear, ": x: expected at least one dimension");
    check_semi_structured(kSemiStructuredInt8Linear, values, metadata, x.size(-1));
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char, kSemiStructuredInt8Linear, ": values: expected int8");
    STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == values.size(0), kSemiStructuredInt8Linear,
                    ": scale: expected float32 [N]");
    check_scales(kSemiStructuredInt8Linear, x, values, scale, bias, input_scale);
}

Tensor semi_structured_int8_linear(Tensor x_in, Tensor values_in, Tensor metadata_in, Tensor scale_in,
                                   std::optional<Tensor> bias_in, std::optional<Tensor> input_scale_in) {
    check(x_in, values_in, metadata_in, scale_in, bias_in, input_scale_in);
    const Tensor x = as_contiguous(x_in), values = as_contiguous(values_in), metadata = as_contiguous(metadata_in);
    const Tensor scale = as_contiguous(scale_in);
    const std::optional<Tensor> bias = contiguous_bias(bias_in, "semi_structured_int8_linear: bias");
    const auto input_scale = input_scale_in ? std::optional<Tensor>(as_contiguous(*input_scale_in)) : std::nullopt;
    const int64_t n = values.size(0);
    const Rows rows = rows_of(x);
    Tensor y = new_tensor(x, output_sizes(x, n), x.scalar_type());
    const OnDeviceOf device(x);
    const QuantizedRows q(x, rows, input_scale, 128, "semi_structured_int8_linear: quantize_kernel", device);
    const Int8Output output{{y.mutable_data_ptr(), x.scalar_type()}, q.scale, data<float>(scale), any_float(bias), n};
    multiply_semi_structured(semi_structured_of<int8_t>(values, metadata, rows.k),
                             Activations{reinterpret_cast<const uint8_t*>(q.q), rows.m, q.stride}, output, nullptr,
                             "semi_structured_int8_linear: product", device);
    return y;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("semi_structured_int8_linear", TORCH_BOX(&engine::cuda::semi_structured_int8_linear));
}
