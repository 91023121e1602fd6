// block_linear for many rows of activations with AVX-512.
//
// Activations are packed once for all threads, a chunk of rows at a time. Weights of a type that is not multiplied are
// converted first, some columns at a time, by which all rows of a band are multiplied.
#pragma once

#include "common/block_strips.h"
#include "common/gemm_float.h"
#if ENGINE_X86

namespace engine {

struct FloatProducts {
    using Element = float;
    using Sum = float;
    using Lanes = __m512;
    static constexpr int kSize = sizeof(float);
    static constexpr bool kClosesChains = true;

    ENGINE_AVX512 ENGINE_INLINE static __m512 start(const float*, int64_t, bool) { return _mm512_setzero_ps(); }
    ENGINE_AVX512 ENGINE_INLINE static void accumulate(__m512& acc, __m512i x, __m512i w) {
        acc = _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), acc);
    }
    ENGINE_AVX512 ENGINE_INLINE static __m512i bits(__m512 acc) { return _mm512_castps_si512(acc); }
    ENGINE_AVX512 ENGINE_INLINE static __m512i add(__m512i a, __m512i b) {
        return bits(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
    }
};

// bfloat16 by bfloat16, with AVX512_BF16.
struct PairProducts : FloatProducts {
    using Element = BFloat16;
    static constexpr int kSize = sizeof(BFloat16);
    static constexpr bool kClosesChains = false;

    ENGINE_AVX512 ENGINE_INLINE static void accumulate(__m512& acc, __m512i x, __m512i w) {
        accumulate_pairs_avx512(acc, x, w);
    }
};

struct StripScratch;      // tag: what a thread converts and sums in
struct StripRowsScratch;  // tag: the activations of a call, held by the calling thread

template <class E, class V>
ENGINE_INLINE void convert(const V* from, int64_t count, E* to) {
    if constexpr (std::is_same_v<E, V>) {
        std::copy_n(from, count, to);
    } else {
        floats(from, count, to);
    }
}

// Packs rows [row, row + count) of the call, at most 16, with zeros beyond its k. What a row's outputs are multiplied by
// is 1, or NaN where it holds a number that is not finite.
template <class E, class T>
ENGINE_AVX512 void pack_float_rows(const FloatLinear<T>& call, int64_t row, int64_t count, int64_t k,
                                   char* to,  // as pack_activations
                                   int64_t width,
                                   float* row_scale) {  // [count]
    constexpr int64_t kRows = 16, kPiece = 256, kStride = kPiece + 64 / sizeof(E), kSize = sizeof(E);
    alignas(64) E piece[kRows][kStride];
    bool finite[kRows];
    std::fill_n(finite, count, true);
    for (int64_t r = count; r < kRows; ++r) std::fill_n(piece[r], kPiece, E{});
    for (int64_t k0 = 0; k0 < k; k0 += kPiece) {
        const int64_t columns = std::min(kPiece, k - k0), inside = std::clamp<int64_t>(call.k - k0, 0, columns);
        for (int64_t r = 0; r < count; ++r) {
            const T* x = call.x + (row + r) * call.k + k0;
            finite[r] &= all_finite(x, inside);
            convert(x, inside, piece[r]);
            std::fill(piece[r] + inside, piece[r] + columns, E{});
        }
        pack_activations(piece, kStride * kSize, columns * kSize, to + k0 * kSize * width, width);
    }
    for (int64_t r = 0; r < count; ++r) row_scale[r] = finite[r] ? 1.0f : std::numeric_limits<float>::quiet_NaN();
}

struct FloatOutputs {
    const float* row_scale;  // of the first row
    __m512 bias;
    bool has_bias;

    ENGINE_AVX512 ENGINE_INLINE __m512 operator()(int64_t row, __m512i sums) const {
        const __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(sums), _mm512_set1_ps(row_scale[row]));
        return has_bias ? _mm512_add_ps(y, bias) : y;
    }
};

