// The values of a row back at their places by the row's bitmask, zeros elsewhere. Values move as bits: W is an unsigned
// type of their size.
#pragma once

#include "common/bitmap.h"
#include "common/registers_avx512.h"

namespace engine {

// What fills a whole row: returns how many values it took, which is the number of bits set in the row.
template <class W>
using ExpandRow = int64_t (*)(const uint8_t* mask,  // [ceil(k/8)]
                              const W* values,      // the row's; k + kReadAhead may be read
                              int64_t k,
                              W* out);  // [k]

// Places [begin, k) one by one, from the value at `taken` on.
template <class W>
ENGINE_INLINE int64_t expand_rest(const uint8_t* mask, const W* values, int64_t begin, int64_t taken, int64_t k,
                                  W* out) {
    for (int64_t i = begin; i < k; ++i) {
        const W kept = mask[i / 8] >> (i % 8) & 1;
        out[i] = static_cast<W>(values[taken] * kept);  // without a branch: half of them would be mispredicted
        taken += kept;
    }
    return taken;
}

template <class W>
int64_t expand_row_portable(const uint8_t* mask, const W* values, int64_t k, W* out) {
    return expand_rest(mask, values, 0, 0, k, out);
}

#if ENGINE_X86
template <class W>
ENGINE_AVX2 int64_t expand_row_avx2(const uint8_t* mask, const W* values, int64_t k, W* out) {
    int64_t taken = 0, i = 0;
    for (; i + 16 <= k; i += 16) {
        const uint32_t m0 = mask[i / 8], m1 = mask[i / 8 + 1];
        const int64_t middle = taken + popcount64(m0);
        if constexpr (sizeof(W) == 1) {
            const __m128i all = expand_16x8_avx2(values + taken, m1 << 8 | m0);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), all);
        } else if constexpr (sizeof(W) == 2) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), expand_8x16_avx2(values + taken, m0));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 8), expand_8x16_avx2(values + middle, m1));
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), expand_8x32_avx2(values + taken, m0));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 8), expand_8x32_avx2(values + middle, m1));
        }
        taken = middle + popcount64(m1);
    }
    return expand_rest(mask, values, i, taken, k, out);
}

template <class W>
ENGINE_AVX512 int64_t expand_row_avx512(const uint8_t* mask, const W* values, int64_t k, W* out) {
    constexpr int kLanes = 64 / sizeof(W);
    int64_t taken = 0;
    for (int64_t i = 0; i < k; i += 64) {
        uint64_t bits = mask_bits(mask, i, k);
        uint64_t inside = k - i >= 64 ? ~uint64_t{0} : ~uint64_t{0} >> (64 - (k - i));
        for (int64_t j = i; j < i + 64 && j < k; j += kLanes, bits >>= kLanes % 64, inside >>= kLanes % 64) {
            const __m512i all = expand_lanes_avx512<W>(bits, _mm512_loadu_si512(values + taken));
            if constexpr (sizeof(W) == 1) {
                _mm512_mask_storeu_epi8(out + j, inside, all);
            } else if constexpr (sizeof(W) == 2) {
                _mm512_mask_storeu_epi16(out + j, static_cast<__mmask32>(inside), all);
            } else {
                _mm512_mask_storeu_epi32(out + j, static_cast<__mmask16>(inside), all);
            }
            taken += popcount64(bits << (64 - kLanes));  // of these lanes alone
        }
    }
    return taken;
}
#endif

template <class W>
ExpandRow<W> expand_row() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return expand_row_avx2<W>;
    if (isa() == Isa::avx512) return expand_row_avx512<W>;
#endif
    return expand_row_portable<W>;
}

}  // namespace engine
