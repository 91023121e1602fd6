// x · wᵀ of a bitmap w by tensor cores, for int8 and for 16-bit floats, whose fragments are the same bytes (ptx.cuh).
//
// decode_kernel, up to 16 rows of x: the bound is the memory that w takes, 0.625 B a weight (int8, half kept) or 1.125
// B (16-bit). A warp has 8 rows of w, whose values come by cp.async into shared memory, one stage (512 B of weights a
// row) ahead of the one that is spread in registers, straight into B fragments. x is operand A and comes from L1 and
// L2: m / 8 B a weight. Issue slots a weight, int8: spread 2.6 (a table entry, two shifts, a permute and a predicated
// refill for each 4), the rest (mask, prefix, x, 4 products) 0.6; an H200 has 4.2 at int8 and 7.5 at 16 bits. The
// summed dimension is split over the warps of a block where rows are too few; how many values come before a warp's part
// it counts.
//
// tile_kernel, above, where there is no wgmma (bitmap_tile.cuh): 128 rows of x by 64 of w by 128 B a step. Every step
// the block spreads its part of w into shared memory, from which ldmatrix and mma.m16n8 read as from a dense one: for
// each 64 · 128 B of w 320 issue slots a warp to spread and 4 · 8 products and 16 ldmatrix: about as many as the
// products take on the tensor cores. No dense copy is ever in device memory. The compressed w is read once for each 128
// rows of x, mostly from L2.
#pragma once

#include <algorithm>

#include "cuda/bitmap.cuh"

namespace engine {

constexpr int kDecodeRows = 16;                  // of x, at most
constexpr int kDecodeWarps = 4, kGroupRows = 8;  // a warp has 8 rows of w
constexpr int kStageSpans = 4;
// A row's values in one stage, with up to 15 bytes before the first and what a lane reads ahead.
constexpr int kStageBytes = kStageSpans * 128 + 32;
constexpr int64_t kExactStages = kExactSpans / kStageSpans;

// Copies 16 bytes of values, of which only those inside [begin, end) are read.
__device__ inline void copy_values(uint8_t* to, const uint8_t* from, const uint8_t* begin, const uint8_t* end) {
    if (from >= begin && from + 16 <= end) return copy_16_async(to, from);
    for (int i = 0; i < 16; ++i)
        if (from + i >= begin && from + i < end) to[i] = from[i];
}

// A lane's share of one stage: its pieces, and where their values lie in the row's copy.
struct Stage {
    uint32_t mask[kStageSpans], first_byte[kStageSpans];
};

// Reads the masks of stage `stage` of a row, begins the copy of its values, and moves `position` past them.
template <class V>
__device__ inline Stage begin_stage(const Bitmap<V>& w, const uint8_t* row_mask, bool readable, int64_t stage,
                                    int64_t& position,
                                    uint8_t* copy) {  // [kStageBytes]
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    Stage mine;
    uint32_t counts = 0;  // of the four spans, a byte each: a quad has at most 128 in a span
#pragma unroll
    for (int i = 0; i < kStageSpans; ++i) {
        const int64_t begin = (stage * kStageSpans + i) * kSpan<V> + t * kPiece<V>;
        mine.mask[i] = readable ? mask_piece(w, row_mask, begin) : 0;
        counts |= static_cast<uint32_t>(__popc(mine.mask[i])) << (8 * i);
    }
    const uint32_t through = sum_through_quad(counts), total = __shfl_sync(kAllLanes, through, lane | 3);
    const auto* from = reinterpret_cast<const uint8_t*>(w.values + position);
    const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) % 16);
    uint32_t before = 0;
#pragma unroll
    for (int i = 0; i < kStageSpans; ++i) {
        const uint32_t own = before + ((through - counts) >> (8 * i) & 0xff);
        mine.first_byte[i] = offset + own * sizeof(V);
        before += total >> (8 * i) & 0xff;
    }
    const uint32_t bytes = before > 0 ? offset + before * sizeof(V) : 0;
    const auto* begin = reinterpret_cast<const uint8_t*>(w.values);
    const auto* end = reinterpret_cast<const uint8_t*>(w.values + w.nnz);
    for (uint32_t at = 16 * t; at < bytes; at += 64) copy_values(copy + at, from - offset + at, begin, end);
    position += before;
    return mine;
}

