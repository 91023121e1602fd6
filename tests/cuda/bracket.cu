// The bracket that magnitude_threshold takes from its sample, for test_bracket.py.

#include "common/dtype.h"
#include "cuda/bracket.cuh"

namespace engine::cuda {
namespace {

// Magnitudes [low, high) of a 16-bit weight, as their bits.
std::tuple<int64_t, int64_t> bracket_of(Tensor weight, int64_t rank) {
    const OnDeviceOf device(weight);
    Tensor memory = new_tensor(weight, {kSampleBins / 2 + 3}, ScalarType::Long);
    fill_zero(memory.mutable_data_ptr(), memory.numel() * sizeof(int64_t), "bracket_of", device);
    auto* sample = static_cast<unsigned*>(memory.mutable_data_ptr());
    auto* bracket = reinterpret_cast<Bracket*>(sample + kSampleBins);
    find_bracket<Half>({weight}, weight.numel(), rank, sample, bracket, device);
    const Bracket found = read_back(bracket, "bracket_of", device);
    return {found.low, found.high};
}

}  // namespace
}  // namespace engine::cuda

STABLE_TORCH_LIBRARY_IMPL(engine_bracket, CUDA, m) { m.impl("bracket_of", TORCH_BOX(&engine::cuda::bracket_of)); }
