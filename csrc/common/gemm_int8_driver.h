// The loops around the microkernels of common/gemm_int8.h, the same for every instruction set. A struct describes the
// microkernel:
//
//   Q                the type of the activations it multiplies
//   kRows, kColumns  the tile that it keeps in registers; kColumns is also the width of a strip of the panel
//   kDepth           how much of K a strip holds: at most kPanelDepth, and kExactDepth is a multiple of it
//   kStrips          how many strips make a group: activations in L1 serve all of them
//   kAsk             whether to ask memory for the next weights while rows are multiplied by these, and for the outputs
//                    before they are written
//   kStripBytes      bytes of a packed strip of kDepth
//   pack(...)        weights to a strip
//   tile(...)        rows × columns sums of one strip, and on the way, where it asks, LinesAhead
//   finish(...)      sums to outputs
//
// One that reads weights row by row, where they lie (RowByRow), packs nothing, asks for LinesAhead::pieces, and has
//
//   kGrain               what the columns of a group may be a multiple of
//   activation_sum(...)  its own QuantizedRows::sum
#pragma once

#include "common/dots_int8_avx2.h"
#include "common/gemm_int8.h"
#include "common/gemm_int8_portable.h"
#include "common/round.h"
#if ENGINE_X86
#include "common/gemm_int8_avx2.h"
#include "common/gemm_int8_avx512.h"
#include "common/gemm_int8_avx_vnni.h"
#endif

namespace engine {

struct PanelScratch;  // tag: what a thread packs and sums in

template <class Kernel>
concept RowByRow = requires { Kernel::kGrain; };

// How a call is cut into tasks.
struct PanelPlan {
    int64_t chunk_rows;  // rows of activations quantised at a time, so that they stay in cache
    int64_t block_rows;  // of these, rows to a task
    int64_t blocks;      // tasks along the rows of a chunk
    int64_t group;       // outputs to a task
    int64_t groups;      // tasks along the outputs
    bool one_stretch;    // K fits one panel: sums need no memory but the tile's
    bool rows_first;     // tasks go through the outputs block by block; a thread quantises its own blocks, to its L2
    bool by_thread;      // without rows_first: each thread quantises the chunk for itself, else all share one
    bool ask_outputs;    // y may not be in the caches
    bool wide;           // K is too long for int32 sums

    int64_t own_rows() const { return rows_first ? block_rows : by_thread ? chunk_rows : 0; }
};

template <class Kernel>
PanelPlan plan_panels(int64_t m, int64_t n, int64_t k, int64_t threads) {
    constexpr int64_t kBlockRows = 1024;        // sums of a task: 256 KB for 64 outputs
    constexpr int64_t kBlockBytes = 400 << 10;  // of activations: most of an L2
    constexpr int64_t kCachedOutputs = 1 << 18;
    const int64_t row_bytes = QuantizedRows<typename Kernel::Q>::stride_for(k) * sizeof(typename Kernel::Q);
    constexpr int64_t kTile = Kernel::kRows;
    PanelPlan plan;
    plan.chunk_rows =
        std::min(m, round_up(std::max<int64_t>(192, kActivationBytes / std::max<int64_t>(1, row_bytes)), kTile));
    constexpr int64_t kGroup = Kernel::kStrips * Kernel::kColumns;
    plan.group = kGroup;
    if constexpr (RowByRow<Kernel>) {
        // Where weights serve one tile memory is what they wait for: small groups, asked for as one stream.
        constexpr int64_t kStreamed = 128 << 10, kFew = 16;
        if (m <= Kernel::kRows) {
            plan.group = std::clamp(round_down(kStreamed / std::max<int64_t>(1, k), 16), int64_t{16}, kGroup);
        }
        int64_t count = divide_up(n, plan.group);
        if (count < kFew * threads) count = round_up(count, threads);  // as many for each
        plan.group = round_up(divide_up(n, count), n < 16 * threads ? Kernel::kGrain : 16);
    }
    plan.groups = divide_up(n, plan.group);
    plan.one_stretch = k <= Kernel::kDepth;
    plan.ask_outputs = m * n > kCachedOutputs;
    plan.wide = k > kExactDepth;
    // Blocks that fit L2, as many for each thread. Each packs the weights again, which costs as much as kPackRows rows:
    // cheaper than to share activations (quantize_by_thread) where that is little of a block.
    constexpr int64_t kPackRows = 6, kQuantizeOutputs = 16;
    int64_t wanted = std::max<int64_t>(1, divide_up(plan.chunk_rows * row_bytes, kBlockBytes));
    wanted = round_up(wanted, threads);
    plan.by_thread = quantize_by_thread(plan.chunk_rows, row_bytes, n, threads);
    plan.rows_first = plan.one_stretch && plan.chunk_rows / wanted >= 10 * kPackRows &&
                      (!plan.by_thread || kPackRows * n * (wanted / threads) <= kQuantizeOutputs * plan.chunk_rows);
    if (!plan.rows_first) {  // few groups are shared out unevenly: cut along the rows too
        wanted = plan.groups % threads == 0 ? 1 : divide_up(4 * threads, plan.groups);
    }
    plan.block_rows = round_up(std::max<int64_t>(48, divide_up(plan.chunk_rows, wanted)), kTile);
    plan.block_rows = std::min(plan.block_rows, round_up(std::min(kBlockRows, plan.chunk_rows), kTile));
    plan.blocks = divide_up(plan.chunk_rows, plan.block_rows);
    return plan;
}

// One thread's memory.
template <class Kernel>
struct PanelMemory {
    static constexpr int64_t kGroup = Kernel::kStrips * Kernel::kColumns;
    static constexpr int64_t kProvider = kGroup * provider_stride(Kernel::kDepth);
    int8_t* provider;  // [kProvider]
    char* strips;      // [kStrips][kStripBytes]
    int32_t* sums;     // [block_rows, kGroup], or one tile's where K fits one stretch
    int64_t* wide;     // [block_rows, kGroup] where K is wide

