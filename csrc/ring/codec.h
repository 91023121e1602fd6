// What the ring sends instead of fp32: three codecs, each one pass that reads and writes its data once.
//
//   bf16     n values of 2 bytes, rounded half to even.
//   int8     blocks of 256: ceil(n/256) fp32 scales, then n int8, each block by the arithmetic of quantize.h. A block
//            that holds a NaN or an infinity is NaN as a whole when decoded.
//   bitmap   the largest values alone. uint32 count, uint32 flags, then a bit for each group of 8 elements
//            (bit g % 8 of byte g / 8, up to a multiple of 8 bytes): whether any of it is kept. Then room for
//            `capacity` bfloat16 values in order, `count` of them used, and room for a byte for each group of which
//            any is kept, in order: which (least significant bit first). No more than min(capacity, ceil(n / 8))
//            groups can be. Flag 1: a value was no number, and all n are NaN when decoded.
//
// A residual (error feedback) holds what was not sent: it is added to the values before they are encoded, and takes up
// the difference to what the receiver will decode. Where that is not a finite number it doesn't go into the residual.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/half.h"
#include "common/isa.h"
#include "common/quantize.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine::ring {

constexpr int64_t kCodecBlock = 256;

inline int64_t bf16_bytes(int64_t n) { return 2 * n; }
inline int64_t int8_bytes(int64_t n) { return 4 * ((n + kCodecBlock - 1) / kCodecBlock) + n; }

struct BitmapHeader {
    uint32_t count, flags;
};
constexpr uint32_t kNotFinite = 1;
inline int64_t bitmap_groups(int64_t n) { return (n + 7) / 8; }
// Bytes before the values.
inline int64_t bitmap_bytes(int64_t n) { return static_cast<int64_t>(sizeof(BitmapHeader)) + 8 * ((n + 511) / 512); }
// How many values there is room for in so many bytes; -1 where n elements never make so many.
inline int64_t bitmap_capacity(int64_t n, int64_t bytes) {
    const int64_t room = bytes - bitmap_bytes(n), groups = bitmap_groups(n);
    if (room < 0) return -1;
    if (room <= 3 * groups) return room % 3 ? -1 : room / 3;
    return (room - groups) % 2 ? -1 : (room - groups) / 2;
}

ENGINE_INLINE bool is_finite(float v) { return (std::bit_cast<uint32_t>(v) & 0x7f800000u) != 0x7f800000u; }

// ---------------------------------------------------------------------------------------------------------------- bf16

template <bool kResidual>
ENGINE_INLINE void bf16_encode_body(const float* x,   // [n]
                                    float* residual,  // [n], or null without kResidual
                                    int64_t n,
                                    uint16_t* wire) {  // [n]
    for (int64_t i = 0; i < n; ++i) {
        const float v = kResidual ? x[i] + residual[i] : x[i];
        const BFloat16 sent = from_float<BFloat16>(v);
        wire[i] = sent.bits;
        if constexpr (kResidual) {
            const float received = to_float(sent);
            residual[i] = is_finite(received) ? v - received : residual[i];
        }
    }
}

// x = value * factor, or with kAdd x += value * factor.
template <bool kAdd>
ENGINE_INLINE void bf16_decode_body(const uint16_t* wire,  // [n]
                                    int64_t n, float factor,
                                    float* x) {  // [n]
    for (int64_t i = 0; i < n; ++i) {
        const float v = to_float(BFloat16{wire[i]}) * factor;
        x[i] = kAdd ? x[i] + v : v;
    }
}

// ---------------------------------------------------------------------------------------------------------------- int8

