// What every reader of a bitmap shares: its bits, the memory-safe way to its values, and the tables by which AVX2
// spreads kept weights over their places.
//
// A bitmap is a sparse matrix [N, K] as bitmask uint8 [N, ceil(K/8)] (weight k is kept where bit k % 8, the least
// significant first, of byte k / 8 is set; bits beyond K are 0), row_offsets int64 [N + 1] and values [nnz], one row
// after another.
//
// No reader may go out of bounds whatever the three tensors hold, and counting the bits first would cost an extra pass.
// A reader is safe in three steps:
//   1. Before the loop check_row_offsets, O(N), makes sure that every row begins and ends within values.
//   2. A row reads at most one value for each set bit, so at most K, and a vector reads at most kReadAhead beyond.
//      Where that may leave the tensor, which is so for the last rows only, row_values gives a padded copy of the row
//      instead.
//   3. After each row the reader compares the position that it reached with row_offsets[row + 1]. A row that differs is
//      recorded in BadRow, which is raised after the loop.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/isa.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {

static_assert(std::endian::native == std::endian::little, "a bitmask is read as 64-bit words");

// How many values beyond the last that a row needs its reader may load.
constexpr int64_t kReadAhead = 64;

inline int64_t mask_bytes(int64_t k) { return k / 8 + (k % 8 != 0); }  // without overflow for any k

// Throws unless 0 = row_offsets[0] <= ... <= row_offsets[rows] = nnz.
inline void check_row_offsets(const char* op,
                              const int64_t* row_offsets,  // [rows + 1]
                              int64_t rows, int64_t nnz) {
    STD_TORCH_CHECK(row_offsets[0] == 0 && row_offsets[rows] == nnz, op, ": row_offsets: expected 0 to ", nnz, ", got ",
                    row_offsets[0], " to ", row_offsets[rows]);
    bool monotone = true;
    for (int64_t row = 0; row < rows; ++row) monotone &= row_offsets[row] <= row_offsets[row + 1];
    STD_TORCH_CHECK(monotone, op, ": row_offsets: expected never to decrease");
}

// Bits of weights [begin, begin + 64) of a row, `begin` a multiple of 8. Beyond k they are 0, and no byte of the mask
// beyond the row's own is read.
ENGINE_INLINE uint64_t mask_bits(const uint8_t* mask,  // [ceil(k/8)], of the row
                                 int64_t begin, int64_t k) {
    uint64_t bits = 0;
    const int64_t left = k - begin;
    if (left >= 64) {
        std::memcpy(&bits, mask + begin / 8, 8);
        return bits;
    }
    if (left <= 0) return 0;
    for (int64_t i = 0; i < (left + 7) / 8; ++i) bits |= static_cast<uint64_t>(mask[begin / 8 + i]) << (8 * i);
    return bits & (~uint64_t{0} >> (64 - left));
}

// Whether a row's mask has a bit set beyond k.
inline bool has_padding_bits(const uint8_t* mask,  // [ceil(k/8)], of the row
                             int64_t k) {
    return k % 8 != 0 && mask[k / 8] >> (k % 8) != 0;
}

ENGINE_INLINE int popcount64(uint64_t bits) { return __builtin_popcountll(bits); }

// How many weights a row keeps.
inline int64_t count_bits(const uint8_t* mask,  // [ceil(k/8)], of the row
                          int64_t k) {
    int64_t count = 0;
    for (int64_t i = 0; i < k; i += 64) count += popcount64(mask_bits(mask, i, k));
    return count;
}

// A row whose mask and row_offsets disagree, for threads to record and their caller to raise.
class BadRow {
  public:
    void record(int64_t row) { row_.store(row, std::memory_order_relaxed); }
    void raise(const char* op) const {
        const int64_t row = row_.load(std::memory_order_relaxed);
        STD_TORCH_CHECK(row < 0, op, ": bitmask: row ", row,
                        " has not as many bits set as row_offsets gives it values");
    }

  private:
    std::atomic<int64_t> row_{-1};
};

// The values of a row, from which min(k, bits set) + kReadAhead may be read: those of the tensor where they lie within
// it, else a copy in `scratch`, which belongs to the calling thread and is good until its next use.
template <class T>
const T* row_values(const T* values,             // [nnz]
                    const int64_t* row_offsets,  // [rows + 1], checked
                    int64_t row, int64_t k, int64_t nnz, std::vector<T>& scratch) {
    const int64_t begin = row_offsets[row];
    if (nnz - begin >= k + kReadAhead) return values + begin;
    if (static_cast<int64_t>(scratch.size()) < k + kReadAhead) scratch.resize(k + kReadAhead);
    const int64_t length = std::min(row_offsets[row + 1] - begin, k);  // longer is an error, found when the row is done
    std::copy_n(values + begin, length, scratch.data());
    return scratch.data();
}

