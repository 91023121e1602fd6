// What the kernels for many rows of activations by a block-sparse weight share with AVX-512.
//
// The weights are read where they lie: 32 bits of an output, four int8 weights, two bfloat16 or one fp32, are broadcast
// and multiplied by as many activations of each of 16 rows, which a vector holds. So it is the activations that are
// packed, and a row of blocks costs nothing but its products and outputs. What a product is is said by PRODUCTS:
//
//   kSize                       bytes of a weight
//   Sum, Lanes                  int32_t or float, and a vector of them
//   start(start, r, together)   what the sums of output r begin with; of two sums to a row one alone, if `together`
//   accumulate(acc, x, w)       adds the products of 32 bits to each lane of acc
//   bits(acc), add(a, b)        sums as bits, and bits added as sums
//   kClosesChains               whether sums are added to those in memory every so often (gemm_float.h's chains)
#pragma once

#include "common/block.h"
#include "common/registers_avx512.h"
#include "common/round.h"
#if ENGINE_X86
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/floats.h"

namespace engine {

constexpr int64_t kStripOutputs = 64;  // at most so many to a strip; always a multiple of 16

// Rows of activations that are packed and multiplied together: two vectors of 16, one where so few are left, or half of
// one, which holds twice as many activations of each of 8 rows.
constexpr int64_t kGroupRows = 32;
constexpr int64_t group_width(int64_t rows) { return rows > 16 ? 32 : rows > 8 ? 16 : 8; }

// 16 rows of 4 dwords as 4 of 16.
ENGINE_AVX512 ENGINE_INLINE void transpose_16x4_avx512(const void* rows, int64_t stride_bytes, __m512i (&columns)[4]) {
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    __m512i four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // rows 4 i to 4 i + 3
        const char* from = static_cast<const char*>(rows) + 4 * i * stride_bytes;
        four[i] = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        from += stride_bytes;
        four[i] = _mm512_inserti32x4(four[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), 1);
        from += stride_bytes;
        four[i] = _mm512_inserti32x4(four[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), 2);
        from += stride_bytes;
        four[i] = _mm512_inserti32x4(four[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), 3);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i index = half == 0 ? first : second;
        const __m512i low = _mm512_permutex2var_epi32(four[0], index, four[1]);
        const __m512i high = _mm512_permutex2var_epi32(four[2], index, four[3]);
        columns[2 * half] = _mm512_shuffle_i32x4(low, high, 0x44);
        columns[2 * half + 1] = _mm512_shuffle_i32x4(low, high, 0xee);
    }
}

// What a tile asks memory for meanwhile, a little at each step: many lines at once would hold up its own loads.
struct StripPrefetch {
    const char* next;                  // blocks that follow: twelve lines for 64 bytes of a block's row
    const char *output, *last_output;  // where outputs will be written: a row for each block
    int64_t output_stride;             // bytes
};

// One row of blocks, of which R outputs are wanted. All but columns in bytes.
struct StripBlocks {
    const char* values;      // [count] of [R, wide], `stride` from one to the next
    int64_t stride, wide;    // wide: of a block's row
    const int32_t* columns;  // [count]: where each stands, in blocks
    int64_t count;
};

// Where the sums of R outputs by `Width` rows of activations begin, and where they go.
template <class Sum>
struct StripSums {
    Sum* sums;         // [R, Width]
    const Sum* start;  // [R], of integers
    bool add;          // to what `sums` holds
    int64_t chain;     // steps of 16 bytes of a block's row after which a chain is closed
};

template <class Products, int R, int V>
ENGINE_AVX512 ENGINE_INLINE void start_sums(typename Products::Lanes (&acc)[R][V], const typename Products::Sum* start,
                                            bool together) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = Products::start(start, r, together);
    }
}

template <class Products, int Width, int R, int V>
ENGINE_AVX512 ENGINE_INLINE void store_sums(const typename Products::Lanes (&acc)[R][V], typename Products::Sum* to,
                                            bool add) {
    constexpr __mmask16 kLanes = Width == 8 ? 0xff : 0xffff;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v, to += std::min(Width, 16)) {
            __m512i sums = Products::bits(acc[r][v]);
            if constexpr (Width == 8) {  // a row's two sums, one beside the other
                const __m512i both = Products::add(sums, _mm512_srli_epi64(sums, 32));
                sums = _mm512_permutexvar_epi32(even, both);
            }
            if (add) sums = Products::add(sums, _mm512_maskz_loadu_epi32(kLanes, to));
            _mm512_mask_storeu_epi32(to, kLanes, sums);
        }
    }
}