// Blocks [begin, end).
template <bool kResidual>
ENGINE_INLINE void int8_encode_body(const float* x,   // [n]
                                    float* residual,  // [n], or null without kResidual
                                    int64_t n,
                                    char* scales,  // 4 bytes a block, at any address
                                    int8_t* q,     // [n]
                                    int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kCodecBlock, k = std::min(kCodecBlock, n - first);
        alignas(64) float sum[kCodecBlock];
        const float* v = x + first;
        if constexpr (kResidual) {
            for (int64_t i = 0; i < k; ++i) sum[i] = v[i] + residual[first + i];
            v = sum;
        }
        const RowScale s = row_scale(amax_bits(v, k));
        quantize_row(v, k, s, q + first);
        std::memcpy(scales + 4 * block, &s.scale, 4);
        if constexpr (kResidual) {
            if (!s.finite) continue;
            for (int64_t i = 0; i < k; ++i) {
                const float received = static_cast<float>(q[first + i]) * s.scale;  // may round up to an infinity
                residual[first + i] = is_finite(received) ? v[i] - received : residual[first + i];
            }
        }
    }
}

// Blocks [begin, end). The scale is multiplied by the factor first.
template <bool kAdd>
ENGINE_INLINE void int8_decode_body(const char* scales,  // 4 bytes a block, at any address
                                    const int8_t* q,     // [n]
                                    int64_t n, float factor,
                                    float* x,  // [n]
                                    int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kCodecBlock, k = std::min(kCodecBlock, n - first);
        float scale;
        std::memcpy(&scale, scales + 4 * block, 4);
        scale *= factor;
        for (int64_t i = first; i < first + k; ++i) {
            const float v = static_cast<float>(q[i]) * scale;
            x[i] = kAdd ? x[i] + v : v;
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- bitmap

// One element of so many is looked at to find the threshold: at least 1024 in all, and enough that about 40 of them
// lie above it. n is not 0.
inline int64_t bitmap_stride(int64_t n, double density) {
    const double wanted = std::max(1024.0, std::ceil(40.0 / density));  // perhaps beyond what an integer holds
    return wanted < static_cast<double>(n) ? n / static_cast<int64_t>(wanted) : 1;
}

// The magnitude above which about `density` of x + residual lies, estimated from one element of each stride; the same
// from run to run. Which one looks random, so that no length of rows makes all samples fall into a few columns, and
// half of the choices hang on the other half's values: else what they always miss might never be sent.
// An element is kept where NOT |v| <= threshold. Zeros are never kept, and what is no number always.
inline float bitmap_threshold(const float* x,         // [n]
                              const float* residual,  // [n], or null
                              int64_t n, double density) {
    if (n == 0) return 0.0f;
    const int64_t stride = bitmap_stride(n, density), samples = (n + stride - 1) / stride;
    std::vector<uint32_t> keys(samples);
    uint32_t seed = 0;
    for (int64_t half = 0; half < 2; ++half) {
        uint32_t sum = 0;
        for (int64_t j = half; j < samples; j += 2) {
            const auto low = static_cast<uint32_t>(j);
            const int64_t fraction = (low * low + seed) * 0x61c88647u;  // the golden ratio's: evenly spread
            const int64_t i = j * stride + (std::min(stride, n - j * stride) * fraction >> 32);
            const auto key = std::bit_cast<uint32_t>(residual ? x[i] + residual[i] : x[i]) & 0x7fffffffu;
            keys[j] = std::min(key, 0x7f800000u);
            sum += keys[j];
        }
        seed = sum;
    }
    const auto kept = std::max<int64_t>(1, std::llrint(density * static_cast<double>(samples)));
    std::nth_element(keys.begin(), keys.begin() + (samples - kept), keys.end());
    // One ulp below the smallest kept sample: otherwise none of a run of equal values would be kept.
    const uint32_t key = keys[samples - kept];
    return std::bit_cast<float>(key ? key - 1 : 0u);
}

// 64 values v = x + residual, which go to `v` and into the residual; x becomes 0. Returns which of them are kept.
template <bool kResidual>
ENGINE_INLINE uint64_t bitmap_take_portable(float* x,         // [count]
                                            float* residual,  // [count]
                                            int64_t count, float threshold,
                                            float* v) {  // [64]
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
        v[i] = kResidual ? x[i] + residual[i] : x[i];
        if constexpr (kResidual) residual[i] = v[i];
        x[i] = 0.0f;
        bits |= static_cast<uint64_t>(!(std::fabs(v[i]) <= threshold)) << i;
    }
    return bits;
}

#if ENGINE_X86
template <bool kResidual>
ENGINE_AVX2 ENGINE_INLINE uint64_t bitmap_take_avx2(float* x, float* residual, float threshold, float* v) {
    const __m256 limit = _mm256_set1_ps(threshold), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    uint64_t bits = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 64; i += 8) {
        __m256 value = _mm256_loadu_ps(x + i);
        if constexpr (kResidual) {
            value = _mm256_add_ps(value, _mm256_loadu_ps(residual + i));
            _mm256_storeu_ps(residual + i, value);
        }
        _mm256_store_ps(v + i, value);
        _mm256_storeu_ps(x + i, _mm256_setzero_ps());
        const __m256 kept = _mm256_cmp_ps(_mm256_and_ps(value, magnitude), limit, _CMP_NLE_UQ);
        bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(kept))) << i;
    }
    return bits;
}
template <bool kResidual>
ENGINE_AVX512 ENGINE_INLINE uint64_t bitmap_take_avx512(float* x, float* residual, float threshold, float* v) {
    const __m512 limit = _mm512_set1_ps(threshold);
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += 16) {
        __m512 value = _mm512_loadu_ps(x + i);
        if constexpr (kResidual) {
            value = _mm512_add_ps(value, _mm512_loadu_ps(residual + i));
            _mm512_storeu_ps(residual + i, value);
        }
        _mm512_storeu_ps(v + i, value);
        _mm512_storeu_ps(x + i, _mm512_setzero_ps());
        const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_abs_ps(value), limit, _CMP_NLE_UQ);
        bits |= static_cast<uint64_t>(kept) << i;
    }
    return bits;
}
#endif

