// block_linear: float activations times a weight of which only some blocks are kept, in fp32. Blocks are multiplied in
// the order of memory, each by a few rows of activations at a time, so that a block is read once for all of them.

#include <cstring>

#include "common/block.h"
#include "common/gemm_float.h"

namespace engine {
namespace {

constexpr int64_t kLanes = 8;       // sums of an output, so that additions need not wait for each other
constexpr int64_t kMaxBlock = 256;  // rows and columns of a block

// One row of blocks by a few rows of activations. The body for every instruction set: it vectorises by itself where it
// is inlined.
template <class T, class V>
ENGINE_INLINE void line_body(const FloatLinear<T>& call, const FloatRows& rows, const Blocks& weight, int64_t line) {
    const auto [high, wide] = weight.shape;
    alignas(64) float sums[kMaxBlock][kDotRows][kLanes];
    alignas(64) float w[kMaxBlock], last[kDotRows][kMaxBlock];
    for (int64_t r = 0; r < high; ++r) std::memset(sums[r], 0, call.m * sizeof sums[r][0]);
    for (int64_t i = weight.offsets()[line]; i < weight.offsets()[line + 1]; ++i) {
        const V* values = data<V>(weight.values) + i * high * wide;
        const int64_t column = weight.columns()[i] * wide, inside = std::min(wide, weight.k - column);
        const float* x = rows.x + column;
        int64_t stride = rows.stride;
        if (inside < wide) {  // what lies beyond K counts for nothing, not even where it is no number
            std::memset(last, 0, sizeof last);
            for (int64_t m = 0; m < call.m; ++m) std::copy_n(x + m * stride, inside, last[m]);
            x = last[0];
            stride = kMaxBlock;
        }
        for (int64_t r = 0; r < high; ++r) {
            for (int64_t c = 0; c < wide; ++c) w[c] = to_float(values[r * wide + c]);
            if (inside < wide) std::fill(w + inside, w + wide, 0.0f);
            for (int64_t m = 0; m < call.m; ++m) {
                float* __restrict sum = sums[r][m];
                const float* from = x + m * stride;
                for (int64_t c = 0; c < wide; c += kLanes) {
                    for (int64_t j = 0; j < kLanes; ++j) sum[j] += w[c + j] * from[c + j];
                }
            }
        }
    }
    for (int64_t r = 0; r < high && line * high + r < weight.n; ++r) {
        for (int64_t m = 0; m < call.m; ++m) {
            const float* a = sums[r][m];
            const float sum = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
            call.y[m * call.n + line * high + r] = float_output(sum, call, line * high + r);
        }
    }
}

template <class T, class V>
void line_portable(const FloatLinear<T>& call, const FloatRows& rows, const Blocks& weight, int64_t line) {
    line_body<T, V>(call, rows, weight, line);
}
#if ENGINE_X86
template <class T, class V>
ENGINE_AVX2 void line_avx2(const FloatLinear<T>& call, const FloatRows& rows, const Blocks& weight, int64_t line) {
    line_body<T, V>(call, rows, weight, line);
}
template <class T, class V>
ENGINE_AVX512 void line_avx512(const FloatLinear<T>& call, const FloatRows& rows, const Blocks& weight, int64_t line) {
    line_body<T, V>(call, rows, weight, line);
}
#endif

template <class T, class V>
void linear(const FloatLinear<T>& call, const Blocks& weight) {
    auto kernel = line_portable<T, V>;
#if ENGINE_X86
    if (isa() == Isa::avx2) kernel = line_avx2<T, V>;
    if (isa() == Isa::avx512) kernel = line_avx512<T, V>;
#endif
    const int64_t lines = weight.high();
    // kDotRows rows of activations at a time. Threads take rows of blocks, and so outputs.
    for (int64_t row = 0; row < call.m; row += kDotRows) {
        FloatLinear<T> part = call;
        part.m = std::min(kDotRows, call.m - row);
        part.x += row * call.k;
        part.y += row * call.n;
        float_dot_linear(
            part, 0, [](int64_t, int64_t, const FloatRows&) {},
            [&](const FloatRows& rows) {
                parallel_rows(lines, 4 * part.m * weight.values.numel() / std::max<int64_t>(1, lines),
                              [&](int64_t begin, int64_t end) {
                                  for (int64_t line = begin; line < end; ++line) kernel(part, rows, weight, line);
                              });
            });
    }
}

Tensor block_linear(Tensor x_in, Tensor crow_indices, Tensor col_indices, Tensor values, int64_t n,
                    std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x_in.dim() >= 1, "block_linear: x: expected at least one dimension");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "block_linear: bias: expected shape [N]");
    const int64_t k = x_in.size(-1);
    const Blocks weight("block_linear", crow_indices, col_indices, values, n, k);
    const Tensor x = as_contiguous(x_in);
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() = n;
    const int64_t m = rows_of(sizes);
    Tensor y = new_tensor(x, sizes, x.scalar_type());
    const FloatBias as_float(bias);
    dispatch_float(x.scalar_type(), "block_linear: x", [&](auto x_zero) {
        using T = decltype(x_zero);
        const FloatLinear<T> call{data<T>(x), nullptr, as_float.data(), mutable_data<T>(y), m, n, k};
        dispatch_float(values.scalar_type(), "block_linear: values",
                       [&](auto zero) { linear<T, decltype(zero)>(call, weight); });
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("block_linear", TORCH_BOX(&engine::block_linear)); }
