// semi_structured_linear on NVIDIA GPUs. Nothing waits for the GPU.
//
// x and values both float16, or both bfloat16: the sparse product of the tensor cores, summed in fp32. Any other pair
// of dtypes: fp32_product.cuh, which multiplies by the zeros too.

#include "common/dtype.h"
#include "cuda/fp32_product.cuh"
#include "cuda/semi_structured_warpgroup.cuh"

namespace engine::cuda {
namespace {

constexpr const char* kSemiStructuredLinear = "semi_structured_linear";

// A 2:4 weight as fp32_kernel reads it: a byte of metadata is of 8 weights.
template <class V>
struct SemiStructuredRows : SemiStructured<V> {
    class Reader {
      public:
        __device__ Reader(const SemiStructuredRows& w, int64_t row) : w_(w), row_(row) {}
        __device__ bool fits() const { return true; }
        __device__ void next(int64_t k, float (&out)[8]) {
            const bool inside = row_ < w_.rows && k < w_.columns;
            const unsigned places = inside ? w_.metadata[row_ * w_.row_bytes + k / 8] : 0;
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t at = k / 2 + i;
                value[i] = inside && at < w_.row_values ? to_float(w_.values[row_ * w_.row_values + at]) : 0.0f;
            }
#pragma unroll
            for (unsigned i = 0; i < 8; ++i) {
                const unsigned first = places >> (i / 4 * 4) & 3, second = places >> (i / 4 * 4 + 2) & 3;
                out[i] = second == i % 4 ? value[i / 4 * 2 + 1] : first == i % 4 ? value[i / 4 * 2] : 0.0f;
            }
        }

      private:
        const SemiStructuredRows& w_;
        int64_t row_;
    };
};

Tensor semi_structured_linear(Tensor x_in, Tensor values_in, Tensor metadata_in, std::optional<Tensor> bias_in) {
    STD_TORCH_CHECK(x_in.dim() >= 1, kSemiStructuredLinear, ": x: expected at least one dimension");
    check_semi_structured(kSemiStructuredLinear, values_in, metadata_in, x_in.size(-1));
    const int64_t n = values_in.size(0);
    STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == n), kSemiStructuredLinear,
                    ": bias: expected [N]");
    STD_TORCH_CHECK(values_in.device() == x_in.device() && (!bias_in || bias_in->device() == x_in.device()),
                    kSemiStructuredLinear, ": x: expected one device for all tensors");
    const Tensor x = as_contiguous(x_in), values = as_contiguous(values_in), metadata = as_contiguous(metadata_in);
    const std::optional<Tensor> bias = contiguous_bias(bias_in, "semi_structured_linear: bias");
    const Rows rows = rows_of(x);
    dispatch_float(x.scalar_type(), "semi_structured_linear: x", [](auto) {});
    Tensor y = new_tensor(x, output_sizes(x, n), x.scalar_type());
    const OnDeviceOf device(x);
    const FloatOutput output{{y.mutable_data_ptr(), x.scalar_type()}, any_float(bias), n};
    dispatch_float(values.scalar_type(), "semi_structured_linear: values", [&](auto zero) {
        using V = decltype(zero);
        const SemiStructured<V> w = semi_structured_of<V>(values, metadata, rows.k);
        if constexpr (sizeof(V) == 2) {
            if (x.scalar_type() == values.scalar_type()) {
                const PreparedRows<V> in(x, V{}, rows, kStepWeights<V>, true, "semi_structured_linear: rows_kernel",
                                         device);
                return multiply_semi_structured(
                    w, Activations{reinterpret_cast<const uint8_t*>(in.x), rows.m, in.stride * 2}, output, in.poison,
                    "semi_structured_linear: product", device);
            }
        }
        multiply_fp32(x, SemiStructuredRows<V>{w}, rows, output, "semi_structured_linear: fp32_kernel", device);
    });
    return y;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) {
    m.impl("semi_structured_linear", TORCH_BOX(&engine::cuda::semi_structured_linear));
}
