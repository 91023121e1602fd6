// x · wᵀ of a bitmap w for up to 16 rows of x, by tensor cores (ptx.cuh): the bound is the memory that w takes, 0.625 B
// a weight (int8, half kept) or 1.125 B (16-bit), and next to it the instructions that spread w.
//
// A block has 8 or 16 rows of w, and each of its warps a slice of their summed dimension. A warp goes through its slice
// in stages of 256 B of weights a row, of which lane t of a quad has 64 B one after another: lane (g, t) row g, and row
// g + 8 where there are 16. Spread in registers, they are the A fragments of eight steps; register 2 s + h is bytes
// [4t, ...) (h = 0) or [16 + 4t, ...) (h = 1) of step s. That is not the order of the summed dimension, but a sum has
// none, as long as x, which is B, is read in the same way: quantize_rows.cuh writes it in the order of these loads. How
// its warps' lanes go through their rows: bitmap_cursor.cuh.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "common/round.h"
#include "cuda/bitmap_cursor.cuh"

namespace engine::cuda {

constexpr int kDecodeRows = 16;  // of x, at most
constexpr int64_t kExactStages = kExactSpans * 128 / kFragmentStage;
// How many blocks a multiprocessor should hold.
template <int kWarps>
constexpr int kDecodeBlocks = 640 / (kWarps * kWarp);

// Rows of x in the order of the loads below.
struct Fragments {
    const uint4* data;    // [stages, 4, 8 or 16 for more than 8 rows, 4]: chunks of 16 bytes
    const float* poison;  // [m]: NaN for a row that is not finite, else 0; or null
    int m;
};

// Asks for what a block will read of `values`, so that L2 has it when the masks are counted.
template <class V>
__device__ inline void prefetch_values(const Bitmap<V>& w, int64_t first_row, int64_t last_row) {
    const int64_t begin = std::max<int64_t>(w.row_offsets[first_row], 0);
    const int64_t most = begin + (last_row - first_row) * w.columns;
    const int64_t end = std::min(std::min(w.row_offsets[last_row], w.nnz), most);
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x * (128 / sizeof(V)); i < end; i += blockDim.x * (128 / sizeof(V)))
        prefetch_to_l2(w.values + i);
}

template <class V, int kTokens, bool kLong>
struct DecodeSums {
    FragmentD<Accumulator<V>> sums[kTokens / 8] = {};
    Total<V> total[kLong ? kTokens / 8 : 1][4] = {};

    __device__ Total<V> at(int i, int j) const {
        if constexpr (kLong) return total[i][j];
        return sums[i].at[j];
    }
    __device__ void flush() {
        if constexpr (kLong) {
#pragma unroll
            for (int i = 0; i < kTokens / 2; ++i) {
                total[i / 4][i % 4] += sums[i / 4].at[i % 4];
                sums[i / 4].at[i % 4] = 0;
            }
        }
    }
};

// The bits of `bytes` of each row's mask, of which the lane's cursor is kLane t bytes on, that one lane of a quad
// counts, by loads that do not wait for each other.
template <int kLane, int kRows>
__device__ inline void count_bits(uint32_t (&count)[kRows], const RowCursor (&rows)[kRows], int bytes, int alignment,
                                  int t) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) count[r] = 0;
    if (alignment == 16) {
#pragma unroll 1
        for (int begin = 16 * t; begin < bytes; begin += 256) {
            const int at = begin - kLane * t;
            uint4 bits[kRows][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    bits[r][i] = begin + 64 * i < bytes ? *reinterpret_cast<const uint4*>(rows[r].mask + at + 64 * i)
                                                        : uint4{0, 0, 0, 0};
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    count[r] +=
                        __popc(bits[r][i].x) + __popc(bits[r][i].y) + __popc(bits[r][i].z) + __popc(bits[r][i].w);
            }
        }
    } else {
#pragma unroll 1
        for (int begin = t; begin < bytes; begin += 16) {
            const int at = begin - kLane * t;
            uint8_t bits[kRows][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int r = 0; r < kRows; ++r) bits[r][i] = begin + 4 * i < bytes ? rows[r].mask[at + 4 * i] : 0;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int r = 0; r < kRows; ++r) count[r] += __popc(bits[r][i]);
            }
        }
    }
}

// B fragments of tokens g and g + 8, where x has them.
template <int kCount>
__device__ inline void load_inputs(uint4 (&out)[kCount], const uint4* from, int g, int m) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (g + 8 * i < m) out[i] = from[32 * i];
}

// Shared memory of a block.
template <class V, int kRows, int kTokens, int kWarps>
union alignas(16) DecodeMemory {
    struct {
        uint8_t at[kWarps][2][kRows][kCopyBytes];
        uint8_t beyond[16];  // a cursor reads ahead
    } copies;
    Total<V> part[kWarps][kRows][kTokens];
};