// Outputs of one row of blocks by a band of packed activations.
template <class Products, class T, class V>
class FloatBand {
    using E = typename Products::Element;
    // Columns of kept blocks by which all rows are multiplied.
    static constexpr int64_t kDepth = 1024 / Products::kSize;
    static constexpr int64_t kSums = kStripOutputs * kGroupRows;
    static constexpr bool kDirect = std::is_same_v<V, E>;
    const FloatLinear<T>& call;
    const Blocks& weight;
    int64_t first_row, rows;  // of the call, which are packed
    int64_t k;                // as far as blocks reach
    const char* packed;       // by groups, dwords [.., width], or [.., 8, 2]
    const float* row_scale;   // [rows]
    E* converted;             // [kDepth, kStripOutputs]
    float* sums;              // by groups [kStripOutputs, width]

  public:
    static constexpr int64_t kMostGroups = 8;  // of a band
    static int64_t bytes() {
        using S = Scratch<StripScratch>;
        return S::bytes_for<E>(kDepth * kStripOutputs) + S::bytes_for<float>(kMostGroups * kSums);
    }
    FloatBand(Scratch<StripScratch>& scratch, const FloatLinear<T>& call, const Blocks& weight, int64_t first_row,
              int64_t rows, int64_t k, const char* packed, const float* row_scale)
        : call(call),
          weight(weight),
          first_row(first_row),
          rows(rows),
          k(k),
          packed(packed),
          row_scale(row_scale),
          converted(scratch.take<E>(kDepth * kStripOutputs)),
          sums(scratch.take<float>(kMostGroups * kSums)) {}

    // Outputs [inside, inside + kStripOutputs) of row of blocks `line`, as many as there are, for the packed rows
    // [begin, end).
    void multiply(int64_t line, int64_t inside, int64_t begin, int64_t end) const {
        const auto [high, wide] = weight.shape;
        const int64_t column = line * high + inside, outputs = std::min(kStripOutputs, high - inside);
        if (column >= weight.n) return;
        const int64_t first = weight.offsets()[line], last = weight.offsets()[line + 1];
        const bool cut = first < last && (weight.columns()[last - 1] + 1) * wide > weight.k;
        const int64_t chain = float_chain((last - first) * wide) * Products::kSize / 16;
        const int64_t step = kDirect && end - begin <= kGroupRows ? last - first : std::max<int64_t>(1, kDepth / wide);
        int64_t i = first;
        do {
            int64_t stop = std::min(last, i + step);
            bool direct = kDirect;
            if (cut && stop == last) {  // what lies beyond K counts for nothing, not even where it is no number
                direct = kDirect && stop - i > 1;
                stop -= direct;
            }
            StripBlocks blocks{nullptr, 0, wide * Products::kSize, weight.columns() + i, stop - i};
            if (direct) {
                blocks.values = reinterpret_cast<const char*>(weight.blocks<V>() + (i * high + inside) * wide);
                blocks.stride = high * blocks.wide;
            } else {
                convert_blocks(i, stop, inside, outputs);
                blocks.values = reinterpret_cast<const char*>(converted);
                blocks.stride = outputs * blocks.wide;
            }
            for (int64_t row = begin; row < end; row += kGroupRows) {
                const int64_t count = std::min(kGroupRows, end - row), width = group_width(count);
                float* const mine = sums + (row - begin) * kStripOutputs;
                multiply_strip<Products>(packed + row * k * Products::kSize, blocks, outputs, width,
                                         (row - begin) / kGroupRows, call.y + (first_row + row) * call.n + column,
                                         call.n, count, {mine, nullptr, i > first, chain});
                if (stop == last) finish(column, std::min(outputs, weight.n - column), row, count, width, mine);
            }
            i = stop;
        } while (i < last);
    }

