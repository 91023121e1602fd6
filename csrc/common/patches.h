// The rows of activations that a linear op reads: those of a matrix, or the patches of an image where they lie.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/tensor.h"

namespace engine {

// The patches of an image [B, H, W, C]: a row of activations for each output of a convolution, of kh × kw contiguous
// runs. Steps are in elements.
struct Patches {
    int64_t height, width;                      // outputs of an image
    int64_t image_step, row_step, column_step;  // from one image, or row or column of outputs, to the next
    int64_t kh, kw, run;
    int64_t kh_step, kw_step;  // from one run to the next

    // From a view [B, Ho, Wo, kh, kw, C] of an image whose channels lie together.
    explicit Patches(const Tensor& x)
        : height(x.size(1)),
          width(x.size(2)),
          image_step(x.stride(0)),
          row_step(x.stride(1)),
          column_step(x.stride(2)),
          kh(x.size(3)),
          kw(x.size(4)),
          run(x.size(5)),
          kh_step(x.stride(3)),
          kw_step(x.stride(4)) {
        if (kw_step == run) {  // not dilated: a row of the kernel is one run
            run *= kw;
            kw = 1;
        }
    }
};

// x of a linear op as its binding got it: rows [..., K], or the patches [B, Ho, Wo, kh, kw, C] of an image, which are
// read where they lie.
struct LinearInput {
    Tensor x;
    std::optional<Patches> patches;
    std::vector<int64_t> sizes;  // of y; the last is the binding's to say
    int64_t m, k;

    LinearInput(const char* op, const Tensor& x_in, bool as_patches) : x(x_in), sizes(sizes_of(x_in)) {
        STD_TORCH_CHECK(x.dim() >= 1, op, ": x: expected at least one dimension");
        k = x.size(-1);
        if (as_patches) {
            STD_TORCH_CHECK(x.dim() == 6, op, ": x: expected patches [B, Ho, Wo, kh, kw, C]");
            k *= x.size(3) * x.size(4);
            sizes.resize(4);
            if (x.stride(5) != 1 && x.size(5) > 1) x = as_contiguous(x);
            patches.emplace(x);
        } else {
            x = as_contiguous(x);
        }
        m = rows_of(sizes);
    }
    const Patches* where() const { return patches ? &*patches : nullptr; }  // for LinearCall
};

// The rows that are to be quantised.
template <class T>
struct ActivationSource {
    const T* x;              // [m, k], or an image
    const Patches* patches;  // or null

    // One of them, [k]: where it lies, or put together in `scratch` [k].
    const T* row(int64_t index, int64_t k, T* scratch) const {
        if (!patches) return x + index * k;
        const Patches& p = *patches;
        const int64_t line = index / p.width;
        const T* from =
            x + line / p.height * p.image_step + line % p.height * p.row_step + index % p.width * p.column_step;
        T* to = scratch;
        for (int64_t i = 0; i < p.kh; ++i) {
            for (int64_t j = 0; j < p.kw; ++j, to += p.run) {
                std::memcpy(to, from + i * p.kh_step + j * p.kw_step, p.run * sizeof(T));
            }
        }
        return scratch;
    }
    // Bytes of that scratch.
    int64_t scratch_bytes(int64_t k) const { return patches ? k * static_cast<int64_t>(sizeof(T)) : 0; }
};

}  // namespace engine