// `Wide` is blocks.wide, or 0 for any: GCC then keeps addresses in vector registers, and to fetch them waits in line
// with the products, which costs a sixth.
template <class Products, int R, int Width, int Wide>
ENGINE_AVX512 __attribute__((noinline)) void strip_tile(const char* x,  // dwords [.., Width], or [.., 8, 2]
                                                        StripBlocks blocks, StripPrefetch prefetch,
                                                        StripSums<typename Products::Sum> to) {
    constexpr int V = Width == 32 ? 2 : 1, kTogether = Width == 8 ? 2 : 1;  // dwords of a row that a vector holds
    const int64_t wide = Wide ? Wide : blocks.wide;
    typename Products::Lanes acc[R][V];
    start_sums<Products>(acc, to.start, kTogether == 2);
    [[maybe_unused]] int64_t left = to.chain;
    const char* w = blocks.values;
    const int32_t* const end = blocks.columns + blocks.count;
    for (const int32_t* column = blocks.columns; column != end; ++column, w += blocks.stride) {
        ask_to_write(prefetch.output);
        ask_to_write(prefetch.output + 64);
        if (prefetch.output != prefetch.last_output) prefetch.output += prefetch.output_stride;
        const char* q = x + *column * wide * Width;
        for (int64_t k = 0; k < wide; k += 16) {
#pragma GCC unroll 4
            for (int f = 0; f < 4; f += kTogether, q += 64 * V) {
                constexpr int kLines[2][4] = {{1, 1, 1, 0}, {2, 0, 1, 0}};
#pragma GCC unroll 2
                for (int line = 0; line < kLines[kTogether - 1][f]; ++line, prefetch.next += 64) {
                    __builtin_prefetch(prefetch.next, 0, 2);
                }
                __m512i activations[V];
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) activations[v] = _mm512_load_si512(q + 64 * v);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    std::conditional_t<kTogether == 1, int32_t, int64_t> few;
                    std::memcpy(&few, w + r * wide + k + 4 * f, sizeof few);
                    const __m512i weights = kTogether == 1 ? _mm512_set1_epi32(few) : _mm512_set1_epi64(few);
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) Products::accumulate(acc[r][v], activations[v], weights);
                }
            }
            if constexpr (Products::kClosesChains) {
                if (--left == 0) {
                    store_sums<Products, Width>(acc, to.sums, to.add);
                    start_sums<Products>(acc, to.start, kTogether == 2);
                    to.add = true;
                    left = to.chain;
                }
            }
        }
    }
    store_sums<Products, Width>(acc, to.sums, to.add);
}

// The outputs of a strip, which are 16, 32, 48 or 64, by tiles as even as can be: where each begins, and the end.
struct StripTiles {
    int64_t count, first[7];
};
inline const StripTiles& strip_tiles(int64_t outputs) {
    static constexpr StripTiles kTiles[4] = {
        {2, {0, 8, 16}}, {3, {0, 10, 21, 32}}, {4, {0, 12, 24, 36, 48}}, {6, {0, 10, 21, 32, 42, 53, 64}}};
    return kTiles[outputs / 16 - 1];
}

template <class Products>
using StripTile = void (*)(const char*, StripBlocks, StripPrefetch, StripSums<typename Products::Sum>);

template <class Products, int Width, int Wide>
StripTile<Products> strip_tile_of(int64_t outputs) {
    if (outputs == 8) return strip_tile<Products, 8, Width, Wide>;
    if (outputs == 10) return strip_tile<Products, 10, Width, Wide>;
    if (outputs == 11) return strip_tile<Products, 11, Width, Wide>;
    return strip_tile<Products, 12, Width, Wide>;
}
// `wide`: columns of a block.
template <class Products, int Width>
StripTile<Products> strip_tile_of(int64_t outputs, int64_t wide) {
    constexpr int kSize = Products::kSize;
    if (wide == 16) return strip_tile_of<Products, Width, 16 * kSize>(outputs);
    if (wide == 32) return strip_tile_of<Products, Width, 32 * kSize>(outputs);
    if (wide == 64) return strip_tile_of<Products, Width, 64 * kSize>(outputs);
    return strip_tile_of<Products, Width, 0>(outputs);
}
template <class Products>
StripTile<Products> strip_tile_of(int64_t outputs, int64_t width, int64_t wide) {
    if (width == 32) return strip_tile_of<Products, 32>(outputs, wide);
    if (width == 16) return strip_tile_of<Products, 16>(outputs, wide);
    return strip_tile_of<Products, 8>(outputs, wide);
}

// The sums of `outputs` outputs by one group of activations, tile by tile, which ask for a share each of what follows
// these blocks and of where their outputs go.
template <class Products, class T>
void multiply_strip(const char* x, const StripBlocks& blocks, int64_t outputs, int64_t width,
                    int64_t group,                  // number of the group
                    T* y, int64_t n, int64_t rows,  // [rows, n], from the strip's first output on
                    StripSums<typename Products::Sum> to) {
    constexpr int64_t kAsked = 12;  // outputs of the next blocks that a tile asks for
    const StripTiles& tiles = strip_tiles(outputs);
    const char* next = blocks.values + blocks.count * blocks.stride;
    const auto* output = reinterpret_cast<const char*>(y);
    const int64_t y_stride = n * static_cast<int64_t>(sizeof(T)), y_rows = pieces_of(rows, tiles.count);
    for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t first = tiles.first[t], asked = kAsked * (group * tiles.count + t);
        StripBlocks part = blocks;
        part.values += first * blocks.wide;
        const StripPrefetch prefetch{asked < outputs ? next + asked * blocks.wide * blocks.count : next,
                                     output + std::min(t * y_rows, rows - 1) * y_stride,
                                     output + std::min((t + 1) * y_rows, rows) * y_stride - y_stride, y_stride};
        StripSums<typename Products::Sum> sums = to;
        sums.sums += first * width;
        if (sums.start) sums.start += first;
        strip_tile_of<Products>(tiles.first[t + 1] - first, width, blocks.wide / Products::kSize)(x, part, prefetch,
                                                                                                  sums);
    }
}

