// The instructions of ptx.cuh, wgmma.cuh and tma.cuh one by one: what every lane gives and gets as a row of a tensor,
// for test_lanes.py.

#include "common/dtype.h"
#include "cuda/ptx.cuh"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace engine::cuda {
namespace {

constexpr const char* kLanes = "engine_lanes";

template <class T, class Acc>
__global__ void multiply_kernel(const FragmentA* a, const FragmentB* b, FragmentD<Acc>* d) {
    FragmentD<Acc> sum{};
    multiply_add(sum, a[threadIdx.x], b[threadIdx.x], T{});
    d[threadIdx.x] = sum;
}
template <class T, class Acc>
__global__ void multiply_sparse_kernel(const FragmentA* a, const uint32_t* metadata, const FragmentB2* b,
                                       FragmentD<Acc>* d) {
    FragmentD<Acc> sum{};
    multiply_add_sparse(sum, a[threadIdx.x], metadata[threadIdx.x], b[threadIdx.x], T{});
    d[threadIdx.x] = sum;
}

template <class T, class Acc>
void multiply_as(const Tensor& a, const std::optional<Tensor>& metadata, const Tensor& b, Tensor& d) {
    const OnDeviceOf device(a);
    const auto* left = static_cast<const FragmentA*>(a.const_data_ptr());
    auto* to = static_cast<FragmentD<Acc>*>(d.mutable_data_ptr());
    if (metadata) {
        launch(multiply_sparse_kernel<T, Acc>, kLanes, 1, kWarp, device, left,
               static_cast<const uint32_t*>(metadata->const_data_ptr()),
               static_cast<const FragmentB2*>(b.const_data_ptr()), to);
    } else {
        launch(multiply_kernel<T, Acc>, kLanes, 1, kWarp, device, left,
               static_cast<const FragmentB*>(b.const_data_ptr()), to);
    }
}

// a int32 [32, 4], metadata int32 [32] or none, b int32 [32, 2] or [32, 4]: registers; `of` has the dtype multiplied.
Tensor multiply(Tensor a, std::optional<Tensor> metadata, Tensor b, Tensor of) {
    const bool int8 = of.scalar_type() == ScalarType::Char;
    Tensor d = new_tensor(a, {kWarp, 4}, int8 ? ScalarType::Int : ScalarType::Float);
    if (int8) {
        multiply_as<int8_t, int32_t>(a, metadata, b, d);
    } else if (of.scalar_type() == ScalarType::Half) {
        multiply_as<Half, float>(a, metadata, b, d);
    } else {
        multiply_as<BFloat16, float>(a, metadata, b, d);
    }
    return d;
}

// Four products of a warpgroup over rows of 128 bytes, or two sparse ones. Tiles come as they lie in shared memory.
template <int kN>
struct WarpgroupTiles {
    alignas(1024) uint4 b[kN * 8], a[64 * 8];
};
enum class WarpgroupA { shared, registers, sparse };
template <int kN, class T, class Acc>
__global__ void warpgroup_kernel(const uint4* a, const uint32_t* metadata, const uint4* b, WarpgroupD<Acc, kN>* d,
                                 WarpgroupA how) {
    ENGINE_DYNAMIC_SHARED(tiles, WarpgroupTiles<kN>);
    const int thread = threadIdx.x, rows_a = how == WarpgroupA::registers ? 0 : how == WarpgroupA::sparse ? 256 : 512;
    for (int i = thread; i < rows_a; i += kWarpgroup) copy_16_async(&tiles.a[i], &a[i]);
    for (int i = thread; i < kN * 8; i += kWarpgroup) tiles.b[i] = b[i];
    copy_commit();
    copy_wait<0>();
    shared_written();
    __syncthreads();
    WarpgroupD<Acc, kN> sum{};
    const uint64_t all_b = shared_tile<128>(tiles.b);
    FragmentA registers[4];  // until the products are waited for
    wgmma_begin();
    if (how == WarpgroupA::sparse) {
        const uint64_t all_a = shared_tile<64>(tiles.a);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            wgmma_sparse(sum, advance(all_a, 32 * i), metadata[2 * thread + i], advance(all_b, 64 * i), T{});
    } else if (how == WarpgroupA::shared) {
        const uint64_t all_a = shared_tile<128>(tiles.a);
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma(sum, advance(all_a, 32 * i), advance(all_b, 32 * i), T{});
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 at = a[4 * thread + i];
            registers[i] = {{at.x, at.y, at.z, at.w}};
            wgmma(sum, registers[i], advance(all_b, 32 * i), T{});
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    d[thread] = sum;
}

template <int kN, class T, class Acc>
Tensor warpgroup_of(const Tensor& a, const std::optional<Tensor>& metadata, const Tensor& b, ScalarType of) {
    Tensor d = new_tensor(a, {kWarpgroup, kN / 2}, of);
    const auto how = metadata                  ? WarpgroupA::sparse
                     : a.size(0) == kWarpgroup ? WarpgroupA::registers
                                               : WarpgroupA::shared;
    launch_with_shared(warpgroup_kernel<kN, T, Acc>, kLanes, 1, kWarpgroup, sizeof(WarpgroupTiles<kN>), OnDeviceOf(a),
                       static_cast<const uint4*>(a.const_data_ptr()),
                       metadata ? static_cast<const uint32_t*>(metadata->const_data_ptr()) : nullptr,
                       static_cast<const uint4*>(b.const_data_ptr()),
                       static_cast<WarpgroupD<Acc, kN>*>(d.mutable_data_ptr()), how);
    return d;
}
template <class T, class Acc>
Tensor warpgroup_by(const Tensor& a, const std::optional<Tensor>& metadata, const Tensor& b, ScalarType of) {
    if (b.size(0) == 16) return warpgroup_of<16, T, Acc>(a, metadata, b, of);
    if (b.size(0) == 32) return warpgroup_of<32, T, Acc>(a, metadata, b, of);
    if (b.size(0) == 64) return warpgroup_of<64, T, Acc>(a, metadata, b, of);
    if (b.size(0) == 128) return warpgroup_of<128, T, Acc>(a, metadata, b, of);
    return warpgroup_of<256, T, Acc>(a, metadata, b, of);
}

// a uint8 [64, 128], or sparse [64, 64], or [128, 64], registers of four products; b uint8 [N, 128]; metadata int32
// [128, 2], registers of two sparse products, or none.
Tensor warpgroup(Tensor a, std::optional<Tensor> metadata, Tensor b, Tensor of) {
    if (of.scalar_type() == ScalarType::Char) return warpgroup_by<int8_t, int32_t>(a, metadata, b, ScalarType::Int);
    if (of.scalar_type() == ScalarType::Half) return warpgroup_by<Half, float>(a, metadata, b, ScalarType::Float);
    return warpgroup_by<BFloat16, float>(a, metadata, b, ScalarType::Float);
}

__global__ void matrices_kernel(const uint4* memory, const int32_t* rows, uint4* out) {
    struct alignas(16) Rows {
        uint4 at[kWarp];
    };
    ENGINE_SHARED(shared, Rows);
    copy_16_async(&shared.at[threadIdx.x], &memory[threadIdx.x]);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    uint32_t at[4];
    load_matrices(at, &shared.at[rows[threadIdx.x]]);
    out[threadIdx.x] = {at[0], at[1], at[2], at[3]};
}

// int32 [32, 4], rows of 16 bytes; int32 [32]: the row whose address each lane gives.
Tensor matrices(Tensor memory, Tensor rows) {
    Tensor out = new_tensor(memory, {kWarp, 4}, ScalarType::Int);
    launch(matrices_kernel, kLanes, 1, kWarp, OnDeviceOf(memory), static_cast<const uint4*>(memory.const_data_ptr()),
           data<int32_t>(rows), static_cast<uint4*>(out.mutable_data_ptr()));
    return out;
}

__global__ void transposed_kernel(const uint4* registers, const int32_t* rows, uint4* out) {
    struct alignas(16) Rows {
        uint4 at[kWarp];
    };
    ENGINE_SHARED(shared, Rows);
    const uint4 mine = registers[threadIdx.x];
    store_matrices_transposed(&shared.at[rows[threadIdx.x]], {mine.x, mine.y, mine.z, mine.w});
    __syncwarp();
    out[threadIdx.x] = shared.at[threadIdx.x];
}

// int32 [32, 4], registers; int32 [32]: the row of 16 bytes whose address each lane gives. int32 [32, 4]: the rows.
Tensor transposed(Tensor registers, Tensor rows) {
    Tensor out = new_tensor(registers, {kWarp, 4}, ScalarType::Int);
    launch(transposed_kernel, kLanes, 1, kWarp, OnDeviceOf(registers),
           static_cast<const uint4*>(registers.const_data_ptr()), data<int32_t>(rows),
           static_cast<uint4*>(out.mutable_data_ptr()));
    return out;
}

__global__ void bytes_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint2* out) {
    const uint32_t i = threadIdx.x;
    out[i] = {byte_permute(a[i], b[i], c[i] & 0x7777u), funnel_right(a[i], b[i], c[i])};
}

// int32 [32] each: [32, 2], prmt of (a, b) by the selector c % 8 a digit, and (b, a) >> c % 32.
Tensor bytes(Tensor a, Tensor b, Tensor c) {
    Tensor out = new_tensor(a, {kWarp, 2}, ScalarType::Int);
    const auto words = [](const Tensor& t) { return static_cast<const uint32_t*>(t.const_data_ptr()); };
    launch(bytes_kernel, kLanes, 1, kWarp, OnDeviceOf(a), words(a), words(b), words(c),
           static_cast<uint2*>(out.mutable_data_ptr()));
    return out;
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine_lanes, CUDA, m) {
    m.impl("multiply", TORCH_BOX(&engine::cuda::multiply));
    m.impl("warpgroup", TORCH_BOX(&engine::cuda::warpgroup));
    m.impl("matrices", TORCH_BOX(&engine::cuda::matrices));
    m.impl("transposed", TORCH_BOX(&engine::cuda::transposed));
    m.impl("bytes", TORCH_BOX(&engine::cuda::bytes));
}
