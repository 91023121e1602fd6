// A codec with its parameters, for the pieces of an all-reduce in shared memory. The formats stand in codec.h.
#pragma once

#include <cstddef>

#include "ring/shared_memory.h"

namespace engine::ring {

constexpr size_t kCodecBlockElements = 256;  // pieces begin at multiples of it

struct Wire {
    Codec codec;
    double density;  // of the bitmap

    // `to` takes up to 4 * n bytes from n = 256 on and less than 1 KiB below that, at an address that is a multiple of
    // 8. The bitmap codec leaves zeros in x.
    void encode(float* x,         // [n]
                float* residual,  // [n], or null
                size_t n, char* to) const;

    // x += value * factor. False where the wire contradicts itself; nothing is read or written out of bounds.
    bool decode_add(const char* from, size_t n, float factor,
                    float* x) const;  // [n]
};

}  // namespace engine::ring