// Up to 16 rows of activations as 16 rows of a group, or 8 as all of one. Strides and k in bytes.
ENGINE_AVX512 inline void pack_activations(const void* rows,  // [16, stride]
                                           int64_t stride, int64_t k,
                                           void* to,  // dwords [k / 4, width], or [k / 8, 8, 2]
                                           int64_t width) {
    const char* from = static_cast<const char*>(rows);
    char* packed = static_cast<char*>(to);
    if (width == 8) {
        for (int64_t i = 0; i < k; i += 8, packed += 64) {
            for (int64_t r = 0; r < 8; ++r) std::memcpy(packed + 8 * r, from + r * stride + i, 8);
        }
        return;
    }
    for (int64_t i = 0; i < k; i += 16, packed += 16 * width) {
        __m512i dwords[4];
        transpose_16x4_avx512(from + i, stride, dwords);
#pragma GCC unroll 4
        for (int f = 0; f < 4; ++f) _mm512_store_si512(packed + 4 * f * width, dwords[f]);
    }
}

// At most 16 outputs of at most 16 rows of activations: whole vectors of outputs, by the transpose of the sums. Each is
// value(row, sums), and value's float lanes beyond `columns` are not stored.
template <class T, class Value>
ENGINE_AVX512 ENGINE_INLINE void write_square(const void* sums,  // dwords [16, width]
                                              int64_t width, int64_t rows, int64_t columns, const Value& value, T* to,
                                              int64_t n) {  // [rows, n]
    for (int64_t row = 0; row < rows; row += 4) {
        __m512i four[4];
        transpose_16x4_avx512(static_cast<const int32_t*>(sums) + row, 4 * width, four);
        for (int64_t r = 0; r < std::min<int64_t>(4, rows - row); ++r, to += n) {
            const __m512 y = value(row + r, four[r]);
            if (columns == 16) {
                store_16_avx512(to, y);
            } else {
                alignas(64) T all[16];
                store_16_avx512(all, y);
                std::copy_n(all, columns, to);
            }
        }
    }
}

ENGINE_AVX512 ENGINE_INLINE __m512 load_lanes_avx512(__mmask16 lanes, const float* x) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(lanes, x));
}

// How rows of activations [0, m) and strips of outputs are shared out: band by band of rows, and within a band strip by
// strip. Threads get equal work, not equally many strips.
struct StripPlan {
    const Blocks& weight;
    int64_t m, groups, slices, bands;

    StripPlan(const Blocks& weight, int64_t m, int64_t bands)
        : weight(weight),
          m(m),
          groups(pieces_of(m, kGroupRows)),
          slices(pieces_of(weight.shape.rows, kStripOutputs)),
          bands(bands) {}
    int64_t most_groups() const { return pieces_of(groups, bands); }  // of a band
    int64_t first_group(int64_t band) const { return groups * band / bands; }
    int64_t row(int64_t band) const { return std::min(m, first_group(band) * kGroupRows); }
    int64_t strips() const { return weight.row_blocks() * slices; }
    int64_t tasks() const { return strips() * bands; }
    // In blocks by groups. What a strip takes beside its blocks counts as one.
    int64_t work_before(int64_t task) const {
        const int64_t band = task / strips(), strip = task % strips(), line = strip / slices;
        const auto until = [&](int64_t lines) { return weight.offsets()[lines] + lines; };
        const int64_t first = first_group(band);
        int64_t work = first * until(weight.row_blocks()) * slices;
        if (strip > 0) {
            const int64_t inside = strip % slices * (until(line + 1) - until(line));
            work += (first_group(band + 1) - first) * (until(line) * slices + inside);
        }
        return work;
    }
    int64_t work() const { return work_before(tasks()); }
    // The first task before which there is as much work.
    int64_t task_at(int64_t before) const {
        int64_t low = 0, high = tasks();
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (work_before(middle) < before) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
    // Whether it isn't worth waking another thread for. `size`: bytes of a weight. Products, and what a strip takes
    // besides, are slower than the passes over memory that kGrainBytes is for.
    bool small(int64_t threads, int64_t size) const {
        const int64_t bytes =
            work() / threads * std::min(weight.shape.rows, kStripOutputs) * weight.shape.columns * size;
        return bytes * group_width(m) / kGroupRows < kGrainBytes / 16;
    }
    // Where the work of a thread begins, and that of the one before it ends.
    int64_t first_task(int64_t thread, int64_t threads) const { return task_at(work() * thread / threads); }
};

}  // namespace engine
#endif
