// The kept elements of a dense row moved together, by the row's bitmask: the writing half of what makes a bitmap.
//
// A row never writes beyond its own values, so that rows may be packed in any order and by any thread: whole vectors
// are stored, each over the unused end of the one before, only while they fit, and the row's last few values one by
// one.
#pragma once

#include "common/bitmap.h"
#include "common/registers_avx512.h"

namespace engine {

// What packs a whole row. Elements move as bits: W is an unsigned type of their size.
template <class W>
using PackRow = void (*)(const uint8_t* mask,  // [ceil(k/8)]
                         const W* row,         // [k]
                         int64_t k,
                         W* out,           // [length]
                         int64_t length);  // the number of bits set in mask below k

// Elements [begin, k), begin a multiple of 8, to out[done] and on.
template <class W>
ENGINE_INLINE void pack_rest(const uint8_t* mask, const W* row, int64_t begin, int64_t k, W* out, int64_t done) {
    for (int64_t i = begin; i < k; i += 64) {
        for (uint64_t bits = mask_bits(mask, i, k); bits != 0; bits &= bits - 1) {
            out[done++] = row[i + __builtin_ctzll(bits)];
        }
    }
}

template <class W>
void pack_row_portable(const uint8_t* mask, const W* row, int64_t k, W* out, int64_t /*length*/) {
    pack_rest(mask, row, 0, k, out, 0);
}

// For mask byte m: which of the 8 elements come first, second, ...; the rest is 0.
constexpr auto make_pack_positions() {
    std::array<std::array<uint8_t, 8>, 256> table{};
    for (int m = 0; m < 256; ++m) {
        int kept = 0;
        for (uint8_t i = 0; i < 8; ++i) {
            if ((m >> i & 1) != 0) table[m][kept++] = i;
        }
    }
    return table;
}
// The same as pshufb controls for 8 elements of 2 bytes.
constexpr ByteTable make_pack_pairs() {
    ByteTable table{};
    const auto positions = make_pack_positions();
    for (int m = 0; m < 256; ++m) {
        for (int i = 0; i < 16; ++i) table[m][i] = static_cast<uint8_t>(2 * positions[m][i / 2] + i % 2);
    }
    return table;
}
alignas(64) inline constexpr auto kPackPositions = make_pack_positions();
alignas(64) inline constexpr ByteTable kPackPairs = make_pack_pairs();

#if ENGINE_X86
ENGINE_AVX2 ENGINE_INLINE __m128i pack_positions_avx2(uint32_t mask_byte) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPackPositions[mask_byte].data()));
}

// The kept ones of row[0..8) by mask byte `m` to out, of which 8 are written.
template <class W>
ENGINE_AVX2 ENGINE_INLINE void pack_8_avx2(const W* row, uint32_t m, W* out) {
    if constexpr (sizeof(W) == 2) {
        const auto control = _mm_load_si128(reinterpret_cast<const __m128i*>(kPackPairs[m].data()));
        const auto all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(all, control));
    } else {
        static_assert(sizeof(W) == 4);
        const auto all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        const __m256i packed = _mm256_permutevar8x32_epi32(all, _mm256_cvtepu8_epi32(pack_positions_avx2(m)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
    }
}

template <class W>
ENGINE_AVX2 void pack_row_avx2(const uint8_t* mask, const W* row, int64_t k, W* out, int64_t length) {
    int64_t done = 0, i = 0;
    for (; i + 64 <= k && done + 64 <= length; i += 64) {
        const uint64_t bits = mask_bits(mask, i, k);
#pragma GCC unroll 8
        for (int j = 0; j < 64; j += 8) {
            const uint32_t m = bits >> j & 0xff;
            pack_8_avx2(row + i + j, m, out + done);
            done += popcount64(m);
        }
    }
    for (; i + 8 <= k && done + 8 <= length; i += 8) {
        pack_8_avx2(row + i, mask[i / 8], out + done);
        done += popcount64(mask[i / 8]);
    }
    pack_rest(mask, row, i, k, out, done);
}

// Compressed in a register and stored whole, since a compressing store is slow. At the row's ends by masks.
template <class W>
ENGINE_AVX512 void pack_row_avx512(const uint8_t* mask, const W* row, int64_t k, W* out, int64_t length) {
    constexpr int kLanes = 64 / sizeof(W);
    int64_t done = 0;
    for (int64_t i = 0; i < k; i += 64) {
        uint64_t bits = mask_bits(mask, i, k);
        for (int64_t j = i; j < i + 64 && j < k; j += kLanes, bits >>= kLanes) {
            const auto inside = ~uint64_t{0} >> (64 - std::min<int64_t>(kLanes, k - j));
            const int count = popcount64(bits << (64 - kLanes));  // of these lanes alone
            const auto fits = done + kLanes <= length ? ~uint64_t{0} : ~(~uint64_t{0} << count);
            if constexpr (sizeof(W) == 2) {
                const __m512i all = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(inside), row + j);
                const __m512i packed = compress_lanes_avx512<W>(bits, all);
                _mm512_mask_storeu_epi16(out + done, static_cast<__mmask32>(fits), packed);
            } else {
                static_assert(sizeof(W) == 4);
                const __m512i all = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(inside), row + j);
                const __m512i packed = compress_lanes_avx512<W>(bits, all);
                _mm512_mask_storeu_epi32(out + done, static_cast<__mmask16>(fits), packed);
            }
            done += count;
        }
    }
}
#endif

template <class W>
PackRow<W> pack_row() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return pack_row_avx2<W>;
    if (isa() == Isa::avx512) return pack_row_avx512<W>;
#endif
    return pack_row_portable<W>;
}

}  // namespace engine
