// How a lane goes through a row of a bitmap (bitmap_decode.cuh), a stage at a time.
//
// Values come by cp.async into shared memory, two stages ahead. There a lane holds two words, and the position in them
// of its next value. For each register of weights a selector by which byte_permute puts the next values to their
// places; where the position crosses a word, the next word is loaded. A 32-bit register of weights costs 9 instructions
// (int8) or 8.5 (16-bit), of which 3 to 3.5 go to the pipe of shifts and permutations, which has half the rate; with
// everything else a weight costs about 4 (int8) or 6 (16-bit).
#pragma once

#include "cuda/bitmap.cuh"
#include "cuda/quantize_rows.cuh"

namespace engine::cuda {

constexpr int kGroupRows = 8;  // of w, of one lane each
// A row's values in one stage, with up to 15 bytes before the first.
constexpr int kCopyBytes = kFragmentStage + 16;

// Copies 16 bytes of values, of which only those inside [begin, end) are read.
__device__ inline void copy_values(SharedAddress to, const uint8_t* from, const uint8_t* begin, const uint8_t* end) {
    if (from >= begin && from + 16 <= end) return copy_16_async(to, from);
#pragma unroll 1
    for (int i = 0; i < 16; ++i)
        if (from + i >= begin && from + i < end) store_shared_byte(to + i, from[i]);
}

// What next_word_if multiplies by: an argument of the kernel.
struct Constants {
    uint32_t one, four;
};

// Where a lane is in a row's copy: its next value begins at bit `bit` % 32 of (high, low).
struct Cursor {
    uint32_t low, high, bit;
    SharedAddress at;  // of the word after `high`

    __device__ void begin(SharedAddress byte) {
        at = byte & ~SharedAddress{3};
        low = load_shared(at);
        high = load_shared(at + 4);
        at += 8;
        bit = static_cast<uint32_t>(byte % 4) * 8;
    }
    // The values at the cursor, put to their places by `selector` (byte 4 is a zero), and past them to bit `next`.
    __device__ uint32_t take(uint32_t selector, uint32_t next, Constants constants) {
        const uint32_t spread = byte_permute(funnel_right(low, high, bit), 0, selector);
        next_word_if((bit ^ next) & 32, low, high, at, constants.one, constants.four);
        bit = next;
        return spread;
    }
};

// What a lane makes selectors of.
template <class V>
struct Selectors;

// int8: a register has four weights. Lane l holds the selector for the mask bits l % 16, and how many bits of values it
// takes in its upper half, so that a shuffle looks them up: the upper bits of the index do not matter.
template <>
struct Selectors<int8_t> {
    uint32_t entry = 0;
    Constants constants;

    explicit __device__ Selectors(Constants constants) : constants(constants) {
        uint32_t taken = 0;
        for (int i = 0; i < 4; ++i) {
            const bool kept = threadIdx.x >> i & 1;
            entry |= (kept ? taken : 4) << (4 * i);
            if (kept) ++taken;
        }
        entry = kept(entry | taken << 19);
    }
    // Weights of the next 16 bytes.
    template <int kRows>
    __device__ void spread(uint32_t (&out)[kRows][4], Cursor (&cursors)[kRows], const uint32_t (&masks)[kRows][2],
                           int chunk) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                // Byte by byte of the mask, or of the mask shifted by 4.
                const uint32_t byte = 1u << (chunk % 2 * 16 + i / 2 * 8);
                const uint32_t index = byte_dot(masks[r][chunk / 2] >> (i % 2 * 4), byte, 0);
                const uint32_t by = __shfl_sync(kAllLanes, entry, index);
                out[r][i] = cursors[r].take(by, byte_dot(by, 1u << 16, cursors[r].bit), constants);
            }
        }
    }
};

// 16-bit floats: a register has two weights. Lane l holds the selectors for bits 0 and 1 of l, and for bits 2 and 3 in
// its upper half. Which of 4 to 7 stands for the zero is chosen so that the selector also says how far the cursor
// moves: 4 · its low byte + 16 · its high byte is 16 · (the number of values) modulo 64.
template <class V>
struct Selectors {
    static_assert(sizeof(V) == 2);
    uint32_t entry = 0;
    Constants constants;

