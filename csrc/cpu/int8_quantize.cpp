// int8_quantize: each row of x to int8 with a scale of its own. One pass for the maximum, one to round; a row is small
// enough that the second finds it in cache, so that memory sees one read of x and one write of q.

#include "common/compiled.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/quantize.h"
#include "common/tensor.h"

namespace engine {
namespace {

// The body for every instruction set: it vectorises by itself where it is inlined.
template <class T>
ENGINE_INLINE void quantize_rows(const T* x,    // [rows, k]
                                 int8_t* q,     // [rows, k]
                                 float* scale,  // [rows]
                                 int64_t begin, int64_t end, int64_t k) {
    for (int64_t row = begin; row < end; ++row) {
        const RowScale s = row_scale(amax_bits(x + row * k, k));
        quantize_row(x + row * k, k, s, q + row * k);
        scale[row] = s.scale;
    }
}

std::tuple<Tensor, Tensor> int8_quantize(Tensor x_in) {
    STD_TORCH_CHECK(x_in.dim() >= 1, "int8_quantize: x: expected at least one dimension");
    const Tensor x = as_contiguous(x_in);
    std::vector<int64_t> sizes = sizes_of(x);
    const int64_t k = sizes.back();
    Tensor q = new_output(x, sizes, ScalarType::Char);
    sizes.pop_back();
    Tensor scale = new_tensor(x, sizes, ScalarType::Float);
    const int64_t rows = scale.numel();

    dispatch_float(x.scalar_type(), "int8_quantize: x", [&](auto zero) {
        using T = decltype(zero);
        const T* from = data<T>(x);
        int8_t* to = mutable_data<int8_t>(q);
        float* scales = mutable_data<float>(scale);
        auto* const kernel = compiled<quantize_rows<T>>();
        parallel_rows(rows, k * (sizeof(T) + 1),
                      [&](int64_t begin, int64_t end) { kernel(from, to, scales, begin, end, k); });
    });
    return {q, scale};
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_quantize", TORCH_BOX(&engine::int8_quantize)); }
