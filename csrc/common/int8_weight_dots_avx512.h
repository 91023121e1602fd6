// The kernels of common/int8_weight_dots.h for AVX-512.
#pragma once

#include "common/int8_weight_dots.h"
#if ENGINE_X86
#include <immintrin.h>

#include <array>
#include <bit>

#include "common/dot_int8.h"

namespace engine {

// In fp32, 16 weights at a time.
struct FloatStepAvx512 {
    using Element = float;
    static constexpr int64_t kLanes = 16, kMostDepth = 4096;
    struct Constants {};
    ENGINE_AVX512 ENGINE_INLINE static Constants constants() { return {}; }

    // M rows of activations by R of weights; all kLanes of each, or the first `left`.
    template <int M, int R, bool whole>
    ENGINE_AVX512 ENGINE_INLINE static void multiply(const int8_t* w, int64_t w_stride, int64_t left, const Constants&,
                                                     const float* x, int64_t x_stride, __m512 (&acc)[M * R]) {
        __m512 weights[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const int8_t* from = w + r * w_stride;
            const __m128i bytes = whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                        : _mm512_castsi512_si128(_mm512_maskz_loadu_epi8((1u << left) - 1, from));
            weights[r] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512 activations = _mm512_load_ps(x + m * x_stride);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[m * R + r] = _mm512_fmadd_ps(weights[r], activations, acc[m * R + r]);
        }
    }
};

// In bfloat16 by vdpbf16ps, on processors with AVX512_BF16: twice as many products in the same time. 64 weights become
// bfloat16 by two look-ups of |w| in registers, one for each byte, in 8 instructions; by way of int32 and fp32 it would
// be 11. What comes out has the bytes 0 to 7 of each 128 bits in one vector and 8 to 15 in another: activations are put
// into that order once.
struct PairStepAvx512 {
    using Element = BFloat16;
    static constexpr int64_t kLanes = 64, kMostDepth = int64_t{1} << 15;  // bfloat16 tells no longer chains apart

    // The low bytes of the bfloat16 of 0 to 127, then the high ones.
    alignas(64) static constexpr auto kBytes = [] {
        std::array<uint8_t, 256> bytes{};
        for (int i = 0; i < 128; ++i) {
            const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(i)) >> 16;  // exact
            bytes[i] = bits & 0xff;
            bytes[128 + i] = bits >> 8;
        }
        return bytes;
    }();

    struct Constants {
        __m512i low[2], high[2], sign, most;
    };
    ENGINE_AVX512 ENGINE_INLINE static Constants constants() {
        const uint8_t* const bytes = kBytes.data();
        return {{_mm512_load_si512(bytes), _mm512_load_si512(bytes + 64)},
                {_mm512_load_si512(bytes + 128), _mm512_load_si512(bytes + 192)},
                _mm512_set1_epi8(-128),
                _mm512_set1_epi8(static_cast<char>(0xc3))};
    }

    // Weights as bfloat16: their bytes 0 to 7 of each 128 bits, and 8 to 15.
    ENGINE_AVX512 ENGINE_INLINE static void convert(__m512i w, const Constants& t, __m512i (&to)[2]) {
        const __m512i magnitude = _mm512_abs_epi8(w);  // of -128 the look-up takes 0, which is its low byte
        const __m512i low = _mm512_permutex2var_epi8(t.low[0], magnitude, t.low[1]);
        __m512i high = _mm512_permutex2var_epi8(t.high[0], magnitude, t.high[1]);
        high = _mm512_ternarylogic_epi32(high, w, t.sign, 0xf8);  // high | (w & sign)
        high = _mm512_mask_mov_epi8(high, _mm512_cmp_epi8_mask(w, t.sign, _MM_CMPINT_EQ), t.most);
        to[0] = _mm512_unpacklo_epi8(low, high);
        to[1] = _mm512_unpackhi_epi8(low, high);
    }

