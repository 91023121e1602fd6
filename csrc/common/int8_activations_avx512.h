// The quantisation of activation rows (common/int8_activations.h) for AVX-512, to the bit that of common/quantize.h:
// 64 values a step, about a quarter of a cycle each, where AVX2 takes half of one.
#pragma once

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "common/floats.h"
#include "common/quantize.h"

namespace engine {

// amax_bits of quantize.h.
template <class T>
ENGINE_AVX512 uint32_t amax_bits_avx512(const T* x, int64_t k) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i amax[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m512i bits = _mm512_castps_si512(load_16_avx512(x + i + 16 * v));
            amax[v] = _mm512_max_epi32(amax[v], _mm512_and_si512(bits, magnitude));
        }
    }
    const __m512i most = _mm512_max_epi32(_mm512_max_epi32(amax[0], amax[1]), _mm512_max_epi32(amax[2], amax[3]));
    return std::max(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)), amax_bits(x + i, k - i));
}

// 64 values in their order. Rounding is to nearest even, the processor's own mode.
template <class T>
ENGINE_AVX512 ENGINE_INLINE __m512i quantize_64_avx512(const T* x, __m512 inverse) {
    const __m512 least = _mm512_set1_ps(-127.0f), most = _mm512_set1_ps(127.0f);
    __m512i q[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
        const __m512 value = _mm512_mul_ps(load_16_avx512(x + 16 * v), inverse);
        q[v] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, least), most));
    }
    // Each lane of 128 bits holds four values of each vector by now: a 4 × 4 transpose of dwords.
    const __m512i lanes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, lanes);
}

// Writes all of a row, zeros beyond k and all shifted by `zero`, and returns the sum before (QuantizedRows::sum).
template <class T>
ENGINE_AVX512 int64_t quantize_row_avx512(const T* x,  // [k]
                                          int64_t k, float inverse, int8_t zero,
                                          int8_t* q,  // [stride], 64-byte aligned
                                          int64_t stride) {
    constexpr int64_t kStretch = int64_t{1} << 27;  // sums of a stretch fit 32 bits
    const __m512 by = _mm512_set1_ps(inverse);
    const __m512i ones = _mm512_set1_epi8(1), shift = _mm512_set1_epi8(zero);
    const int64_t whole = k / 64 * 64;
    int64_t sum = 0, written = whole;
    for (int64_t begin = 0; begin < whole; begin += kStretch) {
        const int64_t end = std::min(whole, begin + kStretch);
        __m512i part = _mm512_setzero_si512();
        for (int64_t i = begin; i < end; i += 64) {
            for (int64_t line = 0; line < 64; line += 64 / static_cast<int64_t>(sizeof(T))) {
                __builtin_prefetch(x + k + i + line);  // the next row, whose maximum is wanted first
            }
            const __m512i values = quantize_64_avx512(x + i, by);
            _mm512_store_si512(q + i, _mm512_add_epi8(values, shift));
            part = _mm512_dpbusd_epi32(part, ones, values);
        }
        sum += _mm512_reduce_add_epi32(part);
    }
    if (whole < k) {
        T rest[64] = {};
        std::copy(x + whole, x + k, rest);
        const __m512i values = quantize_64_avx512(rest, by);
        _mm512_store_si512(q + whole, _mm512_add_epi8(values, shift));
        sum += _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, values));
        written += 64;
    }
    std::fill(q + written, q + stride, zero);
    return sum;
}

}  // namespace engine
#endif
