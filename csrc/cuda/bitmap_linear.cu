// bitmap_linear on NVIDIA GPUs. Nothing waits for the GPU. A row of the bitmap that is inconsistent gives NaN
// (bitmap.cuh).
//
// x and values both float16, or both bfloat16: tensor cores, products summed in fp32 (bitmap_product.cuh). Any other
// pair of dtypes wants products that tensor cores do not make exactly: fp32_kernel multiplies and adds in fp32,
// spreading 64 rows by 32 weights at a time into shared memory. Its bound is the fp32 units' rate, 1 / 15 of the tensor
// cores', but for up to 8 rows of x the memory's: 4 B a kept weight. A thread has one row of w and 2 or 8 of x: 3 loads
// from shared memory for 8 products.

#include "common/dtype.h"
#include "cuda/bitmap_product.cuh"
#include "cuda/quantize_rows.cuh"

namespace engine {
namespace {

constexpr const char* kOp = "bitmap_linear";

struct FloatOutput {
    AnyFloat y;     // [m, n]
    AnyFloat bias;  // [n], or null
    int64_t n;
    __device__ void operator()(int64_t token, int64_t out, float sum, bool fits, float poison) const {
        float value = sum + poison;
        if (bias.at != nullptr) value = value + bias.load(out);
        y.store(token * n + out, fits ? value : std::numeric_limits<float>::quiet_NaN());
    }
};

constexpr int kThreads = 256, kN = 64, kDepth = 32;

// kM rows of x, as fp32 [m, stride] with zeros up to a multiple of kDepth, by kN of w.
template <int kM, class V>
__global__ void __launch_bounds__(kThreads, 4) fp32_kernel(Bitmap<V> w, const float* x, int64_t m, int64_t stride,
                                                           FloatOutput output, const float* poison, int64_t tiles_m) {
    constexpr int kEach = kM / 4;  // of x, for a thread
    struct alignas(16) Tiles {
        float x[kDepth][kM], w[kN][kDepth + 1];
    };
    ENGINE_SHARED(tiles, Tiles);
    ENGINE_SHARED(fits, bool[kN]);
    const int lane = threadIdx.x % kWarp, t = threadIdx.x % 4, tile_row = threadIdx.x / 4;
    const int n = threadIdx.x % kN, m_first = threadIdx.x / kN * kEach;
    const int64_t first_m = blockIdx.x % tiles_m * kM, first_n = blockIdx.x / tiles_m * kN, row = first_n + tile_row;
    const uint8_t* row_mask = w.mask + (row < w.rows ? row : 0) * w.row_bytes;

    int64_t bits = 0;
    if (row < w.rows)
        for (int64_t i = t; i < w.row_bytes; i += 4) bits += __popc(row_mask[i]);
    const int64_t row_bits = sum_of_quad(bits);
    const bool readable = row < w.rows && row_fits(w, row, row_bits);
    if (t == 0) fits[tile_row] = readable;
    int64_t position = readable ? w.row_offsets[row] : 0;
    float total[kEach] = {};
    for (int64_t k = 0; k < w.columns; k += kDepth) {
        for (int i = threadIdx.x; i < kM * kDepth; i += kThreads) {
            const int64_t token = first_m + i / kDepth;
            tiles.x[i % kDepth][i / kDepth] = token < m ? x[token * stride + k + i % kDepth] : 0.0f;
        }
        const int64_t byte = k / 8 + t;
        const uint32_t mask = readable && byte < w.row_bytes ? row_mask[byte] : 0;
        const uint32_t through = sum_through_quad(__popc(mask));
        const V* from = w.values + position + (through - __popc(mask));
#pragma unroll
        for (int i = 0; i < 8; ++i) tiles.w[tile_row][t * 8 + i] = mask >> i & 1 ? to_float(*from++) : 0.0f;
        position += __shfl_sync(kAllLanes, through, lane | 3);
        __syncthreads();
        float sum[kEach] = {};  // of this stretch alone, as errors grow with the length of a sum
#pragma unroll 8
        for (int i = 0; i < kDepth; ++i) {
            const float weight = tiles.w[n][i];
#pragma unroll
            for (int j = 0; j < kEach; ++j) sum[j] = fmaf(tiles.x[i][m_first + j], weight, sum[j]);
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) total[j] += sum[j];
        __syncthreads();
    }
    if (w.columns == 0) __syncthreads();  // `fits` is read by others
    for (int j = 0; j < kEach; ++j) {
        const int64_t token = first_m + m_first + j;
        if (token < m && first_n + n < w.rows) output(token, first_n + n, total[j], fits[n], poison[token]);
    }
}

// x as a kernel takes it: `To` rows with zeros up to a multiple of `multiple`, itself where it is so, and the poison.
template <class To>
struct PreparedRows {
    std::optional<Tensor> memory, poison_memory;
    const To* x;
    float* poison = nullptr;
    int64_t stride;

