// int8_dequantize: q * scale by row. Memory decides: one byte read for two or four written.

#include "common/compiled.h"
#include "common/dequantize.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/tensor.h"

namespace engine {
namespace {

template <class T>
ENGINE_INLINE void dequantize_rows(const int8_t* q,     // [rows, k]
                                   const float* scale,  // [rows]
                                   T* x,                // [rows, k]
                                   int64_t begin, int64_t end, int64_t k) {
    for (int64_t row = begin; row < end; ++row) dequantize_row(q + row * k, k, scale[row], x + row * k);
}
template <class T>
ENGINE_AVX2 ENGINE_INLINE void dequantize_rows_x86(const int8_t* q, const float* scale, T* x, int64_t begin,
                                                   int64_t end, int64_t k) {
    for (int64_t row = begin; row < end; ++row) dequantize_row_x86(q + row * k, k, scale[row], x + row * k);
}

Tensor int8_dequantize(Tensor q_in, Tensor scale_in, ScalarType dtype) {
    STD_TORCH_CHECK(q_in.scalar_type() == ScalarType::Char, "int8_dequantize: q: expected int8");
    STD_TORCH_CHECK(scale_in.scalar_type() == ScalarType::Float, "int8_dequantize: scale: expected float32");
    STD_TORCH_CHECK(q_in.dim() >= 1, "int8_dequantize: q: expected at least one dimension");
    std::vector<int64_t> rows_shape = sizes_of(q_in);
    const int64_t k = rows_shape.back();
    rows_shape.pop_back();
    STD_TORCH_CHECK(sizes_of(scale_in) == rows_shape, "int8_dequantize: scale: expected one for each row of q");

    const Tensor q = as_contiguous(q_in), scale = as_contiguous(scale_in);
    Tensor x = new_output(q, sizes_of(q), dtype);
    dispatch_float(dtype, "int8_dequantize: dtype", [&](auto zero) {
        using T = decltype(zero);
        const int8_t* from = data<int8_t>(q);
        const float* scales = data<float>(scale);
        T* to = mutable_data<T>(x);
        auto* const kernel = compiled<dequantize_rows<T>, dequantize_rows_x86<T>>();
        parallel_rows(scale.numel(), k * (sizeof(T) + 1),
                      [&](int64_t begin, int64_t end) { kernel(from, scales, to, begin, end, k); });
    });
    return x;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_dequantize", TORCH_BOX(&engine::int8_dequantize)); }
