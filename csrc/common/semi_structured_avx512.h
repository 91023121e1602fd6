// 2:4 int8 weights and AVX-512: rows of weights by rows of activations as they lie, and spread for other kernels.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include "common/dot_int8.h"
#include "common/semi_structured.h"

namespace engine {

// Two bits a value to one bit a weight: a nibble of metadata holds two places of four, a nibble of a bitmap four bits.
// So the bytes of both stand for the same 8 weights.
ENGINE_AVX512 ENGINE_INLINE __m512i bitmap_of_places_avx512(__m512i metadata) {
    // 1 << (i & 3) | 1 << (i >> 2), and in the upper half of a byte. vpermb looks at six bits: the table repeats.
    const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
    const __m512i high = _mm512_slli_epi16(low, 4);
    const __m512i second = _mm512_permutexvar_epi8(_mm512_srli_epi16(metadata, 4), high);
    return _mm512_or_si512(_mm512_permutexvar_epi8(metadata, low), second);
}

ENGINE_AVX512 ENGINE_INLINE __m512i load_places_avx512(const uint8_t* metadata, int64_t bytes) {
    const __mmask64 there = bytes < 64 ? (uint64_t{1} << bytes) - 1 : ~uint64_t{0};
    return bitmap_of_places_avx512(_mm512_maskz_loadu_epi8(there, metadata));
}

// The bitmap of a stretch of a row, of `bytes` rounded up to 64.
ENGINE_AVX512 inline void bitmap_of_row_avx512(const uint8_t* metadata, int64_t bytes, uint8_t* bitmap) {
    for (int64_t i = 0; i < bytes; i += 64) {
        _mm512_storeu_si512(bitmap + i, load_places_avx512(metadata + i, bytes - i));
    }
}

// kc weights of a row spread over out[0, kc rounded up to 64), shifted by 128 or as they are.
template <bool shifted = false>
ENGINE_AVX512 void spread_int8_avx512(const int8_t* values, const uint8_t* metadata, int64_t kc, int8_t* out) {
    const __m512i shift = _mm512_set1_epi8(shifted ? -128 : 0);
    alignas(64) uint64_t bits[8];
    const auto* words = reinterpret_cast<const uint8_t*>(bits);
    int64_t k = 0;
    for (; k + 512 <= kc; k += 512) {
        _mm512_store_si512(bits, bitmap_of_places_avx512(_mm512_loadu_si512(metadata + k / 8)));
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + k / 2 + 32 * i));
            const __m512i all = expand_bytes_avx512(words + 8 * i, _mm512_castsi256_si512(half));
            _mm512_store_si512(out + k + 64 * i, _mm512_xor_si512(all, shift));
        }
    }
    if (k == kc) return;
    const int64_t groups = groups_of_four(kc - k);
    _mm512_store_si512(bits, load_places_avx512(metadata + k / 8, (groups + 1) / 2));
    for (int64_t i = 0; k + i < kc; i += 64) {
        const __mmask64 there = ~uint64_t{0} >> (64 - std::min<int64_t>(32, 2 * groups - i / 2));
        const __m512i packed = _mm512_maskz_loadu_epi8(there, values + (k + i) / 2);
        const __m512i all = expand_bytes_avx512(words + i / 8, packed);
        _mm512_store_si512(out + k + i, _mm512_xor_si512(all, shift));
    }
}

// Rows of weights, one after another.
struct SemiRows {
    const int8_t* values;
    const uint8_t* metadata;
    int64_t values_stride, metadata_stride;
};

