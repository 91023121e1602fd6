// A dense row's bitmask by the keep rule: the counting half of what makes a bitmap.
//
// A weight is kept where NOT |w| <= threshold, in fp32, so that a NaN is kept and a NaN threshold keeps everything.
#pragma once

#include "common/bitmap.h"
#include "common/dtype.h"
#include "common/floats.h"
#include "common/tensor.h"

namespace engine {

struct RowSummary {
    int64_t kept;        // weights
    uint32_t amax_bits;  // of the largest kept |w| in fp32, as in quantize.h; 0 where not asked for
};

// What writes the mask of a whole row and sums it up.
template <class T>
using MaskRow = RowSummary (*)(const T* row,            // [k]
                               const float* threshold,  // [k] where `step` is 1, [1] where it is 0
                               int64_t step, int64_t k,
                               uint8_t* mask);  // [ceil(k/8)]

// Bytes [begin / 8, ...) of the mask, `begin` a multiple of 8.
template <bool kAmax, class T>
ENGINE_INLINE void mask_rest(const T* row, const float* threshold, int64_t step, int64_t begin, int64_t k,
                             uint8_t* mask, RowSummary& sum) {
    for (int64_t i = begin; i < k; i += 8) {
        uint32_t bits = 0;
        for (int64_t j = i; j < i + 8 && j < k; ++j) {
            const uint32_t magnitude = std::bit_cast<uint32_t>(to_float(row[j])) & 0x7fffffffu;
            const bool kept = !(std::bit_cast<float>(magnitude) <= threshold[j * step]);
            bits |= static_cast<uint32_t>(kept) << (j - i);
            if constexpr (kAmax) sum.amax_bits = std::max(sum.amax_bits, kept ? magnitude : 0u);
        }
        mask[i / 8] = static_cast<uint8_t>(bits);
        sum.kept += popcount64(bits);
    }
}

template <bool kAmax, class T>
RowSummary mask_row_portable(const T* row, const float* threshold, int64_t step, int64_t k, uint8_t* mask) {
    RowSummary sum{0, 0};
    mask_rest<kAmax>(row, threshold, step, 0, k, mask, sum);
    return sum;
}

#if ENGINE_X86
// Mask byte of row[0..8); the magnitudes of the kept are taken into `amax`.
template <bool kAmax, class T>
ENGINE_AVX2 ENGINE_INLINE uint64_t mask_8_avx2(const T* row, __m256 threshold, __m256i& amax) {
    const __m256 w = _mm256_and_ps(load_8_avx2(row), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
    const __m256 kept = _mm256_cmp_ps(w, threshold, _CMP_NLE_UQ);
    if constexpr (kAmax) amax = _mm256_max_epi32(amax, _mm256_castps_si256(_mm256_and_ps(w, kept)));
    return static_cast<uint32_t>(_mm256_movemask_ps(kept));
}

template <bool kAmax, class T>
ENGINE_AVX2 RowSummary mask_row_avx2(const T* row, const float* threshold, int64_t step, int64_t k, uint8_t* mask) {
    RowSummary sum{0, 0};
    const __m256 one = k > 0 ? _mm256_set1_ps(threshold[0]) : _mm256_setzero_ps();
    __m256i amax = _mm256_setzero_si256();
    int64_t i = 0;
    if (step == 0) {
        for (; i + 64 <= k; i += 64) {
            uint64_t bits = 0;
#pragma GCC unroll 8
            for (int j = 0; j < 64; j += 8) bits |= mask_8_avx2<kAmax>(row + i + j, one, amax) << j;
            std::memcpy(mask + i / 8, &bits, 8);
            sum.kept += popcount64(bits);
        }
    }
    for (; i + 8 <= k; i += 8) {
        const uint64_t bits = mask_8_avx2<kAmax>(row + i, step == 0 ? one : _mm256_loadu_ps(threshold + i), amax);
        mask[i / 8] = static_cast<uint8_t>(bits);
        sum.kept += popcount64(bits);
    }
    if constexpr (kAmax) {
        alignas(32) std::array<uint32_t, 8> lanes;
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.data()), amax);
        sum.amax_bits = *std::max_element(lanes.begin(), lanes.end());
    }
    mask_rest<kAmax>(row, threshold, step, i, k, mask, sum);
    return sum;
}

template <bool kAmax, class T>
ENGINE_AVX512 RowSummary mask_row_avx512(const T* row, const float* threshold, int64_t step, int64_t k, uint8_t* mask) {
    RowSummary sum{0, 0};
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512 limit = k > 0 ? _mm512_set1_ps(threshold[0]) : _mm512_setzero_ps();
    __m512i amax = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        if (step != 0) limit = _mm512_loadu_ps(threshold + i);
        const __m512i w = _mm512_and_si512(_mm512_castps_si512(load_16_avx512(row + i)), magnitude);
        const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_castsi512_ps(w), limit, _CMP_NLE_UQ);
        if constexpr (kAmax) amax = _mm512_mask_max_epi32(amax, kept, amax, w);
        const uint16_t bits = kept;
        std::memcpy(mask + i / 8, &bits, 2);
        sum.kept += popcount64(bits);
    }
    if constexpr (kAmax) sum.amax_bits = static_cast<uint32_t>(_mm512_reduce_max_epi32(amax));
    mask_rest<kAmax>(row, threshold, step, i, k, mask, sum);
    return sum;
}
#endif

template <bool kAmax, class T>
MaskRow<T> mask_row() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return mask_row_avx2<kAmax, T>;
    if (isa() == Isa::avx512) return mask_row_avx512<kAmax, T>;
#endif
    return mask_row_portable<kAmax, T>;
}

// The threshold of each row: a view [N, K] of a tensor that broadcasts against the weight.
struct ThresholdRows {
    Tensor tensor;  // keeps the memory
    const float* data;
    int64_t row_step;     // from one row's to the next
    int64_t column_step;  // 0: one for the whole row; 1: one for each column
};

inline ThresholdRows threshold_rows(const char* op, const Tensor& threshold, int64_t rows, int64_t k) {
    const int64_t dim = threshold.dim();
    const int64_t columns = dim >= 1 ? threshold.size(dim - 1) : 1, lines = dim >= 2 ? threshold.size(0) : 1;
    STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float, op, ": threshold: expected float32");
    STD_TORCH_CHECK(dim <= 2 && (columns == 1 || columns == k) && (lines == 1 || lines == rows), op,
                    ": threshold: expected a shape that broadcasts against the weight");
    const Tensor t = as_contiguous(threshold);
    return {t, engine::data<float>(t), lines == 1 ? 0 : columns, columns == 1 ? 0 : 1};
}

// Counts and masks all rows: fills row_offsets and calls with_row(row, summary) in the thread that did the row.
template <bool kAmax, class T, class F>
void mask_rows(const T* weight,  // [rows, k]
               const ThresholdRows& threshold, int64_t rows, int64_t k,
               uint8_t* bitmask,      // [rows, ceil(k/8)]
               int64_t* row_offsets,  // [rows + 1]
               const F& with_row) {
    const MaskRow<T> kernel = mask_row<kAmax, T>();
    parallel_rows(rows, k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const RowSummary sum = kernel(weight + row * k, threshold.data + row * threshold.row_step,
                                          threshold.column_step, k, bitmask + row * mask_bytes(k));
            row_offsets[row + 1] = sum.kept;
            with_row(row, sum);
        }
    });
    row_offsets[0] = 0;
    for (int64_t row = 0; row < rows; ++row) row_offsets[row + 1] += row_offsets[row];
}

}  // namespace engine
