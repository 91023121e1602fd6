// int8_scaled_mm on NVIDIA GPUs of sm_90: int8_warpgroup.cuh. Nothing waits for the GPU.

#include <algorithm>

#include "common/dtype.h"
#include "common/round.h"
#include "cuda/int8_warpgroup.cuh"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {
namespace {

constexpr const char* kOp = "int8_scaled_mm";
constexpr int64_t kLongestSum = 131071;  // |products| are at most 128 · 128, so that int32 holds so many

struct Operands {
    Tensor q, weight;
    int64_t m, n, k;
};

template <class Tile, class Y>
void multiply(const Operands& of, const Int8Output& output, const OnDeviceOf& device) {
    constexpr int kTokens = Tile::kTokens, kRows = Tile::kRows;
    const TileOrder tiles{static_cast<int>(divide_up(of.n, kRows)), static_cast<int>(divide_up(of.m, kTokens)),
                          2048 / kRows};
    const auto map_x = tile_map(of.q.const_data_ptr(), of.m, of.k, of.k, kTokens, 128, kOp);
    const auto map_w = tile_map(of.weight.const_data_ptr(), of.n, of.k, of.k, kRows, 128, kOp);
    launch_with_shared(int8_warpgroup_kernel<Tile, Y>, kOp, std::min<int64_t>(device.processors(), tiles.count()),
                       Tile::kThreads, sizeof(typename Tile::Shared), device, map_x, map_w, output, of.m,
                       static_cast<int>(divide_up(of.k, 128)), tiles);
}

// A tile is made in the time that its copies and products take: by an H200, of 128 rows of w by 128 tokens in 0.54, of
// 64 by 128 in 0.37 of what 128 by 256 take. That one is chosen whose waves of tiles end first.
template <class Y>
void multiply_by_best(const Operands& of, const Int8Output& output, const OnDeviceOf& device) {
    const auto time = [&](int rows, int tokens, double of_tile) {
        const int64_t tiles = divide_up(of.n, rows) * divide_up(of.m, tokens);
        return static_cast<double>(divide_up(tiles, device.processors())) * of_tile;
    };
    const double large = time(128, 256, 1.0), middle = time(128, 128, 0.54), small = time(64, 128, 0.37);
    if (large <= std::min(middle, small)) return multiply<DenseTile<2, 256>, Y>(of, output, device);
    if (middle <= small) return multiply<DenseTile<2, 128>, Y>(of, output, device);
    multiply<DenseTile<1, 128>, Y>(of, output, device);
}

Tensor int8_scaled_mm(Tensor q, Tensor token_scale_in, Tensor weight, Tensor scale_in, std::optional<Tensor> bias_in,
                      ScalarType dtype) {
    STD_TORCH_CHECK(q.dim() == 2 && q.scalar_type() == ScalarType::Char && q.is_contiguous(), kOp,
                    ": q: expected contiguous int8 [M, K]");
    const int64_t m = q.size(0), k = q.size(1), n = weight.dim() == 2 ? weight.size(0) : 0;
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.scalar_type() == ScalarType::Char && weight.is_contiguous() && weight.size(1) == k,
        kOp, ": weight: expected contiguous int8 [N, K]");
    const auto is_scale = [](const Tensor& t, int64_t size) {
        return t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == size;
    };
    STD_TORCH_CHECK(is_scale(token_scale_in, m), kOp, ": token_scale: expected float32 [M]");
    STD_TORCH_CHECK(is_scale(scale_in, n), kOp, ": scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == n), kOp, ": bias: expected [N]");
    STD_TORCH_CHECK(weight.device() == q.device() && token_scale_in.device() == q.device() &&
                        scale_in.device() == q.device() && (!bias_in || bias_in->device() == q.device()),
                    kOp, ": q: expected one device for all tensors");
    const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
    STD_TORCH_CHECK(k > 0 && k % 16 == 0 && k <= kLongestSum && aligned(q) && aligned(weight), kOp,
                    ": K: expected a multiple of 16 up to ", kLongestSum, ", and rows that begin on 16 bytes");
    const Tensor token_scale = as_contiguous(token_scale_in), scale = as_contiguous(scale_in);
    const std::optional<Tensor> bias = contiguous_bias(bias_in, "int8_scaled_mm: bias");
    return dispatch_float(dtype, "int8_scaled_mm: dtype", [&](auto zero) {
        using Y = decltype(zero);
        Tensor y = new_tensor(q, {m, n}, dtype);
        const OnDeviceOf device(q);
        STD_TORCH_CHECK(device.has_wgmma(), kOp, ": expected a GPU of compute capability 9.0");
        STD_TORCH_CHECK(std::max(m, n) < 1 << 30 && (n / 64 + 1) * (m / 128 + 1) < 1 << 30, kOp,
                        ": expected fewer rows");
        if (m == 0 || n == 0) return y;
        const Int8Output output{
            {y.mutable_data_ptr(), dtype}, data<float>(token_scale), data<float>(scale), any_float(bias), n};
        multiply_by_best<Y>({q, weight, m, n, k}, output, device);
        return y;
    });
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("int8_scaled_mm", TORCH_BOX(&engine::cuda::int8_scaled_mm)); }
