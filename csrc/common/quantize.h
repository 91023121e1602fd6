// Symmetric int8 quantisation of one row. The only place in the C++ where its arithmetic stands.
//
//   scale = amax / 127,  q = clamp(round_half_even(x * (127 / amax)), -127, 127)
//
// amax < 2^-100: scale 1, q 0 (127 / amax must not overflow). amax not finite: scale NaN, q 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/half.h"

namespace engine {

struct RowScale {
    float scale;    // what q is multiplied by to give x back
    float inverse;  // what x is multiplied by to give q; 0 where q is all 0
    bool finite;    // false: the row holds a NaN or an infinity
};

// Bits of the row's largest |x| as fp32. For floats without sign the order of bits is the order of values, with
// infinity above every number and NaN above infinity, so that one integer maximum also finds what is not finite.
template <class T>
ENGINE_INLINE uint32_t amax_bits(const T* x, int64_t k) {
    int32_t amax = 0;
    for (int64_t i = 0; i < k; ++i) {
        const int32_t bits = std::bit_cast<int32_t>(to_float(x[i])) & 0x7fffffff;
        amax = bits > amax ? bits : amax;
    }
    return static_cast<uint32_t>(amax);
}

ENGINE_INLINE RowScale row_scale(uint32_t bits) {
    if (bits >= 0x7f800000u) return {std::numeric_limits<float>::quiet_NaN(), 0.0f, false};
    const float amax = std::bit_cast<float>(bits);
    if (amax < 0x1.0p-100f) return {1.0f, 0.0f, true};
    return {amax / 127.0f, 127.0f / amax, true};
}

// What one scale for all activations gives to a row: q = x · (1 / s). By a scale that is not positive, or that has no
// finite reciprocal, nothing can be divided: NaN.
ENGINE_INLINE RowScale static_scale(float s, uint32_t amax) {
    const float inverse = 1.0f / s;
    const bool usable =
        s > 0.0f && s < std::numeric_limits<float>::infinity() && inverse < std::numeric_limits<float>::infinity();
    if (amax >= 0x7f800000u || !usable) return {std::numeric_limits<float>::quiet_NaN(), 0.0f, false};
    return {s, inverse, true};
}

// Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, ties to even, for magnitudes up to 2^22; once
// clamped they are at most 127.
ENGINE_INLINE int32_t quantize_to_int(float x, float inverse) {
    constexpr float kRound = 12582912.0f;
    float v = x * inverse;
    v = v < -127.0f ? -127.0f : v;
    v = v > 127.0f ? 127.0f : v;
    return static_cast<int32_t>((v + kRound) - kRound);
}
ENGINE_INLINE int8_t quantize_one(float x, float inverse) { return static_cast<int8_t>(quantize_to_int(x, inverse)); }

// Adds `zero` to all of a row.
template <class Q>
ENGINE_INLINE void shift_row(Q* q, int64_t k, Q zero) {
    if (zero == 0) return;
    for (int64_t i = 0; i < k; ++i) q[i] = static_cast<Q>(q[i] + zero);
}

// q of one row. Where s.inverse is 0 (a row of zeros, or one that is not finite) zeros are written without reading x.
template <class T>
ENGINE_INLINE void quantize_row(const T* x, int64_t k, RowScale s, int8_t* q) {
    if (s.inverse == 0.0f) {
        std::fill(q, q + k, int8_t{0});
        return;
    }
    for (int64_t i = 0; i < k; ++i) q[i] = quantize_one(to_float(x[i]), s.inverse);
}

}  // namespace engine
