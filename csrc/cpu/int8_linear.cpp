// int8_linear: int8 activations, quantised here, times int8 weights [N, K] as they lie. For many rows of activations
// the panels of common/gemm_int8.h; for a few, dot products straight from the weights, which are then read from memory
// once and would cost more to rearrange than to multiply.

#include <cstring>

#include "common/gemm_int8.h"
#include "common/huge_pages.h"
#include "common/tensor.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

constexpr int kDotColumns = 4;          // weight rows that a dot-product kernel reads side by side
constexpr int64_t kDotBlock = 64;       // outputs that are finished together
constexpr int64_t kDotRows = 64;        // at most so many rows of activations
constexpr int64_t kL1Bytes = 20 << 10;  // of L1, what activations may take

// A dot-product kernel is a struct:
//
//   Q            the type of the activations
//   kRows        how many rows of them a tile takes
//   kTogether    outputs for which one stretch of K is done before the next
//   kShare       whether all tiles of a group of weights ask memory for what comes next, a part each, or the first all
//   rows(k)      up to so many rows of activations dot products are the faster way
//   depth(m, k)  how much of K is multiplied at once, at most kExactDepth
//   tile<R>(...) writes R × kDotColumns sums
//   finish(...)  sums to outputs

// What a tile multiplies, R rows by kDotColumns, and what it may ask for on the way.
template <class Q>
struct DotTile {
    const Q* q;  // [R, q_stride]
    int64_t q_stride;
    const int8_t* w;  // [kDotColumns, stride]
    int64_t stride, kc;
    const int8_t* ahead;   // [asked, stride], weights to ask memory for; or w itself
    int64_t asked;         // of kDotColumns
    const Q* next_q;       // what the next tile begins with, and
    const int8_t* next_w;  // lies in L2 by now
};

// All of K where the weights serve one tile alone; else as much of the activations as stays in L1 for many outputs.
template <class Kernel>
int64_t depth_in_l1(int64_t m) {
    if (m <= Kernel::kRows) return kExactDepth;
    return std::clamp<int64_t>(kL1Bytes / static_cast<int64_t>(m * sizeof(typename Kernel::Q)) / 64 * 64, 384,
                               kExactDepth);
}

struct DotPortable {
    using Q = int16_t;
    static constexpr int64_t kRows = 1, kTogether = 32;
    static constexpr bool kShare = false;
    static int64_t rows(int64_t) { return 16; }
    static int64_t depth(int64_t m, int64_t) { return depth_in_l1<DotPortable>(m); }

    template <int R>
    static void tile(const DotTile<int16_t>& t,
                     int32_t* sums) {  // [R, kDotColumns]
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < kDotColumns; ++j) {
                int32_t acc = 0;
                const int16_t* q = t.q + r * t.q_stride;
                const int8_t* w = t.w + j * t.stride;
                for (int64_t i = 0; i < t.kc; ++i) acc += q[i] * static_cast<int16_t>(w[i]);
                sums[r * kDotColumns + j] = acc;
            }
        }
    }

    template <class T, class Total>
    static void finish(const FinishRows<T>& f, const Total* totals) {
        finish_rows<0>(f, totals, kDotBlock);
    }
};

#if ENGINE_X86
struct DotAvx2 {
    using Q = int16_t;
    static constexpr int64_t kRows = 3, kTogether = 32;  // 12 sums in registers
    static constexpr bool kShare = false;
    static int64_t rows(int64_t) { return 16; }
    static int64_t depth(int64_t m, int64_t) { return depth_in_l1<DotAvx2>(m); }

