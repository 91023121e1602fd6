// semi_structured_int8_linear: int8 activations, quantised here, times a 2:4 int8 weight as it lies.
//
// A few rows of activations meet the stored values alone: the two bits of each value become a shuffle that fetches the
// activation it belongs to, once for all rows. For more of them weights are spread, with AVX-512 a few rows of weights
// at a time (common/spread_blocks_avx512.h), for many to the panels of common/gemm_int8.h.

#include <array>
#include <bit>

#include "common/dot_bytes_avx2.h"
#include "common/gemm_int8.h"
#include "common/int8_activations.h"
#include "common/linear_binding.h"
#include "common/semi_structured.h"
#include "common/semi_structured_avx512.h"
#include "common/spread_blocks_avx512.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

// The most rows of activations for which dot products win; fewer on AVX2, where expanding weights is cheap.
constexpr int64_t kSemiDotRows = 16, kSemiDotRowsAvx2 = 8;
constexpr int64_t kBlock = 32;  // weight rows for which a stretch of the activations stays in L1
constexpr int64_t kValuesAhead = 2 << 10, kMetadataAhead = 1 << 9;  // how far ahead memory is asked for

using Weight = SemiStructured<int8_t>;

// ---- panels -----------------------------------------------------------------------------------------------------

using SpreadStretch = void (*)(const int8_t*, const uint8_t*, int64_t, int8_t*);
void spread_portable(const int8_t* values, const uint8_t* metadata, int64_t kc, int8_t* out) {
    spread_int8(values, metadata, kc, out);
}
#if ENGINE_X86
// For each byte of metadata the shuffle that takes its four values to their places among eight weights.
constexpr std::array<uint64_t, 256> make_spread_shuffles() {
    std::array<uint64_t, 256> shuffles{};
    for (int places = 0; places < 256; ++places) {
        uint8_t from[8] = {0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80};  // zeros
        for (int value = 0; value < 4; ++value) from[value / 2 * 4 + (places >> 2 * value & 3)] = value;
        shuffles[places] = std::bit_cast<uint64_t>(from);
    }
    return shuffles;
}
constexpr std::array<uint64_t, 256> kSpreadShuffles = make_spread_shuffles();

ENGINE_AVX2 void spread_avx2(const int8_t* values, const uint8_t* metadata, int64_t kc, int8_t* out) {
    const __m128i upper = _mm_set_epi64x(0x0404040404040404, 0);  // the second byte's values are the fifth to eighth
    int64_t k = 0;
    for (; k + 16 <= kc; k += 16, values += 8, metadata += 2) {
        const __m128i shuffles = _mm_set_epi64x(static_cast<int64_t>(kSpreadShuffles[metadata[1]]),
                                                static_cast<int64_t>(kSpreadShuffles[metadata[0]]));
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        const __m128i weights = _mm_shuffle_epi8(eight, _mm_add_epi8(shuffles, upper));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), weights);
    }
    spread_int8(values, metadata, kc - k, out + k);
}
void spread_avx512(const int8_t* values, const uint8_t* metadata, int64_t kc, int8_t* out) {
    spread_int8_avx512(values, metadata, kc, out);
}
#endif

struct SemiProvider {
    Weight weight;
    SpreadStretch spread = spread_portable;

    explicit SemiProvider(const Weight& weight) : weight(weight) {
#if ENGINE_X86
        if (isa() == Isa::avx2) spread = spread_avx2;
        if (isa() == Isa::avx512) spread = spread_avx512;
#endif
    }
    const int8_t* block(int64_t row, int64_t rows, int64_t k0, int64_t kc, int8_t* scratch, int64_t* stride) const {
        *stride = provider_stride(kc);
        for (int64_t j = 0; j < rows; ++j) {
            spread(weight.values_at(row + j, k0), weight.metadata_at(row + j, k0), kc, scratch + j * *stride);
        }
        return scratch;
    }
};

