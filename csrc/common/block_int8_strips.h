// block_int8_linear for many rows of activations with AVX-512.
//
// Activations are quantised and packed by each thread that needs them, once for all rows of blocks. They are the unsigned
// side of vpdpbusd, shifted by 128; what that makes an output's sums too large by, 128 · (sum of its weights), is the same
// for all rows of activations, and sums begin with it taken away.
#pragma once

#include "common/block_strips.h"
#include "common/gemm_int8.h"

namespace engine {

#if ENGINE_X86
struct StripScratch;  // tag: a thread's activations, and what it sums in

struct Int8Products {
    using Sum = int32_t;
    using Lanes = __m512i;
    static constexpr int kSize = 1;  // bytes of a weight
    static constexpr bool kClosesChains = false;

    ENGINE_AVX512 ENGINE_INLINE static __m512i start(const int32_t* sums, int64_t r, bool together) {
        return together ? _mm512_set1_epi64(static_cast<uint32_t>(sums[r])) : _mm512_set1_epi32(sums[r]);
    }
    ENGINE_AVX512 ENGINE_INLINE static void accumulate(__m512i& acc, __m512i x, __m512i w) {
        accumulate_avx512(acc, x, w);
    }
    ENGINE_AVX512 ENGINE_INLINE static __m512i bits(__m512i acc) { return acc; }
    ENGINE_AVX512 ENGINE_INLINE static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
};

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
    const auto* values = reinterpret_cast<const int8_t*>(blocks.values);
    const int64_t bytes = outputs * blocks.wide;
    int64_t at = 0;
    for (; at + 1024 <= bytes; at += 1024) {
        run_sums_avx512<16>(values + at, blocks.stride, blocks.count, runs + at / 16);
    }
    for (; at < bytes; at += 256) {
        run_sums_avx512<4>(values + at, blocks.stride, blocks.count, runs + at / 16);
    }
    const int64_t across = blocks.wide / 16;
    for (int64_t r = 0; r < outputs; ++r) {
        int32_t sum = 0;
        for (int64_t i = 0; i < across; ++i) sum += runs[r * across + i];
        start[r] = -128 * sum;
    }
}

struct Int8Outputs {
    const float* row_scale;  // of the first row
    __m512 scale, bias;
    bool has_bias;

