// What every reader of a 2:4 weight shares.
//
// Of every four weights of a row two are stored, K counting as padded with zeros to G = ceil(K / 4) groups: values
// [N, 2 G], the two of each group in the order of their columns, and metadata uint8 [N, ceil(G / 2)], two bits a value,
// the least significant first: where in its group it stands. A half byte beyond the last group is 0b0100.
//
// Two bits can't point out of a group, so that whatever metadata holds, nothing is read out of bounds. Vectors take 64
// weights at a time; the rest of a row is copied to where they may read on.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/tensor.h"

namespace engine {

inline int64_t groups_of_four(int64_t k) { return k / 4 + (k % 4 != 0); }  // without overflow for any k

template <class V>
struct SemiStructured {
    const V* values;          // [n, 2 groups]
    const uint8_t* metadata;  // [n, ceil(groups/2)]
    int64_t n, k;

    int64_t row_values() const { return 2 * groups_of_four(k); }
    int64_t row_bytes() const { return (groups_of_four(k) + 1) / 2; }
    // Where weight k0, a multiple of 8, of a row begins.
    const V* values_at(int64_t row, int64_t k0) const { return values + row * row_values() + k0 / 2; }
    const uint8_t* metadata_at(int64_t row, int64_t k0) const { return metadata + row * row_bytes() + k0 / 8; }
};

// The rest of a stretch of a row, fewer weights than `width`, which may be read to the end of the buffers: values of 0
// at place 0.
template <class V, int width>
struct SemiTail {
    alignas(64) V values[width / 2];
    alignas(64) uint8_t metadata[width / 8 + 8];

    SemiTail(const V* from_values, const uint8_t* from_metadata, int64_t left) {
        std::memset(this, 0, sizeof *this);
        const int64_t groups = groups_of_four(left);
        std::copy_n(from_values, 2 * groups, values);
        std::copy_n(from_metadata, (groups + 1) / 2, metadata);
    }
};

// Spreads the first kc weights of values and metadata over out[0, kc rounded up to 4). The body for every instruction
// set: it vectorises by itself where it is inlined, as both places of a group are found by shifts.
ENGINE_INLINE void spread_int8(const int8_t* __restrict values, const uint8_t* __restrict metadata, int64_t kc,
                               int8_t* __restrict out) {
    const int64_t groups = groups_of_four(kc);
    const auto word = [&](int64_t group, uint32_t places) {
        const auto first = static_cast<uint32_t>(static_cast<uint8_t>(values[2 * group]));
        const auto second = static_cast<uint32_t>(static_cast<uint8_t>(values[2 * group + 1]));
        return first << (8 * (places & 3)) | second << (8 * (places >> 2 & 3));
    };
    for (int64_t pair = 0; pair < groups / 2; ++pair) {
        const uint32_t places = metadata[pair];
        const uint32_t two[2] = {word(2 * pair, places), word(2 * pair + 1, places >> 4)};
        std::memcpy(out + 8 * pair, two, sizeof two);
    }
    if (groups % 2) {
        const uint32_t last = word(groups - 1, metadata[groups / 2]);
        std::memcpy(out + 4 * (groups - 1), &last, sizeof last);
    }
}

// For each half byte of metadata, all bits of the places where its first value stands, and its second.
template <class Bits>
struct PlaceMasks {
    Bits first[16][4], second[16][4];
};
template <class Bits>
constexpr PlaceMasks<Bits> make_place_masks() {
    PlaceMasks<Bits> masks{};
    for (int places = 0; places < 16; ++places) {
        masks.first[places][places & 3] = static_cast<Bits>(-1);
        masks.second[places][places >> 2] = static_cast<Bits>(-1);
    }
    return masks;
}
template <class Bits>
alignas(64) inline constexpr PlaceMasks<Bits> kPlaceMasks = make_place_masks<Bits>();

// The same for values of any type, to out of another. Masked, not stored where they belong: to read what was just
// stored in parts takes long.
template <class V, class W, class Convert>
ENGINE_INLINE void spread_any(const V* __restrict values, const uint8_t* __restrict metadata, int64_t kc,
                              W* __restrict out, const Convert& convert) {
    using Bits = std::conditional_t<sizeof(W) == 4, uint32_t, std::conditional_t<sizeof(W) == 2, uint16_t, uint8_t>>;
    const int64_t groups = groups_of_four(kc);
    for (int64_t group = 0; group < groups; ++group) {
        const uint32_t places = metadata[group / 2] >> (4 * (group % 2)) & 15;
        const auto first = std::bit_cast<Bits>(convert(values[2 * group]));
        const auto second = std::bit_cast<Bits>(convert(values[2 * group + 1]));
        Bits four[4];
        for (int j = 0; j < 4; ++j) {
            four[j] = static_cast<Bits>((first & kPlaceMasks<Bits>.first[places][j]) |
                                        (second & kPlaceMasks<Bits>.second[places][j]));
        }
        std::memcpy(out + 4 * group, four, sizeof four);
    }
}

// Shapes alone; which dtype values may have is the op's.
inline void check_semi_structured(const char* op, const Tensor& values, const Tensor& metadata, int64_t k) {
    STD_TORCH_CHECK(k >= 0 && values.dim() == 2 && values.size(1) == 2 * groups_of_four(k), op,
                    ": values: expected shape [N, 2 * ceil(K / 4)]");
    STD_TORCH_CHECK(metadata.dim() == 2 && metadata.scalar_type() == ScalarType::Byte &&
                        metadata.size(0) == values.size(0) && metadata.size(1) == (groups_of_four(k) + 1) / 2,
                    op, ": metadata: expected uint8 [N, ceil(K / 8)]");
}

}  // namespace engine