// The 32 bytes of x that meet a lane's piece; zeros for rows that x does not have.
struct Inputs {
    uint32_t at[8];
};
__device__ inline Inputs load_inputs(const Activations& x, int64_t row, int64_t byte) {
    Inputs in{};
    if (row >= x.m) return in;
    const auto* from = reinterpret_cast<const uint4*>(x.data + row * x.stride + byte);
    const uint4 low = from[0], high = from[1];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

template <class V>
struct DecodeSums {
    FragmentD<Accumulator<V>> sums{}, poison{};  // poison: x · 0, which is NaN for a row that is not finite
    Total<V> total[4] = {};

    __device__ void flush() {
        for (int i = 0; i < 4; ++i) {
            total[i] += sums.at[i];
            sums.at[i] = 0;
        }
    }
};

template <class V>
__device__ inline void multiply_stage(DecodeSums<V>& out, const Stage& mine, const Activations& x, int64_t stage,
                                      int64_t spans,
                                      const uint8_t* copy,  // [kStageBytes], of this row
                                      const SpreadTable<V>& table) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kStageSpans; ++i) {
        const int64_t span = stage * kStageSpans + i;
        if (span >= spans) return;
        uint32_t weights[8];
        const SharedWords words{reinterpret_cast<const uint32_t*>(copy) + mine.first_byte[i] / 4};
        spread<V>(weights, mine.mask[i], words, mine.first_byte[i] % 4, table);
        const Inputs low = load_inputs(x, g, span * 128 + t * 32), high = load_inputs(x, g + 8, span * 128 + t * 32);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const FragmentA a{{low.at[2 * s], high.at[2 * s], low.at[2 * s + 1], high.at[2 * s + 1]}};
            multiply_add(out.sums, a, FragmentB{{weights[2 * s], weights[2 * s + 1]}}, V{});
            if constexpr (sizeof(V) == 2) multiply_add(out.poison, a, FragmentB{{0, 0}}, V{});
        }
    }
}

