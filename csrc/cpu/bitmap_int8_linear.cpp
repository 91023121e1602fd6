// bitmap_int8_linear: int8 activations, quantised here, times a pruned int8 weight read as its bitmap holds it.
//
// One row of activations is bound by memory, which sees nothing but the mask and the kept values, each one sequential
// stream: 64 weights at a time are spread in registers and multiplied there. A few rows of activations share what was
// spread; many go through the panels of common/gemm_int8.h.

#include "common/bitmap_int8.h"
#include "common/dot_int8.h"
#include "common/tensor.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

// Weight rows that are summed side by side, stretch by stretch, so that the activations of a stretch stay in L1.
constexpr int64_t kGroupRows = 16;
// At most so many rows of activations are multiplied by dot products.
constexpr int64_t kDotRows = 64;

// How far ahead of a single row of activations memory is asked for. Rows lie one after another: masks are one
// sequential stream, values another.
constexpr int64_t kValuesAhead = 2 << 10, kMaskAhead = 1 << 9;

// A weight row on its way along K.
struct Column {
    const uint8_t* mask;               // of the stretch
    const int8_t* values;              // of the stretch, kc + kReadAhead readable; a kernel leaves it where it ended
    int64_t values_ahead, mask_ahead;  // how far on lies what comes next
};

// A kernel multiplies a stretch of kColumns weight rows by all rows of activations, in int32:
//
//   Q         the type of activations that it multiplies; for int8_t weights are shifted by 128, see QuantizedRows::sum
//   stretch   sums [m, kColumns] of one stretch
//   depth(m)  how long a stretch may be, a multiple of 64; at most kExactDepth
//   kReadsAhead  whether it asks memory for what comes next itself
struct MatrixPortable {
    using Q = int16_t;
    static constexpr int kColumns = 1;
    static constexpr bool kShifted = false, kReadsAhead = false;
    static int64_t depth(int64_t) { return 512; }

    static void stretch(const int16_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        alignas(64) int8_t w[512];
        columns[0].values += expand_stretch_portable(columns[0].mask, columns[0].values, kc, w);
        for (int64_t r = 0; r < m; ++r) {
            int32_t acc = 0;
            for (int64_t i = 0; i < kc; ++i) acc += q[r * q_stride + i] * static_cast<int16_t>(w[i]);
            sums[r] = acc;
        }
    }
};

#if ENGINE_X86
ENGINE_AVX2 ENGINE_INLINE __m256i load_avx2(const void* from) {
    return _mm256_load_si256(static_cast<const __m256i*>(from));
}

// acc += products. GCC would add up the products of several steps first, and spill them: what is volatile stays in
// order.
ENGINE_AVX2 ENGINE_INLINE void accumulate_avx2(__m256i& acc, __m256i products) {
    asm volatile("vpaddd %1, %0, %0" : "+x"(acc) : "x"(products));
}

