// prune_to_semi_structured: of every four weights of a row the two largest magnitudes, packed with their places.

#include "common/bitmap_pack.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/semi_structured.h"

namespace engine {
namespace {

// Masks with two of four bits, 3 to 12, each with its places.
alignas(16) constexpr uint8_t kPlaces[16] = {0, 0, 0, 0b0100, 0, 0b1000, 0b1001, 0, 0, 0b1100, 0b1101, 0, 0b1110};

constexpr uint32_t kNanRank = 0x7f800001;  // above infinity, the same for every NaN

// Magnitudes as integers of the same order.
template <class T>
ENGINE_INLINE uint32_t rank_of(T weight) {
    return std::min(std::bit_cast<uint32_t>(to_float(weight)) & 0x7fffffff, kNanRank);
}

// The places of the two largest of four, the first in the low two bits. Of equals the lower place wins: `ahead` counts
// how many come before each, without a branch, as half of them would be mispredicted.
ENGINE_INLINE uint32_t two_largest(const uint32_t (&rank)[4]) {
    uint32_t ahead[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) {
        for (int j = i + 1; j < 4; ++j) {
            const uint32_t later = rank[j] > rank[i];
            ahead[i] += later;
            ahead[j] += 1 - later;
        }
    }
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(ahead[i] < 2) << i;
    return kPlaces[mask];
}

// Groups from `group` on of a row.
template <class T>
ENGINE_INLINE void prune_rest(const T* row,  // [k]
                              int64_t k, int64_t group,
                              T* values,            // [2 groups]
                              uint8_t* metadata) {  // [ceil(groups/2)]
    const int64_t groups = groups_of_four(k);
    for (; group < groups; ++group) {
        T four[4] = {};
        std::copy_n(row + 4 * group, std::min<int64_t>(4, k - 4 * group), four);
        const uint32_t rank[4] = {rank_of(four[0]), rank_of(four[1]), rank_of(four[2]), rank_of(four[3])};
        const uint32_t places = two_largest(rank);
        values[2 * group] = four[places & 3];
        values[2 * group + 1] = four[places >> 2];
        if (group % 2) {
            metadata[group / 2] |= static_cast<uint8_t>(places << 4);
        } else {
            metadata[group / 2] = static_cast<uint8_t>(places);
        }
    }
    if (groups % 2) metadata[groups / 2] |= 0b0100 << 4;
}

template <class T>
void prune_row_portable(const T* row, int64_t k, T* values, uint8_t* metadata) {
    prune_rest(row, k, 0, values, metadata);
}

#if ENGINE_X86
// Of masks by half bytes, the places: 16 bytes of metadata.
ENGINE_AVX2 ENGINE_INLINE void store_places_avx2(__m128i masks, uint8_t* metadata) {
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces)), half = _mm_set1_epi8(15);
    const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(masks, half));
    const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(masks, 4), half));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(metadata), _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

// Each weight's rank is compared with those of the three others of its group, which rotations bring: those behind it
// come before it where they are larger, those ahead of it, for which `lower` is set, where they are equal too. A weight
// stays unless two of the three come before it.
template <class T>
struct PruneAvx512 {
    static constexpr int64_t kLanes = 64 / sizeof(T);
    static constexpr bool k32 = sizeof(T) == 4;

    ENGINE_AVX512 ENGINE_INLINE static __m512i ranks(__m512i weights) {
        if constexpr (k32) {
            const __m512i magnitudes = _mm512_and_si512(weights, _mm512_set1_epi32(0x7fffffff));
            return _mm512_min_epu32(magnitudes, _mm512_set1_epi32(kNanRank));
        }
        constexpr short kNan = std::is_same_v<T, Half> ? 0x7c01 : 0x7f81;
        return _mm512_min_epu16(_mm512_and_si512(weights, _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(kNan));
    }
    template <int by>
    ENGINE_AVX512 ENGINE_INLINE static uint32_t before(__m512i ranks) {
        // Lane i meets lane (i + by) % 4, which is a lower one from 4 - by on.
        constexpr uint32_t kLower = (0b1111 << (4 - by) & 0b1111) * 0x11111111u;
        if constexpr (k32) {
            constexpr auto kRotate = static_cast<_MM_PERM_ENUM>(by == 1 ? 0x39 : by == 2 ? 0x4e : 0x93);
            const __m512i other = _mm512_shuffle_epi32(ranks, kRotate);
            return _mm512_cmpgt_epu32_mask(other, ranks) |
                   _mm512_mask_cmpeq_epu32_mask(static_cast<__mmask16>(kLower), other, ranks);
        } else {
            const __m512i other = _mm512_ror_epi64(ranks, 16 * by);
            return _mm512_cmpgt_epu16_mask(other, ranks) | _mm512_mask_cmpeq_epu16_mask(kLower, other, ranks);
        }
    }

    ENGINE_AVX512 static void row(const T* row, int64_t k, T* values, uint8_t* metadata) {
        int64_t i = 0;
        for (; i + 128 <= k; i += 128) {
            alignas(16) uint8_t masks[16];
#pragma GCC unroll 8
            for (int64_t j = 0; j < 128; j += kLanes) {
                const __m512i weights = _mm512_loadu_si512(row + i + j), rank = ranks(weights);
                const uint32_t a = before<1>(rank), b = before<2>(rank), c = before<3>(rank);
                const uint32_t kept = ~((a & b) | (c & (a | b)));
                std::memcpy(masks + j / 8, &kept, kLanes / 8);
                const __m512i packed = compress_lanes_avx512<T>(kept & (~uint64_t{0} >> (64 - kLanes)), weights);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + (i + j) / 2), _mm512_castsi512_si256(packed));
            }
            store_places_avx2(_mm_load_si128(reinterpret_cast<const __m128i*>(masks)), metadata + i / 8);
        }
        prune_rest(row, k, i / 4, values, metadata);
    }
};