    static int64_t sum_rows(const PanelPlan& plan) { return plan.one_stretch ? Kernel::kRows : plan.block_rows; }
    static int64_t bytes(const PanelPlan& plan) {
        return kProvider + 64 + Kernel::kStrips * Kernel::kStripBytes +
               sum_rows(plan) * kGroup * static_cast<int64_t>(sizeof(int32_t)) + 64 +
               (plan.wide ? plan.block_rows * kGroup * static_cast<int64_t>(sizeof(int64_t)) : 0) + 64;
    }
    PanelMemory(Scratch<PanelScratch>& scratch, const PanelPlan& plan)
        : provider(scratch.take<int8_t>(kProvider)),
          strips(scratch.take<char>(Kernel::kStrips * Kernel::kStripBytes)),
          sums(scratch.take<int32_t>(sum_rows(plan) * kGroup)),
          wide(plan.wide ? scratch.take<int64_t>(plan.block_rows * kGroup) : nullptr) {}
};

// Adds the lines of outputs that finish() will write: to write a part of a line the cache has to fetch it first.
template <class T>
void ask_outputs(const FinishRows<T>& f, LinesAhead& lines) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t r = 0; r < f.rows; ++r) {
        const T* y = f.call.y + (f.row + r) * f.call.n + f.column;
        for (int64_t j = 0; j < f.columns; j += kLine) lines.add(y + j);
    }
}

// One task: rows [begin, end) of the chunk by the outputs [column, column + columns).
template <class Kernel, class T, class Provider>
void panel_task(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const PanelPlan& plan,
                const PanelMemory<Kernel>& memory, Provider& weights,
                int64_t chunk,  // the call's row that is row 0 of `rows`
                int64_t begin, int64_t end, int64_t column, int64_t columns) {
    constexpr int64_t kGroup = PanelMemory<Kernel>::kGroup;
    const int64_t strips = divide_up(columns, Kernel::kColumns);
    if (plan.wide) std::fill(memory.wide, memory.wide + (end - begin) * kGroup, int64_t{0});
    for (int64_t k0 = 0; k0 == 0 || k0 < call.k; k0 += Kernel::kDepth) {
        const int64_t kc = std::min(Kernel::kDepth, call.k - k0);
        int64_t stride = 0;
        const int8_t* w = weights.block(column, columns, k0, kc, memory.provider, &stride);
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t first = s * Kernel::kColumns;
            Kernel::pack(w + first * stride, stride, std::min(Kernel::kColumns, columns - first), kc,
                         memory.strips + s * Kernel::kStripBytes);
        }
        const bool last = k0 + kc >= call.k;
        // int32 sums begin anew every kExactDepth, at whose end they are added to the wide ones.
        const bool add = k0 % kExactDepth != 0;
        const bool widen = plan.wide && (last || (k0 + kc) % kExactDepth == 0);
        // Tiles of nearly equal height: a tile of one row would leave most registers idle.
        const int64_t tiles = divide_up(end - begin, Kernel::kRows);
        for (int64_t tile = 0, row = begin; tile < tiles; ++tile) {
            const int64_t tile_rows = divide_up(end - row, tiles - tile);
            int32_t* sums = memory.sums + (plan.one_stretch ? 0 : (row - begin) * kGroup);
            const FinishRows<T> f{call, rows.scale + row, rows.sum + row, chunk + row, tile_rows, column, columns};
            LinesAhead lines;
            if (Kernel::kAsk && plan.ask_outputs && last) ask_outputs(f, lines);
            // The next weights, a part with each tile.
            const int64_t next = last ? column + columns : column, next_k = last ? 0 : k0 + kc;
            const int64_t there = std::max<int64_t>(0, std::min(plan.group, call.n - next));
            const int64_t from = there * (row - begin) / (end - begin);
            const int64_t to = there * (row + tile_rows - begin) / (end - begin);
            if constexpr (RowByRow<Kernel>) {
                const bool next_tile = tile + 1 < tiles;
                const auto* x =
                    rows.q + (next_tile ? row + tile_rows : begin) * rows.stride + (next_tile ? k0 : next_k);
                for (int64_t r = 0; tiles > 1 && r < tile_rows; ++r, x += rows.stride) {
                    for (int64_t half = 0; half < kc * static_cast<int64_t>(sizeof *x); half += kc) {
                        lines.add_piece(reinterpret_cast<const char*>(x) + half, columns / 2);
                    }
                }
                if constexpr (requires { weights.at(next, next_k); }) {
                    if (tiles > 1) {
                        for (int64_t j = from; j < to; ++j) lines.add_piece(weights.at(next + j, next_k), columns);
                    } else {
                        const int8_t* piece = weights.at(column + columns, 0) + columns * k0;
                        const int8_t* const end = weights.at(std::min(call.n, column + 2 * columns), 0);
                        for (; piece < end; piece += kc) lines.add_piece(piece, columns);
                    }
                }
            } else if constexpr (Kernel::kAsk && requires { weights.ask(column, columns, k0, kc, lines); }) {
                weights.ask(next + from, to - from, next_k, std::min(Kernel::kDepth, call.k - next_k), lines);
            }
            for (int64_t s = 0; s < strips; ++s) {
                const int64_t first = s * Kernel::kColumns;
                Kernel::tile(tile_rows, std::min(Kernel::kColumns, columns - first), rows.q + row * rows.stride + k0,
                             rows.stride, memory.strips + s * Kernel::kStripBytes, kc, add, sums + first, kGroup,
                             &lines);
            }
            if (widen) {
                int64_t* wide = memory.wide + (row - begin) * kGroup;
                for (int64_t r = 0; r < tile_rows; ++r) {
                    for (int64_t j = 0; j < columns; ++j) wide[r * kGroup + j] += sums[r * kGroup + j];
                }
                if (last) Kernel::finish(f, wide, kGroup);
            } else if (last) {
                Kernel::finish(f, sums, kGroup);
            }
            row += tile_rows;
        }
    }
}

