// block_int8_linear for many rows of activations with AVX-512.
//
// The weights are read where they lie: four of an output, 32 bits, are broadcast and multiplied by four activations of
// each of 16 rows, which a vector holds. So it is the activations that are packed, once for each thread that needs them
// and for all rows of blocks, and a row of blocks costs nothing but its products and outputs. Activations are the
// unsigned side of vpdpbusd, shifted by 128; what that makes an output's sums too large by, 128 · (sum of its weights),
// is the same for all rows of activations, and sums begin with it taken away.
#pragma once

#include "common/block.h"
#include "common/block_avx512.h"
#include "common/gemm_int8.h"

namespace engine {

#if ENGINE_X86
struct StripScratch;  // tag: a thread's activations, and what it sums in

// Rows of activations that are packed and multiplied together: two vectors of 16, one where so few are left, or half of
// one, which holds eight activations of each of 8 rows.
constexpr int64_t kGroupRows = 32;
constexpr int64_t group_width(int64_t rows) { return rows > 16 ? 32 : rows > 8 ? 16 : 8; }

// What a tile asks memory for meanwhile, a little at each step: many lines at once would hold up its own loads.
struct StripPrefetch {
    const char* next;                  // blocks that follow: a line for eight columns of a block
    const char *output, *last_output;  // where outputs will be written: a row for each block
    int64_t output_stride;             // bytes
};

// One row of blocks, of which R outputs are wanted.
struct StripBlocks {
    const int8_t* values;    // [count] of [R, wide], `stride` bytes from one to the next
    int64_t stride, wide;    // wide: columns of a block
    const int32_t* columns;  // [count]: where each stands, in blocks
    int64_t count;
};

// The sums of R outputs by `Width` rows of activations. `Wide` is blocks.wide, or 0 for any: GCC then keeps addresses in
// vector registers, and to fetch them waits in line with the products, which costs a sixth.
template <int R, int Width, int Wide>
ENGINE_AVX512 __attribute__((noinline)) void strip_tile(const uint8_t* x,  // [K / 4, Width, 4], or [K / 8, 8, 8]
                                                        StripBlocks blocks,
                                                        const int32_t* start,  // [R]
                                                        StripPrefetch prefetch,
                                                        int32_t* sums) {  // [R, Width]
    constexpr int V = Width == 32 ? 2 : 1, kFours = Width == 8 ? 2 : 1;   // fours of a row that a vector holds
    const int64_t wide = Wide ? Wide : blocks.wide;
    __m512i acc[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            acc[r][v] = kFours == 1 ? _mm512_set1_epi32(start[r]) : _mm512_set1_epi64(static_cast<uint32_t>(start[r]));
        }
    }
    const int8_t* w = blocks.values;
    const int32_t* const end = blocks.columns + blocks.count;
    for (const int32_t* column = blocks.columns; column != end; ++column, w += blocks.stride) {
        ask_to_write(prefetch.output);
        ask_to_write(prefetch.output + 64);
        if (prefetch.output != prefetch.last_output) prefetch.output += prefetch.output_stride;
        const uint8_t* q = x + *column * wide * Width;
        for (int64_t k = 0; k < wide; k += 16) {
#pragma GCC unroll 4
            for (int f = 0; f < 4; f += kFours, q += 64 * V) {
                if (f % 2 == 0) {
                    __builtin_prefetch(prefetch.next, 0, 2);
                    prefetch.next += 64;
                }
                __m512i activations[V];
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) activations[v] = _mm512_load_si512(q + 64 * v);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    std::conditional_t<kFours == 1, int32_t, int64_t> few;
                    std::memcpy(&few, w + r * wide + k + 4 * f, sizeof few);
                    const __m512i weights = kFours == 1 ? _mm512_set1_epi32(few) : _mm512_set1_epi64(few);
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) accumulate_avx512(acc[r][v], activations[v], weights);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            if constexpr (kFours == 1) {
                _mm512_store_si512(sums + (r * V + v) * 16, acc[r][v]);
            } else {  // a row's two sums, one beside the other
                const __m512i both = _mm512_add_epi32(acc[r][v], _mm512_srli_epi64(acc[r][v], 32));
                const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
                _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8 * r),
                                   _mm512_castsi512_si256(_mm512_permutexvar_epi32(even, both)));
            }
        }
    }
}