// ---- dot products -----------------------------------------------------------------------------------------------

// A kernel is a struct: Q, the type of the activations; kRows, how many rows of them a tile takes; arrange, which puts
// a row into the order that the kernel reads; and tile<R>, R sums of one weight row over kc weights.
struct DotPortable {
    using Q = int16_t;
    static constexpr int64_t kRows = 1;
    static void arrange(int16_t*, int64_t) {}

    template <int R>
    static void tile(const int16_t* q,  // [R, stride]: kc, then zeros up to a multiple of 64
                     int64_t, const int8_t* values, const uint8_t* metadata, int64_t kc,
                     int32_t* sums) {  // [R]
        constexpr int64_t kStep = 512;
        alignas(64) int8_t w[kStep];
        int32_t acc = 0;
        for (int64_t k = 0; k < kc; k += kStep) {
            const int64_t length = std::min(kStep, kc - k), whole = 4 * groups_of_four(length);
            spread_int8(values + k / 2, metadata + k / 8, length, w);
            for (int64_t i = 0; i < whole; ++i) acc += q[k + i] * static_cast<int16_t>(w[i]);
        }
        sums[0] = acc;
    }
};

#if ENGINE_X86
template <class Bytes>
struct DotAvx2 {
    using Q = int8_t;
    static constexpr int64_t kRows = 4;

    // Of 64 activations those that the lower halves of lanes fetch come first: 0 to 15 and 32 to 47, then the others.
    ENGINE_AVX2 static void arrange(int8_t* q, int64_t stride) {
        for (int64_t i = 0; i < stride; i += 64) {
            auto* middle = reinterpret_cast<__m128i*>(q + i + 16);
            const __m128i second = _mm_load_si128(middle), third = _mm_load_si128(middle + 1);
            _mm_store_si128(middle, third);
            _mm_store_si128(middle + 1, second);
        }
    }

    // 64 weights: 32 values, and the shuffle that fetches the activation of each: values 0 to 7 of a lane from the
    // lane's first 16 activations, the others from its second 16.
    ENGINE_AVX2 ENGINE_INLINE static __m256i fetch_control(const uint8_t* metadata) {
        int64_t word;
        std::memcpy(&word, metadata, sizeof word);
        // Each byte of metadata four times, for its four values.
        const __m256i four_times = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                                    4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(word), four_times);
        // Two bits lie at bit 0, 2, 4, 6: those of the upper half are shifted by 4, the odd ones looked up.
        const __m256i halves = _mm256_blend_epi16(bytes, _mm256_srli_epi16(bytes, 4), 0xaa);
        const __m256i bits = _mm256_and_si256(halves, _mm256_set1_epi16(0x0c03));
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0));
        const __m256i place = _mm256_shuffle_epi8(table, bits);
        return _mm256_or_si256(place, _mm256_set1_epi64x(0x0c0c080804040000));  // its group's first of 16
    }

    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void step(const int8_t* values, const uint8_t* metadata, const int8_t* q,
                                               int64_t stride, __m256i (&acc)[R]) {
        const __m256i control = fetch_control(metadata);
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        const __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const auto* x = reinterpret_cast<const __m256i*>(q + r * stride);
            const __m256i low = _mm256_shuffle_epi8(_mm256_load_si256(x), control);
            const __m256i high = _mm256_shuffle_epi8(_mm256_load_si256(x + 1), control);
            const __m256i fetched = _mm256_blend_epi32(low, high, 0xcc);
            Bytes::add(acc[r], magnitude, w, fetched);
        }
    }

    template <int R>
    ENGINE_AVX2 static void tile(const int8_t* q, int64_t stride, const int8_t* values, const uint8_t* metadata,
                                 int64_t kc, int32_t* sums) {
        __m256i acc[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_si256();
        const int64_t whole = kc / 64 * 64;
        for (int64_t k = 0; k < whole; k += 64) {
            __builtin_prefetch(values + k / 2 + kValuesAhead);
            __builtin_prefetch(metadata + k / 8 + kMetadataAhead);
            step<R>(values + k / 2, metadata + k / 8, q + k, stride, acc);
        }
        if (whole < kc) {
            const SemiTail<int8_t, 64> tail(values + whole / 2, metadata + whole / 8, kc - whole);
            step<R>(tail.values, tail.metadata, q + whole, stride, acc);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] = horizontal_sum_avx2(acc[r]);
    }
};
#endif

