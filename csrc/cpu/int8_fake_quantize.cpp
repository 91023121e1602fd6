// int8_fake_quantize: each row rounded to int8 and back in one go. The second pass over a row finds it in cache, so
// that memory sees one read of x and one write of y.

#include "common/compiled.h"
#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/quantize.h"
#include "common/tensor.h"

namespace engine {
namespace {

template <class T>
ENGINE_INLINE void round_row(const T* x,  // [k]
                             T* y,        // [k]
                             int64_t k, RowScale s) {
    if (!s.finite) {
        std::fill(y, y + k, from_float<T>(s.scale));  // NaN
        return;
    }
    for (int64_t i = 0; i < k; ++i) {
        // inverse is 0 for a row of zeros: whatever tiny number stands there, q is 0.
        y[i] = from_float<T>(static_cast<float>(quantize_to_int(to_float(x[i]), s.inverse)) * s.scale);
    }
}

// The body for every instruction set: it vectorises by itself where it is inlined.
template <class T>
ENGINE_INLINE void round_rows(const T* x,             // [rows, k]
                              T* y,                   // [rows, k]
                              const RowScale* fixed,  // the one scale for all rows, or null: each by its own amax
                              int64_t begin, int64_t end, int64_t k) {
    for (int64_t row = begin; row < end; ++row) {
        const uint32_t amax = amax_bits(x + row * k, k);
        RowScale s = fixed ? *fixed : row_scale(amax);
        if (fixed && amax >= 0x7f800000u) s = {std::numeric_limits<float>::quiet_NaN(), 0.0f, false};
        round_row(x + row * k, y + row * k, k, s);
    }
}

Tensor int8_fake_quantize(Tensor x_in, std::optional<Tensor> scale) {
    STD_TORCH_CHECK(x_in.dim() >= 1, "int8_fake_quantize: x: expected at least one dimension");
    RowScale given{};
    if (scale) {
        STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float, "int8_fake_quantize: scale: expected float32");
        STD_TORCH_CHECK(scale->numel() == 1, "int8_fake_quantize: scale: expected one element");
        given = static_scale(*data<float>(*scale), 0);
    }
    const Tensor x = as_contiguous(x_in);
    const std::vector<int64_t> sizes = sizes_of(x);
    const int64_t k = sizes.back();
    const int64_t rows = k ? x.numel() / k : 0;
    Tensor y = new_output(x, sizes, x.scalar_type());

    dispatch_float(x.scalar_type(), "int8_fake_quantize: x", [&](auto zero) {
        using T = decltype(zero);
        const T* from = data<T>(x);
        T* to = mutable_data<T>(y);
        const RowScale* fixed = scale ? &given : nullptr;
        auto* const kernel = compiled<round_rows<T>>();
        parallel_rows(rows, 2 * k * sizeof(T),
                      [&](int64_t begin, int64_t end) { kernel(from, to, fixed, begin, end, k); });
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("int8_fake_quantize", TORCH_BOX(&engine::int8_fake_quantize)); }
