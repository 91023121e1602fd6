// A bitmap as a source for common/spmm.h: the places of its set bits, and its values as fp32.
#pragma once

#include <array>

#include "common/bitmap.h"
#include "common/registers_avx512.h"
#include "common/spmm.h"

namespace engine {

// The places of the bits set among the first kc of a mask; up to 64 bytes beyond may be written. Returns how many.
ENGINE_INLINE int64_t kept_columns(const uint8_t* mask,  // [ceil(kc/8)]
                                   int64_t kc, uint8_t* columns) {
    static_assert(kSpmmDepth <= 256);
    uint8_t* to = columns;
    const auto eight = [&](int64_t i, uint32_t m) {
        const uint64_t places = kKeptPlaces[m] + static_cast<uint64_t>(i) * 0x0101010101010101u;
        std::memcpy(to, &places, sizeof places);
        to += popcount64(m);
    };
    int64_t i = 0;
    for (; i + 8 <= kc; i += 8) eight(i, mask[i / 8]);
    if (i < kc) eight(i, mask[i / 8] & ((1u << (kc - i)) - 1));
    return to - columns;
}
inline int64_t kept_columns_portable(const uint8_t* mask, int64_t kc, uint8_t* columns) {
    return kept_columns(mask, kc, columns);
}
#if ENGINE_X86
ENGINE_AVX2 inline int64_t kept_columns_avx2(const uint8_t* mask, int64_t kc, uint8_t* columns) {
    return kept_columns(mask, kc, columns);
}
ENGINE_AVX512 inline int64_t kept_columns_avx512(const uint8_t* mask, int64_t kc, uint8_t* columns) {
    alignas(64) static constexpr std::array<uint8_t, 64> kFirst = [] {
        std::array<uint8_t, 64> places{};
        for (uint8_t i = 0; i < 64; ++i) places[i] = i;
        return places;
    }();
    static_assert(kSpmmGroup * (KeptRows::kStride - kSpmmDepth) >= 64);  // what a group's last row may write beyond
    __m512i places = _mm512_load_si512(kFirst.data());
    uint8_t* to = columns;
    for (int64_t i = 0; i < kc; i += 64) {
        const uint64_t bits = integer_bits(mask_bits(mask, i, kc));
        _mm512_storeu_si512(to, compress_lanes_avx512<uint8_t>(bits, places));
        places = _mm512_add_epi8(places, _mm512_set1_epi8(64));
        to += popcount64(bits);
    }
    return to - columns;
}
#endif

template <class V>
class BitmapSource {
  public:
    BitmapSource(const uint8_t* bitmask, const int64_t* row_offsets, const V* values, int64_t k, int64_t nnz,
                 BadRow& bad)
        : bitmask_(bitmask), row_offsets_(row_offsets), values_(values), k_(k), nnz_(nnz), bad_(&bad) {
#if ENGINE_X86
        if (isa() == Isa::avx2) columns_ = kept_columns_avx2;
        if (isa() == Isa::avx512) columns_ = kept_columns_avx512;
#endif
    }

    int64_t kept() const { return nnz_; }

    void rows(int64_t row, int64_t rows, int64_t k0, int64_t kc, KeptRows& kept) {
        if (k0 == 0) std::copy_n(row_offsets_ + row, rows, position_);
        uint8_t* columns = kept.columns;
        float* values = kept.values;
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* mask = bitmask_ + (row + r) * mask_bytes(k_);
            const int64_t count = columns_(mask + k0 / 8, kc, columns);
            kept.row[r] = {take(position_[r], row_offsets_[row + r + 1], count, values), columns, count};
            position_[r] += count;
            columns += count;
            values += count;
            if (k0 + kc < k_) {  // ask for the row's next stretch, which will be about as long, meanwhile
                __builtin_prefetch(mask + (k0 + 2 * kc) / 8);
                const char* next = reinterpret_cast<const char*>(values_ + std::min(position_[r], nnz_));
                for (size_t b = 0; b < count * sizeof(V) + 64; b += 64) __builtin_prefetch(next + b);
                continue;
            }
            if (position_[r] != row_offsets_[row + r + 1] || has_padding_bits(mask, k_)) bad_->record(row + r);
        }
    }

  private:
    // `count` values from `position` on, which end at `end`. A bitmap that doesn't fit together may have led beyond
    // them: what is given then means nothing, belongs to no other row, and is reported when the row ends.
    const float* take(int64_t position, int64_t end, int64_t count, float* to) const {
        const int64_t there = std::clamp<int64_t>(end - position, 0, count);
        const V* from = values_ + std::min(position, nnz_);
        if constexpr (sizeof(V) == sizeof(float)) {
            if (there == count) return from;
        }
        to_floats_(from, there, to);
        std::fill(to + there, to + count, 0.0f);
        return to;
    }

    const uint8_t* bitmask_;      // [n, ceil(k/8)]
    const int64_t* row_offsets_;  // [n + 1], checked
    const V* values_;             // [nnz]
    int64_t k_, nnz_;
    BadRow* bad_;
    int64_t (*columns_)(const uint8_t*, int64_t, uint8_t*) = kept_columns_portable;
    ToFloats<V> to_floats_ = to_floats<V>();
    int64_t position_[kSpmmGroup] = {};  // of the values of each row of the group
};

}  // namespace engine