    explicit __device__ Selectors(Constants constants) : constants(constants) {
        for (int i = 0; i < 2; ++i) {
            const uint32_t pair = threadIdx.x >> (2 * i) & 3;
            const uint32_t selector = pair == 0 ? 0x4744 : pair == 1 ? 0x4510 : pair == 2 ? 0x1044 : 0x3210;
            entry |= selector << (16 * i);
        }
        entry = kept(entry);
    }
    template <int kRows>
    __device__ void spread(uint32_t (&out)[kRows][4], Cursor (&cursors)[kRows], const uint32_t (&masks)[kRows][1],
                           int chunk) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                Cursor& cursor = cursors[r];
                const uint32_t by = __shfl_sync(kAllLanes, entry, masks[r][0] >> (chunk * 8 + 4 * i));
                out[r][2 * i] = cursor.take(by, byte_dot(by, 0x1004, cursor.bit), constants);
                out[r][2 * i + 1] = cursor.take(by >> 16, byte_dot(by, 0x10040000, cursor.bit), constants);
            }
        }
    }
};

template <class V>
constexpr int kStageMask = kFragmentStage / sizeof(V) / 8;  // bytes of a row's mask
template <class V>
constexpr int kMaskWords = kStageMask<V> / 16;  // a lane's

// A row of w, as the four lanes of a quad go through it.
struct RowCursor {
    const uint8_t* mask;    // of the lane's first piece
    int mask_left;          // bytes from there on to the end of the slice; none of a row that is not read
    const uint8_t* values;  // 16 t bytes after the chunk of 16 that has the first value which is not copied
    uint32_t offset;        // of that value in its chunk
    SharedAddress copy;     // of the first of two copies, 16 t bytes on
    bool at_end;            // chunks hang over an end of `values`
};

// A lane's part of one stage.
template <class V, int kRows>
struct Stage {
    uint32_t mask[kRows][kMaskWords<V>];
    SharedAddress first[kRows];  // where its values begin

    // Bits beyond a row's end are as they are in its last byte, which row_fits has found to be 0.
    __device__ void load_masks(const RowCursor (&rows)[kRows], uint32_t at, int alignment) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint8_t* from = rows[r].mask + at;
            const int left = rows[r].mask_left - static_cast<int>(at);
#pragma unroll
            for (int k = 0; k < kMaskWords<V>; ++k) mask[r][k] = 0;
            if (alignment >= 4) {
#pragma unroll
                for (int k = 0; k < kMaskWords<V>; ++k)
                    if (left > 4 * k) mask[r][k] = reinterpret_cast<const uint32_t*>(from)[k];
            } else {
#pragma unroll
                for (int i = 0; i < 4 * kMaskWords<V>; ++i)
                    if (left > i) mask[r][i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
            }
        }
    }
    // Begins the copy of its values, which are next.
    __device__ void copy(RowCursor (&rows)[kRows], const Bitmap<V>& w, uint32_t which, int lane) {
        uint32_t counts = 0;  // of two rows, 16 bits each
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int k = 0; k < kMaskWords<V>; ++k) counts += static_cast<uint32_t>(__popc(mask[r][k])) << (16 * r);
        }
        const uint32_t through = sum_through_quad(counts), total = __shfl_sync(kAllLanes, through, lane | 3);
        const int t = lane % 4;
        int left[kRows];
        bool at_end = false, full = false;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t own = (through - counts) >> (16 * r) & 0xffff, all = total >> (16 * r) & 0xffff;
            first[r] = rows[r].copy + which + (rows[r].offset + own * sizeof(V) - 16 * t);
            left[r] = static_cast<int>(rows[r].offset + all * sizeof(V)) - 16 * t;
            at_end |= rows[r].at_end;
            full |= left[r] > 192;
        }
        if (at_end) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const auto* values = reinterpret_cast<const uint8_t*>(w.values);
                const uint8_t* from = kept(rows[r].values);
#pragma unroll 1
                for (int at = 0; at < left[r]; at += 64)
                    copy_values(rows[r].copy + which + at, from + at, values, values + w.nnz * sizeof(V));
            }
        } else {
            const auto copy_chunk = [&](int at) {
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    copy_16_async_if(at < left[r], rows[r].copy + which + at, rows[r].values + at);
            };
            for (int at = 0; at < 192; at += 64) copy_chunk(at);
            if (full) {  // of rows with more than half kept
                copy_chunk(192);
                copy_chunk(256);
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t end = static_cast<uint32_t>(left[r] + 16 * t);
            rows[r].values += end & ~15u;
            rows[r].offset = end & 15;
        }
    }
};

}  // namespace engine::cuda