    template <class T>
    PreparedRows(const Tensor& from, T, Rows rows, int64_t multiple, bool wants_poison, const OnDeviceOf& device)
        : x(static_cast<const To*>(from.const_data_ptr())), stride((rows.k + multiple - 1) / multiple * multiple) {
        const bool as_is = std::is_same_v<T, To> && rows.k == stride && reinterpret_cast<uintptr_t>(x) % 16 == 0;
        if (as_is && !wants_poison) return;
        To* padded = nullptr;
        if (!as_is) {
            memory = new_tensor(from, {rows.m, stride}, std::is_same_v<T, To> ? from.scalar_type() : ScalarType::Float);
            x = padded = mutable_data<To>(*memory);
        }
        poison_memory = new_tensor(from, {rows.m}, ScalarType::Float);
        poison = mutable_data<float>(*poison_memory);
        launch(rows_kernel<T, To>, "bitmap_linear: rows_kernel", rows.m, kRowThreads, device, data<T>(from), padded,
               poison, rows.k, stride);
    }
};

// By tensor cores.
template <class V>
void multiply_16(const Tensor& x, const Bitmap<V>& w, Rows rows, const FloatOutput& output, const OnDeviceOf& device) {
    const PreparedRows<V> in(x, V{}, rows, kSpan<V>, rows.m > kDecodeRows, device);
    multiply_bitmap(w, Activations{reinterpret_cast<const uint8_t*>(in.x), rows.m, in.stride * 2}, output, in.poison,
                    "bitmap_linear: product", device);
}

// In fp32.
template <class V>
void multiply_32(const Tensor& x, const Bitmap<V>& w, Rows rows, const FloatOutput& output, const OnDeviceOf& device) {
    if (rows.m == 0 || w.rows == 0) return;
    dispatch_float(x.scalar_type(), "bitmap_linear: x", [&](auto zero) {
        const PreparedRows<float> in(x, zero, rows, kDepth, true, device);
        const int64_t tile_m = rows.m <= 8 ? 8 : 32, tiles_m = (rows.m + tile_m - 1) / tile_m;
        launch(rows.m <= 8 ? fp32_kernel<8, V> : fp32_kernel<32, V>, "bitmap_linear: fp32_kernel",
               tiles_m * ((w.rows + kN - 1) / kN), kThreads, device, w, in.x, rows.m, in.stride, output, in.poison,
               tiles_m);
    });
}

Tensor bitmap_linear(Tensor x_in, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in,
                     std::optional<Tensor> bias_in) {
    STD_TORCH_CHECK(x_in.dim() >= 1, kOp, ": x: expected at least one dimension");
    check_bitmap(kOp, bitmask_in, row_offsets_in, values_in, x_in.size(-1));
    const int64_t n = bitmask_in.size(0);
    STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == n), kOp, ": bias: expected [N]");
    STD_TORCH_CHECK(values_in.device() == x_in.device() && (!bias_in || bias_in->device() == x_in.device()), kOp,
                    ": x: expected one device for all tensors");
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
        multiply_32(x, w, rows, output, device);
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("bitmap_linear", TORCH_BOX(&engine::bitmap_linear)); }