  private:
    ENGINE_AVX512 void convert_blocks(int64_t first, int64_t last, int64_t inside, int64_t outputs) const {
        const auto [high, wide] = weight.shape;
        E* to = converted;
        for (int64_t i = first; i < last; ++i) {
            const V* from = weight.blocks<V>() + (i * high + inside) * wide;
            const int64_t there = std::min(wide, weight.k - weight.columns()[i] * wide);
            for (int64_t r = 0; r < outputs; ++r, from += wide, to += wide) {
                convert(from, there, to);
                std::fill(to + there, to + wide, E{});
            }
        }
    }
    ENGINE_AVX512 void finish(int64_t column, int64_t columns, int64_t row, int64_t count, int64_t width,
                              const float* mine) const {
        for (int64_t j = 0; j < columns; j += 16) {
            const int64_t wide = std::min<int64_t>(16, columns - j);
            const auto lanes = static_cast<__mmask16>((1u << wide) - 1);
            FloatOutputs outputs{nullptr, _mm512_setzero_ps(), call.bias != nullptr};
            if (call.bias) outputs.bias = load_lanes_avx512(lanes, call.bias + column + j);
            for (int64_t r = 0; r < count; r += 16) {
                outputs.row_scale = row_scale + row + r;
                write_square(mine + j * width + r, width, std::min<int64_t>(16, count - r), wide, outputs,
                             call.y + (first_row + row + r) * call.n + column + j, call.n);
            }
        }
    }
};

template <class Products, class T, class V>
void strip_linear(const FloatLinear<T>& call, const Blocks& weight) {
    using E = typename Products::Element;
    using Band = FloatBand<Products, T, V>;
    constexpr int64_t kChunkBytes = 4 << 20, kLeastGroups = 2, kPackedRows = 16;  // of activations at a time
    const auto [high, wide] = weight.shape;
    const int64_t k = pieces_of(call.k, wide) * wide;
    const int64_t group_bytes = std::max<int64_t>(1, k) * kGroupRows * Products::kSize;
    const int64_t chunk_rows = std::min(call.m, std::max(kLeastGroups, kChunkBytes / group_bytes) * kGroupRows);
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    using RowsScratch = Scratch<StripRowsScratch, kChunkBytes + (64 << 10)>;
    RowsScratch scratch(RowsScratch::template bytes_for<E>(round_up(chunk_rows, kGroupRows) * k) +
                        RowsScratch::template bytes_for<float>(chunk_rows));
    char* const packed = reinterpret_cast<char*>(scratch.template take<E>(round_up(chunk_rows, kGroupRows) * k));
    float* const row_scale = scratch.template take<float>(chunk_rows);
    for (int64_t chunk = 0; chunk < call.m; chunk += chunk_rows) {
        const int64_t m = std::min(chunk_rows, call.m - chunk);
        parallel_rows(pieces_of(m, kPackedRows), kPackedRows * call.k * 8, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin * kPackedRows; row < std::min(m, end * kPackedRows); row += kPackedRows) {
                const int64_t inside = row % kGroupRows;
                pack_float_rows<E>(call, chunk + row, std::min(kPackedRows, m - row), k,
                                   packed + (row - inside) * k * Products::kSize + 4 * inside,
                                   group_width(m - row + inside), row_scale + row);
            }
        });
        const StripPlan plan(weight, m, pieces_of(pieces_of(m, kGroupRows), Band::kMostGroups));
        const auto parts = [&](int64_t from, int64_t to) {
            Scratch<StripScratch> own(Band::bytes());
            const Band outputs(own, call, weight, chunk, m, k, packed, row_scale);
            const int64_t end = plan.first_task(to, threads);
            for (int64_t task = plan.first_task(from, threads); task < end; ++task) {
                const int64_t band = task / plan.strips(), strip = task % plan.strips();
                outputs.multiply(strip / plan.slices, strip % plan.slices * kStripOutputs, plan.row(band),
                                 plan.row(band + 1));
            }
        };
        parallel_for_unless(plan.small(threads, Products::kSize), threads, 1, parts);
    }
}

}  // namespace engine
#endif
