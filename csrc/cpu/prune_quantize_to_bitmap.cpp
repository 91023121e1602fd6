// prune_quantize_to_bitmap: the weights above a threshold as int8 with one scale a row, packed by a bitmask. One pass
// writes the mask, counts, and finds the row's amax; a second quantises and packs. The second goes backwards, as the
// end of what the first has read is still in cache.

#include "common/bitmap_mask.h"
#include "common/bitmap_pack.h"
#include "common/dtype.h"
#include "common/floats.h"
#include "common/huge_pages.h"
#include "common/quantize.h"
#include "common/registers_avx512.h"

namespace engine {
namespace {

// What quantises and packs a whole row whose `inverse` (see quantize.h) is not 0. It writes no byte beyond out[length].
template <class T>
using QuantizeRow = void (*)(const uint8_t* mask,  // [ceil(k/8)]
                             const T* row,         // [k]
                             int64_t k, float inverse,
                             int8_t* out,      // [length]
                             int64_t length);  // the number of bits set in mask

// Elements [begin, k), begin a multiple of 8, to out[done] and on.
template <class T>
ENGINE_INLINE void quantize_rest(const uint8_t* mask, const T* row, int64_t begin, int64_t k, float inverse,
                                 int8_t* out, int64_t done) {
    for (int64_t i = begin; i < k; i += 64) {
        for (uint64_t bits = mask_bits(mask, i, k); bits != 0; bits &= bits - 1) {
            out[done++] = quantize_one(to_float(row[i + __builtin_ctzll(bits)]), inverse);
        }
    }
}

template <class T>
void quantize_row_portable(const uint8_t* mask, const T* row, int64_t k, float inverse, int8_t* out,
                           int64_t /*length*/) {
    quantize_rest(mask, row, 0, k, inverse, out, 0);
}

#if ENGINE_X86
// The kept ones of row[0..8) by mask byte `m`, quantised, to out, of which 8 are written. The instruction that converts
// rounds half to even, as quantize_one does.
template <class T>
ENGINE_AVX2 ENGINE_INLINE void quantize_8_avx2(const T* row, uint32_t m, __m256 inverse, int8_t* out) {
    const __m256 low = _mm256_set1_ps(-127.0f), high = _mm256_set1_ps(127.0f);
    const __m256 v = _mm256_mul_ps(load_8_avx2(row), inverse);
    const __m256i wide = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high));
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    const __m128i packed = _mm_shuffle_epi8(_mm_packs_epi16(pairs, pairs), pack_positions_avx2(m));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), packed);
}

template <class T>
ENGINE_AVX2 void quantize_row_avx2(const uint8_t* mask, const T* row, int64_t k, float inverse, int8_t* out,
                                   int64_t length) {
    const __m256 factor = _mm256_set1_ps(inverse);
    int64_t done = 0, i = 0;
    for (; i + 64 <= k && done + 64 <= length; i += 64) {
        const uint64_t bits = mask_bits(mask, i, k);
#pragma GCC unroll 8
        for (int j = 0; j < 64; j += 8) {
            const uint32_t m = bits >> j & 0xff;
            quantize_8_avx2(row + i + j, m, factor, out + done);
            done += popcount64(m);
        }
    }
    for (; i + 8 <= k && done + 8 <= length; i += 8) {
        quantize_8_avx2(row + i, mask[i / 8], factor, out + done);
        done += popcount64(mask[i / 8]);
    }
    quantize_rest(mask, row, i, k, inverse, out, done);
}

template <class T>
ENGINE_AVX512 ENGINE_INLINE __m128i quantize_16_avx512(const T* row, __m512 scale) {
    const __m512 v = _mm512_mul_ps(load_16_avx512(row), scale);
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-127.0f)), _mm512_set1_ps(127.0f));
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(clamped));
}

