// A bitmap of int8 weights as the linear kernels read it: stretch by stretch along K, safely, and expanded to rows of
// int8 where a kernel wants them dense.
#pragma once

#include "common/bitmap.h"
#include "common/gemm_int8.h"
#include "common/registers_avx512.h"

namespace engine {

struct Int8Bitmap {
    const uint8_t* mask;         // [n, ceil(k/8)]
    const int64_t* row_offsets;  // [n + 1], checked
    const int8_t* values;        // [nnz]
    int64_t n, k, nnz;

    const uint8_t* row_mask(int64_t row) const { return mask + row * mask_bytes(k); }
    // The values from `position` on, of which min(kc, bits set) + kReadAhead may be read: where they are, or in
    // `buffer` where that might leave the tensor. A row whose bits disagree with row_offsets may have moved `position`
    // beyond the values: what is read is then meaningless, though in bounds, and `ends_well` reports it.
    const int8_t* readable(int64_t position, int64_t kc,
                           int8_t* buffer) const {  // [kc + kReadAhead]
        if (nnz - position >= kc + kReadAhead) return values + position;
        std::copy_n(values + std::min(position, nnz), std::clamp<int64_t>(nnz - position, 0, kc), buffer);
        return buffer;
    }
    // Whether a row of which all values were taken, up to `position`, is what row_offsets says.
    bool ends_well(int64_t row, int64_t position) const {
        return position == row_offsets[row + 1] && !has_padding_bits(row_mask(row), k);
    }
};

// What expands kc weights of a row; returns how many values it took.
using ExpandStretch = int64_t (*)(const uint8_t* mask,   // [ceil(kc/8)]
                                  const int8_t* values,  // kc + kReadAhead may be read
                                  int64_t kc,
                                  int8_t* out);  // [kc, rounded up to 64]; beyond kc zeros are written

inline int64_t expand_stretch_portable(const uint8_t* mask, const int8_t* values, int64_t kc, int8_t* out) {
    int64_t taken = 0;
    for (int64_t i = 0; i < kc; i += 64) {
        uint64_t bits = mask_bits(mask, i, kc);
        for (int64_t j = i; j < i + 64; ++j, bits >>= 1) {
            const auto kept = static_cast<int8_t>(bits & 1);
            out[j] = static_cast<int8_t>(values[taken] * kept);  // without a branch: half of them would be mispredicted
            taken += kept;
        }
    }
    return taken;
}

#if ENGINE_X86
// bits >> (8 * byte) & 0xff, times 16: the place of a byte's entry in an expand table. By a rotation into another
// register, where compilers copy the bits before they shift them: the loops below are bound by instructions.
template <int byte>
ENGINE_AVX2 ENGINE_INLINE uint64_t table_offset_avx2(uint64_t bits) {
    uint64_t rotated;
    asm("rorx %2, %1, %0" : "=r"(rotated) : "r"(bits), "i"((8 * byte + 60) % 64));
    return rotated & 0xff0;
}

// The 16 weights `part` (0 to 3) of 64.
template <int part>
ENGINE_AVX2 ENGINE_INLINE __m128i expand_part_avx2(const int8_t* values, uint64_t bits) {
    const auto* low = reinterpret_cast<const char*>(kExpandLow.data()) + table_offset_avx2<2 * part>(bits);
    const auto* high = reinterpret_cast<const char*>(kExpandHigh.data()) + table_offset_avx2<2 * part + 1>(bits);
    const __m128i control = _mm_add_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(low)),
                                         _mm_load_si128(reinterpret_cast<const __m128i*>(high)));
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), control);
}

// How many values come before each 16 weights of 64, counted side by side: the next vector does not wait for the last.
struct Prefix64 {
    int64_t of[5];
};
ENGINE_AVX2 ENGINE_INLINE Prefix64 prefix_64(uint64_t bits) {
    return {{0, popcount64(bits & 0xffff), popcount64(bits & 0xffffffff), popcount64(bits << 16), popcount64(bits)}};
}

// 64 weights from one mask word.
struct Expanded64 {
    __m128i part[4];
    int64_t taken;
};
ENGINE_AVX2 ENGINE_INLINE Expanded64 expand_64_avx2(const int8_t* values, uint64_t bits) {
    const Prefix64 before = prefix_64(bits);
    return {{expand_part_avx2<0>(values, bits), expand_part_avx2<1>(values + before.of[1], bits),
             expand_part_avx2<2>(values + before.of[2], bits), expand_part_avx2<3>(values + before.of[3], bits)},
            before.of[4]};
}

ENGINE_AVX2 inline int64_t expand_stretch_avx2(const uint8_t* mask, const int8_t* values, int64_t kc, int8_t* out) {
    const int8_t* from = values;
    for (int64_t i = 0; i < kc; i += 64) {
        const Expanded64 w = expand_64_avx2(from, mask_bits(mask, i, kc));
        for (int p = 0; p < 4; ++p) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 16 * p), w.part[p]);
        from += w.taken;
    }
    return from - values;
}

ENGINE_AVX512 inline int64_t expand_stretch_avx512(const uint8_t* mask, const int8_t* values, int64_t kc, int8_t* out) {
    const int8_t* from = values;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + 64 <= kc; i += 64, mask += 8) {
        uint64_t bits;
        std::memcpy(&bits, mask, 8);
        _mm512_storeu_si512(out + i, expand_bytes_avx512(mask, _mm512_loadu_si512(from)));
        from += popcount64(bits);
    }
    if (i < kc) {
        const uint64_t bits = mask_bits(mask, 0, kc - i);
        _mm512_storeu_si512(out + i, expand_lanes_avx512<int8_t>(bits, _mm512_loadu_si512(from)));
        from += popcount64(bits);
    }
    return from - values;
}
#endif

inline ExpandStretch expand_stretch() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return expand_stretch_avx2;
    if (isa() == Isa::avx512) return expand_stretch_avx512;
#endif
    return expand_stretch_portable;
}

// A bitmap's weights for the panels of common/gemm_int8.h.
class BitmapProvider {
  public:
    BitmapProvider(const Int8Bitmap& weight, BadRow& bad) : weight_(weight), bad_(&bad), expand_(expand_stretch()) {}

    const int8_t* block(int64_t row, int64_t rows, int64_t k0, int64_t kc, int8_t* scratch, int64_t* stride) {
        *stride = provider_stride(kc);
        int8_t buffer[kPanelDepth + kReadAhead];
        for (int64_t j = 0; j < rows; ++j) {
            if (k0 == 0) position_[j] = weight_.row_offsets[row + j];
            const int8_t* from = weight_.readable(position_[j], kc, buffer);
            position_[j] += expand_(weight_.row_mask(row + j) + k0 / 8, from, kc, scratch + j * *stride);
            if (k0 + kc >= weight_.k && !weight_.ends_well(row + j, position_[j])) bad_->record(row + j);
        }
        return scratch;
    }

  private:
    Int8Bitmap weight_;
    BadRow* bad_;
    ExpandStretch expand_;
    int64_t position_[kPanelColumns] = {};
};

}  // namespace engine
