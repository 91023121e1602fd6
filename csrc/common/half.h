// The 16-bit float types, and the conversion of every float type to and from fp32.
//
// The conversions are plain integer arithmetic without branches, so that a loop over them vectorises on every
// instruction set; kernels that want the hardware's own conversion use the intrinsic.
#pragma once

#include <bit>
#include <cstdint>

#include "common/isa.h"

namespace engine {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

ENGINE_INLINE float to_float(float x) { return x; }
ENGINE_INLINE float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
ENGINE_INLINE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
#else
    const uint32_t sign = (x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    // Normal numbers, infinity and NaN: the exponent moved up by 224, then scaled back by 2^-112, as 224 - 112 is the
    // difference of the two biases, 127 - 15.
    const float normal = std::bit_cast<float>((magnitude << 13) + (224u << 23)) * 0x1.0p-112f;
    // Subnormal numbers: the mantissa placed below 0.5, then 0.5 taken away again.
    const float subnormal = std::bit_cast<float>(magnitude | (126u << 23)) - 0.5f;
    const float value = magnitude < 0x400u ? subnormal : normal;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
#endif
}

template <class T>
T from_float(float x);

template <>
ENGINE_INLINE float from_float<float>(float x) {
    return x;
}
template <>
ENGINE_INLINE BFloat16 from_float<BFloat16>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // half to even
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
ENGINE_INLINE Half from_float<Half>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the result is subnormal: adding 0.5 lets the fp32 adder round to a multiple of 2^-24.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;  // half to even
    uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= (143u << 23) ? 0x7c00u : result;  // 2^16 and more; 65520 to 2^16 round up to it by themselves
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {static_cast<uint16_t>(result | sign)};
}

}  // namespace engine
