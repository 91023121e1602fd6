// How a kernel reads a bitmap: the mask in pieces, and values spread over their places in registers.
//
// A lane's piece is so many weights that they take 32 bytes when spread: 32 of int8, 16 of a 16-bit float. The four
// lanes 4 g + t of a quad have four pieces one after another, a span of 128 bytes. In a product (ptx.cuh) they are the
// B fragments of four steps: register 2 s + h is bytes [4t, ...) (h = 0) or [16 + 4t, ...) (h = 1) of step s. That is
// not the order of the summed dimension, but a sum has none, as long as the other operand is read in the same way.
//
// Nothing is read out of bounds whatever the tensors hold: before a value is read, a row's bits are counted and
// compared with row_offsets. A row that does not fit gives NaN: an error could be raised only by waiting for the GPU.
#pragma once

#include "cuda/product.cuh"

namespace engine::cuda {

// A sparse matrix [rows, columns], all on the device. What its tensors hold has not been checked.
template <class V>
struct Bitmap {
    const uint8_t* mask;         // [rows, row_bytes]
    const int64_t* row_offsets;  // [rows + 1]
    const V* values;             // [nnz]
    int64_t rows, columns, row_bytes, nnz;
    bool words;  // pieces of the mask are aligned and whole
};

template <class V>
constexpr int kPiece = 32 / sizeof(V);  // weights
template <class V>
constexpr int kSpan = 4 * kPiece<V>;
template <class V>
constexpr int kInRegister = 4 / sizeof(V);  // weights of a register

template <class V>
ENGINE_INLINE int64_t spans_of(int64_t columns) {
    return (columns + kSpan<V> - 1) / kSpan<V>;
}

// Bits of weights [begin, begin + kPiece) of a row, 0 beyond its end.
template <class V>
__device__ inline uint32_t mask_piece(const Bitmap<V>& w, const uint8_t* row_mask, int64_t begin) {
    if (begin >= w.columns) return 0;
    if (w.words) {
        if constexpr (kPiece<V> == 32) return *reinterpret_cast<const uint32_t*>(row_mask + begin / 8);
        return *reinterpret_cast<const uint16_t*>(row_mask + begin / 8);
    }
    const int64_t left = w.columns - begin;
    uint32_t bits = 0;
    for (int i = 0; i < kPiece<V> / 8; ++i)
        if (i * 8 < left) bits |= static_cast<uint32_t>(row_mask[begin / 8 + i]) << (8 * i);
    return left >= kPiece<V> ? bits : bits & ((1u << left) - 1);
}

// What row_offsets says of a row, loaded at once: a chain of loads is what a short kernel's time consists of.
struct RowEnds {
    int64_t begin, end, first, last;
    uint8_t beyond;  // bits of the row's last byte that stand for no weight

