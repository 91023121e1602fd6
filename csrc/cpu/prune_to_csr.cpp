// prune_to_csr: the weights above a threshold with their columns. One pass writes a bit a weight and counts (the mask
// is scratch, a 32nd of an fp32 weight), a second moves the kept weights and writes their columns by it. The second
// goes backwards, as the end of what the first has read is still in cache.

#include "common/bitmap_mask.h"
#include "common/bitmap_pack.h"
#include "common/dtype.h"
#include "common/huge_pages.h"

namespace engine {
namespace {

// Columns of the bits set in mask bytes [begin / 8, ...), to out[done] and on.
template <class I>
ENGINE_INLINE void columns_rest(const uint8_t* mask, int64_t begin, int64_t k, I* out, int64_t done) {
    for (int64_t i = begin; i < k; i += 64) {
        for (uint64_t bits = mask_bits(mask, i, k); bits != 0; bits &= bits - 1) {
            out[done++] = static_cast<I>(i + __builtin_ctzll(bits));
        }
    }
}

template <class I>
void columns_portable(const uint8_t* mask,  // [ceil(k/8)]
                      int64_t k,
                      I* out,  // [length]
                      int64_t /*length*/) {
    columns_rest(mask, 0, k, out, 0);
}

#if ENGINE_X86
// Whole vectors, each over the unused end of the one before, only while they fit into the row's own output.
ENGINE_AVX2 void columns_avx2(const uint8_t* mask, int64_t k, int32_t* out, int64_t length) {
    int64_t done = 0, i = 0;
    for (; i < k && done + 8 <= length; i += 8) {
        const uint32_t m = mask[i / 8];
        const __m256i offsets = _mm256_cvtepu8_epi32(pack_positions_avx2(m));
        const __m256i columns = _mm256_add_epi32(offsets, _mm256_set1_epi32(static_cast<int32_t>(i)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done), columns);
        done += popcount64(m);
    }
    columns_rest(mask, i, k, out, done);
}
#endif

template <class I>
using Columns = void (*)(const uint8_t*, int64_t, I*, int64_t);

template <class I>
Columns<I> columns_kernel() {
#if ENGINE_X86
    if constexpr (sizeof(I) == 4) {
        if (isa() != Isa::portable) return columns_avx2;  // 8 columns a step is what a mask byte gives: no wider form
    }
#endif
    return columns_portable<I>;
}

template <class T, class W, class I>
std::tuple<Tensor, Tensor, Tensor> prune(const Tensor& weight, const ThresholdRows& threshold, ScalarType index) {
    const int64_t rows = weight.size(0), k = weight.size(1);
    Tensor bitmask = new_output(weight, {rows, mask_bytes(k)}, ScalarType::Byte);
    uint8_t* masks = mutable_data<uint8_t>(bitmask);
    std::vector<int64_t> offsets(rows + 1);
    mask_rows<false>(data<T>(weight), threshold, rows, k, masks, offsets.data(), [](int64_t, RowSummary) {});

    Tensor crow = new_tensor(weight, {rows + 1}, index);
    Tensor columns = new_output(weight, {offsets[rows]}, index);
    Tensor values = new_output(weight, {offsets[rows]}, weight.scalar_type());
    std::copy(offsets.begin(), offsets.end(), mutable_data<I>(crow));
    const W* from = data<W>(weight);
    W* packed = mutable_data<W>(values);
    I* indices = mutable_data<I>(columns);
    const PackRow<W> pack = pack_row<W>();
    const Columns<I> write_columns = columns_kernel<I>();
    parallel_rows(rows, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        for (int64_t row = end; row-- > begin;) {
            const uint8_t* mask = masks + row * mask_bytes(k);
            const int64_t at = offsets[row], length = offsets[row + 1] - at;
            pack(mask, from + row * k, k, packed + at, length);
            write_columns(mask, k, indices + at, length);
        }
    });
    return {crow, columns, values};
}

std::tuple<Tensor, Tensor, Tensor> prune_to_csr(Tensor weight_in, Tensor threshold_in) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_to_csr: weight: expected shape [N, K]");
    const Tensor weight = as_contiguous(weight_in);
    const ThresholdRows threshold = threshold_rows("prune_to_csr", threshold_in, weight.size(0), weight.size(1));
    return dispatch_float(weight.scalar_type(), "prune_to_csr: weight", [&](auto zero) {
        using T = decltype(zero);
        using W = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
        if (weight.numel() < int64_t{1} << 31) return prune<T, W, int32_t>(weight, threshold, ScalarType::Int);
        return prune<T, W, int64_t>(weight, threshold, ScalarType::Long);
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("prune_to_csr", TORCH_BOX(&engine::prune_to_csr)); }