template <class Kernel>
void dot_tile(int64_t rows, const typename Kernel::Q* q, int64_t stride, const int8_t* values, const uint8_t* metadata,
              int64_t kc, int32_t* sums) {
    if constexpr (Kernel::kRows == 4) {
        if (rows == 4) return Kernel::template tile<4>(q, stride, values, metadata, kc, sums);
        if (rows == 3) return Kernel::template tile<3>(q, stride, values, metadata, kc, sums);
        if (rows == 2) return Kernel::template tile<2>(q, stride, values, metadata, kc, sums);
    }
    Kernel::template tile<1>(q, stride, values, metadata, kc, sums);
}

// Outputs [begin, end) of every row of activations.
template <class Kernel, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const Weight& weight,
                 int64_t begin, int64_t end) {
    // One tile's activations are read once for each weight row: whole rows, which memory sees as one stream. More stay
    // in L1 by stretches.
    const int64_t depth = call.m <= Kernel::kRows ? kExactDepth : 1024;
    int64_t totals[kBlock][kSemiDotRows];
    for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t columns = std::min(kBlock, end - first);
        for (int64_t j = 0; j < columns; ++j) std::fill_n(totals[j], call.m, int64_t{0});
        for (int64_t k0 = 0; k0 < call.k; k0 += depth) {
            const int64_t kc = std::min(depth, call.k - k0);
            for (int64_t j = 0; j < columns; ++j) {
                const int8_t* values = weight.values_at(first + j, k0);
                const uint8_t* metadata = weight.metadata_at(first + j, k0);
                for (int64_t row = 0; row < call.m; row += Kernel::kRows) {
                    int32_t sums[4];
                    const int64_t count = std::min(Kernel::kRows, call.m - row);
                    dot_tile<Kernel>(count, rows.q + row * rows.stride + k0, rows.stride, values, metadata, kc, sums);
                    for (int64_t r = 0; r < count; ++r) totals[j][row + r] += sums[r];
                }
            }
        }
        for (int64_t j = 0; j < columns; ++j) {
            for (int64_t row = 0; row < call.m; ++row) {
                call.y[row * call.n + first + j] = linear_output(totals[j][row], rows.scale[row], call, first + j);
            }
        }
    }
}

template <class Kernel, class T>
void dot_linear(const LinearCall<T>& call, const Weight& weight) {
    using Rows = QuantizedRows<typename Kernel::Q>;
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call, 0, rows);
    for (int64_t row = 0; row < call.m; ++row) Kernel::arrange(rows.q + row * rows.stride, rows.stride);
    parallel_rows(call.n, call.k / 2 * (1 + call.m / 4),
                  [&](int64_t begin, int64_t end) { dot_outputs<Kernel>(call, rows, weight, begin, end); });
}

// ---- dot products with AVX-512 ----------------------------------------------------------------------------------

#if ENGINE_X86
constexpr int64_t kFetchRows = 12;  // up to so many rows of activations they are fetched for the stored values
constexpr int64_t kOutputs = 64;    // that are finished together

// How far on memory is asked for: one stream as far as it takes, several as far as the next `count` weight rows.
struct Ahead {
    int64_t values, metadata;
    Ahead(const Weight& weight, int64_t count)
        : values(count == 1 ? kValuesAhead : count * weight.row_values()),
          metadata(count == 1 ? kMetadataAhead : count * weight.row_bytes()) {}
};

