// A stretch of w on its way from memory into registers: 256 bytes of each row of a tile, as they are when spread.
//
// Lane t of a quad has 64 bytes of a row, two pieces of 32, one for each step (bitmap_activations.cuh), and takes its
// values one word after another. Producers read the mask, say where each lane's values begin, and have them copied into
// shared memory by cp.async; consumers spread them in registers, where they are the fragments A of a step's products.
//
// A register takes 9 instructions: of the mask a nibble or two bits (2), by which a table says how to permute (1); the
// next values shifted into place (1) and permuted (1); and the words move on if 32 bits are used up (4).
#pragma once

#include "cuda/bitmap.cuh"
#include "cuda/bitmap_activations.cuh"

namespace engine {

constexpr int kTileRows = 128;  // of w
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
    const uint8_t* mask;   // this lane's of stretch 0
    int columns;           // up to which it is read
    const uint8_t* chunk;  // this lane's first 16 bytes of the next stretch's values: from where they begin, 16 t on
    uint32_t offset;       // where in 16 bytes they begin
    int whole;             // bytes from there on that are in whole chunks within the tensor
    uint32_t left;         // bytes that row_offsets has the row take from there on
};

// This lane's mask of a stretch of a row. `words`: the stretch is within the rows, where the mask can be read by words.
template <class V>
__device__ inline LaneMask<V> load_mask(const RowStream& row, int stretch, bool words) {
    LaneMask<V> mask{};
    const uint8_t* from = row.mask + stretch * static_cast<int>(kStretchBytes / sizeof(V) / 8);
    if (words) {
        const LaneMask<V> loaded = *reinterpret_cast<const LaneMask<V>*>(from);
        return row.columns > 0 ? loaded : mask;
    }
    const int begin = (stretch * 4 + static_cast<int>(threadIdx.x % 4)) * kLaneWeights<V>;
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

// How many bytes from here on are in whole chunks within the tensor; 0 where the first is not.
template <class V>
__device__ inline int whole_bytes(const Bitmap<V>& w, const uint8_t* chunk) {
    const auto* begin = reinterpret_cast<const uint8_t*>(w.values);
    const auto* end = reinterpret_cast<const uint8_t*>(w.values + w.nnz);
    if (chunk < begin || chunk >= end) return 0;
    return static_cast<int>(std::min<int64_t>(end - chunk, 0x7fffffff));
}

constexpr uint32_t kNever = 0xffffffff;  // more than any row has

// A row of stretches [begin, end). One that does not fit row_offsets whatever its mask is is read as empty.
template <class V>
__device__ inline RowStream stream_of(const Bitmap<V>& w, int64_t row, int begin, int end, bool aligned) {
    const bool has_row = row < w.rows;
    const int before = count_before<V>(w.mask + (has_row ? row : 0) * w.row_bytes, begin, aligned);
    const auto limit = static_cast<int>(std::min<int64_t>(w.columns, int64_t{end} * 4 * kLaneWeights<V>));
    if (!has_row || !row_fits(w, row, w.row_offsets[row + 1] - w.row_offsets[row]))
        return {w.mask, 0, nullptr, 0, 0, kNever};
    const int64_t first = w.row_offsets[row] + before, left = w.row_offsets[row + 1] - first;
    const auto at = reinterpret_cast<uintptr_t>(w.values + first);
    const auto offset = static_cast<uint32_t>(at % 16);
    const auto* chunk = reinterpret_cast<const uint8_t*>(at - offset);
    return {w.mask + row * w.row_bytes + threadIdx.x % 4 * (kLaneWeights<V> / 8),
            limit,
            chunk + 16 * (threadIdx.x % 4),
            offset,
            whole_bytes(w, chunk),
            left >= 0 && left <= w.columns ? static_cast<uint32_t>(left * sizeof(V)) : kNever};
}

// What a lane needs of a stretch of a row: its mask, and where in the row's bytes its values begin.
template <class V>
struct alignas(8 / sizeof(V) * 2) LaneStretch {
    LaneMask<V> mask;
    uint32_t first;
};

// Of one stretch, the masks and values of the rows of a tile.
template <class V>
struct StretchCopy {
    LaneStretch<V> lanes[kTileRows][4];
    uint8_t values[kTileRows][kRowBytes];
};

// Copies 16 bytes of values, of which only those within the tensor are read.
template <class V>
__device__ inline void copy_edge(uint8_t* to, const uint8_t* from, const Bitmap<V>& w) {
    const auto* begin = reinterpret_cast<const uint8_t*>(w.values);
    const auto* end = reinterpret_cast<const uint8_t*>(w.values + w.nnz);
    if (from >= begin && from + 16 <= end) return copy_16_async(to, from);
    for (int i = 0; i < 16; ++i)
        if (from + i >= begin && from + i < end) to[i] = from[i];
}

constexpr int kStreams = 4;  // rows of a quad, 8 apart

// Begins the copy of a stretch's values of a quad's rows, and moves the rows past them.
template <class V>
__device__ inline void begin_values(StretchCopy<V>& copy, int tile_row, RowStream (&rows)[kStreams],
                                    const LaneMask<V> (&masks)[kStreams], const Bitmap<V>& w) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const uint32_t to = shared_address(&copy.values[tile_row][16 * t]);
    uint32_t bytes[kStreams], ends[kStreams], past[kStreams];
    bool whole = true;
#pragma unroll
    for (int r = 0; r < kStreams; r += 2) {  // two at once, in 16 bits each
        const auto low = static_cast<uint32_t>(masks[r].bits()), high = static_cast<uint32_t>(masks[r + 1].bits());
        const uint32_t own = (low | high << 16) * static_cast<uint32_t>(sizeof(V)), through = sum_through_quad(own);
        const uint32_t total = __shfl_sync(kAllLanes, through, lane | 3), first = through - own;
        bytes[r] = total & 0xffff;
        bytes[r + 1] = total >> 16;
        copy.lanes[tile_row + 8 * r][t] = {masks[r], rows[r].offset + (first & 0xffff)};
        copy.lanes[tile_row + 8 * r + 8][t] = {masks[r + 1], rows[r + 1].offset + (first >> 16)};
    }
#pragma unroll
    for (int r = 0; r < kStreams; ++r) {
        ends[r] = rows[r].offset + bytes[r];
        past[r] = ends[r] & ~15u;
        rows[r].offset = ends[r] & 15;
        rows[r].left -= bytes[r];
        whole = whole & (static_cast<int>((ends[r] + 15) & ~15u) <= rows[r].whole);
    }
    if (whole) {
#pragma unroll
        for (int r = 0; r < kStreams; ++r) {
#pragma unroll
            for (int i = 0; i < kStretchBytes / 64 + 1; ++i)
                if (16u * (t + 4 * i) < ends[r])
                    copy_16_of_stream(to + r * 8 * kRowBytes + 64 * i, rows[r].chunk + 64 * i);
            rows[r].chunk += past[r];
            rows[r].whole -= static_cast<int>(past[r]);
        }
    } else {
#pragma unroll
        for (int r = 0; r < kStreams; ++r) {
#pragma unroll 1
            for (uint32_t i = 16 * t; i < ends[r]; i += 64)
                copy_edge(&copy.values[tile_row + 8 * r][i], rows[r].chunk + (i - 16 * t), w);
            rows[r].chunk += past[r];
            rows[r].whole = whole_bytes(w, rows[r].chunk - 16 * t);
        }
    }
}

