// block_int8_linear for many rows of activations with AVX-512: a row of blocks, packed, by tiles of activations where
// they lie (common/block_avx512.h).
#pragma once

#include "common/block.h"
#include "common/block_avx512.h"
#include "common/gemm_int8.h"

namespace engine {

constexpr int64_t kBlockRows = 512;  // rows of activations to a task: sums of up to 128 KB

#if ENGINE_X86
struct StripScratch;  // tag: what a thread packs and sums in

template <class T>
ENGINE_AVX512 void finish_strip(const FinishRows<T>& f, const int64_t* sums, int64_t width) {
    finish_rows<0>(f, sums, width);
}
// By whole vectors: rows of a strip are too short for a loop that has to find out how it may be vectorised.
template <class T>
ENGINE_AVX512 void finish_strip(const FinishRows<T>& f,
                                const int32_t* sums,  // [f.rows, width]
                                int64_t width) {
    if (f.columns < width) return finish_rows<0>(f, sums, width);
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 scale = _mm512_loadu_ps(f.call.scale + f.column + j);
        const __m512 bias = f.call.bias ? _mm512_loadu_ps(f.call.bias + f.column + j) : _mm512_setzero_ps();
        for (int64_t r = 0; r < f.rows; ++r) {
            const __m512 acc = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * width + j));
            __m512 y = _mm512_mul_ps(acc, _mm512_mul_ps(_mm512_set1_ps(f.row_scale[r]), scale));
            if (f.call.bias) y = _mm512_add_ps(y, bias);
            T* to = f.call.y + (f.row + r) * f.call.n + f.column + j;
            if constexpr (std::is_same_v<T, float>) {
                _mm512_storeu_ps(to, y);
            } else {
                alignas(64) float each[16];
                _mm512_store_ps(each, y);
                for (int i = 0; i < 16; ++i) to[i] = from_float<T>(each[i]);
            }
        }
    }
}

// Outputs of one row of blocks, at most kStripOutputs, by rows [begin, end) of the quantised ones.
template <class T>
struct StripTask {
    static constexpr int64_t kBytes = 32 << 10;  // of packed weights
    const LinearCall<T>& call;
    const Blocks& weight;
    const QuantizedRows<int8_t>& rows;  // shifted by 128
    int64_t chunk;                      // the call's row that is row 0 of `rows`
    int8_t* packed;                     // [kBytes]
    int32_t* start;                     // [kOutputs]
    int32_t* sums;                      // [tall, kOutputs]
    int64_t* wide_sums;                 // the same

    static constexpr int64_t bytes(int64_t tall) {
        return kBytes + 4 * kStripOutputs + 12 * tall * kStripOutputs + 256;
    }
    StripTask(Scratch<StripScratch>& scratch, int64_t tall, const LinearCall<T>& call, const Blocks& weight,
              const QuantizedRows<int8_t>& rows, int64_t chunk)
        : call(call),
          weight(weight),
          rows(rows),
          chunk(chunk),
          packed(scratch.take<int8_t>(kBytes)),
          start(scratch.take<int32_t>(kStripOutputs)),
          sums(scratch.take<int32_t>(tall * kStripOutputs)),
          wide_sums(scratch.take<int64_t>(tall * kStripOutputs)) {}

    void run(int64_t line, int64_t inside, int64_t begin, int64_t end) const {
        const auto [high, wide] = weight.shape;
        const int64_t column = line * high + inside, outputs = std::min(kStripOutputs, high - inside);
        if (column >= weight.n) return;
        const int64_t first = weight.offsets()[line], last = weight.offsets()[line + 1];
        const int64_t step = kBytes / (outputs * wide);
        const int64_t tiles = pieces_of(end - begin, strip_rows(outputs));
        const auto rows_of = [&](int64_t t) { return (end - begin) * t / tiles; };  // as even as can be
        const bool widens = (last - first) * wide > kExactDepth;                    // too many for sums in int32
        if (widens) std::fill_n(wide_sums, (end - begin) * outputs, int64_t{0});
        for (int64_t i = first; i == first || i < last; i += step) {
            const int64_t stop = std::min(last, i + step);
            BlockInt8Avx512::pack(weight.blocks<int8_t>() + i * high * wide, high, wide, stop - i, inside, outputs,
                                  packed, start);
            BlockStrip<int8_t> strip{weight.columns() + i, stop - i, wide, packed};
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t row = begin + rows_of(t), count = begin + rows_of(t + 1) - row;
                const int64_t at = (row - begin) * outputs;
                const auto* q = reinterpret_cast<const uint8_t*>(rows.q + row * rows.stride);
                strip.ask_next<int8_t>(weight, stop, inside, outputs, t, tiles);
                if (stop == last) {
                    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
                    strip.y = reinterpret_cast<const char*>(call.y + (chunk + row) * call.n + column);
                    strip.y_stride = call.n * kSize;
                    strip.y_lines = pieces_of(std::min(outputs, weight.n - column) * kSize, 64);
                }
                strip_tile<BlockInt8Avx512>(count, outputs, q, rows.stride, strip, start, i > first && !widens,
                                            sums + at);
                if (widens) {
                    for (int64_t j = at; j < at + count * outputs; ++j) wide_sums[j] += sums[j];
                }
                if (stop < last) continue;
                const FinishRows<T> f{
                    call, rows.scale + row, nullptr, chunk + row, count, column, std::min(outputs, weight.n - column)};
                if (widens) {
                    finish_strip(f, wide_sums + at, outputs);
                } else {
                    finish_strip(f, sums + at, outputs);
                }
            }
        }
    }
};