    template <class V>
    __device__ RowEnds(const Bitmap<V>& w, int64_t row)
        : begin(w.row_offsets[row]),
          end(w.row_offsets[row + 1]),
          first(w.row_offsets[0]),
          last(w.row_offsets[w.rows]),
          beyond(0) {
        if (w.columns % 8 != 0) beyond = w.mask[row * w.row_bytes + w.columns / 8] >> (w.columns % 8);
    }
    // Whether row_offsets runs from 0 to nnz (else all may be shifted) and gives the row, of which `bits` are set, as
    // many values, all within `values`.
    template <class V>
    __device__ bool fit(const Bitmap<V>& w, int64_t bits) const {
        return (begin >= 0) & (end >= begin) & (end <= w.nnz) & (end - begin == bits) & (first == 0) & (last == w.nnz) &
               (beyond == 0);
    }
};
template <class V>
__device__ inline bool row_fits(const Bitmap<V>& w, int64_t row, int64_t bits) {
    return RowEnds(w, row).fit(w, bits);
}

// The bits that one lane of a quad counts of spans [first, last); the quad's sum is the row's.
template <class V>
__device__ inline int64_t count_spans(const Bitmap<V>& w, const uint8_t* row_mask, int64_t first, int64_t last, int t) {
    int64_t count = 0;
    for (int64_t span = first; span < last; ++span)
        count += __popc(mask_piece(w, row_mask, span * kSpan<V> + t * kPiece<V>));
    return count;
}
template <class T>
__device__ inline T sum_of_quad(T value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
}
// The sum over the lanes of the quad up to and with this one.
__device__ inline uint32_t sum_through_quad(uint32_t value) {
    const int t = threadIdx.x % 4;
    const uint32_t one = __shfl_up_sync(kAllLanes, value, 1, 4);
    if (t >= 1) value += one;
    const uint32_t two = __shfl_up_sync(kAllLanes, value, 2, 4);
    return t >= 2 ? value + two : value;
}

// What spreads the values of one register: by the mask bits of its weights, in the lower half the selector by which
// byte_permute puts the next values to their places (byte 4 is a zero), in the upper how many bits of values that
// takes. Entries lie in as many banks: lanes never wait for each other.
template <class V>
using SpreadTable = uint32_t[1 << kInRegister<V>];

// All threads call; a barrier must follow.
template <class V>
__device__ inline void make_spread_table(SpreadTable<V>& table) {
    const unsigned m = threadIdx.x;
    if (m >= 1u << kInRegister<V>) return;
    uint32_t selector = 0, taken = 0;
    for (int i = 0; i < kInRegister<V>; ++i) {
        for (unsigned byte = 0; byte < sizeof(V); ++byte)
            selector |= (m >> i & 1 ? taken + byte : 4) << (4 * (i * sizeof(V) + byte));
        if (m >> i & 1) taken += sizeof(V);
    }
    table[m] = selector | 8 * taken << 16;
}

// Words of `values`, at whose ends a word may hang over: there only bytes inside are read.
struct GlobalWords {
    const uint8_t *at, *begin, *end;
    __device__ uint32_t next() {
        const uint8_t* word = at;
        at += 4;
        if (word >= begin && word + 4 <= end) return *reinterpret_cast<const uint32_t*>(word);
        uint32_t bytes = 0;
        for (int i = 0; i < 4; ++i)
            if (word + i >= begin && word + i < end) bytes |= static_cast<uint32_t>(word[i]) << (8 * i);
        return bytes;
    }
};

// A lane's piece spread over 8 registers. `words` begins with the word that holds the first value, at byte `offset`.
template <class V>
__device__ inline void spread(uint32_t (&out)[8], uint32_t mask, GlobalWords words, uint32_t offset,
                              const SpreadTable<V>& table) {
    uint32_t low = words.next(), high = words.next(), shift = 8 * offset;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t entry = table[mask >> (i * kInRegister<V>)&((1u << kInRegister<V>)-1)];
        out[i] = byte_permute(funnel_right(low, high, shift), 0, entry);
        shift += entry >> 16;
        if (shift >= 32) {
            low = high;
            high = words.next();
            shift -= 32;
        }
    }
}

// The host's part: what does not take a look at the data.

template <class V>
Bitmap<V> bitmap_of(const Tensor& bitmask, const Tensor& row_offsets, const Tensor& values, int64_t columns) {
    Bitmap<V> w{data<uint8_t>(bitmask),
                data<int64_t>(row_offsets),
                static_cast<const V*>(values.const_data_ptr()),
                bitmask.size(0),
                columns,
                bitmask.size(1),
                values.numel(),
                false};
    constexpr int kBytes = kPiece<V> / 8;
    w.words = columns % kPiece<V> == 0 && reinterpret_cast<uintptr_t>(w.mask) % kBytes == 0;
    return w;
}

inline void check_bitmap(const char* op, const Tensor& bitmask, const Tensor& row_offsets, const Tensor& values,
                         int64_t columns) {
    STD_TORCH_CHECK(columns >= 0 && bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Byte &&
                        bitmask.size(1) == columns / 8 + (columns % 8 != 0),
                    op, ": bitmask: expected uint8 [N, ceil(K / 8)]");
    STD_TORCH_CHECK(row_offsets.dim() == 1 && row_offsets.size(0) == bitmask.size(0) + 1 &&
                        row_offsets.scalar_type() == ScalarType::Long,
                    op, ": row_offsets: expected int64 [N + 1]");
    STD_TORCH_CHECK(values.dim() == 1, op, ": values: expected [nnz]");
    STD_TORCH_CHECK(bitmask.device() == values.device() && row_offsets.device() == values.device(), op,
                    ": values: expected one device for all tensors");
}

}  // namespace engine::cuda