    // R rows by four of weights. The products are written as assembly because GCC, which would rather read ahead, runs
    // out of registers and keeps the sums in memory; it does so as well where this is inlined.
    template <int R>
    ENGINE_AVX2 __attribute__((noinline)) static void tile(const DotTile<int16_t>& t,
                                                           int32_t* sums) {  // [R, kDotColumns]
        const int16_t* q = t.q;
        const int8_t *w = t.w, *ahead = t.ahead;
        const int64_t q_stride = t.q_stride, stride = t.stride, kc = t.kc;
        // The last weights of each row, with zeros: copied now, as a call amid the products would cost the registers.
        const int64_t whole = kc / 64 * 64;
        alignas(64) int8_t tail[kDotColumns][64];
        if (whole < kc) {
            std::memset(tail, 0, sizeof tail);
            for (int j = 0; j < kDotColumns; ++j) std::copy_n(w + j * stride + whole, kc - whole, tail[j]);
        }
        __m256i acc[R][kDotColumns];
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm256_setzero_si256();
        }
        for (int part = whole > 0 ? 0 : 1; part < (whole < kc ? 2 : 1); ++part) {
            const int8_t* from = part == 0 ? w : tail[0];
            const int8_t* const end = part == 0 ? w + whole : tail[1];
            const int64_t step = part == 0 ? stride : sizeof tail[0];
            for (; from < end; from += 64, ahead += 64, q += 64) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    __builtin_prefetch(ahead + i * stride, 0, 2);
#pragma GCC unroll 4
                    for (int j = 0; j < kDotColumns; ++j) {
                        const auto* weights = reinterpret_cast<const __m128i*>(from + j * step + 16 * i);
                        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(weights));
#pragma GCC unroll 3
                        for (int r = 0; r < R; ++r) {
                            const auto* x = reinterpret_cast<const __m256i*>(q + r * q_stride + 16 * i);
                            __m256i product;
                            asm volatile(
                                "vpmaddwd %[x], %[wide], %[product]\n\t"
                                "vpaddd %[product], %[acc], %[acc]"
                                : [acc] "+x"(acc[r][j]), [product] "=&x"(product)
                                : [wide] "x"(wide), [x] "m"(*x));
                        }
                    }
                }
            }
        }
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) {
            const __m256i low = _mm256_hadd_epi32(acc[r][0], acc[r][1]), high = _mm256_hadd_epi32(acc[r][2], acc[r][3]);
            const __m256i both = _mm256_hadd_epi32(low, high);
            const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kDotColumns), sum);
        }
    }

    template <class T, class Total>
    ENGINE_AVX2 static void finish(const FinishRows<T>& f, const Total* totals) {
        finish_rows<0>(f, totals, kDotBlock);
    }
};

// Activations stay in L2 and are read again for each four rows of weights. A tile of 6 rows reads 10 lines for 24
// vpdpbusd, a cycle each, which L2 can deliver; smaller ones read more for each, so there the weights at least are kept
// in L1 for the next tile, by cutting K. What is asked for ahead is spread over all tiles: many misses at once would
// hold up the activations, which need the same buffers. And each tile asks L2 for the first lines of the next one,
// where the hardware has yet to notice ten new streams: that alone is a fifth of the time at K = 4096.
struct DotAvx512 {
    using Q = int8_t;
    static constexpr int64_t kRows = 6, kTogether = kDotColumns;  // 24 sums in registers
    static constexpr bool kShare = true;
    static constexpr int kNextLines = 3;
    // Adding 16 lanes up costs as much as 160 of K; packing for panels as much as 5 rows.
    static int64_t rows(int64_t k) { return k < 1024 ? 16 : kDotRows; }
    static int64_t depth(int64_t m, int64_t k) { return m > kRows && m <= 10 && k > 4096 ? 2048 : kExactDepth; }

    // Written as assembly because GCC would rather read an operand from memory four times than once, and then moves
    // sums from register to register and through memory.
    ENGINE_AVX512 ENGINE_INLINE static void add_products(__m512i& acc, __m512i w, __m512i x) {
#if defined(ENGINE_EMULATE_AVX512)
        acc = _mm512_dpbusd_epi32(acc, w, x);
#else
        asm volatile("vpdpbusd %[x], %[w], %[acc]" : [acc] "+v"(acc) : [w] "v"(w), [x] "v"(x));
#endif
    }

    template <int R, int asked, bool whole>
    ENGINE_AVX512 ENGINE_INLINE static void step(__m512i (&acc)[R][kDotColumns], const int8_t* q, int64_t q_stride,
                                                 const int8_t* w, int64_t stride, __mmask64 inside,
                                                 const int8_t* ahead) {
        const __m512i shift = _mm512_set1_epi8(-128);
        __m512i shifted[kDotColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kDotColumns; ++j) {
            if (j < asked) __builtin_prefetch(ahead + j * stride, 0, 2);
            const int8_t* from = w + j * stride;
            const __m512i weights = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(inside, from);
            shifted[j] = _mm512_xor_si512(weights, shift);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_load_si512(q + r * q_stride);
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) add_products(acc[r][j], shifted[j], x);
        }
    }

    // The halves of a and b added, by units of 32 bits, of 64, of 128 and of 256: after all four, 16 vectors are one.
    template <int bits>
    ENGINE_AVX512 ENGINE_INLINE static __m512i add_halves(__m512i a, __m512i b) {
        if constexpr (bits == 32) return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        if constexpr (bits == 64) return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        if constexpr (bits == 128) {
            return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
        }
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    }

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int R, int asked>
    ENGINE_AVX512 __attribute__((noinline)) static void tile_of(
        const DotTile<int8_t>& t,
        int32_t* sums) {  // [R up to a multiple of 4, kDotColumns], 128 · (sum of q) too large
        const int8_t *q = t.q, *w = t.w, *ahead = t.ahead;
        const int64_t q_stride = t.q_stride, stride = t.stride, kc = t.kc;
        __m512i acc[R][kDotColumns];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) acc[r][j] = _mm512_setzero_si512();
        }
        int64_t k = 0;
        for (; k + 64 <= kc; k += 64) step<R, asked, true>(acc, q + k, q_stride, w + k, stride, 0, ahead + k);
        if (k < kc) {
            const __mmask64 inside = ~uint64_t{0} >> (64 - (kc - k));
            step<R, asked, false>(acc, q + k, q_stride, w + k, stride, inside, ahead + k);
        }
        for (int line = 0; line < kNextLines; ++line) {
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) __builtin_prefetch(t.next_q + r * q_stride + 64 * line);
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) __builtin_prefetch(t.next_w + j * stride + 64 * line);
        }
        __m512i row[(R + 3) / 4 * 4];  // each row's four sums, spread over four lanes