// The same by 8 or 16 weights, whose ranks compare as signed integers.
template <class T>
struct PruneAvx2 {
    static constexpr int64_t kLanes = 32 / sizeof(T);
    static constexpr bool k32 = sizeof(T) == 4;

    ENGINE_AVX2 ENGINE_INLINE static __m256i ranks(__m256i weights) {
        if constexpr (k32) {
            const __m256i magnitudes = _mm256_and_si256(weights, _mm256_set1_epi32(0x7fffffff));
            return _mm256_min_epu32(magnitudes, _mm256_set1_epi32(kNanRank));
        }
        constexpr short kNan = std::is_same_v<T, Half> ? 0x7c01 : 0x7f81;
        return _mm256_min_epu16(_mm256_and_si256(weights, _mm256_set1_epi16(0x7fff)), _mm256_set1_epi16(kNan));
    }
    template <int by>
    ENGINE_AVX2 ENGINE_INLINE static __m256i before(__m256i ranks) {
        constexpr int kRotate = by == 1 ? 0x39 : by == 2 ? 0x4e : 0x93;
        constexpr auto kLower = [](int lane) { return lane % 4 >= 4 - by ? -1 : 0; };
        if constexpr (k32) {
            const __m256i other = _mm256_shuffle_epi32(ranks, kRotate);
            const __m256i lower = _mm256_setr_epi32(kLower(0), kLower(1), kLower(2), kLower(3), kLower(0), kLower(1),
                                                    kLower(2), kLower(3));
            const __m256i equal = _mm256_and_si256(_mm256_cmpeq_epi32(other, ranks), lower);
            return _mm256_or_si256(_mm256_cmpgt_epi32(other, ranks), equal);
        } else {
            const __m256i other = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(ranks, kRotate), kRotate);
            constexpr int64_t kGroup = static_cast<int64_t>(~uint64_t{0} << (16 * (4 - by)));
            const __m256i equal = _mm256_and_si256(_mm256_cmpeq_epi16(other, ranks), _mm256_set1_epi64x(kGroup));
            return _mm256_or_si256(_mm256_cmpgt_epi16(other, ranks), equal);
        }
    }
    // The kept ones of 8 weights, four of them.
    ENGINE_AVX2 ENGINE_INLINE static void store_kept(__m256i weights, uint32_t kept, T* values) {
        const __m256i places = _mm256_cvtepu8_epi32(pack_positions_avx2(kept));
        const __m256i packed = _mm256_permutevar8x32_epi32(weights, places);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm256_castsi256_si128(packed));
    }
    ENGINE_AVX2 ENGINE_INLINE static void store_kept(__m128i weights, uint32_t kept, T* values) {
        const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(kPackPairs[kept].data()));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(values), _mm_shuffle_epi8(weights, places));
    }

    ENGINE_AVX2 static void row(const T* row, int64_t k, T* values, uint8_t* metadata) {
        int64_t i = 0;
        for (; i + 128 <= k; i += 128) {
            alignas(16) uint8_t masks[16];
            for (int64_t j = 0; j < 128; j += kLanes) {
                const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i + j));
                const __m256i rank = ranks(weights), a = before<1>(rank), b = before<2>(rank), c = before<3>(rank);
                const __m256i lost =
                    _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)));
                T* const to = values + (i + j) / 2;
                if constexpr (k32) {
                    const auto kept = static_cast<uint8_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(lost)));
                    masks[j / 8] = kept;
                    store_kept(weights, kept, to);
                } else {
                    const __m128i bytes =
                        _mm_packs_epi16(_mm256_castsi256_si128(lost), _mm256_extracti128_si256(lost, 1));
                    const auto kept = static_cast<uint16_t>(~_mm_movemask_epi8(bytes));
                    std::memcpy(masks + j / 8, &kept, sizeof kept);
                    store_kept(_mm256_castsi256_si128(weights), kept & 0xff, to);
                    store_kept(_mm256_extracti128_si256(weights, 1), kept >> 8, to + 4);
                }
            }
            store_places_avx2(_mm_load_si128(reinterpret_cast<const __m128i*>(masks)), metadata + i / 8);
        }
        prune_rest(row, k, i / 4, values, metadata);
    }
};
#endif

template <class T>
auto prune_row() {
#if ENGINE_X86
    if (isa() == Isa::avx512) return PruneAvx512<T>::row;
    if (isa() == Isa::avx2) return PruneAvx2<T>::row;
#endif
    return prune_row_portable<T>;
}

std::tuple<Tensor, Tensor> prune_to_semi_structured(Tensor weight_in) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_to_semi_structured: weight: expected shape [N, K]");
    const Tensor weight = as_contiguous(weight_in);
    const int64_t n = weight.size(0), k = weight.size(1), groups = groups_of_four(k), bytes = (groups + 1) / 2;
    return dispatch_float(weight.scalar_type(), "prune_to_semi_structured: weight", [&](auto zero) {
        using T = decltype(zero);
        Tensor values = new_output(weight, {n, 2 * groups}, weight.scalar_type());
        Tensor metadata = new_output(weight, {n, bytes}, ScalarType::Byte);
        const T* from = data<T>(weight);
        T* to = mutable_data<T>(values);
        uint8_t* places = mutable_data<uint8_t>(metadata);
        auto* const prune = prune_row<T>();
        parallel_rows(n, 4 * k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                prune(from + row * k, k, to + row * 2 * groups, places + row * bytes);
            }
        });
        return std::tuple(values, metadata);
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("prune_to_semi_structured", TORCH_BOX(&engine::prune_to_semi_structured));
}