// `slices` (1, 2 or 4) warps share the summed dimension of 8 rows of w.
template <class V, class Output>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    decode_kernel(Bitmap<V> w, Activations x, Output output, int slices) {
    struct alignas(16) Copies {
        uint8_t at[kDecodeWarps][2][kGroupRows][kStageBytes];
    };
    ENGINE_SHARED(copies, Copies);
    ENGINE_SHARED(table, SpreadTable<V>);
    ENGINE_SHARED(counts, int64_t[kDecodeWarps][kGroupRows]);
    ENGINE_SHARED(fits, bool[kDecodeWarps][kGroupRows]);
    ENGINE_SHARED(part, Total<V>[kDecodeWarps][kDecodeRows][kGroupRows]);
    ENGINE_SHARED(poison, float[kDecodeWarps][kDecodeRows]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
    const int groups = kDecodeWarps / slices, group = warp / slices, slice = warp % slices;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * groups * kGroupRows, row = first_row + group * 8 + g;
    const bool has_row = row < w.rows;
    const uint8_t* row_mask = w.mask + (has_row ? row : 0) * w.row_bytes;
    const int64_t spans = spans_of<V>(w.columns), stages = (spans + kStageSpans - 1) / kStageSpans;
    const int64_t each = (stages + slices - 1) / slices;
    const int64_t begin = std::min<int64_t>(slice * each, stages), end = std::min<int64_t>(begin + each, stages);

    make_table<V>(table);
    const int64_t last_span = std::min<int64_t>(end * kStageSpans, spans);
    const int64_t count = has_row ? count_spans(w, row_mask, begin * kStageSpans, last_span, t) : 0;
    const int64_t row_count = sum_of_quad(count);
    if (t == 0) counts[warp][g] = row_count;
    __syncthreads();
    int64_t before = 0, bits = 0;
    for (int i = 0; i < slices; ++i) {
        if (i == slice) before = bits;
        bits += counts[group * slices + i][g];
    }
    const bool readable = has_row && row_fits(w, row, bits);
    if (t == 0) fits[warp][g] = readable;
    int64_t position = readable ? w.row_offsets[row] + before : 0;

    DecodeSums<V> out;
    Stage now{}, next{};
    if (begin < end) now = begin_stage(w, row_mask, readable, begin, position, copies.at[warp][begin % 2][g]);
    copy_commit();
    for (int64_t stage = begin; stage < end; ++stage) {
        if (stage + 1 < end)
            next = begin_stage(w, row_mask, readable, stage + 1, position, copies.at[warp][(stage + 1) % 2][g]);
        copy_commit();
        copy_wait<1>();
        __syncwarp();
        multiply_stage(out, now, x, stage, spans, copies.at[warp][stage % 2][g], table);
        __syncwarp();  // before the copy is written over
        if ((stage - begin + 1) % kExactStages == 0) out.flush();
        now = next;
    }
    out.flush();

    for (int i = 0; i < 4; ++i) part[warp][g + i / 2 * 8][2 * t + i % 2] = out.total[i];
    if (t == 0) {
        poison[warp][g] = static_cast<float>(out.poison.at[0]);
        poison[warp][g + 8] = static_cast<float>(out.poison.at[2]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < groups * kGroupRows * static_cast<int>(x.m); i += kDecodeWarps * kWarp) {
        const int column = i % (groups * kGroupRows), from = column / kGroupRows * slices, r = column % kGroupRows;
        const int token = i / (groups * kGroupRows);
        if (first_row + column >= w.rows) continue;
        Total<V> sum = 0;
        float not_finite = 0;
        for (int s = 0; s < slices; ++s) {
            sum += part[from + s][token][r];
            not_finite += poison[from + s][token];
        }
        output(token, first_row + column, sum, fits[from][r], not_finite);
    }
}

constexpr int kTileM = 128, kTileN = 64, kTileThreads = 256;
constexpr int kWarpM = 32, kWarpN = 32, kWarpsN = kTileN / kWarpN;

__device__ inline void load_tile(uint8_t* tile,  // [kTileM, 128]
                                 const Activations& x, int64_t first, int64_t span) {
    for (int i = threadIdx.x; i < kTileM * 8; i += kTileThreads) {
        const int64_t row = std::min<int64_t>(first + i / 8, x.m - 1);  // beyond: computed, and never written
        copy_16_async(tile + chunk_at(i / 8, i % 8), x.data + row * x.stride + span * 128 + i % 8 * 16);
    }
}

template <class V>
struct TileSums {
    FragmentD<Accumulator<V>> at[kWarpM / 16][kWarpN / 8];
};

// One step: what a warp multiplies of two tiles in shared memory.
template <class V>
__device__ inline void multiply_tile(TileSums<V>& sums,
                                     const uint8_t* x,  // [kTileM, 128]
                                     const uint8_t* w,  // [kTileN, 128]
                                     int warp_m, int warp_n) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        FragmentA a[kWarpM / 16];
        uint32_t b[kWarpN / 16][4];  // of two fragments: low, high, low, high
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i)
            load_matrices(a[i].at, x + chunk_at(warp_m + i * 16 + lane % 16, 2 * s + lane / 16));
#pragma unroll
        for (int i = 0; i < kWarpN / 16; ++i)
            load_matrices(b[i], w + chunk_at(warp_n + i * 16 + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
            for (int j = 0; j < kWarpN / 8; ++j)
                multiply_add(sums.at[i][j], a[i], FragmentB{{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}}, V{});
        }
    }
}

