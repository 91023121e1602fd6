// The matrix product of a warpgroup (four warps, 128 threads in a row from a multiple of 128 on), sm_90a's only: D[64,
// N] += A[64, 32 bytes] · B[N, 32 bytes]ᵀ, or with a 2:4 A whose 32 bytes a row stand for 64, · B[N, 64 bytes]ᵀ. B
// comes from shared memory, A from there or from registers. The tensor cores work on while the threads go on: D may be
// read once wgmma_wait says so, and what was read may be written over then.
//
// Which lane holds what is as of one warp's product (ptx.cuh): warp w has rows 16 w to 16 w + 15 of A, its metadata and
// D, in the lanes of a FragmentA, of a sparse product's metadata, and of a FragmentD for each 8 columns. So say the PTX
// manual and CUTLASS (cute/atom/mma_traits_sm90_gmma.hpp: CLayout_64xN, ALayout_64x16, ALayout_64x32;
// mma_traits_sm90_gmma_sparse.hpp: ELayout_64x64 of 8-bit types, ELayout_64x32 of 16-bit ones).
//
// A tile in shared memory begins on 1024 bytes. Its rows have 128 bytes, 16 of which lie at chunk_at (product.cuh), or
// 64 bytes, 16 of which lie at chunk c ^ (row / 2 % 4) of the row: the "128-byte" and "64-byte" swizzles.
#pragma once

#include "cuda/ptx.cuh"

namespace engine::cuda {

constexpr int kWarpgroup = 128;

// D[16 w + g (+ 8)][8 j + 2t (+ 1)] of lane (g, t) of warp w is at[4 j + 0 (+ 2) (+ 1)].
template <class Acc, int kN>
struct WarpgroupD {
    Acc at[kN / 2];
};

// A tile as the instruction wants it told: the address, how far 8 rows lie from the next 8, and the swizzle, of which
// code 1 is of 128 bytes and 2 of 64 (cute/arch/mma_sm90_desc.hpp). All lengths are in units of 16 bytes.
template <int kRowBytes>
__device__ inline uint64_t shared_tile(const void* tile) {
    static_assert(kRowBytes == 64 || kRowBytes == 128);
    constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2, kEightRows = 8 * kRowBytes / 16;
    return kSwizzle << 62 | kEightRows << 32 | uint64_t{1} << 16 | (shared_address(tile) & 0x3ffff) >> 4;
}
// The tile from `bytes` (a multiple of 32) on in every row, within the 64 or 128 of a row. `rows` further on (a
// multiple of 8): rows * the row's bytes.
__device__ inline uint64_t advance(uint64_t tile, int bytes) { return tile + static_cast<uint64_t>(bytes >> 4); }

#if defined(__CUDACC__)

// Before the first product, and before one whose D or registers of A the threads have written.
__device__ inline void wgmma_begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits for all but the last kPending groups that were committed.
template <int kPending>
__device__ inline void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// What this thread has written into shared memory, by stores or cp.async that it has waited for, is seen by products
// that begin after a barrier.
__device__ inline void shared_written() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define ENGINE_D8(c, i)                                                                                         \
    c(d.at[i]), c(d.at[i + 1]), c(d.at[i + 2]), c(d.at[i + 3]), c(d.at[i + 4]), c(d.at[i + 5]), c(d.at[i + 6]), \
        c(d.at[i + 7])
#define ENGINE_D16(c, i) ENGINE_D8(c, i), ENGINE_D8(c, i + 8)
#define ENGINE_D32(c, i) ENGINE_D16(c, i), ENGINE_D16(c, i + 16)
#define ENGINE_D64(c, i) ENGINE_D32(c, i), ENGINE_D32(c, i + 32)
#define ENGINE_D128(c, i) ENGINE_D64(c, i), ENGINE_D64(c, i + 64)
#define ENGINE_OF_TEN(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define ENGINE_NAMES30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " ENGINE_OF_TEN(1) ENGINE_OF_TEN(2)
#define ENGINE_NAMES60 ENGINE_NAMES30 ENGINE_OF_TEN(3) ENGINE_OF_TEN(4) ENGINE_OF_TEN(5)
#define ENGINE_NAMES90 ENGINE_NAMES60 ENGINE_OF_TEN(6) ENGINE_OF_TEN(7) ENGINE_OF_TEN(8)
#define ENGINE_NAMES120 ENGINE_NAMES90 ENGINE_OF_TEN(9) ENGINE_OF_TEN(10) ENGINE_OF_TEN(11)
#define ENGINE_NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ENGINE_NAMES16 ENGINE_NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ENGINE_NAMES32 ENGINE_NAMES30 "%30, %31"
#define ENGINE_NAMES64 ENGINE_NAMES60 "%60, %61, %62, %63"
#define ENGINE_NAMES128 ENGINE_NAMES120 "%120, %121, %122, %123, %124, %125, %126, %127"

// The instruction for N columns, so many registers of D, and the operands after D by their numbers.
#define ENGINE_WGMMA(n, registers, c, name, operands, ...)                                                \
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async" name " {" ENGINE_NAMES##registers \
                 "}, " operands "; }"                                                                     \
                 : ENGINE_D##registers(c, 0)                                                              \
                 : __VA_ARGS__)
