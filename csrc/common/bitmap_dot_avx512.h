// The kernel of common/bitmap_dot.h for one row of activations on AVX-512, and how weights are spread there.
#pragma once

#include "common/bitmap_dot.h"
#if ENGINE_X86
#include <immintrin.h>

#include "common/dot_int8.h"
#include "common/registers_avx512.h"

namespace engine {

// 64 weights, shifted to unsigned.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_shifted_avx512(const int8_t*& values, uint64_t bits) {
    const __m512i shift = _mm512_set1_epi8(-128);  // which is what 0 becomes
    const __m512i packed = _mm512_xor_si512(_mm512_loadu_si512(values), shift);
    bits = integer_bits(bits);
    values += popcount64(bits);
    return _mm512_mask_expand_epi8(opaque_avx512(shift), bits, packed);
}

// The same for the word at `word`.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_shifted_avx512(const int8_t*& values, const uint8_t* word) {
    const __m512i shift = _mm512_set1_epi8(-128);
    const __m512i packed = _mm512_xor_si512(_mm512_loadu_si512(values), shift);
    uint64_t bits;
    std::memcpy(&bits, word, 8);
    values += popcount64(bits);
    return _mm512_mask_expand_epi8(opaque_avx512(shift), load_mask_avx512(word), packed);
}

// The same for a word that seldom has more than 32 bits: half a line is loaded then, and most loads of a whole one
// touch two lines, each of which takes a turn.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_shifted_sparse_avx512(const int8_t*& values, uint64_t bits) {
    const __m512i shift = _mm512_set1_epi8(-128);
    bits = integer_bits(bits);
    const int64_t count = popcount64(bits);
    __m512i packed;
    if (__builtin_expect(count <= 32, 1)) {
        packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    } else {
        packed = _mm512_loadu_si512(values);
    }
    values += count;
    return _mm512_mask_expand_epi8(opaque_avx512(shift), bits, _mm512_xor_si512(packed, shift));
}

// One row of activations: four sums, as one would wait for itself.
struct VectorAvx512 {
    using Q = int8_t;
    static constexpr int kColumns = 1;
    static constexpr int kShift = 128;
    static constexpr bool kReadsAhead = true;
    // How far ahead memory is asked for: masks are one stream, values another. A core needs much on its way.
    static constexpr int64_t kValuesAhead = 8 << 10, kMaskAhead = 2 << 10;
    static int64_t depth(int64_t) { return kExactDepth; }

    template <bool sparse>
    ENGINE_AVX512 static void stretch_of(const int8_t* q, Column& column, int64_t kc, int32_t* sums) {
        const uint8_t* mask = column.mask;
        const int8_t* values = column.values;
        __m512i acc[4];
        for (auto& a : acc) a = _mm512_setzero_si512();
        int64_t k = 0;
        for (; k + 256 <= kc; k += 256) {
            uint64_t bits[4];
            std::memcpy(bits, mask + k / 8, 32);
            __builtin_prefetch(mask + k / 8 + kMaskAhead);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                // Fewer values are asked for less often.
                if (!sparse || i % 2 == 0) __builtin_prefetch(values + kValuesAhead);
                const __m512i w =
                    sparse ? expand_shifted_sparse_avx512(values, bits[i]) : expand_shifted_avx512(values, bits[i]);
                acc[i] = _mm512_dpbusd_epi32(acc[i], w, _mm512_load_si512(q + k + 64 * i));
            }
        }
        for (; k < kc; k += 64) {
            const __m512i w = expand_shifted_avx512(values, mask_bits(mask, k, kc));
            acc[0] = _mm512_dpbusd_epi32(acc[0], w, _mm512_load_si512(q + k));
        }
        column.values = values;
        sums[0] = _mm512_reduce_add_epi32(
            _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3])));
    }

    static void stretch(const int8_t* q, int64_t, int64_t, Column* columns, int64_t kc, int32_t* sums) {
        // values_ahead is what the whole row holds, mask_ahead an eighth of its K. With a third kept at random one word
        // in 400 has more than 32 bits; a branch that is mispredicted costs as much as several words.
        const bool sparse = columns[0].values_ahead * 3 <= columns[0].mask_ahead * 8;
        if (sparse) return stretch_of<true>(q, columns[0], kc, sums);
        stretch_of<false>(q, columns[0], kc, sums);
    }
};

}  // namespace engine
#endif
