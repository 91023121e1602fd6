// A bitmap of float weights as the linear kernels read it, a row at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bitmap.h"

namespace engine {

// Where a row of weights is read.
template <class V>
struct FloatColumn {
    const uint8_t* mask;  // [ceil(k/8)]
    const V* values;      // k + kReadAhead may be read; a kernel leaves it where it ended
    // What memory is asked for at the pace of the mask, and how far beyond the values.
    const uint8_t* ahead;  // [ceil(k/8)]
    int64_t values_ahead;  // bytes
};

// How far ahead of a row that is read together with its neighbours memory is asked for: for the row after these, as
// what comes next in memory is being read already; but no farther than L2 holds.
ENGINE_INLINE int64_t bytes_ahead(int64_t after) {
    constexpr int64_t kMost = 256 << 10, kNear = 8 << 10;
    return after <= kMost ? after : kNear;
}

// A checked bitmap of float values.
template <class V>
struct FloatBitmap {
    using Value = V;
    using Scratch = std::vector<V>;  // of column()
    const uint8_t* bitmask;          // [n, ceil(k/8)]
    const int64_t* row_offsets;      // [n + 1]
    const V* values;                 // [nnz]
    int64_t n, k, nnz;
    BadRow* bad;

    int64_t row_bytes() const { return mask_bytes(k) + nnz / n * static_cast<int64_t>(sizeof(V)); }
    const uint8_t* mask(int64_t row) const { return bitmask + row * mask_bytes(k); }
    FloatColumn<V> column(int64_t row, int64_t together, Scratch& scratch) const {
        const int64_t values_after = row_offsets[std::min(row + together, n)] - row_offsets[row];
        return {mask(row), row_values(values, row_offsets, row, k, nnz, scratch),
                mask(row) + bytes_ahead(together * mask_bytes(k)),
                bytes_ahead(values_after * static_cast<int64_t>(sizeof(V)))};
    }
    void check_row(int64_t row, int64_t taken) const {
        if (taken != row_offsets[row + 1] - row_offsets[row] || has_padding_bits(mask(row), k)) bad->record(row);
    }
};

}  // namespace engine
