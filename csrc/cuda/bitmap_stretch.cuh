// How bitmap_tile.cuh goes through rows of w: their masks, the copies of their values, and the spread into registers.
#pragma once

#include "cuda/bitmap_activations.cuh"
#include "cuda/bitmap_cursor.cuh"

namespace engine::cuda {

// A row's values in a stretch, up to 15 bytes before the first, and what is read ahead. Rows begin 12 banks apart: the
// lanes' words, 8 banks apart where half of the weights are kept, then lie evenly in the banks.
constexpr int kRowBytes = kStretchBytes + 48;

template <class V>
constexpr int kLaneWeights = kStretchBytes / 4 / sizeof(V);

// The mask of a lane in a stretch: a bit a weight, as many words as steps for int8, one of both for 16 bits.
template <class V>
struct LaneMask {
    uint32_t at[kLaneWeights<V> / 32];
    __device__ int bits() const {
        int sum = 0;
        for (const uint32_t word : at) sum += __popc(word);
        return sum;
    }
    __device__ uint32_t of_step(int j) const {
        if constexpr (sizeof(V) == 1) return at[j];
        return at[0] >> (16 * j);
    }
};

// A row of w on its way.
struct RowStream {
    const uint8_t* mask;
    int columns;            // up to which it is read
    const uint8_t* values;  // on 16 bytes
    uint32_t at;            // from there, in bytes: the values of the next stretch
};

template <class V>
__device__ inline LaneMask<V> load_mask(const RowStream& row, int stretch, bool aligned) {
    const int begin = stretch * 4 * kLaneWeights<V> + threadIdx.x % 4 * kLaneWeights<V>;
    LaneMask<V> mask{};
    if (begin >= row.columns) return mask;
    const uint8_t* from = row.mask + begin / 8;
    if (aligned && begin + kLaneWeights<V> <= row.columns) return *reinterpret_cast<const LaneMask<V>*>(from);
#pragma unroll 1
    for (int i = 0; i < kLaneWeights<V> / 8 && begin + 8 * i < row.columns; ++i) {
        const int left = row.columns - begin - 8 * i;
        const uint32_t bits = from[i] & (left < 8 ? (1u << left) - 1 : 0xff);
        mask.at[0] |= i < 4 ? bits << (8 * i) : 0;
        if constexpr (sizeof(V) == 1) mask.at[1] |= i < 4 ? 0 : bits << (8 * i - 32);
    }
    return mask;
}

// Bits set in a quad's row before stretch `end`.
template <class V>
__device__ inline int count_before(const uint8_t* mask, int end, bool aligned) {
    constexpr int kBytes = kStretchBytes / sizeof(V) / 8;
    int bits = 0;
    if (aligned) {
#pragma unroll 8
        for (int i = threadIdx.x % 4; i < 4 * end; i += 4) bits += reinterpret_cast<const LaneMask<V>*>(mask)[i].bits();
    } else {
#pragma unroll 1
        for (int i = threadIdx.x % 4; i < kBytes * end; i += 4) bits += __popc(mask[i]);
    }
    return sum_of_quad(bits);
}

constexpr uint32_t kNever = 0xffffffff;

// A row of stretches [begin, end), and where in its bytes it must have come to after them for row_offsets to be right.
// A row that does not fit row_offsets anyway is read as empty.
template <class V>
__device__ inline RowStream stream_of(const Bitmap<V>& w, int64_t row, int begin, int end, bool aligned,
                                      uint32_t& must_end) {
    const bool has_row = row < w.rows;
    const int before = count_before<V>(w.mask + (has_row ? row : 0) * w.row_bytes, begin, aligned);
    must_end = kNever;
    if (!has_row || !row_fits(w, row, w.row_offsets[row + 1] - w.row_offsets[row])) return {};
    const int64_t first = w.row_offsets[row] + before, left = w.row_offsets[row + 1] - first;
    const auto at = reinterpret_cast<uintptr_t>(w.values + first);
    const auto offset = static_cast<uint32_t>(at % 16);
    if (left >= 0 && left <= w.columns) must_end = offset + static_cast<uint32_t>(left * sizeof(V));
    return {w.mask + row * w.row_bytes,
            static_cast<int>(std::min<int64_t>(w.columns, int64_t{end} * 4 * kLaneWeights<V>)),
            reinterpret_cast<const uint8_t*>(at - offset), offset};
}

// Begins the copy of a stretch's values of two rows, and moves the rows past them. Returns where, in the row's bytes,
// this lane's begin.
template <class V>
__device__ inline void begin_values(uint32_t (&lane_first)[2], RowStream (&rows)[2], const LaneMask<V> (&masks)[2],
                                    uint8_t* copy,  // of the first row; the second's is 8 rows on
                                    const Bitmap<V>& w) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const auto* begin = reinterpret_cast<const uint8_t*>(w.values);
    const auto* end = reinterpret_cast<const uint8_t*>(w.values + w.nnz);
    uint32_t own = 0;  // of both rows, 16 bits each
    for (int r = 0; r < 2; ++r) own |= static_cast<uint32_t>(masks[r].bits() * sizeof(V)) << (16 * r);
    const uint32_t through = sum_through_quad(own), total = __shfl_sync(kAllLanes, through, lane | 3);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        RowStream& row = rows[r];
        const uint32_t offset = row.at % 16, bytes = total >> (16 * r) & 0xffff;
        lane_first[r] = offset + ((through - own) >> (16 * r) & 0xffff);
        const int chunks = static_cast<int>(bytes > 0 ? (offset + bytes + 15) / 16 : 0);
        const uint8_t* from = row.values + (row.at - offset);
        const bool whole = from >= begin && from + 16 * chunks <= end;
        uint8_t* to = copy + r * 8 * kRowBytes + 16 * t;
        from += 16 * t;
        row.at += bytes;
        if (whole) {
#pragma unroll
            for (int i = 0; i < kStretchBytes / 64 + 1; ++i)
                if (t + 4 * i < chunks) copy_16_async(to + 64 * i, from + 64 * i);
        } else {
#pragma unroll 1
            for (int i = 0; t + 4 * i < chunks; ++i)
                copy_values(shared_address(to) + 64 * i, from + 64 * i, begin, end);
        }
    }
}

// The next values of a row.
struct ValueReader {
    const uint32_t* next;
    uint32_t low, high, shift;  // bits of (high, low) that are used up, modulo 32

    __device__ explicit ValueReader(const uint8_t* copy, uint32_t first)
        : next(reinterpret_cast<const uint32_t*>(copy) + first / 4),
          low(*next++),
          high(*next++),
          shift(first % 4 * 8) {}
    __device__ uint32_t take(uint32_t entry) {
        const uint32_t out = byte_permute(funnel_right(low, high, shift), 0, entry), after = shift + (entry >> 16);
        if ((after ^ shift) & 32) {
            low = high;
            high = *next++;
        }
        shift = after;
        return out;
    }
};

// A step of two rows, spread into the fragments of its four products.
template <class V>
__device__ inline void spread_step(FragmentA (&out)[4], ValueReader (&readers)[2], const LaneMask<V> (&masks)[2], int j,
                                   const SpreadTable<V>& table) {
    constexpr uint32_t kBits = ((1u << kInRegister<V>)-1) * sizeof(uint32_t);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t mask = masks[r].of_step(j);
            const int shift = i * kInRegister<V> - 2;
            const uint32_t at = (shift < 0 ? mask << -shift : mask >> shift) & kBits;
            const uint32_t entry = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(table) + at);
            out[i / 2].at[i % 2 * 2 + r] = readers[r].take(entry);
        }
    }
}

}  // namespace engine::cuda