#pragma GCC unroll 8
        for (int r = 0; r < (R + 3) / 4 * 4; ++r) {
            const auto& a = acc[r < R ? r : 0];
            row[r] = add_halves<64>(add_halves<32>(a[0], a[1]), add_halves<32>(a[2], a[3]));
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; r += 4) {
            const __m512i low = add_halves<128>(row[r], row[r + 1]), high = add_halves<128>(row[r + 2], row[r + 3]);
            _mm512_storeu_si512(sums + r * kDotColumns, add_halves<256>(low, high));
        }
    }

    template <int R>
    static void tile(const DotTile<int8_t>& t, int32_t* sums) {
        if (t.asked == 1) return tile_of<R, 1>(t, sums);
        if (t.asked == 2) return tile_of<R, 2>(t, sums);
        tile_of<R, kDotColumns>(t, sums);
    }

    template <class T, class Total>
    ENGINE_AVX512 static void finish(const FinishRows<T>& f, const Total* totals) {
        finish_rows<128>(f, totals, kDotBlock);
    }
};
#endif

// `count` rows of activations, at most Kernel::kRows, by kDotColumns rows of weights.
template <class Kernel, int R = Kernel::kRows>
void dot_tile(int64_t count, const DotTile<typename Kernel::Q>& t, int32_t* sums) {
    if constexpr (R > 1) {
        if (count < R) return dot_tile<Kernel, R - 1>(count, t, sums);
    }
    Kernel::template tile<R>(t, sums);
}

// Adds the products of [k, k + kc) for `columns` ≤ kDotColumns rows of weights and all rows of activations.
template <class Kernel, class Total>
void add_dots(const QuantizedRows<typename Kernel::Q>& rows, int64_t k, int64_t kc,
              const int8_t* w,  // [columns, rows.k], at k
              int64_t columns, int64_t ahead,
              Total* totals) {  // [rows.rows, kDotBlock]
    int32_t sums[(Kernel::kRows + 3) / 4 * 4 * kDotColumns];
    const auto* q = rows.q + k;
    if (columns < kDotColumns) {  // too few to read side by side: one by one, each read four times over
        for (int64_t j = 0; j < columns; ++j, w += rows.k) {
            for (int64_t row = 0; row < rows.rows; ++row) {
                const auto* x = q + row * rows.stride;
                dot_tile<Kernel>(1, {x, rows.stride, w, 0, kc, w, kDotColumns, x, w}, sums);
                totals[row * kDotBlock + j] += sums[0];
            }
        }
        return;
    }
    // Tiles as even as can be: one row alone uses the registers badly.
    const int64_t tiles = (rows.rows + Kernel::kRows - 1) / Kernel::kRows;
    const int64_t asked = !Kernel::kShare || tiles == 1 ? kDotColumns : tiles < kDotColumns ? 2 : 1;
    const bool cut = k + kc < rows.k;
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        const int64_t count = (rows.rows - row + tiles - tile - 1) / (tiles - tile), after = row + count;
        const bool last = after == rows.rows;
        dot_tile<Kernel>(count,
                         {.q = q + row * rows.stride,
                          .q_stride = rows.stride,
                          .w = w,
                          .stride = rows.k,
                          .kc = kc,
                          .ahead = tile * asked < kDotColumns ? w + ahead + tile * asked * rows.k : w,
                          .asked = asked,
                          .next_q = !last ? q + after * rows.stride
                                    : cut ? q + kc
                                          : rows.q,
                          .next_w = !last ? w
                                    : cut ? w + kc
                                          : w - k + kDotColumns * rows.k},
                         sums);
        for (int64_t r = 0; r < count; ++r, ++row) {
            for (int64_t j = 0; j < kDotColumns; ++j) totals[row * kDotBlock + j] += sums[r * kDotColumns + j];
        }
    }
}