// By the mask bits of a register's weights: in the lower half the selector by which byte_permute puts the next values
// to their places (byte 4 is a zero), in the upper how many bits of values that takes.
using TileTable = uint32_t[16];

template <class V>
__device__ inline void make_tile_table(TileTable& table) {
    const unsigned m = threadIdx.x;
    if (m >= 16) return;
    uint32_t selector = 0, taken = 0;
    for (int i = 0; i < kInRegister<V>; ++i) {
        for (unsigned byte = 0; byte < sizeof(V); ++byte)
            selector |= (m >> i & 1 ? taken + byte : 4) << (4 * (i * sizeof(V) + byte));
        if (m >> i & 1) taken += sizeof(V);
    }
    table[m] = selector | 8 * taken << 16;
}

// The next values of a row: three words, and how many bits of the first are used up, modulo 32.
struct ValueReader {
    uint32_t low, high, ahead, next, shift;

    // From this byte of shared memory on.
    __device__ explicit ValueReader(uint32_t first)
        : low(shared_word(first & ~3u)),
          high(shared_word((first & ~3u) + 4)),
          ahead(shared_word((first & ~3u) + 8)),
          next((first & ~3u) + 12),
          shift(first % 4 * 8) {}
    __device__ uint32_t take(uint32_t entry) {
        const uint32_t out = byte_permute(funnel_right(low, high, shift), 0, entry), after = shift + (entry >> 16);
        move_words_if((after ^ shift) & 32, low, high, ahead, next);
        shift = after;
        return out;
    }
};

// A step of two rows, spread into the fragments of its four products.
template <class V>
__device__ inline void spread_step(FragmentA (&out)[4], ValueReader (&readers)[2], const LaneMask<V> (&masks)[2], int j,
                                   uint32_t table) {
    constexpr uint32_t kBits = ((1u << kInRegister<V>)-1) * sizeof(uint32_t);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t mask = masks[r].of_step(j);
            const int shift = i * kInRegister<V> - 2;
            const uint32_t at = (shift < 0 ? mask << -shift : mask >> shift) & kBits;
            const uint32_t entry = shared_word(table + at);
            out[i / 2].at[i % 2 * 2 + r] = readers[r].take(entry);
        }
    }
}

}  // namespace engine
