// int8_embedding: rows of an int8 table times their scales. Which row comes is known ahead, where it lies the processor
// cannot guess: rows to come are prefetched.

#include <atomic>

#include "common/compiled.h"
#include "common/dequantize.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/tensor.h"

namespace engine {
namespace {

template <class I>
struct Table {
    const I* indices;      // [n]
    const int8_t* weight;  // [rows, dim]
    const float* scale;    // [rows]
    int64_t n, rows, dim;
};

constexpr int64_t kAhead = 8;  // rows: enough work to cover a read from memory

// Which row of the table output i is, having asked memory for one to come; -1 where the index is out of range.
template <class I>
ENGINE_INLINE int64_t row_of(const Table<I>& t, int64_t i, int64_t end) {
    if (i + kAhead < end) {
        const int64_t coming = t.indices[i + kAhead];
        if (coming >= 0 && coming < t.rows)
            for (int64_t at = 0; at < t.dim; at += 64) __builtin_prefetch(t.weight + coming * t.dim + at);
    }
    const int64_t row = t.indices[i];
    return row >= 0 && row < t.rows ? row : -1;
}

// Output rows begin to end; false where an index is out of range, whose row is then left as it is.
template <class I, class T>
ENGINE_INLINE bool look_up(const Table<I>& t,
                           T* y,  // [n, dim]
                           int64_t begin, int64_t end) {
    bool in_range = true;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = row_of(t, i, end);
        in_range &= row >= 0;
        if (row >= 0) dequantize_row(t.weight + row * t.dim, t.dim, t.scale[row], y + i * t.dim);
    }
    return in_range;
}
template <class I, class T>
ENGINE_AVX2 ENGINE_INLINE bool look_up_x86(const Table<I>& t, T* y, int64_t begin, int64_t end) {
    bool in_range = true;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = row_of(t, i, end);
        in_range &= row >= 0;
        if (row >= 0) dequantize_row_x86(t.weight + row * t.dim, t.dim, t.scale[row], y + i * t.dim);
    }
    return in_range;
}

template <class I>
void fill(const Table<I>& table, ScalarType dtype, Tensor& y) {
    std::atomic<bool> in_range{true};
    dispatch_float(dtype, "int8_embedding: dtype", [&](auto zero) {
        using T = decltype(zero);
        T* to = mutable_data<T>(y);
        auto* const kernel = compiled<look_up<I, T>, look_up_x86<I, T>>();
        parallel_rows(table.n, table.dim * (sizeof(T) + 1) + sizeof(I), [&](int64_t begin, int64_t end) {
            if (!kernel(table, to, begin, end)) in_range = false;
        });
    });
    STD_TORCH_CHECK(in_range, "int8_embedding: indices: an index is out of range");
}

Tensor int8_embedding(Tensor indices_in, Tensor weight_in, Tensor scale_in, ScalarType dtype) {
    const bool wide = indices_in.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || indices_in.scalar_type() == ScalarType::Int,
                    "int8_embedding: indices: expected int32 or int64");
    STD_TORCH_CHECK(weight_in.scalar_type() == ScalarType::Char, "int8_embedding: weight: expected int8");
    STD_TORCH_CHECK(scale_in.scalar_type() == ScalarType::Float, "int8_embedding: scale: expected float32");
    STD_TORCH_CHECK(weight_in.dim() == 2, "int8_embedding: weight: expected [rows, dim]");
    STD_TORCH_CHECK(scale_in.dim() == 1 && scale_in.size(0) == weight_in.size(0),
                    "int8_embedding: scale: expected [rows]");

    const Tensor indices = as_contiguous(indices_in), weight = as_contiguous(weight_in),
                 scale = as_contiguous(scale_in);
    std::vector<int64_t> sizes = sizes_of(indices);
    sizes.push_back(weight.size(1));
    Tensor y = new_output(weight, sizes, dtype);
    const auto look_up_all = [&](auto index) {
        using I = decltype(index);
        const Table<I> table = {data<I>(indices), data<int8_t>(weight), data<float>(scale),
                                indices.numel(),  weight.size(0),       weight.size(1)};
        fill(table, dtype, y);
    };
    wide ? look_up_all(int64_t{}) : look_up_all(int32_t{});
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_embedding", TORCH_BOX(&engine::int8_embedding)); }
