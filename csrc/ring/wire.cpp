#include "ring/wire.h"

#include <cmath>

#include "ring/codec.h"

namespace engine::ring {
namespace {

// Values that the bitmap has room for: more than the density asks for, because its threshold is an estimate.
int64_t bitmap_capacity(int64_t n, double density) {
    return std::min(n, static_cast<int64_t>(std::ceil(1.25 * density * static_cast<double>(n))) + 32);
}

int64_t blocks_of(int64_t n) { return (n + kCodecBlock - 1) / kCodecBlock; }

}  // namespace

static_assert(kCodecBlockElements == static_cast<size_t>(kCodecBlock));

void Wire::encode(float* x, float* residual, size_t count, char* to) const {
    const auto n = static_cast<int64_t>(count);
    if (codec == Codec::bf16)
        engine::ring::run(Bf16Encode{x, residual, n, reinterpret_cast<uint16_t*>(to)});
    else if (codec == Codec::int8)
        engine::ring::run(Int8Encode{x, residual, n, to, 0, blocks_of(n)});
    else
        bitmap_encode(x, residual, n, bitmap_threshold(x, residual, n, density), to, bitmap_capacity(n, density));
}

bool Wire::decode_add(const char* from, size_t count, float factor, float* x) const {
    const auto n = static_cast<int64_t>(count);
    if (codec == Codec::bitmap) return bitmap_decode_add(from, bitmap_capacity(n, density), n, factor, x);
    if (codec == Codec::bf16)
        engine::ring::run(Bf16Decode{reinterpret_cast<const uint16_t*>(from), n, factor, true, x});
    else
        engine::ring::run(Int8Decode{from, n, factor, true, x, 0, blocks_of(n)});
    return true;
}

}  // namespace engine::ring