// Multiplies a stretch of weight rows [row, row + count) by all rows of activations; sums are [m, kOutputs].
template <class Total>
struct Fetch {
    static constexpr int64_t kTall = 6;  // rows of activations to a tile
    const QuantizedRows<int8_t>& rows;   // shifted by 128
    const Weight& weight;

    // As many as registers hold; for one row of activations one, so that memory is read as one stream.
    int columns() const { return rows.rows == 1 ? 1 : rows.rows <= 4 ? 4 : 3; }

    template <int C, int R>
    static void tile(int64_t count, const uint8_t* q, int64_t stride, const SemiRows& w, int64_t kc, const Ahead& ahead,
                     int32_t* sums) {
        if constexpr (R > 1) {
            if (count < R) return tile<C, R - 1>(count, q, stride, w, kc, ahead, sums);
        }
        SemiDotAvx512::tile<R, C>(q, stride, w, kc, ahead.values, ahead.metadata, sums);
    }

    void multiply(int64_t row, int64_t count, int64_t k0, int64_t kc, Total* totals) const {
        const Ahead ahead(weight, columns());
        const auto tile_of = count < columns() || count == 1 ? tile<1, kTall>
                             : count == 4                    ? tile<4, 4>
                                                             : tile<3, kTall>;
        const int64_t tiles = divide_up(rows.rows, kTall), together = count == columns() ? count : 1;
        for (int64_t j = 0; j < count; j += together) {
            const SemiRows w{weight.values_at(row + j, k0), weight.metadata_at(row + j, k0), weight.row_values(),
                             weight.row_bytes()};
            for (int64_t t = 0, first = 0; t < tiles; ++t) {
                const int64_t tall = divide_up(rows.rows - first, tiles - t);
                int32_t sums[kTall * 4 + 3];
                const auto* q = reinterpret_cast<const uint8_t*>(rows.q + first * rows.stride + k0);
                tile_of(tall, q, rows.stride, w, kc, ahead, sums);
                for (int64_t r = 0; r < tall; ++r, ++first) {
                    for (int64_t c = 0; c < together; ++c) totals[first * kOutputs + j + c] += sums[r * together + c];
                }
            }
        }
    }
};

// Weights for common/spread_blocks_avx512.h.
template <int columns>
class SpreadSemi {
  public:
    static constexpr bool kInTile = false;
    static constexpr int64_t kTallRows = 24;

    explicit SpreadSemi(const Weight& weight) : weight_(weight) {}

    void begin(int64_t first, int64_t) { first_ = first; }
    template <class Tile>
    void prepare(Tile& t, int64_t j, int64_t count, int64_t k, int64_t kc) {
        k_ = k;
        for (int64_t c = 0; c < columns; ++c) {  // one that is missing is the last once more
            const int64_t row = first_ + j + std::min(c, count - 1);
            spread_int8_avx512<true>(weight_.values_at(row, k), weight_.metadata_at(row, k), kc,
                                     t.kept + c * Tile::kKeptStride);
        }
    }
    template <class Tile>
    const int8_t* next(const Tile&, int64_t j, int64_t c) const {
        return weight_.values_at(first_ + j + columns + c, k_);
    }
    static int64_t pace(int64_t) { return 32; }
    template <class Tile>
    ENGINE_INLINE void ask_places(const Tile& t, int64_t j) const {
        for (int64_t c = 0; c < columns; ++c) {
            const uint8_t* metadata = weight_.metadata_at(first_ + j + columns + c, k_);
            for (int64_t i = 0; i < t.words * 8; i += 64) __builtin_prefetch(metadata + i);
        }
    }
    template <class Tile>
    void done(const Tile&, int64_t, int64_t) const {}
    void end(int64_t, int64_t) const {}

  private:
    const Weight& weight_;
    int64_t first_ = 0, k_ = 0;
};