// kLong: sums are widened every kExactSpans. `poison` [m] is NaN for a row of x that is not finite, else 0; or null.
template <bool kLong, class V, class Output>
__global__ void __launch_bounds__(kTileThreads, kLong ? 1 : 2)
    tile_kernel(Bitmap<V> w, Activations x, Output output, const float* poison, int64_t tiles_m) {
    struct alignas(128) Tiles {
        uint8_t x[2][kTileM * 128], w[kTileN * 128];
    };
    ENGINE_SHARED(tiles, Tiles);
    ENGINE_SHARED(table, SpreadTable<V>);
    ENGINE_SHARED(fits, bool[kTileN]);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane % 4, tile_row = threadIdx.x / 4;
    const int64_t first_m = blockIdx.x % tiles_m * kTileM, first_n = blockIdx.x / tiles_m * kTileN;
    const int64_t row = first_n + tile_row, spans = spans_of<V>(w.columns);
    const uint8_t* row_mask = w.mask + (row < w.rows ? row : 0) * w.row_bytes;
    const auto* begin = reinterpret_cast<const uint8_t*>(w.values);
    const auto* end = reinterpret_cast<const uint8_t*>(w.values + w.nnz);

    if (spans > 0) load_tile(tiles.x[0], x, first_m, 0);
    copy_commit();
    make_table<V>(table);
    const int64_t bits = sum_of_quad(row < w.rows ? count_spans(w, row_mask, 0, spans, t) : 0);
    const bool readable = row < w.rows && row_fits(w, row, bits);
    if (t == 0) fits[tile_row] = readable;
    int64_t position = readable ? w.row_offsets[row] : 0;

    const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
    TileSums<V> sums{};
    Total<V> totals[kLong ? kWarpM / 16 : 1][kLong ? kWarpN / 8 : 1][4] = {};
    uint32_t next = readable ? mask_piece(w, row_mask, t * kPiece<V>) : 0;
    for (int64_t span = 0; span < spans; ++span) {
        const uint32_t mask = next;
        if (readable) next = mask_piece(w, row_mask, (span + 1) * kSpan<V> + t * kPiece<V>);
        copy_wait<0>();
        __syncthreads();  // x is there; what the step before has read may be written over
        if (span + 1 < spans) load_tile(tiles.x[(span + 1) % 2], x, first_m, span + 1);
        copy_commit();
        const uint32_t through = sum_through_quad(__popc(mask)), total = __shfl_sync(kAllLanes, through, lane | 3);
        uint32_t weights[8] = {};
        if (mask != 0) {
            const auto* from = reinterpret_cast<const uint8_t*>(w.values + position + (through - __popc(mask)));
            const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) % 4);
            spread<V>(weights, mask, GlobalWords{from - offset, begin, end}, offset, table);
        }
        position += total;
        auto* low = reinterpret_cast<uint4*>(tiles.w + chunk_at(tile_row, 2 * t));
        auto* high = reinterpret_cast<uint4*>(tiles.w + chunk_at(tile_row, 2 * t + 1));
        *low = {weights[0], weights[1], weights[2], weights[3]};
        *high = {weights[4], weights[5], weights[6], weights[7]};
        __syncthreads();
        multiply_tile<V>(sums, tiles.x[span % 2], tiles.w, warp_m, warp_n);
        if constexpr (kLong) {
            if ((span + 1) % kExactSpans != 0) continue;
            for (int i = 0; i < kWarpM / 16 * (kWarpN / 8) * 4; ++i) {
                auto& sum = sums.at[i / 16][i / 4 % 4].at[i % 4];
                totals[i / 16][i / 4 % 4][i % 4] += sum;
                sum = 0;
            }
        }
    }
    if (spans == 0) __syncthreads();  // `fits` is read by others
#pragma unroll
    for (int i = 0; i < kWarpM / 16 * (kWarpN / 8) * 4; ++i) {
        const int m = warp_m + i / 16 * 16 + lane / 4 + i / 2 % 2 * 8, n = warp_n + i / 4 % 4 * 8 + 2 * t + i % 2;
        if (first_m + m >= x.m || first_n + n >= w.rows) continue;
        Total<V> sum = sums.at[i / 16][i / 4 % 4].at[i % 4];
        if constexpr (kLong) sum += totals[i / 16][i / 4 % 4][i % 4];
        output(first_m + m, first_n + n, sum, fits[n], poison == nullptr ? 0.0f : poison[first_m + m]);
    }
}

// How many warps share the summed dimension: as few as give every scheduler of the GPU four warps.
inline int slices_for(int64_t rows, int processors) {
    int slices = 1;
    while (slices < kDecodeWarps && rows / kGroupRows * slices < 16 * processors) slices *= 2;
    return slices;
}

template <class V, class Output>
void multiply_bitmap(const Bitmap<V>& w, const Activations& x, const Output& output, const float* poison,
                     const char* what, const OnDeviceOf& device) {
    if (x.m == 0 || w.rows == 0) return;
    if (x.m <= kDecodeRows) {
        const int slices = slices_for(w.rows, device.processors());
        const int64_t rows = kDecodeWarps / slices * kGroupRows;
        return launch(decode_kernel<V, Output>, what, (w.rows + rows - 1) / rows, kDecodeWarps * kWarp, device, w, x,
                      output, slices);
    }
    const int64_t tiles_m = (x.m + kTileM - 1) / kTileM, tiles_n = (w.rows + kTileN - 1) / kTileN;
    auto kernel = tile_kernel<false, V, Output>;
    if constexpr (sizeof(V) == 1)
        if (spans_of<V>(w.columns) > kExactSpans) kernel = tile_kernel<true, V, Output>;
    launch(kernel, what, tiles_m * tiles_n, kTileThreads, device, w, x, output, poison, tiles_m);
}

}  // namespace engine