// The outputs of a strip, which are 16, 32, 48 or 64, by tiles as even as can be: where each begins, and the end.
struct StripTiles {
    int64_t count, first[7];
};
inline const StripTiles& strip_tiles(int64_t outputs) {
    static constexpr StripTiles kTiles[4] = {
        {2, {0, 8, 16}}, {3, {0, 10, 21, 32}}, {4, {0, 12, 24, 36, 48}}, {6, {0, 10, 21, 32, 42, 53, 64}}};
    return kTiles[outputs / 16 - 1];
}

using StripTile = void (*)(const uint8_t*, StripBlocks, const int32_t*, StripPrefetch, int32_t*);

template <int Width, int Wide>
StripTile strip_tile_of(int64_t outputs) {
    if (outputs == 8) return strip_tile<8, Width, Wide>;
    if (outputs == 10) return strip_tile<10, Width, Wide>;
    if (outputs == 11) return strip_tile<11, Width, Wide>;
    return strip_tile<12, Width, Wide>;
}
template <int Width>
StripTile strip_tile_of(int64_t outputs, int64_t wide) {
    if (wide == 16) return strip_tile_of<Width, 16>(outputs);
    if (wide == 32) return strip_tile_of<Width, 32>(outputs);
    if (wide == 64) return strip_tile_of<Width, 64>(outputs);
    return strip_tile_of<Width, 0>(outputs);
}
inline StripTile strip_tile_of(int64_t outputs, int64_t width, int64_t wide) {
    if (width == 32) return strip_tile_of<32>(outputs, wide);
    if (width == 16) return strip_tile_of<16>(outputs, wide);
    return strip_tile_of<8>(outputs, wide);
}

// Of each of four vectors, its lanes of 128 bits summed: [4 vectors, 4 lanes].
ENGINE_AVX512 ENGINE_INLINE __m512i lane_sums_avx512(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i sums = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m512i by_vector = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(by_vector, sums);
}

// Of each of 4 N runs of 16 weights, the sum over all blocks.
template <int N>
ENGINE_AVX512 ENGINE_INLINE void run_sums_avx512(const int8_t* w,  // [count] of [4 N, 16]
                                                 int64_t stride, int64_t count,
                                                 int32_t* sums) {  // [4 N]
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i acc[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) acc[v] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; ++i, w += stride) {
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v) accumulate_avx512(acc[v], ones, _mm512_loadu_si512(w + 64 * v));
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; v += 4) {
        _mm512_store_si512(sums + 4 * v, lane_sums_avx512(acc[v], acc[v + 1], acc[v + 2], acc[v + 3]));
    }
}

// Where the sums of `outputs` outputs begin.
ENGINE_AVX512 inline void strip_start(const StripBlocks& blocks, int64_t outputs,
                                      int32_t* runs,     // [outputs · wide / 16]
                                      int32_t* start) {  // [outputs]
    const int64_t bytes = outputs * blocks.wide;
    int64_t at = 0;
    for (; at + 1024 <= bytes; at += 1024) {
        run_sums_avx512<16>(blocks.values + at, blocks.stride, blocks.count, runs + at / 16);
    }
    for (; at < bytes; at += 256) {
        run_sums_avx512<4>(blocks.values + at, blocks.stride, blocks.count, runs + at / 16);
    }
    const int64_t across = blocks.wide / 16;
    for (int64_t r = 0; r < outputs; ++r) {
        int32_t sum = 0;
        for (int64_t i = 0; i < across; ++i) sum += runs[r * across + i];
        start[r] = -128 * sum;
    }
}