// Dot products with the stored values alone: their two bits become an index that fetches the activation each belongs
// to. For 128 weights that is a permutation and a product, which take as long as the two products of a weight that was
// spread (both go through the same port); but nothing has to be spread.
//
// Activations are the unsigned side, shifted by 128, so that what sums are too large by, 128 · (sum of a row's values),
// is the same for all of them.
struct SemiDotAvx512 {
    // 128 weights: 64 values, and where among 128 activations that of each stands.
    ENGINE_AVX512 ENGINE_INLINE static __m512i fetch_index(const uint8_t* metadata) {
        alignas(64) static constexpr uint8_t kPairs[64] = {
            0, 1, 0, 0, 0, 0, 0, 0, 2,  3,  0, 0, 0, 0, 0, 0, 4,  5,  0, 0, 0, 0, 0, 0, 6,  7,  0, 0, 0, 0, 0, 0,
            8, 9, 0, 0, 0, 0, 0, 0, 10, 11, 0, 0, 0, 0, 0, 0, 12, 13, 0, 0, 0, 0, 0, 0, 14, 15, 0, 0, 0, 0, 0, 0};
        const __m512i shifts = _mm512_broadcast_i32x4(_mm_set1_epi64x(0x0e0c0a0806040200));
        alignas(64) static constexpr uint8_t kGroups[64] = {
            0,  0,  4,  4,  8,  8,  12,  12,  16,  16,  20,  20,  24,  24,  28,  28,  32,  32,  36,  36, 40, 40,
            44, 44, 48, 48, 52, 52, 56,  56,  60,  60,  64,  64,  68,  68,  72,  72,  76,  76,  80,  80, 84, 84,
            88, 88, 92, 92, 96, 96, 100, 100, 104, 104, 108, 108, 112, 112, 116, 116, 120, 120, 124, 124};
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata));
        const __m512i pairs = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), _mm512_load_si512(kPairs));
        const __m512i fields = _mm512_multishift_epi64_epi8(shifts, pairs);
        return _mm512_or_si512(_mm512_and_si512(fields, _mm512_set1_epi8(3)), _mm512_load_si512(kGroups));
    }

    // 128 weights of C rows by R rows of activations.
    template <int R, int C>
    ENGINE_AVX512 ENGINE_INLINE static void step(const SemiRows& w, const uint8_t* q, int64_t stride, int64_t high,
                                                 __m512i (&acc)[R * C], __m512i (&excess)[C]) {
        __m512i index[C], values[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            index[c] = fetch_index(w.metadata + c * w.metadata_stride);
            values[c] = _mm512_loadu_si512(w.values + c * w.values_stride);
            accumulate_avx512(excess[c], _mm512_set1_epi8(-128), values[c]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i first = _mm512_load_si512(q + r * stride);
            const __m512i second = _mm512_load_si512(q + r * stride + high);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                accumulate_avx512(acc[r * C + c], _mm512_permutex2var_epi8(first, index[c], second), values[c]);
            }
        }
    }

    // Four vectors, each added up.
    ENGINE_AVX512 ENGINE_INLINE static __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
        const __m512i four[] = {a, b, c, d};
        const __m512i all = add_lanes_avx512(four);
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }

    // Unrolled by force, else GCC keeps the sums in memory. Memory is asked for the next C rows.
    template <int R, int C>
    ENGINE_AVX512 __attribute__((noinline)) static void tile(const uint8_t* q,  // [R, stride]
                                                             int64_t stride, SemiRows w, int64_t kc,
                                                             int64_t values_ahead, int64_t metadata_ahead,
                                                             int32_t* sums) {  // [R, C], and up to 3 more
        const int64_t whole = kc / 128 * 128, left = kc - whole;
        // The last weights of each row, with zeros: copied now, as a call amid the products would cost the registers.
        alignas(64) int8_t last_values[C][64];
        alignas(64) uint8_t last_metadata[C][16];
        if (left > 0) {
            std::memset(last_values, 0, sizeof last_values);
            std::memset(last_metadata, 0, sizeof last_metadata);
            for (int c = 0; c < C; ++c) {
                const int64_t groups = groups_of_four(left);
                std::copy_n(w.values + c * w.values_stride + whole / 2, 2 * groups, last_values[c]);
                std::copy_n(w.metadata + c * w.metadata_stride + whole / 8, (groups + 1) / 2, last_metadata[c]);
            }
        }
        __m512i acc[R * C], excess[C];
#pragma GCC unroll 24
        for (auto& a : acc) a = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (auto& e : excess) e = _mm512_setzero_si512();
        const uint8_t* const end = q + whole;
        for (; q < end; q += 128, w.values += 64, w.metadata += 16) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                __builtin_prefetch(w.values + c * w.values_stride + values_ahead);
                __builtin_prefetch(w.metadata + c * w.metadata_stride + metadata_ahead);
            }
            step<R, C>(w, q, stride, 64, acc, excess);
        }
        // The second half of 128 activations may lie beyond the row: what is fetched meets values of 0.
        if (left > 0)
            step<R, C>({last_values[0], last_metadata[0], 64, 16}, q, stride, left > 64 ? 64 : 0, acc, excess);
#pragma GCC unroll 24
        for (int i = 0; i < R * C; ++i) acc[i] = _mm512_sub_epi32(acc[i], excess[i % C]);
        constexpr int last = R * C - 1;
#pragma GCC unroll 6
        for (int i = 0; i <= last; i += 4) {
            const __m128i sum =
                sums_of(acc[i], acc[std::min(i + 1, last)], acc[std::min(i + 2, last)], acc[std::min(i + 3, last)]);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i), sum);
        }
    }
};

}  // namespace engine
#endif