// Compressed in a register and stored whole, since a compressing store is slow.
template <class T>
ENGINE_AVX512 void quantize_row_avx512(const uint8_t* mask, const T* row, int64_t k, float inverse, int8_t* out,
                                       int64_t length) {
    const __m512 scale = _mm512_set1_ps(inverse);
    int64_t done = 0, i = 0;
    for (; i + 64 <= k; i += 64) {
        __m512i q = _mm512_castsi128_si512(quantize_16_avx512(row + i, scale));
        q = _mm512_inserti32x4(q, quantize_16_avx512(row + i + 16, scale), 1);
        q = _mm512_inserti32x4(q, quantize_16_avx512(row + i + 32, scale), 2);
        q = _mm512_inserti32x4(q, quantize_16_avx512(row + i + 48, scale), 3);
        const uint64_t bits = mask_bits(mask, i, k);
        const int count = popcount64(bits);
        const uint64_t fits = done + 64 <= length ? ~uint64_t{0} : _bzhi_u64(~uint64_t{0}, count);
        _mm512_mask_storeu_epi8(out + done, fits, compress_lanes_avx512<int8_t>(bits, q));
        done += count;
    }
    quantize_rest(mask, row, i, k, inverse, out, done);
}
#endif

template <class T>
QuantizeRow<T> quantize_row_kernel() {
#if ENGINE_X86
    if (isa() == Isa::avx2) return quantize_row_avx2<T>;
    if (isa() == Isa::avx512) return quantize_row_avx512<T>;
#endif
    return quantize_row_portable<T>;
}

template <class T>
Tensor prune(const Tensor& weight, const ThresholdRows& threshold, Tensor& bitmask, Tensor& row_offsets,
             Tensor& scale) {
    const int64_t rows = weight.size(0), k = weight.size(1);
    const T* from = data<T>(weight);
    uint8_t* masks = mutable_data<uint8_t>(bitmask);
    int64_t* offsets = mutable_data<int64_t>(row_offsets);
    float* scales = mutable_data<float>(scale);
    std::vector<float> inverses(rows);
    mask_rows<true>(from, threshold, rows, k, masks, offsets, [&](int64_t row, RowSummary sum) {
        const RowScale s = row_scale(sum.amax_bits);
        scales[row] = s.scale;
        inverses[row] = s.inverse;
    });

    Tensor values = new_output(weight, {offsets[rows]}, ScalarType::Char);
    int8_t* packed = mutable_data<int8_t>(values);
    const QuantizeRow<T> kernel = quantize_row_kernel<T>();
    parallel_rows(rows, k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
        for (int64_t row = end; row-- > begin;) {
            int8_t* out = packed + offsets[row];
            const int64_t length = offsets[row + 1] - offsets[row];
            if (inverses[row] == 0.0f) {
                std::fill_n(out, length, int8_t{0});
            } else {
                kernel(masks + row * mask_bytes(k), from + row * k, k, inverses[row], out, length);
            }
        }
    });
    return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_quantize_to_bitmap(Tensor weight_in, Tensor threshold_in) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_quantize_to_bitmap: weight: expected shape [N, K]");
    const Tensor weight = as_contiguous(weight_in);
    const int64_t rows = weight.size(0), k = weight.size(1);
    const ThresholdRows threshold = threshold_rows("prune_quantize_to_bitmap", threshold_in, rows, k);
    Tensor bitmask = new_output(weight, {rows, mask_bytes(k)}, ScalarType::Byte);
    Tensor row_offsets = new_tensor(weight, {rows + 1}, ScalarType::Long);
    Tensor scale = new_tensor(weight, {rows}, ScalarType::Float);
    Tensor values = dispatch_float(weight.scalar_type(), "prune_quantize_to_bitmap: weight", [&](auto zero) {
        return prune<decltype(zero)>(weight, threshold, bitmask, row_offsets, scale);
    });
    return {bitmask, row_offsets, values, scale};
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("prune_quantize_to_bitmap", TORCH_BOX(&engine::prune_quantize_to_bitmap));
}
