// AVX-512 intrinsics as plain functions, so that the AVX-512 variants of the kernels run, slowly, on a processor that
// has only AVX2. For tests: force-included before everything else, together with -DENGINE_EMULATE_AVX512
// (csrc/common/isa.h).
//
// Each intrinsic is one line of the alphabetical list below, a macro over a few templates that work lane by lane on any
// vector width. What reads or writes memory touches just the bytes that the instruction touches, so that
// AddressSanitizer sees them, and an aligned access to an unaligned address stops the program as the instruction would.
// Names and meanings: Intel Intrinsics Guide.
#pragma once
#pragma GCC system_header  // the compiler has some of these names as macros, which the list below replaces
#pragma GCC diagnostic ignored "-Wpsabi"  // a 512-bit argument travels in memory here

#include <immintrin.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace emulated {

// The target of ENGINE_AVX512 in such a build: a 256-bit argument must travel as its callers pass it.
#define EMULATED inline __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))

// ---- vectors as arrays ------------------------------------------------------------------------------------------

template <class T, class V>
using Lanes = std::array<T, sizeof(V) / sizeof(T)>;

template <class T, class V>
EMULATED Lanes<T, V> lanes(V v) {
    return __builtin_bit_cast(Lanes<T, V>, v);
}

template <class V, class A>
EMULATED V vector(const A& a) {
    static_assert(sizeof(V) == sizeof(A));
    return __builtin_bit_cast(V, a);
}

template <size_t n>
using Mask =
    std::conditional_t<n == 64, __mmask64,
                       std::conditional_t<n == 32, __mmask32, std::conditional_t<n == 16, __mmask16, __mmask8>>>;

EMULATED bool bit(uint64_t mask, size_t i) { return (mask >> i) & 1; }

// ---- memory -----------------------------------------------------------------------------------------------------

