// Values of the three float types, and of int8, as fp32, and fp32 as one of the three: a vector at a time, or a whole
// run of memory. For single ones see common/half.h.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {

// Eight numbers added up, in the order of sum_8_avx2.
ENGINE_INLINE float sum_8(const float* v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

#if ENGINE_X86
ENGINE_AVX2 ENGINE_INLINE __m256 load_8_avx2(const float* x) { return _mm256_loadu_ps(x); }
ENGINE_AVX2 ENGINE_INLINE __m256 load_8_avx2(const Half* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
ENGINE_AVX2 ENGINE_INLINE __m256 load_8_avx2(const BFloat16* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
ENGINE_AVX2 ENGINE_INLINE __m256 load_8_avx2(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

ENGINE_AVX2 ENGINE_INLINE void store_8_avx2(float* y, __m256 v) { _mm256_storeu_ps(y, v); }
ENGINE_AVX2 ENGINE_INLINE void store_8_avx2(Half* y, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
ENGINE_AVX2 ENGINE_INLINE void store_8_avx2(BFloat16* y, __m256 v) {  // as from_float
    const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_castsi256_si128(packed));
}

// The lanes added up.
ENGINE_AVX2 ENGINE_INLINE float sum_8_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

ENGINE_AVX512 ENGINE_INLINE __m512 load_16_avx512(const float* x) { return _mm512_loadu_ps(x); }
ENGINE_AVX512 ENGINE_INLINE __m512 load_16_avx512(const Half* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
ENGINE_AVX512 ENGINE_INLINE __m512 load_16_avx512(const BFloat16* x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

ENGINE_AVX512 ENGINE_INLINE void store_16_avx512(float* y, __m512 v) { _mm512_storeu_ps(y, v); }
ENGINE_AVX512 ENGINE_INLINE void store_16_avx512(Half* y, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
ENGINE_AVX512 ENGINE_INLINE void store_16_avx512(BFloat16* y, __m512 v) {  // as from_float
    const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtepi32_epi16(result));
}
#endif

// Values as fp32. The body for every instruction set: it vectorises by itself where it is inlined.
template <class V>
ENGINE_INLINE void floats(const V* __restrict values, int64_t count, float* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(values[i]);
}
template <class V>
void floats_portable(const V* values, int64_t count, float* to) {
    floats(values, count, to);
}
template <class V>
using ToFloats = void (*)(const V* values, int64_t count, float* to);
#if ENGINE_X86
template <class V>
ENGINE_AVX2 void floats_avx2(const V* values, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, load_8_avx2(values + i));
    floats(values + i, count - i, to + i);
}
#endif
template <class V>
ToFloats<V> to_floats() {
#if ENGINE_X86
    if (isa() != Isa::portable) return floats_avx2<V>;
#endif
    return floats_portable<V>;
}

// The same, back to T.
template <class T>
void from_floats_portable(const float* values, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(values[i]);
}
template <class T>
using FromFloats = void (*)(const float* values, int64_t count, T* to);
#if ENGINE_X86
template <class T>
ENGINE_AVX2 void from_floats_avx2(const float* values, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store_8_avx2(to + i, _mm256_loadu_ps(values + i));
    for (; i < count; ++i) to[i] = from_float<T>(values[i]);
}
#endif
template <class T>
FromFloats<T> from_floats() {
#if ENGINE_X86
    if (isa() != Isa::portable) return from_floats_avx2<T>;
#endif
    return from_floats_portable<T>;
}

}  // namespace engine