ENGINE_AVX2 ENGINE_INLINE int32_t horizontal_sum_avx2(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// One row of activations. |w| · (x with w's sign) by vpmaddubsw: exact, as pairs sum to at most 2 · 128 · 127.
struct VectorAvx2 {
    using Q = int8_t;
    static constexpr int kColumns = 1;
    static constexpr bool kShifted = false, kReadsAhead = true;
    static int64_t depth(int64_t) { return kExactDepth; }

    ENGINE_AVX2 ENGINE_INLINE static void half(const __m128i* part, const int8_t* q, __m256i& acc) {
        const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
        const __m256i x = _mm256_sign_epi8(load_avx2(q), w);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), x);
        accumulate_avx2(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    ENGINE_AVX2 ENGINE_INLINE static void step(uint64_t bits, const int8_t* q, const int8_t*& values,
                                               __m256i (&acc)[2]) {
        const Expanded64 w = expand_64_avx2(values, bits);
        half(w.part, q, acc[0]);
        half(w.part + 2, q + 32, acc[1]);
        values += w.taken;
    }

    ENGINE_AVX2 static void stretch(const int8_t* q, int64_t, int64_t, Column* columns, int64_t kc, int32_t* sums) {
        const uint8_t* mask = columns[0].mask;
        const int8_t* values = columns[0].values;
        __m256i acc[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        int64_t k = 0;
        for (; k + 64 <= kc; k += 64) {
            __builtin_prefetch(values + kValuesAhead);
            uint64_t bits;
            std::memcpy(&bits, mask + k / 8, 8);
            step(bits, q + k, values, acc);
        }
        if (k < kc) step(mask_bits(mask, k, kc), q + k, values, acc);
        columns[0].values = values;
        sums[0] = horizontal_sum_avx2(_mm256_add_epi32(acc[0], acc[1]));
    }
};

// A few rows of activations, as 16-bit integers: up to kDirect multiply what was spread while it is in registers, more
// find it in L1.
struct MatrixAvx2 {
    using Q = int16_t;
    static constexpr int kColumns = 4, kDirect = 4, kTileRows = 3;
    static constexpr bool kShifted = false, kReadsAhead = false;
    static constexpr int64_t kDepth = 512;  // of a stretch that is spread to L1
    static int64_t depth(int64_t m) {       // 16 KB of activations
        if (m > kDirect) return kDepth;
        return m > 2 ? 4 * kDepth : 8 * kDepth;
    }

    // 16 weights of each of two columns by R rows of activations.
    template <int R>
    ENGINE_AVX2 ENGINE_INLINE static void multiply_16(__m128i w0, __m128i w1, const int16_t* q, int64_t q_stride,
                                                      __m256i (&acc)[2][R]) {
        const __m256i wide0 = _mm256_cvtepi8_epi16(w0), wide1 = _mm256_cvtepi8_epi16(w1);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m256i x = load_avx2(q + r * q_stride);
            accumulate_avx2(acc[0][r], _mm256_madd_epi16(wide0, x));
            accumulate_avx2(acc[1][r], _mm256_madd_epi16(wide1, x));
        }
    }

    // R rows of activations by columns 0 and 1.
    template <int R>
    ENGINE_AVX2 static void direct(const int16_t* q, int64_t q_stride, Column* columns, int64_t kc, int32_t* sums) {
        __m256i acc[2][R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[0][r] = acc[1][r] = _mm256_setzero_si256();
        const uint8_t *mask0 = columns[0].mask, *mask1 = columns[1].mask;
        const int8_t *values0 = columns[0].values, *values1 = columns[1].values;
        for (int64_t k = 0; k < kc; k += 64, q += 64) {
            const uint64_t bits0 = mask_bits(mask0, k, kc), bits1 = mask_bits(mask1, k, kc);
            const Prefix64 before0 = prefix_64(bits0), before1 = prefix_64(bits1);
            multiply_16<R>(expand_part_avx2<0>(values0, bits0), expand_part_avx2<0>(values1, bits1), q, q_stride, acc);
            multiply_16<R>(expand_part_avx2<1>(values0 + before0.of[1], bits0),
                           expand_part_avx2<1>(values1 + before1.of[1], bits1), q + 16, q_stride, acc);
            multiply_16<R>(expand_part_avx2<2>(values0 + before0.of[2], bits0),
                           expand_part_avx2<2>(values1 + before1.of[2], bits1), q + 32, q_stride, acc);
            multiply_16<R>(expand_part_avx2<3>(values0 + before0.of[3], bits0),
                           expand_part_avx2<3>(values1 + before1.of[3], bits1), q + 48, q_stride, acc);
            values0 += before0.of[4];
            values1 += before1.of[4];
        }
        columns[0].values = values0;
        columns[1].values = values1;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < 2; ++c) sums[r * kColumns + c] = horizontal_sum_avx2(acc[c][r]);
        }
    }

    // A stretch as 16-bit integers.
    ENGINE_AVX2 static void expand(Column& column, int64_t kc, int16_t* out) {
        for (int64_t k = 0; k < kc; k += 64) {
            const Expanded64 w = expand_64_avx2(column.values, mask_bits(column.mask, k, kc));
            for (int p = 0; p < 4; ++p) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(out + k + 16 * p), _mm256_cvtepi8_epi16(w.part[p]));
            }
            column.values += w.taken;
        }
    }

    // R rows of activations by kColumns rows of weights.
    template <int R>
    ENGINE_AVX2 static void tile(const int16_t* q, int64_t q_stride,
                                 const int16_t* w,  // [kColumns, kDepth]
                                 int64_t kc, int32_t* sums) {
        __m256i acc[R][kColumns];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < kColumns; ++c) acc[r][c] = _mm256_setzero_si256();
        }
        for (int64_t k = 0; k < kc; k += 16) {
            __m256i x[R];
            for (int r = 0; r < R; ++r) x[r] = load_avx2(q + r * q_stride + k);
            for (int c = 0; c < kColumns; ++c) {
                const __m256i wide = load_avx2(w + c * kDepth + k);
                for (int r = 0; r < R; ++r) acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(wide, x[r]));
            }
        }
        for (int r = 0; r < R; ++r) {
            const __m256i low = _mm256_hadd_epi32(acc[r][0], acc[r][1]), high = _mm256_hadd_epi32(acc[r][2], acc[r][3]);
            const __m256i both = _mm256_hadd_epi32(low, high);
            const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kColumns), sum);
        }
    }

    static void direct_of(int64_t m, const int16_t* q, int64_t q_stride, Column* columns, int64_t kc, int32_t* sums) {
        if (m == 4) return direct<4>(q, q_stride, columns, kc, sums);
        if (m == 3) return direct<3>(q, q_stride, columns, kc, sums);
        if (m == 2) return direct<2>(q, q_stride, columns, kc, sums);
        direct<1>(q, q_stride, columns, kc, sums);
    }

    static void stretch(const int16_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        if (m <= kDirect) {
            direct_of(m, q, q_stride, columns, kc, sums);
            return direct_of(m, q, q_stride, columns + 2, kc, sums + 2);
        }
        alignas(64) int16_t w[kColumns][kDepth];
        for (int c = 0; c < kColumns; ++c) expand(columns[c], kc, w[c]);
        int64_t r = 0;
        for (; r + kTileRows <= m; r += kTileRows) {
            tile<kTileRows>(q + r * q_stride, q_stride, w[0], kc, sums + r * kColumns);
        }
        if (m - r == 2) tile<2>(q + r * q_stride, q_stride, w[0], kc, sums + r * kColumns);
        if (m - r == 1) tile<1>(q + r * q_stride, q_stride, w[0], kc, sums + r * kColumns);
    }
};