template <class V>
EMULATED V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
EMULATED void store(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}
template <class V>
EMULATED V load_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) __builtin_trap();
    return load<V>(p);
}
template <class V>
EMULATED void store_aligned(void* p, V v) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) __builtin_trap();
    store(p, v);
}
// Lane i from p[i] where its bit is set, from `off` elsewhere.
template <class T, class V>
EMULATED V load_some(V off, uint64_t mask, const void* p) {
    auto out = lanes<T>(off);
    for (size_t i = 0; i < out.size(); ++i)
        if (bit(mask, i)) __builtin_memcpy(&out[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
    return vector<V>(out);
}
template <class T, class V>
EMULATED void store_some(void* p, uint64_t mask, V v) {
    const auto in = lanes<T>(v);
    for (size_t i = 0; i < in.size(); ++i)
        if (bit(mask, i)) __builtin_memcpy(static_cast<char*>(p) + i * sizeof(T), &in[i], sizeof(T));
}
// The lanes with a set bit from consecutive elements of p, the others from `off`.
template <class T, class V>
EMULATED V expand_load(V off, uint64_t mask, const void* p) {
    auto out = lanes<T>(off);
    const char* from = static_cast<const char*>(p);
    for (size_t i = 0; i < out.size(); ++i)
        if (bit(mask, i)) __builtin_memcpy(&out[i], from, sizeof(T)), from += sizeof(T);
    return vector<V>(out);
}
template <class T, class V>
EMULATED void compress_store(void* p, uint64_t mask, V v) {
    const auto in = lanes<T>(v);
    char* to = static_cast<char*>(p);
    for (size_t i = 0; i < in.size(); ++i)
        if (bit(mask, i)) __builtin_memcpy(to, &in[i], sizeof(T)), to += sizeof(T);
}
template <class T, size_t count, class V>
EMULATED void store_first(void* p, uint64_t mask, V v) {  // of the first `count` lanes
    store_some<T>(p, mask & (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count % 64) - 1), v);
}
template <class T, class V>
EMULATED V gather(V off, uint64_t mask, __m512i index, const void* p, int scale) {
    auto out = lanes<T>(off);
    const auto at = lanes<int32_t>(index);
    for (size_t i = 0; i < out.size(); ++i)
        if (bit(mask, i)) __builtin_memcpy(&out[i], static_cast<const char*>(p) + int64_t{at[i]} * scale, sizeof(T));
    return vector<V>(out);
}

// ---- lane by lane -----------------------------------------------------------------------------------------------

template <class F, class A, class... B>
EMULATED A map_lanes(F f, A a, const B&... more) {
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<typename A::value_type>(f(a[i], more[i]...));
    return a;
}
// f(a[i], b[i], ...) in every lane.
template <class T, class F, class V, class... W>
EMULATED V map(F f, V a, W... more) {
    return vector<V>(map_lanes(f, lanes<T>(a), lanes<T>(more)...));
}
template <class F, class V>
EMULATED V map_bits(F f, V a, V b) {  // bit operations on floats
    return map<uint32_t>(f, a, b);
}
template <class V, class T>
EMULATED V fill(T x) {
    Lanes<T, V> out;
    out.fill(x);
    return vector<V>(out);
}
template <class T, class V>
EMULATED V blend(uint64_t mask, V off, V on) {
    auto out = lanes<T>(off);
    const auto in = lanes<T>(on);
    for (size_t i = 0; i < out.size(); ++i) out[i] = bit(mask, i) ? in[i] : out[i];
    return vector<V>(out);
}
template <class T, class V>
EMULATED V zero_unless(uint64_t mask, V on) {
    return blend<T>(mask, V{}, on);
}
template <class F, class A, class... B>
EMULATED auto test_lanes(F f, const A& a, const B&... more) {
    uint64_t mask = 0;
    for (size_t i = 0; i < a.size(); ++i) mask |= uint64_t{f(a[i], more[i]...)} << i;
    return static_cast<Mask<std::tuple_size_v<A>>>(mask);
}
// The mask of the lanes where f holds.
template <class T, class F, class V, class... W>
EMULATED auto test(F f, V a, W... more) {
    return test_lanes(f, lanes<T>(a), lanes<T>(more)...);
}
// f over all lanes, folding halves onto each other in the compiler's order (it decides the bits of a float sum).
template <class T, class F, class V>
EMULATED T reduce(F f, V v) {
    auto a = lanes<T>(v);
    for (size_t n = a.size() / 2; n > 0; n /= 2)
        for (size_t i = 0; i < n; ++i)
            a[i] = static_cast<T>(n * sizeof(T) >= 16 ? f(a[i + n], a[i]) : f(a[i], a[i + n]));
    return a[0];
}

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSub = [](auto a, auto b) { return a - b; };
constexpr auto kMul = [](auto a, auto b) { return a * b; };
constexpr auto kMulLow = [](auto a, auto b) { return static_cast<uint64_t>(a) * b; };
constexpr auto kDiv = [](auto a, auto b) { return a / b; };
constexpr auto kAnd = [](auto a, auto b) { return a & b; };
constexpr auto kAndNot = [](auto a, auto b) { return ~a & b; };
constexpr auto kOr = [](auto a, auto b) { return a | b; };
constexpr auto kXor = [](auto a, auto b) { return a ^ b; };
constexpr auto kMax = [](auto a, auto b) { return a > b ? a : b; };  // floats: b where a NaN takes part
constexpr auto kMin = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto kAbs = [](auto a) { return a < 0 ? 0u - static_cast<uint32_t>(a) : static_cast<uint32_t>(a); };
constexpr auto kFma = [](float a, float b, float c) { return std::fma(a, b, c); };
constexpr auto kFnma = [](float a, float b, float c) { return std::fma(-a, b, c); };
constexpr auto kEq = [](auto a, auto b) { return a == b; };
constexpr auto kNe = [](auto a, auto b) { return a != b; };
constexpr auto kLt = [](auto a, auto b) { return a < b; };
constexpr auto kLe = [](auto a, auto b) { return a <= b; };
constexpr auto kGt = [](auto a, auto b) { return a > b; };
constexpr auto kGe = [](auto a, auto b) { return a >= b; };
constexpr auto kAnyBit = [](auto a, auto b) { return (a & b) != 0; };
constexpr auto kNoBit = [](auto a, auto b) { return (a & b) == 0; };
constexpr auto kNegative = [](auto a) { return a < 0; };
// A shift by the width or more gives 0, or the sign everywhere.
constexpr auto kShiftLeft = [](auto a, uint64_t n) { return n >= 8 * sizeof a ? 0 : static_cast<uint64_t>(a) << n; };
constexpr auto kShiftRightUnsigned = [](auto a, uint64_t n) {
    return n >= 8 * sizeof a ? 0 : static_cast<uint64_t>(a) >> n;
};
constexpr auto kShiftRightSigned = [](auto a, uint64_t n) { return a >> (n >= 8 * sizeof a ? 8 * sizeof a - 1 : n); };
constexpr auto kShiftRightSignedBy = [](auto a, auto n) {  // a count from a lane, which counts as unsigned
    return kShiftRightSigned(a, static_cast<std::make_unsigned_t<decltype(n)>>(n));
};
template <class F>
struct ShiftBy {  // every lane by one count
    F f;
    uint64_t count;
    template <class T>
    auto operator()(T a) const {
        return f(a, count);
    }
};
struct Compare {  // the integer predicates of _MM_CMPINT_ENUM
    int predicate;
    template <class T>
    bool operator()(T a, T b) const {
        const bool is[4] = {a == b, a < b, a <= b, false};
        return is[predicate & 3] != ((predicate & 4) != 0);
    }
};
struct CompareFloat {  // the predicates _CMP_EQ_OQ to _CMP_TRUE_US; signalling or not makes no difference here
    int predicate;
    bool operator()(float a, float b) const {
        const bool unordered = std::isnan(a) || std::isnan(b);
        const bool is[16] = {
            a == b,    a < b,    a <= b, unordered,      a != b, !(a < b), !(a <= b), !unordered, !(a < b || a > b),
            !(a >= b), !(a > b), false,  a < b || a > b, a >= b, a > b,    true};
        return is[predicate & 15];
    }
};
struct RoundScale {  // to a multiple of 2^-(imm >> 4); imm & 3 is the rounding, imm & 4 the current one
    int imm;
    float operator()(float x) const {
        if (!std::isfinite(x)) return x;
        const float scaled = std::ldexp(x, imm >> 4 & 15);
        if (!std::isfinite(scaled)) return x;
        const int how = imm & 4 ? 0 : imm & 3;
        const float rounded = how == 0   ? std::nearbyint(scaled)
                              : how == 1 ? std::floor(scaled)
                              : how == 2 ? std::ceil(scaled)
                                         : std::trunc(scaled);
        return std::copysign(std::ldexp(rounded, -(imm >> 4 & 15)), x);
    }
};
struct Ternary {  // bit i of imm is the result for a, b, c being the bits of i, a the highest
    int imm;
    uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
        uint32_t out = 0;
        for (uint32_t i = 0; i < 8; ++i)
            if (imm >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return out;
    }
};

// ---- conversion -------------------------------------------------------------------------------------------------

template <class To>
struct Wrap {
    template <class From>
    To operator()(From x) const {
        return static_cast<To>(x);
    }
};
template <class To>
struct Saturate {
    template <class From>
    To operator()(From x) const {
        constexpr From low = std::is_signed_v<From> ? static_cast<From>(std::numeric_limits<To>::min()) : From{0};
        constexpr From high = static_cast<From>(std::numeric_limits<To>::max());
        return static_cast<To>(x < low ? low : x > high ? high : x);
    }
};
template <class To>
struct RoundTo {  // float to integer; what does not fit becomes the lowest integer
    bool truncate;
    To operator()(float x) const {
        const float r = truncate ? std::trunc(x) : std::nearbyint(x);
        constexpr float limit = -static_cast<float>(std::numeric_limits<To>::min());
        return r >= -limit && r < limit ? static_cast<To>(r) : std::numeric_limits<To>::min();
    }
};
// f(a[i]) in lane i of another vector type.
template <class To, class Out, class From, class F, class V>
EMULATED Out convert(F f, V v) {
    Lanes<To, Out> out{};
    const auto in = lanes<From>(v);
    for (size_t i = 0; i < in.size() && i < out.size(); ++i) out[i] = f(in[i]);
    return vector<Out>(out);
}
EMULATED __m512 half_to_float(__m256i h) {
    const std::array<__m256, 2> out = {_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                                       _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
    return vector<__m512>(out);
}
template <int imm>
EMULATED __m256i float_to_half(__m512 x) {
    const auto in = lanes<__m256>(x);
    return _mm256_set_m128i(_mm256_cvtps_ph(in[1], imm & 7), _mm256_cvtps_ph(in[0], imm & 7));
}
// Per 128 bits: a's lanes saturated, then b's.
template <class To, class From, class V>
EMULATED V pack(V a, V b) {
    constexpr size_t half = 16 / sizeof(From);
    Lanes<To, V> out;
    for (size_t i = 0; i < out.size(); ++i) {
        const size_t block = i / (2 * half), within = i % (2 * half);
        const V from = within < half ? a : b;
        out[i] = Saturate<To>{}(lanes<From>(from)[block * half + within % half]);
    }
    return vector<V>(out);
}

// ---- products of neighbours ---------------------------------------------------------------------------------------

// acc[i] + the sum of the products of the narrow lanes that lie under wide lane i.
template <class A, class B, class V>
EMULATED V dot(V acc, V a, V b) {
    auto out = lanes<uint32_t>(acc);  // wraps
    for (size_t i = 0; i < sizeof(V) / sizeof(A); ++i)
        out[i * sizeof(A) / 4] += static_cast<uint32_t>(int32_t{lanes<A>(a)[i]} * int32_t{lanes<B>(b)[i]});
    return vector<V>(out);
}
// Unsigned bytes of a times signed bytes of b, neighbours added, saturated to 16 bits.
template <class V>
EMULATED V maddubs(V a, V b) {
    Lanes<int16_t, V> out;
    const auto x = lanes<uint8_t>(a);
    const auto y = lanes<int8_t>(b);
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = Saturate<int16_t>{}(x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]);
    return vector<V>(out);
}
// The low 32 bits of every 64, multiplied in full.
template <class T, class V>
EMULATED V mul_even(V a, V b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    Lanes<Wide, V> out;
    for (size_t i = 0; i < out.size(); ++i) out[i] = Wide{lanes<T>(a)[2 * i]} * Wide{lanes<T>(b)[2 * i]};
    return vector<V>(out);
}
template <class V>
EMULATED V sad(V a, V b) {
    Lanes<uint64_t, V> out{};
    for (size_t i = 0; i < sizeof(V); ++i)
        out[i / 8] += static_cast<uint64_t>(std::abs(lanes<uint8_t>(a)[i] - lanes<uint8_t>(b)[i]));
    return vector<V>(out);
}

// ---- moving lanes -----------------------------------------------------------------------------------------------

template <class T, class V>
EMULATED V expand(V off, uint64_t mask, V v) {
    return expand_load<T>(off, mask, &v);
}
template <class T, class V>
EMULATED V compress(V off, uint64_t mask, V v) {
    compress_store<T>(&off, mask, v);
    return off;
}
// a[index[i] mod n]
template <class T, class V>
EMULATED V permute(V index, V a) {
    using I = std::conditional_t<
        sizeof(T) == 8, uint64_t,
        std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;
    auto out = lanes<T>(a);
    for (size_t i = 0; i < out.size(); ++i) out[i] = lanes<T>(a)[lanes<I>(index)[i] % out.size()];
    return vector<V>(out);
}
EMULATED __m512 permute_float(__m512i index, __m512 a) {
    return vector<__m512>(permute<uint32_t>(index, vector<__m512i>(a)));
}
// The same from a and b one after the other.
template <class T, class V, class I>
EMULATED V permute2(V a, I index, V b) {
    auto out = lanes<T>(a);
    for (size_t i = 0; i < out.size(); ++i) {
        const size_t from = static_cast<std::make_unsigned_t<T>>(lanes<T>(index)[i]) % (2 * out.size());
        out[i] = lanes<T>(from < out.size() ? a : b)[from % out.size()];
    }
    return vector<V>(out);
}
EMULATED __m512 permute2_float(__m512 a, __m512i index, __m512 b) {
    return vector<__m512>(permute2<int32_t>(vector<__m512i>(a), index, vector<__m512i>(b)));
}
// Within each 64 bits: byte i is the eight bits of a that begin at index[i], going round.
template <class V>
EMULATED V multishift(V index, V a) {
    Lanes<uint8_t, V> out;
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = static_cast<uint8_t>(std::rotr(lanes<uint64_t>(a)[i / 8], lanes<uint8_t>(index)[i] & 63));
    return vector<V>(out);
}
// Within each 128 bits: byte i from byte index[i] % 16, 0 where the index is negative.
template <class V>
EMULATED V shuffle_bytes(V a, V index) {
    Lanes<uint8_t, V> out;
    for (size_t i = 0; i < out.size(); ++i) {
        const uint8_t at = lanes<uint8_t>(index)[i];
        out[i] = at & 0x80 ? 0 : lanes<uint8_t>(a)[i / 16 * 16 + at % 16];
    }
    return vector<V>(out);
}
// Within each 128 bits: lanes 0 and 1 from a, 2 and 3 from b, two bits of imm for each.
template <class V>
EMULATED V shuffle_words(V a, V b, int imm) {
    Lanes<uint32_t, V> out;
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = lanes<uint32_t>(i % 4 < 2 ? a : b)[i / 4 * 4 + (imm >> 2 * (i % 4) & 3)];
    return vector<V>(out);
}
// Whole blocks of 128 bits: 0 and 1 from a, 2 and 3 from b.
template <class V>
EMULATED V shuffle_blocks(V a, V b, int imm) {
    Lanes<__int128, V> out;
    for (size_t i = 0; i < 4; ++i) out[i] = lanes<__int128>(i < 2 ? a : b)[imm >> 2 * i & 3];
    return vector<V>(out);
}
// Within each 256 bits: 64-bit lane i from lane (imm >> 2i) & 3.
template <class V>
EMULATED V permute_in_256(V a, int imm) {
    Lanes<uint64_t, V> out;
    for (size_t i = 0; i < out.size(); ++i) out[i] = lanes<uint64_t>(a)[i / 4 * 4 + (imm >> 2 * (i % 4) & 3)];
    return vector<V>(out);
}
// Within each 128 bits: a and b in turn, from their low (half = 0) or high (1) halves.
template <class T, class V>
EMULATED V unpack(V a, V b, size_t half) {
    constexpr size_t n = 16 / sizeof(T);
    Lanes<T, V> out;
    for (size_t i = 0; i < out.size(); ++i) out[i] = lanes<T>(i % 2 ? b : a)[i / n * n + half * n / 2 + i % n / 2];
    return vector<V>(out);
}
template <class V, class Part>
EMULATED V insert(V v, Part part, size_t at) {
    auto out = lanes<Part>(v);
    out[at % out.size()] = part;
    return vector<V>(out);
}
template <class Part, class V>
EMULATED Part extract(V v, size_t at) {
    return lanes<Part>(v)[at % (sizeof(V) / sizeof(Part))];
}
template <class V, class Part>
EMULATED V repeat(Part part) {
    Lanes<Part, V> out;
    for (Part& p : out) p = part;
    return vector<V>(out);
}
// (a above b) shifted right by `count` lanes, within blocks of `block` bytes.
template <class T, class V>
EMULATED V align(V a, V b, size_t count, size_t block) {
    const size_t n = block / sizeof(T);
    Lanes<T, V> out;
    for (size_t i = 0; i < out.size(); ++i) {
        const size_t from = i % n + count;
        out[i] = from < n ? lanes<T>(b)[i / n * n + from] : from < 2 * n ? lanes<T>(a)[i / n * n + from - n] : T{0};
    }
    return vector<V>(out);
}
template <class T, class V>
EMULATED V from_mask(uint64_t mask) {
    Lanes<T, V> out;
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<T>(bit(mask, i) ? -1 : 0);
    return vector<V>(out);
}
template <class T, class... X>
EMULATED __m512i listed(bool reversed, X... x) {
    Lanes<T, __m512i> out = {static_cast<T>(x)...};
    static_assert(sizeof...(x) == sizeof(out) / sizeof(T));
    for (size_t i = 0; reversed && i < out.size() / 2; ++i) std::swap(out[i], out[out.size() - 1 - i]);
    return vector<__m512i>(out);
}
template <class To, class From>
EMULATED To cast(From v) {  // what the source does not hold is zero
    To out{};
    __builtin_memcpy(&out, &v, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
    return out;
}

}  // namespace emulated

// ---- the intrinsics, in alphabetical order (_mm512, then _mm256, then _mm) ----------------------------------------
// clang-format off
#define _mm512_abs_epi16(...) emulated::map<int16_t>(emulated::kAbs, __VA_ARGS__)
#define _mm512_abs_epi32(...) emulated::map<int32_t>(emulated::kAbs, __VA_ARGS__)
#define _mm512_abs_epi8(...) emulated::map<int8_t>(emulated::kAbs, __VA_ARGS__)
#define _mm512_abs_ps(...) emulated::map<float>([](float x) { return std::fabs(x); }, __VA_ARGS__)
#define _mm512_add_epi16(...) emulated::map<uint16_t>(emulated::kAdd, __VA_ARGS__)
#define _mm512_add_epi32(...) emulated::map<uint32_t>(emulated::kAdd, __VA_ARGS__)
#define _mm512_add_epi64(...) emulated::map<uint64_t>(emulated::kAdd, __VA_ARGS__)
#define _mm512_add_epi8(...) emulated::map<uint8_t>(emulated::kAdd, __VA_ARGS__)
#define _mm512_add_ps(...) emulated::map<float>(emulated::kAdd, __VA_ARGS__)
#define _mm512_alignr_epi32(a, b, count) emulated::align<uint32_t>(a, b, (count) & 15, 64)
#define _mm512_alignr_epi8(a, b, count) emulated::align<uint8_t>(a, b, count, 16)
#define _mm512_and_ps(...) emulated::map_bits(emulated::kAnd, __VA_ARGS__)
#define _mm512_and_si512(...) emulated::map<uint64_t>(emulated::kAnd, __VA_ARGS__)
#define _mm512_andnot_si512(...) emulated::map<uint64_t>(emulated::kAndNot, __VA_ARGS__)
#define _mm512_broadcast_i32x4(...) emulated::repeat<__m512i, __m128i>(__VA_ARGS__)
#define _mm512_broadcast_i64x4(...) emulated::repeat<__m512i, __m256i>(__VA_ARGS__)
#define _mm512_castps_si512(...) emulated::cast<__m512i>(__VA_ARGS__)
#define _mm512_castsi128_si512(...) emulated::cast<__m512i>(__VA_ARGS__)
#define _mm512_castsi256_si512(...) emulated::cast<__m512i>(__VA_ARGS__)
#define _mm512_castsi512_ps(...) emulated::cast<__m512>(__VA_ARGS__)
#define _mm512_castsi512_si128(...) emulated::cast<__m128i>(__VA_ARGS__)
#define _mm512_castsi512_si256(...) emulated::cast<__m256i>(__VA_ARGS__)
#define _mm512_cmp_epi32_mask(a, b, predicate) emulated::test<int32_t>(emulated::Compare{predicate}, a, b)
#define _mm512_cmp_epi8_mask(a, b, predicate) emulated::test<int8_t>(emulated::Compare{predicate}, a, b)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::test<float>(emulated::CompareFloat{predicate}, a, b)
#define _mm512_cmpgt_epu32_mask(...) emulated::test<uint32_t>(emulated::kGt, __VA_ARGS__)
#define _mm512_cmple_epu32_mask(...) emulated::test<uint32_t>(emulated::kLe, __VA_ARGS__)
#define _mm512_cmplt_epi32_mask(...) emulated::test<int32_t>(emulated::kLt, __VA_ARGS__)
#define _mm512_cvtepi32_epi16(...) emulated::convert<int16_t, __m256i, int32_t>(emulated::Wrap<int16_t>{}, __VA_ARGS__)
#define _mm512_cvtepi32_epi8(...) emulated::convert<int8_t, __m128i, int32_t>(emulated::Wrap<int8_t>{}, __VA_ARGS__)
#define _mm512_cvtepi32_ps(...) emulated::convert<float, __m512, int32_t>(emulated::Wrap<float>{}, __VA_ARGS__)
#define _mm512_cvtepi8_epi16(...) emulated::convert<int16_t, __m512i, int8_t>(emulated::Wrap<int16_t>{}, __VA_ARGS__)
#define _mm512_cvtepi8_epi32(...) emulated::convert<int32_t, __m512i, int8_t>(emulated::Wrap<int32_t>{}, __VA_ARGS__)
#define _mm512_cvtepu16_epi32(...) emulated::convert<uint32_t, __m512i, uint16_t>(emulated::Wrap<uint32_t>{}, __VA_ARGS__)
#define _mm512_cvtph_ps(...) emulated::half_to_float(__VA_ARGS__)
#define _mm512_cvtps_epi32(...) emulated::convert<int32_t, __m512i, float>(emulated::RoundTo<int32_t>{false}, __VA_ARGS__)
#define _mm512_cvtps_ph(a, imm) emulated::float_to_half<(imm)>(a)
#define _mm512_cvtsepi32_epi16(...) emulated::convert<int16_t, __m256i, int32_t>(emulated::Saturate<int16_t>{}, __VA_ARGS__)
#define _mm512_cvtsepi32_epi8(...) emulated::convert<int8_t, __m128i, int32_t>(emulated::Saturate<int8_t>{}, __VA_ARGS__)
#define _mm512_cvttps_epi32(...) emulated::convert<int32_t, __m512i, float>(emulated::RoundTo<int32_t>{true}, __VA_ARGS__)
#define _mm512_div_ps(...) emulated::map<float>(emulated::kDiv, __VA_ARGS__)
#define _mm512_dpbusd_epi32(...) emulated::dot<uint8_t, int8_t>(__VA_ARGS__)
#define _mm512_dpwssd_epi32(...) emulated::dot<int16_t, int16_t>(__VA_ARGS__)
#define _mm512_extracti32x4_epi32(...) emulated::extract<__m128i>(__VA_ARGS__)
#define _mm512_extracti64x4_epi64(...) emulated::extract<__m256i>(__VA_ARGS__)
#define _mm512_fmadd_ps(...) emulated::map<float>(emulated::kFma, __VA_ARGS__)
#define _mm512_fnmadd_ps(...) emulated::map<float>(emulated::kFnma, __VA_ARGS__)
#define _mm512_i32gather_epi32(...) emulated::gather<uint32_t>(__m512i{}, 0xffff, __VA_ARGS__)
#define _mm512_inserti32x4(...) emulated::insert<__m512i, __m128i>(__VA_ARGS__)
#define _mm512_inserti64x4(...) emulated::insert<__m512i, __m256i>(__VA_ARGS__)
#define _mm512_load_ps(...) emulated::load_aligned<__m512>(__VA_ARGS__)
#define _mm512_load_si512(...) emulated::load_aligned<__m512i>(__VA_ARGS__)
#define _mm512_loadu_ps(...) emulated::load<__m512>(__VA_ARGS__)
#define _mm512_loadu_si512(...) emulated::load<__m512i>(__VA_ARGS__)
#define _mm512_lzcnt_epi32(...) emulated::map<uint32_t>([](uint32_t x) { return std::countl_zero(x); }, __VA_ARGS__)
#define _mm512_madd_epi16(...) emulated::dot<int16_t, int16_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maddubs_epi16(...) emulated::maddubs<__m512i>(__VA_ARGS__)
#define _mm512_mask_blend_epi32(...) emulated::blend<uint32_t>(__VA_ARGS__)
#define _mm512_mask_compress_epi16(...) emulated::compress<uint16_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_compress_epi32(...) emulated::compress<uint32_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_compress_epi8(...) emulated::compress<uint8_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_expand_epi16(...) emulated::expand<uint16_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_expand_epi32(...) emulated::expand<uint32_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_expand_epi8(...) emulated::expand<uint8_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_expand_ps(...) emulated::expand<float, __m512>(__VA_ARGS__)
#define _mm512_mask_loadu_epi32(...) emulated::load_some<uint32_t, __m512i>(__VA_ARGS__)
#define _mm512_mask_max_epi32(off, mask, ...) emulated::blend<uint32_t>(mask, off, _mm512_max_epi32(__VA_ARGS__))
#define _mm512_mask_mov_epi8(off, mask, ...) emulated::blend<uint8_t>(mask, off, __VA_ARGS__)
#define _mm512_mask_storeu_epi16(...) emulated::store_some<uint16_t>(__VA_ARGS__)
#define _mm512_mask_storeu_epi32(...) emulated::store_some<uint32_t>(__VA_ARGS__)
#define _mm512_mask_storeu_epi8(...) emulated::store_some<uint8_t>(__VA_ARGS__)
#define _mm512_mask_sub_epi8(off, mask, ...) emulated::blend<uint8_t>(mask, off, _mm512_sub_epi8(__VA_ARGS__))
#define _mm512_maskz_add_epi32(mask, ...) emulated::zero_unless<uint32_t>(mask, _mm512_add_epi32(__VA_ARGS__))
#define _mm512_maskz_compress_epi16(...) emulated::compress<uint16_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_compress_epi32(...) emulated::compress<uint32_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_compress_epi8(...) emulated::compress<uint8_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_compress_ps(...) emulated::compress<float>(__m512{}, __VA_ARGS__)
#define _mm512_maskz_expand_epi16(...) emulated::expand<uint16_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_expand_epi32(...) emulated::expand<uint32_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_expand_epi8(...) emulated::expand<uint8_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_expand_ps(...) emulated::expand<float>(__m512{}, __VA_ARGS__)
#define _mm512_maskz_expandloadu_epi8(...) emulated::expand_load<uint8_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_loadu_epi16(...) emulated::load_some<uint16_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_loadu_epi32(...) emulated::load_some<uint32_t>(__m512i{}, __VA_ARGS__)
#define _mm512_maskz_loadu_epi8(...) emulated::load_some<uint8_t>(__m512i{}, __VA_ARGS__)
#define _mm512_max_epi16(...) emulated::map<int16_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_max_epi32(...) emulated::map<int32_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_max_epi8(...) emulated::map<int8_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_max_epu16(...) emulated::map<uint16_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_max_epu32(...) emulated::map<uint32_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_max_epu8(...) emulated::map<uint8_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_max_ps(...) emulated::map<float>(emulated::kMax, __VA_ARGS__)
#define _mm512_min_epi32(...) emulated::map<int32_t>(emulated::kMin, __VA_ARGS__)
#define _mm512_min_epi8(...) emulated::map<int8_t>(emulated::kMin, __VA_ARGS__)
#define _mm512_min_epu32(...) emulated::map<uint32_t>(emulated::kMin, __VA_ARGS__)
#define _mm512_min_epu8(...) emulated::map<uint8_t>(emulated::kMin, __VA_ARGS__)
#define _mm512_min_ps(...) emulated::map<float>(emulated::kMin, __VA_ARGS__)
#define _mm512_movepi8_mask(...) emulated::test<int8_t>(emulated::kNegative, __VA_ARGS__)
#define _mm512_movm_epi8(...) emulated::from_mask<int8_t, __m512i>(__VA_ARGS__)
#define _mm512_mul_epi32(...) emulated::mul_even<int32_t>(__VA_ARGS__)
#define _mm512_mul_epu32(...) emulated::mul_even<uint32_t>(__VA_ARGS__)
#define _mm512_mul_ps(...) emulated::map<float>(emulated::kMul, __VA_ARGS__)
#define _mm512_mullo_epi16(...) emulated::map<uint16_t>(emulated::kMulLow, __VA_ARGS__)
#define _mm512_mullo_epi32(...) emulated::map<uint32_t>(emulated::kMulLow, __VA_ARGS__)
#define _mm512_multishift_epi64_epi8(...) emulated::multishift<__m512i>(__VA_ARGS__)
#define _mm512_or_si512(...) emulated::map<uint64_t>(emulated::kOr, __VA_ARGS__)
#define _mm512_packs_epi16(...) emulated::pack<int8_t, int16_t>(__VA_ARGS__)
#define _mm512_packs_epi32(...) emulated::pack<int16_t, int32_t>(__VA_ARGS__)
#define _mm512_packus_epi16(...) emulated::pack<uint8_t, int16_t>(__VA_ARGS__)
#define _mm512_packus_epi32(...) emulated::pack<uint16_t, int32_t>(__VA_ARGS__)
#define _mm512_permutex2var_epi32(...) emulated::permute2<int32_t>(__VA_ARGS__)
#define _mm512_permutex2var_epi8(...) emulated::permute2<int8_t>(__VA_ARGS__)
#define _mm512_permutex_epi64(...) emulated::permute_in_256(__VA_ARGS__)
#define _mm512_permutexvar_epi16(...) emulated::permute<uint16_t>(__VA_ARGS__)
#define _mm512_permutexvar_epi32(...) emulated::permute<uint32_t>(__VA_ARGS__)
#define _mm512_permutexvar_epi64(...) emulated::permute<uint64_t>(__VA_ARGS__)
#define _mm512_permutexvar_epi8(...) emulated::permute<uint8_t>(__VA_ARGS__)
#define _mm512_permutexvar_ps(...) emulated::permute_float(__VA_ARGS__)
#define _mm512_reduce_add_epi32(...) static_cast<int32_t>(emulated::reduce<uint32_t>(emulated::kAdd, __VA_ARGS__))
#define _mm512_reduce_add_ps(...) emulated::reduce<float>(emulated::kAdd, __VA_ARGS__)
#define _mm512_reduce_max_epi32(...) emulated::reduce<int32_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_reduce_max_epu32(...) emulated::reduce<uint32_t>(emulated::kMax, __VA_ARGS__)
#define _mm512_reduce_max_ps(...) emulated::reduce<float>(emulated::kMax, __VA_ARGS__)
#define _mm512_roundscale_ps(a, imm) emulated::map<float>(emulated::RoundScale{imm}, a)
#define _mm512_sad_epu8(...) emulated::sad<__m512i>(__VA_ARGS__)
#define _mm512_set1_epi32(...) emulated::fill<__m512i>(static_cast<int32_t>(__VA_ARGS__))
#define _mm512_set1_epi64(...) emulated::fill<__m512i>(static_cast<int64_t>(__VA_ARGS__))
#define _mm512_set1_epi8(...) emulated::fill<__m512i>(static_cast<int8_t>(__VA_ARGS__))
#define _mm512_set1_ps(...) emulated::fill<__m512>(static_cast<float>(__VA_ARGS__))
#define _mm512_setr_epi32(...) emulated::listed<int32_t>(false, __VA_ARGS__)
#define _mm512_setzero_ps() __m512 {}
#define _mm512_setzero_si512() __m512i {}
#define _mm512_shuffle_epi32(a, imm) emulated::shuffle_words(a, a, imm)
#define _mm512_shuffle_epi8(...) emulated::shuffle_bytes(__VA_ARGS__)
#define _mm512_shuffle_i32x4(...) emulated::shuffle_blocks(__VA_ARGS__)
#define _mm512_slli_epi16(a, count) emulated::map<uint16_t>(emulated::ShiftBy{emulated::kShiftLeft, static_cast<uint64_t>(count)}, a)
#define _mm512_slli_epi32(a, count) emulated::map<uint32_t>(emulated::ShiftBy{emulated::kShiftLeft, static_cast<uint64_t>(count)}, a)
#define _mm512_slli_epi64(a, count) emulated::map<uint64_t>(emulated::ShiftBy{emulated::kShiftLeft, static_cast<uint64_t>(count)}, a)
#define _mm512_sllv_epi32(...) emulated::map<uint32_t>(emulated::kShiftLeft, __VA_ARGS__)
#define _mm512_sllv_epi64(...) emulated::map<uint64_t>(emulated::kShiftLeft, __VA_ARGS__)
#define _mm512_sqrt_ps(...) emulated::map<float>([](float x) { return std::sqrt(x); }, __VA_ARGS__)
#define _mm512_srai_epi16(a, count) emulated::map<int16_t>(emulated::ShiftBy{emulated::kShiftRightSigned, static_cast<uint64_t>(count)}, a)
#define _mm512_srai_epi32(a, count) emulated::map<int32_t>(emulated::ShiftBy{emulated::kShiftRightSigned, static_cast<uint64_t>(count)}, a)
#define _mm512_srav_epi32(...) emulated::map<int32_t>(emulated::kShiftRightSignedBy, __VA_ARGS__)
#define _mm512_srli_epi16(a, count) emulated::map<uint16_t>(emulated::ShiftBy{emulated::kShiftRightUnsigned, static_cast<uint64_t>(count)}, a)
#define _mm512_srli_epi32(a, count) emulated::map<uint32_t>(emulated::ShiftBy{emulated::kShiftRightUnsigned, static_cast<uint64_t>(count)}, a)
#define _mm512_srli_epi64(a, count) emulated::map<uint64_t>(emulated::ShiftBy{emulated::kShiftRightUnsigned, static_cast<uint64_t>(count)}, a)
#define _mm512_srlv_epi32(...) emulated::map<uint32_t>(emulated::kShiftRightUnsigned, __VA_ARGS__)
#define _mm512_srlv_epi64(...) emulated::map<uint64_t>(emulated::kShiftRightUnsigned, __VA_ARGS__)
#define _mm512_store_ps(...) emulated::store_aligned<__m512>(__VA_ARGS__)
#define _mm512_store_si512(...) emulated::store_aligned<__m512i>(__VA_ARGS__)
#define _mm512_storeu_ps(...) emulated::store<__m512>(__VA_ARGS__)
#define _mm512_storeu_si512(...) emulated::store<__m512i>(__VA_ARGS__)
#define _mm512_sub_epi16(...) emulated::map<uint16_t>(emulated::kSub, __VA_ARGS__)
#define _mm512_sub_epi32(...) emulated::map<uint32_t>(emulated::kSub, __VA_ARGS__)
#define _mm512_sub_epi64(...) emulated::map<uint64_t>(emulated::kSub, __VA_ARGS__)
#define _mm512_sub_epi8(...) emulated::map<uint8_t>(emulated::kSub, __VA_ARGS__)
#define _mm512_sub_ps(...) emulated::map<float>(emulated::kSub, __VA_ARGS__)
#define _mm512_ternarylogic_epi32(a, b, c, imm) emulated::map<uint32_t>(emulated::Ternary{imm}, a, b, c)
#define _mm512_test_epi8_mask(...) emulated::test<uint8_t>(emulated::kAnyBit, __VA_ARGS__)
#define _mm512_testn_epi32_mask(...) emulated::test<uint32_t>(emulated::kNoBit, __VA_ARGS__)
#define _mm512_unpackhi_epi16(a, b) emulated::unpack<uint16_t>(a, b, 1)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack<uint32_t>(a, b, 1)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack<uint64_t>(a, b, 1)
#define _mm512_unpackhi_epi8(a, b) emulated::unpack<uint8_t>(a, b, 1)
#define _mm512_unpackhi_ps(a, b) emulated::unpack<float>(a, b, 1)
#define _mm512_unpacklo_epi16(a, b) emulated::unpack<uint16_t>(a, b, 0)
#define _mm512_unpacklo_epi32(a, b) emulated::unpack<uint32_t>(a, b, 0)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack<uint64_t>(a, b, 0)
#define _mm512_unpacklo_epi8(a, b) emulated::unpack<uint8_t>(a, b, 0)
#define _mm512_unpacklo_ps(a, b) emulated::unpack<float>(a, b, 0)
#define _mm512_xor_ps(...) emulated::map_bits(emulated::kXor, __VA_ARGS__)
#define _mm512_xor_si512(...) emulated::map<uint64_t>(emulated::kXor, __VA_ARGS__)
#define _mm512_zextsi128_si512(...) emulated::cast<__m512i>(__VA_ARGS__)
#define _mm256_maskz_expand_epi16(...) emulated::expand<uint16_t>(__m256i{}, __VA_ARGS__)
// clang-format on
