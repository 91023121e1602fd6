// bitmap_linear on NVIDIA GPUs. Nothing waits for the GPU. A row of the bitmap that is inconsistent gives NaN
// (bitmap.cuh).
//
// x and values both float16, or both bfloat16: tensor cores, products summed in fp32 (bitmap_decode.cuh; for more rows
// bitmap_tile.cuh where there is wgmma, else bitmap_product.cuh). Any other pair of dtypes: fp32_product.cuh.

#include "common/dtype.h"
#include "cuda/bitmap_decode.cuh"
#include "cuda/bitmap_product.cuh"
#include "cuda/bitmap_tile.cuh"
#include "cuda/fp32_product.cuh"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {
namespace {

constexpr const char* kBitmapLinear = "bitmap_linear";

// A bitmap as fp32_kernel reads it: a quad has a row, each lane a byte of the mask at a time.
template <class V>
struct BitmapRows : Bitmap<V> {
    class Reader {
      public:
        __device__ Reader(const BitmapRows& w, int64_t row)
            : w_(w), row_mask_(w.mask + (row < w.rows ? row : 0) * w.row_bytes) {
            int64_t bits = 0;
            if (row < w.rows)
                for (int64_t i = threadIdx.x % 4; i < w.row_bytes; i += 4) bits += __popc(row_mask_[i]);
            bits = sum_of_quad(bits);
            fits_ = row < w.rows && row_fits(w, row, bits);
            position_ = fits_ ? w.row_offsets[row] : 0;
        }
        __device__ bool fits() const { return fits_; }
        __device__ void next(int64_t k, float (&out)[8]) {
            const uint32_t mask = fits_ && k < w_.columns ? row_mask_[k / 8] : 0;
            const uint32_t through = sum_through_quad(__popc(mask));
            const V* from = w_.values + position_ + (through - __popc(mask));
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] = mask >> i & 1 ? to_float(*from++) : 0.0f;
            position_ += __shfl_sync(kAllLanes, through, threadIdx.x % kWarp | 3);
        }

      private:
        const BitmapRows& w_;
        const uint8_t* row_mask_;
        int64_t position_;
        bool fits_;
    };
};

// By tensor cores.
template <class V>
void multiply_16(const Tensor& x, const Bitmap<V>& w, Rows rows, const FloatOutput& output, const OnDeviceOf& device) {
    const bool few = rows.m <= kDecodeRows;
    if (!few && takes_tiles(rows, device)) {
        const ArrangedRows<V> in(x, rows, std::nullopt, "bitmap_linear: arrange_kernel", device);
        return multiply_bitmap_tiles(w, in, output, "bitmap_linear: product", device);
    }
    const PreparedRows<V> in(x, V{}, rows, few ? kFragmentStage / sizeof(V) : kSpan<V>, true,
                             "bitmap_linear: rows_kernel", device, few);
    if (few)
        return multiply_few(w, Fragments{reinterpret_cast<const uint4*>(in.x), in.poison, static_cast<int>(rows.m)},
                            output, "bitmap_linear: decode", device);
    multiply_bitmap(w, Activations{reinterpret_cast<const uint8_t*>(in.x), rows.m, in.stride * 2}, output, in.poison,
                    "bitmap_linear: product", device);
}

Tensor bitmap_linear(Tensor x_in, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in,
                     std::optional<Tensor> bias_in) {
    STD_TORCH_CHECK(x_in.dim() >= 1, kBitmapLinear, ": x: expected at least one dimension");
    check_bitmap(kBitmapLinear, bitmask_in, row_offsets_in, values_in, x_in.size(-1));
    const int64_t n = bitmask_in.size(0);
    STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == n), kBitmapLinear, ": bias: expected [N]");
    STD_TORCH_CHECK(values_in.device() == x_in.device() && (!bias_in || bias_in->device() == x_in.device()),
                    kBitmapLinear, ": x: expected one device for all tensors");
    const Tensor x = as_contiguous(x_in), bitmask = as_contiguous(bitmask_in), values = as_contiguous(values_in);
    const Tensor row_offsets = as_contiguous(row_offsets_in);
    const std::optional<Tensor> bias = contiguous_bias(bias_in, "bitmap_linear: bias");
    const Rows rows = rows_of(x);
    dispatch_float(x.scalar_type(), "bitmap_linear: x", [](auto) {});
    Tensor y = new_tensor(x, output_sizes(x, n), x.scalar_type());
    const OnDeviceOf device(x);
    const FloatOutput output{{y.mutable_data_ptr(), x.scalar_type()}, any_float(bias), n};
    dispatch_float(values.scalar_type(), "bitmap_linear: values", [&](auto zero) {
        using V = decltype(zero);
        const Bitmap<V> w = bitmap_of<V>(bitmask, row_offsets, values, rows.k);
        if constexpr (sizeof(V) == 2)
            if (x.scalar_type() == values.scalar_type()) return multiply_16(x, w, rows, output, device);
        multiply_fp32(x, BitmapRows<V>{w}, rows, output, "bitmap_linear: fp32_kernel", device);
    });
    return y;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("bitmap_linear", TORCH_BOX(&engine::cuda::bitmap_linear)); }