// Where the values and the groups' bytes go, and how far they have come.
struct BitmapWriter {
    uint16_t* values;  // [capacity]
    uint8_t* groups;   // the next
    int64_t capacity, count;
    bool finite;
};

// Sends the kept of 64 values; returns a bit for each of the 8 groups, whether any of it was sent.
template <bool kResidual>
ENGINE_INLINE uint8_t bitmap_send(uint64_t bits,    // which are kept
                                  const float* v,   // [64]
                                  float* residual,  // [64], holding v, or null without kResidual
                                  BitmapWriter& to) {
    unsigned groups = 0;
    for (; bits; bits &= bits - 1) {
        const int i = __builtin_ctzll(bits);
        to.finite &= is_finite(v[i]);
        if (to.count == to.capacity) {  // the residual keeps it, and an element without one is lost
            if (kResidual && !is_finite(v[i])) residual[i] = 0.0f;
            continue;
        }
        const unsigned group = 1u << i / 8;
        if (!(groups & group)) *to.groups++ = 0;
        groups |= group;
        to.groups[-1] |= static_cast<uint8_t>(1u << i % 8);
        const BFloat16 value = from_float<BFloat16>(v[i]);
        to.values[to.count++] = value.bits;
        if constexpr (kResidual) residual[i] = is_finite(to_float(value)) ? v[i] - to_float(value) : 0.0f;
    }
    return static_cast<uint8_t>(groups);
}

// What is begun before the loop over 64 elements, and ended after it.
inline BitmapWriter bitmap_begin(char* wire, int64_t n, int64_t capacity) {
    auto* values = reinterpret_cast<uint16_t*>(wire + bitmap_bytes(n));
    return {values, reinterpret_cast<uint8_t*>(values + capacity), capacity, 0, true};
}
template <bool kResidual>
inline void bitmap_end(float* x, float* residual, int64_t n, float threshold, char* wire, BitmapWriter& to) {
    const int64_t i = n / 64 * 64;
    char* mask = wire + sizeof(BitmapHeader) + i / 64;
    if (i < n) {
        alignas(64) float v[64];
        float* left = kResidual ? residual + i : nullptr;
        const uint64_t bits = bitmap_take_portable<kResidual>(x + i, left, n - i, threshold, v);
        *mask++ = static_cast<char>(bitmap_send<kResidual>(bits, v, left, to));
    }
    // What is left of the room is sent too: nothing of this process's memory may be in it.
    std::fill(mask, wire + bitmap_bytes(n), char{0});
    std::fill(to.values + to.count, to.values + to.capacity, uint16_t{0});
    auto* groups = reinterpret_cast<uint8_t*>(to.values + to.capacity);
    std::fill(to.groups, groups + std::min(to.capacity, bitmap_groups(n)), uint8_t{0});
    const BitmapHeader header{static_cast<uint32_t>(to.count), to.finite ? 0 : kNotFinite};
    std::memcpy(wire, &header, sizeof(header));
}

