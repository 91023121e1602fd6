// semi_structured_to_dense: the values of a 2:4 weight back at their places, zeros elsewhere, and semi_structured_gather,
// its gradient, the reverse. Places become a bitmask, and the rest is a bitmap's.

#include <array>

#include "common/bitmap_expand.h"
#include "common/bitmap_pack.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/round.h"
#include "common/semi_structured.h"

namespace engine {
namespace {

// For half a byte of metadata, which of a group's weights are stored; 0 where its places don't ascend.
alignas(16) constexpr auto kStored = [] {
    std::array<uint8_t, 16> table{};
    for (uint32_t m = 0; m < 16; ++m)
        table[m] = (m & 3) < (m >> 2) ? static_cast<uint8_t>(1 << (m & 3) | 1 << (m >> 2)) : 0;
    return table;
}();

// The bitmask of a row's groups. Returns whether all places ascend.
inline bool stored_rest(const uint8_t* metadata, int64_t begin, int64_t bytes, uint8_t* mask) {
    bool ascend = true;
    for (int64_t i = begin; i < bytes; ++i) {
        const uint8_t low = kStored[metadata[i] & 15], high = kStored[metadata[i] >> 4];
        mask[i] = static_cast<uint8_t>(low | high << 4);
        ascend &= (low != 0) & (high != 0);
    }
    return ascend;
}
inline bool stored_portable(const uint8_t* metadata, int64_t bytes, uint8_t* mask) {
    return stored_rest(metadata, 0, bytes, mask);
}
#if ENGINE_X86
ENGINE_AVX2 inline bool stored_avx2(const uint8_t* metadata, int64_t bytes, uint8_t* mask) {
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kStored.data())), half = _mm_set1_epi8(15);
    __m128i least = half;
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) {
        const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata + i));
        const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(m, half));
        const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(m, 4), half));
        least = _mm_min_epu8(least, _mm_min_epu8(low, high));
        const __m128i both = _mm_or_si128(low, _mm_slli_epi16(high, 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(mask + i), both);
    }
    const bool ascend = _mm_movemask_epi8(_mm_cmpeq_epi8(least, _mm_setzero_si128())) == 0;
    return stored_rest(metadata, i, bytes, mask) & ascend;
}
#endif

inline auto stored_mask() {
#if ENGINE_X86
    if (isa() != Isa::portable) return stored_avx2;
#endif
    return stored_portable;
}

// Whether what lies beyond k is as it must be.
template <class W>
bool ends_well(const W* values, const uint8_t* metadata, int64_t k) {
    const int64_t groups = groups_of_four(k);
    bool good = groups % 2 == 0 || metadata[groups / 2] >> 4 == 0b0100;
    for (int i = 0; i < 2 && k % 4; ++i) {
        const int64_t value = 2 * groups - 2 + i, place = metadata[value / 4] >> (2 * (value % 4)) & 3;
        // A negative zero, too, is a zero.
        const auto magnitude = static_cast<W>(values[value] << (sizeof(W) > 1 ? 1 : 0));
        good &= place < k % 4 || magnitude == 0;
    }
    return good;
}

template <class W>
void spread_portable(const W* values, const uint8_t* metadata, int64_t k, W* out) {
    const int64_t whole = round_down(k, 8);
    const auto as_is = [](W value) { return value; };
    spread_any(values, metadata, whole, out, as_is);
    W last[8] = {};
    spread_any(values + whole / 2, metadata + whole / 8, k - whole, last, as_is);
    std::copy_n(last, k - whole, out + whole);
}

