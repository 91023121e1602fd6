// What GCC has to be told about AVX-512.
//
// vpexpand and vpcompress wait for what their destination held before. On Zen 4 they do so even where zero masking
// makes its old value worthless: with one destination for all, a loop takes 4.8 cycles an instruction instead of 1.3
// (registers alone). Given a background whose value the compiler doesn't know, it must copy that into the destination
// first, and a copy between registers costs nothing: it is done by renaming.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace engine {

// `background`, of which the compiler knows nothing. Outside a loop it stays in a register.
ENGINE_AVX512 ENGINE_INLINE __m512i opaque_avx512(__m512i background) {
#if !defined(ENGINE_EMULATE_AVX512)
    asm("" : "+v"(background));
#endif
    return background;
}
ENGINE_AVX512 ENGINE_INLINE __m512i zeros_avx512() { return opaque_avx512(_mm512_setzero_si512()); }

// Bits that are counted, and used as a mask too, in an integer register: GCC would load them into a mask register and
// fetch them back from there, which takes long.
ENGINE_AVX512 ENGINE_INLINE uint64_t integer_bits(uint64_t bits) {
#if !defined(ENGINE_EMULATE_AVX512)
    asm("" : "+r"(bits));
#endif
    return bits;
}

// Loads a word of a bitmask straight into a mask register. Where its bits are counted too, GCC would go through an
// integer register, whose kmov competes for a port that vpexpandb needs.
ENGINE_AVX512 ENGINE_INLINE __mmask64 load_mask_avx512(const uint8_t* word) {
    __mmask64 lanes;
#if defined(ENGINE_EMULATE_AVX512)
    std::memcpy(&lanes, word, sizeof lanes);
#else
    struct Word {
        uint8_t bytes[8];
    };
    asm("kmovq %1, %0" : "=k"(lanes) : "m"(*reinterpret_cast<const Word*>(word)));
#endif
    return lanes;
}

// acc += unsigned bytes by signed ones, by fours, in the order as written. GCC copies every sum to another register
// before the intrinsic and back behind it, and runs out of registers over it.
ENGINE_AVX512 ENGINE_INLINE void accumulate_avx512(__m512i& acc, __m512i unsigned_bytes, __m512i signed_bytes) {
#if defined(ENGINE_EMULATE_AVX512)
    acc = _mm512_dpbusd_epi32(acc, unsigned_bytes, signed_bytes);
#else
    asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
#endif
}

// Whether the processor has AVX512_BF16, which Ice Lake, with all of Isa::avx512, hasn't.
inline bool has_bf16() {
#if defined(ENGINE_EMULATE_AVX512)
    return true;
#else
    static const bool has = __builtin_cpu_supports("avx512bf16") != 0;
    return has;
#endif
}

// acc += products of bfloat16 by pairs. Subnormal numbers count as zero. As assembly, so that functions need no target
// of their own.
ENGINE_AVX512 ENGINE_INLINE void accumulate_pairs_avx512(__m512& acc, __m512i a, __m512i b) {
#if defined(ENGINE_EMULATE_AVX512)
    const __m512i odd = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, odd)), _mm512_castsi512_ps(_mm512_and_si512(b, odd)),
                          acc);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),
                          acc);
#else
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#endif
}

// The lowest lanes of `packed`, one a set bit, spread over the lanes whose bits are set; zeros elsewhere. Lanes have
// the size of W.
template <class W>
ENGINE_AVX512 ENGINE_INLINE __m512i expand_lanes_avx512(uint64_t bits, __m512i packed) {
    if constexpr (sizeof(W) == 1) return _mm512_mask_expand_epi8(zeros_avx512(), bits, packed);
    if constexpr (sizeof(W) == 2) {
        return _mm512_mask_expand_epi16(zeros_avx512(), static_cast<__mmask32>(bits), packed);
    }
    if constexpr (sizeof(W) == 4) {
        return _mm512_mask_expand_epi32(zeros_avx512(), static_cast<__mmask16>(bits), packed);
    }
}

// The same for bytes, by the word at `word`.
ENGINE_AVX512 ENGINE_INLINE __m512i expand_bytes_avx512(const uint8_t* word, __m512i packed) {
    return _mm512_mask_expand_epi8(zeros_avx512(), load_mask_avx512(word), packed);
}

// The other way: lanes whose bits are set, moved together at the low end; zeros above.
template <class W>
ENGINE_AVX512 ENGINE_INLINE __m512i compress_lanes_avx512(uint64_t bits, __m512i all) {
    if constexpr (sizeof(W) == 1) return _mm512_mask_compress_epi8(zeros_avx512(), bits, all);
    if constexpr (sizeof(W) == 2) {
        return _mm512_mask_compress_epi16(zeros_avx512(), static_cast<__mmask32>(bits), all);
    }
    if constexpr (sizeof(W) == 4) {
        return _mm512_mask_compress_epi32(zeros_avx512(), static_cast<__mmask16>(bits), all);
    }
}

}  // namespace engine
#endif