// 64 weights, shifted to unsigned.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_shifted_avx512(const int8_t*& values, uint64_t bits) {
    const __m512i shift = _mm512_set1_epi8(-128);  // which is what 0 becomes
    const __m512i packed = _mm512_xor_si512(_mm512_loadu_si512(values), shift);
    bits = integer_bits(bits);
    values += popcount64(bits);
    return _mm512_mask_expand_epi8(opaque_avx512(shift), bits, packed);
}

// One row of activations: four sums, as one would wait for itself.
struct VectorAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 1;
    static constexpr bool kShifted = true, kReadsAhead = true;
    static int64_t depth(int64_t) { return kExactDepth; }

    ENGINE_AVX512 static void stretch(const int8_t* q, int64_t, int64_t, Column* columns, int64_t kc, int32_t* sums) {
        const uint8_t* mask = columns[0].mask;
        const int8_t* values = columns[0].values;
        __m512i acc[4];
        for (auto& a : acc) a = _mm512_setzero_si512();
        int64_t k = 0;
        for (; k + 256 <= kc; k += 256) {
            uint64_t bits[4];
            std::memcpy(bits, mask + k / 8, 32);
            __builtin_prefetch(mask + k / 8 + kMaskAhead);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __builtin_prefetch(values + kValuesAhead);
                const __m512i w = expand_shifted_avx512(values, bits[i]);
                acc[i] = _mm512_dpbusd_epi32(acc[i], w, _mm512_load_si512(q + k + 64 * i));
            }
        }
        for (; k < kc; k += 64) {
            const __m512i w = expand_shifted_avx512(values, mask_bits(mask, k, kc));
            acc[0] = _mm512_dpbusd_epi32(acc[0], w, _mm512_load_si512(q + k));
        }
        columns[0].values = values;
        sums[0] = _mm512_reduce_add_epi32(
            _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3])));
    }
};

