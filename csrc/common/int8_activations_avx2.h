// The quantisation of activation rows (common/int8_activations.h) by AVX2 intrinsics: compilers narrow 32-bit integers
// in a roundabout way. The arithmetic is that of common/quantize.h, to the bit.
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
ENGINE_AVX2 uint32_t amax_bits_avx2(const T* x, int64_t k) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i amax[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        for (int v = 0; v < 2; ++v) {
            const __m256i bits = _mm256_castps_si256(load_8_avx2(x + i + 8 * v));
            amax[v] = _mm256_max_epi32(amax[v], _mm256_and_si256(bits, magnitude));
        }
    }
    const __m256i both = _mm256_max_epi32(amax[0], amax[1]);
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    return std::max(static_cast<uint32_t>(_mm_cvtsi128_si32(most)), amax_bits(x + i, k - i));
}

// 16 values as 16-bit integers. Rounding is to nearest even, the processor's own mode.
template <class T>
ENGINE_AVX2 ENGINE_INLINE __m256i quantize_16_avx2(const T* x, __m256 inverse) {
    const __m256 least = _mm256_set1_ps(-127.0f), most = _mm256_set1_ps(127.0f);
    __m256i q[2];
    for (int v = 0; v < 2; ++v) {
        const __m256 value = _mm256_mul_ps(load_8_avx2(x + 8 * v), inverse);
        q[v] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, least), most));
    }
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
}

// Stores 16 values and returns their part of the row's sum, spread over 8 lanes; for int16_t twice that part.
ENGINE_AVX2 ENGINE_INLINE __m256i store_16_avx2(int16_t* q, __m256i values) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(q), values);
    return _mm256_madd_epi16(values, _mm256_shuffle_epi32(values, 0xb1));  // q[i] by q[i + 2], and the other way round
}
ENGINE_AVX2 ENGINE_INLINE __m256i store_16_avx2(int8_t* q, __m256i values) {
    const __m128i low = _mm256_castsi256_si128(values), high = _mm256_extracti128_si256(values, 1);
    _mm_store_si128(reinterpret_cast<__m128i*>(q), _mm_packs_epi16(low, high));
    return _mm256_madd_epi16(values, _mm256_set1_epi16(1));
}

ENGINE_AVX2 ENGINE_INLINE int64_t sum_lanes_avx2(__m256i lanes) {
    const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes));
    const __m256i sums = _mm256_add_epi64(low, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1)));
    alignas(32) int64_t sum[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sum), sums);
    return sum[0] + sum[1] + sum[2] + sum[3];
}

// The sums of four vectors.
ENGINE_AVX2 ENGINE_INLINE __m128i add_lanes_avx2(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

// A row as fp32, each channel multiplied by its own factor.
template <class T>
ENGINE_AVX2 void scale_row_avx2(const T* x,            // [k]
                                const float* factors,  // [k]
                                int64_t k,
                                float* scaled) {  // [k]
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        _mm256_storeu_ps(scaled + i, _mm256_mul_ps(load_8_avx2(x + i), _mm256_loadu_ps(factors + i)));
    }
    for (; i < k; ++i) scaled[i] = to_float(x[i]) * factors[i];
}

// Writes all of a row, zeros beyond k and all shifted by `zero`, and returns the sum before (QuantizedRows::sum).
template <class Q, class T>
ENGINE_AVX2 int64_t quantize_row_avx2(const T* x,  // [k]
                                      int64_t k, float inverse, Q zero,
                                      Q* q,  // [stride]
                                      int64_t stride) {
    constexpr int64_t kStretch = 1 << 15;  // sums of a stretch fit 32 bits
    const __m256 by = _mm256_set1_ps(inverse);
    const int64_t whole = k / 16 * 16;
    int64_t sum = 0;
    for (int64_t begin = 0; begin < whole; begin += kStretch) {
        const int64_t end = std::min(whole, begin + kStretch);
        __m256i part = _mm256_setzero_si256();
        for (int64_t i = begin; i < end; i += 16) {
            __builtin_prefetch(x + k + i);  // the next row, whose maximum is wanted first
            part = _mm256_add_epi32(part, store_16_avx2(q + i, quantize_16_avx2(x + i, by)));
        }
        sum += sum_lanes_avx2(part);
    }
    int64_t written = whole;
    if (whole < k) {
        T rest[16] = {};
        std::copy(x + whole, x + k, rest);
        sum += sum_lanes_avx2(store_16_avx2(q + whole, quantize_16_avx2(rest, by)));
        written += 16;
    }
    std::fill(q + written, q + stride, Q{0});
    shift_row(q, stride, zero);
    return sizeof(Q) == 2 ? sum / 2 : sum;
}

}  // namespace engine
#endif