// Every warp of a block has a slice of the summed dimension. kLong: sums are widened every kExactStages.
template <class V, int kGroups, int kTokens, bool kLong, int kWarps, class Output>
__global__ void __launch_bounds__(kWarps* kWarp, kDecodeBlocks<kWarps>)
    decode_kernel(Bitmap<V> w, Fragments x, Output output, int alignment, Constants constants) {
    constexpr int kRows = kGroups * kGroupRows;
    using Memory = DecodeMemory<V, kRows, kTokens, kWarps>;
    ENGINE_DYNAMIC_SHARED(memory, Memory);
    ENGINE_SHARED(counts, uint32_t[kWarps][kRows]);
    ENGINE_SHARED(fits, bool[kRows]);
    const auto lane = static_cast<int>(kept(threadIdx.x % kWarp));
    const int warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const int slices = static_cast<int>(blockDim.x) / kWarp;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
    const int stages = static_cast<int>((w.columns * sizeof(V) + kFragmentStage - 1) / kFragmentStage);
    const int begin = warp * stages / slices, end = (warp + 1) * stages / slices;

    // All that is to be known before a value can be read, in one round of loads.
    const int mask_begin = begin * kStageMask<V>;
    const int mask_bytes = std::min(end * kStageMask<V>, static_cast<int>(w.row_bytes)) - mask_begin;
    RowCursor rows[kGroups];
    uint32_t count[kGroups];
    Stage<V, kGroups> now{}, next{};
    const auto row_of = [&](int r) { return std::min(first_row + r * kGroupRows + g, w.rows - 1); };
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
        rows[r].mask = w.mask + (row_of(r) * w.row_bytes + mask_begin + 4 * kMaskWords<V> * t);
        rows[r].mask_left = mask_bytes - 4 * kMaskWords<V> * t;
    }
    const RowEnds ends[] = {RowEnds(w, row_of(0)), RowEnds(w, row_of(kGroups - 1))};
    now.load_masks(rows, 0, alignment);
    next.load_masks(rows, kStageMask<V>, alignment);
    count_bits<4 * kMaskWords<V>>(count, rows, mask_bytes, alignment, t);
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
        count[r] = sum_of_quad(count[r]);
        if (t == 0) counts[warp][r * kGroupRows + g] = count[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
        uint32_t before = 0, bits = 0;
#pragma unroll 1
        for (int i = 0; i < slices; ++i) {
            if (i == warp) before = bits;
            bits += counts[i][r * kGroupRows + g];
        }
        const bool readable = ends[r].fit(w, bits) & (first_row + r * kGroupRows + g < w.rows);
        if (warp == 0 && t == 0) fits[r * kGroupRows + g] = readable;
        if (!readable) {
            rows[r].mask_left = 0;
#pragma unroll
            for (int k = 0; k < kMaskWords<V>; ++k) now.mask[r][k] = next.mask[r][k] = 0;
        }
        const auto values = reinterpret_cast<uintptr_t>(w.values), past = values + w.nnz * sizeof(V);
        const uintptr_t from = values + (readable ? (ends[r].begin + before) * sizeof(V) : 0);
        const uintptr_t to = from + (readable ? count[r] * sizeof(V) : 0);
        rows[r].values = reinterpret_cast<const uint8_t*>((from & ~uintptr_t{15}) + 16 * t);
        rows[r].offset = readable ? from & 15 : 0;
        rows[r].copy = kept(shared_address(memory.copies.at[warp][0][r * kGroupRows + g]) + 16 * t);
        rows[r].at_end = (from & ~uintptr_t{15}) < values || ((to + 15) & ~uintptr_t{15}) > past;
    }
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        now.copy(rows, w, i * kRows * kCopyBytes, lane);
        copy_commit();
        std::swap(now, next);
    }
    prefetch_values(w, first_row, std::min(first_row + kRows, w.rows));

    const Selectors<V> selectors(constants);
    DecodeSums<V, kTokens, kLong> out;
    wait_for_previous_kernel();
    const uint4* inputs = x.data + begin * int64_t{16 * kTokens} + lane;
    uint4 b[2][kTokens / 8] = {};  // of a chunk and the next; zeros stay where x has no rows
    if (begin < end) load_inputs(b[0], inputs, g, x.m);
    uint32_t which = 0;  // of the two copies
    for (int stage = begin; stage < end;) {
        int left = kLong ? static_cast<int>(std::min(int64_t{kExactStages}, int64_t{end} - stage)) : end - stage;
#pragma unroll 1
        for (; left > 0; --left, ++stage) {
            Stage<V, kGroups> later{};
            if (stage + 2 < end)
                later.load_masks(rows, static_cast<uint32_t>(stage + 2 - begin) * kStageMask<V>, alignment);
            copy_wait<1>();
            __syncwarp();
            Cursor cursors[kGroups];
#pragma unroll
            for (int r = 0; r < kGroups; ++r) cursors[r].begin(now.first[r]);
#pragma unroll
            for (int chunk = 0; chunk < 4; ++chunk) {
                if (chunk < 3 || stage + 1 < end)
                    load_inputs(b[(chunk + 1) % 2], inputs + (chunk + 1) * 4 * kTokens, g, x.m);
                uint32_t weights[kGroups][4];
                selectors.spread(weights, cursors, now.mask, chunk);
                constexpr int kSecond = kGroups - 1;
                FragmentA a[2];
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    a[s] = {{weights[0][2 * s], weights[kSecond][2 * s], weights[0][2 * s + 1],
                             weights[kSecond][2 * s + 1]}};
                    if (kGroups == 1) a[s].at[1] = a[s].at[3] = 0;
                }
#pragma unroll
                for (int i = 0; i < kTokens / 8; ++i) {
                    const uint4 at = b[chunk % 2][i];
                    multiply_add(out.sums[i], a[0], FragmentB{{at.x, at.y}}, V{});
                    multiply_add(out.sums[i], a[1], FragmentB{{at.z, at.w}}, V{});
                }
            }
            inputs += 16 * kTokens;
            __syncwarp();  // the copy may be written over
            now = next;
            next = later;
            next.copy(rows, w, which, lane);
            which ^= kRows * kCopyBytes;
            copy_commit();
        }
        out.flush();
    }
    copy_wait<0>();   // a stage beyond the last has copied a chunk that nobody reads
    __syncthreads();  // copies are no more
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kGroups; ++j) memory.part[warp][g + j / 2 * 8][8 * i + 2 * t + j % 2] = out.at(i, j);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * x.m; i += blockDim.x) {
        const int r = i % kRows, token = i / kRows;
        if (first_row + r >= w.rows) continue;
        Total<V> sum = 0;
#pragma unroll 1
        for (int s = 0; s < slices; ++s) sum += memory.part[s][r][token];
        output(token, first_row + r, sum, fits[r], x.poison == nullptr ? 0.0f : x.poison[token]);
    }
}