// Of one pair of types: k is the depth of a dense product, `more` what follows of a product by shared memory's A, and
// `less` by the registers'.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ENGINE_WGMMA_OF(n, registers, first, second, third, fourth, fifth, Acc, c, T, k, k2, types, more, less)     \
    __device__ inline void wgmma(WarpgroupD<Acc, n>& d, uint64_t a, uint64_t b, T) {                                \
        ENGINE_WGMMA(n, registers, c, ".sync.aligned.m64n" #n k types, "%" #first ", %" #second ", p" more, "l"(a), \
                     "l"(b));                                                                                       \
    }                                                                                                               \
    __device__ inline void wgmma(WarpgroupD<Acc, n>& d, const FragmentA& a, uint64_t b, T) {                        \
        ENGINE_WGMMA(n, registers, c, ".sync.aligned.m64n" #n k types,                                              \
                     "{%" #first ", %" #second ", %" #third ", %" #fourth "}, %" #fifth ", p" less, "r"(a.at[0]),   \
                     "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b));                                             \
    }                                                                                                               \
    __device__ inline void wgmma_sparse(WarpgroupD<Acc, n>& d, uint64_t a, uint32_t metadata, uint64_t b, T) {      \
        ENGINE_WGMMA(n, registers, c, ".sp.sync.aligned.m64n" #n k2 types,                                          \
                     "%" #first ", %" #second ", %" #third ", 0, p" more, "l"(a), "l"(b), "r"(metadata));           \
    }
#else  // compiled, and never called
#define ENGINE_WGMMA_OF(n, registers, first, second, third, fourth, fifth, Acc, c, T, k, k2, types, more, less) \
    __device__ inline void wgmma(WarpgroupD<Acc, n>&, uint64_t, uint64_t, T) { __trap(); }                      \
    __device__ inline void wgmma(WarpgroupD<Acc, n>&, const FragmentA&, uint64_t, T) { __trap(); }              \
    __device__ inline void wgmma_sparse(WarpgroupD<Acc, n>&, uint64_t, uint32_t, uint64_t, T) { __trap(); }
#endif
#define ENGINE_WGMMA_EACH(n, registers, first, second, third, fourth, fifth)                                \
    ENGINE_WGMMA_OF(n, registers, first, second, third, fourth, fifth, int32_t, "+r", int8_t, "k32", "k64", \
                    ".s32.s8.s8", "", "")                                                                   \
    ENGINE_WGMMA_OF(n, registers, first, second, third, fourth, fifth, float, "+f", Half, "k16", "k32",     \
                    ".f32.f16.f16", ", 1, 1, 0, 0", ", 1, 1, 0")                                            \
    ENGINE_WGMMA_OF(n, registers, first, second, third, fourth, fifth, float, "+f", BFloat16, "k16", "k32", \
                    ".f32.bf16.bf16", ", 1, 1, 0, 0", ", 1, 1, 0")

// wgmma(d, a, b, T) and wgmma_sparse(d, a, metadata, b, T), all 128 threads together: d is WarpgroupD, T what the bytes
// are. Volatile, so that their order stays.
ENGINE_WGMMA_EACH(16, 8, 8, 9, 10, 11, 12)
ENGINE_WGMMA_EACH(32, 16, 16, 17, 18, 19, 20)
ENGINE_WGMMA_EACH(64, 32, 32, 33, 34, 35, 36)
ENGINE_WGMMA_EACH(128, 64, 64, 65, 66, 67, 68)
ENGINE_WGMMA_EACH(256, 128, 128, 129, 130, 131, 132)

#else

inline void wgmma_begin() {}
inline void wgmma_commit() { emulated::commit_products(); }
template <int kPending>
void wgmma_wait() {
    emulated::wait_for_products(kPending);
    __syncwarp();
}
inline void shared_written() {}

// kBytes of row `row` of a tile.
template <int kBytes>
void read_row(void* to, uint64_t tile, unsigned row) {
    const unsigned swizzle = static_cast<unsigned>(tile >> 62), row_bytes = swizzle == 1 ? 128 : 64;
    const uint32_t begin = static_cast<uint32_t>(tile & 0x3fff) << 4;
    const uint32_t eight_rows = static_cast<uint32_t>(tile >> 32 & 0x3fff) << 4;
    for (unsigned i = 0; i < kBytes; i += 16) {
        const uint32_t at = begin + row / 8 * eight_rows + row % 8 * row_bytes + i;
        const uint32_t swapped = at ^ (at >> 7 & (row_bytes / 16 - 1)) << 4;
        std::memcpy(static_cast<char*>(to) + i, emulated::at_shared_address(swapped), 16);
    }
}

// What a lane adds to D: rows g and g + 8 of its warp's A by every second pair of columns. The tensor cores may read
// shared memory at once or just before they are waited for, and so one of both is done.
template <class Acc, int kN, class Row>
void begin_product(WarpgroupD<Acc, kN>& d, uint64_t a, uint64_t b, Row row) {
    for (const uint64_t tile : {a, b})
        if (tile != 0 && (tile >> 62 == 0 || tile >> 62 > 2)) emulated::stop("wgmma: not such a tile");
    emulated::begin_product([&d, row] {
        const unsigned t = threadIdx.x % 4;
        const auto low = row(0), high = row(8);
        for (unsigned j = 0; j < kN / 8; ++j) {
            for (unsigned i = 0; i < 4; ++i) {
                Acc& sum = d.at[4 * j + i];
                sum = static_cast<Acc>(sum + (i < 2 ? low : high)(8 * j + 2 * t + i % 2));
            }
        }
    });
}

template <class Acc, int kN, class T>
void wgmma(WarpgroupD<Acc, kN>& d, uint64_t a, uint64_t b, T) {
    const unsigned first = threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
    __syncwarp();
    begin_product(d, a, b, [=](unsigned more) {
        FragmentRow<T> mine;
        read_row<32>(mine.at, a, first + more);
        return [=](unsigned column) {
            FragmentRow<T> other;
            read_row<32>(other.at, b, column);
            return fragment_product(mine, other);
        };
    });
}

template <class Acc, int kN, class T>
void wgmma(WarpgroupD<Acc, kN>& d, const FragmentA& a, uint64_t b, T) {
    const FragmentA issued = a;
    emulated::show(issued);
    FragmentRow<T> rows[2];
    for (unsigned i = 0; i < 4; ++i) {
        const auto part = emulated::shown_by<FragmentA>(threadIdx.x % kWarp / 4 * 4 + i);
        rows[0].set(i, part.at[0], part.at[2]);
        rows[1].set(i, part.at[1], part.at[3]);
    }
    begin_product(d, 0, b, [low = rows[0], high = rows[1], b, issued, registers = &a](unsigned more) {
        if (std::memcmp(registers, &issued, sizeof(issued)) != 0)
            emulated::stop("registers of A were written before their product was waited for");
        return [mine = more == 0 ? low : high, b](unsigned column) {
            FragmentRow<T> other;
            read_row<32>(other.at, b, column);
            return fragment_product(mine, other);
        };
    });
}

template <class Acc, int kN, class T>
void wgmma_sparse(WarpgroupD<Acc, kN>& d, uint64_t a, uint32_t metadata, uint64_t b, T) {
    emulated::show(metadata);
    uint64_t places[2] = {0, 0};  // of rows g and g + 8
    for (unsigned i = 0; i < 4; ++i) {
        const uint64_t part = emulated::shown_by<uint32_t>(threadIdx.x % kWarp / 4 * 4 + i);
        if constexpr (sizeof(T) == 1) {
            places[i % 2] |= part << (32 * (i / 2));
        } else if (i < 2) {
            places[0] |= (part & 0xffff) << (16 * i);
            places[1] |= part >> 16 << (16 * i);
        }
    }
    const unsigned first = threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
    begin_product(d, a, b, [=, low = places[0], high = places[1]](unsigned more) {
        FragmentRow<T> kept;
        read_row<32>(kept.at, a, first + more);
        return [=, which = more == 0 ? low : high](unsigned column) {
            T all[64 / sizeof(T)];
            read_row<64>(all, b, column);
            FragmentRow<T> met;  // the elements of the column that meet those kept
            for (unsigned v = 0; v < 32 / sizeof(T); ++v) met.at[v] = all[v / 2 * 4 + (which >> (2 * v) & 3)];
            return fragment_product(kept, met);
        };
    });
}

#endif

}  // namespace engine::cuda
