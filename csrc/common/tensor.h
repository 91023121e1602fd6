// Short words for the libtorch stable ABI, and the checks that every binding shares. The messages are terse on purpose:
// engine.ops checks again in Python when a kernel refuses, and raises there with the argument, its value and its type.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace engine {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// t itself where its elements lie in order, a copy elsewhere.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A new contiguous tensor on the device of `like`. On the CPU without the dispatcher, which stable::new_empty passes
// through twice: half a microsecond, a tenth of a small layer.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
    if (!like.is_cpu()) return torch::stable::new_empty(like, sizes, dtype);
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
    const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    type, aoti_torch_device_type_cpu(), -1, &made));
    return Tensor(made);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// The product of all sizes but the last.
inline int64_t rows_of(const std::vector<int64_t>& sizes) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
    return rows;
}

template <class T>
const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

// Work for one thread that is worth waking another for: about 20 µs of a memory-bound loop.
constexpr int64_t kGrainBytes = 128 << 10;

// Runs f(begin, end) over [0, rows) on torch's own threads, so that torch.set_num_threads holds.
template <class F>
void parallel_rows(int64_t rows, int64_t bytes_per_row, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_row));
    if (rows <= grain) {  // spares the call across the ABI
        if (rows > 0) f(int64_t{0}, rows);
    } else {
        torch::stable::parallel_for(0, rows, grain, f);
    }
}

// Runs f(begin, end) over [0, count) on torch's threads, or on this one where the work isn't worth waking another for.
template <class F>
void parallel_for_unless(bool serial, int64_t count, int64_t grain, const F& f) {
    if (serial) {
        f(int64_t{0}, count);
    } else {
        torch::stable::parallel_for(0, count, grain, f);
    }
}

}  // namespace engine
