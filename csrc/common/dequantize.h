// One row of int8 back to floats: the reverse of quantize.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {

// Vectorises by itself for the instruction set of the function that it is inlined into, but not where T is Half.
template <class T>
ENGINE_INLINE void dequantize_row(const int8_t* q,  // [k]
                                  int64_t k, float scale,
                                  T* x) {  // [k]
    for (int64_t i = 0; i < k; ++i) x[i] = from_float<T>(static_cast<float>(q[i]) * scale);
}

// The same for functions compiled for AVX2 or more, with the processor's own rounding to Half.
template <class T>
ENGINE_AVX2 ENGINE_INLINE void dequantize_row_x86(const int8_t* q,  // [k]
                                                  int64_t k, float scale,
                                                  T* x) {  // [k]
    int64_t i = 0;
#if ENGINE_X86
    if constexpr (std::is_same_v<T, Half>) {
        const __m256 s = _mm256_set1_ps(scale);
        for (; i + 8 <= k; i += 8) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i));
            const __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), s);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        }
    }
#endif
    dequantize_row(q + i, k - i, scale, x + i);
}

}  // namespace engine
