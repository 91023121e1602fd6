// Copies of whole tiles into shared memory by sm_90's tensor memory accelerator, and the barriers in shared memory that
// producers and consumers of tiles wait at: behind names, beside their twins (tests/cuda/emulated/cuda/barriers.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

#include "cuda/ptx.cuh"

namespace engine::cuda {

#if defined(__CUDACC__)

// A matrix in global memory as the accelerator reads tiles of it. A kernel takes it as a `const __grid_constant__`.
struct TileMap {
    CUtensorMap map;
};

// Tiles of [tile_rows, tile_bytes] of a matrix of bytes whose rows begin `stride` apart, zeros beyond its edges.
// tile_bytes is 64 or 128, and the tile lies in shared memory by the swizzle of so many (wgmma.cuh). Data and stride
// are multiples of 16 bytes.
inline TileMap tile_map(const void* data, int64_t rows, int64_t row_bytes, int64_t stride, int tile_rows,
                        int tile_bytes, const char* what) {
    static const auto encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
    }();
    STD_TORCH_CHECK(encode != nullptr, what, ": the driver has no tensor maps");
    TileMap made;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(tile_bytes), static_cast<cuuint32_t>(tile_rows)};
    const cuuint32_t ones[2] = {1, 1};
    const CUresult error = encode(&made.map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides,
                                  box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  tile_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(error == CUDA_SUCCESS, what, ": the driver refuses a tensor map, by error ",
                    static_cast<int>(error));
    return made;
}

// A barrier in shared memory. A phase of it ends with so many arrivals and all bytes that were announced; the first
// phase has parity 0, the next 1, and so on.
struct Barrier {
    uint64_t state;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ENGINE_SM90(...) asm volatile(__VA_ARGS__)
#else
#define ENGINE_SM90(...) __trap()  // compiled, and never called
#endif

__device__ inline void barrier_init(Barrier& barrier, int arrivals) {
    ENGINE_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// What barrier_init did is seen by the accelerator, and after __syncthreads by all threads.
__device__ inline void barriers_ready() { ENGINE_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
__device__ inline void barrier_arrive(Barrier& barrier) {
    ENGINE_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and announces bytes that copy_tile brings in this phase.
__device__ inline void barrier_arrive_and_expect(Barrier& barrier, int bytes) {
    ENGINE_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                "r"(bytes) : "memory");
}
// Arrives when all cp.async that this thread has begun are there.
__device__ inline void barrier_arrive_after_copies(Barrier& barrier) {
    ENGINE_SM90("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Waits for the end of the phase of this parity. Of the first phase's the other parity has ended before.
__device__ inline void barrier_wait(Barrier& barrier, uint32_t parity) {
    ENGINE_SM90(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra.uni ended; "
        "bra.uni "
        "again; ended: }" ::"r"(shared_address(&barrier)),
        "r"(parity) : "memory");
}

// `bytes` one after another, a multiple of 16 as both addresses are; they count for the barrier.
__device__ inline void copy_bytes(void* to_shared, const void* from, int bytes, Barrier& barrier) {
    ENGINE_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    shared_address(to_shared)),
                "l"(from), "r"(bytes), "r"(shared_address(&barrier)) : "memory");
}

// The tile whose first row and byte of a row these are; its bytes count for the barrier.
__device__ inline void copy_tile(void* to_shared, const TileMap& from, int byte, int row, Barrier& barrier) {
    ENGINE_SM90(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to_shared)),
        "l"(&from), "r"(byte), "r"(row), "r"(shared_address(&barrier)) : "memory");
}

// A warpgroup's threads meet.
__device__ inline void warpgroup_barrier() {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + static_cast<int>(threadIdx.x) / 128) : "memory");
}
// How many registers a thread has from now on (a multiple of 8), all warps of a warpgroup alike.
template <int kRegisters>
__device__ inline void take_registers() {
    ENGINE_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
    ENGINE_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8x8 matrices of 16 bits, transposed. Lane l gives the address of row l % 8 (16 bytes) of matrix l / 8 in shared
// memory; at[i] of lane (g, t) is [2t, 2t + 1][g] of matrix i.
__device__ inline void store_matrices_transposed(void* shared_row, const uint32_t (&at)[4]) {
    ENGINE_SM90(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
        "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
}

#undef ENGINE_SM90

// (low, high) as 16-bit floats, rounded to even.
__device__ inline uint32_t pack_16(float low, float high, Half) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
__device__ inline uint32_t pack_16(float low, float high, BFloat16) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

#else

using emulated::Barrier;
using emulated::barrier_arrive;
using emulated::barrier_arrive_after_copies;
using emulated::barrier_arrive_and_expect;
using emulated::barrier_init;
using emulated::barrier_wait;
using emulated::copy_bytes;
using emulated::copy_tile;
using emulated::tile_map;
using emulated::TileMap;
inline void barriers_ready() {}
inline void warpgroup_barrier() { emulated::wait(emulated::State::at_warpgroup_barrier); }
template <int kRegisters>
void take_registers() {
    static_assert(kRegisters % 8 == 0);
}
template <int kRegisters>
void give_registers() {
    static_assert(kRegisters % 8 == 0);
}

inline void store_matrices_transposed(void* shared_row, const uint32_t (&at)[4]) {
    struct Words {
        uint32_t at[4];
    } mine;
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulated::stop("stmatrix: not aligned to 16 bytes");
    std::memcpy(mine.at, at, sizeof(at));
    emulated::show(mine);
    const unsigned matrix = threadIdx.x % kWarp / 8, row = threadIdx.x % 8;
    for (unsigned g = 0; g < 8; ++g) {
        const uint32_t pair = emulated::shown_by<Words>(4 * g + row / 2).at[matrix];
        const auto half = static_cast<uint16_t>(pair >> (16 * (row % 2)));
        std::memcpy(static_cast<char*>(shared_row) + 2 * g, &half, 2);
    }
    __syncwarp();
}

template <class T>
uint32_t pack_16(float low, float high, T) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

#endif

}  // namespace engine::cuda