    ENGINE_AVX512 ENGINE_INLINE __m512 operator()(int64_t row, __m512i sums) const {
        const __m512 by = _mm512_mul_ps(_mm512_set1_ps(row_scale[row]), scale);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), by);
        return has_bias ? _mm512_add_ps(y, bias) : y;
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

    char* packed;        // by groups [k / 4, width, 4]
    float* scale;        // [groups, kGroupRows]
    int32_t* sums;       // [kStripOutputs, width] of a group
    int64_t* wide_sums;  // the same, where int32 doesn't hold them
    int32_t *runs, *start;

  public:
    static int64_t bytes(int64_t groups, int64_t k) {
        using S = Scratch<StripScratch>;
        return S::bytes_for<char>(groups * kGroupRows * k) + S::bytes_for<float>(groups * kGroupRows) +
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
          packed(scratch.take<char>(groups * kGroupRows * k)),
          scale(scratch.take<float>(groups * kGroupRows)),
          sums(scratch.take<int32_t>(kSums)),
          wide_sums(scratch.take<int64_t>(kSums)),
          runs(scratch.take<int32_t>(kRuns)),
          start(scratch.take<int32_t>(kStripOutputs)) {}

    // Quantises and packs rows [first_row, last_row) of the call.
    void take(int64_t first_row, int64_t last_row) {
        begin = first_row;
        end = last_row;
        constexpr int64_t kRows = 16;
        using Rows = QuantizedRows<int8_t>;
        ActivationScratch scratch(Rows::scratch_bytes(kRows, k));
        Rows rows(scratch, kRows, k);
        rows.k = call.k;
        rows.zero = -128;
        for (int64_t row = begin; row < end; row += kRows) {
            const int64_t inside = (row - begin) % kGroupRows, width = group_width(end - row + inside);
            const int64_t count = std::min(kRows, end - row);
            quantize(row, count, rows);
            std::copy_n(rows.scale, count, scale + row - begin);
            // Rows beyond the last are whatever the scratch holds, and so are their sums, which nobody reads.
            pack_activations(rows.q, rows.stride, k, packed + (row - begin - inside) * k + 4 * inside, width);
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
            const int64_t rows = std::min(kGroupRows, end - row), width = group_width(rows), count = outputs * width;
            if (widens) std::fill_n(wide_sums, count, int64_t{0});
            for (int64_t i = first; i == first || i < last; i += step) {
                const StripBlocks blocks{weight.blocks<char>() + (i * high + inside) * wide, high * wide, wide,
                                         weight.columns() + i, std::min(step, last - i)};
                if (row == begin || widens) strip_start(blocks, outputs, runs, start);
                multiply_strip<Int8Products>(packed + (row - begin) * k, blocks, outputs, width,
                                             (row - begin) / kGroupRows, call.y + row * call.n + column, call.n, rows,
                                             {sums, start, false, 0});
                if (widens) {
                    for (int64_t j = 0; j < count; ++j) wide_sums[j] += sums[j];
                }
            }
            if (widens) {
                finish_wide(column, std::min(outputs, weight.n - column), row, rows, width);
            } else {
                finish(column, std::min(outputs, weight.n - column), row, rows, width);
            }
        }
    }

  private:
    ENGINE_AVX512 void finish(int64_t column, int64_t columns, int64_t row, int64_t rows, int64_t width) const {
        for (int64_t j = 0; j < columns; j += 16) {
            const int64_t count = std::min<int64_t>(16, columns - j);
            const auto lanes = static_cast<__mmask16>((1u << count) - 1);
            Int8Outputs outputs{nullptr, load_lanes_avx512(lanes, call.scale + column + j), _mm512_setzero_ps(),
                                call.bias != nullptr};
            if (call.bias) outputs.bias = load_lanes_avx512(lanes, call.bias + column + j);
            for (int64_t r = 0; r < rows; r += 16) {
                outputs.row_scale = scale + row - begin + r;
                write_square(sums + j * width + r, width, std::min<int64_t>(16, rows - r), count, outputs,
                             call.y + (row + r) * call.n + column + j, call.n);
            }
        }
    }
    void finish_wide(int64_t column, int64_t columns, int64_t row, int64_t rows, int64_t width) const {
        for (int64_t r = 0; r < rows; ++r) {
            T* y = call.y + (row + r) * call.n + column;
            for (int64_t j = 0; j < columns; ++j) {
                y[j] = linear_output(wide_sums[j * width + r], scale[row - begin + r], call, column + j);
            }
        }
    }
};

// Bands of rows whose activations stay in a thread's L2, and so many that each thread keeps to some of its own.
inline int64_t bands_of_int8(const Blocks& weight, int64_t m, int64_t threads) {
    constexpr int64_t kBandBytes = 640 << 10, kMost = 16;  // groups
    const int64_t groups = pieces_of(m, kGroupRows), group_bytes = std::max<int64_t>(1, weight.k) * kGroupRows;
    const int64_t bands = pieces_of(groups, std::clamp<int64_t>(kBandBytes / group_bytes, 1, kMost));
    const int64_t shared = pieces_of(bands, threads) * threads;
    return groups >= 2 * shared ? shared : bands;
}

template <class T>
void strip_linear(const LinearCall<T>& call, const Blocks& weight) {
    const auto [high, wide] = weight.shape;
    const int64_t k = pieces_of(call.k, wide) * wide;  // activations end in zeros as far as blocks reach
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const ActivationQuantizer<int8_t, T> quantize(call);
    const StripPlan plan(weight, call.m, bands_of_int8(weight, call.m, threads));
    const auto parts = [&](int64_t from, int64_t to) {
        Scratch<StripScratch> scratch(StripBand<T>::bytes(plan.most_groups(), k));
        StripBand<T> band(scratch, plan.most_groups(), k, call, weight, quantize);
        const int64_t end = plan.first_task(to, threads);
        int64_t task = plan.first_task(from, threads);
        while (task < end) {
            const int64_t b = task / plan.strips(), band_end = std::min(end, (b + 1) * plan.strips());
            band.take(plan.row(b), plan.row(b + 1));
            for (; task < band_end; ++task) {
                const int64_t strip = task - b * plan.strips();
                band.multiply(strip / plan.slices, strip % plan.slices * kStripOutputs);
            }
        }
    };
    parallel_for_unless(plan.small(threads, sizeof(int8_t)), threads, 1, parts);
}
#endif

}  // namespace engine