template <class Kernel, class T, class Provider>
void panel_linear(const LinearCall<T>& call, const Provider& weights) {
    using Rows = QuantizedRows<typename Kernel::Q>;
    constexpr int64_t kSerialWork = 1 << 19;  // multiplications that are done before another thread has woken
    const bool serial = call.m * call.n * call.k < kSerialWork;
    const PanelPlan plan = plan_panels<Kernel>(call.m, call.n, call.k,
                                               serial ? 1 : static_cast<int64_t>(torch::stable::get_num_threads()));
    typename ActivationQuantizer<typename Kernel::Q, T>::Sum sum = nullptr;
    if constexpr (RowByRow<Kernel>) sum = Kernel::activation_sum;
    const ActivationQuantizer<typename Kernel::Q, T> quantize(call, sum);
    const bool share = plan.own_rows() == 0;
    ActivationScratch scratch(share ? Rows::scratch_bytes(plan.chunk_rows, call.k) : 0);
    const Rows shared(scratch, share ? plan.chunk_rows : 0, call.k);
    for (int64_t chunk = 0; chunk < call.m; chunk += plan.chunk_rows) {
        const int64_t count = std::min(plan.chunk_rows, call.m - chunk);
        if (share) quantize.all(chunk, count, shared);
        const auto tasks = [&](int64_t first, int64_t last) {
            Scratch<PanelScratch> own(PanelMemory<Kernel>::bytes(plan));
            const PanelMemory<Kernel> memory(own, plan);
            ActivationScratch own_scratch(share ? 0 : Rows::scratch_bytes(plan.own_rows(), call.k));
            const Rows rows = share ? shared : Rows(own_scratch, plan.own_rows(), call.k);
            int64_t held = share ? 0 : -1;  // the row of the chunk that is row 0 of `rows`
            Provider position = weights;
            for (int64_t task = first; task < last; ++task) {
                const int64_t group = plan.rows_first ? task % plan.groups : task / plan.blocks;
                const int64_t block = plan.rows_first ? task / plan.groups : task % plan.blocks;
                const int64_t column = group * plan.group, begin = block * plan.block_rows;
                const int64_t end = std::min(count, begin + plan.block_rows);
                if (begin >= end) continue;
                const int64_t wanted = plan.rows_first ? begin : 0;
                if (held != wanted) {
                    held = wanted;
                    quantize(chunk + held, plan.rows_first ? end - begin : count, rows);
                }
                panel_task<Kernel>(call, rows, plan, memory, position, chunk + held, begin - held, end - held, column,
                                   std::min(plan.group, call.n - column));
            }
        };
        parallel_for_unless(serial, plan.groups * plan.blocks, 1, tasks);
    }
}

template <class T, class Provider>
void int8_panel_linear(const LinearCall<T>& call, const Provider& weights) {
    if (call.m == 0 || call.n == 0) return;
#if ENGINE_X86
    if (isa() == Isa::avx512) return panel_linear<PanelAvx512>(call, weights);
    if (variant() == Variant::avx_vnni) return panel_linear<PanelAvxVnni>(call, weights);
    if (isa() == Isa::avx2) {
        if (call.m <= DotsAvx2::rows(call.k)) return panel_linear<DotsAvx2>(call, weights);
        return panel_linear<PanelAvx2>(call, weights);
    }
#endif
    panel_linear<PanelPortable>(call, weights);
}

}  // namespace engine