template <class T, class Total>
ENGINE_AVX512 void finish_avx512(const FinishRows<T>& f, const Total* totals) {
    finish_rows<0>(f, totals, kOutputs);
}

// Outputs [begin, end) of every row of activations, which are fetched.
template <class Total, class T>
void fetched_outputs(const LinearCall<T>& call, const QuantizedRows<int8_t>& rows, const Weight& weight, int64_t begin,
                     int64_t end) {
    const Fetch<Total> fetch{rows, weight};
    Total totals[kFetchRows * kOutputs];
    for (int64_t first = begin; first < end; first += kOutputs) {
        const int64_t columns = std::min(kOutputs, end - first);
        std::fill_n(totals, call.m * kOutputs, Total{0});
        for (int64_t j = 0; j < columns; j += fetch.columns()) {
            const int64_t count = std::min<int64_t>(fetch.columns(), columns - j);
            for (int64_t k0 = 0; k0 < call.k; k0 += kExactDepth) {
                fetch.multiply(first + j, count, k0, std::min(kExactDepth, call.k - k0), totals + j);
            }
        }
        finish_avx512(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, first, columns}, totals);
    }
}

template <class T>
void linear_avx512(const LinearCall<T>& call, const Weight& weight) {
    using Rows = QuantizedRows<int8_t>;
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    Rows rows(scratch, call.m, call.k);
    const bool fetch = call.m <= kFetchRows;
    if (fetch) rows.zero = -128;
    quantize_activations(call, 0, rows);
    parallel_rows(call.n, call.k / 2 * (1 + call.m / 4), [&](int64_t begin, int64_t end) {
        if (!fetch) return spread_outputs_avx512<SpreadSemi>(call, rows, begin, end, weight);
        if (call.k > kExactDepth) return fetched_outputs<int64_t>(call, rows, weight, begin, end);
        fetched_outputs<int32_t>(call, rows, weight, begin, end);
    });
}
#endif

template <class T>
void linear(const LinearCall<T>& call, const Weight& weight) {
    if (call.m == 0 || call.n == 0) return;
#if ENGINE_X86
    if (isa() == Isa::avx512 && call.m <= std::max(kFetchRows, spread_block_rows(call.k))) {
        return linear_avx512(call, weight);
    }
#endif
    if (call.m > (isa() == Isa::avx2 ? kSemiDotRowsAvx2 : kSemiDotRows))
        return int8_panel_linear(call, SemiProvider(weight));
#if ENGINE_X86
    if (variant() == Variant::avx_vnni) return dot_linear<DotAvx2<SignedBytesAvxVnni>>(call, weight);
    if (isa() == Isa::avx2) return dot_linear<DotAvx2<SignedBytesAvx2>>(call, weight);
#endif
    dot_linear<DotPortable>(call, weight);
}

template <bool as_patches>
Tensor semi_structured_int8_linear(Tensor x, Tensor values_in, Tensor metadata_in, Tensor scale,
                                   std::optional<Tensor> bias, std::optional<Tensor> input_scale) {
    constexpr auto op = "semi_structured_int8_linear";
    LinearInput input(op, x, as_patches);
    check_semi_structured(op, values_in, metadata_in, input.k);
    STD_TORCH_CHECK(values_in.scalar_type() == ScalarType::Char, op, ": values: expected int8");
    const Tensor values = as_contiguous(values_in), metadata = as_contiguous(metadata_in);
    const Weight weight{data<int8_t>(values), data<uint8_t>(metadata), values.size(0), input.k};
    return int8_linear_output(op, input, weight.n, scale, bias, input_scale,
                              [&](const auto& call) { linear(call, weight); });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("semi_structured_int8_linear", TORCH_BOX(&engine::semi_structured_int8_linear<false>));
    m.impl("semi_structured_int8_linear.patches", TORCH_BOX(&engine::semi_structured_int8_linear<true>));
}
