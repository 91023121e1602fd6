// int8_scaled_mm on NVIDIA GPUs of sm_90: int8_warpgroup.cuh. Nothing waits for the GPU.

#include <cstdlib>

#include "common/dtype.h"
#include "cuda/int8_warpgroup.cuh"
#include "cuda/quantize_rows.cuh"

namespace engine {
namespace {

constexpr const char* kOp = "int8_scaled_mm";
constexpr int64_t kLongestSum = 131072;  // |products| are at most 128 · 128, so that int32 holds so many

struct Operands {
    Tensor q, weight;
    Int8Terms terms;
    AnyFloat bias;
    int64_t m, n, k;
};

template <class Tile, class Y>
void multiply(const Operands& of, Tensor& y, const OnDeviceOf& device) {
    constexpr int kTokens = Tile::kTokens, kCluster = Tile::kCluster, kRows = kCluster * Tile::kRows;
    const auto tiles_of = [](int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); };
    const TileOrder tiles{tiles_of(of.n, kRows), tiles_of(of.m, kTokens), 2048 / kRows};
    const auto map_x = tile_map(of.q.const_data_ptr(), of.m, of.k, of.k, kTokens / kCluster, 128, kOp);
    const auto map_w = tile_map(of.weight.const_data_ptr(), of.n, of.k, of.k, Tile::kRows, 128, kOp);
    const int64_t most = device.processors() / kCluster, clusters = static_cast<int64_t>(tiles.rows) * tiles.tokens;
    launch_clusters(int8_warpgroup_kernel<Tile, Y>, kOp, std::min(most, clusters) * kCluster, Tile::kThreads, kCluster,
                    sizeof(typename Tile::Shared), device, map_x, map_w, of.terms,
                    static_cast<Y*>(y.mutable_data_ptr()), of.bias, of.m, of.n, tiles_of(of.k, 128), tiles);
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
        STD_TORCH_CHECK((n / 64 + 1) * (m / 16 + 1) < 0x7fffffff, kOp, ": expected fewer rows");
        if (m == 0 || n == 0) return y;
        const Operands of{q, weight, {data<float>(token_scale), data<float>(scale)}, any_float(bias), m, n, k};
        const char* which = std::getenv("DENSE");
        switch (which ? *which : '1') {
            case '2':
                multiply<DenseTile<2, 1, 256, 2>, Y>(of, y, device);
                break;
            case '3':
                multiply<DenseTile<2, 2, 128, 1>, Y>(of, y, device);
                break;
            case '4':
                multiply<DenseTile<2, 2, 128, 2>, Y>(of, y, device);
                break;
            case '5':
                multiply<DenseTile<1, 1, 256, 1>, Y>(of, y, device);
                break;
            case '6':
                multiply<DenseTile<2, 1, 128, 1>, Y>(of, y, device);
                break;
            case '7':
                multiply<DenseTile<1, 1, 128, 1>, Y>(of, y, device);
                break;
            default:
                multiply<DenseTile<2, 1, 256, 1>, Y>(of, y, device);
        }
        return y;
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CUDA, m) { m.impl("int8_scaled_mm", TORCH_BOX(&engine::int8_scaled_mm)); }