ENGINE_AVX512 ENGINE_INLINE __m256i add_halves_avx512(__m512i v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
ENGINE_AVX512 ENGINE_INLINE __m128i horizontal_sums_avx512(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m256i low = _mm256_hadd_epi32(add_halves_avx512(a), add_halves_avx512(b));
    const __m256i high = _mm256_hadd_epi32(add_halves_avx512(c), add_halves_avx512(d));
    const __m256i all = _mm256_hadd_epi32(low, high);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// A few rows of activations. To spread 64 weights takes as long as two or three products: what was spread serves up to
// kTileRows rows while it is in registers, and activations that were loaded serve several columns.
struct MatrixAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 4;
    static constexpr int64_t kFour = 6, kTwo = 12;  // rows of activations up to which a tile takes 4 columns, and 2
    static constexpr bool kShifted = true, kReadsAhead = true;
    static int64_t depth(int64_t m) { return std::min(kExactDepth, (128 << 10) / m / 64 * 64); }  // activations in L2

    // 64 weights of C rows by R rows of activations. Unrolled by force, else GCC keeps the sums in memory.
    template <int R, int C>
    ENGINE_AVX512 ENGINE_INLINE static void step(const uint64_t (&bits)[C], const int64_t (&ahead)[C],
                                                 const int8_t* (&values)[C], const int8_t* q, int64_t q_stride,
                                                 __m512i (&acc)[R * C]) {
        __m512i w[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            __builtin_prefetch(values[c] + ahead[c]);
            w[c] = expand_shifted_avx512(values[c], bits[c]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_load_si512(q + r * q_stride);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) accumulate_avx512(acc[r * C + c], w[c], x);
        }
    }

    template <int R, int C>
    ENGINE_AVX512 __attribute__((noinline)) static void tile(const int8_t* q, int64_t q_stride, Column* columns,
                                                             int64_t kc, int32_t* sums) {  // [R, kColumns]
        __m512i acc[R * C];
#pragma GCC unroll 24
        for (auto& a : acc) a = _mm512_setzero_si512();
        const int8_t* values[C];
        const uint8_t* mask[C];
        int64_t ahead[C];
        uint64_t bits[C], rest[C];
        const int64_t whole = kc / 64 * 64;
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            values[c] = columns[c].values, mask[c] = columns[c].mask, ahead[c] = columns[c].values_ahead;
            rest[c] = mask_bits(mask[c], whole, kc);
        }
        for (int64_t k = 0; k < whole; k += 64, q += 64) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                std::memcpy(&bits[c], mask[c] + k / 8, 8);
                __builtin_prefetch(mask[c] + k / 8 + columns[0].mask_ahead);
            }
            step<R, C>(bits, ahead, values, q, q_stride, acc);
        }
        if (whole < kc) step<R, C>(rest, ahead, values, q, q_stride, acc);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c].values = values[c];
        alignas(16) int32_t flat[(R * C + 3) / 4 * 4];