// How rows of activations [0, m) and strips of outputs are shared out: band by band of rows, whose activations then
// stay in L2, and within a band strip by strip. Threads get equal work, not equally many strips.
struct StripPlan {
    const Blocks& weight;
    int64_t m, slices, bands, tall;

    StripPlan(const Blocks& weight, int64_t m, int64_t threads)
        : weight(weight), m(m), slices(pieces_of(weight.shape.rows, kStripOutputs)) {
        constexpr int64_t kBandBytes = 640 << 10;  // of activations, without what lies between rows
        // Each band packs the weights again, which takes as long as to multiply them by some eight rows.
        const int64_t fitting = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(1, weight.k), 64, kBlockRows);
        bands = pieces_of(m, fitting);
        const int64_t shared = pieces_of(bands, threads) * threads;  // so that each thread keeps to bands of its own
        if (bands > 1 && m >= 48 * shared) bands = shared;
        tall = pieces_of(m, bands);
    }
    // The first row of a band; all are equally tall but for one row, as threads share them out by number.
    int64_t band_row(int64_t band) const { return m * band / bands; }
    int64_t strips() const { return weight.row_blocks() * slices; }
    int64_t tasks() const { return strips() * bands; }
    // In blocks; what a strip takes beside them counts as one.
    int64_t work_before(int64_t task) const {
        const int64_t strip = task % strips(), line = strip / slices;
        const auto until = [&](int64_t lines) { return (weight.offsets()[lines] + lines) * slices; };
        const int64_t within = strip % slices * (weight.offsets()[line + 1] - weight.offsets()[line] + 1);
        return task / strips() * until(weight.row_blocks()) + until(line) + within;
    }
    int64_t work() const { return (weight.values.size(0) + weight.row_blocks()) * slices * bands; }
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
};

template <class T>
void strip_linear(const LinearCall<T>& call, const Blocks& weight) {
    using Rows = QuantizedRows<int8_t>;
    const auto [high, wide] = weight.shape;
    const int64_t across = pieces_of(call.k, wide) * wide;  // activations end in zeros as far as blocks reach
    const int64_t chunk_rows =
        std::min(call.m, std::max<int64_t>(192, kActivationBytes / std::max<int64_t>(1, across)));
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    ActivationScratch scratch(Rows::scratch_bytes(chunk_rows, across));
    Rows rows(scratch, chunk_rows, across);
    rows.k = call.k;
    rows.zero = -128;
    for (int64_t chunk = 0; chunk < call.m; chunk += chunk_rows) {
        rows.rows = std::min(chunk_rows, call.m - chunk);
        quantize_activations(call, chunk, rows);
        const StripPlan plan(weight, rows.rows, threads);
        const auto parts = [&](int64_t from, int64_t to) {
            Scratch<StripScratch> own(StripTask<T>::bytes(plan.tall));
            const StripTask<T> task(own, plan.tall, call, weight, rows, chunk);
            const int64_t end = plan.task_at(plan.work() * to / threads);
            for (int64_t i = plan.task_at(plan.work() * from / threads); i < end; ++i) {
                const int64_t band = i / plan.strips(), strip = i % plan.strips();
                task.run(strip / plan.slices, strip % plan.slices * kStripOutputs, plan.band_row(band),
                         plan.band_row(band + 1));
            }
        };
        const int64_t part_bytes = plan.work() / threads * std::min(high, kStripOutputs) * wide * plan.tall / 32;
        if (part_bytes < kGrainBytes) {
            parts(0, threads);
        } else {
            torch::stable::parallel_for(0, threads, 1, parts);
        }
    }
}
#endif

}  // namespace engine
