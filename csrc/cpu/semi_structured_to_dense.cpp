// semi_structured_to_dense: the values of a 2:4 weight back at their places, zeros elsewhere.

#include "common/huge_pages.h"
#include "common/round.h"
#include "common/semi_structured.h"

namespace engine {
namespace {

// Whether the places of a row ascend within each group, and what lies beyond k is as it must be.
template <class W>
bool is_consistent(const W* values, const uint8_t* metadata, int64_t k) {
    const int64_t groups = groups_of_four(k);
    bool ascend = true;
    for (int64_t i = 0; i < (groups + 1) / 2; ++i) {
        const uint32_t m = metadata[i];
        ascend &= ((m & 3) < (m >> 2 & 3)) & ((m >> 4 & 3) < (m >> 6));
    }
    if (groups % 2) ascend &= metadata[groups / 2] >> 4 == 0b0100;
    for (int i = 0; i < 2 && k % 4; ++i) {
        const int64_t value = 2 * groups - 2 + i, place = metadata[value / 4] >> (2 * (value % 4)) & 3;
        // A negative zero, too, is a zero.
        const auto magnitude = static_cast<W>(values[value] << (sizeof(W) > 1 ? 1 : 0));
        ascend &= place < k % 4 || magnitude == 0;
    }
    return ascend;
}

template <class W>
void spread(const Tensor& values, const Tensor& metadata, int64_t k, Tensor& dense) {
    const SemiStructured<W> weight{data<W>(values), data<uint8_t>(metadata), values.size(0), k};
    W* out = mutable_data<W>(dense);
    std::atomic<int64_t> bad{-1};
    parallel_rows(weight.n, k * static_cast<int64_t>(sizeof(W)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const W* from = weight.values_at(row, 0);
            const uint8_t* places = weight.metadata_at(row, 0);
            const int64_t whole = round_down(k, 8);
            if (!is_consistent(from, places, k)) bad.store(row, std::memory_order_relaxed);
            W* to = out + row * k;
            spread_any(from, places, whole, to, [](W value) { return value; });
            W last[8] = {};
            spread_any(weight.values_at(row, whole), weight.metadata_at(row, whole), k - whole, last,
                       [](W value) { return value; });
            std::copy_n(last, k - whole, to + whole);
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

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("semi_structured_to_dense", TORCH_BOX(&engine::semi_structured_to_dense));
}