template <class W>
void spread(const Tensor& values, const Tensor& metadata, int64_t k, Tensor& dense) {
    const SemiStructured<W> weight{data<W>(values), data<uint8_t>(metadata), values.size(0), k};
    W* out = mutable_data<W>(dense);
    const ExpandRow<W> expand = expand_row<W>();
    auto* const stored = stored_mask();
    std::atomic<int64_t> bad{-1};
    parallel_rows(weight.n, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> mask(weight.row_bytes());
        std::vector<W> scratch;
        for (int64_t row = begin; row < end; ++row) {
            const W* from = weight.values_at(row, 0);
            const uint8_t* places = weight.metadata_at(row, 0);
            if (!stored(places, weight.row_bytes(), mask.data()) || !ends_well(from, places, k)) {
                bad.store(row, std::memory_order_relaxed);
                continue;
            }
            if (isa() == Isa::portable) {  // where both places of a group are found at once
                spread_portable(from, places, k, out + row * k);
                continue;
            }
            if ((weight.n - row) * weight.row_values() < k + kReadAhead) {
                scratch.resize(k + kReadAhead);
                std::copy_n(from, weight.row_values(), scratch.data());
                from = scratch.data();
            }
            expand(mask.data(), from, k, out + row * k);
        }
    });
    STD_TORCH_CHECK(bad.load() < 0, "semi_structured_to_dense: row ", bad.load(), ": places don't ascend");
}

Tensor semi_structured_to_dense(Tensor values_in, Tensor metadata_in, int64_t columns) {
    check_semi_structured("semi_structured_to_dense", values_in, metadata_in, columns);
    const Tensor values = as_contiguous(values_in), metadata = as_contiguous(metadata_in);
    Tensor dense = new_output(values, {values.size(0), columns}, values.scalar_type());
    switch (values.scalar_type()) {
        case ScalarType::Char:
            spread<uint8_t>(values, metadata, columns, dense);
            break;
        case ScalarType::Half:
        case ScalarType::BFloat16:
            spread<uint16_t>(values, metadata, columns, dense);
            break;
        case ScalarType::Float:
            spread<uint32_t>(values, metadata, columns, dense);
            break;
        default:
            STD_TORCH_CHECK(false, "semi_structured_to_dense: values: expected float32, float16, bfloat16 or int8");
    }
    return dense;
}

// The weights of `dense` that stand at the places.
template <class W>
void gather(const Tensor& dense, const Tensor& metadata, Tensor& values) {
    const int64_t k = dense.size(1), groups = groups_of_four(k);
    const SemiStructured<W> weight{data<W>(values), data<uint8_t>(metadata), dense.size(0), k};
    const W* from = data<W>(dense);
    W* const to = mutable_data<W>(values);
    const PackRow<W> pack = pack_row<W>();
    auto* const stored = stored_mask();
    parallel_rows(weight.n, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> mask(weight.row_bytes());
        for (int64_t row = begin; row < end; ++row) {
            const uint8_t* places = weight.metadata_at(row, 0);
            const W* in = from + row * k;
            W* const out = to + row * weight.row_values();
            if (stored(places, weight.row_bytes(), mask.data())) {
                const int64_t length = count_bits(mask.data(), k);
                pack(mask.data(), in, k, out, length);
                std::fill(out + length, out + 2 * groups, W{});
                continue;
            }
            for (int64_t i = 0; i < 2 * groups; ++i) {  // places that don't ascend
                const int64_t column = i / 2 * 4 + (places[i / 4] >> (2 * (i % 4)) & 3);
                out[i] = column < k ? in[column] : W{};
            }
        }
    });
}

Tensor semi_structured_gather(Tensor dense_in, Tensor metadata_in) {
    STD_TORCH_CHECK(dense_in.dim() == 2, "semi_structured_gather: dense: expected shape [N, K]");
    const Tensor dense = as_contiguous(dense_in), metadata = as_contiguous(metadata_in);
    dispatch_float(dense.scalar_type(), "semi_structured_gather: dense", [](auto) {});
    Tensor values = new_output(dense, {dense.size(0), 2 * groups_of_four(dense.size(1))}, dense.scalar_type());
    check_semi_structured("semi_structured_gather", values, metadata, dense.size(1));
    if (dense.scalar_type() == ScalarType::Float) {
        gather<uint32_t>(dense, metadata, values);
    } else {
        gather<uint16_t>(dense, metadata, values);
    }
    return values;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("semi_structured_to_dense", TORCH_BOX(&engine::semi_structured_to_dense));
    m.impl("semi_structured_gather", TORCH_BOX(&engine::semi_structured_gather));
}
