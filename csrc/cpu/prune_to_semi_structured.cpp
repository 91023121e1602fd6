// prune_to_semi_structured: of every four weights of a row the two largest magnitudes, packed with their places.

#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/semi_structured.h"

namespace engine {
namespace {

constexpr uint32_t kNanRank = 0x7f800001;  // above infinity, the same for every NaN

// Magnitudes as integers of the same order.
template <class T>
ENGINE_INLINE uint32_t rank_of(T weight) {
    return std::min(std::bit_cast<uint32_t>(to_float(weight)) & 0x7fffffff, kNanRank);
}

// The places of the two largest of four, the first in the low two bits. Of equals the lower place wins: `ahead` counts
// how many come before each, without a branch, as half of them would be mispredicted.
ENGINE_INLINE uint32_t two_largest(const uint32_t (&rank)[4]) {
    uint32_t ahead[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) {
        for (int j = i + 1; j < 4; ++j) {
            const uint32_t later = rank[j] > rank[i];
            ahead[i] += later;
            ahead[j] += 1 - later;
        }
    }
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(ahead[i] < 2) << i;
    // Masks with two of four bits, 3 to 12, each with its places.
    constexpr uint8_t kPlaces[16] = {0, 0, 0, 0b0100, 0, 0b1000, 0b1001, 0, 0, 0b1100, 0b1101, 0, 0b1110};
    return kPlaces[mask];
}

template <class T>
void prune_row(const T* row,  // [k]
               int64_t k,
               T* values,            // [2 groups]
               uint8_t* metadata) {  // [ceil(groups/2)]
    const int64_t groups = groups_of_four(k);
    for (int64_t group = 0; group < groups; ++group) {
        T four[4] = {};
        std::copy_n(row + 4 * group, std::min<int64_t>(4, k - 4 * group), four);
        const uint32_t rank[4] = {rank_of(four[0]), rank_of(four[1]), rank_of(four[2]), rank_of(four[3])};
        const uint32_t places = two_largest(rank);
        values[2 * group] = four[places & 3];
        values[2 * group + 1] = four[places >> 2];
        if (group % 2) {
            metadata[group / 2] |= static_cast<uint8_t>(places << 4);
        } else {
            metadata[group / 2] = static_cast<uint8_t>(places);
        }
    }
    if (groups % 2) metadata[groups / 2] |= 0b0100 << 4;
}

std::tuple<Tensor, Tensor> prune_to_semi_structured(Tensor weight_in) {
    STD_TORCH_CHECK(weight_in.dim() == 2, "prune_to_semi_structured: weight: expected shape [N, K]");
    const Tensor weight = as_contiguous(weight_in);
    const int64_t n = weight.size(0), k = weight.size(1), groups = groups_of_four(k), bytes = (groups + 1) / 2;
    return dispatch_float(weight.scalar_type(), "prune_to_semi_structured: weight", [&](auto zero) {
        using T = decltype(zero);
        Tensor values = new_output(weight, {n, 2 * groups}, weight.scalar_type());
        Tensor metadata = new_output(weight, {n, bytes}, ScalarType::Byte);
        const T* from = data<T>(weight);
        T* to = mutable_data<T>(values);
        uint8_t* places = mutable_data<uint8_t>(metadata);
        parallel_rows(n, 4 * k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                prune_row(from + row * k, k, to + row * 2 * groups, places + row * bytes);
            }
        });
        return std::tuple(values, metadata);
    });
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("prune_to_semi_structured", TORCH_BOX(&engine::prune_to_semi_structured));
}
