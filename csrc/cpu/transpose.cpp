// transpose: matrices [B, R, C] to [B, C, R], which turns images round between channels first and channels last. Memory
// decides: every value is read and written once.

#include <algorithm>

#include "common/dtype.h"
#include "common/huge_pages.h"
#include "common/isa.h"
#include "common/round.h"
#include "common/tensor.h"
#if ENGINE_X86
#include <immintrin.h>
#endif

namespace engine {
namespace {

constexpr int64_t kTile = 64;  // rows and columns of a task: both sides of it stay in L1

// A tile of rows × columns: to[c, r] = from[r, c].
template <class T>
void tile_portable(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
    }
}

#if ENGINE_X86
// Half of two rows that are four apart, side by side.
ENGINE_AVX2 ENGINE_INLINE __m256 load_halves(const float* row, const float* fourth_next) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(fourth_next), 1);
}

ENGINE_AVX2 ENGINE_INLINE void transpose_8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int half = 0; half < 2; ++half) {
        __m256 row[4];
        for (int i = 0; i < 4; ++i) {
            const float* start = from + i * from_stride + 4 * half;
            row[i] = load_halves(start, start + 4 * from_stride);
        }
        const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
        const __m256 c = _mm256_unpacklo_ps(row[2], row[3]), d = _mm256_unpackhi_ps(row[2], row[3]);
        float* out = to + 4 * half * to_stride;
        _mm256_storeu_ps(out, _mm256_shuffle_ps(a, c, 0x44));
        _mm256_storeu_ps(out + to_stride, _mm256_shuffle_ps(a, c, 0xee));
        _mm256_storeu_ps(out + 2 * to_stride, _mm256_shuffle_ps(b, d, 0x44));
        _mm256_storeu_ps(out + 3 * to_stride, _mm256_shuffle_ps(b, d, 0xee));
    }
}

// For AVX-512 processors too.
ENGINE_AVX2 void tile_avx2(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                           int64_t columns) {
    const int64_t whole_rows = round_down(rows, 8), whole_columns = round_down(columns, 8);
    for (int64_t r = 0; r < whole_rows; r += 16) {  // by two, so that a line of the output is written at once
        for (int64_t c = 0; c < whole_columns; c += 8) {
            for (int64_t i = r; i < std::min(whole_rows, r + 16); i += 8) {
                transpose_8x8(from + i * from_stride + c, from_stride, to + c * to_stride + i, to_stride);
            }
        }
    }
    tile_portable(from + whole_columns, from_stride, to + whole_columns * to_stride, to_stride, whole_rows,
                  columns - whole_columns);
    tile_portable(from + whole_rows * from_stride, from_stride, to + whole_rows, to_stride, rows - whole_rows, columns);
}
#endif

template <class T>
void tile(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
#if ENGINE_X86
    if constexpr (sizeof(T) == sizeof(float)) {
        if (isa() != Isa::portable) return tile_avx2(from, from_stride, to, to_stride, rows, columns);
    }
#endif
    tile_portable(from, from_stride, to, to_stride, rows, columns);
}

Tensor transpose(Tensor x_in) {
    STD_TORCH_CHECK(x_in.dim() == 3, "transpose: x: expected shape [B, R, C]");
    const Tensor x = as_contiguous(x_in);
    const int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    Tensor y = new_output(x, {batch, columns, rows}, x.scalar_type());
    const int64_t high = divide_up(rows, kTile), wide = divide_up(columns, kTile);
    dispatch_float(x.scalar_type(), "transpose: x", [&](auto zero) {
        using T = decltype(zero);
        const T* from = data<T>(x);
        T* to = mutable_data<T>(y);
        parallel_rows(batch * high * wide, 2 * kTile * kTile * static_cast<int64_t>(sizeof(T)),
                      [&](int64_t begin, int64_t end) {
                          for (int64_t i = begin; i < end; ++i) {
                              const int64_t r = i % high * kTile, c = i / high % wide * kTile;
                              const int64_t matrix = i / wide / high * rows * columns;
                              tile(from + matrix + r * columns + c, columns, to + matrix + c * rows + r, rows,
                                   std::min(kTile, rows - r), std::min(kTile, columns - c));
                          }
                      });
    });
    return y;
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("transpose", TORCH_BOX(&engine::transpose)); }