#pragma GCC unroll 6
        for (int i = 0; i < R * C; i += 4) {
            constexpr int last = R * C - 1;
            const __m128i sum = horizontal_sums_avx512(acc[i], acc[std::min(i + 1, last)], acc[std::min(i + 2, last)],
                                                       acc[std::min(i + 3, last)]);
            _mm_store_si128(reinterpret_cast<__m128i*>(flat + i), sum);
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sums[r * kColumns + c] = flat[r * C + c];
        }
    }

    static void stretch(const int8_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        constexpr decltype(&tile<1, 4>) kTiles[] = {tile<1, 4>, tile<2, 4>,  tile<3, 4>,  tile<4, 4>,
                                                    tile<5, 4>, tile<6, 4>,  tile<7, 2>,  tile<8, 2>,
                                                    tile<9, 2>, tile<10, 2>, tile<11, 2>, tile<12, 2>};
        if (m <= kFour) return kTiles[m - 1](q, q_stride, columns, kc, sums);
        for (int c = 0; c < kColumns; c += 2) {
            const Column start[] = {columns[c], columns[c + 1]};
            const int64_t rows = m > kTwo ? (m + 1) / 2 : m;  // two tiles of one size; of 13 rows they share one
            for (int64_t row = 0;; row = m - rows) {
                std::copy_n(start, 2, columns + c);
                kTiles[rows - 1](q + row * q_stride, q_stride, columns + c, kc, sums + row * kColumns + c);
                if (row + rows >= m) break;
            }
        }
    }
};

// More rows of activations: four weight rows are spread to memory once, and multiplied as if they were dense.
struct SpreadAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = kDotColumns;
    static constexpr bool kShifted = true, kReadsAhead = true;
    static constexpr int64_t kDepth = 8192;
    static int64_t depth(int64_t) { return kDepth; }

    ENGINE_AVX512 ENGINE_INLINE static const int8_t* spread(uint64_t bits, const int8_t* values, int8_t* out) {
        const uint64_t kept = integer_bits(bits);
        _mm512_store_si512(out, expand_lanes_avx512<int8_t>(kept, _mm512_loadu_si512(values)));
        return values + popcount64(kept);
    }

    ENGINE_AVX512 static void expand(Column& column, int64_t kc, int8_t* out) {
        const uint8_t* mask = column.mask;
        const int8_t* values = column.values;
        int64_t k = 0;
        for (; k + 512 <= kc; k += 512) {
            __builtin_prefetch(mask + k / 8 + column.mask_ahead);
#pragma GCC unroll 8
            for (int64_t i = k; i < k + 512; i += 64) {
                uint64_t bits;
                std::memcpy(&bits, mask + i / 8, 8);
                __builtin_prefetch(values + column.values_ahead);
                values = spread(bits, values, out + i);
            }
        }
        for (; k < kc; k += 64) values = spread(mask_bits(mask, k, kc), values, out + k);
        column.values = values;
    }

    static void stretch(const int8_t* q, int64_t q_stride, int64_t m, Column* columns, int64_t kc, int32_t* sums) {
        constexpr int64_t kStride = kDepth + 64;  // not a power of two: rows would drive each other out of the cache
        alignas(64) int8_t w[kColumns * kStride];
        for (int c = 0; c < kColumns; ++c) expand(columns[c], kc, w + c * kStride);
        constexpr int64_t kRows = DotTilesAvx512::kRows;
        const int64_t tiles = (m + kRows - 1) / kRows;
        for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
            const int64_t count = (m - row + tiles - tile - 1) / (tiles - tile);
            const int8_t* next = q + (row + count) % m * q_stride;
            int32_t part[(kRows + 3) / 4 * 4 * kColumns];
            dot_tile<DotTilesAvx512>(count, {q + row * q_stride, q_stride, w, kStride, kc, w, 0, next, w}, part);
            std::copy_n(part, count * kColumns, sums + row * kColumns);
            row += count;
        }
    }
};
#endif

struct ValuesScratch;  // tag: a thread's copies of values at the tensor's end

// Asks memory for what the next stretch of a row will need: about as much as the last did.
inline void prefetch_stretch(const Int8Bitmap& weight, const uint8_t* mask, int64_t position, int64_t kc,
                             int64_t taken) {
    for (int64_t i = 0; i < mask_bytes(kc); i += 64) __builtin_prefetch(mask + i);
    const int64_t end = std::min(weight.nnz, position + taken);
    for (int64_t i = position; i < end; i += 64) __builtin_prefetch(weight.values + i);
}