// Up to 16 rows of quantised activations as 16 rows of a group, or 8 as all of one.
ENGINE_AVX512 inline void pack_activations(const int8_t* q,  // [16, stride]
                                           int64_t stride, int64_t k,
                                           uint8_t* to,  // [k / 4, width, 4], or [k / 8, 8, 8]
                                           int64_t width) {
    if (width == 8) {
        for (int64_t i = 0; i < k; i += 8, to += 64) {
            for (int64_t r = 0; r < 8; ++r) std::memcpy(to + 8 * r, q + r * stride + i, 8);
        }
        return;
    }
    for (int64_t i = 0; i < k; i += 16, to += 16 * width) {
        __m512i fours[4];
        transpose_16x4_avx512(q + i, stride, fours);
#pragma GCC unroll 4
        for (int f = 0; f < 4; ++f) _mm512_store_si512(to + 4 * f * width, fours[f]);
    }
}

ENGINE_AVX512 ENGINE_INLINE __m512 load_lanes_avx512(__mmask16 lanes, const float* x) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(lanes, x));
}

// At most 16 outputs of at most 16 rows of activations: whole vectors of outputs, by the transpose of the sums.
template <class T>
ENGINE_AVX512 void finish_square(const FinishRows<T>& f,
                                 const int32_t* sums,  // [16, width]
                                 int64_t width) {
    const auto lanes = static_cast<__mmask16>((1u << f.columns) - 1);
    const __m512 scale = load_lanes_avx512(lanes, f.call.scale + f.column);
    const __m512 bias = f.call.bias ? load_lanes_avx512(lanes, f.call.bias + f.column) : _mm512_setzero_ps();
    T* to = f.call.y + f.row * f.call.n + f.column;
    for (int64_t row = 0; row < f.rows; row += 4) {
        __m512i four[4];
        transpose_16x4_avx512(sums + row, width * static_cast<int64_t>(sizeof *sums), four);
        for (int64_t r = 0; r < std::min<int64_t>(4, f.rows - row); ++r, to += f.call.n) {
            const __m512 by = _mm512_mul_ps(_mm512_set1_ps(f.row_scale[row + r]), scale);
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(four[r]), by);
            if (f.call.bias) y = _mm512_add_ps(y, bias);
            if (f.columns == 16) {
                store_16_avx512(to, y);
            } else {
                alignas(64) T all[16];
                store_16_avx512(all, y);
                std::copy_n(all, f.columns, to);
            }
        }
    }
}

// How rows of activations [0, m) and strips of outputs are shared out: band by band of rows, whose activations then
// stay in a thread's L2, and within a band strip by strip. Threads get equal work, not equally many strips.
struct StripPlan {
    const Blocks& weight;
    int64_t m, groups, slices, bands;

