// Products of bytes on 256 bits, with and without AVX-VNNI. Its instruction, vpdpbusd, multiplies 32 unsigned bytes by
// 32 signed ones and adds the products by fours.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace engine {

// The lanes added up.
ENGINE_AVX2 ENGINE_INLINE int32_t horizontal_sum_avx2(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// acc += unsigned_bytes by signed_bytes, by fours. As assembly, marked volatile, so that GCC neither reads ahead more
// than registers hold nor moves sums between registers.
ENGINE_AVX2 ENGINE_INLINE void accumulate_avx_vnni(__m256i& acc, __m256i unsigned_bytes, __m256i signed_bytes) {
#if ENGINE_AVX_VNNI
    asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(unsigned_bytes), "x"(signed_bytes));
#else  // for tests where the processor lacks it
    uint8_t a[32];
    int8_t b[32];
    int32_t sum[8];
    std::memcpy(a, &unsigned_bytes, sizeof a);
    std::memcpy(b, &signed_bytes, sizeof b);
    std::memcpy(sum, &acc, sizeof sum);
    for (int i = 0; i < 32; ++i) {
        sum[i / 4] = static_cast<int32_t>(static_cast<uint32_t>(sum[i / 4]) + static_cast<uint32_t>(a[i] * b[i]));
    }
    std::memcpy(&acc, sum, sizeof sum);
#endif
}
// The same, where signed_bytes are in memory and are wanted once.
ENGINE_AVX2 ENGINE_INLINE void accumulate_avx_vnni(__m256i& acc, __m256i unsigned_bytes, const __m256i* signed_bytes) {
#if ENGINE_AVX_VNNI
    asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(unsigned_bytes), "m"(*signed_bytes));
#else
    accumulate_avx_vnni(acc, unsigned_bytes, _mm256_load_si256(signed_bytes));
#endif
}

// acc += products. GCC would add up the products of several steps first, and spill them: what is volatile stays in
// order.
ENGINE_AVX2 ENGINE_INLINE void accumulate_avx2(__m256i& acc, __m256i products) {
    asm volatile("vpaddd %1, %0, %0" : "+x"(acc) : "x"(products));
}

// acc += w by x, of int8 and of int8 but -128, by fours: |w| · (x with w's sign). `magnitude` is |w|.
struct SignedBytesAvx2 {
    // By vpmaddubsw: exact, as pairs sum to at most 2 · 128 · 127.
    ENGINE_AVX2 ENGINE_INLINE static void add(__m256i& acc, __m256i magnitude, __m256i w, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};
struct SignedBytesAvxVnni {
    ENGINE_AVX2 ENGINE_INLINE static void add(__m256i& acc, __m256i magnitude, __m256i w, __m256i x) {
        accumulate_avx_vnni(acc, magnitude, _mm256_sign_epi8(x, w));
    }
};

}  // namespace engine
#endif
