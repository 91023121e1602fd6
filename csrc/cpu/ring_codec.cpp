// ring_encode, ring_decode and ring_prune_encode: csrc/ring/codec.h bound to tensors. All write into tensors of the
// caller, who reuses them: fresh memory would cost more than the work.

#include "common/tensor.h"
#include "ring/codec.h"

namespace engine {
namespace {

bool aligned(const Tensor& t, uintptr_t to) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % to == 0; }

void check_floats(const char* what, const Tensor& t, int64_t n) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == n && t.is_contiguous(), what,
                    ": expected float32 [n], contiguous");
}

void check_wire(const char* op, const Tensor& wire) {
    STD_TORCH_CHECK(wire.scalar_type() == ScalarType::Byte && wire.dim() == 1 && wire.is_contiguous(), op,
                    ": wire: expected uint8 [bytes], contiguous");
    STD_TORCH_CHECK(aligned(wire, 8), op, ": wire: expected an address that is a multiple of 8");
}

enum class Codec { bf16, int8, bitmap };

// Checks that the wire has the size that the codec makes of n elements.
Codec check_codec(const char* op, const std::string& codec, const Tensor& wire, int64_t n) {
    check_wire(op, wire);
    const int64_t bytes = wire.numel();
    if (codec == "bf16" && bytes == ring::bf16_bytes(n)) return Codec::bf16;
    if (codec == "int8" && bytes == ring::int8_bytes(n)) return Codec::int8;
    if (codec == "bitmap" && ring::bitmap_capacity(n, bytes) >= 0) return Codec::bitmap;
    STD_TORCH_CHECK(false, op, ": no codec ", codec, " makes ", bytes, " bytes of ", n, " elements");
}

int64_t blocks_of(int64_t n) { return (n + ring::kCodecBlock - 1) / ring::kCodecBlock; }

float* residual_data(const char* op, std::optional<Tensor>& residual, int64_t n) {
    if (!residual) return nullptr;
    check_floats(op, *residual, n);
    return mutable_data<float>(*residual);
}

void ring_encode(Tensor x, std::optional<Tensor> residual, std::string codec, Tensor wire) {
    const int64_t n = x.numel();
    check_floats("ring_encode: x", x, n);
    float* left = residual_data("ring_encode: residual", residual, n);
    const float* from = data<float>(x);
    switch (check_codec("ring_encode", codec, wire, n)) {
        case Codec::bf16: {
            auto* to = reinterpret_cast<uint16_t*>(mutable_data<uint8_t>(wire));
            return parallel_rows(n, left ? 10 : 6, [&](int64_t begin, int64_t end) {
                ring::run(ring::Bf16Encode{from + begin, left ? left + begin : nullptr, end - begin, to + begin});
            });
        }
        case Codec::int8: {
            auto* to = reinterpret_cast<char*>(mutable_data<uint8_t>(wire));
            return parallel_rows(blocks_of(n), ring::kCodecBlock * (left ? 9 : 5), [&](int64_t begin, int64_t end) {
                ring::run(ring::Int8Encode{from, left, n, to, begin, end});
            });
        }
        case Codec::bitmap:
            STD_TORCH_CHECK(false, "ring_encode: codec: bitmap is made by ring_prune_encode");
    }
}

void ring_prune_encode(Tensor x, std::optional<Tensor> residual, double density, Tensor wire) {
    const int64_t n = x.numel();
    check_floats("ring_prune_encode: x", x, n);
    STD_TORCH_CHECK(density > 0 && density <= 1, "ring_prune_encode: density: expected a number in (0, 1]");
    float* left = residual_data("ring_prune_encode: residual", residual, n);
    check_codec("ring_prune_encode", "bitmap", wire, n);
    float* from = mutable_data<float>(x);
    const float threshold = ring::bitmap_threshold(from, left, n, density);
    const int64_t capacity = ring::bitmap_capacity(n, wire.numel());
    ring::bitmap_encode(from, left, n, threshold, reinterpret_cast<char*>(mutable_data<uint8_t>(wire)), capacity);
}

void ring_decode(Tensor wire, std::string codec, double factor_in, bool add, Tensor x) {
    const int64_t n = x.numel();
    check_floats("ring_decode: x", x, n);
    const auto factor = static_cast<float>(factor_in);
    float* to = mutable_data<float>(x);
    const auto* from = reinterpret_cast<const char*>(data<uint8_t>(wire));
    switch (check_codec("ring_decode", codec, wire, n)) {
        case Codec::bf16: {
            const auto* values = reinterpret_cast<const uint16_t*>(from);
            return parallel_rows(n, add ? 10 : 6, [&](int64_t begin, int64_t end) {
                ring::run(ring::Bf16Decode{values + begin, end - begin, factor, add, to + begin});
            });
        }
        case Codec::int8:
            return parallel_rows(blocks_of(n), ring::kCodecBlock * (add ? 9 : 5), [&](int64_t begin, int64_t end) {
                ring::run(ring::Int8Decode{from, n, factor, add, to, begin, end});
            });
        case Codec::bitmap: {
            if (!add) std::fill(to, to + n, 0.0f);
            const int64_t capacity = ring::bitmap_capacity(n, wire.numel());
            STD_TORCH_CHECK(ring::bitmap_decode_add(from, capacity, n, factor, to),
                            "ring_decode: wire: header, bitmasks and values contradict each other");
        }
    }
}

}  // namespace
}  // namespace engine

STABLE_TORCH_LIBRARY_IMPL(engine, CPU, m) {
    m.impl("ring_encode", TORCH_BOX(&engine::ring_encode));
    m.impl("ring_prune_encode", TORCH_BOX(&engine::ring_prune_encode));
    m.impl("ring_decode", TORCH_BOX(&engine::ring_decode));
}