    StripPlan(const Blocks& weight, int64_t m, int64_t threads)
        : weight(weight), m(m), groups(pieces_of(m, kGroupRows)), slices(pieces_of(weight.shape.rows, kStripOutputs)) {
        constexpr int64_t kBandBytes = 640 << 10, kMost = 16;  // groups
        const int64_t group_bytes = std::max<int64_t>(1, weight.k) * kGroupRows;
        bands = pieces_of(groups, std::clamp<int64_t>(kBandBytes / group_bytes, 1, kMost));
        const int64_t shared = pieces_of(bands, threads) * threads;  // so that each thread keeps to bands of its own
        if (groups >= 2 * shared) bands = shared;
    }
    int64_t most_groups() const { return pieces_of(groups, bands); }  // of a band
    int64_t first_group(int64_t band) const { return groups * band / bands; }
    int64_t row(int64_t band) const { return std::min(m, first_group(band) * kGroupRows); }
    int64_t strips() const { return weight.row_blocks() * slices; }
    int64_t tasks() const { return strips() * bands; }
    // In blocks by groups. What a strip takes beside its blocks counts as one.
    int64_t work_before(int64_t task) const {
        const int64_t band = task / strips(), strip = task % strips(), line = strip / slices;
        const auto until = [&](int64_t lines) { return weight.offsets()[lines] + lines; };
        const int64_t first = first_group(band);
        int64_t work = first * until(weight.row_blocks()) * slices;
        if (strip > 0) {
            const int64_t inside = strip % slices * (until(line + 1) - until(line));
            work += (first_group(band + 1) - first) * (until(line) * slices + inside);
        }
        return work;
    }
    int64_t work() const { return work_before(tasks()); }
    // The first task before which there is as much work.
    int64_t task_at(int64_t before) const {
        int64_t low = 0, high = tasks();
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (work_before(middle) < before) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// What a thread works with: a band of activations, by one strip of outputs after the other.
template <class T>
class StripBand {
    static constexpr int64_t kMostWide = 256, kRuns = kStripOutputs * kMostWide / 16;
    static constexpr int64_t kSums = kStripOutputs * kGroupRows;
    const LinearCall<T>& call;
    const Blocks& weight;
    const ActivationQuantizer<int8_t, T>& quantize;
    int64_t k;     // as far as blocks reach
    int64_t step;  // most blocks of a row whose sums int32 holds
    int64_t begin = 0, end = 0;

    uint8_t* packed;     // [groups][k / 4, width, 4]
    float* scale;        // [groups, kGroupRows]
    int32_t* sums;       // [kStripOutputs, width] of a group
    int64_t* wide_sums;  // the same, where int32 doesn't hold them
    int32_t *runs, *start;

  public:
    static int64_t bytes(int64_t groups, int64_t k) {
        using S = Scratch<StripScratch>;
        return S::bytes_for<uint8_t>(groups * kGroupRows * k) + S::bytes_for<float>(groups * kGroupRows) +
               S::bytes_for<int32_t>(kSums) + S::bytes_for<int64_t>(kSums) + S::bytes_for<int32_t>(kRuns) +
               S::bytes_for<int32_t>(kStripOutputs);
    }
    StripBand(Scratch<StripScratch>& scratch, int64_t groups, int64_t k, const LinearCall<T>& call,
              const Blocks& weight, const ActivationQuantizer<int8_t, T>& quantize)
        : call(call),
          weight(weight),
          quantize(quantize),
          k(k),
          step(kExactDepth / weight.shape.columns),
          packed(scratch.take<uint8_t>(groups * kGroupRows * k)),
          scale(scratch.take<float>(groups * kGroupRows)),
          sums(scratch.take<int32_t>(kSums)),
          wide_sums(scratch.take<int64_t>(kSums)),
          runs(scratch.take<int32_t>(kRuns)),
          start(scratch.take<int32_t>(kStripOutputs)) {}

    // Quantises and packs rows [first, last) of the call.
    void take(int64_t first, int64_t last) {
        begin = first;
        end = last;
        constexpr int64_t kRows = 16;
        using Rows = QuantizedRows<int8_t>;
        ActivationScratch scratch(Rows::scratch_bytes(kRows, k));
        Rows rows(scratch, kRows, k);
        rows.k = call.k;
        rows.zero = -128;
        for (int64_t row = begin; row < end; row += kRows) {
            const int64_t group = (row - begin) / kGroupRows, inside = (row - begin) % kGroupRows;
            const int64_t count = std::min(kRows, end - row);
            quantize(row, count, rows);
            std::copy_n(rows.scale, count, scale + row - begin);
            // Rows beyond the last are whatever the scratch holds, and so are their sums, which nobody reads.
            pack_activations(rows.q, rows.stride, k, packed + group * kGroupRows * k + 4 * inside,
                             group_width(std::min(kGroupRows, end - row + inside)));
        }
    }

    // Outputs [inside, inside + kStripOutputs) of row of blocks `line`, as many as there are.
    void multiply(int64_t line, int64_t inside) const {
        const auto [high, wide] = weight.shape;
        const int64_t column = line * high + inside, outputs = std::min(kStripOutputs, high - inside);
        if (column >= weight.n) return;
        const int64_t first = weight.offsets()[line], last = weight.offsets()[line + 1];
        const bool widens = last - first > step;  // too many for sums in int32
        for (int64_t row = begin; row < end; row += kGroupRows) {
            const int64_t rows = std::min(kGroupRows, end - row), count = outputs * group_width(rows);
            if (widens) std::fill_n(wide_sums, count, int64_t{0});
            for (int64_t i = first; i == first || i < last; i += step) {
                const StripBlocks blocks{weight.blocks<int8_t>() + (i * high + inside) * wide, high * wide, wide,
                                         weight.columns() + i, std::min(step, last - i)};
                if (row == begin || widens) strip_start(blocks, outputs, runs, start);
                multiply_group(blocks, outputs, column, row, rows);
                if (widens) {
                    for (int64_t j = 0; j < count; ++j) wide_sums[j] += sums[j];
                }
            }
            if (widens) {
                finish_wide(column, std::min(outputs, weight.n - column), row, rows);
            } else {
                finish(column, std::min(outputs, weight.n - column), row, rows);
            }
        }
    }

  private:
    void multiply_group(const StripBlocks& blocks, int64_t outputs, int64_t column, int64_t row, int64_t rows) const {
        const StripTiles& tiles = strip_tiles(outputs);
        const int64_t group = (row - begin) / kGroupRows, width = group_width(rows);
        const uint8_t* x = packed + group * kGroupRows * k;
        // The first tiles of a strip ask for the next one, a tile for as much as 8 outputs of it take; all those of a
        // group ask for where the outputs of this one go.
        const auto* next = reinterpret_cast<const char*>(blocks.values + blocks.count * blocks.stride);
        const auto* y = reinterpret_cast<const char*>(call.y + row * call.n + column);
        const int64_t y_stride = call.n * static_cast<int64_t>(sizeof(T)), y_rows = pieces_of(rows, tiles.count);
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t first = tiles.first[t], asked = 8 * (group * tiles.count + t);
            StripBlocks part = blocks;
            part.values += first * blocks.wide;
            const StripPrefetch prefetch{asked < outputs ? next + asked * blocks.wide * blocks.count : next,
                                         y + std::min(t * y_rows, rows - 1) * y_stride,
                                         y + std::min((t + 1) * y_rows, rows) * y_stride - y_stride, y_stride};
            const auto tile = strip_tile_of(tiles.first[t + 1] - first, width, blocks.wide);
            tile(x, part, start + first, prefetch, sums + first * width);
        }
    }
    void finish(int64_t column, int64_t columns, int64_t row, int64_t rows) const {
        const int64_t width = group_width(rows);
        for (int64_t j = 0; j < columns; j += 16) {
            for (int64_t r = 0; r < rows; r += 16) {
                const FinishRows<T> square{
                    call,       scale + row - begin + r,           nullptr, row + r, std::min<int64_t>(16, rows - r),
                    column + j, std::min<int64_t>(16, columns - j)};
                finish_square(square, sums + j * width + r, width);
            }
        }
    }
    void finish_wide(int64_t column, int64_t columns, int64_t row, int64_t rows) const {
        const int64_t width = group_width(rows);
        for (int64_t r = 0; r < rows; ++r) {
            T* y = call.y + (row + r) * call.n + column;
            for (int64_t j = 0; j < columns; ++j) {
                y[j] = linear_output(wide_sums[j * width + r], scale[row - begin + r], call, column + j);
            }
        }
    }
};

template <class T>
void strip_linear(const LinearCall<T>& call, const Blocks& weight) {
    const auto [high, wide] = weight.shape;
    const int64_t k = pieces_of(call.k, wide) * wide;  // activations end in zeros as far as blocks reach
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const ActivationQuantizer<int8_t, T> quantize(call);
    const StripPlan plan(weight, call.m, threads);
    const auto parts = [&](int64_t from, int64_t to) {
        Scratch<StripScratch> scratch(StripBand<T>::bytes(plan.most_groups(), k));
        StripBand<T> band(scratch, plan.most_groups(), k, call, weight, quantize);
        const int64_t end = plan.task_at(plan.work() * to / threads);
        int64_t task = plan.task_at(plan.work() * from / threads);
        while (task < end) {
            const int64_t b = task / plan.strips(), band_end = std::min(end, (b + 1) * plan.strips());
            band.take(plan.row(b), plan.row(b + 1));
            for (; task < band_end; ++task) {
                const int64_t strip = task - b * plan.strips();
                band.multiply(strip / plan.slices, strip % plan.slices * kStripOutputs);
            }
        }
    };
    const int64_t width = group_width(std::min(call.m, kGroupRows));
    if (plan.work() / threads * std::min(high, kStripOutputs) * wide * width / kGroupRows < kGrainBytes) {
        parts(0, threads);
    } else {
        torch::stable::parallel_for(0, threads, 1, parts);
    }
}
#endif

}  // namespace engine