// Sums [f.rows, kGroupRows] to outputs.
template <class Kernel, class T>
void finish(const FinishRows<T>& f, const int64_t* sums) {
#if ENGINE_X86
    if constexpr (Kernel::kShifted) return PanelAvx512::finish(f, sums, kGroupRows);
#endif
    finish_rows<0>(f, sums, kGroupRows);
}

// Outputs [begin, end) of every row of activations.
template <class Kernel, class T>
void dot_outputs(const LinearCall<T>& call, const QuantizedRows<typename Kernel::Q>& rows, const Int8Bitmap& weight,
                 int64_t begin, int64_t end, BadRow& bad) {
    constexpr int kColumns = Kernel::kColumns;
    const int64_t depth = Kernel::depth(call.m), buffer_bytes = std::min(depth, call.k) + kReadAhead;
    Scratch<ValuesScratch> scratch(kColumns * (buffer_bytes + 64));
    int8_t* buffers[kColumns];
    for (auto& buffer : buffers) buffer = scratch.take<int8_t>(buffer_bytes);

    for (int64_t first = begin; first < end; first += kGroupRows) {
        const int64_t group = std::min(kGroupRows, end - first);
        int64_t position[kGroupRows], sums[kDotRows][kGroupRows] = {};
        std::copy_n(weight.row_offsets + first, group, position);
        for (int64_t k0 = 0; k0 < call.k; k0 += depth) {
            const int64_t kc = std::min(depth, call.k - k0);
            for (int64_t j = 0; j < group; j += kColumns) {
                Column columns[kColumns];
                const int8_t* start[kColumns];
                for (int c = 0; c < kColumns; ++c) {
                    // In the place of a row that is missing the first is read once more.
                    const int64_t row = j + c < group ? j + c : j;
                    start[c] = weight.readable(position[row], kc, buffers[c]);
                    const int64_t next = std::min(first + row + kColumns, weight.n);
                    columns[c] = {weight.row_mask(first + row) + k0 / 8, start[c],
                                  weight.row_offsets[next] - weight.row_offsets[first + row],
                                  kColumns * mask_bytes(call.k)};
                }
                int32_t part[kDotRows * kColumns];
                Kernel::stretch(rows.q + k0, rows.stride, call.m, columns, kc, part);
                for (int c = 0; c < kColumns && j + c < group; ++c) {
                    const int64_t taken = columns[c].values - start[c];
                    position[j + c] += taken;
                    for (int64_t r = 0; r < call.m; ++r) sums[r][j + c] += part[r * kColumns + c];
                    if constexpr (Kernel::kReadsAhead) continue;
                    if (k0 + kc < call.k) {
                        prefetch_stretch(weight, columns[c].mask + depth / 8, position[j + c], kc, taken);
                    } else if (first + kGroupRows + j + c < end) {
                        const int64_t next = first + kGroupRows + j + c;
                        prefetch_stretch(weight, weight.row_mask(next), weight.row_offsets[next], kc, taken);
                    }
                }
            }
        }
        for (int64_t j = 0; j < group; ++j) {
            if (!weight.ends_well(first + j, position[j])) bad.record(first + j);
        }
        finish<Kernel>(FinishRows<T>{call, rows.scale, rows.sum, 0, call.m, first, group}, sums[0]);
    }
}

template <class Kernel, class T>
void dot_linear(const LinearCall<T>& call, const Int8Bitmap& weight, BadRow& bad) {
    using Rows = QuantizedRows<typename Kernel::Q>;
    ActivationScratch scratch(Rows::scratch_bytes(call.m, call.k));
    const Rows rows(scratch, call.m, call.k);
    quantize_activations(call, 0, rows);
    parallel_rows(call.n, call.k * (1 + call.m / 4),
                  [&](int64_t begin, int64_t end) { dot_outputs<Kernel>(call, rows, weight, begin, end, bad); });
}

