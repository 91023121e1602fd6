// Dot products of a few rows of int8 activations and a few of int8 weights, which lie as they are in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/int8_activations.h"
#include "common/registers_avx512.h"

namespace engine {

constexpr int kDotColumns = 4;     // weight rows that a dot-product kernel reads side by side
constexpr int64_t kDotBlock = 96;  // outputs that are finished together: whole groups of 4, 6 and 16

// As much of K as leaves m rows of activations in L1 for many outputs.
template <class Q>
int64_t depth_in_l1(int64_t m) {
    constexpr int64_t kBytes = 20 << 10;
    return std::clamp<int64_t>(kBytes / static_cast<int64_t>(m * sizeof(Q)) / 64 * 64, 384, kExactDepth);
}

// What a tile multiplies, R rows by a kernel's columns, and what it may ask for on the way.
template <class Q>
struct DotTile {
    const Q* q;  // [R, q_stride]
    int64_t q_stride;
    const int8_t* w;  // [columns, stride]
    int64_t stride, kc;
    const int8_t* ahead;  // what to ask memory for: at each step along K, [asked, ahead_stride] lines
    int64_t ahead_stride;
    int64_t asked;    // 1 to kDotColumns
    const Q* next_q;  // the activations and weights that the next tile begins with: asked for, from L2 to L1
    const int8_t* next_w;
    int64_t ahead_step = 64;  // from what one step asks for to what the next does
    bool add = false;         // to the sums that are there
};

#if ENGINE_X86
ENGINE_AVX512 ENGINE_INLINE __m512i add_avx512(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
ENGINE_AVX512 ENGINE_INLINE __m512 add_avx512(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
// The bits as they are, as integers; and as a vector of the type of the second argument.
ENGINE_AVX512 ENGINE_INLINE __m512i bits_avx512(__m512i v) { return v; }
ENGINE_AVX512 ENGINE_INLINE __m512i bits_avx512(__m512 v) { return _mm512_castps_si512(v); }
ENGINE_AVX512 ENGINE_INLINE __m512i from_bits_avx512(__m512i bits, __m512i) { return bits; }
ENGINE_AVX512 ENGINE_INLINE __m512 from_bits_avx512(__m512i bits, __m512) { return _mm512_castsi512_ps(bits); }

// The halves of a and b added, by units of 32 bits, of 64, of 128 and of 256: after all four, 16 vectors are one. V is
// a vector of int32 or of float.
template <int unit, class V>
ENGINE_AVX512 ENGINE_INLINE V add_halves_avx512(V a, V b) {
    const __m512i x = bits_avx512(a), y = bits_avx512(b);
    __m512i low, high;
    if constexpr (unit == 32) low = _mm512_unpacklo_epi32(x, y), high = _mm512_unpackhi_epi32(x, y);
    if constexpr (unit == 64) low = _mm512_unpacklo_epi64(x, y), high = _mm512_unpackhi_epi64(x, y);
    if constexpr (unit == 128) low = _mm512_shuffle_i32x4(x, y, 0x44), high = _mm512_shuffle_i32x4(x, y, 0xee);
    if constexpr (unit == 256) low = _mm512_shuffle_i32x4(x, y, 0x88), high = _mm512_shuffle_i32x4(x, y, 0xdd);
    return add_avx512(from_bits_avx512(low, a), from_bits_avx512(high, a));
}
// Four vectors as one that has each one's sum spread over four lanes, and four of those as one that has the sums.
template <class V>
ENGINE_AVX512 ENGINE_INLINE V add_lanes_avx512(const V* a) {
    return add_halves_avx512<64>(add_halves_avx512<32>(a[0], a[1]), add_halves_avx512<32>(a[2], a[3]));
}
template <class V>
ENGINE_AVX512 ENGINE_INLINE V add_quarters_avx512(const V* a) {
    return add_halves_avx512<256>(add_halves_avx512<128>(a[0], a[1]), add_halves_avx512<128>(a[2], a[3]));
}

// The 16 lanes of each of `count` vectors added up, and to what is there if `add`.
template <class V, class Sum, size_t count>
ENGINE_AVX512 ENGINE_INLINE void store_sums_avx512(const V (&acc)[count], bool add,
                                                   Sum* sums) {  // [count, rounded up to 16], int32_t or float
    constexpr size_t kVectors = (count + 15) / 16;
    V four[4 * kVectors];  // four sums each, spread over four lanes; the last ones may be anything
#pragma GCC unroll 8
    for (size_t i = 0; i < 4 * kVectors; ++i) {
        constexpr size_t last = count - 1;
        const size_t j = 4 * i;
        const V a[] = {acc[std::min(j, last)], acc[std::min(j + 1, last)], acc[std::min(j + 2, last)],
                       acc[std::min(j + 3, last)]};
        four[i] = j < count ? add_lanes_avx512(a) : four[0];
    }
#pragma GCC unroll 2
    for (size_t i = 0; i < kVectors; ++i) {
        V sum = add_quarters_avx512(four + 4 * i);
        if (add) sum = add_avx512(sum, from_bits_avx512(_mm512_loadu_si512(sums + 16 * i), sum));
        _mm512_storeu_si512(sums + 16 * i, bits_avx512(sum));
    }
}

// Written as assembly (accumulate_avx512) because GCC would rather read an operand from memory four times than once,
// and then moves sums from register to register and through memory. Each tile asks L2 for the first lines of the next
// one, where the hardware has yet to notice ten new streams: that alone is a fifth of the time at K = 4096.
template <int most_rows, int columns, int locality>  // locality of what is asked for, as __builtin_prefetch has it
struct DotTiles {
    using Q = int8_t;
    static constexpr int64_t kRows = most_rows;
    static constexpr int64_t kColumns = columns;
    static constexpr int64_t kSums = (kRows * kColumns + 15) / 16 * 16;  // that a tile writes: whole vectors
    // Up to so many rows of activations it is the faster way: adding 16 lanes up costs as much as 160 of K, packing for
    // panels as much as 5 rows.
    static int64_t rows(int64_t k) { return k < 1024 ? 16 : 64; }
    static constexpr int kNextLines = 3;

    template <int R, int asked, bool whole>
    ENGINE_AVX512 ENGINE_INLINE static void step(__m512i (&acc)[R * columns], const int8_t* q, int64_t q_stride,
                                                 const int8_t* w, int64_t stride, __mmask64 inside, const int8_t* ahead,
                                                 int64_t ahead_stride) {
        const __m512i shift = _mm512_set1_epi8(-128);
        __m512i shifted[columns];
#pragma GCC unroll 6
        for (int j = 0; j < columns; ++j) {
            if (j < asked) __builtin_prefetch(ahead + j * ahead_stride, 0, locality);
            const int8_t* from = w + j * stride;
            const __m512i weights = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(inside, from);
            shifted[j] = _mm512_xor_si512(weights, shift);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i x = _mm512_load_si512(q + r * q_stride);
#pragma GCC unroll 6
            for (int j = 0; j < columns; ++j) accumulate_avx512(acc[r * columns + j], shifted[j], x);
        }
    }

    // Unrolled by force, else GCC keeps the sums in memory.
    template <int R, int asked>
    ENGINE_AVX512 __attribute__((noinline)) static void tile_of(
        const DotTile<int8_t>& t,
        int32_t* sums) {  // [R, columns] and what fills the last vector, 128 · (sum of q) too large
        const int8_t *q = t.q, *w = t.w, *ahead = t.ahead;
        const int64_t q_stride = t.q_stride, stride = t.stride, kc = t.kc;
        const int64_t ahead_stride = t.ahead_stride, ahead_step = t.ahead_step;
        __m512i acc[R * columns];
#pragma GCC unroll 24
        for (int i = 0; i < R * columns; ++i) acc[i] = _mm512_setzero_si512();
        int64_t k = 0;
        for (; k + 64 <= kc; k += 64, ahead += ahead_step)
            step<R, asked, true>(acc, q + k, q_stride, w + k, stride, 0, ahead, ahead_stride);
        if (k < kc) {
            const __mmask64 inside = ~uint64_t{0} >> (64 - (kc - k));
            step<R, asked, false>(acc, q + k, q_stride, w + k, stride, inside, ahead, ahead_stride);
        }
        for (int line = 0; line < kNextLines; ++line) {
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) __builtin_prefetch(t.next_q + r * q_stride + 64 * line);
#pragma GCC unroll 6
            for (int j = 0; j < columns; ++j) __builtin_prefetch(t.next_w + j * stride + 64 * line);
        }
        store_sums_avx512(acc, t.add, sums);
    }

    template <int R>
    static void tile(const DotTile<int8_t>& t, int32_t* sums) {
        if (t.asked == 1) return tile_of<R, 1>(t, sums);
        if (t.asked == 2) return tile_of<R, 2>(t, sums);
        tile_of<R, 4>(t, sums);
    }
};
using DotTilesAvx512 = DotTiles<6, kDotColumns, 2>;
#endif

// `count` rows of activations, at most Kernel::kRows, by as many rows of weights as a tile has.
template <class Kernel, int R = Kernel::kRows>
void dot_tile(int64_t count, const DotTile<typename Kernel::Q>& t, int32_t* sums) {
    if constexpr (R > 1) {
        if (count < R) return dot_tile<Kernel, R - 1>(count, t, sums);
    }
    Kernel::template tile<R>(t, sums);
}

}  // namespace engine
