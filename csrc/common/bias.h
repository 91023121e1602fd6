// The bias of a linear op.
#pragma once

#include <cstdint>
#include <optional>

#include "common/dtype.h"
#include "common/floats.h"
#include "common/scratch.h"
#include "common/tensor.h"

namespace engine {

struct BiasScratch;  // tag: a bias as fp32, held by the calling thread

// A bias of any of the three dtypes as fp32, for the length of a call.
class FloatBias {
  public:
    explicit FloatBias(const std::optional<Tensor>& bias)
        : contiguous_(bias ? std::optional<Tensor>(as_contiguous(*bias)) : std::nullopt) {
        if (!contiguous_) return;
        if (contiguous_->scalar_type() == ScalarType::Float) {
            data_ = engine::data<float>(*contiguous_);
            return;
        }
        const int64_t n = contiguous_->numel();
        scratch_.emplace(n * static_cast<int64_t>(sizeof(float)));
        float* as_float = scratch_->take<float>(n);
        dispatch_float(contiguous_->scalar_type(), "bias", [&](auto zero) {
            const auto* from = engine::data<decltype(zero)>(*contiguous_);
            to_floats<decltype(zero)>()(from, n, as_float);
        });
        data_ = as_float;
    }
    const float* data() const { return data_; }  // [n], or null

  private:
    std::optional<Tensor> contiguous_;
    std::optional<Scratch<BiasScratch>> scratch_;
    const float* data_ = nullptr;
};

}  // namespace engine