// x [1 to 16, K] in fragments.
template <class V, class Output>
void multiply_few(const Bitmap<V>& w, const Fragments& x, const Output& output, const char* what,
                  const OnDeviceOf& device) {
    if (w.rows == 0 || x.m == 0) return;
    STD_TORCH_CHECK(w.columns <= std::numeric_limits<int32_t>::max(), what, ": more columns than 32 bits count");
    const auto whole = [&](int bytes) { return (reinterpret_cast<uintptr_t>(w.mask) | w.row_bytes) % bytes == 0; };
    const int alignment = whole(16) ? 16 : whole(4) ? 4 : 1;
    const int64_t stages = divide_up(w.columns * static_cast<int64_t>(sizeof(V)), kFragmentStage);
    const auto start = [&](auto groups, auto is_long, auto warps, int64_t most) {
        constexpr int kGroups = decltype(groups)::value, kWarps = decltype(warps)::value;
        constexpr int kRows = kGroups * kGroupRows;
        constexpr bool kLong = decltype(is_long)::value;
        const int64_t slices = std::max<int64_t>(1, std::min({most, int64_t{kWarps}, stages}));
        const auto run = [&](auto kernel, size_t part) {
            const size_t shared = slices * std::max<size_t>(2 * kRows * kCopyBytes, part) + 16;
            launch_dependent(kernel, what, divide_up(w.rows, kRows), static_cast<int>(slices) * kWarp,
                             static_cast<int>(shared), device, w, x, output, alignment, Constants{1, 4});
        };
        if (x.m <= 8) return run(decode_kernel<V, kGroups, 8, kLong, kWarps, Output>, sizeof(Total<V>[kRows][8]));
        run(decode_kernel<V, kGroups, 16, kLong, kWarps, Output>, sizeof(Total<V>[kRows][16]));
    };
    using std::false_type, std::integral_constant, std::true_type;
    constexpr integral_constant<int, 1> one;
    constexpr integral_constant<int, 2> two;
    // 16 rows a block, where that makes three blocks a multiprocessor; else 8, and warps enough to fill it.
    const int64_t fill = std::max<int64_t>(1, 24 * device.processors() * kGroupRows / w.rows);
    if (stages > std::min<int64_t>(fill, 5) * kExactStages)
        return start(one, true_type{}, integral_constant<int, 10>{}, 10);
    if (w.rows >= 48 * device.processors()) return start(two, false_type{}, integral_constant<int, 5>{}, 5);
    start(one, false_type{}, integral_constant<int, 10>{}, fill);
}

}  // namespace engine::cuda