template <bool kResidual>
void bitmap_encode_portable(float* x, float* residual, int64_t n, float threshold, char* wire, int64_t capacity) {
    BitmapWriter to = bitmap_begin(wire, n, capacity);
    auto* mask = reinterpret_cast<uint8_t*>(wire + sizeof(BitmapHeader));
    alignas(64) float v[64];
    for (int64_t i = 0; i + 64 <= n; i += 64) {
        float* left = kResidual ? residual + i : nullptr;
        const uint64_t bits = bitmap_take_portable<kResidual>(x + i, left, 64, threshold, v);
        mask[i / 64] = bitmap_send<kResidual>(bits, v, left, to);
    }
    bitmap_end<kResidual>(x, residual, n, threshold, wire, to);
}
#if ENGINE_X86
template <bool kResidual>
ENGINE_AVX2 void bitmap_encode_avx2(float* x, float* residual, int64_t n, float threshold, char* wire,
                                    int64_t capacity) {
    BitmapWriter to = bitmap_begin(wire, n, capacity);
    auto* mask = reinterpret_cast<uint8_t*>(wire + sizeof(BitmapHeader));
    alignas(64) float v[64];
    for (int64_t i = 0; i + 64 <= n; i += 64) {
        float* left = kResidual ? residual + i : nullptr;
        const uint64_t bits = bitmap_take_avx2<kResidual>(x + i, left, threshold, v);
        mask[i / 64] = bits ? bitmap_send<kResidual>(bits, v, left, to) : 0;
    }
    bitmap_end<kResidual>(x, residual, n, threshold, wire, to);
}
template <bool kResidual>
ENGINE_AVX512 void bitmap_encode_avx512(float* x, float* residual, int64_t n, float threshold, char* wire,
                                        int64_t capacity) {
    BitmapWriter to = bitmap_begin(wire, n, capacity);
    auto* mask = reinterpret_cast<uint8_t*>(wire + sizeof(BitmapHeader));
    alignas(64) float v[64];
    for (int64_t i = 0; i + 64 <= n; i += 64) {
        float* left = kResidual ? residual + i : nullptr;
        const uint64_t bits = bitmap_take_avx512<kResidual>(x + i, left, threshold, v);
        mask[i / 64] = bits ? bitmap_send<kResidual>(bits, v, left, to) : 0;
    }
    bitmap_end<kResidual>(x, residual, n, threshold, wire, to);
}
#endif

// x += value * factor at the places of the mask. False where the wire contradicts itself; then x means nothing, but
// nothing was read or written out of bounds.
inline bool bitmap_decode_add(const char* wire,  // as bitmap_encode made it, aligned to 8
                              int64_t capacity, int64_t n, float factor,
                              float* x) {  // [n]
    BitmapHeader header;
    std::memcpy(&header, wire, sizeof(header));
    if (header.count > capacity || header.flags > kNotFinite) return false;
    if (header.flags == kNotFinite) {
        std::fill(x, x + n, std::numeric_limits<float>::quiet_NaN());
        return true;
    }
    const auto* values = reinterpret_cast<const uint16_t*>(wire + bitmap_bytes(n));
    const auto* group = reinterpret_cast<const uint8_t*>(values + capacity);
    const auto* end = group + std::min(capacity, bitmap_groups(n));
    // Positions are decoded up to kAhead elements ahead of the additions so that prefetches complete, in loops with
    // predictable trip counts; a mask word covers 512 elements.
    constexpr int64_t kAhead = 64, kFound = 1024;
    int64_t places[kFound], found = 0, added = 0;
    const auto add_until = [&](int64_t last) {
        for (; added < last; ++added) x[places[added % kFound]] += to_float(BFloat16{values[added]}) * factor;
    };
    for (int64_t i = 0; i < n; i += 512) {
        uint64_t groups;
        std::memcpy(&groups, wire + sizeof(header) + i / 64, sizeof(groups));
        for (; groups; groups &= groups - 1) {
            if (group == end || *group == 0) return false;
            const int64_t first = i + 8 * __builtin_ctzll(groups);
            for (unsigned bits = *group++; bits; bits &= bits - 1) {
                const int64_t place = first + __builtin_ctz(bits);
                if (place >= n) return false;
                __builtin_prefetch(x + place, 1);
                places[found++ % kFound] = place;
            }
        }
        if (found > header.count) return false;
        add_until(found - kAhead);
    }
    add_until(found);
    return found == header.count;
}

