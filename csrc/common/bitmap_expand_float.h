// A bitmap's float values spread over a register and turned into fp32. A pruned place becomes exactly 0, whatever was
// loaded for it.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "common/bitmap.h"
#include "common/dtype.h"
#include "common/registers_avx512.h"

#if ENGINE_X86
namespace engine {

// For mask byte m: which of the kept values goes to each of 8 places; negative where pruned.
using LaneTable = std::array<std::array<int32_t, 8>, 256>;
constexpr LaneTable make_expand_lanes() {
    LaneTable table{};
    for (int m = 0; m < 256; ++m) {
        const auto position = expand_positions(m);
        for (int i = 0; i < 8; ++i) table[m][i] = position[i] < 0x80 ? position[i] : -1;
    }
    return table;
}

// pshufb controls that spread bfloat16 values over the upper halves of 8 places of 4 bytes, which makes them fp32.
using WideTable = std::array<std::array<uint8_t, 32>, 256>;
constexpr WideTable make_expand_bfloat16() {
    WideTable table{};
    for (int m = 0; m < 256; ++m) {
        const auto position = expand_positions(m);
        for (int i = 0; i < 8; ++i) {
            const bool kept = position[i] < 0x80;
            table[m][4 * i] = table[m][4 * i + 1] = 0x80;
            table[m][4 * i + 2] = kept ? static_cast<uint8_t>(2 * position[i]) : 0x80;
            table[m][4 * i + 3] = kept ? static_cast<uint8_t>(2 * position[i] + 1) : 0x80;
        }
    }
    return table;
}
alignas(64) inline constexpr LaneTable kExpandLanes = make_expand_lanes();
alignas(64) inline constexpr WideTable kExpandBFloat16 = make_expand_bfloat16();

// 8 weights of mask byte `m` from the kept ones at `values`, of which 8 are loaded.
ENGINE_AVX2 ENGINE_INLINE __m256 expand_8_avx2(const float* values, uint32_t m) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpandLanes[m].data()));
    const __m256 all = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_blendv_ps(all, _mm256_setzero_ps(), _mm256_castsi256_ps(lane));
}
ENGINE_AVX2 ENGINE_INLINE __m256 expand_8_avx2(const Half* values, uint32_t m) {
    return _mm256_cvtph_ps(expand_8x16_avx2(values, m));
}
ENGINE_AVX2 ENGINE_INLINE __m256 expand_8_avx2(const BFloat16* values, uint32_t m) {
    const __m256i control = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpandBFloat16[m].data()));
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(all), control));
}

// 32 weights of the mask's bits from the kept ones at `values`, of which 32 are loaded.
ENGINE_AVX512 ENGINE_INLINE void expand_32_avx512(const float* values, uint32_t m, __m512 (&w)[2]) {
    const __m512i first = _mm512_loadu_si512(values), second = _mm512_loadu_si512(values + popcount64(m & 0xffff));
    w[0] = _mm512_castsi512_ps(expand_lanes_avx512<float>(m & 0xffff, first));
    w[1] = _mm512_castsi512_ps(expand_lanes_avx512<float>(m >> 16, second));
}
ENGINE_AVX512 ENGINE_INLINE void expand_32_avx512(const Half* values, uint32_t m, __m512 (&w)[2]) {
    const __m512i both = expand_lanes_avx512<uint16_t>(m, _mm512_loadu_si512(values));
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}
ENGINE_AVX512 ENGINE_INLINE void expand_32_avx512(const BFloat16* values, uint32_t m, __m512 (&w)[2]) {
    const __m512i both = expand_lanes_avx512<uint16_t>(m, _mm512_loadu_si512(values));
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    w[1] = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
}

// The same, but of bfloat16 the even ones come first, then the odd ones, each of which one cheap instruction makes
// fp32.
template <class V>
ENGINE_AVX512 ENGINE_INLINE void expand_32_apart_avx512(const V* values, uint32_t m, __m512 (&w)[2]) {
    if constexpr (std::is_same_v<V, BFloat16>) {
        const __m512i both = expand_lanes_avx512<uint16_t>(m, _mm512_loadu_si512(values));
        const __m512i odd = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
        w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        w[1] = _mm512_castsi512_ps(_mm512_and_si512(both, odd));
    } else {
        expand_32_avx512(values, m, w);
    }
}

}  // namespace engine
#endif