// For mask byte m: where each of its 8 weights lies among the kept ones; 0x80, which pshufb turns into 0, where pruned.
constexpr std::array<uint8_t, 8> expand_positions(int m) {
    std::array<uint8_t, 8> position{};
    uint8_t kept = 0;
    for (int i = 0; i < 8; ++i) position[i] = (m >> i & 1) != 0 ? kept++ : 0x80;
    return position;
}

using ByteTable = std::array<std::array<uint8_t, 16>, 256>;

// pshufb controls that spread int8 values over 16 places are kExpandLow[byte 0] + kExpandHigh[byte 1] of the mask, byte
// by byte: the high half counts on from the low half's popcount (0x80 + 8 still has the high bit). The first 8 bytes of
// kExpandLow[m] are expand_positions(m).
constexpr ByteTable make_expand_low() {
    ByteTable table{};
    for (int m = 0; m < 256; ++m) {
        const auto position = expand_positions(m);
        for (int i = 0; i < 8; ++i) table[m][i] = position[i];
        for (int i = 8; i < 16; ++i) table[m][i] = static_cast<uint8_t>(std::popcount(static_cast<unsigned>(m)));
    }
    return table;
}
constexpr ByteTable make_expand_high() {
    ByteTable table{};
    for (int m = 0; m < 256; ++m) {
        const auto position = expand_positions(m);
        for (int i = 0; i < 8; ++i) table[m][8 + i] = position[i];
    }
    return table;
}
// pshufb controls that spread 2-byte values over the 8 places of one mask byte.
constexpr ByteTable make_expand_pairs() {
    ByteTable table{};
    for (int m = 0; m < 256; ++m) {
        const auto position = expand_positions(m);
        for (int i = 0; i < 8; ++i) {
            const bool kept = position[i] < 0x80;
            table[m][2 * i] = kept ? static_cast<uint8_t>(2 * position[i]) : 0x80;
            table[m][2 * i + 1] = kept ? static_cast<uint8_t>(2 * position[i] + 1) : 0x80;
        }
    }
    return table;
}
// For mask byte m the numbers of its set bits, a byte each, the least significant first; then zeros.
constexpr std::array<uint64_t, 256> make_kept_places() {
    std::array<uint64_t, 256> table{};
    for (int m = 0; m < 256; ++m) {
        int kept = 0;
        for (int i = 0; i < 8; ++i) {
            if ((m >> i & 1) != 0) table[m] |= static_cast<uint64_t>(i) << (8 * kept++);
        }
    }
    return table;
}
alignas(64) inline constexpr std::array<uint64_t, 256> kKeptPlaces = make_kept_places();
alignas(64) inline constexpr ByteTable kExpandLow = make_expand_low();
alignas(64) inline constexpr ByteTable kExpandHigh = make_expand_high();
alignas(64) inline constexpr ByteTable kExpandPairs = make_expand_pairs();

#if ENGINE_X86
// 16 int8 weights of mask bits `m` (16 of them) from the kept ones at `values`, of which 16 are loaded.
ENGINE_AVX2 ENGINE_INLINE __m128i expand_16x8_avx2(const void* values, uint32_t m) {
    const auto low = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandLow[m & 0xff].data()));
    const auto high = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandHigh[m >> 8 & 0xff].data()));
    return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)), _mm_add_epi8(low, high));
}

// 8 weights of 2 bytes of mask byte `m` from the kept ones at `values`, of which 8 are loaded.
ENGINE_AVX2 ENGINE_INLINE __m128i expand_8x16_avx2(const void* values, uint32_t m) {
    const auto control = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandPairs[m & 0xff].data()));
    return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)), control);
}

// 8 weights of 4 bytes of mask byte `m` from the kept ones at `values`, of which 8 are loaded.
ENGINE_AVX2 ENGINE_INLINE __m256i expand_8x32_avx2(const void* values, uint32_t m) {
    const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandLow[m & 0xff].data()));
    const __m256i position = _mm256_cvtepi8_epi32(bytes);  // negative where pruned
    const __m256i all = _mm256_loadu_si256(static_cast<const __m256i*>(values));
    return _mm256_andnot_si256(_mm256_srai_epi32(position, 31), _mm256_permutevar8x32_epi32(all, position));
}
#endif

}  // namespace engine