// ------------------------------------------------------------------------------------------------ what callers call
//
// Each of the bodies above as a value that a function of any instruction set can inline.

struct Bf16Encode {
    const float* x;
    float* residual;
    int64_t n;
    uint16_t* wire;
    ENGINE_INLINE void operator()() const {
        residual ? bf16_encode_body<true>(x, residual, n, wire) : bf16_encode_body<false>(x, residual, n, wire);
    }
};
struct Bf16Decode {
    const uint16_t* wire;
    int64_t n;
    float factor;
    bool add;
    float* x;
    ENGINE_INLINE void operator()() const {
        add ? bf16_decode_body<true>(wire, n, factor, x) : bf16_decode_body<false>(wire, n, factor, x);
    }
};
struct Int8Encode {
    const float* x;
    float* residual;
    int64_t n;
    char* wire;
    int64_t begin, end;  // blocks
    ENGINE_INLINE void operator()() const {
        auto* q = reinterpret_cast<int8_t*>(wire + int8_bytes(n) - n);
        residual ? int8_encode_body<true>(x, residual, n, wire, q, begin, end)
                 : int8_encode_body<false>(x, residual, n, wire, q, begin, end);
    }
};
struct Int8Decode {
    const char* wire;
    int64_t n;
    float factor;
    bool add;
    float* x;
    int64_t begin, end;  // blocks
    ENGINE_INLINE void operator()() const {
        const auto* q = reinterpret_cast<const int8_t*>(wire + int8_bytes(n) - n);
        add ? int8_decode_body<true>(wire, q, n, factor, x, begin, end)
            : int8_decode_body<false>(wire, q, n, factor, x, begin, end);
    }
};

template <class F>
void run_portable(const F& f) {
    f();
}
#if ENGINE_X86
template <class F>
ENGINE_AVX2 void run_avx2(const F& f) {
    f();
}
template <class F>
ENGINE_AVX512 void run_avx512(const F& f) {
    f();
}
#endif

// Runs one of the four on this thread.
template <class F>
void run(const F& f) {
#if ENGINE_X86
    if (isa() == Isa::avx2) return run_avx2(f);
    if (isa() == Isa::avx512) return run_avx512(f);
#endif
    run_portable(f);
}

// Moves the kept of x + residual into the wire and the rest into the residual, if there is one: x becomes 0.
inline void bitmap_encode(float* x,         // [n]
                          float* residual,  // [n], or null
                          int64_t n, float threshold,
                          char* wire,  // of bitmap_capacity(n, its bytes), aligned to 8
                          int64_t capacity) {
    threshold = std::min(threshold, std::numeric_limits<float>::max());  // what is infinite is kept; NaN keeps all
    auto kernel = residual ? bitmap_encode_portable<true> : bitmap_encode_portable<false>;
#if ENGINE_X86
    if (isa() == Isa::avx2) kernel = residual ? bitmap_encode_avx2<true> : bitmap_encode_avx2<false>;
    if (isa() == Isa::avx512) kernel = residual ? bitmap_encode_avx512<true> : bitmap_encode_avx512<false>;
#endif
    kernel(x, residual, n, threshold, wire, capacity);
}

}  // namespace engine::ring