    // Activations in the order in which `convert` gives weights: 64 of a row to two vectors. Whether all are finite.
    ENGINE_AVX512 static bool arrange(const BFloat16* x,  // [k]
                                      int64_t k,
                                      BFloat16* to) {  // [k rounded up to 64], 64-byte aligned; beyond k zeros
        const __m512i ones = _mm512_set1_epi8(-1);
        __mmask64 infinite = 0;  // in the bits of high bytes: those whose exponent is all ones
        for (int64_t i = 0; i < k; i += 64) {
            const uint64_t inside = k - i >= 64 ? ~uint64_t{0} : ~uint64_t{0} >> (64 - (k - i));
            const __m512i first = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(inside), x + i);
            const __m512i second = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(inside >> 32), x + i + 32);
            infinite |= _mm512_cmp_epi8_mask(_mm512_add_epi16(first, first), ones, _MM_CMPINT_EQ);
            infinite |= _mm512_cmp_epi8_mask(_mm512_add_epi16(second, second), ones, _MM_CMPINT_EQ);
            _mm512_store_si512(to + i, _mm512_shuffle_i32x4(first, second, 0x88));
            _mm512_store_si512(to + i + 32, _mm512_shuffle_i32x4(first, second, 0xdd));
        }
        return (infinite & 0xaaaaaaaaaaaaaaaa) == 0;
    }

    template <int M, int R, bool whole>
    ENGINE_AVX512 ENGINE_INLINE static void multiply(const int8_t* w, int64_t w_stride, int64_t left,
                                                     const Constants& t, const BFloat16* x, int64_t x_stride,
                                                     __m512 (&acc)[M * R]) {
        __m512i weights[R][2];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const int8_t* from = w + r * w_stride;
            convert(whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - left), from), t,
                    weights[r]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m512i activations = _mm512_load_si512(x + m * x_stride + 32 * half);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) accumulate_pairs_avx512(acc[m * R + r], weights[r][half], activations);
            }
        }
    }
};

template <class Step>
struct WeightDotsAvx512 {
    using Element = typename Step::Element;
    static constexpr int64_t kMostRows = 8, kMostDepth = Step::kMostDepth, kLanes = Step::kLanes;

    template <int M>
    static constexpr int kColumns = M <= 4   ? 4
                                    : M <= 6 ? 3
                                             : 2;
    template <int count>
    static constexpr int64_t kSums = (count + 15) / 16 * 16;

    // M rows of activations by R of weights.
    template <int M, int R>
    ENGINE_AVX512 __attribute__((noinline)) static void tile(const int8_t* w,  // [R, w_stride], kc of each row
                                                             int64_t w_stride, int64_t kc,
                                                             const Element* x,  // [M, x_stride]
                                                             int64_t x_stride,
                                                             const int8_t* ahead,  // [R, w_stride]: asked for
                                                             bool add,
                                                             float* sums) {  // [M, R], up to whole vectors
        const auto constants = Step::constants();
        __m512 acc[M * R];
#pragma GCC unroll 24
        for (int i = 0; i < M * R; ++i) acc[i] = _mm512_setzero_ps();
        for (; kc >= 64; kc -= 64, ahead += 64) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * w_stride);
#pragma GCC unroll 4
            for (int64_t i = 0; i < 64; i += kLanes, w += kLanes, x += kLanes) {
                Step::template multiply<M, R, true>(w, w_stride, kLanes, constants, x, x_stride, acc);
            }
        }
        for (; kc >= kLanes; kc -= kLanes, w += kLanes, x += kLanes) {
            Step::template multiply<M, R, true>(w, w_stride, kLanes, constants, x, x_stride, acc);
        }
        if (kc > 0) Step::template multiply<M, R, false>(w, w_stride, kc, constants, x, x_stride, acc);
        store_sums_avx512(acc, add, sums);
    }
};

}  // namespace engine
#endif