// Outputs [begin, end) of every row. Total holds the sums of all of K.
template <class Kernel, class Total, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const int8_t* weight,
                 int64_t begin, int64_t end) {
    Total totals[kDotRows * kDotBlock];
    const int64_t step = Kernel::depth(call.m, call.k);
    // Four rows of weights lie one after another, and so do their successors: one stream, asked for 8 KB ahead.
    const int64_t group = kDotColumns * std::max<int64_t>(1, call.k),
                  next_groups = ((8 << 10) + group - 1) / group * group;
    const bool groupwise = step >= call.k || Kernel::kTogether == kDotColumns;
    for (int64_t block = begin; block < end; block += kDotBlock) {
        const int64_t columns = std::min(kDotBlock, end - block);
        std::fill_n(totals, call.m * kDotBlock, Total{0});
        for (int64_t part = 0; part < columns; part += Kernel::kTogether) {
            const int64_t part_end = std::min(columns, part + Kernel::kTogether);
            for (int64_t k = 0; k < call.k; k += step) {
                const int64_t kc = std::min(step, call.k - k);
                // Else what comes next is the rows' next stretch, and after the last the next part.
                const int64_t ahead = groupwise ? next_groups : k + kc < call.k ? kc : Kernel::kTogether * call.k - k;
                for (int64_t j = part; j < part_end; j += kDotColumns) {
                    add_dots<Kernel>(rows, k, kc, weight + (block + j) * call.k + k,
                                     std::min<int64_t>(kDotColumns, part_end - j), ahead, totals + j);
                }
            }
        }
        Kernel::finish(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, block, columns}, totals);
    }
}

// y of the whole call by dot products, where they are the faster way.
template <class Kernel, class T>
bool dot_linear(const LinearCall<T>& call, const int8_t* weight) {
    if (call.m > Kernel::rows(call.k)) return false;
    using Rows = QuantizedRows<typename Kernel::Q>;
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call, 0, rows);
    parallel_rows(call.n, call.k * (1 + call.m / 4), [&](int64_t begin, int64_t end) {
        if (call.k <= kExactDepth) return dot_outputs<Kernel, int32_t>(call, rows, weight, begin, end);
        dot_outputs<Kernel, int64_t>(call, rows, weight, begin, end);
    });
    return true;
}

template <class T>
bool dot_linear(const LinearCall<T>& call, const int8_t* weight) {
#if ENGINE_X86
    if (isa() == Isa::avx2) return dot_linear<DotAvx2>(call, weight);
    if (isa() == Isa::avx512) return dot_linear<DotAvx512>(call, weight);
#endif
    return dot_linear<DotPortable>(call, weight);
}

template <class T>
void linear(const LinearCall<T>& call, const int8_t* weight) {
    if (call.m == 0 || call.n == 0) return;
    if (!dot_linear(call, weight)) int8_panel_linear(call, DenseProvider{weight, call.k});
}

void check(int64_t k, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& input_scale) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char,
                    "int8_linear: weight: expected int8 [N, K]");
    const int64_t n = weight.size(0);
    STD_TORCH_CHECK(weight.size(1) == k, "int8_linear: x: expected shape [..., ", weight.size(1), "]");
    STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == n && scale.scalar_type() == ScalarType::Float,
                    "int8_linear: scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "int8_linear: bias: expected shape [N]");
    check_input_scale("int8_linear", input_scale, k);
}

template <bool as_patches>
Tensor int8_linear(Tensor x_in, Tensor weight_in, Tensor scale_in, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale) {
    LinearInput input("int8_linear", x_in, as_patches);
    check(input.k, weight_in, scale_in, bias, input_scale);
    const Tensor& x = input.x;
    const Tensor weight = as_contiguous(weight_in), scale = as_contiguous(scale_in);
    const int64_t n = weight.size(0), k = weight.size(1);
    input.sizes.back() = n;
    Tensor y = new_output(x, input.sizes, x.scalar_type());
    const FloatBias as_float(bias);
    if (input_scale) input_scale = as_contiguous(*input_scale);
    dispatch_float(x.scalar_type(), "int8_linear: x", [&](auto zero) {
        using T = decltype(zero);
        linear<T>({data<T>(x), input_scale_of(input_scale), data<float>(scale), as_float.data(), mutable_data<T>(y),
                   input.m, n, k, input.where()},
                  data<int8_t>(weight));
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("int8_linear", TORCH_BOX(&engine::int8_linear<false>));
    m.impl("int8_linear.patches", TORCH_BOX(&engine::int8_linear<true>));
}