template <class T>
void linear(const LinearCall<T>& call, const Int8Bitmap& weight, BadRow& bad) {
    if (call.m == 0) return;
#if ENGINE_X86
    if (isa() == Isa::avx512 && call.m <= (call.k < 1024 ? 16 : kDotRows)) {
        if (call.m == 1) return dot_linear<VectorAvx512>(call, weight, bad);
        if (call.m <= MatrixAvx512::kTwo) return dot_linear<MatrixAvx512>(call, weight, bad);
        return dot_linear<SpreadAvx512>(call, weight, bad);
    }
#endif
    if (call.m > 16) return int8_panel_linear(call, BitmapProvider(weight, bad));
#if ENGINE_X86
    if (isa() == Isa::avx2) {
        return call.m == 1 ? dot_linear<VectorAvx2>(call, weight, bad) : dot_linear<MatrixAvx2>(call, weight, bad);
    }
#endif
    dot_linear<MatrixPortable>(call, weight, bad);
}

void check(int64_t k, const Tensor& bitmask, const Tensor& row_offsets, const Tensor& values, const Tensor& scale,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale) {
    STD_TORCH_CHECK(bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Byte && bitmask.size(1) == mask_bytes(k),
                    "bitmap_int8_linear: bitmask: expected uint8 [N, ceil(K / 8)]");
    const int64_t n = bitmask.size(0);
    STD_TORCH_CHECK(
        row_offsets.dim() == 1 && row_offsets.size(0) == n + 1 && row_offsets.scalar_type() == ScalarType::Long,
        "bitmap_int8_linear: row_offsets: expected int64 [N + 1]");
    STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Char,
                    "bitmap_int8_linear: values: expected int8 [nnz]");
    STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == n && scale.scalar_type() == ScalarType::Float,
                    "bitmap_int8_linear: scale: expected float32 [N]");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "bitmap_int8_linear: bias: expected shape [N]");
    check_input_scale("bitmap_int8_linear", input_scale, k);
}

template <bool as_patches>
Tensor bitmap_int8_linear(Tensor x_in, Tensor bitmask_in, Tensor row_offsets_in, Tensor values_in, Tensor scale_in,
                          std::optional<Tensor> bias, std::optional<Tensor> input_scale) {
    LinearInput input("bitmap_int8_linear", x_in, as_patches);
    check(input.k, bitmask_in, row_offsets_in, values_in, scale_in, bias, input_scale);
    const Tensor& x = input.x;
    const Tensor bitmask = as_contiguous(bitmask_in), scale = as_contiguous(scale_in);
    const Tensor row_offsets = as_contiguous(row_offsets_in), values = as_contiguous(values_in);
    const int64_t n = bitmask.size(0), k = input.k, nnz = values.numel();
    check_row_offsets("bitmap_int8_linear", data<int64_t>(row_offsets), n, nnz);
    input.sizes.back() = n;
    Tensor y = new_tensor(x, input.sizes, x.scalar_type());
    const FloatBias as_float(bias);
    if (input_scale) input_scale = as_contiguous(*input_scale);
    const Int8Bitmap weight{data<uint8_t>(bitmask), data<int64_t>(row_offsets), data<int8_t>(values), n, k, nnz};
    BadRow bad;
    dispatch_float(x.scalar_type(), "bitmap_int8_linear: x", [&](auto zero) {
        using T = decltype(zero);
        linear<T>({data<T>(x), input_scale_of(input_scale), data<float>(scale), as_float.data(), mutable_data<T>(y),
                   input.m, n, k, input.where()},
                  weight, bad);
    });
    bad.raise("bitmap_int8_linear");
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("bitmap_int8_linear", TORCH_BOX(&engine::bitmap_int8_linear<false>));
    m.impl("bitmap_int8_linear.patches", TORCH_BOX(&engine::bitmap_int8_linear<true>));
}
